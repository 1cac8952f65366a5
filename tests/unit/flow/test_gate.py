"""The gate: which attempts start, which wait, and that no way of leaving it leaves anything behind."""

import asyncio
import contextlib
import gc
import random
import weakref

import pytest

from tests.support.fakeclock import FakeClock, settle
from tests.support.flow import (
    AUTH,
    LOADING,
    OK,
    ONE_IS_ENOUGH,
    REFUSED,
    SERVER_ERROR,
    NoJitter,
    a_gate,
    admit,
    admit_after,
    idle,
    waiting,
)
from worker.errors import AdmissionClosedError, AdmissionTimeoutError
from worker.flow.circuit import DOUBT_S, CircuitConfig, CircuitState
from worker.flow.gate import AttemptSignal, Permit, RouteGate
from worker.flow.lane import BreakerEffect, BreakerScope
from worker.flow.queue import AdmissionOrder
from worker.flow.shares import RouteLoad
from worker.flow.window.adaptive import AdaptiveWindow


async def test_admits_up_to_the_window_and_no_further(clock):
    """As many permits as the window has slots; the next caller waits."""
    gate = a_gate(clock, room=2)
    permits = [await admit(gate), await admit(gate)]
    third = waiting(gate)
    await settle()
    assert not third.done()
    assert gate.statistics().waiting == 1
    permits[0].finish(OK)
    await third
    assert gate.statistics().in_flight == 2


async def test_the_load_is_what_waits_behind_open_circuits(clock):
    """A lane's own, or everything behind the route's; a route that was never asked may work."""
    gate = a_gate(clock)
    assert gate.load() == RouteLoad(waiting=0, has_working_lane=True)
    (await admit(gate, lane_name="a")).finish(LOADING)
    tasks = [waiting(gate, lane_name="a"), waiting(gate, lane_name="a")]
    await settle()
    assert gate.load() == RouteLoad(waiting=2, has_working_lane=False)
    other = await admit(gate, lane_name="b")
    tasks.append(waiting(gate, lane_name="b"))
    await settle()
    assert gate.load() == RouteLoad(waiting=2, has_working_lane=True)
    other.finish(AttemptSignal(breaker=BreakerEffect.TRIP, scope=BreakerScope.ROUTE, error_class="auth"))
    await settle()
    assert gate.load() == RouteLoad(waiting=3, has_working_lane=False)
    gate.close()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_what_waits_for_the_end_of_a_pause_is_in_the_load(clock):
    """A Retry-After that several messages heard keeps the lane back as an open circuit does."""
    gate = a_gate(clock, room=4)
    first, second = await admit(gate, key="a"), await admit(gate, key="b")
    for permit in (first, second):
        permit.finish(AttemptSignal(overload=True, pause_s=5.0))
    task = waiting(gate)
    await settle()
    assert gate.load() == RouteLoad(waiting=1, has_working_lane=False)
    clock.advance(6.0)
    await settle()
    assert gate.load() == RouteLoad(waiting=0, has_working_lane=True)
    (await task).finish(OK)


async def test_after_a_row_of_failures_the_next_is_one_of_the_others(clock):
    """Chosen at random, not the first: where messages that fail stand in a block, one behind it tells what it is."""
    gate = RouteGate(
        lambda: AdaptiveWindow(1, 1, 1, now=clock.now),
        CircuitConfig(failures=50),
        clock,
        aging_every=0,
        rng=random.Random(1),
    )
    blocking = await admit(gate)
    tasks = [waiting(gate, key=str(number)) for number in range(40)]
    await settle()
    blocking.finish(AttemptSignal())
    for number in range(2):
        permit = await tasks[number]
        permit.record_failure()
        permit.finish(AttemptSignal(breaker=BreakerEffect.COUNT, error_class="server_error"))
        await settle()
    (chosen,) = [number for number in range(2, 40) if tasks[number].done()]
    assert chosen > 2
    (await tasks[chosen]).finish(OK)
    await settle()
    assert [number for number in range(2, 40) if tasks[number].done() and number != chosen] == [2]
    gate.close()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_freed_slot_wakes_exactly_one(clock):
    """The slot goes to one waiter; the others go on sleeping."""
    gate = a_gate(clock)
    first = await admit(gate)
    others = [waiting(gate) for _ in range(5)]
    await settle()
    first.finish(OK)
    await settle()
    assert [task.done() for task in others] == [True, False, False, False, False]
    gate.close()
    await asyncio.gather(*others, return_exceptions=True)


async def test_a_later_caller_cannot_overtake(clock):
    """A caller that arrives after a slot was given away waits, although the task that got it has not run yet."""
    gate = a_gate(clock)
    first = await admit(gate)
    second = waiting(gate)
    await settle()
    first.finish(OK)
    newcomer = waiting(gate)
    await settle()
    assert second.done()
    assert not newcomer.done()
    second.result().finish(OK)
    (await newcomer).finish(OK)
    assert idle(gate, clock)


async def order_of(gate: RouteGate, orders: dict[str, AdmissionOrder]) -> list[str]:
    """Queue all behind one permit and return the names as they are admitted."""
    first = await admit(gate)
    admitted: list[str] = []

    async def run(name: str, order: AdmissionOrder) -> None:
        permit = await gate.admit(order)
        admitted.append(name)
        permit.finish(OK)

    tasks = [asyncio.ensure_future(run(name, order)) for name, order in orders.items()]
    await settle()
    first.finish(OK)
    await asyncio.gather(*tasks)
    return admitted


async def test_order_is_deadline_priority_publish_time_arrival(clock):
    """Each key decides only where all before it are equal."""
    orders = {
        "late arrival": AdmissionOrder(publish_time=9.0),
        "later arrival": AdmissionOrder(publish_time=9.0),
        "published earlier": AdmissionOrder(publish_time=5.0),
        "deadline": AdmissionOrder(deadline=100.0, publish_time=9.0),
        "earlier deadline": AdmissionOrder(deadline=50.0, publish_time=9.0),
        "priority": AdmissionOrder(priority=1, publish_time=9.0),
        "held": AdmissionOrder(held=True, priority=-5, publish_time=0.0),
    }
    orders["deadline and priority"] = AdmissionOrder(deadline=100.0, priority=1, publish_time=9.0)
    assert await order_of(a_gate(clock), orders) == [
        "earlier deadline",
        "deadline and priority",
        "deadline",
        "priority",
        "published earlier",
        "late arrival",
        "later arrival",
        "held",
    ]


async def test_one_admission_in_n_goes_to_the_longest_waiting(clock):
    """A low priority is not starved by a stream of high ones."""
    gate = a_gate(clock, aging_every=3)
    orders = {"low": AdmissionOrder(priority=-1)} | {f"high {i}": AdmissionOrder(priority=1) for i in range(6)}
    # The permit that all of them wait for is the first admission, so the third admission is the second of these.
    assert (await order_of(gate, orders)).index("low") == 1


async def test_giving_up_raises_and_leaves_nothing(clock):
    """A caller whose budget is over gets AdmissionTimeoutError; the slot freed later goes to the next."""
    gate = a_gate(clock)
    first = await admit(gate)
    impatient = waiting(gate, give_up_s=5.0)
    patient = waiting(gate)
    await settle()
    clock.advance(4.9)
    await settle()
    assert not impatient.done()
    clock.advance(0.2)
    with pytest.raises(AdmissionTimeoutError):
        await impatient
    assert gate.statistics().waiting == 1
    first.finish(OK)
    (await patient).finish(OK)
    assert idle(gate, clock)


@pytest.mark.parametrize("is_closed", [False, True])
async def test_a_wait_that_ended_keeps_no_caller_for_the_collector(clock, is_closed):
    """The garbage collector runs seldom; what a caller holds, its message, is freed with its last frame."""

    class Message:
        pass

    gate = a_gate(clock)
    await admit(gate)

    async def call(message):
        with contextlib.suppress(AdmissionTimeoutError, AdmissionClosedError):
            await gate.admit(AdmissionOrder(), give_up_s=5.0)
        return weakref.ref(message)

    gc.disable()
    try:
        task = asyncio.ensure_future(call(Message()))
        await settle()
        gate.close() if is_closed else clock.advance(6.0)
        assert (await task)() is None
    finally:
        gc.enable()


async def test_a_budget_of_zero_never_waits(clock):
    """`give_up_s=0` admits at once or not at all."""
    gate = a_gate(clock)
    await admit(gate)
    with pytest.raises(AdmissionTimeoutError):
        await admit(gate)


async def test_close_wakes_every_waiter_at_once(clock):
    """Draining ends every wait, delayed ones too, and every later one; permits stay valid; a second call changes nothing."""
    gate = a_gate(clock)
    permit = await admit(gate)
    tasks = [waiting(gate), waiting(gate, give_up_s=9.0), waiting(gate, delay_s=60.0)]
    await settle()
    gate.close()
    gate.close()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(each) for each in results] == [AdmissionClosedError] * 3
    with pytest.raises(AdmissionClosedError):
        await admit(gate)
    assert permit.finish(OK)
    assert idle(gate, clock)
    assert gate.statistics().closed


async def test_a_permit_finishes_once(clock):
    """The second end of a permit is ignored and returns false; the slot is freed once."""
    gate = a_gate(clock)
    permit = await admit(gate)
    assert permit.finish(OK) is True
    assert permit.finish(AUTH) is False
    assert gate.statistics().circuit.state is CircuitState.CLOSED
    await admit(gate)
    with pytest.raises(AdmissionTimeoutError):
        await admit(gate)


async def test_the_end_of_the_permits_block_frees_the_slot(clock):
    """An exception between admission and `finish` leaks no slot and says nothing about the backend."""
    gate = a_gate(clock)
    with pytest.raises(LookupError), await admit(gate):
        raise LookupError
    assert idle(gate, clock)
    assert gate.statistics().lanes[""].window.served == 0


async def test_cancelling_a_waiter_leaves_nothing(clock):
    """A cancelled waiter is gone at once, its timer too."""
    gate = a_gate(clock)
    first = await admit(gate)
    task = waiting(gate, AdmissionOrder(held=True), give_up_s=100.0)
    await settle()
    assert gate.statistics().held == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    first.finish(OK)
    assert idle(gate, clock)


async def test_a_slot_is_not_handed_to_one_that_is_being_cancelled(clock):
    """Cancelled a moment before the slot is freed, not run since: the next one gets it."""
    gate = a_gate(clock)
    first = await admit(gate)
    leaving, next_one = waiting(gate), waiting(gate)
    await settle()
    leaving.cancel()
    first.finish(OK)
    (await next_one).finish(OK)
    assert leaving.cancelled()
    assert idle(gate, clock)


async def test_cancelling_an_admitted_waiter_admits_the_next(clock):
    """A waiter cancelled after it got its permit and before it ran frees the slot for the next one."""
    gate = a_gate(clock)
    first = await admit(gate)
    winner, next_one = waiting(gate), waiting(gate)
    await settle()
    first.finish(OK)
    winner.cancel()
    (await next_one).finish(OK)
    assert winner.cancelled()
    assert idle(gate, clock)


async def test_every_waiter_has_its_own_longest_wait(clock):
    """It holds although another waiter left the queue before."""
    gate = a_gate(clock)
    first = await admit(gate)
    served, left_behind = waiting(gate, give_up_s=10.0), waiting(gate, give_up_s=30.0)
    await settle()
    first.finish(OK)
    permit = await served
    assert clock.pending() == 1
    for seconds in (10.0, 19.9):
        clock.advance(seconds)
        await settle()
        assert not left_behind.done()
    clock.advance(0.1)
    with pytest.raises(AdmissionTimeoutError):
        await left_behind
    permit.finish(OK)
    assert idle(gate, clock)


async def test_an_attempt_that_need_not_wait_sets_no_timer(clock):
    """With room and an empty queue there is nothing that time could change."""
    gate = a_gate(clock, room=2)
    with await gate.admit(AdmissionOrder(), give_up_s=100.0), await gate.admit(AdmissionOrder(), give_up_s=100.0):
        assert clock._count == 0
        assert gate.statistics().in_flight == 2
    assert idle(gate, clock)


async def test_a_delay_is_kept_and_cut_short_by_recovery(clock):
    """A held message waits its backoff, but not beyond the moment the backend works again."""
    gate = a_gate(clock, room=3)
    delayed = waiting(gate, AdmissionOrder(held=True), delay_s=60.0)
    await settle()
    clock.advance(59.0)
    await settle()
    assert not delayed.done()
    (await admit(gate)).finish(AUTH)
    gate.allow_probe()
    await settle()
    assert delayed.done()
    assert delayed.result().is_probe


async def test_a_delay_ends_by_itself(clock):
    """Without any other event the timer lets a delayed message go."""
    gate = a_gate(clock)
    (await admit_after_delay(gate, clock)).finish(OK)
    assert idle(gate, clock)


async def admit_after_delay(gate: RouteGate, clock: FakeClock) -> Permit:
    task = waiting(gate, delay_s=2.5)
    await settle()
    clock.advance(2.5)
    return await task


async def test_a_pause_closes_the_window_and_reopens_by_itself(clock):
    """No attempt starts before the pause is over; then the timer admits the waiter."""
    gate = a_gate(clock)
    crowded = AttemptSignal(breaker=BreakerEffect.COUNT, overload=True, error_class="rate_limited", pause_s=1.5)
    (await admit(gate)).finish(crowded)
    assert gate.statistics().circuit.state is CircuitState.CLOSED
    task = waiting(gate)
    await settle()
    clock.advance(1.4)
    await settle()
    assert not task.done()
    clock.advance(0.1)
    await task


async def test_a_paused_gate_admits_no_attempt_until_it_is_resumed(clock):
    """Whether there is room, and however much time passes."""
    gate = a_gate(clock)
    gate.pause()
    task = waiting(gate)
    clock.advance(1e6)
    await settle()
    assert not task.done()
    assert gate.statistics().paused
    gate.resume()
    await task


# The gate and its breaker.


async def test_a_probe_is_not_lost_with_one_that_is_being_cancelled(clock):
    """The others of the model do not stay parked because the one chosen to probe has just left."""
    gate = a_gate(clock, room=8)
    (await admit(gate, lane_name="a")).finish(LOADING)
    leaving, next_one = waiting(gate, lane_name="a"), waiting(gate, lane_name="a")
    await settle()
    leaving.cancel()
    clock.advance(1.0)
    (await next_one).finish(OK)
    assert idle(gate, clock)


async def test_a_connection_closes_what_refused_connections_opened(clock):
    """The end of the probe's generation is not awaited; other causes need an answer."""
    for signal, wait_s, closes in ((REFUSED, 1.0, True), (AUTH, 10.0, False)):
        gate = a_gate(clock, room=8)
        while gate.statistics().circuit.state is CircuitState.CLOSED:
            (await admit(gate)).finish(signal)
        probe = await admit_after(gate, clock, wait_s)
        probe.connected()
        assert (gate.statistics().circuit.state is CircuitState.CLOSED) is closes
        probe.finish(OK)
        probe.connected()
        probe.first_byte()


async def test_recovery_causes_no_burst(clock):
    """When the breaker closes, the waiters start one after another within a second."""
    gate = RouteGate(lambda: AdaptiveWindow(8, 1, 8, now=clock.now), ONE_IS_ENOUGH, clock, rng=NoJitter())
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
    assert gate.statistics().circuit.error_class == "connect"
    clock.advance(1.0)
    await settle()
    assert [task.done() for task in tasks] == [False, False, False, True]  # the newest
    probe = tasks[3].result()
    assert probe.is_probe
    clock.advance(5.0)
    await settle()
    assert sum(task.done() for task in tasks) == 1
    probe.finish(OK)
    assert len(await asyncio.gather(*tasks)) == 4


async def test_a_failed_probe_doubles_the_wait(clock):
    """1 s, then 2 s, then 4 s, then the maximum."""
    gate = a_gate(clock)
    (await admit(gate)).finish(
        AttemptSignal(breaker=BreakerEffect.TRIP, error_class="not_ready", scope=BreakerScope.ROUTE)
    )
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
    clock.advance(1.0)
    (await admit(gate)).finish(AUTH)
    await admit_after(gate, clock, 10.0)
    assert gate.statistics().in_flight == gate.statistics().limit
    assert (await admit_after(gate, clock, 30.0)).is_probe


async def test_a_probe_may_be_allowed_at_once(clock):
    """New credentials let one attempt start immediately."""
    gate = a_gate(clock)
    (await admit(gate)).finish(AUTH)
    tasks = [waiting(gate), waiting(gate)]
    await settle()
    gate.allow_probe()
    await settle()
    assert [task.done() for task in tasks] == [False, True]
    tasks[1].result().finish(OK)
    await tasks[0]


async def test_recovery_ends_every_delay(clock):
    """When the probe succeeds, held messages do not wait for the end of a backoff made for the outage."""
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
    (await admit(gate, lane_name="a")).finish(LOADING)
    parked = [waiting(gate, lane_name="a") for _ in range(3)]
    await settle()
    assert not any(task.done() for task in parked)
    (await admit(gate, lane_name="b")).finish(OK)
    clock.advance(1.0)
    await settle()
    assert sum(task.done() for task in parked) == 1
    next(task for task in parked if task.done()).result().finish(OK)
    for task in parked:
        (await task).finish(OK)
    assert idle(gate, clock)


async def test_the_first_refusal_of_a_flight_is_fresh_and_the_others_are_not(clock):
    """The second one confirms it; an attempt that starts after the decrease is fresh again."""
    gate = a_gate(clock, room=8)
    crowded = AttemptSignal(overload=True, error_class="overloaded")
    flight = [await admit(gate) for _ in range(8)]
    flight[3].finish(crowded)
    assert all(permit.is_refusal_fresh() for permit in flight)
    flight[4].finish(crowded)
    assert not any(permit.is_refusal_fresh() for permit in flight)
    task = waiting(gate)
    await settle()
    assert not task.done()  # in doubt: those under way tell what it was about
    clock.advance(0.5)
    assert (await task).is_refusal_fresh()


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
    circuit = gate.statistics().lanes[""].circuit
    assert (circuit.failures, circuit.state) == (failures, state)


async def test_one_that_gives_up_leaves_the_timer_to_those_that_wait(clock):
    """Nothing else would wake them at the end of a pause."""
    gate = a_gate(clock, room=4)
    first, second = await admit(gate, key="a"), await admit(gate, key="b")
    for permit in (first, second):
        permit.finish(AttemptSignal(overload=True, pause_s=5.0))
    impatient, patient = waiting(gate, give_up_s=1.0), waiting(gate)
    await settle()
    clock.advance(1.0)
    with pytest.raises(AdmissionTimeoutError):
        await impatient
    clock.advance(5.0)
    (await patient).finish(OK)
    assert idle(gate, clock)


async def test_idle_gates_keep_no_timer(clock):
    """Without waiters nothing is scheduled, whatever the breaker's state."""
    gate = a_gate(clock)
    (await admit(gate)).finish(AUTH)
    assert clock.pending() == 0


async def test_failures_that_end_before_others_are_answered_open_nothing(clock):
    """Nothing starts meanwhile; the first answer shows that they were the messages' own trouble."""
    gate = a_gate(clock, room=6, config=CircuitConfig())
    flight = [await admit(gate, key=str(index)) for index in range(6)]
    for permit in flight[:3]:
        permit.record_failure()
        permit.finish(LOADING)
    task = waiting(gate)
    await settle()
    assert not task.done()
    assert gate.statistics().lanes[""].circuit.state is CircuitState.CLOSED
    flight[4].finish(OK)
    await settle()
    assert task.done()
    assert gate.statistics().lanes[""].circuit.trips == 0


async def two_failures_and_a_younger_attempt(gate: RouteGate, clock: FakeClock) -> None:
    """Put the lane without a name in doubt; the attempt that is under way has not outlasted the failures."""
    flight = [await admit(gate, key=str(index)) for index in range(2)]
    clock.advance(2 * DOUBT_S)
    await admit(gate, key="younger")
    for permit in flight:
        permit.record_failure()
        permit.finish(LOADING)


async def test_a_doubt_opens_the_circuit_after_its_time_although_nobody_waits(clock):
    """Who asks what keeps a lane back gets the answer of that instant."""
    gate = a_gate(clock, room=3, config=CircuitConfig())
    await two_failures_and_a_younger_attempt(gate, clock)
    assert gate.stopping() is None
    clock.advance(DOUBT_S)
    stopped = gate.stopping()
    assert stopped is not None
    assert stopped.error_class == "not_ready"


async def test_a_doubt_ends_with_a_timer_where_messages_wait(clock):
    """They go on behind the probe."""
    gate = a_gate(clock, room=3, config=CircuitConfig())
    await two_failures_and_a_younger_attempt(gate, clock)
    tasks = [waiting(gate) for _ in range(2)]
    await settle()
    clock.advance(DOUBT_S)
    await settle()
    assert gate.statistics().lanes[""].circuit.state is CircuitState.OPEN
    clock.advance(1.0)
    await settle()
    assert [task.done() for task in tasks] == [False, True]


async def test_a_doubt_of_the_window_behind_an_open_circuit_keeps_no_timer_busy(clock):
    """The window is not asked for room then; its doubt ends all the same, and the probe starts at its own time."""
    gate = a_gate(clock, room=6)
    flight = [await admit(gate, key=str(index)) for index in range(4)]
    clock.advance(2 * DOUBT_S)
    for index in range(4, 6):
        await admit(gate, key=str(index))
    for permit in flight[:2]:
        permit.finish(AttemptSignal(overload=True, error_class="rate_limited"))
    for permit in flight[2:4]:
        permit.finish(AUTH)
    task = waiting(gate)
    await settle()
    clock.advance(DOUBT_S)
    assert gate.statistics().circuit.state is CircuitState.OPEN
    assert clock.pending() == 1
    assert not task.done()
    clock.advance(60.0)
    (await task).finish(OK)


async def test_attempts_that_began_before_a_row_leave_no_doubt(clock):
    """What began before the backend went away may be answered still."""
    gate = a_gate(clock, room=3, config=CircuitConfig())
    await admit(gate, key="long")
    clock.advance(10.0)
    for key in ("m", "n"):
        permit = await admit(gate, key=key)
        permit.record_failure()
        permit.finish(LOADING)
    assert gate.statistics().lanes[""].circuit.state is CircuitState.OPEN


@pytest.mark.parametrize(("failures_an_answer", "most"), [(1, 100), (4, 160), (5, 10), (100, 10)])
async def test_answers_from_before_a_fault_hide_no_row_of_failures(clock, failures_an_answer, most):
    """128 are under way when everything begins to fail at once, and are answered one after the other."""
    gate = a_gate(clock, room=128, config=CircuitConfig())
    before = []
    for index in range(128):
        before.append(await admit(gate, key=f"before {index}"))
        clock.advance(0.03)
    before.pop(0).finish(OK)
    calls = 0
    while gate.statistics().lanes[""].circuit.state is CircuitState.CLOSED and calls < 500:
        permit = await admit(gate, key=f"after {calls}")
        permit.record_failure()
        permit.finish(SERVER_ERROR)
        calls += 1
        clock.advance(0.01)
        if calls % failures_an_answer == 0:
            before.pop(0).finish(OK)
    assert calls <= most


async def an_outage(gate: RouteGate) -> None:
    """Open the circuit of the lane without a name by two messages, `a` and `b`."""
    for key in ("a", "b"):
        permit = await admit(gate, key=key)
        permit.record_failure()
        permit.finish(LOADING)
    assert gate.is_stopped()


async def test_a_fresh_message_that_closes_the_circuit_forgives_none_that_failed(clock):
    """It shows nothing about them: a block of messages that always fail would go first again and again."""
    gate = a_gate(clock)
    await an_outage(gate)
    tasks = {key: waiting(gate, key=key) for key in ("a", "b", "fresh", "next")}
    await settle()
    clock.advance(1.0)
    await settle()
    order = []
    while tasks:
        order.append(next(key for key, task in tasks.items() if task.done()))
        tasks.pop(order[-1]).result().finish(OK)
        await settle()
    assert order == ["next", "fresh", "a", "b"]  # the newest is the probe


async def test_a_message_that_failed_and_is_served_after_an_outage_forgives_all_that_failed(clock):
    """The outage explains their failures, so they stand in the order of their claims."""
    gate = a_gate(clock)
    await an_outage(gate)
    tasks = {"a": waiting(gate, key="a")}
    await settle()
    clock.advance(1.0)
    await settle()
    tasks["b"] = waiting(gate, key="b")
    tasks["fresh"] = waiting(gate, AdmissionOrder(publish_time=9.0), key="fresh")
    await settle()
    for key in ("a", "b", "fresh"):
        assert tasks[key].done()
        tasks[key].result().finish(OK)
        await settle()


async def test_where_many_fail_every_second_start_is_the_newest(clock):
    """One in a block at the head of the queue is followed by one from its end."""
    gate = a_gate(clock)
    for index in range(8):
        permit = await admit(gate, key=str(index))
        permit.record_failure()
        permit.finish(AttemptSignal())
    (await admit(gate, key="good")).finish(OK)
    running = await admit(gate)
    tasks = {key: waiting(gate, key=key) for key in "abcd"}
    await settle()
    order = []
    for _ in range(4):
        running.finish(AttemptSignal())
        await settle()
        key = next(key for key, task in tasks.items() if task.done())
        running = await tasks.pop(key)
        order.append(key)
    assert order in (["a", "d", "b", "c"], ["d", "a", "c", "b"])


async def test_messages_that_failed_and_wait_take_no_lease_from_others(clock):
    """Beside others that are served they only wait; where many fail, more may stand in a block behind them."""
    gate = a_gate(clock)
    running = await admit(gate)
    held = waiting(gate, AdmissionOrder(held=True))
    await settle()
    assert gate.load() == RouteLoad(waiting=1, has_working_lane=True)
    for index in range(8):
        gate._lanes.of(None).evidence.failed(str(index), index)
    gate._lanes.of(None).evidence.served("good", 99)
    assert gate.load() == RouteLoad(waiting=1, has_working_lane=True, many_fail=True)
    running.finish(OK)
    (await held).finish(OK)


async def test_a_lane_that_waits_for_attempts_under_way_is_in_doubt(clock):
    """Until one of them is served; an open circuit is in no doubt, nor is a lane that nobody knows."""
    gate = a_gate(clock, room=4, config=CircuitConfig())
    assert not gate.is_in_doubt()
    flight = [await admit(gate, key=str(index)) for index in range(4)]
    for permit in flight[:2]:
        permit.record_failure()
        permit.finish(LOADING)
    assert gate.is_in_doubt()
    flight[2].finish(OK)
    assert not gate.is_in_doubt()


async def test_a_part_of_the_window_is_used(clock):
    """Half of four slots; what runs above a part that has fallen goes on, and its end makes no room."""
    gate = a_gate(clock, room=4)
    gate.set_part(0.5)
    permits = [await admit(gate), await admit(gate)]
    third = waiting(gate)
    await settle()
    assert (third.done(), gate.statistics().limit) == (False, 2)
    gate.set_part(0.25)
    permits[0].finish(OK)
    await settle()
    assert not third.done()
    permits[1].finish(OK)
    (await third).finish(OK)
    assert idle(gate, clock)


async def test_a_part_above_nothing_lets_one_attempt_run(clock):
    """Else a small window would never be used; a part of 0 starts nothing."""
    gate = a_gate(clock, room=2)
    gate.set_part(0.01)
    (await admit(gate)).finish(OK)
    gate.set_part(0.0)
    with pytest.raises(AdmissionTimeoutError):
        await admit(gate)


async def test_a_part_that_rises_lets_waiters_start_at_once(clock):
    """As many as fit; nothing polls."""
    gate = a_gate(clock, room=4)
    gate.set_part(0.0)
    tasks = [waiting(gate, lane_name=name) for name in ("a", "a", "a", "b")]
    await settle()
    assert (sum(task.done() for task in tasks), clock.pending()) == (0, 0)
    gate.set_part(0.5)
    await settle()
    assert [task.done() for task in tasks] == [True, True, False, True]
    gate.set_part(1.0)
    for task in tasks:
        (await task).finish(OK)
    assert idle(gate, clock)


async def test_what_waits_at_a_part_of_nothing_uses_up_no_leases(clock):
    """As for a stopped lane (ADR 16), and without a timer that runs again and again."""
    gate = a_gate(clock, room=2)
    running = await admit(gate)
    gate.set_part(0.0)
    tasks = [waiting(gate), waiting(gate)]
    await settle()
    assert gate.load() == RouteLoad(waiting=2, has_working_lane=False)
    assert clock.pending() == 0
    running.finish(OK)
    await settle()
    assert (gate.load().waiting, gate.in_flight) == (2, 0)
    gate.set_part(1.0)
    for task in tasks:
        (await task).finish(OK)
    assert gate.load() == RouteLoad(waiting=0, has_working_lane=True)


async def test_no_probe_is_sent_at_a_part_of_nothing(clock):
    """The server of an open circuit is left alone until the part rises; then the probe that is due is sent at once."""
    gate = a_gate(clock, config=ONE_IS_ENOUGH)
    (await admit(gate)).finish(AUTH)
    gate.set_part(0.0)
    task = waiting(gate)
    clock.advance(60.0)
    await settle()
    assert (task.done(), gate.wants_probe(None), clock.pending()) == (False, False, 0)
    gate.set_part(0.1)
    permit = await task
    assert permit.is_probe
    permit.finish(OK)


async def test_the_load_of_a_target_counts_the_part(clock):
    """So that a message goes to the server that has more of its window left, and last to one whose part is nothing."""
    gate = a_gate(clock, room=4)
    permit = await admit(gate)
    assert gate.load_of(None) == 0.25
    gate.set_part(0.5)
    assert gate.load_of(None) == 0.5
    gate.set_part(0.0)
    assert gate.load_of(None) == float("inf")
    permit.finish(OK)
