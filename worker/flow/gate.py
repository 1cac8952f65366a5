"""
The gate of one route: which attempts may start, and which have to wait.

Theory of operation.  Each lane (see `flow.lane`) has its own window, circuit and queue.  `admit` returns a `Permit`
once the circuits of route and lane and the lane's window allow an attempt and no waiter of the lane has a better claim.
The permit is finished exactly once with an `AttemptSignal`, which the gate passes on as it is.  A freed slot goes to
one waiter at once (its future gets the permit): no other waiter wakes up, and no later caller can overtake it.

Before that, a failed attempt is noted with `record_failure`, which returns what is known about the message and the
others of its lane (`Blame`); what follows from it is decided by the caller.

Nothing polls.  A waiter has a timer for the end of its delay and one for its longest wait.  The gate has one timer, for
the next instant at which time alone lets an attempt start: a probe, the end of a pause, growth of a window.

All of it runs on one event loop; no method may be called from another thread.  Which waiter is next is decided in
`queue`, whether any may start in `window` and `circuit`; this file only joins them.
"""

import asyncio
import math
import random
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import msgspec

from worker.errors import AdmissionClosedError, AdmissionMovedError, AdmissionTimeoutError
from worker.flow.circuit import CONNECT, Circuit, CircuitConfig, CircuitState, CircuitStatistics, Pass
from worker.flow.clock import Clock, TimerHandle
from worker.flow.lane import (
    MAX_LANES,
    BreakerChange,
    BreakerEffect,
    BreakerScope,
    Fate,
    Lane,
    Lanes,
    LaneStatistics,
    part_of,
)
from worker.flow.queue import ALONE, AdmissionOrder, Share, Waiter, WaitQueue
from worker.flow.shares import RouteLoad
from worker.flow.window.adaptive import AdaptiveWindow, Outcome, Ticket
from worker.policy.blame import PRIOR_SHARE, Blame


class AttemptSignal(msgspec.Struct, frozen=True, kw_only=True):
    """What the end of one attempt says about the backend."""

    breaker: BreakerEffect = BreakerEffect.NONE
    """Applied as it is.  `SUCCESS` also counts as served, for the window and as evidence."""
    scope: BreakerScope = BreakerScope.LANE
    """What a failure concerns; a success is one of lane and route."""
    overload: bool = False
    """The backend refused for lack of capacity: the window decreases."""
    pause_s: float | None = None
    """Of an overload: how long the window admits nothing, seconds; `None` for no pause."""
    error_class: str = ""
    """Shown while the circuit is open."""
    retry_after_s: float | None = None
    """Until the circuit's next probe, seconds; with `NONE` of a probe that says nothing, 0 if it is `None`."""
    work: float | None = None
    """Size of the answer, for example output tokens; `None` when unknown."""


class GateStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """A gate at one instant."""

    circuit: CircuitStatistics
    """Of the route."""
    lanes: Mapping[str, LaneStatistics]
    """By name."""
    failing_share: float
    """`LaneStatistics.failing_share`, of failures that concern the whole route."""
    part: float
    """See `RouteGate.set_part`."""
    paused: bool
    """Stopped by `pause`."""
    closed: bool

    @property
    def in_flight(self) -> int:
        """Permits not finished."""
        return sum(lane.in_flight for lane in self.lanes.values())

    @property
    def waiting(self) -> int:
        """Callers of `admit` that wait, held ones included."""
        return sum(lane.waiting for lane in self.lanes.values())

    @property
    def held(self) -> int:
        """How many of these have a message that was attempted before."""
        return sum(lane.held for lane in self.lanes.values())

    @property
    def limit(self) -> int:
        """Attempts that may run at once now, over all lanes."""
        return sum(lane.limit for lane in self.lanes.values())


class Permit:
    """
    The right to make one attempt; holds one slot of its lane's window until it is finished.

    As a context manager it finishes itself at the end of the block, with a signal that says nothing, unless `finish`
    was called.
    """

    __slots__ = ("_finished", "_gate", "_key", "_lane", "_lane_pass", "_number", "_route_pass", "_ticket", "share")

    def __init__(
        self, gate: "RouteGate", lane: Lane, key: str | None, number: int, share: Share, *, streamed: bool
    ) -> None:
        self.share = share
        self._gate = gate
        self._lane = lane
        self._key = key
        self._number = number
        self._ticket: Ticket = lane.window.start(streamed=streamed)
        self._route_pass: Pass = gate._route.circuit.enter()  # noqa: SLF001 - one object in two halves
        self._lane_pass: Pass = lane.circuit.enter()
        self._finished = False

    @property
    def gate(self) -> "RouteGate":
        """The gate that gave it."""
        return self._gate

    @property
    def started_at(self) -> float:
        """When it was given, on the gate's clock."""
        return self._ticket.started_at

    @property
    def is_probe(self) -> bool:
        """Whether this attempt is the probe of an open circuit, the route's or its lane's."""
        return self._route_pass.is_probe or self._lane_pass.is_probe

    @property
    def is_route_probe(self) -> bool:
        """Whether this attempt is the probe of the route's circuit."""
        return self._route_pass.is_probe

    @property
    def identity(self) -> tuple[Lane, str | None, int, Pass, Pass]:
        """Lane, message, number of the start, and the passes of lane and route; for the gate."""
        return self._lane, self._key, self._number, self._lane_pass, self._route_pass

    def is_refusal_fresh(self) -> bool:
        """
        Return whether a refusal of this attempt would be news for the window: it started after the last decrease.

        To be asked before `finish`.  A refusal that is not fresh is one more sign of an overload after which the window
        has decreased already.
        """
        return self._lane.window.is_refusal_fresh(self._ticket)

    def record_failure(self, scope: BreakerScope = BreakerScope.LANE) -> Blame:
        """Note that the attempt failed, and return what is known about its message; once, before `finish`."""
        return self._gate._failed(self._lane, scope, self._key, self._number)  # noqa: SLF001

    def connected(self) -> None:
        """
        Report that a connection stands and the request is sent.

        If refused connections (class `connect`) opened the route's circuit, that closes it without waiting for the
        probe's answer, which may take minutes (ADR 0011).  Idempotent; ignored after `finish`.
        """
        if not self._finished:
            self._gate._connected(self._route_pass)  # noqa: SLF001 - one object in two halves

    def first_byte(self) -> None:
        """
        Report that a good answer has begun (status 2xx and the first piece of its body).

        For a probe, it closes the circuit at once instead of after minutes of generation; for any attempt, it is the
        window's best measurement of waiting.  Idempotent; ignored after `finish`.
        """
        if not self._finished:
            self._lane.window.first_byte(self._ticket)
            # Only the first byte of a probe is a success for the circuit.  If that of any attempt were, streams that
            # all break halfway would never be failures in a row.
            self._gate._began_well(self._lane, self._lane_pass, self._route_pass)  # noqa: SLF001

    def finish(self, signal: AttemptSignal) -> bool:
        """Free the slot and report how the attempt ended; return false, and do nothing, when it was finished before."""
        if self._finished:
            return False
        self._finished = True
        lane = self._lane
        if signal.overload:
            outcome = Outcome.OVERLOAD
        else:
            outcome = Outcome.OK if signal.breaker is BreakerEffect.SUCCESS else Outcome.NEUTRAL
        lane.window.finish(self._ticket, outcome, work=signal.work, pause_s=signal.pause_s)
        self._gate._report(self, signal)  # noqa: SLF001 - one object in two halves
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish(AttemptSignal())


class Place(msgspec.Struct, frozen=True):
    """Where a message waits at one of several gates; made by `RouteGate.enqueue`."""

    lane: Lane
    waiter: Waiter


class RouteGate:
    """
    Admits attempts to one backend.

    Args:
        make_window: Makes the window of a lane; with the same clock.
        config: Thresholds of the circuits, the same for the route and its lanes.
        clock: Monotonic time and timers.
        aging_every: One admission of a lane in so many goes to the request that has waited longest, whatever its
            priority, so that none waits for ever; 0 turns that off.
        max_lanes: Lanes at most, beside the shared one.
        on_change: Called when a circuit opens or closes; raises nothing and does not call the gate.
        rng: Jitter of probes, and which message is one.
    """

    def __init__(
        self,
        make_window: Callable[[], AdaptiveWindow],
        config: CircuitConfig,
        clock: Clock,
        *,
        aging_every: int = 8,
        max_lanes: int = MAX_LANES,
        on_change: Callable[[BreakerChange], None] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        rng = rng or random.Random()  # noqa: S311 - no secret
        self._clock = clock
        self._rng = rng
        self._route = Fate(None, Circuit(config, clock.now, jitter=rng.random), on_change)

        def make_lane(name: str) -> Lane:
            queue = WaitQueue(aging_every=aging_every, rng=rng)
            return Lane(name, make_window(), Circuit(config, clock.now, jitter=rng.random), queue, on_change)

        self._lanes = Lanes(make_lane, limit=max_lanes)
        self._waiting: dict[Lane, None] = {}
        """Lanes that callers wait for; one that has no more is taken out by the next `_pump`."""
        self._starts = 0
        self._is_closed = self._is_paused = False
        self._part = 1.0
        self._timer: TimerHandle | None = None
        self._timer_at: float | None = None

    async def admit(
        self,
        order: AdmissionOrder,
        *,
        key: str | None = None,
        lane_name: str | None = None,
        give_up_s: float | None = None,
        delay_s: float = 0.0,
        streamed: bool = False,
    ) -> Permit:
        """
        Wait until an attempt may start.

        Args:
            order: The claim among the waiters.
            key: The message, to know it again when it fails; `None`: it is not known again.
            lane_name: Whose fate the request shares; `None` is a lane too.
            give_up_s: Longest wait, seconds; `None` waits for ever, 0 not at all.
            delay_s: Not before this many seconds, whatever the state (the backoff of a held message).  Cut short when
                an open circuit closes: the reason for the delay is gone then.
            streamed: The caller will report `Permit.first_byte`, so that a missing first byte means waiting.

        Raises:
            AdmissionTimeoutError: `give_up_s` is over; retryable by redelivery.
            AdmissionMovedError: `move_stopped` was called while waiting.
            AdmissionClosedError: `close` was called, before or while waiting; the message is to be nacked.

        Cancellation: removes the waiter; if it has got its permit already, the slot goes to the next one.
        """
        if self._is_closed:
            raise AdmissionClosedError("the worker is draining")
        lane = self._lanes.of(lane_name)
        if delay_s <= 0.0 and not lane.queue and not self._is_paused and self._may_start(lane):
            lane.queue.count_admission(order.share)
            return self._permit(lane, key, order.share, streamed=streamed)
        waiter = self._wait(
            lane,
            order,
            asyncio.get_running_loop().create_future(),
            key=key,
            streamed=streamed,
            is_delayed=delay_s > 0.0,
        )
        timers = self._timers(lane, waiter, give_up_s=give_up_s, delay_s=delay_s)
        try:
            permit: Permit | None = await waiter.future
        except asyncio.CancelledError:
            granted = waiter.future.result() if waiter.future.done() and not waiter.future.cancelled() else None
            if granted is not None:
                granted.finish(AttemptSignal())
            else:
                lane.queue.discard(waiter)
                self._pump()
            raise
        finally:
            for timer in timers:
                timer.cancel()
        if permit is not None:
            return permit
        # Raised here, not in the future: what it holds would hold this frame, and with it the message.
        if self._is_closed:
            raise AdmissionClosedError("the worker is draining")
        if waiter.is_moved:
            raise AdmissionMovedError("another server works")
        raise AdmissionTimeoutError("no slot within the time this message may wait")

    # For one message that waits at several gates: see `flow.several`

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._is_closed

    def load_of(self, lane_name: str | None) -> float:
        """Return how full the window of a lane is, 0 to 1 and more; below 0 where a stopped one lets a probe start."""
        if self.wants_probe(lane_name):
            return -1.0
        if self._part <= 0.0:
            return math.inf
        lane = self._lanes.find(lane_name)
        return 0.0 if lane is None else lane.window.in_flight / part_of(lane.window.limit, self._part)

    def try_start(self, lane_name: str | None, key: str | None, share: Share, *, streamed: bool) -> Permit | None:
        """Return a permit if an attempt may start now and no request waits for that; else `None`."""
        lane = self._lanes.of(lane_name)
        if self._is_closed or self._is_paused or lane.queue or not self._may_start(lane):
            return None
        lane.queue.count_admission(share)
        return self._permit(lane, key, share, streamed=streamed)

    def enqueue(
        self,
        order: AdmissionOrder,
        future: "asyncio.Future[Permit | None]",
        *,
        lane_name: str | None,
        key: str | None,
        streamed: bool,
        is_delayed: bool,
    ) -> "Place":
        """Add a waiter that shares its future with those of other gates; it may have its permit when this returns."""
        lane = self._lanes.of(lane_name)
        return Place(lane, self._wait(lane, order, future, key=key, streamed=streamed, is_delayed=is_delayed))

    def end_delay(self, place: "Place") -> None:
        """Let a waiter start that was enqueued with a delay."""
        self._end_delay(place.lane, place.waiter)

    def withdraw(self, place: "Place") -> None:
        """Remove a waiter that was enqueued; harmless when it has left."""
        place.lane.queue.discard(place.waiter)
        self._pump()

    def move_stopped(self, patience_s: Callable[[str], float]) -> int:
        """
        End waits for stopped lanes with `AdmissionMovedError`, those of messages in a backoff included.

        Args:
            patience_s: Returns for how long messages wait for a stopped lane of this name, seconds.

        Returns:
            How many waits were ended.
        """
        moved = 0
        for lane in list(self._waiting):
            since = self._stopped_since(lane)
            if since is None or self._clock.now() - since < patience_s(lane.name or ""):
                continue
            for waiter in lane.queue.drain():
                waiter.is_moved = True
                moved += not waiter.future.done()
                _give_no_permit(waiter)
        self._pump()
        return moved

    def answer_s(self, lane_name: str | None, share: float) -> float | None:
        """Return the time than which a share of a lane's recent answers were faster, seconds; `None`: not known."""
        lane = self._lanes.find(lane_name)
        return None if lane is None else lane.times.least_s(self._clock.now(), share)

    def is_tried_late(self, lane_name: str | None) -> bool:
        """Count a request of a lane whose deadline is too near, and return whether it is sent all the same."""
        return self._lanes.of(lane_name).times.is_tried()

    def stopped_since(self, lane_name: str | None) -> float | None:
        """Return when the circuit opened that keeps a lane's attempts back, the older one of two; `None`: none does."""
        return self._stopped_since(self._lanes.find(lane_name))

    def wants_probe(self, lane_name: str | None) -> bool:
        """Whether an open circuit keeps a lane's attempts back, but would let one start now."""
        lane = self._lanes.find(lane_name)
        if self._stopped_since(lane) is None or self._is_paused or self._is_closed or self._part <= 0.0:
            return False
        return self._route.circuit.allows() and (lane is None or lane.circuit.allows())

    def _stopped_since(self, lane: Lane | None) -> float | None:
        opened = [fate.circuit.opened_at for fate in (self._route, lane) if fate is not None]
        return min((at for at in opened if at is not None), default=None)

    def _wait(
        self,
        lane: Lane,
        order: AdmissionOrder,
        future: "asyncio.Future[Permit | None]",
        *,
        key: str | None,
        streamed: bool,
        is_delayed: bool,
    ) -> Waiter:
        rank = max(lane.evidence.rank(key), self._route.evidence.rank(key))
        waiter = Waiter(order, future, key=key, rank=rank, streamed=streamed, since=self._clock.now())
        is_first = not lane.queue.has_ready()
        lane.queue.add(waiter, is_delayed=is_delayed)
        if is_first:  # where others are ready, they could not start either, and the timer is set for them
            self._waiting[lane] = None
            self._pump()
        return waiter

    def close(self) -> None:
        """End every wait with `AdmissionClosedError` and admit no attempt any more; permits stay valid.  Idempotent."""
        self._is_closed = True
        for lane in self._waiting:
            for waiter in lane.queue.drain():
                _give_no_permit(waiter)
        self._waiting.clear()
        self._arm(None)

    def pause(self) -> None:
        """Admit no attempt until `resume`; attempts under way go on."""
        self._is_paused = True
        self._arm(None)

    def resume(self) -> None:
        """End a pause."""
        self._is_paused = False
        self._pump()

    @property
    def in_flight(self) -> int:
        """Permits not finished."""
        return sum(lane.window.in_flight for lane in self._lanes)

    @property
    def part(self) -> float:
        """The part of each window that may be used, 0 to 1."""
        return self._part

    def set_part(self, part: float) -> None:
        """
        Let only a part of each window be used; attempts under way go on.

        Args:
            part: 0 to 1.  0: nothing starts, no probe either, and what waits counts as waiting for a stopped lane
                (`load`).  Above 0 at least one attempt of each lane may run.
        """
        has_risen = part > self._part
        self._part = part
        if has_risen:
            self._pump()

    def allow_probe(self) -> None:
        """Let a probe through each open circuit at once (credentials changed, the health path answers)."""
        self._route.circuit.allow_probe()
        for lane in self._lanes:
            lane.circuit.allow_probe()
            lane.queue.release()
        self._pump()

    def stopping(self, lane_name: str | None = None) -> CircuitStatistics | None:
        """Return the circuit that keeps a lane's attempts back: the route's, else its own; `None` while closed."""
        lane = self._lanes.find(lane_name)
        for fate in (self._route, lane):
            if fate is not None:
                self._end_doubt(fate)
                if fate.circuit.state is not CircuitState.CLOSED:
                    return fate.circuit.statistics()
        return None

    def is_in_doubt(self, lane_name: str | None = None) -> bool:
        """Whether attempts under way are to tell if the failures of a lane, or of the route, are an outage."""
        lane = self._lanes.find(lane_name)
        fates = (self._route,) if lane is None else (self._route, lane)
        return any(fate.circuit.state is CircuitState.CLOSED and not fate.circuit.allows() for fate in fates)

    def is_stopped(self) -> bool:
        """Whether the circuit of the route or of any lane is not closed."""
        return any(fate.circuit.state is not CircuitState.CLOSED for fate in (self._route, *self._lanes))

    def load(self) -> RouteLoad:
        """Return what waits behind open circuits and pauses, or has failed, and whether others may start."""
        is_stopped = self._route.circuit.state is not CircuitState.CLOSED or self._part <= 0.0
        waiting, has_working_lane, many_fail = 0, not is_stopped and not any(True for _ in self._lanes), False
        for lane in self._lanes:
            if is_stopped or lane.is_stopped:
                waiting += len(lane.queue)
            else:
                waiting += lane.queue.held + lane.queue.limited
                has_working_lane = True
                many_fail |= any(fate.evidence.failing_share > PRIOR_SHARE for fate in (lane, self._route))
        return RouteLoad(waiting=waiting, has_working_lane=has_working_lane, many_fail=many_fail)

    def others_waiting(self, lane_name: str | None) -> bool:
        """Whether other messages wait that could be the next probe of what keeps a lane's attempts back."""
        if self._route.circuit.state is not CircuitState.CLOSED:
            return any(lane.queue for lane in self._lanes)
        lane = self._lanes.find(lane_name)
        return lane is not None and len(lane.queue) > 0

    def statistics(self) -> GateStatistics:
        """Return a snapshot."""
        return GateStatistics(
            circuit=self._route.circuit.statistics(),
            lanes=self._lanes.statistics(self._part),
            failing_share=self._route.evidence.failing_share,
            part=self._part,
            paused=self._is_paused,
            closed=self._is_closed,
        )

    def _permit(self, lane: Lane, key: str | None, share: Share, *, streamed: bool) -> Permit:
        self._starts += 1
        lane.under_way[self._starts] = self._clock.now()
        return Permit(self, lane, key, self._starts, share, streamed=streamed)

    def _failed(self, lane: Lane, scope: BreakerScope, key: str | None, number: int) -> Blame:
        fate = self._fate(lane, scope)
        undecided = len(self._under_way(fate)) - 1  # this attempt has its permit still
        return fate.evidence.failed(key, number, latest=self._starts, undecided=undecided)

    def _end_doubt(self, fate: Fate) -> None:
        if fate.circuit.is_doubt_over():
            fate.end_doubt(self._under_way(fate))

    def _under_way(self, fate: Fate) -> list[float]:
        lanes = (fate,) if isinstance(fate, Lane) else self._lanes
        return [began_at for each in lanes for began_at in each.under_way.values()]

    def _fate(self, lane: Lane, scope: BreakerScope) -> Fate:
        return self._route if scope is BreakerScope.ROUTE else lane

    def _began_well(self, lane: Lane, lane_pass: Pass, route_pass: Pass) -> None:
        now = self._clock.now()
        if lane_pass.is_probe and lane.record_success(lane_pass, now, began_at=now):
            _reopen(lane)
        if route_pass.is_probe and self._route.record_success(route_pass, now, began_at=now):
            self._reopen_all()
        self._pump()

    def _connected(self, route_pass: Pass) -> None:
        now = self._clock.now()
        if self._route.circuit.error_class == CONNECT and self._route.record_success(route_pass, now, began_at=now):
            self._reopen_all()
            self._pump()

    def _report(self, permit: Permit, signal: AttemptSignal) -> None:
        """Apply what the end of an attempt says, then admit what that allows."""
        lane, key, number, lane_pass, route_pass = permit.identity
        now, began_at = self._clock.now(), lane.under_way.pop(number)
        if permit.share is not ALONE:
            lane.queue.settle(permit.share, now - permit.started_at)
        if signal.breaker is BreakerEffect.SUCCESS:
            lane.times.add(now, now - permit.started_at)
            had_failed = lane.evidence.served(key, number)
            had_failed |= self._route.evidence.served(key, number)
            if lane.record_success(lane_pass, now, began_at=began_at):
                _reopen(lane)
            if self._route.record_success(route_pass, now, began_at=began_at):
                self._reopen_all()
            if self._route.forgives(has_failed=had_failed):
                for each in self._lanes:
                    each.evidence.forgive()
                    each.queue.forgive()
            if lane.forgives(has_failed=had_failed):
                lane.queue.forgive()
        else:
            passes = {BreakerScope.LANE: lane_pass, BreakerScope.ROUTE: route_pass}
            for scope, token in passes.items():
                fate = self._fate(lane, scope)
                if signal.breaker is BreakerEffect.NONE or signal.scope is not scope:
                    fate.circuit.record_ignored(token, wait_s=signal.retry_after_s or 0.0)
                else:
                    fate.record_failure(
                        token,
                        signal.error_class,
                        key=key,
                        trip=signal.breaker is BreakerEffect.TRIP,
                        began_at=began_at,
                        under_way=self._under_way(fate),
                        retry_after_s=signal.retry_after_s,
                    )
        self._pump()

    def _reopen_all(self) -> None:
        for lane in self._lanes:
            _reopen(lane)

    def _pump(self) -> None:
        """Admit every waiter that may start now, then set the timer."""
        if not self._waiting:
            if self._timer is not None:
                self._arm(None)
            return
        now = self._clock.now()
        opens_at: list[float] = []
        waiting = list(self._waiting)
        for fate in (self._route, *waiting):
            self._end_doubt(fate)
        if self._route.circuit.state is not CircuitState.CLOSED:
            self._rng.shuffle(waiting)  # its probe is not always of the same lane
        for lane in waiting:
            self._pump_lane(lane, opens_at)
            if not lane.queue:
                del self._waiting[lane]
        self._arm(self._next_instant(now, opens_at))

    def _pump_lane(self, lane: Lane, opens_at: list[float]) -> None:
        while True:
            lane_opens_at = lane.window.opens_at()  # read before the room itself, since time passes in between
            if self._is_closed or self._is_paused or not self._may_start(lane):
                break
            chosen = self._choose(lane)
            if chosen is None:
                return
            if chosen.future.done():
                continue  # Its task is cancelled and has not run since; `admit` will find it gone.
            chosen.future.set_result(self._permit(lane, chosen.key, chosen.order.share, streamed=chosen.streamed))
        if lane_opens_at is not None:
            opens_at.append(lane_opens_at)

    def _choose(self, lane: Lane) -> Waiter | None:
        if lane.circuit.state is CircuitState.CLOSED and lane.window.pauses:
            return lane.queue.pop_probe(lane.circuit.last_failed, newest=lane.window.pauses % 2 == 1)
        for fate in (self._route, lane):
            if fate.circuit.state is not CircuitState.CLOSED:
                return lane.queue.pop_probe(fate.circuit.last_failed, newest=fate.circuit.failed_probes % 2 == 0)
            is_newest = self._starts % 2 == 0
            # Where messages that fail stand in a block, one of the others tells what it is.
            if fate.is_failing() or (is_newest and fate.evidence.failing_share > PRIOR_SHARE):
                return lane.queue.pop_probe(fate.circuit.last_failed, newest=is_newest)
        return lane.queue.pop(self._clock.now)

    def _may_start(self, lane: Lane) -> bool:
        """Whether an attempt of this lane may start now."""
        if self._part < 1.0 and not self._has_part_left(lane):
            return False
        if self._route.circuit.state is CircuitState.CLOSED:
            return self._route.circuit.allows() and lane.may_start()
        # A probe of the route needs no room in a window, but a lane whose own circuit keeps it back sends none.
        return self._route.circuit.allows() and lane.circuit.allows()

    def _has_part_left(self, lane: Lane) -> bool:
        """Whether the part of the window is not full; a probe needs no room in it, but needs the part not to be 0."""
        if self._part <= 0.0:
            return False
        is_working = self._route.circuit.state is lane.circuit.state is CircuitState.CLOSED
        return not is_working or lane.window.in_flight < part_of(lane.window.limit, self._part)

    def _timers(self, lane: Lane, waiter: Waiter, *, give_up_s: float | None, delay_s: float) -> list[TimerHandle]:
        now, timers = self._clock.now(), []
        if delay_s > 0.0:
            timers.append(self._clock.call_at(now + delay_s, lambda: self._end_delay(lane, waiter)))
        if give_up_s is not None and give_up_s > 0.0:
            timers.append(self._clock.call_at(now + give_up_s, lambda: self._give_up(lane, waiter)))
        elif give_up_s is not None:
            self._give_up(lane, waiter)
        return timers

    def _end_delay(self, lane: Lane, waiter: Waiter) -> None:
        lane.queue.make_ready(waiter)
        self._pump()

    def _give_up(self, lane: Lane, waiter: Waiter) -> None:
        lane.queue.discard(waiter)
        _give_no_permit(waiter)
        self._pump()

    def _next_instant(self, now: float, opens_at: list[float]) -> float | None:
        """
        Return the next instant at which time alone lets an attempt start.

        Args:
            now: Read before it was checked whether an attempt may start.  An instant that has passed since then counts
                as still to come, and its timer runs at once.
            opens_at: The instants of the windows, read at the same time.
        """
        if self._is_closed or self._is_paused or not self._waiting:
            return None
        changes_at = [fate.circuit.changes_at() for fate in (self._route, *self._waiting)]
        return min((*opens_at, *(at for at in changes_at if at is not None and at > now)), default=None)

    def _arm(self, instant: float | None) -> None:
        """Keep one timer, no later than an instant."""
        # A timer that is too early stays; it finds nothing to do and is set anew.
        if instant is not None and self._timer_at is not None and self._timer_at <= instant:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = instant
        self._timer = None if instant is None else self._clock.call_at(instant, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = self._timer_at = None
        self._pump()


def _reopen(lane: Lane) -> None:
    """Let a lane's waiters start again, gradually: a circuit that kept them back has closed."""
    lane.window.reopen()
    lane.queue.release()


def _give_no_permit(waiter: Waiter) -> None:
    if not waiter.future.done():
        waiter.future.set_result(None)
