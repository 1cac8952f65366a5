"""
Counts answers into a report, in constant memory whatever the file is like.  Pure.

Times are those of good answers, since a refusal within a millisecond is no fast answer; what errors took stands with
their class.  Tokens are those of all answers, as in the worker's metrics.
"""

from collections import Counter

from worker.client.report.results import (
    DURATIONS,
    HISTOGRAM_BARS,
    MIN_TAIL,
    PERCENTS,
    TOKEN_KINDS,
    GroupReport,
    Percentile,
    RunReport,
    Spread,
    Tokens,
    is_shown,
    is_weak,
)
from worker.client.report.sample import Sample
from worker.client.report.timeline import Timeline
from worker.client.sketch import QuantileSketch

MAX_GROUPS = 50
"""Models or error classes that are told apart; requesters choose the names, so there may be any number of them."""
OTHERS = "(others)"
UNKNOWN = "(unknown)"


class Group:
    """
    Counts answers that have something in common.

    Args:
        name: Of the group.
        is_of_errors: Whether its durations are those of errors.
    """

    def __init__(self, name: str, *, is_of_errors: bool = False) -> None:
        self.name = name
        self.sketches = {duration: QuantileSketch() for duration in DURATIONS}
        self._is_of_errors = is_of_errors
        self.answers = 0
        self._errors = 0
        self._truncated = 0
        self._retried = 0
        self._redelivered = 0
        self._statuses: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._timed_tokens: Counter[str] = Counter()
        self._tellers: Counter[str] = Counter()
        """Answers that say how many tokens of a kind they took."""

    def add(self, sample: Sample) -> None:
        """Count one answer."""
        self.answers += 1
        self._errors += sample.is_error
        self._truncated += sample.is_truncated
        self._statuses["none" if sample.status_code is None else str(sample.status_code)] += 1
        measured = sample.measured
        for kind, count in sample.tokens.kinds():
            self._tellers[kind] += 1
            self._tokens[kind] += count
            if measured is not None and measured.ended is not None:
                self._timed_tokens[kind] += count
        if measured is None:
            return
        self._retried += (measured.attempts or 0) > 1
        self._redelivered += (measured.delivery_attempt or 0) > 1
        if sample.is_error == self._is_of_errors:
            for name, sketch in self.sketches.items():
                value = getattr(measured, name)
                if value is not None:
                    sketch.add(value)

    def report(self, min_tail: int, duration_s: float | None) -> GroupReport:
        """Return the counts; rates are over `duration_s` seconds."""
        population = self._errors if self._is_of_errors else self.answers - self._errors
        return GroupReport(
            name=self.name,
            answers=self.answers,
            errors=self._errors,
            truncated=self._truncated,
            retried=self._retried,
            redelivered=self._redelivered,
            statuses=dict(sorted(self._statuses.items())),
            tokens={kind: self._tokens_of(kind, duration_s) for kind in TOKEN_KINDS},
            durations={name: _spread(sketch, population, min_tail) for name, sketch in self.sketches.items()},
        )

    def _tokens_of(self, kind: str, duration_s: float | None) -> Tokens:
        tellers = self._tellers[kind]
        return Tokens(
            total=self._tokens[kind] if tellers else None,
            missing=self.answers - tellers,
            per_s=self._timed_tokens[kind] / duration_s if tellers and duration_s else None,
        )


class Statistics:
    """Counts the answers of one output file; not thread-safe."""

    def __init__(self) -> None:
        self._total = Group("total")
        self._models: dict[str, Group] = {}
        self._classes: dict[str, Group] = {}
        self._timeline = Timeline()
        self._timed = 0
        self._first_start: float | None = None
        self._last_start = self._last_end = 0.0
        self._unreadable = 0
        self._first_unreadable: tuple[int, str] | None = None

    def add(self, sample: Sample) -> None:
        """Count one answer."""
        self._total.add(sample)
        _group(self._models, sample.model or UNKNOWN).add(sample)
        if sample.is_error:
            _group(self._classes, sample.error_class or UNKNOWN, is_of_errors=True).add(sample)
        measured = sample.measured
        if measured is None or measured.started is None or measured.ended is None:
            return
        self._timed += 1
        if self._first_start is None:
            self._first_start = self._last_start = measured.started
            self._last_end = measured.ended
        self._first_start = min(self._first_start, measured.started)
        self._last_start = max(self._last_start, measured.started)
        self._last_end = max(self._last_end, measured.ended)
        self._timeline.add(measured.ended, is_error=sample.is_error, output_tokens=sample.tokens.output or 0)

    def add_unreadable(self, number: int, reason: str) -> None:
        """Count a line that is no answer; `number` is its place in the file, from 1."""
        self._unreadable += 1
        if self._first_unreadable is None:
            self._first_unreadable = (number, reason)

    def report(self, source: str, min_tail: int = MIN_TAIL) -> RunReport:
        """
        Return what was counted so far.

        Args:
            source: Where the answers came from, for the reader.
            min_tail: Values that must lie beyond a percentile for it not to be weak.
        """
        started = self._first_start
        duration_s = None if started is None else self._last_end - started
        return RunReport(
            source=source,
            min_tail=min_tail,
            unreadable=self._unreadable,
            first_unreadable=self._first_unreadable,
            timed=self._timed,
            started=started,
            ended=None if started is None else self._last_end,
            send_window_s=None if started is None else self._last_start - started,
            total=self._total.report(min_tail, duration_s),
            models=_ordered(self._models, min_tail, duration_s),
            error_classes=_ordered(self._classes, min_tail, duration_s),
            histograms={name: sketch.histogram(HISTOGRAM_BARS) for name, sketch in self._total.sketches.items()},
            bin_s=self._timeline.width_s,
            bins=tuple(self._timeline.bins()),
        )


def _group(groups: dict[str, Group], name: str, *, is_of_errors: bool = False) -> Group:
    group = groups.get(name)
    if group is None:
        name = name if len(groups) < MAX_GROUPS else OTHERS
        group = groups.setdefault(name, Group(name, is_of_errors=is_of_errors))
    return group


def _ordered(groups: dict[str, Group], min_tail: int, duration_s: float | None) -> tuple[GroupReport, ...]:
    ordered = sorted(groups.values(), key=lambda group: (group.name == OTHERS, -group.answers, group.name))
    return tuple(group.report(min_tail, duration_s) for group in ordered)


def _spread(sketch: QuantileSketch, population: int, min_tail: int) -> Spread:
    percentiles: dict[int, Percentile | None] = {}
    for percent in PERCENTS:
        value = sketch.percentile(percent) if is_shown(sketch.count, percent) else None
        weak = is_weak(sketch.count, percent, min_tail)
        percentiles[percent] = None if value is None else Percentile(value=value, is_weak=weak)
    return Spread(
        count=sketch.count,
        missing=population - sketch.count,
        mean=sketch.mean,
        minimum=sketch.minimum if sketch.count else None,
        maximum=sketch.maximum if sketch.count else None,
        percentiles=percentiles,
    )
