"""
The adaptive window: how many requests may run at once against one backend.

Theory of operation.  Every start takes a `Ticket` with a number that only grows.  Ends are judged in *rounds*: a round
is over when enough attempts **started in it** have told something, so that a decision is never judged by attempts that
were under way before it.  There are no wall-clock cool-downs: a second is many flights of short requests and a
fraction of a long one.

* **Rejections** decrease at once, and once per flight: one of an attempt started before the last decrease belongs to
  the event that was answered already; it only adds its own slot to that decrease.
* **Waiting** (see `latency`) times throughput is the length of the queue the window causes in the backend.  The window
  keeps that near a small target: below it grows, above it falls by the excess.
* **Growth** doubles until the first sign of a limit, then adds 1; while growth after growth meets no limit, the step
  doubles again, which is how capacity that came back is found.  A window that is not in use never grows.
* A **rejected** probe for more costs someone a retry, so above a level that was rejected growth spends *credit*, which
  good answers earn slowly.
* **Retry-After** closes the window for its time, capped.  If the rejected attempt was a step above a level that had
  just been served, it closes that step only.

Failures that are no sign of overload change nothing: a dead backend is the breaker's affair.
`docs/adaptive-window.md` has the reasoning, the rejected alternatives and the measurements.
"""

from dataclasses import dataclass
from enum import StrEnum

from worker.flow.clock import Now
from worker.flow.latency import Baseline, SizeLine, low_quantile


class Outcome(StrEnum):
    """How an attempt ended, as far as capacity is concerned."""

    OK = "ok"
    """Served."""
    OVERLOAD = "overload"
    """Refused for lack of capacity."""
    NEUTRAL = "neutral"
    """Anything else; says nothing about capacity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowTuning:
    """The constants of the rule; the defaults are what `benchmarks/window.py` was run with."""

    target_share: float = 0.05
    """Length of the queue the window may cause, as a share of itself; at least one request."""
    round_share: float = 0.25
    """Answers that end a round, as a share of the window."""
    round_least: int = 4
    """... and at least so many."""
    horizon_s: float = 60.0
    """How long the lowest latency is believed, seconds."""
    credit: float = 0.005
    """What one good answer earns towards a probe above a level that was rejected: one rejection in 200 answers."""
    max_retry_after_s: float = 60.0
    """Longest Retry-After that is believed, seconds: a closed window yields no answers that could correct it."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One attempt under way; made by `AdaptiveWindow.start`, ended by `finish`."""

    number: int
    started_at: float
    in_flight: int
    """Attempts under way at its start, itself included."""
    first_byte: bool = False
    finished: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowStatistics:
    """A window at one instant."""

    limit: int
    """Attempts that may run at once."""
    in_flight: int
    minimum: int
    maximum: int
    closed_until: float | None
    """Monotonic seconds until which nothing starts (Retry-After); `None` while open."""
    slow_start: bool
    """Still doubling: no limit of the backend was met yet."""
    queue: float
    """Requests the window was last found to keep waiting in the backend."""
    wait_s: float
    """How long they waited, seconds."""
    served: int
    rejected: int
    increases: int
    decreases: int


class _Lane:
    """One kind of residual: its baseline and the present round's values."""

    __slots__ = ("baseline", "values")

    def __init__(self, horizon_s: float) -> None:
        self.baseline = Baseline(horizon_s)
        self.values: list[float] = []


class AdaptiveWindow:
    """
    Decides whether one more request may run, from how the last ones ended; finds the backend's capacity by itself.

    Args:
        initial: Where it starts.
        minimum: It never falls below; at least 1, so that something always tells when capacity is back.
        maximum: It never rises above.
        now: Monotonic seconds.
        tuning: The constants of the rule.
    """

    def __init__(
        self, initial: int = 8, minimum: int = 1, maximum: int = 64, *, now: Now, tuning: WindowTuning | None = None
    ) -> None:
        if not 1 <= minimum <= initial <= maximum:
            raise ValueError(f"need 1 <= minimum <= initial <= maximum, not {minimum}, {initial}, {maximum}")
        self._now = now
        self._tuning = tuning or WindowTuning()
        self._minimum, self._maximum = minimum, maximum
        self._limit = float(initial)
        self._in_flight = 0
        self._next_number = 0
        self._closed_until = 0.0
        self._slow_start = True
        self._step = 1.0
        self._round_start = 0
        self._round_used = False
        self._decrease_start = 0
        self._rejections_in_a_row = 0
        self._ceiling: int | None = None
        self._proven = 0
        self._credit = 1.0
        self._mean_time_s: float | None = None
        self._line = SizeLine()
        self._lanes = {kind: _Lane(self._tuning.horizon_s) for kind in ("first_byte", "sized", "whole")}
        self._queue = self._wait_s = 0.0
        self._served = self._rejected = self._increases = self._decreases = 0

    @property
    def limit(self) -> int:
        """Attempts that may run at once now."""
        return int(self._limit)

    @property
    def in_flight(self) -> int:
        """Attempts under way."""
        return self._in_flight

    def has_room(self) -> bool:
        """Whether one more attempt may start now."""
        return self._in_flight < self.limit and self._now() >= self._closed_until

    def opens_at(self) -> float | None:
        """Return when a Retry-After is over; `None` when none is pending."""
        return self._closed_until if self._closed_until > self._now() else None

    def start(self) -> Ticket:
        """Count one attempt in.  It is the caller who asks `has_room`: a breaker's probe may start without."""
        self._in_flight += 1
        if self._in_flight >= self.limit:
            self._round_used = True
        ticket = Ticket(self._next_number, self._now(), self._in_flight)
        self._next_number += 1
        return ticket

    def first_byte(self, ticket: Ticket) -> None:
        """Report that the answer has begun; the best signal of waiting, where the backend streams.  Idempotent."""
        if ticket.first_byte or ticket.finished:
            return
        ticket.first_byte = True
        self._evidence("first_byte", ticket, self._now() - ticket.started_at)

    def finish(
        self, ticket: Ticket, outcome: Outcome, *, work: float | None = None, retry_after_s: float | None = None
    ) -> bool:
        """
        Count one attempt out and learn from its end.

        Args:
            ticket: What `start` gave.
            outcome: Served, refused for lack of capacity, or neither.
            work: Size of the answer in any constant unit, for example output tokens; `None` when unknown.
            retry_after_s: The backend's own wish with an `OVERLOAD`, seconds.

        Returns:
            Whether this was a fresh sign of overload: one that does not belong to an event already answered.

        Raises:
            RuntimeError: The ticket was finished before; an error of the caller.
        """
        if ticket.finished:
            raise RuntimeError("the ticket is finished already")
        ticket.finished = True
        self._in_flight -= 1
        if outcome is Outcome.OVERLOAD:
            return self._refused(ticket, retry_after_s)
        if outcome is Outcome.OK:
            self._answered(ticket, work)
        return False

    def set_bounds(self, minimum: int, maximum: int) -> None:
        """Change the bounds in place; attempts under way go on."""
        if not 1 <= minimum <= maximum:
            raise ValueError(f"need 1 <= minimum <= maximum, not {minimum}, {maximum}")
        self._minimum, self._maximum = minimum, maximum
        self._set_limit(self._limit)

    def statistics(self) -> WindowStatistics:
        """Return a snapshot."""
        return WindowStatistics(
            limit=self.limit,
            in_flight=self._in_flight,
            minimum=self._minimum,
            maximum=self._maximum,
            closed_until=self.opens_at(),
            slow_start=self._slow_start,
            queue=self._queue,
            wait_s=self._wait_s,
            served=self._served,
            rejected=self._rejected,
            increases=self._increases,
            decreases=self._decreases,
        )

    def _refused(self, ticket: Ticket, retry_after_s: float | None) -> bool:
        self._rejected += 1
        self._credit = max(self._credit - 1.0, -1.0)
        above = self._proven > 0 and ticket.in_flight > self._proven
        if retry_after_s is not None and not above:
            closed = self._now() + min(max(retry_after_s, 0.0), self._tuning.max_retry_after_s)
            self._closed_until = max(self._closed_until, closed)
        if ticket.number < self._decrease_start:
            return False
        self._ceiling = max(self._minimum, ticket.in_flight - 1)
        if above:
            self._set_limit(min(self._limit, max(self._proven, ticket.in_flight - 1)))
        else:
            keep = (0.9, 0.75, 0.5)[min(self._rejections_in_a_row, 2)]
            self._set_limit(min(self._limit - 1.0, min(self._limit, ticket.in_flight) * keep))
            self._proven = 0
        self._rejections_in_a_row += 1
        self._decreases += 1
        self._decrease_start = self._next_number
        self._met_a_limit()
        self._new_round()
        return True

    def _answered(self, ticket: Ticket, work: float | None) -> None:
        self._served += 1
        time_s = self._now() - ticket.started_at
        mean = self._mean_time_s
        self._mean_time_s = time_s if mean is None else mean + (time_s - mean) / 32.0
        self._credit = min(self._credit + self._tuning.credit, 2.0)
        if ticket.number >= self._decrease_start:
            self._rejections_in_a_row = 0
            self._proven = max(self._proven, ticket.in_flight)
            if self._ceiling is not None and ticket.in_flight > self._ceiling:
                self._ceiling = None
        if work is not None:
            self._line.add(work, time_s)
        if ticket.first_byte:
            return
        if work is not None:
            self._evidence("sized", ticket, max(0.0, time_s - self._line.slope * work))
        else:
            self._evidence("whole", ticket, time_s)

    def _evidence(self, kind: str, ticket: Ticket, residual_s: float) -> None:
        if ticket.number < self._round_start:
            return
        values = self._lanes[kind].values
        values.append(residual_s)
        if len(values) >= max(self._tuning.round_least, self._tuning.round_share * self._limit):
            self._judge(self._lanes[kind])
            self._new_round()

    def _judge(self, lane: _Lane) -> None:
        now = self._now()
        level = low_quantile(lane.values)
        lane.baseline.add(now, level)
        base = lane.baseline.lowest(now)
        self._wait_s = level - base if base is not None else 0.0
        # Little's law: requests waiting = throughput x wait, and throughput = in flight / mean time.
        self._queue = self._limit * self._wait_s / max(self._mean_time_s or level, 1e-9)
        target = max(1.0, self._tuning.target_share * self._limit)
        if self._queue > 2.0 * target:
            self._set_limit(self._limit - min(self._queue - target, self._limit / 2.0))
            self._decreases += 1
            self._met_a_limit()
        elif self._queue > target:
            self._met_a_limit()
        elif self._round_used:
            self._grow()

    def _grow(self) -> None:
        step = self._limit if self._slow_start else self._step
        wanted = min(self._limit + step, self._maximum)
        if self._ceiling is not None and wanted > self._ceiling:
            if self._limit < self._ceiling:
                wanted = self._ceiling
            elif self._credit < 1.0:
                return
            else:
                wanted = self._ceiling + 1
        if wanted > self._limit:
            self._increases += 1
            self._set_limit(wanted)
        self._step = min(2.0 * self._step, self._limit)

    def _met_a_limit(self) -> None:
        self._slow_start = False
        self._step = 1.0

    def _new_round(self) -> None:
        self._round_start = self._next_number
        self._round_used = self._in_flight >= self.limit
        for lane in self._lanes.values():
            lane.values.clear()

    def _set_limit(self, limit: float) -> None:
        self._limit = min(max(limit, float(self._minimum)), float(self._maximum))
