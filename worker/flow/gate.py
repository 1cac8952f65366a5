"""
The gate of one route: who may start an attempt, and who waits.

Theory of operation.  `admit` returns a `Permit` once the breaker lets an attempt through, the window has room and
nobody with a better claim waits; the permit is finished exactly once with an `AttemptSignal`, from which window and
breaker learn.  A freed slot is *handed* to one waiter (its future gets the permit), so that nobody wakes up in vain
and no newcomer can overtake.  Waiting costs O(log n) and no polling: one timer stands at the next instant at which
anything may change by itself (a probe, the end of a Retry-After, of a delay, of a waiter's patience).

All of it runs on one event loop; no method may be called from another thread.  What is admitted first is `_queue`'s
affair, whether anything may start is `window`'s and `breaker`'s; this file only joins them.
"""

import asyncio
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from worker.errors import AdmissionClosedError, AdmissionTimeoutError
from worker.flow.breaker import Breaker, BreakerEffect, BreakerPass, BreakerScope, BreakerStatistics
from worker.flow.circuit import CircuitStatistics
from worker.flow.clock import Clock, TimerHandle
from worker.flow.queue import AdmissionOrder, Waiter, WaitQueue
from worker.flow.window.adaptive import AdaptiveWindow, Outcome, Ticket, WindowStatistics


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptSignal:
    """What the end of one attempt says about the backend."""

    breaker: BreakerEffect = BreakerEffect.NONE
    """Applied as it is.  `SUCCESS` also counts as served for the window."""
    overload: bool = False
    """The backend refused for lack of capacity: the window decreases."""
    pause_s: float | None = None
    """Of an overload: how long the window admits nothing, seconds; `None` for no pause."""
    error_class: str = ""
    """Shown while the breaker is open."""
    scope: BreakerScope = BreakerScope.ROUTE
    retry_after_s: float | None = None
    """The server's Retry-After for the breaker's next probe, seconds."""
    work: float | None = None
    """Size of the answer, for example output tokens; `None` when unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateStatistics:
    """A gate at one instant."""

    window: WindowStatistics
    breaker: BreakerStatistics
    in_flight: int
    """Permits not finished."""
    waiting: int
    """Callers of `admit` that wait, held ones included."""
    held: int
    """... of them messages that were tried before (`AdmissionOrder.held`)."""
    paused: bool
    """Stopped by `pause`."""
    closed: bool


class Permit:
    """
    The right to make one attempt; holds one slot of the window until it is finished.

    As a context manager it finishes itself on leaving, with a signal that says nothing, unless `finish` was called.
    """

    __slots__ = ("_breaker_pass", "_finished", "_gate", "_ticket")

    def __init__(self, gate: "RouteGate", ticket: Ticket, breaker_pass: BreakerPass) -> None:
        self._gate = gate
        self._ticket = ticket
        self._breaker_pass = breaker_pass
        self._finished = False

    @property
    def is_probe(self) -> bool:
        """Whether this attempt decides about an open breaker."""
        return self._breaker_pass.is_probe

    def is_refusal_fresh(self) -> bool:
        """
        Return whether a refusal of this attempt would be news for the window: it started after the last decrease.

        To be asked before `finish`; a refusal that is not fresh belongs to an overload that was answered already.
        """
        return self._gate._is_refusal_fresh(self._ticket)  # noqa: SLF001 - one object in two halves

    def connected(self) -> None:
        """
        Report that a connection stands and the request is sent.

        Closes a half-open breaker that was opened by refused connections (class `connect`), whose cause is gone then.
        Idempotent; ignored after `finish`.
        """
        if not self._finished:
            self._gate._connected(self._breaker_pass)  # noqa: SLF001 - one object in two halves

    def first_byte(self) -> None:
        """
        Report that a good answer has begun (status 2xx and the first piece of its body).

        Of a probe, it closes a half-open breaker at once instead of after minutes of generation; of any attempt, it is
        the window's best measure of waiting.  Idempotent; ignored after `finish`.
        """
        if not self._finished:
            self._gate._first_byte(self._ticket, self._breaker_pass)  # noqa: SLF001 - one object in two halves

    def finish(self, signal: AttemptSignal) -> bool:
        """Give the slot back and say how it ended; return false, and do nothing, when it was finished before."""
        if self._finished:
            return False
        self._finished = True
        self._gate._finish(self._ticket, self._breaker_pass, signal)  # noqa: SLF001 - one object in two halves
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish(AttemptSignal())


class RouteGate:
    """
    Admits attempts to one backend.

    Args:
        window: How many may run at once; this gate is its only user.
        breaker: Whether any may run; likewise.
        clock: Monotonic time and timers; the same time the window and the breaker were made with.
        aging_every: One admission in so many goes to whoever waits longest, whatever its priority, so that nothing
            waits for ever; 0 turns that off.
    """

    def __init__(self, window: AdaptiveWindow, breaker: Breaker, clock: Clock, *, aging_every: int = 8) -> None:
        self._window = window
        self._breaker = breaker
        self._clock = clock
        self._queue = WaitQueue(aging_every=aging_every)
        self._closed = False
        self._paused_until: float | None = None
        self._timer: TimerHandle | None = None
        self._timer_at: float | None = None

    async def admit(
        self,
        order: AdmissionOrder,
        *,
        model: str | None = None,
        give_up_s: float | None = None,
        delay_s: float = 0.0,
        streamed: bool = False,
    ) -> Permit:
        """
        Wait until an attempt may start.

        Args:
            order: The claim among those who wait.
            model: The request's model, for circuits that concern one model only.
            give_up_s: Longest wait, seconds; `None` waits for ever, 0 not at all.
            delay_s: Not before this many seconds, whatever the state (the backoff of a held message).  Cut short when
                an open breaker closes: the reason for the wait is gone then.
            streamed: The caller will report `Permit.first_byte`, so that its silence means waiting.

        Raises:
            AdmissionTimeoutError: `give_up_s` is over; retryable by redelivery.
            AdmissionClosedError: `close` was called, before or while waiting; hand the message back.

        Cancellation: nothing remains of the caller; a permit that was just handed to it goes to the next.
        """
        if self._closed:
            raise AdmissionClosedError("the worker is draining")
        now = self._clock.now()
        if delay_s <= 0.0 and not self._queue and self._has_room_for(model):  # nobody waits: nobody has a better claim
            self._queue.passed()
            return Permit(self, self._window.start(streamed=streamed), self._breaker.enter(model))
        waiter = Waiter(
            order=order,
            model=model,
            future=asyncio.get_running_loop().create_future(),
            ready_at=now + max(delay_s, 0.0),
            give_up_at=None if give_up_s is None else now + give_up_s,
            streamed=streamed,
        )
        self._queue.add(waiter, now)
        self._pump()
        try:
            permit: Permit = await waiter.future
        except asyncio.CancelledError:
            if waiter.future.done() and not waiter.future.cancelled() and waiter.future.exception() is None:
                waiter.future.result().finish(AttemptSignal())
            else:
                self._queue.discard(waiter)
                self._pump()
            raise
        return permit

    def close(self) -> None:
        """Wake everyone with `AdmissionClosedError` and admit nobody any more; permits stay good.  Idempotent."""
        self._closed = True
        for waiter in self._queue.drain():
            _fail(waiter, AdmissionClosedError("the worker is draining"))
        self._arm(self._clock.now())

    def pause(self, until: float | None = None) -> None:
        """Admit nobody until this instant of the clock, or until `resume`; attempts under way go on."""
        self._paused_until = float("inf") if until is None else until
        self._arm(self._clock.now())

    def resume(self) -> None:
        """End a pause."""
        self._paused_until = None
        self._pump()

    def poke(self, model: str | None = None) -> None:
        """Let a probe through an open breaker at once (credentials changed, the health path answers)."""
        self._breaker.poke(model)
        self._queue.release(model)
        self._pump()

    def circuit(self) -> CircuitStatistics:
        """Return a snapshot of the route's circuit alone, for what runs once a message."""
        return self._breaker.route_statistics()

    def statistics(self) -> GateStatistics:
        """Return a snapshot."""
        return GateStatistics(
            window=self._window.statistics(),
            breaker=self._breaker.statistics(),
            in_flight=self._window.in_flight,
            waiting=len(self._queue),
            held=self._queue.held,
            paused=self._is_paused(),
            closed=self._closed,
        )

    def _first_byte(self, ticket: Ticket, token: BreakerPass) -> None:
        self._window.first_byte(ticket)
        # Of a probe it is news.  Of any other attempt a good beginning is no success: streams that all break halfway
        # would never be failures in a row.
        self._after(mended=token.is_any_probe and self._breaker.report(token, BreakerEffect.SUCCESS))

    def _connected(self, token: BreakerPass) -> None:
        if self._breaker.connected(token):
            self._after(mended=True)

    def _is_refusal_fresh(self, ticket: Ticket) -> bool:
        return self._window.is_refusal_fresh(ticket)

    def _finish(self, ticket: Ticket, token: BreakerPass, signal: AttemptSignal) -> None:
        if signal.overload:
            outcome = Outcome.OVERLOAD
        else:
            outcome = Outcome.OK if signal.breaker is BreakerEffect.SUCCESS else Outcome.NEUTRAL
        self._window.finish(ticket, outcome, work=signal.work, pause_s=signal.pause_s)
        mended = self._breaker.report(
            token,
            signal.breaker,
            error_class=signal.error_class,
            scope=signal.scope,
            retry_after_s=signal.retry_after_s,
        )
        self._after(mended=mended)

    def _after(self, *, mended: bool) -> None:
        """Hand out what an end has freed; after a breaker closed, to everyone it kept back, and little by little."""
        if mended:
            self._window.reopen()
            self._queue.release(None)
        self._pump()

    def _is_paused(self) -> bool:
        return self._paused_until is not None and self._clock.now() < self._paused_until

    def _pump(self) -> None:
        """Hand out what is free, then set the timer."""
        now = self._clock.now()
        self._queue.ripen(now, self._breaker)
        while True:
            opens_at = self._window.opens_at()  # before the room itself: time passes in between
            if self._closed or self._is_paused() or not self._may_start():
                break
            chosen = self._queue.pop(self._breaker)
            if chosen is None:
                break
            if chosen.future.done():
                continue  # Cancelled, but its task has not run since: `admit` will find nothing to give back.
            token = self._breaker.enter(chosen.model)
            chosen.future.set_result(Permit(self, self._window.start(streamed=chosen.streamed), token))
        # After the admissions: a budget of 0 takes what is free.
        for waiter in self._queue.expired(now):
            _fail(waiter, AdmissionTimeoutError("no slot within the time this message may wait"))
        self._arm(now, opens_at)

    def _has_room_for(self, model: str | None) -> bool:
        """Whether an attempt of this model may start now."""
        return self._may_start() and not self._is_paused() and self._breaker.allows_model(model)

    def _may_start(self) -> bool:
        if self._breaker.is_closed:
            return self._window.has_room()
        # A probe needs no room: attempts that hang since before the trip may fill the window.
        return self._breaker.allows_route()

    def _arm(self, now: float, opens_at: float | None = None) -> None:
        """
        Keep one timer, no later than the next instant something may change by itself.

        `now` and `opens_at`, the window's instant, are from before it was looked whether anything may start.  What has
        come to pass since then was not seen by that look and counts as still to come: its timer runs at once.
        """
        instant = None if self._closed else self._next_instant(now, opens_at)
        # One that moves away, as with everyone who leaves the queue, needs no other timer: this one is set anew then.
        if instant is not None and self._timer_at is not None and self._timer_at <= instant:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = instant
        self._timer = None if instant is None else self._clock.call_at(instant, self._on_timer)

    def _next_instant(self, now: float, opens_at: float | None) -> float | None:
        if not self._queue:
            return None
        to_come = (self._paused_until, self._breaker.route_changes_at())
        instants = [self._queue.next_instant(now, self._breaker), opens_at]
        instants += [each for each in to_come if each is not None and now < each < float("inf")]
        return min((each for each in instants if each is not None), default=None)

    def _on_timer(self) -> None:
        self._timer = self._timer_at = None
        self._pump()


def _fail(waiter: Waiter, error: Exception) -> None:
    if not waiter.future.done():
        waiter.future.set_exception(error)
