"""
The gate of one route: which attempts may start, and which have to wait.

Theory of operation.  `admit` returns a `Permit` once the breaker and the window allow an attempt and no waiter has a
better claim.  The permit is finished exactly once with an `AttemptSignal`, which the gate passes on to window and
breaker as it is.  A freed slot goes to one waiter at once (its future gets the permit): no other waiter wakes up, and
no later caller can overtake it.

Nothing polls.  A waiter has a timer for the end of its delay and one for its longest wait.  The gate has one timer, for
the next instant at which time alone lets an attempt start: a probe, the end of a pause, growth of the window.

All of it runs on one event loop; no method may be called from another thread.  Which waiter is next is decided in
`queue`, whether any may start in `window` and `breaker`; this file only joins them.
"""

import asyncio
from collections.abc import Callable
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
    """How many of these have a message that was attempted before (`AdmissionOrder.held`)."""
    paused: bool
    """Stopped by `pause`."""
    closed: bool


class Permit:
    """
    The right to make one attempt; holds one slot of the window until it is finished.

    As a context manager it finishes itself at the end of the block, with a signal that says nothing, unless `finish`
    was called.
    """

    __slots__ = ("_breaker_pass", "_finished", "_gate", "_ticket")

    def __init__(self, gate: "RouteGate", ticket: Ticket, breaker_pass: BreakerPass) -> None:
        self._gate = gate
        self._ticket = ticket
        self._breaker_pass = breaker_pass
        self._finished = False

    @property
    def is_probe(self) -> bool:
        """Whether this attempt is the probe of an open breaker."""
        return self._breaker_pass.is_probe

    def is_refusal_fresh(self) -> bool:
        """
        Return whether a refusal of this attempt would be news for the window: it started after the last decrease.

        To be asked before `finish`.  A refusal that is not fresh is one more sign of an overload after which the window
        has decreased already.
        """
        return self._gate._is_refusal_fresh(self._ticket)  # noqa: SLF001 - one object in two halves

    def connected(self) -> None:
        """
        Report that a connection stands and the request is sent.

        If refused connections (class `connect`) opened the breaker, that closes it without waiting for the probe's
        answer, which may take minutes (ADR 0011).  Idempotent; ignored after `finish`.
        """
        if not self._finished:
            self._gate._connected(self._breaker_pass)  # noqa: SLF001 - one object in two halves

    def first_byte(self) -> None:
        """
        Report that a good answer has begun (status 2xx and the first piece of its body).

        For a probe, it closes the breaker at once instead of after minutes of generation; for any attempt, it is the
        window's best measurement of waiting.  Idempotent; ignored after `finish`.
        """
        if not self._finished:
            self._gate._first_byte(self._ticket, self._breaker_pass)  # noqa: SLF001 - one object in two halves

    def finish(self, signal: AttemptSignal) -> bool:
        """Free the slot and report how the attempt ended; return false, and do nothing, when it was finished before."""
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
        window: How many may run at once; used by this gate alone.
        breaker: Whether any may run; used by this gate alone.
        clock: Monotonic time and timers; the same time the window and the breaker were made with.
        aging_every: One admission in so many goes to the request that has waited longest, whatever its priority, so
            that none waits for ever; 0 turns that off.
    """

    def __init__(self, window: AdaptiveWindow, breaker: Breaker, clock: Clock, *, aging_every: int = 8) -> None:
        self._window = window
        self._breaker = breaker
        self._clock = clock
        self._queue = WaitQueue(aging_every=aging_every)
        self._is_closed = self._is_paused = False
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
            order: The claim among the waiters.
            model: The request's model, for circuits that concern one model only.
            give_up_s: Longest wait, seconds; `None` waits for ever, 0 not at all.
            delay_s: Not before this many seconds, whatever the state (the backoff of a held message).  Cut short when
                an open breaker closes: the reason for the delay is gone then.
            streamed: The caller will report `Permit.first_byte`, so that a missing first byte means waiting.

        Raises:
            AdmissionTimeoutError: `give_up_s` is over; retryable by redelivery.
            AdmissionClosedError: `close` was called, before or while waiting; the message is to be nacked.

        Cancellation: removes the waiter; if it has got its permit already, the slot goes to the next one.
        """
        if self._is_closed:
            raise AdmissionClosedError("the worker is draining")
        if delay_s <= 0.0 and not self._queue and self._has_room_for(model):
            self._queue.count_admission()
            return Permit(self, self._window.start(streamed=streamed), self._breaker.enter(model))
        waiter = Waiter(order, model, asyncio.get_running_loop().create_future(), streamed=streamed)
        self._queue.add(waiter, is_delayed=delay_s > 0.0)
        self._pump()
        timers = []
        if delay_s > 0.0:
            timers.append(self._call_later(delay_s, lambda: self._end_delay(waiter)))
        if give_up_s is not None and give_up_s > 0.0:
            timers.append(self._call_later(give_up_s, lambda: self._give_up(waiter)))
        elif give_up_s is not None:
            self._give_up(waiter)
        try:
            permit: Permit = await waiter.future
        except asyncio.CancelledError:
            if waiter.future.done() and not waiter.future.cancelled() and waiter.future.exception() is None:
                waiter.future.result().finish(AttemptSignal())
            else:
                self._queue.discard(waiter)
                self._pump()
            raise
        finally:
            for timer in timers:
                timer.cancel()
        return permit

    def close(self) -> None:
        """End every wait with `AdmissionClosedError` and admit no attempt any more; permits stay valid.  Idempotent."""
        self._is_closed = True
        for waiter in self._queue.drain():
            _fail(waiter, AdmissionClosedError("the worker is draining"))
        self._arm(self._clock.now())

    def pause(self) -> None:
        """Admit no attempt until `resume`; attempts under way go on."""
        self._is_paused = True
        self._arm(self._clock.now())

    def resume(self) -> None:
        """End a pause."""
        self._is_paused = False
        self._pump()

    def allow_probe(self) -> None:
        """Let a probe through an open breaker at once (credentials changed, the health path answers)."""
        self._breaker.allow_probe()
        self._queue.release()
        self._pump()

    def stopping(self, model: str | None = None) -> CircuitStatistics | None:
        """Return the circuit that keeps a model's attempts back: the route's, else the model's; `None` while closed."""
        return self._breaker.stopping(model)

    @property
    def waiting(self) -> int:
        """Callers of `admit` that wait, held messages included."""
        return len(self._queue)

    def statistics(self) -> GateStatistics:
        """Return a snapshot."""
        return GateStatistics(
            window=self._window.statistics(),
            breaker=self._breaker.statistics(),
            in_flight=self._window.in_flight,
            waiting=len(self._queue),
            held=self._queue.held,
            paused=self._is_paused,
            closed=self._is_closed,
        )

    def _first_byte(self, ticket: Ticket, token: BreakerPass) -> None:
        self._window.first_byte(ticket)
        # Only the first byte of a probe is a success for the breaker.  If that of any attempt were, streams that all
        # break halfway would never be failures in a row.
        self._after_report(closed=token.is_any_probe and self._breaker.report(token, BreakerEffect.SUCCESS))

    def _connected(self, token: BreakerPass) -> None:
        if self._breaker.connected(token):
            self._after_report(closed=True)

    def _is_refusal_fresh(self, ticket: Ticket) -> bool:
        return self._window.is_refusal_fresh(ticket)

    def _finish(self, ticket: Ticket, token: BreakerPass, signal: AttemptSignal) -> None:
        if signal.overload:
            outcome = Outcome.OVERLOAD
        else:
            outcome = Outcome.OK if signal.breaker is BreakerEffect.SUCCESS else Outcome.NEUTRAL
        self._window.finish(ticket, outcome, work=signal.work, pause_s=signal.pause_s)
        closed = self._breaker.report(
            token,
            signal.breaker,
            error_class=signal.error_class,
            scope=signal.scope,
            retry_after_s=signal.retry_after_s,
        )
        self._after_report(closed=closed)

    def _after_report(self, *, closed: bool) -> None:
        """Admit what the report of an attempt allows; if it closed a circuit, all waiters, gradually."""
        if closed:
            self._window.reopen()
            self._queue.release()
        self._pump()

    def _pump(self) -> None:
        """Admit every waiter that may start now, then set the timer."""
        now = self._clock.now()
        self._queue.unpark(self._breaker)
        while True:
            opens_at = self._window.opens_at()  # read before the room itself, since time passes in between
            if self._is_closed or self._is_paused or not self._may_start():
                break
            chosen = self._queue.pop(self._breaker)
            if chosen is None:
                break
            if chosen.future.done():
                continue  # Its task is cancelled and has not run since; `admit` will find it gone.
            token = self._breaker.enter(chosen.model)
            chosen.future.set_result(Permit(self, self._window.start(streamed=chosen.streamed), token))
        self._arm(now, opens_at)

    def _has_room_for(self, model: str | None) -> bool:
        """Whether an attempt of this model may start now."""
        return self._may_start() and not self._is_paused and self._breaker.allows_model(model)

    def _may_start(self) -> bool:
        if self._breaker.is_closed:
            return self._window.has_room()
        # A probe needs no room: attempts that started before the breaker opened, and hang, may fill the window.
        return self._breaker.allows_route()

    def _call_later(self, seconds: float, callback: Callable[[], None]) -> TimerHandle:
        return self._clock.call_at(self._clock.now() + seconds, callback)

    def _end_delay(self, waiter: Waiter) -> None:
        self._queue.make_ready(waiter)
        self._pump()

    def _give_up(self, waiter: Waiter) -> None:
        self._queue.discard(waiter)
        _fail(waiter, AdmissionTimeoutError("no slot within the time this message may wait"))
        self._arm(self._clock.now())

    def _arm(self, now: float, opens_at: float | None = None) -> None:
        """
        Keep one timer, no later than the next instant at which time alone lets an attempt start.

        Args:
            now: Read before the caller checked whether an attempt may start.  An instant that has passed since then
                counts as still to come, and its timer runs at once.
            opens_at: The instant of the window, read at the same time.
        """
        instant = None if self._is_closed or self._is_paused else self._next_instant(now, opens_at)
        # A timer that is too early stays; it finds nothing to do and is set anew.
        if instant is not None and self._timer_at is not None and self._timer_at <= instant:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = instant
        self._timer = None if instant is None else self._clock.call_at(instant, self._on_timer)

    def _next_instant(self, now: float, opens_at: float | None) -> float | None:
        if not self._queue:
            return None
        probe_at = self._breaker.route_changes_at()
        if probe_at is not None and probe_at <= now:
            probe_at = None
        instants = (opens_at, probe_at, self._queue.next_unpark_at(now, self._breaker))
        return min((each for each in instants if each is not None), default=None)

    def _on_timer(self) -> None:
        self._timer = self._timer_at = None
        self._pump()


def _fail(waiter: Waiter, error: Exception) -> None:
    if not waiter.future.done():
        waiter.future.set_exception(error)
