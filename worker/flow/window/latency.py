"""
How long requests wait in the backend's queue, read off the times of requests of very different sizes.

The mean time of long-tailed requests says little: for lognormal sizes with sigma 1 the mean of 32 is off by 23 %.
A queue, however, delays *every* request by about the same time.  So the signal is the part of a time that the
request's size does not explain, of one of three kinds, best first:

* `first_byte`: the time to the first byte, where the backend streams; its low quantile.
* `sized`: the whole time less what the answer's size explains (see `SizeLine`); its weighted median.
* `whole`: the whole time; its low quantile, for the low end of a long-tailed distribution is narrow.

A long request has a long time but no larger residual than a short one, and is not mistaken for congestion.

A round is compared with the *clean* answers: those of rounds in which the window certainly caused no queue.  Both go
through the same statistic, so that the comparison has no bias; a lowest value ever seen would have one.  What a round
adds to the clean ones is the wait, and its share of the mean time is, by Little's law, the share of the window that
only waits.
"""

import itertools
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from worker.flow.clock import Now

LOW_QUANTILE = 0.25
"""Of times whose size is unknown.  Lower is narrower, but at the mercy of one odd answer."""

MEMORY = 64
"""Answers that are remembered: of the clean ones this many, of the others with a weight that falls to 1/e."""

LEAST_CLEAN = 8
"""Clean first bytes from which something is concluded about the silence of others."""


class Kind(StrEnum):
    """What a time is made of."""

    FIRST_BYTE = "first_byte"
    SIZED = "sized"
    WHOLE = "whole"


@dataclass(frozen=True, slots=True)
class Reading:
    """What one round says about waiting."""

    kind: Kind
    wait_s: float
    """What the round's times add to the clean ones; negative when they are shorter."""
    share: float
    """Of the window, how much only waits: wait / (wait + time of service); at least 0."""


class SizeLine:
    """
    The straight line through (work, time) of recent answers: how much of a time its size explains.

    Least squares with exponential forgetting.  The slope is never negative, and 0 until the sizes differ.
    """

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, work: float, time_s: float) -> None:
        """Take one answer into account."""
        keep = 1.0 - 1.0 / MEMORY
        self._n = self._n * keep + 1.0
        self._x = self._x * keep + work
        self._y = self._y * keep + time_s
        self._xx = self._xx * keep + work * work
        self._xy = self._xy * keep + work * time_s

    @property
    def slope(self) -> float:
        """Seconds for each unit of work."""
        spread = self._n * self._xx - self._x * self._x
        # Equal sizes leave rounding noise only; a spread below one part in a million is none.
        if spread <= 1e-6 * self._xx * self._n:
            return 0.0
        return max(0.0, (self._n * self._xy - self._x * self._y) / spread)


class _Lane:
    """The answers of one kind, as (time, work)."""

    __slots__ = ("clean", "current")

    def __init__(self) -> None:
        self.clean: deque[tuple[float, float]] = deque(maxlen=MEMORY)
        self.current: list[tuple[float, float]] = []


class LatencyMeter:
    """
    Collects the times of one round after another and reads the waiting off them.

    Args:
        now: Monotonic seconds.
    """

    def __init__(self, now: Now) -> None:
        self._now = now
        self._began_at = now()
        self._line = SizeLine()
        self._service_s = 0.0
        self._answers = 0
        self._wait_s = 0.0
        self._lanes = {kind: _Lane() for kind in Kind}

    @property
    def service_s(self) -> float:
        """Mean time of an answer without its waiting, seconds; before the first answer the time since the start."""
        return self._service_s if self._answers else self._now() - self._began_at

    def usual_first_byte_s(self) -> float | None:
        """Return the time after which nine of ten clean answers had begun, seconds; `None` before enough are known."""
        clean = self._lanes[Kind.FIRST_BYTE].clean
        if len(clean) < LEAST_CLEAN:
            return None
        return sorted(time_s for time_s, _ in clean)[int(0.9 * (len(clean) - 1))]

    def first_byte(self, time_s: float) -> None:
        """Take the time to a first byte into the round."""
        self._lanes[Kind.FIRST_BYTE].current.append((time_s, 0.0))

    def answered(self, time_s: float, work: float | None, *, in_round: bool) -> None:
        """
        Take the end of a good answer into account.

        Args:
            time_s: From its start to its end.
            work: Its size; `None` when unknown.
            in_round: It belongs to the round and its first byte was not reported.
        """
        if work is not None:
            self._line.add(work, time_s)
        if in_round:
            kind = Kind.WHOLE if work is None else Kind.SIZED
            self._lanes[kind].current.append((time_s, work or 0.0))
        service = max(time_s - self._wait_s, 0.0)
        self._answers += 1
        self._service_s += (service - self._service_s) / min(self._answers, MEMORY)

    def collected(self) -> int:
        """Return how many answers of the most frequent kind the round has."""
        return max(len(lane.current) for lane in self._lanes.values())

    def read(self) -> Reading:
        """Judge the round, which must have collected something; without clean answers to compare with, no wait."""
        kind = self._present_kind()
        lane = self._lanes[kind]
        wait = self._level(kind, lane.current) - self._level(kind, lane.clean) if lane.clean else 0.0
        self._wait_s = max(wait, 0.0)
        return Reading(kind, wait, self._wait_s / max(self._wait_s + self.service_s, 1e-9))

    def end_round(self, *, clean: bool) -> None:
        """Start the next round; what the last one collected was free of waiting, or is forgotten."""
        for lane in self._lanes.values():
            if clean:
                lane.clean.extend(lane.current)
            lane.current.clear()

    def rebase(self) -> None:
        """Accept the round's times as free of waiting, and nothing older."""
        lane = self._lanes[self._present_kind()]
        lane.clean.clear()
        lane.clean.extend(lane.current)

    def _present_kind(self) -> Kind:
        return max(self._lanes, key=lambda kind: len(self._lanes[kind].current))

    def _level(self, kind: Kind, answers: Collection[tuple[float, float]]) -> float:
        if kind is not Kind.SIZED:
            times = sorted(time_s for time_s, _ in answers)
            return times[int(LOW_QUANTILE * (len(times) - 1))]
        # What a size explains is off in proportion to the size, so small answers tell most: the weight is 1 / size.
        # A hundredth of the mean time keeps the smallest from being everything.
        slope, least = self._line.slope, 0.01 * self.service_s + 1e-9
        ordered = sorted((time_s - slope * work, 1.0 / (slope * work + least)) for time_s, work in answers)
        below = itertools.accumulate(weight for _, weight in ordered)
        half = sum(weight for _, weight in ordered) / 2.0
        return next(residual for (residual, _), weight in zip(ordered, below, strict=True) if weight >= half)
