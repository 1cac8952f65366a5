"""
The adaptive window: how many requests may run at once against one backend, found from how the last ones ended.

Theory of operation.  Every start takes a `Ticket` with a number that only grows.  Ends are judged in *rounds*: a round
is over when enough attempts **started in it** have told something, so that a decision is never judged by attempts that
were under way before it.  There are no wall-clock cool-downs: a second is many flights of short requests and a
fraction of a long one.

* **Waiting** (`latency`, `silence`) is the share of the window that stands in the backend's queue.  Below `grow_below`
  the window grows, above `shrink_above` it falls to what runs plus a small target.
* **Growth** doubles until the first sign of a limit; then by 1, and faster while growth after growth meets no limit,
  which is how capacity that came back is found.  A window that is not in use never grows.
* **Dips**: a queue that never empties hides the time without it, so now and then the window drops below it for one
  round, whose times are what the others are compared with.
* Decreases after which nobody waits less are taken back (`reward`); what a refusal says is in `refusals`, how a limit
  takes effect in time in `room`.

Failures that are no sign of overload change nothing: a dead backend is the breaker's affair.
`docs/adaptive-window.md` has the reasoning, the rejected alternatives and the measurements.
"""

import math

from worker.flow.clock import Now
from worker.flow.window.latency import Kind, LatencyMeter, Reading
from worker.flow.window.refusals import Refusals
from worker.flow.window.reward import Reward
from worker.flow.window.room import Room
from worker.flow.window.silence import Silence
from worker.flow.window.types import Outcome, Ticket, WindowStatistics, WindowTuning

STRONG_EVERY = 8
"""After every so many answers a round is looked at for `WindowTuning.strong` waiting."""


class AdaptiveWindow:
    """
    Decides whether one more request may run; finds the backend's capacity by itself.

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
        self._now = now
        self._tuning = tuning or WindowTuning()
        self._room = Room(initial, minimum, maximum, now=now)
        self._meter = LatencyMeter(now)
        self._refusals = Refusals(self._tuning, now)
        self._in_flight = self._next_number = 0
        self._slow_start, self._streak = True, 0
        self._round_start = self._round_opened = 0
        self._round_used = False
        self._clean_at = now()
        self._usual_share, self._streams = 0.0, False
        self._reward = Reward()
        self._silence = Silence()
        self._listen_in = 0
        self._share = self._wait_s = 0.0
        self._served = self._rejected = self._increases = self._decreases = 0

    @property
    def limit(self) -> int:
        """Attempts that may run at once now."""
        return self._room.current()

    @property
    def in_flight(self) -> int:
        """Attempts under way."""
        return self._in_flight

    def has_room(self) -> bool:
        """Whether one more attempt may start now."""
        return self._room.has_room(self._in_flight)

    def opens_at(self) -> float | None:
        """Return when room appears by itself (a Retry-After ends, growth is poured out); `None` when it does not."""
        return self._room.opens_at(self._in_flight)

    def start(self, *, streamed: bool = False) -> Ticket:
        """
        Count one attempt in.  It is the caller who asks `has_room`: a breaker's probe may start without.

        Args:
            streamed: `first_byte` will be called for it.  Only then does its silence say that it waits.
        """
        self._in_flight += 1
        ticket = Ticket(self._next_number, self._now(), self._in_flight)
        self._next_number += 1
        if streamed:
            self._silence.begin(ticket.number, ticket.started_at)
        if not self._round_used and self._in_flight >= (self.limit if self._slow_start else self._room.final()):
            if not self._slow_start and self._round_start >= self._round_opened:
                # What started before the window was full says nothing about a full one.
                self._new_round(clean=False)
                self._round_start = ticket.number
            self._round_used = True
        return ticket

    def first_byte(self, ticket: Ticket) -> None:
        """Report that a good answer has begun; the best signal of waiting.  Idempotent."""
        if ticket.first_byte_s is None and not ticket.finished:
            self._silence.end(ticket.number)
            ticket.first_byte_s = self._now() - ticket.started_at
            self._accepted(ticket)
            if ticket.number >= self._round_start:
                self._meter.first_byte(ticket.first_byte_s)
            self._learn()

    def is_refusal_fresh(self, ticket: Ticket) -> bool:
        """Return whether a refusal of this attempt would be news: it started after the last decrease."""
        return self._refusals.is_fresh(ticket.number)

    def finish(
        self, ticket: Ticket, outcome: Outcome, *, work: float | None = None, pause_s: float | None = None
    ) -> None:
        """
        Count one attempt out and learn from its end.

        Args:
            ticket: What `start` gave.
            outcome: Served, refused for lack of capacity, or neither.
            work: Size of the answer in any constant unit, for example output tokens; `None` when unknown.
            pause_s: With an `OVERLOAD`, how long nothing starts, seconds.  Ignored when the refused attempt was only a
                step above a number that was just served: those go on.

        Raises:
            RuntimeError: The ticket was finished before; an error of the caller.
        """
        if ticket.finished:
            raise RuntimeError("the ticket is finished already")
        ticket.finished = True
        self._silence.end(ticket.number)
        self._in_flight -= 1
        if outcome is Outcome.OVERLOAD:
            self._refused(ticket, pause_s)
        elif outcome is Outcome.OK:
            self._answered(ticket, work)

    def reopen(self) -> None:
        """Pour the window out anew instead of all at once: what kept everyone back (a breaker) is over."""
        self._room.pour(self._in_flight, self._pour_s())

    def set_bounds(self, minimum: int, maximum: int) -> None:
        """Change the bounds in place; attempts under way go on."""
        self._room.set_bounds(minimum, maximum)

    def statistics(self) -> WindowStatistics:
        """Return a snapshot."""
        return WindowStatistics(
            limit=self.limit,
            in_flight=self._in_flight,
            minimum=self._room.minimum,
            maximum=self._room.maximum,
            closed_until=self._room.closed_until,
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
        closes = not self._refusals.is_above_proven(ticket.in_flight)
        limit = self._refusals.refused(
            ticket.number,
            ticket.in_flight,
            limit=self._room.limit,
            next_number=self._next_number,
            warned=self._usual_share > self._tuning.grow_below / 2.0,
        )
        if limit is not None:
            self._reward.forget()
            self._decrease(limit)
            self._new_round(clean=False)
        if pause_s is not None and closes:
            self._room.close(self._now() + pause_s)
            self._room.pour(0.0, self._pour_s())

    def _answered(self, ticket: Ticket, work: float | None) -> None:
        self._served += 1
        self._refusals.served()
        self._accepted(ticket)
        in_round = ticket.number >= self._round_start and ticket.first_byte_s is None
        self._meter.answered(self._now() - ticket.started_at, work, in_round=in_round)
        self._learn()

    def _accepted(self, ticket: Ticket) -> None:
        restored = self._refusals.accepted(ticket.number, ticket.in_flight, limit=self._room.limit)
        if restored is not None:
            self._increase(restored)

    def _learn(self) -> None:
        """End the round if it can be judged."""
        self._listen()
        reading = self._reading()
        if reading is None:
            return
        self._share, self._wait_s = reading.share, reading.wait_s
        self._streams = reading.kind is Kind.FIRST_BYTE
        self._usual_share += (reading.share - self._usual_share) / 4.0
        clean = self._room.dipped and reading.share <= self._tuning.shrink_above
        self._room.dip(0.0)
        if not clean:
            limit = self._reward.judged(reading.wait_s)
            if limit is None:
                clean = self._judge(reading)
            else:
                self._meter.rebase()
                self._increase(limit)
        self._new_round(clean=clean)

    def _listen(self) -> None:
        """Shrink when too many of those under way have not begun to answer though they should have long ago."""
        self._listen_in -= 1
        # While more are under way than the limit, the last decrease has not taken effect.
        if self._listen_in > 0 or not self._silence or self._in_flight > self.limit:
            return
        self._listen_in = int(self._room.limit / 8.0)
        usual_s = self._meter.usual_first_byte_s()
        share = 0.0 if usual_s is None else self._silence.share(self._now(), usual_s, self._in_flight)
        if share > self._tuning.shrink_above:
            self._share = share
            self._shrink(share)
            self._new_round(clean=False)

    def _reading(self) -> Reading | None:
        """Read the round when it has enough: a quarter flight to grow, half to stay or shrink, little for a lot."""
        tuning, collected = self._tuning, self._meter.collected()
        needed = math.ceil(max(min(tuning.round_least, self.limit), tuning.round_share * self._room.limit))
        # Reading sorts, so it is done at these few counts only.
        if collected == 0 or not (collected == needed or collected >= 2 * needed or collected % STRONG_EVERY == 0):
            return None
        reading = self._meter.read()
        enough = needed if self._slow_start or reading.share <= self._free_share() else 2 * needed
        return reading if collected >= enough or reading.share >= tuning.strong else None

    def _judge(self, reading: Reading) -> bool:
        """Grow, stay or shrink; return whether the round was free of waiting for certain."""
        share, tuning = reading.share, self._tuning
        if share > max(tuning.shrink_above, 2.0 / self._room.limit):
            self._reward.shrunk(reading.wait_s, self._room.limit)
            self._shrink(share)
            return False
        if share > self._free_share():
            self._slow_start, self._streak = False, 0
        elif self._round_used:
            self._grow()
        if self._slow_start:
            return True
        if self._streak == 0 and self._now() - self._clean_at > max(tuning.dip_every_s, 10.0 * self._meter.service_s):
            self._room.dip(self._room.limit * (tuning.dip + share))
        return False

    def _free_share(self) -> float:
        return max(self._tuning.grow_below, 1.0 / self._room.limit)

    def _shrink(self, share: float) -> None:
        keep = (1.0 - share) / (1.0 - self._tuning.target)
        self._refusals.decided(self._next_number)
        self._decrease(self._room.limit * max(self._tuning.least_keep, keep))

    def _grow(self) -> None:
        growth, limit = self._tuning.growth, self._room.limit
        factor = growth[-1] if self._slow_start else growth[min(self._streak, len(growth) - 1)]
        permitted = self._refusals.permitted(limit, max(limit + 1.0, limit * factor))
        if permitted > limit:
            self._streak += 1
            self._increase(permitted)

    def _increase(self, limit: float) -> None:
        self._increases += self._room.grow(limit, self._pour_s())

    def _decrease(self, limit: float) -> None:
        self._slow_start, self._streak = False, 0
        self._decreases += 1
        self._room.set(limit)

    def _pour_s(self) -> float:
        return min(self._tuning.pour_s, self._meter.service_s / 2.0)

    def _new_round(self, *, clean: bool) -> None:
        # Rounds of long requests are so long that a growing window also hears those who started in the last round.
        # That is one step late; a step too many costs less than the seconds.
        patient = self._streak > 0 and not self._streams and self._meter.service_s > self._tuning.patience_s
        self._round_start = self._round_opened if patient else self._next_number
        self._round_opened = self._next_number
        self._round_used = self._in_flight >= self.limit
        if clean:
            self._clean_at = self._now()
        self._meter.end_round(clean=clean)
