"""One message at several gates: where it starts, and that it leaves nothing behind at the others."""

import asyncio
import random
from typing import Any

import pytest

from tests.support.fakeclock import FakeClock, settle
from tests.support.flow import LOADING, OK, a_gate, admit, idle, waiting
from worker.errors import AdmissionClosedError, AdmissionMovedError, AdmissionTimeoutError
from worker.flow.circuit import CircuitState
from worker.flow.gate import AttemptSignal, Permit, RouteGate
from worker.flow.queue import AdmissionOrder
from worker.flow.several import admit_to_any


def anywhere(gates: list[RouteGate], clock: FakeClock, **more: Any) -> "asyncio.Task[Permit]":
    order = more.pop("order", AdmissionOrder())
    return asyncio.ensure_future(admit_to_any(gates, order, clock=clock, rng=random.Random(0), **more))


async def test_the_least_loaded_gate_is_taken(clock: FakeClock) -> None:
    """By the share of its window that is in use, so that a larger server gets more."""
    small, large = a_gate(clock, room=2), a_gate(clock, room=8)
    permits = [await anywhere([small, large], clock) for _ in range(10)]
    assert [gate.statistics().in_flight for gate in (small, large)] == [2, 8]
    permits[0].finish(OK)
    again = await anywhere([small, large], clock)
    assert again.gate is permits[0].gate


async def test_equal_gates_share_by_chance(clock: FakeClock) -> None:
    """Many workers with little to do must not all take the first one."""
    gates = [a_gate(clock) for _ in range(3)]
    taken = set()
    for seed in range(20):
        permit = await admit_to_any(gates, AdmissionOrder(), clock=clock, rng=random.Random(seed))
        taken.add(gates.index(permit.gate))
        permit.finish(OK)
    assert taken == {0, 1, 2}


async def test_a_message_starts_where_a_slot_frees_first(clock: FakeClock) -> None:
    """Nobody waits for a slow server while another one has room; nothing stays in the other's queue."""
    slow, fast = a_gate(clock), a_gate(clock)
    first, second = await admit(slow), await admit(fast)
    task = anywhere([slow, fast], clock)
    await settle()
    assert [gate.statistics().waiting for gate in (slow, fast)] == [1, 1]
    second.finish(OK)
    permit = await task
    assert permit.gate is fast
    assert slow.statistics().waiting == 0
    for each in (first, permit):
        each.finish(OK)
    assert idle(slow, clock)
    assert idle(fast, clock)


async def test_one_claim_counts_at_every_gate(clock: FakeClock) -> None:
    """A waiter with a better claim is first also where others wait for that gate alone."""
    one, other = a_gate(clock), a_gate(clock)
    running = [await admit(one), await admit(other)]
    late = waiting(other)
    await settle()
    urgent = anywhere([one, other], clock, order=AdmissionOrder(priority=1))
    await settle()
    running[1].finish(OK)
    permit = await urgent
    assert permit.gate is other
    assert not late.done()
    permit.finish(OK)
    (await late).finish(OK)
    running[0].finish(OK)


async def test_a_stopped_gate_gets_its_probe_and_nothing_else(clock: FakeClock) -> None:
    """Its recovery is noticed though the others have room for everything."""
    stopped, working = a_gate(clock, room=9), a_gate(clock, room=9)
    (await admit(stopped)).finish(LOADING)
    assert stopped.stopped_since(None) is not None
    permits = [await anywhere([stopped, working], clock) for _ in range(3)]
    assert {permit.gate for permit in permits} == {working}
    clock.advance(2.0)
    assert stopped.wants_probe(None)
    probe = await anywhere([stopped, working], clock)
    assert (probe.gate, probe.is_probe) == (stopped, True)
    assert not stopped.wants_probe(None)
    assert (await anywhere([stopped, working], clock)).gate is working
    probe.finish(OK)
    assert stopped.statistics().circuit.state is CircuitState.CLOSED
    assert stopped.stopped_since(None) is None


async def test_a_delay_holds_everywhere(clock: FakeClock) -> None:
    """Not before its backoff is over, and then at the first gate with room."""
    gates = [a_gate(clock), a_gate(clock)]
    task = anywhere(gates, clock, delay_s=5.0)
    await settle()
    clock.advance(4.9)
    await settle()
    assert not task.done()
    clock.advance(0.2)
    (await task).finish(OK)
    assert all(idle(gate, clock) for gate in gates)


@pytest.mark.parametrize("give_up_s", [0.0, 3.0])
async def test_waiting_ends_everywhere(clock: FakeClock, give_up_s: float) -> None:
    """The time is over: no waiter and no timer stays."""
    gates = [a_gate(clock), a_gate(clock)]
    permits = [await admit(gate) for gate in gates]
    task = anywhere(gates, clock, give_up_s=give_up_s)
    await settle()
    clock.advance(give_up_s)
    with pytest.raises(AdmissionTimeoutError):
        await task
    for permit in permits:
        permit.finish(OK)
    assert all(idle(gate, clock) for gate in gates)


@pytest.mark.parametrize("is_granted", [False, True])
async def test_cancellation_leaves_nothing(clock: FakeClock, is_granted: bool) -> None:
    """Also when the permit was given in the same moment."""
    gates = [a_gate(clock), a_gate(clock)]
    permits = [await admit(gate) for gate in gates]
    task = anywhere(gates, clock)
    await settle()
    if is_granted:
        permits[0].finish(OK)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for permit in permits:
        permit.finish(OK)
    assert all(idle(gate, clock) for gate in gates)


@pytest.mark.parametrize("is_before", [True, False])
async def test_closed_gates_admit_nothing(clock: FakeClock, is_before: bool) -> None:
    """Before and during the wait."""
    gates = [a_gate(clock), a_gate(clock)]
    permits = [] if is_before else [await admit(gate) for gate in gates]
    task = None if is_before else anywhere(gates, clock)
    await settle()
    for gate in gates:
        gate.close()
    with pytest.raises(AdmissionClosedError):
        await (task or anywhere(gates, clock))
    for permit in permits:
        permit.finish(AttemptSignal())
    assert all(idle(gate, clock) for gate in gates)


async def test_what_waits_for_a_stopped_lane_is_moved(clock: FakeClock) -> None:
    """After its patience, delayed messages as well; other lanes wait on."""
    gate = a_gate(clock)
    (await admit(gate, lane_name="a")).finish(LOADING)
    running = await admit(gate, lane_name="b")
    ready, delayed = waiting(gate, lane_name="a"), waiting(gate, lane_name="a", delay_s=100.0)
    working = waiting(gate, lane_name="b")
    await settle()
    assert gate.move_stopped(lambda lane: {"a": 10.0, "b": 0.0}[lane]) == 0
    since = gate.stopped_since("a")
    assert since is not None
    assert gate.stopped_since("b") is None
    assert gate.move_stopped(lambda _: clock.now() - since) == 2
    for task in (ready, delayed):
        with pytest.raises(AdmissionMovedError):
            await task
    assert not working.done()
    running.finish(OK)
    (await working).finish(OK)
    assert idle(gate, clock)


async def test_a_message_at_several_gates_is_moved_as_one(clock: FakeClock) -> None:
    """It leaves all of them."""
    gates = [a_gate(clock), a_gate(clock)]
    for gate in gates:
        (await admit(gate)).finish(LOADING)
    task = anywhere(gates, clock)
    await settle()
    assert gates[0].move_stopped(lambda _: 0.0) == 1
    with pytest.raises(AdmissionMovedError):
        await task
    assert [gate.statistics().waiting for gate in gates] == [0, 0]
