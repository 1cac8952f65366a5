"""
How long requests wait in the backend's queue, measured from the times of requests of very different sizes.

The mean time of long-tailed requests says little: for lognormal sizes with sigma 1 the mean of 32 is off by 23 %.
A queue, however, delays *every* request by about the same time.  So the signal is the part of a time that the
request's size does not explain.  There are three kinds of it, the best one first:

* `first_byte`: the time to the first byte, where the backend streams; its low quantile.
* `sized`: the whole time minus what the size of the answer explains (see `SizeLine`); its weighted median.  What a
  size explains is taken at the speed of that time: a batch engine gives each request fewer tokens a second the more
  run, while all together get more.  A slower generation is no queue.
* `whole`: the whole time; its low quantile, for the low end of a long-tailed distribution is narrow.

A long request takes a long time, but this part of it is no larger than that of a short one; so long requests are not
taken for congestion.

A round is compared with the *clean* answers: those of rounds in which the window certainly caused no queue.  Both go
through the same statistic, so that the comparison has no bias; the lowest value ever seen would have one.  What a round
adds to the clean answers is the wait, and its share of the mean time is, by Little's law, the share of the window that
only waits.

`OverdueFirstBytes` finds the same share earlier, while requests are still waiting.
"""

import itertools
import math
from collections import deque
from collections.abc import Collection
from enum import StrEnum
from itertools import takewhile
from typing import NamedTuple

import msgspec

from worker.flow.clock import Now

LOW_QUANTILE = 0.25
"""Of times without a known size.  A lower quantile varies less, but one odd answer can change it."""

MEMORY = 64
"""Clean answers that are remembered; for other averages, the number of answers after which a weight falls to 1/e."""

LEAST_CLEAN = 8
"""Clean first bytes that are needed to say which ones are overdue."""

BATCH_S = 0.1
"""Seconds of waiting that are no congestion where sizes are unknown, as with embeddings.  An engine collects its next
batch while it computes one, so requests wait for about a batch, and without that queue its batches are small."""

LEAST_LINE = 7
"""Answers that are needed to say what sizes explain of clean answers for good; until then the present line says it."""

OVERDUE_FACTOR = 2.0
"""A first byte is overdue after the usual time multiplied by this: prefills seldom differ by more."""

OVERDUE_LEAST = 2
"""Up to so many overdue first bytes say nothing, whatever their share: one long prompt is no queue."""


class Kind(StrEnum):
    """What a time is made of."""

    FIRST_BYTE = "first_byte"
    SIZED = "sized"
    WHOLE = "whole"


class Reading(msgspec.Struct, frozen=True):
    """What the answers of one round say about waiting."""

    kind: Kind
    wait_s: float
    """Seconds that the round's times add to the clean ones; negative when they are shorter."""
    share: float
    """Share of the window that only waits: wait / (wait + time of service); at least 0."""


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
    def answers(self) -> float:
        """Answers taken into account; earlier ones count less."""
        return self._n

    @property
    def slope(self) -> float:
        """Seconds for each unit of work."""
        spread = self._n * self._xx - self._x * self._x
        # Equal sizes leave rounding noise only; a spread below one part in a million is none.
        if spread <= 1e-6 * self._xx * self._n:
            return 0.0
        return max(0.0, (self._n * self._xy - self._x * self._y) / spread)


class _Answer(NamedTuple):
    """The time of one answer, and what is known of its size."""

    time_s: float
    work: float = 0.0
    slope: float | None = None
    """Seconds for each unit of work when it was answered; `None`: as now."""


class _Answers:
    """The answers of one kind."""

    __slots__ = ("clean", "current")

    def __init__(self) -> None:
        self.clean: deque[_Answer] = deque(maxlen=MEMORY)
        self.current: list[_Answer] = []


class LatencyMeter:
    """
    Collects the times of one round after another and computes the waiting from them.

    Args:
        now: Monotonic seconds.
    """

    def __init__(self, now: Now) -> None:
        self._now = now
        self._began_at = now()
        self._line = SizeLine()
        self._service_s = 0.0
        self._answered = 0
        self._wait_s = 0.0
        self._by_kind = {kind: _Answers() for kind in Kind}

    @property
    def service_s(self) -> float:
        """Mean time of an answer without its waiting, seconds; before the first answer the time since the start."""
        return self._service_s if self._answered else self._now() - self._began_at

    def usual_first_byte_s(self) -> float | None:
        """Return the time within which nine of ten clean answers began, seconds; `None` before enough are known."""
        clean = self._by_kind[Kind.FIRST_BYTE].clean
        if len(clean) < LEAST_CLEAN:
            return None
        return sorted(each.time_s for each in clean)[int(0.9 * (len(clean) - 1))]

    def first_byte(self, time_s: float) -> None:
        """Add the time to a first byte, seconds, to the round."""
        self._by_kind[Kind.FIRST_BYTE].current.append(_Answer(time_s))

    def answered(self, time_s: float, work: float | None, *, in_round: bool) -> None:
        """
        Take the end of a good answer into account.

        Args:
            time_s: From its start to its end, seconds.
            work: Its size in any constant unit; `None` or 0, as of an embedding's output, when unknown.
            in_round: Whether it belongs to the round and its first byte was not reported.
        """
        if work:
            self._line.add(work, time_s)
        if in_round:
            kind = Kind.SIZED if work else Kind.WHOLE
            self._by_kind[kind].current.append(_Answer(time_s, work or 0.0))
        service = max(time_s - self._wait_s, 0.0)
        self._answered += 1
        self._service_s += (service - self._service_s) / min(self._answered, MEMORY)

    def collected(self) -> int:
        """Return how many answers the round has of its most frequent kind."""
        first_bytes, sized, whole = self._by_kind.values()
        return max(len(first_bytes.current), len(sized.current), len(whole.current))

    def read(self) -> Reading:
        """Compute the waiting in the round, which must have an answer; 0 while there are no clean answers."""
        kind = self._present_kind()
        answers = self._by_kind[kind]
        wait = self._level(kind, answers.current) - self._level(kind, answers.clean) if answers.clean else 0.0
        if kind is Kind.WHOLE:
            wait -= min(max(wait, 0.0), BATCH_S)
        self._wait_s = max(wait, 0.0)
        return Reading(kind, wait, self._wait_s / max(self._wait_s + self.service_s, 1e-9))

    def end_round(self, *, clean: bool) -> None:
        """Start the next round; the answers of the last one become clean answers, or are forgotten."""
        for answers in self._by_kind.values():
            if clean:
                answers.clean.extend(self._at_this_speed(answers))
            answers.current.clear()

    def rebase(self) -> None:
        """Replace all clean answers by those of the present round."""
        answers = self._by_kind[self._present_kind()]
        answers.clean.clear()
        answers.clean.extend(self._at_this_speed(answers))

    def _at_this_speed(self, answers: _Answers) -> list[_Answer]:
        slope = self._line.slope if self._line.answers >= LEAST_LINE else None
        return [answer._replace(slope=slope) for answer in answers.current]

    def _present_kind(self) -> Kind:
        return max(self._by_kind, key=lambda kind: len(self._by_kind[kind].current))

    def _level(self, kind: Kind, answers: Collection[_Answer]) -> float:
        if kind is not Kind.SIZED:
            times = sorted(answer.time_s for answer in answers)
            return times[int(LOW_QUANTILE * (len(times) - 1))]
        # The error of what a size explains grows with the size, so the weight of an answer is 1 / size.  A hundredth of
        # the mean time keeps the smallest answers from having all of the weight.
        present, least = self._line.slope, 0.01 * self.service_s + 1e-9
        ordered = []
        for answer in answers:
            explained_s = answer.work * (present if answer.slope is None else answer.slope)
            ordered.append((answer.time_s - explained_s, 1.0 / (explained_s + least)))
        ordered.sort()
        below = itertools.accumulate(weight for _, weight in ordered)
        half = sum(weight for _, weight in ordered) / 2.0
        return next(residual for (residual, _), weight in zip(ordered, below, strict=True) if weight >= half)


class OverdueFirstBytes:
    """
    The attempts whose first byte will be reported and is not there yet, in the order of their starts.

    An overdue first byte means that the request waits in the backend's queue, however long its answer will be; unless
    an attempt that started when it was overdue already has its first byte.  Then there is no queue, and it hangs.
    """

    def __init__(self) -> None:
        self._started_at: dict[int, float] = {}
        self._latest_served = -math.inf

    def __bool__(self) -> bool:
        return bool(self._started_at)

    def begin(self, number: int, now: float) -> None:
        """Expect the first byte of an attempt that starts now."""
        self._started_at[number] = now

    def came(self, number: int) -> None:
        """Note that the first byte is there; harmless for an unknown attempt."""
        started_at = self._started_at.pop(number, None)
        if started_at is not None:
            self._latest_served = max(self._latest_served, started_at)

    def end(self, number: int) -> None:
        """Expect it no longer: the attempt has ended.  Harmless for an unknown attempt."""
        self._started_at.pop(number, None)

    def share(self, now: float, usual_s: float, in_flight: int) -> float:
        """Return the share of the attempts under way whose first byte is overdue; 0 when they are few."""
        patience_s = OVERDUE_FACTOR * usual_s
        started = takewhile(lambda started_at: started_at < now - patience_s, self._started_at.values())
        overdue = sum(1 for started_at in started if started_at >= self._latest_served - patience_s)
        return overdue / in_flight if overdue > OVERDUE_LEAST and in_flight > 0 else 0.0
