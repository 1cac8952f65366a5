"""
How much of what was answered lately is an error of one class.

A queue of a million messages behind a bad deploy would be answered with a million errors, each of them correct.  The
meter makes that visible while it is hundreds, and lets an operator set a limit at which the pull pauses instead.

Answers are counted in buckets of a sliding time, so memory is bounded by buckets x classes, not by answers.
Source: the limit on dead-lettering of Sentry's Arroyo, applied to error answers.
"""

from collections import Counter, deque
from dataclasses import dataclass

from worker.flow.clock import Now

BUCKETS = 30
"""House decision: the sliding time moves in steps of a thirtieth, so a share is at most 3.4 % of its time late."""


@dataclass(frozen=True, slots=True)
class Damage:
    """The error class most answers of the sliding time have."""

    error_class: str
    share: float
    """Of all answers, good ones included; 0 to 1."""
    count: int
    """Answers of this class."""


class DamageMeter:
    """
    Counts answers by error class over a sliding time.

    Args:
        horizon_s: Length of the sliding time, seconds.
        now: Monotonic seconds.
    """

    def __init__(self, horizon_s: float = 300.0, *, now: Now) -> None:
        if horizon_s <= 0:
            raise ValueError("horizon_s must be positive")
        self._width_s = horizon_s / BUCKETS
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
        """Answers of the sliding time, good ones included."""
        self._expire()
        return self._totals.total()

    def dominant(self) -> Damage | None:
        """Return the most frequent error class, the first by name among equals; `None` without any error."""
        self._expire()
        errors = [(count, name) for name, count in self._totals.items() if name is not None]
        if not errors:
            return None
        count, name = min(errors, key=lambda each: (-each[0], each[1]))
        return Damage(name, count / self._totals.total(), count)

    def exceeds(self, limit_share: float, min_count: int) -> bool:
        """
        Whether one class makes up more than its share.

        Args:
            limit_share: Share of all answers that is still borne, 0 to 1; exactly this much is not more.
            min_count: Errors of the class below which nothing is concluded: two of two are no trend.
        """
        damage = self.dominant()
        return damage is not None and damage.count >= min_count and damage.share > limit_share

    def clear(self) -> None:
        """Forget everything: an operator has looked."""
        self._buckets.clear()
        self._totals.clear()

    def _expire(self) -> int:
        """Drop what is too old; return the present bucket's index."""
        index = int(self._now() // self._width_s)
        while self._buckets and self._buckets[0][0] <= index - BUCKETS:
            self._totals -= self._buckets.popleft()[1]
        return index
