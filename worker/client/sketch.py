"""
Quantiles of durations in constant memory, within 1 %.

Each value is counted in a bucket; the bounds of the buckets grow by a constant factor, and the counts give the
quantiles.  A value is at most `ACCURACY`, relatively, away from the middle of its bucket; count, sum, smallest and
largest value are exact.  Between a microsecond and thirty years there are 1,728 buckets for any number of values.

Source: the bucketing of DDSketch, https://www.vldb.org/pvldb/vol12/p2195-masson.pdf, section 2.
"""

import math
from collections import Counter
from dataclasses import dataclass

ACCURACY = 0.01
"""Largest relative error of a quantile."""
SMALLEST = 1e-6
"""Values up to this one share a bucket; every measured duration is longer than a microsecond."""
LARGEST = 1e9
"""Values from this one on share a bucket; 31 years."""
_GROWTH = (1 + ACCURACY) / (1 - ACCURACY)
_LOG_GROWTH = math.log(_GROWTH)
_FIRST = math.ceil(math.log(SMALLEST) / _LOG_GROWTH)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """How many values are above `low` and at most `high`."""

    low: float
    high: float
    count: int


class QuantileSketch:
    """Counts values that are not negative; not thread-safe."""

    def __init__(self) -> None:
        self._buckets: Counter[int] = Counter()
        self.count = 0
        self.sum = 0.0
        self.minimum = math.inf
        self.maximum = 0.0

    def add(self, value: float) -> None:
        """Count one value: finite, 0 or more."""
        self._buckets[_bucket(value)] += 1
        self.count += 1
        self.sum += value
        self.minimum = min(self.minimum, value)
        self.maximum = max(self.maximum, value)

    def merge(self, other: "QuantileSketch") -> None:
        """Count the values of another sketch as well."""
        self._buckets.update(other._buckets)  # noqa: SLF001 - of its own kind
        self.count += other.count
        self.sum += other.sum
        self.minimum = min(self.minimum, other.minimum)
        self.maximum = max(self.maximum, other.maximum)

    @property
    def mean(self) -> float | None:
        """The exact mean; `None` without any value."""
        return self.sum / self.count if self.count else None

    def percentile(self, percent: int) -> float | None:
        """
        Return the value that `percent` (0 to 100) of those counted do not exceed; `None` without any.

        It is the nearest-rank percentile of the values, within `ACCURACY`, and never outside of them.
        """
        rank = max(1, -(-percent * self.count // 100))
        for bucket in sorted(self._buckets):
            rank -= self._buckets[bucket]
            if rank <= 0:
                return min(self.maximum, max(self.minimum, _middle(bucket)))
        return None

    def histogram(self, bars: int) -> tuple[Bar, ...]:
        """
        Return the counts as at most `bars` bars without gaps, each as wide as the others on a logarithmic axis.

        Values up to `SMALLEST` have no place on such an axis; they are one more bar, the first, from 0 to `SMALLEST`.
        """
        zeros = self._buckets.get(_FIRST, 0)
        others = sorted(self._buckets.keys() - {_FIRST})
        found = [Bar(low=0.0, high=SMALLEST, count=zeros)] if zeros else []
        if not others:
            return tuple(found)
        width = -(-(others[-1] - others[0] + 1) // bars)
        for first in range(others[0], others[-1] + 1, width):
            count = sum(self._buckets.get(bucket, 0) for bucket in range(first, first + width))
            found.append(Bar(low=_GROWTH ** (first - 1), high=_GROWTH ** (first + width - 1), count=count))
        return tuple(found)


def _bucket(value: float) -> int:
    if value <= SMALLEST:
        return _FIRST
    return math.ceil(math.log(min(value, LARGEST)) / _LOG_GROWTH)


def _middle(bucket: int) -> float:
    """Return the value that is relatively as far from both bounds; 0 for the first bucket."""
    return 0.0 if bucket == _FIRST else float(2 * _GROWTH**bucket / (_GROWTH + 1))
