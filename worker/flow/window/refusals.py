"""
What a refusal for lack of capacity says about the limit.

* Attempts that are under way together are refused together.  A refusal of an attempt that started before the last
  decrease is therefore not *fresh*: the decrease was the answer to it.  If the limit is still too high, the next
  attempt is refused as well, and the next decrease is larger.
* A decrease starts from the attempts that were under way, not from a limit that was not in use, but takes no more than
  about half of the limit.
* When an attempt above a number that was just served is refused, the limit goes back to that number and no further.
* Above a level that was refused, the limit grows only with *credit*, or after `PROBE_EVERY_S`.  Successful answers earn
  credit slowly, so the share of refusals is bounded however fast answers arrive.
* A refusal is about its message, not about the number, if an attempt that started later beside as many was accepted;
  beside more, if it was one above a number that was just served.  At the edge of the capacity such a step is refused or
  accepted by the chance of a millisecond, which tells nothing.  So the first refusal beside so few changes nothing yet,
  unless it is such a step; and while most are about messages, none changes anything.
* Refusals are often quicker than answers.  So as long as the limit met no congestion yet, a refusal is *in doubt* while
  attempts are under way that started later beside as many: the limit stays, and nothing starts, until one of them is
  accepted, all are refused, or `DOUBT_S` is over.
* If even an eighth of the limit was refused, the number of requests was not the cause.  As soon as one attempt is
  accepted again, the limit is what it was before.  If that proves wrong, the next refusal is one above a number that
  was served, and takes back one step.

Source: one decrease for each set of requests under way, and a decrease by share, are discussed in llm-d-async's
proposal of a feedback gate (https://github.com/llm-d/llm-d-async, proposal 379).
"""

from collections import deque

import msgspec

from worker.flow.clock import Now

KEEP = (0.9, 0.75, 0.5)
"""Share of the limit that the first, the second and every further refusal in a row leaves."""

CREDIT_PER_ANSWER = 0.0065
"""Share of one refusal that a successful answer earns: together with those of a falling capacity, less than 1 % of the
attempts are refused.  House decision, measured with `benchmarks/window.py`."""

PROBE_EVERY_S = 30.0
"""How often a refusal is risked without credit, seconds: where answers are rare, the limit must be able to rise too."""

SOON = 64
"""An attempt that starts within so many starts after a refused one is compared with it: the capacity is still the same.
House decision, measured with `benchmarks/mixed.py` and `benchmarks/window.py`, like those below."""
DOUBT_S = 0.5
"""Longest doubt, seconds; as for a breaker."""
UNSETTLED, SETTLED, LEAST_SETTLED = 8, 12, 4
"""Refusals of which it is not known yet whether they were about a message (`SOON` before the first congestion); of
which it is known; and of how many it has to be known before it is believed."""


class _Doubt(msgspec.Struct, frozen=True):
    """A refusal that may be about its message."""

    number: int
    in_flight: int
    ends_at: float
    is_step: bool
    """It was above a number that was just served."""
    fewest: int
    """Attempts beside the least of the refusals of which it is not known what they were about."""


class Refusals:
    """
    Remembers refusals and turns them into limits.

    Args:
        now: Monotonic seconds.
    """

    def __init__(self, now: Now) -> None:
        self._now = now
        self._decided_at_number = 0
        self._proven = 0
        self._ceiling: int | None = None
        self._credit = 1.0
        self._last_at = now()
        self._in_a_row = 0
        self._unsettled: list[tuple[int, int]] = []  # number and attempts under way
        self._settled: deque[bool] = deque(maxlen=SETTLED)  # whether they were about a message
        self._limit_before_row = 0.0
        self._is_general = False  # The row refused so few requests at once that their number was not the cause.
        self._under_way: dict[int, int] = {}  # attempts under way at the start of each, by its number
        self._doubt: _Doubt | None = None

    @property
    def is_in_doubt(self) -> bool:
        """Whether attempts under way are to tell what the last refusals were about."""
        return self._doubt is not None

    @property
    def doubt_ends_at(self) -> float | None:
        """Monotonic seconds; `None` when there is none."""
        return None if self._doubt is None else self._doubt.ends_at

    def started(self, number: int, in_flight: int) -> None:
        """Note the start of an attempt beside so many, itself included."""
        self._under_way[number] = in_flight

    def ended(self, number: int) -> None:
        """Note the end of an attempt, before what it says."""
        del self._under_way[number]

    def is_fresh(self, number: int) -> bool:
        """Whether a refusal of the attempt with this number would be news: it started after the last decrease."""
        return number >= self._decided_at_number

    def is_above_proven(self, in_flight: int) -> bool:
        """Whether attempts were served since the last decrease, but never so many at once."""
        return 0 < self._proven < in_flight

    def refused(
        self, number: int, in_flight: int, *, limit: float, next_number: int, warned: bool, is_searching: bool = False
    ) -> float | None:
        """
        Take a refusal into account.

        Args:
            number: Number of the refused attempt.
            in_flight: Attempts under way when it started, itself included.
            limit: The present limit.
            next_number: Number of the next attempt to start.
            warned: Requests waited in the backend before.  Then the wait is the better guide, and the refused level is
                not remembered.
            is_searching: The limit met no congestion yet.

        Returns:
            The new limit; `None` when the refusal is not fresh, in doubt, or about its message.
        """
        self._credit = max(self._credit - 1.0, 0.0)
        self._last_at = self._now()
        if not self.is_fresh(number):
            return None
        # Far below the limit the load of other clients was too much; this level says nothing about ours either.
        is_far_below = in_flight < limit / 2.0
        self._ceiling = None if warned or is_far_below else max(1, in_flight - 1)
        is_step = self.is_above_proven(in_flight)
        is_of_message = self._is_of_message(number, in_flight + is_step, is_searching=is_searching)
        if is_of_message and (not is_step or self.are_of_messages):
            return None
        if self._doubt is None:
            now = self._now()
            fewest = min(beside for _, beside in self._unsettled) if is_searching else in_flight
            self._doubt = _Doubt(number, in_flight, now + DOUBT_S if is_searching else now, is_step, fewest)
        return self.end_doubt(limit=limit, next_number=next_number)

    def end_doubt(self, *, limit: float, next_number: int) -> float | None:
        """
        Return the limit after refusals that were in doubt; `None` while they are.

        Args:
            limit: The present limit.
            next_number: Number of the next attempt to start.
        """
        doubt = self._doubt
        if doubt is None:
            return None
        if self._now() < doubt.ends_at and any(
            number > doubt.number and beside >= doubt.in_flight for number, beside in self._under_way.items()
        ):
            return None
        self.decreased(next_number)
        in_flight = doubt.in_flight
        if doubt.is_step:
            return min(limit, max(self._proven, in_flight - 1))
        if self._in_a_row == 0:
            self._limit_before_row, self._is_general = limit, False
        self._is_general |= doubt.fewest <= max(1.0, self._limit_before_row / 8.0)
        keep = KEEP[min(self._in_a_row, len(KEEP) - 1)]
        self._in_a_row += 1
        self._proven = 0
        return min(limit - 1.0, max(in_flight, limit / 2.0) * keep)

    def served(self) -> None:
        """Earn credit with a successful answer."""
        self._credit = min(self._credit + CREDIT_PER_ANSWER, 1.0)

    def accepted(self, number: int, in_flight: int, *, limit: float) -> float | None:
        """
        Take an attempt into account that was not refused, at the latest when it is answered.

        Returns:
            A limit to go back to, if this ends a row of refusals that the number of requests did not cause.
        """
        if self._unsettled:
            self._settle(number, in_flight)
        if not self.is_fresh(number):
            return None
        if self._doubt is not None and number > self._doubt.number and in_flight >= self._doubt.in_flight:
            self._doubt = None
        self._proven = max(self._proven, in_flight)
        if self._ceiling is not None and in_flight > self._ceiling:
            self._ceiling = None
        is_restored = self._in_a_row > 0 and self._is_general and self._limit_before_row > limit
        self._in_a_row = 0
        if not is_restored:
            return None
        self._ceiling = None
        return self._limit_before_row

    @property
    def are_of_messages(self) -> bool:
        """Whether the refusals of late were mostly about single messages, and not about how many there are."""
        return len(self._settled) >= LEAST_SETTLED and 4 * sum(self._settled) >= 3 * len(self._settled)

    def _is_of_message(self, number: int, in_flight: int, *, is_searching: bool) -> bool:
        """Say whether a refusal is about its message, as far as known; the first beside so few always may be."""
        is_first = all(each > in_flight for _, each in self._unsettled)
        if len(self._unsettled) >= (SOON if is_searching else UNSETTLED):
            del self._unsettled[0]
            self._settled.append(False)
        self._unsettled.append((number, in_flight))
        return is_first or self.are_of_messages

    def _settle(self, number: int, in_flight: int) -> None:
        """Settle earlier refusals beside no more than the attempts beside which a later one was accepted."""
        for refusal in [each for each in self._unsettled if each[0] < number]:
            is_soon = number - refusal[0] <= SOON
            if not is_soon or refusal[1] <= in_flight:
                self._unsettled.remove(refusal)
                self._settled.append(is_soon)

    def decreased(self, next_number: int) -> None:
        """Note a decrease, whatever its reason: attempts that started before it are no evidence about the new limit."""
        self._doubt = None
        self._decided_at_number = next_number

    def allowed(self, limit: float, wanted: float) -> float:
        """Return how far the limit may grow towards `wanted`; `limit` itself when growth has to wait for credit."""
        if self._ceiling is None or wanted <= self._ceiling or self.are_of_messages:
            return wanted
        if limit < self._ceiling:
            return float(self._ceiling)
        if self._credit < 1.0 and self._now() - self._last_at < PROBE_EVERY_S:
            return limit
        return float(self._ceiling + 1)
