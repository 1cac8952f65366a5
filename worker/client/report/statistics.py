"""
Counts the answers of an output file into a report, in constant memory.  Pure, except for `read_report`.

Durations are those of good answers, since a refusal within a millisecond is no fast answer; the durations of errors
stand with their class.  Tokens are those of all answers, as in the worker's metrics.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from worker.client.errors import InputError
from worker.client.io.files import open_input
from worker.client.io.lines import MAX_LINE_BYTES, RawLine
from worker.client.report.results import (
    DURATIONS,
    HISTOGRAM_BARS,
    MIN_TAIL,
    PERCENTS,
    SIZES,
    TOKEN_KINDS,
    Bin,
    GroupReport,
    Percentile,
    Price,
    RunReport,
    Spread,
    Tokens,
    is_shown,
    is_weak,
)
from worker.client.report.sample import NoAnswerError, Sample, read_example, read_sample
from worker.client.sketch import QuantileSketch
from worker.client.summary import ErrorExample

MAX_GROUPS = 50
"""Models or error classes that are counted separately; requesters choose the names, so their number has no bound."""
MAX_FINISH_REASONS = 12
"""Reasons that are counted separately; servers choose them."""
DEFAULT_PRICE = ""
"""Key of the price of models that have none of their own."""
MAX_VARIANT_CHARS = 128
OTHERS = "(others)"
UNKNOWN = "(unknown)"
WIDTHS_S = (0.1, 0.5, 1, 5, 10, 30, 60, 300, 600, 1800, 3600, 6 * 3600, 86400, 7 * 86400, 28 * 86400, 364 * 86400)
"""Widths of a bin, seconds."""
MAX_BINS = 240
"""More would be narrower than a plot can show; only short runs have fewer than `MAX_BINS / 6`."""


def read_report(
    path: str, *, min_tail: int = MIN_TAIL, prices: Mapping[str, Price] | None = None
) -> tuple[RunReport, InputError | None]:
    """
    Return the report of an output file, and the error that ended the reading early.

    A file that is still written, or that a kill has torn, is counted up to the damage.

    Args:
        path: A file (`.gz` and `.zst` are read as such), a named pipe, or `-` for standard input.
        min_tail: Values that must lie beyond a percentile for it not to be marked as weak.
        prices: By model, or `DEFAULT_PRICE` for all others; without one nothing is said of costs.

    Raises:
        InputError: The file cannot be opened; permanent.
    """
    statistics = Statistics()
    failure: InputError | None = None
    reader = open_input(path)
    try:
        while lines := reader.read_lines():
            for line in lines:
                if not line.data:
                    statistics.add_unreadable(line.number, f"it is longer than {MAX_LINE_BYTES:,} bytes")
                    continue
                try:
                    statistics.add(read_sample(line.data), line)
                except NoAnswerError as error:
                    statistics.add_unreadable(line.number, str(error))
    except InputError as error:
        failure = error
    finally:
        reader.close()
    return statistics.report("standard input" if path == "-" else path, min_tail, prices or {}), failure


class Group:
    """
    Counts a group of answers.

    Args:
        name: Name of the group.
        is_of_errors: Whether its durations are those of errors.
    """

    def __init__(self, name: str, *, is_of_errors: bool = False) -> None:
        self.name = name
        self.sketches = {duration: QuantileSketch() for duration in DURATIONS}
        self.sizes = {size: QuantileSketch() for size in SIZES}
        self._finish_reasons: Counter[str] = Counter()
        self._is_of_errors = is_of_errors
        self.example: ErrorExample | None = None
        self.answers = 0
        self._errors = 0
        self._truncated = 0
        self._retried = 0
        self._redelivered = 0
        self._statuses: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._cost: float | None = None
        self._timed_tokens: Counter[str] = Counter()
        self._counted: Counter[str] = Counter()
        """Answers that have a count of tokens of a kind."""

    def add(self, sample: Sample) -> None:
        """Count one answer."""
        self.answers += 1
        self._errors += sample.is_error
        self._truncated += sample.is_truncated
        self._statuses["none" if sample.status_code is None else str(sample.status_code)] += 1
        measured = sample.measured
        for kind, count in sample.tokens.kinds():
            self._counted[kind] += 1
            self._tokens[kind] += count
            if measured is not None and measured.ended is not None:
                self._timed_tokens[kind] += count
        if not sample.is_error:
            self._add_output(sample)
        if measured is None:
            return
        if measured.cost is not None:
            self._cost = (self._cost or 0.0) + measured.cost
        self._retried += (measured.attempts or 0) > 1
        self._redelivered += (measured.delivery_attempt or 0) > 1
        if sample.is_error == self._is_of_errors:
            for name, sketch in self.sketches.items():
                value = getattr(measured, name)
                if value is not None:
                    sketch.add(value)

    def _add_output(self, sample: Sample) -> None:
        """Count what a good answer says: how much, how fast, and why it ended."""
        for reason in sample.finish_reasons:
            is_known = reason in self._finish_reasons or len(self._finish_reasons) < MAX_FINISH_REASONS
            self._finish_reasons[reason if is_known else OTHERS] += 1
        output, measured = sample.tokens.output, sample.measured
        if output is None or output < 0:
            return
        self.sizes["output_tokens"].add(output)
        if measured is not None and measured.ttlt_s:
            self.sizes["output_tokens_per_s"].add(output / measured.ttlt_s)

    def report(self, min_tail: int, duration_s: float | None) -> GroupReport:
        """Return the counts; rates are over `duration_s` seconds."""
        good = self.answers - self._errors
        population = self._errors if self._is_of_errors else good
        return GroupReport(
            name=self.name,
            answers=self.answers,
            errors=self._errors,
            truncated=self._truncated,
            retried=self._retried,
            redelivered=self._redelivered,
            statuses=dict(sorted(self._statuses.items())),
            tokens={kind: self._tokens_of(kind, duration_s) for kind in TOKEN_KINDS},
            example=self.example,
            cost=self._cost,
            durations={name: _spread(sketch, population, min_tail) for name, sketch in self.sketches.items()},
            sizes={name: _spread(sketch, good, min_tail) for name, sketch in self.sizes.items()},
            finish_reasons=dict(self._finish_reasons.most_common()),
        )

    def _tokens_of(self, kind: str, duration_s: float | None) -> Tokens:
        counted = self._counted[kind]
        return Tokens(
            total=self._tokens[kind] if counted else None,
            missing=self.answers - counted,
            per_s=self._timed_tokens[kind] / duration_s if counted and duration_s else None,
        )


@dataclass(slots=True)
class _Interval:
    """What is counted in one bin."""

    good: int = 0
    errors: int = 0
    output_tokens: int = 0
    attempts: int = 0
    ttlt: QuantileSketch = field(default_factory=QuantileSketch)

    def merge(self, other: "_Interval") -> None:
        self.good += other.good
        self.errors += other.errors
        self.output_tokens += other.output_tokens
        self.attempts += other.attempts
        self.ttlt.merge(other.ttlt)


class Timeline:
    """
    Counts answers by the time at which they ended, in bins that grow with the run; not thread-safe.

    Bins start a tenth of a second wide.  When a run spans more than `MAX_BINS`, neighbours are merged into the next
    width of `WIDTHS_S`, each of which is a multiple of the one before; answers may come in any order.
    """

    def __init__(self) -> None:
        self._level = 0
        self._bins: dict[int, _Interval] = {}
        self._first = self._last = 0

    @property
    def width_s(self) -> float:
        """Width of a bin now."""
        return WIDTHS_S[self._level]

    def add(
        self, moment: float, *, is_error: bool, output_tokens: int, attempts: int = 1, ttlt_s: float | None = None
    ) -> None:
        """Count one answer that ended at `moment`, Unix seconds."""
        index = math.floor(moment / self.width_s)
        if not self._bins:
            self._first = self._last = index
        self._first, self._last = min(self._first, index), max(self._last, index)
        counts = self._bins.get(index)
        if counts is None:
            counts = self._bins[index] = _Interval()
        if is_error:
            counts.errors += 1
        else:
            counts.good += 1
            if ttlt_s is not None:
                counts.ttlt.add(ttlt_s)
        counts.output_tokens += output_tokens
        counts.attempts += attempts
        while self._last - self._first >= MAX_BINS and self._level + 1 < len(WIDTHS_S):
            self._coarsen()

    def bins(self) -> Iterator[Bin]:
        """Yield every bin from the first to the last, empty ones too."""
        if not self._bins:
            return
        for index in range(self._first, self._last + 1):
            counts = self._bins.get(index) or _Interval()
            yield Bin(
                start=index * self.width_s,
                good=counts.good,
                errors=counts.errors,
                output_tokens=counts.output_tokens,
                attempts=counts.attempts,
                ttlt_p50=counts.ttlt.percentile(50),
                ttlt_p90=counts.ttlt.percentile(90) if is_shown(counts.ttlt.count, 90) else None,
            )

    def _coarsen(self) -> None:
        factor = round(WIDTHS_S[self._level + 1] / self.width_s)
        merged: dict[int, _Interval] = {}
        for index, counts in self._bins.items():
            merged.setdefault(index // factor, _Interval()).merge(counts)
        self._bins = merged
        self._first //= factor
        self._last //= factor
        self._level += 1


class Statistics:
    """Counts the answers of one output file; not thread-safe."""

    def __init__(self) -> None:
        self._total = Group("total")
        self._models: dict[str, Group] = {}
        self._variants: dict[str, Group] = {}
        self._tenants: dict[str, Group] = {}
        self._classes: dict[str, Group] = {}
        self._timeline = Timeline()
        self._timed = 0
        self._first_start: float | None = None
        self._last_start = self._last_end = 0.0
        self._unreadable = 0
        self._first_unreadable: tuple[int, str] | None = None

    def add(self, sample: Sample, line: RawLine) -> None:
        """Count one answer, which is this line of the output."""
        self._total.add(sample)
        _group(self._models, sample.model or UNKNOWN).add(sample)
        if sample.measured is not None and sample.measured.variant:
            _group(self._variants, sample.measured.variant[:MAX_VARIANT_CHARS]).add(sample)
        if sample.tenant is not None:
            _group(self._tenants, f"{sample.tenant} / {sample.model or UNKNOWN}").add(sample)
        if sample.is_error:
            group = _group(self._classes, sample.error_class or UNKNOWN, is_of_errors=True)
            group.add(sample)
            if group.example is None:
                group.example = read_example(line.data, line.number)
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
        self._timeline.add(
            measured.ended,
            is_error=sample.is_error,
            output_tokens=sample.tokens.output or 0,
            attempts=measured.attempts or 1,
            ttlt_s=measured.ttlt_s,
        )

    def add_unreadable(self, number: int, reason: str) -> None:
        """Count a line that is not an answer; `number` is its place in the file, from 1."""
        self._unreadable += 1
        if self._first_unreadable is None:
            self._first_unreadable = (number, reason)

    def report(self, source: str, min_tail: int = MIN_TAIL, prices: Mapping[str, Price] | None = None) -> RunReport:
        """
        Return the report of the answers counted so far.

        Args:
            source: Name of the file, for the title.
            min_tail: Values that must lie beyond a percentile for it not to be weak.
            prices: As for `read_report`.
        """
        started = self._first_start
        duration_s = None if started is None else self._last_end - started
        models = tuple(_priced(group, prices or {}) for group in _ordered(self._models, min_tail, duration_s))
        costs = [group.cost for group in models if group.cost is not None]
        sketches = {**self._total.sketches, **self._total.sizes}
        return RunReport(
            source=source,
            min_tail=min_tail,
            unreadable=self._unreadable,
            first_unreadable=self._first_unreadable,
            timed=self._timed,
            started=started,
            ended=None if started is None else self._last_end,
            send_window_s=None if started is None else self._last_start - started,
            total=replace(self._total.report(min_tail, duration_s), cost=sum(costs) if costs else None),
            models=models,
            variants=_ordered(self._variants, min_tail, duration_s),
            tenants=tuple(
                _priced(group, prices or {}, model=group.name.rpartition(" / ")[2])
                for group in _ordered(self._tenants, min_tail, duration_s)
            ),
            error_classes=_ordered(self._classes, min_tail, duration_s),
            histograms={name: sketch.histogram(HISTOGRAM_BARS) for name, sketch in sketches.items()},
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


def _priced(group: GroupReport, prices: Mapping[str, Price], model: str | None = None) -> GroupReport:
    """Return the report of a model, or of a tenant's part of it, with its cost where a price is known."""
    price = prices.get(model or group.name, prices.get(DEFAULT_PRICE))
    return group if price is None else replace(group, cost=price.of(group.tokens))


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
