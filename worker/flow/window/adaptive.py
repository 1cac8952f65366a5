"""
The rule of the adaptive window: when the limit grows, stays, shrinks.

Theory of operation.  Every start takes a `Ticket` with a number that only grows.  Ends are judged in *rounds*: a round
ends when enough attempts that **started in it** have been answered, so that no decision is judged by attempts that were
under way before it.  There are no fixed times between decisions: in one second, many short requests end and a small
part of a long one.

* **Waiting** (`latency`) is the share of the window that stands in the backend's queue.  Below `GROW_BELOW` the limit
  grows; above `SHRINK_ABOVE` it falls to the requests that really run plus `TARGET`.
* **Growth** doubles the limit until the first sign of congestion, and afterwards adds 1.  While growth meets no
  congestion the steps become larger again, so that returned capacity is found.  A limit not in use never grows.
* **Probing down**: a queue that never empties hides the response time without a queue.  From time to time the limit is
  lowered for one round, and the other rounds are compared with the times of that round.
* Decreases after which requests wait as long as before are undone (`DecreaseCheck`).  What a refusal means is in
  `refusals`, and how a limit takes effect over time in `ramped_limit`.

Failures that are no sign of overload change nothing: a backend that is down is left to the breaker.
The constants are house decisions, made with `benchmarks/window.py`; each may be off by half and the targets are still
met.
"""

import math
from enum import StrEnum

import msgspec

from worker.flow.clock import Now
from worker.flow.window.latency import Kind, LatencyMeter, OverdueFirstBytes, Reading
from worker.flow.window.ramped_limit import RampedLimit
from worker.flow.window.refusals import Refusals

GROW_BELOW = 0.10
"""Share of the window that waits in the backend, below which the limit grows; at least one request."""
TARGET = 0.15
"""Share that still waits after a decrease: the backend never runs dry between an answer and the next request."""
SHRINK_ABOVE = 0.25
"""Share that waits, above which the limit shrinks; at least two requests.  Below is the noise of a quarter window."""
STRONG = 0.50
"""Share that waits, for which `STRONG_EVERY` answers are enough to shrink."""
STRONG_EVERY = 8
"""After every so many answers a round is examined for `STRONG`."""
LEAST_KEEP = 0.25
"""Share of the limit that one decrease leaves at least, whatever was measured."""
GROWTH = (1.0, 1.5, 2.0)
"""Factors of growth, by how many steps in a row met no congestion; each step adds at least 1.  Slow start takes the
last factor."""
ROUND_SHARE = 0.25
"""Answers that let the limit grow, as a share of it; twice as many are needed to stay or to shrink."""
ROUND_LEAST = 4
"""At least so many answers make a round; fewer only where the limit is lower."""
WHOLE_ROUNDS_BELOW_S = 3.0
"""Mean time of an answer above which growth no longer waits for whole rounds, unless first bytes are reported.  Five
steps of growth that each wait for such an answer take longer than the ten seconds in which a change is to be found."""
PROBE_DEPTH = 0.10
"""How far below the measured queue the limit probes down, as a share of the limit."""
PROBE_DOWN_EVERY_S = 20.0
"""How often it probes down, seconds; ten times the mean time of an answer when that is longer."""
RAMP_S = 1.0
"""Longest time over which growth takes effect, seconds; half the mean time of an answer when that is shorter."""

FIRST_PAUSE_S = 2.0
"""Longest first pause for a Retry-After, seconds.  When it is over a few attempts may start; each further pause with
nothing served since may be twice as long, so that a wrong hint is found out soon and a true one costs few calls."""
MAX_DOUBLINGS = 10

SAME_WAIT = (0.7, 1.3)
"""Wait after a decrease, as a share of the wait before it, that counts as unchanged.  A decrease aims at far less than
a third of the wait; a longer wait means a queue that is still growing, which says nothing about the decrease."""
INEFFECTIVE_DECREASES = 2
"""So many decreases in a row have to be ineffective: one may be the chance of a quarter window."""


class Outcome(StrEnum):
    """How an attempt ended, as far as capacity is concerned."""

    OK = "ok"
    """Served."""
    OVERLOAD = "overload"
    """Refused for lack of capacity."""
    NEUTRAL = "neutral"
    """Anything else; says nothing about capacity."""


class Ticket(msgspec.Struct, eq=False):
    """One attempt under way; made by `AdaptiveWindow.start`, ended by `finish`."""

    number: int
    started_at: float
    in_flight: int
    """Attempts under way at its start, itself included."""
    first_byte_s: float | None = None
    """Seconds from its start to its first byte; `None` until that is reported."""
    finished: bool = False


class WindowStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """A window at one instant."""

    limit: int
    """Attempts that may run at once now."""
    in_flight: int
    minimum: int
    maximum: int
    closed_until: float | None
    """Monotonic seconds until which nothing starts (Retry-After); `None` while open."""
    slow_start: bool
    """The limit still doubles: it met no congestion yet."""
    waiting_share: float
    """Share of the window that waited in the backend in the last judged round, 0 to 1."""
    wait_s: float
    """How long requests waited in it, seconds."""
    served: int
    rejected: int
    increases: int
    decreases: int


class AdaptiveWindow:
    """
    Decides whether one more request may run; finds the backend's capacity by itself.

    Args:
        initial: The first limit.
        minimum: The limit never falls below it; at least 1, so that an attempt can show when capacity is back.
        maximum: The limit never rises above it.
        now: Monotonic seconds.
    """

    def __init__(self, initial: int = 8, minimum: int = 1, maximum: int = 64, *, now: Now) -> None:
        self._now = now
        self._limit = RampedLimit(initial, minimum, maximum, now=now)
        self._meter = LatencyMeter(now)
        self._overdue = OverdueFirstBytes()
        self._refusals = Refusals(now)
        self._decrease_check = DecreaseCheck()
        self._in_flight = self._next_number = 0
        self._slow_start, self._free_steps = True, 0
        self._was_slow_start = False  # before the present row of refusals
        self._round_start = self._round_opened = 0
        self._round_used = False
        self._clean_at = now()
        self._usual_share, self._streams = 0.0, False
        self._check_overdue_in = 0
        self._wanted_pause_s = 0.0  # for a Retry-After that is in doubt
        self._pauses, self._paused_by = 0, -1  # pauses since an attempt was accepted, and the refusal behind the last
        self._share = self._wait_s = 0.0
        self._served = self._rejected = self._increases = self._decreases = 0

    @property
    def limit(self) -> int:
        """Attempts that may run at once now."""
        return self._limit.current()

    @property
    def in_flight(self) -> int:
        """Attempts under way."""
        return self._in_flight

    @property
    def is_paused(self) -> bool:
        """Whether a pause keeps everything back now."""
        return self._limit.closed_until is not None

    @property
    def pauses(self) -> int:
        """Pauses since an attempt was accepted last."""
        return self._pauses

    def has_room(self) -> bool:
        """Whether one more attempt may start now."""
        return self._in_doubt_until() is None and self._limit.has_room(self._in_flight)

    def opens_at(self) -> float | None:
        """
        Return the instant from which one more attempt may start because time has passed.

        A pause or a doubt ends then, or growth takes effect.  `None` when one may start now, or when only the end of
        another attempt makes room.
        """
        doubt_ends_at = self._in_doubt_until()
        return self._limit.opens_at(self._in_flight) if doubt_ends_at is None else doubt_ends_at

    def start(self, *, streamed: bool = False) -> Ticket:
        """
        Count one attempt in.  The caller asks `has_room` first, except for a breaker's probe, which needs no room.

        Args:
            streamed: `first_byte` will be called for it.  Only then does a missing first byte mean that it waits.
        """
        self._in_flight += 1
        ticket = Ticket(self._next_number, self._now(), self._in_flight)
        self._next_number += 1
        self._refusals.started(ticket.number, ticket.in_flight)
        if streamed:
            self._overdue.begin(ticket.number, ticket.started_at)
        if not self._round_used and self._in_flight >= (self.limit if self._slow_start else self._limit.after_ramp()):
            if not self._slow_start and self._round_start >= self._round_opened:
                # Attempts that started before the window was full say nothing about a full one.
                self._new_round(clean=False)
                self._round_start = ticket.number
            self._round_used = True
        return ticket

    def first_byte(self, ticket: Ticket) -> None:
        """Report that a successful answer has begun: the best measurement of waiting.  Idempotent."""
        if ticket.first_byte_s is None and not ticket.finished:
            self._overdue.came(ticket.number)
            ticket.first_byte_s = self._now() - ticket.started_at
            self._accepted(ticket)
            if ticket.number >= self._round_start:
                self._meter.first_byte(ticket.first_byte_s)
            self._learn()

    def is_refusal_fresh(self, ticket: Ticket) -> bool:
        """Return whether a refusal of this attempt would be news: it started after the last decrease."""
        return self._refusals.is_fresh(ticket.number) and not self._refusals.is_in_doubt

    def finish(
        self, ticket: Ticket, outcome: Outcome, *, work: float | None = None, pause_s: float | None = None
    ) -> None:
        """
        Count one attempt out and learn from its end.

        Args:
            ticket: The value that `start` returned.
            outcome: Served, refused for lack of capacity, or neither.
            work: Size of the answer in any constant unit, for example output tokens; `None` when unknown.
            pause_s: With an `OVERLOAD`, how long nothing starts, seconds; less as long as it is the first pause of a
                row (`FIRST_PAUSE_S`).  Ignored when the refused attempt was only a step above a number that was just
                served: that many may still run.

        Raises:
            RuntimeError: The ticket was finished before; an error of the caller.
        """
        if ticket.finished:
            raise RuntimeError("the ticket is finished already")
        ticket.finished = True
        self._overdue.end(ticket.number)
        self._refusals.ended(ticket.number)
        self._in_flight -= 1
        if outcome is Outcome.OVERLOAD:
            self._refused(ticket, pause_s)
        elif outcome is Outcome.OK:
            self._answered(ticket, work)

    def reopen(self) -> None:
        """Ramp the limit up from the attempts under way: a breaker, which kept all others back, has closed."""
        self._limit.ramp_up(self._in_flight, self._ramp_s())

    def statistics(self) -> WindowStatistics:
        """Return a snapshot."""
        return WindowStatistics(
            limit=self.limit,
            in_flight=self._in_flight,
            minimum=self._limit.minimum,
            maximum=self._limit.maximum,
            closed_until=self._limit.closed_until,
            slow_start=self._slow_start,
            waiting_share=self._share,
            wait_s=self._wait_s,
            served=self._served,
            rejected=self._rejected,
            increases=self._increases,
            decreases=self._decreases,
        )

    def _refused(self, ticket: Ticket, pause_s: float | None) -> None:
        self._rejected += 1
        is_step = self._refusals.is_above_proven(ticket.in_flight)
        limit = self._refusals.refused(
            ticket.number,
            ticket.in_flight,
            limit=self._limit.target,
            next_number=self._next_number,
            warned=self._usual_share > GROW_BELOW / 2.0,
            is_searching=self._slow_start,
        )
        if pause_s is not None and not is_step:
            self._wanted_pause_s = max(self._wanted_pause_s, pause_s)
            self._paused_by = ticket.number
        self._apply_refusals(limit)

    def _in_doubt_until(self) -> float | None:
        """Return when a doubt ends; one whose time is over ends now.  `None`: there is none."""
        if self._refusals.is_in_doubt:
            self._end_doubt()
        return self._refusals.doubt_ends_at

    def _end_doubt(self) -> None:
        self._apply_refusals(self._refusals.end_doubt(limit=self._limit.target, next_number=self._next_number))

    def _apply_refusals(self, limit: float | None) -> None:
        """Decrease to a limit if there is one, and pause unless a doubt keeps that back."""
        if limit is not None:
            self._decrease_check.reset()
            self._was_slow_start |= self._slow_start
            self._decrease(limit)
            self._new_round(clean=False)
        if self._wanted_pause_s > 0.0 and not self._refusals.is_in_doubt:
            if not self.is_paused:
                longest_s = FIRST_PAUSE_S * 2.0 ** min(self._pauses, MAX_DOUBLINGS)
                self._limit.close(self._now() + min(self._wanted_pause_s, longest_s))
                self._limit.ramp_up(0.0, self._ramp_s() or RAMP_S)
                self._pauses += 1
            self._wanted_pause_s = 0.0

    def _answered(self, ticket: Ticket, work: float | None) -> None:
        self._served += 1
        self._refusals.served()
        self._accepted(ticket)
        in_round = ticket.number >= self._round_start and ticket.first_byte_s is None
        self._meter.answered(self._now() - ticket.started_at, work, in_round=in_round)
        self._learn()

    def _accepted(self, ticket: Ticket) -> None:
        self._pauses, self._wanted_pause_s = 0, 0.0
        if self.is_paused and ticket.number > self._paused_by:
            self._limit.end_pause()  # one that started later was accepted: the hint was about a message
        restored = self._refusals.accepted(ticket.number, ticket.in_flight, limit=self._limit.target)
        if restored is not None:
            self._slow_start = self._was_slow_start
            self._increase(restored)
        if self._refusals.is_fresh(ticket.number):
            self._was_slow_start = False

    def _learn(self) -> None:
        """End the round if it can be judged."""
        self._check_overdue()
        reading = self._reading()
        if reading is None:
            return
        self._share, self._wait_s = reading.share, reading.wait_s
        self._streams = reading.kind is Kind.FIRST_BYTE
        self._usual_share += (reading.share - self._usual_share) / 4.0
        clean = self._limit.is_probing_down and reading.share <= SHRINK_ABOVE
        self._limit.probe_down(0.0)
        if not clean:
            limit = self._decrease_check.judge(reading.wait_s)
            if limit is None:
                clean = self._judge(reading)
            else:
                self._meter.rebase()
                self._increase(limit)
        self._new_round(clean=clean)

    def _check_overdue(self) -> None:
        """Shrink when the first bytes of too many attempts are overdue."""
        self._check_overdue_in -= 1
        # While more are under way than the limit, the last decrease has not taken effect.
        if self._check_overdue_in > 0 or not self._overdue or self._in_flight > self.limit:
            return
        self._check_overdue_in = int(self._limit.target / 8.0)
        usual_s = self._meter.usual_first_byte_s()
        share = 0.0 if usual_s is None else self._overdue.share(self._now(), usual_s, self._in_flight)
        if share > SHRINK_ABOVE:
            self._share = share
            self._shrink(share)
            self._new_round(clean=False)

    def _reading(self) -> Reading | None:
        """Read the round if it has enough answers for what it says: most to stay or to shrink, few if many wait."""
        collected = self._meter.collected()
        needed = math.ceil(max(min(ROUND_LEAST, self.limit), ROUND_SHARE * self._limit.target))
        # Reading sorts, so it is done at these few counts only.
        if collected == 0 or not (collected == needed or collected >= 2 * needed or collected % STRONG_EVERY == 0):
            return None
        reading = self._meter.read()
        enough = needed if self._slow_start or reading.share <= self._free_share() else 2 * needed
        return reading if collected >= enough or reading.share >= STRONG else None

    def _judge(self, reading: Reading) -> bool:
        """Grow, stay or shrink; return whether the round was certainly free of waiting."""
        share = reading.share
        if share > max(SHRINK_ABOVE, 2.0 / self._limit.target):
            self._decrease_check.decreased(reading.wait_s, self._limit.target)
            self._shrink(share)
            return False
        if share > self._free_share():
            self._slow_start, self._free_steps = False, 0
        elif self._round_used:
            self._grow()
        if self._slow_start:
            return True
        is_due = self._now() - self._clean_at > max(PROBE_DOWN_EVERY_S, 10.0 * self._meter.service_s)
        if self._free_steps == 0 and is_due:
            self._limit.probe_down(self._limit.target * (PROBE_DEPTH + share))
        return False

    def _free_share(self) -> float:
        return max(GROW_BELOW, 1.0 / self._limit.target)

    def _shrink(self, share: float) -> None:
        keep = (1.0 - share) / (1.0 - TARGET)
        self._refusals.decreased(self._next_number)
        self._decrease(self._limit.target * max(LEAST_KEEP, keep))

    def _grow(self) -> None:
        limit = self._limit.target
        factor = GROWTH[-1] if self._slow_start else GROWTH[min(self._free_steps, len(GROWTH) - 1)]
        allowed = self._refusals.allowed(limit, max(limit + 1.0, limit * factor))
        if allowed > limit:
            self._free_steps += 1
            self._increase(allowed)

    def _increase(self, limit: float) -> None:
        self._increases += self._limit.grow(limit, self._ramp_s())

    def _decrease(self, limit: float) -> None:
        self._slow_start, self._free_steps = False, 0
        self._decreases += 1
        self._limit.set(limit)

    def _ramp_s(self) -> float:
        return min(RAMP_S, self._meter.service_s / 2.0)

    def _new_round(self, *, clean: bool) -> None:
        # Rounds of long requests are so long that a growing window also listens to attempts of the round before.  Its
        # steps are then judged one step late; one step too many costs less than the seconds.
        hears_last_round = self._free_steps > 0 and not self._streams and self._meter.service_s > WHOLE_ROUNDS_BELOW_S
        self._round_start = self._round_opened if hears_last_round else self._next_number
        self._round_opened = self._next_number
        self._round_used = self._in_flight >= self.limit
        if clean:
            self._clean_at = self._now()
        self._meter.end_round(clean=clean)


class DecreaseCheck:
    """
    Finds out that decreases were ineffective: requests wait as long as before, so the window did not cause the wait.

    The requests or their prompts have become longer without a known size, or other clients load the backend.  Further
    decreases would end at one request at a time with the same wait.  So the limit goes back to what it was, and the
    present times become the normal ones.
    """

    def __init__(self) -> None:
        self._before: tuple[float, float] | None = None
        self._ineffective = 0

    def decreased(self, wait_s: float, limit: float) -> None:
        """Remember the wait and the limit before the first decrease of a row."""
        if self._before is None:
            self._before = (wait_s, limit)

    def reset(self) -> None:
        """End the row: the limit was changed for another reason."""
        self._before, self._ineffective = None, 0

    def judge(self, wait_s: float) -> float | None:
        """Take the wait of the round after a decrease; return the limit to go back to if the row was ineffective."""
        if self._before is None:
            return None
        before_s, limit = self._before
        if not SAME_WAIT[0] * before_s <= wait_s <= SAME_WAIT[1] * before_s:
            self.reset()
            return None
        self._ineffective += 1
        if self._ineffective < INEFFECTIVE_DECREASES:
            return None
        self.reset()
        return limit
