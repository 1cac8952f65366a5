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
* If even an eighth of the limit was refused, the number of requests was not the cause.  As soon as one attempt is
  accepted again, the limit is what it was before.  If that proves wrong, the next refusal is one above a number that
  was served, and takes back one step.

Source: one decrease for each set of requests under way, and a decrease by share, are discussed in llm-d-async's
proposal of a feedback gate (https://github.com/llm-d/llm-d-async, proposal 379).
"""

from worker.flow.clock import Now

KEEP = (0.9, 0.75, 0.5)
"""Share of the limit that the first, the second and every further refusal in a row leaves."""

CREDIT_PER_ANSWER = 0.0065
"""Share of one refusal that a successful answer earns: together with those of a falling capacity, less than 1 % of the
attempts are refused.  House decision, measured with `benchmarks/window.py`."""

PROBE_EVERY_S = 30.0
"""How often a refusal is risked without credit, seconds: where answers are rare, the limit must be able to rise too."""


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
        self._limit_before_row = 0.0
        self._is_general = False  # The row refused so few requests at once that their number was not the cause.

    def is_fresh(self, number: int) -> bool:
        """Whether a refusal of the attempt with this number would be news: it started after the last decrease."""
        return number >= self._decided_at_number

    def is_above_proven(self, in_flight: int) -> bool:
        """Whether attempts were served since the last decrease, but never so many at once."""
        return 0 < self._proven < in_flight

    def refused(self, number: int, in_flight: int, *, limit: float, next_number: int, warned: bool) -> float | None:
        """
        Take a refusal into account.

        Args:
            number: Number of the refused attempt.
            in_flight: Attempts under way when it started, itself included.
            limit: The present limit.
            next_number: Number of the next attempt to start.
            warned: Requests waited in the backend before.  Then the wait is the better guide, and the refused level is
                not remembered.

        Returns:
            The new limit; `None` when the refusal is not fresh.
        """
        self._credit = max(self._credit - 1.0, 0.0)
        self._last_at = self._now()
        if not self.is_fresh(number):
            return None
        # Far below the limit the load of other clients was too much; this level says nothing about ours either.
        is_far_below = in_flight < limit / 2.0
        self._ceiling = None if warned or is_far_below else max(1, in_flight - 1)
        is_step = self.is_above_proven(in_flight)
        self.decreased(next_number)
        if is_step:
            return min(limit, max(self._proven, in_flight - 1))
        if self._in_a_row == 0:
            self._limit_before_row, self._is_general = limit, False
        self._is_general |= in_flight <= max(1.0, self._limit_before_row / 8.0)
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
        if not self.is_fresh(number):
            return None
        self._proven = max(self._proven, in_flight)
        if self._ceiling is not None and in_flight > self._ceiling:
            self._ceiling = None
        is_restored = self._in_a_row > 0 and self._is_general and self._limit_before_row > limit
        self._in_a_row = 0
        if not is_restored:
            return None
        self._ceiling = None
        return self._limit_before_row

    def decreased(self, next_number: int) -> None:
        """Note a decrease, whatever its reason: attempts that started before it are no evidence about the new limit."""
        self._decided_at_number = next_number

    def allowed(self, limit: float, wanted: float) -> float:
        """Return how far the limit may grow towards `wanted`; `limit` itself when growth has to wait for credit."""
        if self._ceiling is None or wanted <= self._ceiling:
            return wanted
        if limit < self._ceiling:
            return float(self._ceiling)
        if self._credit < 1.0 and self._now() - self._last_at < PROBE_EVERY_S:
            return limit
        return float(self._ceiling + 1)
