"""
The values of a report, frozen, and the rules for showing a percentile.  Pure.

A percentile p of n values means something only if values lie beyond it: with n * (100 - p) < 100 there is none, and the
percentile is not shown; with fewer than `min_tail` of them it is shown as weak.  So p50, p90 and p99 need 2, 10 and 100
values, and 10, 50 and 500 not to be weak with the default of 5.  Whole numbers, since 10 * (1 - 0.9) is just below 1
in floating point.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from worker.client.sketch import Bar
from worker.client.summary import ErrorExample

PERCENTS = (50, 90, 99)
DURATIONS = ("ttft_s", "ttlt_s", "tpot_s", "queue_s", "held_s")
"""Names of measured durations, as in `stats`; docs/report.md has the meaning of each."""
SIZES = ("output_tokens", "output_tokens_per_s")
"""Of one good answer: how long it is, and how fast it came, in output tokens by its time to the last token."""
TOKEN_KINDS = ("input", "output", "input_cached", "output_reasoning")
MIN_TAIL = 5
HISTOGRAM_BARS = 40
_LAST_MOMENT = datetime.max.replace(tzinfo=UTC).timestamp() - 1
"""The end of the year 9999, the last moment that a date can show; a later time comes from a broken clock."""


def is_shown(count: int, percent: int) -> bool:
    """Whether at least one of `count` values lies beyond the percentile."""
    return count * (100 - percent) >= 100  # noqa: PLR2004 - percent


def is_weak(count: int, percent: int, min_tail: int) -> bool:
    """Whether fewer than `min_tail` values lie beyond the percentile."""
    return count * (100 - percent) < 100 * min_tail


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentile:
    """One percentile that may be shown."""

    value: float
    """Seconds, within 1 %."""
    is_weak: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How one duration is distributed over a group of answers; seconds."""

    count: int
    missing: int
    """Answers of the group without this duration; left out of the other fields."""
    mean: float | None
    minimum: float | None
    maximum: float | None
    percentiles: Mapping[int, Percentile | None]
    """By percent, of `PERCENTS`; `None` for too few values."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        shown = {f"p{percent}": found for percent, found in self.percentiles.items()}
        return {
            "count": self.count,
            "missing": self.missing,
            "mean": self.mean,
            "min": self.minimum,
            "max": self.maximum,
            **{name: None if found is None else found.value for name, found in shown.items()},
            "weak": [name for name, found in shown.items() if found is not None and found.is_weak],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Tokens of one kind."""

    total: int | None
    """`None` when no answer has a count."""
    missing: int
    """Answers without a count."""
    per_s: float | None
    """Over the time of the whole run, of the answers with times."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"total": self.total, "missing": self.missing, "per_s": self.per_s}


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a million tokens cost, in a currency that the reader knows."""

    input: float
    output: float
    cached: float
    """Of input tokens that came from a cache; they are part of the input tokens."""

    def of(self, tokens: Mapping[str, Tokens]) -> float | None:
        """Return what tokens cost; `None` where none were counted."""
        counts = {kind: tokens[kind].total for kind in TOKEN_KINDS}
        if counts["input"] is None and counts["output"] is None:
            return None
        cached = min(counts["input_cached"] or 0, counts["input"] or 0)
        fresh = (counts["input"] or 0) - cached
        return (fresh * self.input + cached * self.cached + (counts["output"] or 0) * self.output) / 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupReport:
    """A group of answers: all of them, those of a model, of one of its variants, or of an error class."""

    name: str
    answers: int
    errors: int
    truncated: int
    """Errors that carry part of an answer."""
    retried: int
    """Answers that took more than one attempt of the worker that gave them."""
    redelivered: int
    """Answers to a message that was delivered more than once."""
    statuses: Mapping[str, int]
    """Answers by status code; `none` for batch lines without a server's answer."""
    tokens: Mapping[str, Tokens]
    """By kind, of `TOKEN_KINDS`."""
    durations: Mapping[str, Spread]
    """By name, of `DURATIONS`: of good answers; in the group of an error class, of its errors."""
    sizes: Mapping[str, Spread]
    """By name, of `SIZES`: of good answers."""
    finish_reasons: Mapping[str, int]
    """Choices of good answers by the reason that the server gave for their end; the most frequent first."""
    example: ErrorExample | None
    """Of an error class."""
    cost: float | None = None
    """Of its tokens, by the prices of the report or else of the worker; `None` where neither has one."""

    @property
    def error_rate(self) -> float:
        """Share of errors, 0 to 1."""
        return self.errors / self.answers if self.answers else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        example = {} if self.example is None else {"example": self.example.as_dict()}
        return {
            "answers": self.answers,
            "errors": self.errors,
            "error_rate": self.error_rate,
            "truncated": self.truncated,
            "retried": self.retried,
            "redelivered": self.redelivered,
            "statuses": dict(self.statuses),
            "tokens": {kind: tokens.as_dict() for kind, tokens in self.tokens.items()},
            "durations": {name: spread.as_dict() for name, spread in self.durations.items()},
            "sizes": {name: spread.as_dict() for name, spread in self.sizes.items()},
            "finish_reasons": dict(self.finish_reasons),
            "cost": self.cost,
            **example,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """The answers that were complete within one interval of time."""

    start: float
    """Unix seconds."""
    good: int
    errors: int
    output_tokens: int
    attempts: int
    """That these answers took; known only when they are complete."""
    ttlt_p50: float | None
    """Median time to the last token of the good ones, seconds; `None` without any."""
    ttlt_p90: float | None
    """`None` with fewer than ten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """Everything about one output file."""

    source: str
    min_tail: int
    unreadable: int
    """Lines that are not answers."""
    first_unreadable: tuple[int, str] | None
    """Number of the first such line, from 1, and what is wrong with it."""
    timed: int
    """Answers whose `stats` have times; rates and the timeline are about these."""
    started: float | None
    """Unix seconds at which the first answer's last attempt started."""
    ended: float | None
    """Unix seconds at which the last answer was complete."""
    send_window_s: float | None
    """From the first start of an attempt to the last."""
    total: GroupReport
    models: tuple[GroupReport, ...]
    """The most frequent first."""
    variants: tuple[GroupReport, ...]
    """Of models that are compared, as SageMaker has them; empty where no answer names one."""
    tenants: tuple[GroupReport, ...]
    """One for each tenant and model, named `TENANT / MODEL`, the most frequent first; empty where none is known."""
    error_classes: tuple[GroupReport, ...]
    histograms: Mapping[str, tuple[Bar, ...]]
    """By name of a duration or size, over good answers; seconds, tokens, tokens a second."""
    bin_s: float
    """Width of a bin of the timeline."""
    bins: tuple[Bin, ...]

    @property
    def duration_s(self) -> float | None:
        """Seconds from the first start to the last end; includes pauses between the runs of a resumed file."""
        return None if self.started is None or self.ended is None else self.ended - self.started

    @property
    def answers_per_s(self) -> float | None:
        """Answers a second over `duration_s`."""
        return self.timed / self.duration_s if self.duration_s else None

    @property
    def requests_per_minute(self) -> float | None:
        """Starts of attempts a minute over `send_window_s`; the first start begins the window and is not counted."""
        return (self.timed - 1) * 60 / self.send_window_s if self.send_window_s else None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "source": self.source,
            "min_tail": self.min_tail,
            "unreadable": self.unreadable,
            "timed": self.timed,
            "started": iso_time(self.started),
            "ended": iso_time(self.ended),
            "duration_s": self.duration_s,
            "send_window_s": self.send_window_s,
            "answers_per_s": self.answers_per_s,
            "requests_per_minute": self.requests_per_minute,
            "total": self.total.as_dict(),
            "models": {group.name: group.as_dict() for group in self.models},
            "variants": {group.name: group.as_dict() for group in self.variants},
            "tenants": {group.name: group.as_dict() for group in self.tenants},
            "error_classes": {group.name: group.as_dict() for group in self.error_classes},
            "timeline": {
                "bin_s": self.bin_s,
                "bins": [
                    {"start": iso_time(item.start), "good": item.good, "errors": item.errors}
                    | {"output_tokens": item.output_tokens, "attempts": item.attempts}
                    | {"ttlt_p50": item.ttlt_p50, "ttlt_p90": item.ttlt_p90}
                    for item in self.bins
                ],
            },
        }


def iso_time(moment: float | None) -> str | None:
    """Return Unix seconds as RFC 3339 text in UTC with milliseconds."""
    if moment is None:
        return None
    return (
        datetime.fromtimestamp(min(moment, _LAST_MOMENT), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    )
