"""Whatever callers do and whenever they are cancelled, no slot leaks, no wake-up is lost and no waiter is forgotten."""

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fakeclock import FakeClock, settle
from worker.errors import AdmissionClosedError, AdmissionTimeoutError
from worker.flow.circuit import CircuitConfig, CircuitState
from worker.flow.gate import AttemptSignal, Permit, RouteGate
from worker.flow.lane import BreakerEffect, BreakerScope
from worker.flow.queue import AdmissionOrder
from worker.flow.window.adaptive import AdaptiveWindow

SIGNALS = {
    "ok": AttemptSignal(breaker=BreakerEffect.SUCCESS),
    "nothing": AttemptSignal(),
    "refused": AttemptSignal(breaker=BreakerEffect.COUNT, error_class="connect", scope=BreakerScope.ROUTE),
    "auth": AttemptSignal(breaker=BreakerEffect.TRIP, error_class="auth", scope=BreakerScope.ROUTE),
    "loading": AttemptSignal(breaker=BreakerEffect.TRIP, error_class="not_ready"),
    "crowded": AttemptSignal(breaker=BreakerEffect.COUNT, overload=True, error_class="overloaded"),
    "throttled": AttemptSignal(
        breaker=BreakerEffect.TRIP, overload=True, error_class="rate_limited", retry_after_s=2.0, pause_s=2.0
    ),
}

ACTIONS = st.one_of(
    st.tuples(
        st.just("admit"),
        st.sampled_from([None, "a", "b", "c"]),
        st.none() | st.floats(0, 30),
        st.sampled_from([0.0, 0.0, 3.0]),
        st.integers(-2, 2),
    ),
    st.tuples(st.just("cancel"), st.integers(0, 1000)),
    st.tuples(st.just("finish"), st.integers(0, 1000), st.sampled_from(sorted(SIGNALS))),
    st.tuples(st.just("first_byte"), st.integers(0, 1000)),
    st.tuples(st.just("wait"), st.floats(0, 20)),
    st.tuples(st.just("part"), st.sampled_from([0.0, 0.3, 1.0])),
    st.tuples(st.sampled_from(["settle", "allow_probe", "pause", "resume"])),
)


class World:
    """A gate, the tasks that wait for it and the permits it has given."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.gate = RouteGate(
            lambda: AdaptiveWindow(3, 1, 6, now=self.clock.now),
            CircuitConfig(trip_failures=1),
            self.clock,
            max_lanes=2,
        )
        self.tasks: list[asyncio.Task[Permit]] = []
        self.permits: list[Permit] = []

    async def do(self, action: tuple) -> None:
        match action:
            case ("admit", model, give_up_s, delay_s, priority):
                order = AdmissionOrder(priority=priority, held=delay_s > 0)
                admission = self.gate.admit(order, lane_name=model, give_up_s=give_up_s, delay_s=delay_s)
                self.tasks.append(asyncio.ensure_future(admission))
            case ("cancel", index) if self.tasks:
                self.tasks[index % len(self.tasks)].cancel()
            case ("finish", index, signal) if self.permits:
                self.permits.pop(index % len(self.permits)).finish(SIGNALS[signal])
            case ("first_byte", index) if self.permits:
                self.permits[index % len(self.permits)].first_byte()
            case ("wait", seconds):
                self.clock.advance(seconds)
            case ("part", part):
                self.gate.set_part(part)
            case ("allow_probe" | "pause" | "resume" as name,):
                getattr(self.gate, name)()
            case ("settle",):
                await self.settle()

    async def settle(self) -> None:
        await settle(3)
        waiting = []
        for task in self.tasks:
            if not task.done():
                waiting.append(task)
            elif not task.cancelled():
                error = task.exception()
                assert error is None or isinstance(error, AdmissionTimeoutError)
                if error is None:
                    self.permits.append(task.result())
        self.tasks = waiting
        statistics = self.gate.statistics()
        assert statistics.waiting == len(self.tasks)
        assert statistics.in_flight == len(self.permits)
        assert self.clock.pending() <= 1 + 2 * len(self.tasks)


@settings(max_examples=150, deadline=None)
@given(st.lists(ACTIONS, max_size=60))
def test_no_slot_leaks_and_no_waiter_is_forgotten(actions):
    """After any history, healthy answers and time admit every waiter that is left, and leave the gate idle."""

    async def scenario() -> None:
        world = World()
        for action in actions:
            await world.do(action)
        world.gate.resume()
        world.gate.set_part(1.0)
        for _ in range(200):
            await world.settle()
            for permit in world.permits:
                permit.finish(SIGNALS["ok"])
            world.permits.clear()
            if not world.tasks:
                break
            world.clock.advance(10.0)
        assert world.tasks == []
        await world.settle()
        assert world.clock.pending() == 0
        assert world.gate.statistics().in_flight == 0

    asyncio.run(scenario())


@settings(max_examples=60, deadline=None)
@given(st.lists(ACTIONS, max_size=40))
def test_closing_ends_every_wait_whatever_the_state(actions):
    """No waiter survives `close`, and no timer either."""

    async def scenario() -> None:
        world = World()
        for action in actions:
            await world.do(action)
        await world.settle()
        world.gate.close()
        results = await asyncio.gather(*world.tasks, return_exceptions=True)
        assert all(isinstance(result, AdmissionClosedError) for result in results)
        assert world.clock.pending() == 0

    asyncio.run(scenario())


@settings(max_examples=60, deadline=None)
@given(st.lists(ACTIONS, max_size=40))
def test_an_open_breaker_never_has_two_probes(actions):
    """Between two reports at most one probe of the route is under way, unless the first is older than `probe_patience_s`."""

    async def scenario() -> None:
        world = World()
        started: dict[Permit, tuple[float, int]] = {}
        for action in actions:
            await world.do(action)
            await world.settle()
            route = world.gate.statistics().circuit
            trips = route.trips
            live = {permit for permit in world.permits if permit.is_route_probe}
            for permit in live - started.keys():
                started[permit] = (world.clock.now(), trips)
            if route.state is CircuitState.CLOSED or action == ("allow_probe",):
                started = dict.fromkeys(started, (float("-inf"), -1))
            recent = [p for p in live if started[p][1] == trips and world.clock.now() - started[p][0] < 30.0]
            assert len(recent) <= 1

    asyncio.run(scenario())
