"""The gate and its breaker: which attempt is the probe, what recovery admits, and what one model stops."""

import asyncio

import pytest

from tests.support.fakeclock import settle
from tests.support.gates import AUTH, OK, REFUSED, a_gate, admit, admit_after, idle, waiting
from worker.flow.breaker import Breaker, BreakerEffect, BreakerScope
from worker.flow.circuit import CircuitState
from worker.flow.gate import AttemptSignal, RouteGate
from worker.flow.queue import AdmissionOrder
from worker.flow.window.adaptive import AdaptiveWindow


async def test_a_probe_is_not_lost_with_one_that_is_being_cancelled(clock):
    """The others of the model do not stay parked because the one chosen to probe has just left."""
    gate = a_gate(clock, room=8)
    loading = AttemptSignal(breaker=BreakerEffect.TRIP, error_class="not_ready", scope=BreakerScope.MODEL)
    (await admit(gate, model="a")).finish(loading)
    leaving, next_one = waiting(gate, model="a"), waiting(gate, model="a")
    await settle()
    leaving.cancel()
    clock.advance(1.0)
    (await next_one).finish(OK)
    assert idle(gate, clock)


async def test_a_connection_closes_what_refused_connections_opened(clock):
    """The end of the probe's generation is not awaited; other causes need an answer."""
    for signal, wait_s, closes in ((REFUSED, 1.0, True), (AUTH, 10.0, False)):
        gate = a_gate(clock, room=8)
        while gate.statistics().breaker.route.state is CircuitState.CLOSED:
            (await admit(gate)).finish(signal)
        probe = await admit_after(gate, clock, wait_s)
        probe.connected()
        assert (gate.statistics().breaker.route.state is CircuitState.CLOSED) is closes
        probe.finish(OK)
        probe.connected()
        probe.first_byte()


async def test_recovery_causes_no_burst(clock):
    """When the breaker closes, the waiters start one after another within a second."""
    window = AdaptiveWindow(8, 1, 8, now=clock.now)
    gate = RouteGate(window, Breaker(now=clock.now, jitter=lambda: 0.0), clock)
    permit = await admit(gate)
    clock.advance(4.0)
    permit.finish(OK)
    (await admit(gate)).finish(AUTH)
    tasks = [waiting(gate) for _ in range(8)]
    clock.advance(10.0)
    await settle()
    next(task for task in tasks if task.done()).result().finish(OK)
    await settle()
    started = [sum(task.done() for task in tasks)]
    for _ in range(4):
        clock.advance(0.25)
        await settle()
        started.append(sum(task.done() for task in tasks))
    assert started[0] <= 3
    assert started == sorted(started)
    assert started[-1] == 8


async def test_three_refused_connections_stop_admission_and_one_probe_goes(clock):
    """While it is open none starts; after the wait exactly one does, and its success admits the others."""
    gate = a_gate(clock, room=4)
    for _ in range(3):
        (await admit(gate)).finish(REFUSED)
    tasks = [waiting(gate) for _ in range(4)]
    await settle()
    assert not any(task.done() for task in tasks)
    assert gate.statistics().breaker.route.error_class == "connect"
    clock.advance(1.0)
    await settle()
    assert [task.done() for task in tasks] == [True, False, False, False]
    probe = tasks[0].result()
    assert probe.is_probe
    clock.advance(5.0)
    await settle()
    assert sum(task.done() for task in tasks) == 1
    probe.finish(OK)
    assert len(await asyncio.gather(*tasks)) == 4


async def test_a_failed_probe_doubles_the_wait(clock):
    """1 s, then 2 s, then 4 s, then the maximum."""
    gate = a_gate(clock)
    (await admit(gate)).finish(AttemptSignal(breaker=BreakerEffect.TRIP, error_class="not_ready"))
    for wait in (1.0, 2.0, 4.0, 4.0, 4.0):
        task = waiting(gate)
        await settle()
        clock.advance(wait - 0.01)
        await settle()
        assert not task.done(), wait
        clock.advance(0.02)
        (await task).finish(REFUSED)


async def test_the_first_byte_of_a_probe_closes_the_breaker(clock):
    """A probe whose answer begins is enough: the end of its generation is not awaited."""
    gate = a_gate(clock, room=3)
    (await admit(gate)).finish(AUTH)
    tasks = [waiting(gate), waiting(gate)]
    clock.advance(10.0)
    await settle()
    assert [task.done() for task in tasks] == [True, False]
    tasks[0].result().first_byte()
    await settle()
    assert tasks[1].done()
    tasks[0].result().finish(OK)
    tasks[1].result().finish(OK)


async def test_after_a_cancelled_probe_the_next_one_starts(clock):
    """A probe that ends with a signal that says nothing does not keep the breaker half-open."""
    gate = a_gate(clock)
    (await admit(gate)).finish(AUTH)
    tasks = [waiting(gate), waiting(gate)]
    clock.advance(10.0)
    await settle()
    tasks[0].result().finish(AttemptSignal())
    await settle()
    assert tasks[1].done()
    assert tasks[1].result().is_probe


async def test_a_probe_needs_no_room_in_the_window(clock):
    """Attempts that hang since before the trip do not keep the probe back."""
    gate = a_gate(clock, room=2)
    await admit(gate)
    (await admit(gate)).finish(AUTH)
    await admit_after(gate, clock, 10.0)
    assert gate.statistics().in_flight == gate.statistics().window.limit
    assert (await admit_after(gate, clock, 30.0)).is_probe


async def test_a_probe_may_be_allowed_at_once(clock):
    """New credentials let one attempt start immediately."""
    gate = a_gate(clock)
    (await admit(gate)).finish(AUTH)
    tasks = [waiting(gate), waiting(gate)]
    await settle()
    gate.allow_probe()
    await settle()
    assert [task.done() for task in tasks] == [True, False]
    tasks[0].result().finish(OK)
    await tasks[1]


async def test_recovery_ends_every_delay(clock):
    """When the probe succeeds, held messages do not sit out a backoff made for the outage."""
    gate = a_gate(clock, room=3)
    (await admit(gate)).finish(AUTH)
    delayed = waiting(gate, AdmissionOrder(held=True), delay_s=600.0)
    probe = await admit_after(gate, clock, 10.0)
    assert not delayed.done()
    probe.finish(OK)
    await settle()
    assert delayed.done()


async def test_a_models_circuit_stops_that_model_only(clock):
    """Other models overtake; of the parked waiters one probes, then all go on."""
    gate = a_gate(clock, room=8)
    loading = AttemptSignal(breaker=BreakerEffect.TRIP, error_class="not_ready", scope=BreakerScope.MODEL)
    (await admit(gate, model="a")).finish(loading)
    parked = [waiting(gate, model="a") for _ in range(3)]
    await settle()
    assert not any(task.done() for task in parked)
    (await admit(gate, model="b")).finish(OK)
    clock.advance(1.0)
    await settle()
    assert sum(task.done() for task in parked) == 1
    next(task for task in parked if task.done()).result().finish(OK)
    for task in parked:
        (await task).finish(OK)
    assert gate.statistics().breaker.models == {}
    assert idle(gate, clock)


async def test_the_first_refusal_of_a_flight_is_fresh_and_the_others_are_not(clock):
    """An attempt that starts after the decrease is fresh again."""
    gate = a_gate(clock, room=8)
    crowded = AttemptSignal(overload=True, error_class="overloaded")
    flight = [await admit(gate) for _ in range(8)]
    assert all(permit.is_refusal_fresh() for permit in flight)
    flight[3].finish(crowded)
    assert not any(permit.is_refusal_fresh() for permit in flight)
    assert (await admit(gate)).is_refusal_fresh()


@pytest.mark.parametrize(
    ("effect", "failures", "state"),
    [
        (BreakerEffect.NONE, 0, CircuitState.CLOSED),
        (BreakerEffect.COUNT, 4, CircuitState.CLOSED),
        (BreakerEffect.TRIP, 0, CircuitState.OPEN),
    ],
)
async def test_what_an_overload_means_for_the_breaker_is_applied_as_told(clock, effect, failures, state):
    """The gate changes no effect, whether the refusal is fresh or not."""
    gate = a_gate(clock, room=8)
    flight = [await admit(gate) for _ in range(4)]
    for permit in flight:
        permit.finish(AttemptSignal(breaker=effect, overload=True, error_class="overloaded"))
    route = gate.statistics().breaker.route
    assert (route.failures, route.state) == (failures, state)


async def test_idle_gates_keep_no_timer(clock):
    """Without waiters nothing is scheduled, whatever the breaker's state."""
    gate = a_gate(clock)
    (await admit(gate)).finish(AUTH)
    assert clock.pending() == 0
