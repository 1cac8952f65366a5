"""
Which share of the recent answers are errors of one class.

A million messages behind a bad deployment would be answered with a million errors, each of them correct.  The share
shows that after a few hundred, and `policy.error_limit` may pause the intake then.

Answers are counted in the buckets of a sliding window, so memory is bounded by buckets x classes, not by answers.
Source: the limit on dead-lettering of Sentry's Arroyo, applied to error answers.
"""

from collections import Counter, deque

import msgspec

from worker.flow.clock import Now

BUCKETS = 30
"""House decision: the window slides in steps of a thirtieth, so an answer counts at most 3.4 % of it too long."""


class DominantError(msgspec.Struct, frozen=True):
    """The most frequent error class of the window."""

    error_class: str
    share: float
    """Of all answers, good ones included; 0 to 1."""
    count: int
    """Answers of this class."""


class ErrorShare:
    """
    Counts answers by error class over a sliding window.

    Args:
        window_s: Length of the window, seconds.
        now: Monotonic seconds.
    """

    def __init__(self, window_s: float = 300.0, *, now: Now) -> None:
        if window_s <= 0:
            raise ValueError("window_s must be positive")
        self._width_s = window_s / BUCKETS
        self._now = now
        self._buckets: deque[tuple[int, Counter[str | None]]] = deque()
        self._totals: Counter[str | None] = Counter()

    def add(self, error_class: str | None) -> None:
        """Count one answer; `None` is a good one."""
        index = self._expire()
        if not self._buckets or self._buckets[-1][0] != index:
            self._buckets.append((index, Counter()))
        self._buckets[-1][1][error_class] += 1
        self._totals[error_class] += 1

    @property
    def answers(self) -> int:
        """Answers in the window, good ones included."""
        self._expire()
        return self._totals.total()

    def dominant(self) -> DominantError | None:
        """Return the most frequent error class, the first by name among equals; `None` without any error."""
        self._expire()
        errors = [(count, name) for name, count in self._totals.items() if name is not None]
        if not errors:
            return None
        count, name = min(errors, key=lambda each: (-each[0], each[1]))
        return DominantError(name, count / self._totals.total(), count)

    def _expire(self) -> int:
        """Drop what is too old; return the current bucket's index."""
        index = int(self._now() // self._width_s)
        while self._buckets and self._buckets[0][0] <= index - BUCKETS:
            self._totals -= self._buckets.popleft()[1]
        return index
