"""
How long a request waits in the backend's queue, read off the times of requests of very different sizes.

The mean time of long-tailed requests says little: for a lognormal size with sigma 1 the mean of 32 of them is off by
23 %.  A queue, however, delays *every* request by about the same time, the quickest ones too, and the low end of a
long-tailed distribution is narrow.  So the signal is a low quantile of a *residual*: the time to the first byte where
the backend streams, else the whole time less what the answer's size explains, else the whole time.  A long request has
a long time but no larger residual than a short one, and is never mistaken for congestion.

The baseline is the lowest residual of the recent past; the wait is what the present adds to it.
"""

from collections import deque
from collections.abc import Sequence

LOW_QUANTILE = 0.25
"""Of a round's residuals.  Lower is narrower but at the mercy of one odd answer; a quarter stays inside the quickest
class of a mix as soon as that class is a quarter of it."""


def low_quantile(values: Sequence[float], share: float = LOW_QUANTILE) -> float:
    """Return the value a `share` of `values` lies below, without interpolation; `values` must not be empty."""
    return sorted(values)[int(share * (len(values) - 1))]


class Baseline:
    """
    The lowest level of a sliding horizon.

    Args:
        horizon_s: How long a level is remembered, seconds.
    """

    def __init__(self, horizon_s: float) -> None:
        self._horizon_s = horizon_s
        self._levels: deque[tuple[float, float]] = deque()

    def add(self, at: float, level: float) -> None:
        """Remember a level; those above it that are older can never be the lowest again and are forgotten."""
        while self._levels and self._levels[-1][1] >= level:
            self._levels.pop()
        self._levels.append((at, level))

    def lowest(self, now: float) -> float | None:
        """Return the lowest level not older than the horizon, or the last one; `None` before the first."""
        while len(self._levels) > 1 and self._levels[0][0] < now - self._horizon_s:
            self._levels.popleft()
        return self._levels[0][1] if self._levels else None

    def lowest_since(self) -> float | None:
        """Return when the present lowest level was seen."""
        return self._levels[0][0] if self._levels else None

    def forget(self) -> None:
        """Start anew."""
        self._levels.clear()


class SizeLine:
    """
    The straight line through (work, time) of recent answers: how much of a time its size explains.

    Least squares with exponential forgetting, one multiplication a sum; the slope is never negative and 0 until the
    sizes differ.

    Args:
        memory: Answers after which one counts for 1/e.
    """

    def __init__(self, memory: float = 100.0) -> None:
        self._keep = 1.0 - 1.0 / memory
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, work: float, time_s: float) -> None:
        """Take one answer into account."""
        keep = self._keep
        self._n = self._n * keep + 1.0
        self._x = self._x * keep + work
        self._y = self._y * keep + time_s
        self._xx = self._xx * keep + work * work
        self._xy = self._xy * keep + work * time_s

    @property
    def slope(self) -> float:
        """Seconds for each unit of work, at least 0."""
        spread = self._n * self._xx - self._x * self._x
        # Equal sizes leave rounding noise only; a spread below one part in a million is none.
        if spread <= 1e-6 * self._xx * self._n:
            return 0.0
        return max(0.0, (self._n * self._xy - self._x * self._y) / spread)
