"""
Whether a decrease was worth it: after two that neither shortened nor lengthened the wait, it was not our queue.

Then requests have become longer without a known size, prompts have, or the load is that of others.  To shrink further
would end at one request at a time, with the same wait; so the limit goes back and the present times are normal.
"""

SAME = (0.7, 1.3)
"""Wait after a decrease, of the wait before it, that counts as unchanged.  A decrease aims at well below a third of it;
more than before means a backlog that is still growing, which says nothing about the decrease."""

PATIENCE = 2
"""Decreases in a row that must go unrewarded: one may be bad luck of a quarter flight."""


class Reward:
    """Remembers what a row of decreases was made for."""

    def __init__(self) -> None:
        self._expected: tuple[float, float] | None = None
        self._in_vain = 0

    def shrunk(self, wait_s: float, limit: float) -> None:
        """Remember the wait and the limit before the first decrease of a row."""
        if self._expected is None:
            self._expected = (wait_s, limit)

    def forget(self) -> None:
        """The limit was changed for another reason: the row is over."""
        self._expected, self._in_vain = None, 0

    def judged(self, wait_s: float) -> float | None:
        """Take the wait of the round after a decrease; return the limit to go back to, if decreasing was in vain."""
        if self._expected is None:
            return None
        before_s, limit = self._expected
        if not SAME[0] * before_s <= wait_s <= SAME[1] * before_s:
            self.forget()
            return None
        self._in_vain += 1
        if self._in_vain < PATIENCE:
            return None
        self.forget()
        return limit
