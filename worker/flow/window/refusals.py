"""
What a refusal for lack of capacity says about the limit.

* One decrease for each flight: a refusal of an attempt started before the last decrease belongs to the event that was
  answered already.  Whether many others of the flight were refused too changes nothing; if the limit is still too
  high, the next attempt tells, and the next decrease of the row is larger.  It starts from what was under way, not
  from a limit that was not in use, but takes no more than about half of the limit.
* A refusal of a step above what was just served takes back that step only.
* Above a level that was refused, more is asked for only with *credit*, or rarely.  Good answers earn it slowly, so the
  share of refusals is bounded however fast answers come.
* A row of refusals in which even an eighth of the limit was too much was no matter of how many: when it is over, the
  limit is what it was before.  If that proves wrong, the next refusal is one above what was served, and costs a step.

Source: one decrease for each flight, and decrease by share, are discussed in llm-d-async's proposal of a feedback gate
(https://github.com/llm-d/llm-d-async, proposal 379).
"""

from worker.flow.clock import Now
from worker.flow.window.types import WindowTuning


class Refusals:
    """Remembers refusals and turns them into limits."""

    def __init__(self, tuning: WindowTuning, now: Now) -> None:
        self._tuning = tuning
        self._now = now
        self._decided_at_number = 0
        self._proven = 0
        self._ceiling: int | None = None
        self._credit = 1.0
        self._last_at = now()
        self._row = 0
        self._before_row = 0.0
        self._meant_nothing = False

    def is_fresh(self, number: int) -> bool:
        """Whether a refusal of the attempt with this number would be news: it started after the last decrease."""
        return number >= self._decided_at_number

    def is_above_proven(self, in_flight: int) -> bool:
        """Whether so many at once is more than was served since the last decrease, and something was."""
        return 0 < self._proven < in_flight

    def refused(self, number: int, in_flight: int, *, limit: float, next_number: int, warned: bool) -> float | None:
        """
        Take a refusal into account.

        Args:
            number: Of the refused attempt.
            in_flight: Attempts under way when it started, itself included.
            limit: The present one.
            next_number: The next attempt's.
            warned: Waiting was seen before: then waiting is the better guide, and this level is no ceiling.

        Returns:
            The new limit; `None` when the refusal belongs to an event that was answered already.
        """
        self._credit = max(self._credit - 1.0, 0.0)
        self._last_at = self._now()
        if not self.is_fresh(number):
            return None
        # Far below the limit it is the load of others that was too much, and this level is no ceiling either.
        far_below = in_flight < limit / 2.0
        self._ceiling = None if warned or far_below else max(1, in_flight - 1)
        above = self.is_above_proven(in_flight)
        self.decided(next_number)
        if above:
            return min(limit, max(self._proven, in_flight - 1))
        if self._row == 0:
            self._before_row, self._meant_nothing = limit, False
        self._meant_nothing |= in_flight <= max(1.0, self._before_row / 8.0)
        keep = self._tuning.refused_keep[min(self._row, len(self._tuning.refused_keep) - 1)]
        self._row += 1
        self._proven = 0
        return min(limit - 1.0, max(in_flight, limit / 2.0) * keep)

    def served(self) -> None:
        """Earn credit with a good answer."""
        self._credit = min(self._credit + self._tuning.credit, 1.0)

    def accepted(self, number: int, in_flight: int, *, limit: float) -> float | None:
        """
        Take an attempt that was not refused into account, at the latest when it is answered.

        Returns:
            A limit to go back to, if this ends a row that was no matter of how many.
        """
        if number < self._decided_at_number:
            return None
        self._proven = max(self._proven, in_flight)
        if self._ceiling is not None and in_flight > self._ceiling:
            self._ceiling = None
        restore = self._row > 0 and self._meant_nothing and self._before_row > limit
        self._row = 0
        if not restore:
            return None
        self._ceiling = None
        return self._before_row

    def decided(self, next_number: int) -> None:
        """Note a decrease, whatever its reason: attempts started before it are no evidence against the new limit."""
        self._decided_at_number = next_number

    def permitted(self, limit: float, wanted: float) -> float:
        """Return how far growth may go; `limit` itself when it must wait for credit."""
        if self._ceiling is None or wanted <= self._ceiling:
            return wanted
        if limit < self._ceiling:
            return float(self._ceiling)
        if self._credit < 1.0 and self._now() - self._last_at < self._tuning.probe_every_s:
            return limit
        return float(self._ceiling + 1)
