"""
Admission of one message to whichever of several gates lets it start first.

The message waits at all of them, with one future: the gate that gives it the permit ends its waits at the others.  So
no message is bound to a server that is slow while another one has room.  Where several could let it start at once, a
stopped one that wants a probe comes first, so that its recovery is noticed though the others have room for all; then
the one whose window is filled least, one of several equal ones by chance.
"""

import asyncio
import random
from collections.abc import Sequence

from worker.errors import AdmissionClosedError, AdmissionError, AdmissionMovedError, AdmissionTimeoutError
from worker.flow.clock import Clock, TimerHandle
from worker.flow.gate import AttemptSignal, Permit, Place, RouteGate
from worker.flow.queue import AdmissionOrder


async def admit_to_any(
    gates: Sequence[RouteGate],
    order: AdmissionOrder,
    *,
    clock: Clock,
    rng: random.Random,
    key: str | None = None,
    lane_name: str | None = None,
    give_up_s: float | None = None,
    delay_s: float = 0.0,
    streamed: bool = False,
) -> Permit:
    """
    Wait until an attempt may start at one of the gates; `Permit.gate` says at which.

    Args:
        gates: At least one; all with the same clock.
        order: See `RouteGate.admit`, as for the arguments below.
        clock: That of the gates.
        rng: Chooses among gates that are equally loaded.
        key: The message.
        lane_name: Whose fate the request shares.
        give_up_s: Longest wait, seconds.
        delay_s: Not before this many seconds.
        streamed: The caller will report `Permit.first_byte`.

    Raises:
        AdmissionError: As `RouteGate.admit`.

    Cancellation: removes the waiters; if one has got its permit already, the slot goes to the next message.
    """
    ranked = sorted(rng.sample(gates, len(gates)), key=lambda gate: gate.load_of(lane_name))
    if delay_s <= 0.0:
        for gate in ranked:
            permit = gate.try_start(lane_name, key, order.share, streamed=streamed)
            if permit is not None:
                return permit
    future: asyncio.Future[Permit | None] = asyncio.get_running_loop().create_future()
    places: list[tuple[RouteGate, Place]] = []
    for gate in ranked:
        if not future.done() and not gate.is_closed:
            place = gate.enqueue(
                order, future, lane_name=lane_name, key=key, streamed=streamed, is_delayed=delay_s > 0.0
            )
            places.append((gate, place))
    timers = _timers(places, future, clock, give_up_s=give_up_s if places else 0.0, delay_s=delay_s)
    try:
        permit = await future
    except asyncio.CancelledError:
        _give_back(future)
        raise
    finally:
        for timer in timers:
            timer.cancel()
        for gate, place in places:
            gate.withdraw(place)
    if permit is None:
        raise _reason(gates, places)
    return permit


def _give_back(future: "asyncio.Future[Permit | None]") -> None:
    """Give back the permit that a cancelled wait has got, if any."""
    permit = future.result() if future.done() and not future.cancelled() else None
    if permit is not None:
        permit.finish(AttemptSignal())


def _reason(gates: Sequence[RouteGate], places: Sequence[tuple[RouteGate, Place]]) -> AdmissionError:
    """Return why a wait has ended without a permit."""
    if any(gate.is_closed for gate in gates):
        return AdmissionClosedError("the worker is draining")
    if any(place.waiter.is_moved for _, place in places):
        return AdmissionMovedError("another server works")
    return AdmissionTimeoutError("no slot within the time this message may wait")


def _timers(
    places: Sequence[tuple[RouteGate, Place]],
    future: "asyncio.Future[Permit | None]",
    clock: Clock,
    *,
    give_up_s: float | None,
    delay_s: float,
) -> list[TimerHandle]:
    def end_delay() -> None:
        for gate, place in places:
            if not future.done():
                gate.end_delay(place)

    def give_up() -> None:
        if not future.done():
            future.set_result(None)

    now, timers = clock.now(), []
    if delay_s > 0.0:
        timers.append(clock.call_at(now + delay_s, end_delay))
    if give_up_s is not None and give_up_s > 0.0:
        timers.append(clock.call_at(now + give_up_s, give_up))
    elif give_up_s is not None:
        give_up()
    return timers
