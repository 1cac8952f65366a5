"""The report as plain text for a terminal or a log, of 80 columns.  Pure."""

import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from worker.client.report.results import (
    DURATIONS,
    PERCENTS,
    TOKEN_KINDS,
    GroupReport,
    Percentile,
    RunReport,
    iso_time,
)

NOTHING = "-"
"""Unknown, or too few values."""
WEAK = "*"
"""Follows a percentile that few values lie beyond."""
COLUMNS = 80
_MAX_NAME_CHARS = 24
"""Longer names of models and classes are cut in tables, so that the numbers beside them fit."""
_MAX_STATUSES_CHARS = 12
_GAP = "  "


def render_text(report: RunReport) -> str:
    """Return the report with its last newline."""
    blocks = [
        _summary(report),
        _models(report),
        _tokens(report),
        _tenants(report),
        _durations(report, _groups(report)),
        _outputs(report),
    ]
    if report.variants:
        blocks += [_answers("Answers by variant", "variant", report.variants), _durations(report, report.variants)]
    if report.error_classes:
        blocks.append(_errors(report))
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def headline(report: RunReport) -> str:
    """Return the numbers of answers and errors, in one sentence."""
    total = report.total
    if not total.answers:
        return "no answers"
    text = f"{count(total.answers)} answers, {count(total.errors)} of them errors"
    if total.errors:
        text += f" ({share(total.error_rate)})"
    return text


def remarks(report: RunReport) -> Iterator[str]:
    """Yield remarks about the data, one sentence each."""
    total = report.total
    if report.first_unreadable is not None:
        number, reason = report.first_unreadable
        lines = "line is not an answer" if report.unreadable == 1 else "lines are not answers"
        yield f"{count(report.unreadable)} {lines}; the first is line {number:,}: {reason}"
    if total.truncated:
        yield f"{count(total.truncated)} errors carry part of an answer"
    if total.retried:
        yield f"{count(total.retried)} answers took more than one attempt of their worker"
    if total.redelivered:
        yield f"{count(total.redelivered)} answers are to messages that were delivered more than once"
    if report.timed < total.answers:
        untimed = count(total.answers - report.timed)
        yield f"{untimed} answers have no times: they did not reach a backend, or reply.include_stats is off"


def _summary(report: RunReport) -> list[str]:
    lines = [f"{report.source}: {headline(report)}"]
    if report.started is not None:
        start, end = iso_time(report.started), iso_time(report.ended)
        lines.append(f"{start} to {end}, {duration(report.duration_s)}")
        output = report.total.tokens["output"].per_s
        tokens = f", {amount(output)} output tokens/s" if output is not None else ""
        lines.append(f"{amount(report.answers_per_s)} answers/s{tokens}")
    if report.total.cost is not None:
        lines.append(f"cost of the tokens: {money(report.total.cost)}")
    if report.total.answers:
        statuses = ", ".join(f"{status}: {count(number)}" for status, number in report.total.statuses.items())
        lines.append(f"by status: {statuses}")
    for remark in remarks(report):
        lines += textwrap.wrap(f"note: {remark}", COLUMNS, subsequent_indent="  ")
    return lines


def _groups(report: RunReport) -> list[GroupReport]:
    return [*report.models, *([report.total] if len(report.models) > 1 else [])]


def _models(report: RunReport) -> list[str]:
    return _answers("Answers", "model", _groups(report)) if report.models else []


def _answers(title: str, name: str, groups: Iterable[GroupReport]) -> list[str]:
    rows = [[cut(group.name), count(group.answers), count(group.errors), share(group.error_rate)] for group in groups]
    return [title, *table([name, "answers", "errors", "of them"], rows)]


def _tokens(report: RunReport) -> list[str]:
    if not any(report.total.tokens[kind].total for kind in TOKEN_KINDS):
        return []
    header = ["model", *(kind.partition("_")[2] or kind for kind in TOKEN_KINDS), "out/s"]
    rows = [
        [
            cut(group.name),
            *(count(group.tokens[kind].total) for kind in TOKEN_KINDS),
            amount(group.tokens["output"].per_s),
        ]
        for group in _groups(report)
    ]
    lines = ["Tokens", *table(header, rows)]
    unknown = {kind: report.total.tokens[kind].missing for kind in TOKEN_KINDS[:2]}
    if any(unknown.values()):
        missing = ", ".join(f"{kind}: {count(number)}" for kind, number in unknown.items())
        lines.append(f"answers without token counts ({missing}) are left out of the sums")
    return lines


def _tenants(report: RunReport) -> list[str]:
    if not report.tenants:
        return []
    rows = list(cost_rows([*report.tenants, report.total]))
    header = ["tenant / model", "answers", "errors", "input", "output", "cost"]
    return ["By tenant and model", *table(header, rows)]


def cost_rows(groups: Iterable[GroupReport]) -> Iterator[list[str]]:
    """Yield the row of every group: answers, tokens, and what they cost."""
    for group in groups:
        counts = [count(group.answers), count(group.errors)]
        tokens = [count(group.tokens[kind].total) for kind in TOKEN_KINDS[:2]]
        yield [cut(group.name), *counts, *tokens, money(group.cost)]


def _durations(report: RunReport, groups: Iterable[GroupReport]) -> list[str]:
    """Return the table of durations; the name of a group has a line of its own, so that its numbers have room."""
    rows = list(duration_rows(groups))
    if not rows:
        return []
    header = ["", "n", "unknown", "mean", "p50", "p90", "p99", "max"]
    head, rule, *body = table(header, [row[1:] for row in rows])
    lines = ["Times of good answers, seconds", _GAP + head, _GAP + rule]
    shown = None
    for row, line in zip(rows, body, strict=True):
        if row[0] != shown:
            shown = row[0]
            lines.append(cut(shown, COLUMNS))
        lines.append(_GAP + line)
    return [*lines, *legend(report, rows)]


def _outputs(report: RunReport) -> list[str]:
    """Return how long good answers are, how fast they came and why they ended."""
    rows = []
    for name, title in (("output_tokens", "output tokens"), ("output_tokens_per_s", "output tokens/s")):
        spread = report.total.sizes[name]
        if spread.maximum:
            shown = [percentile(spread.percentiles[percent]) for percent in PERCENTS]
            rows.append([title, count(spread.count), amount(spread.mean), *shown, amount(spread.maximum)])
    lines = (
        ["One answer", *table(["", "n", "mean", "p50", "p90", "p99", "max"], rows), *legend(report, rows)]
        if rows
        else []
    )
    if report.total.finish_reasons:
        reasons = ", ".join(f"{name}: {count(number)}" for name, number in report.total.finish_reasons.items())
        lines += textwrap.wrap(f"ended by {reasons}", COLUMNS, subsequent_indent="  ")
    return lines


def _errors(report: RunReport) -> list[str]:
    header = ["class", "answers", "of all", "statuses", "partial", "mean s", "p50"]
    rows = list(error_rows(report))
    shown = [[cut(row[0]), *row[1:3], cut(row[3], _MAX_STATUSES_CHARS), *row[4:7]] for row in rows]
    lines = ["Errors", *table(header, shown), *legend(report, shown)]
    for name, example in examples(report):
        lines += textwrap.wrap(f"{name}, {example}", COLUMNS, subsequent_indent="  ")
    return lines


def examples(report: RunReport) -> Iterator[tuple[str, str]]:
    """Yield name and example of every error class."""
    return ((group.name, str(group.example)) for group in report.error_classes if group.example is not None)


def error_rows(report: RunReport) -> Iterator[list[str]]:
    """Yield the row of every error class: how many, of which statuses, how many with part of an answer, how fast."""
    for group in report.error_classes:
        spread = group.durations["ttlt_s"]
        counts = [count(group.answers), share(group.answers / report.total.answers), " ".join(group.statuses)]
        took = [amount(spread.mean), percentile(spread.percentiles[50]), percentile(spread.percentiles[90])]
        yield [group.name, *counts, count(group.truncated), *took]


def duration_rows(groups: Iterable[GroupReport]) -> Iterator[list[str]]:
    """Yield the row of every duration that a group has values of, not all of them 0."""
    for group in groups:
        for name in DURATIONS:
            spread = group.durations[name]
            if spread.maximum:
                shown = [percentile(spread.percentiles[percent]) for percent in PERCENTS]
                counts = [count(spread.count), count(spread.missing)]
                yield [
                    group.name,
                    name.removesuffix("_s"),
                    *counts,
                    amount(spread.mean),
                    *shown,
                    amount(spread.maximum),
                ]


def legend(report: RunReport, rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the meaning of the marks in the rows of a table of durations."""
    cells = [cell for row in rows for cell in row[1:]]
    if any(cell.endswith(WEAK) for cell in cells):
        yield f"{WEAK} fewer than {report.min_tail} values lie beyond it"
    if NOTHING in cells:
        yield f"{NOTHING} too few values: none lies beyond it"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int = 1) -> Iterator[str]:
    """Yield the lines of a table: the first `texts` columns to the left, numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [
            cell.ljust(width) if place < texts else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield _GAP.join(cells).rstrip()


def cut(name: str, limit: int = _MAX_NAME_CHARS) -> str:
    """Return a name of at most `limit` characters."""
    return name if len(name) <= limit else name[: limit - 1] + "…"


def count(value: int | None) -> str:
    """Return a whole number with thousands separated."""
    return NOTHING if value is None else f"{value:,}"


def amount(value: float | None) -> str:
    """Return a number with three significant digits, never in scientific notation."""
    if value is None:
        return NOTHING
    if value == 0:
        return "0"
    decimals = min(6, max(0, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:,.{decimals}f}"


def share(value: float) -> str:
    """Return a share of 0 to 1 in percent; a share above 0 is never shown as 0."""
    percent = value * 100
    if 0 < percent < 0.1:  # noqa: PLR2004 - the smallest that one decimal can show
        return "<0.1 %"
    return f"{percent:.1f} %"


def percentile(found: Percentile | None) -> str:
    """Return a percentile in seconds, marked when it is weak."""
    return NOTHING if found is None else amount(found.value) + (WEAK if found.is_weak else "")


_UNITS = (
    (1e-6, 0.9995e-3, "µs"),
    (1e-3, 0.9995, "ms"),
    (1.0, 120.0, "s"),
    (60.0, 7200.0, "min"),
    (3600.0, 172_800.0, "h"),
)
"""Size of a unit of time, and the duration from which the next one suits better."""


def _unit(seconds: float) -> tuple[float, str]:
    return next(((size, unit) for size, limit, unit in _UNITS if seconds < limit), (86_400.0, "d"))


def duration(seconds: float | None) -> str:
    """Return a duration in the unit that suits it, with three significant digits: 350 µs, 12.3 ms, 2.04 s, 3.20 min."""
    if seconds is None:
        return NOTHING
    if seconds == 0:
        return "0 s"
    size, unit = _unit(seconds)
    return f"{amount(seconds / size)} {unit}"


def round_duration(seconds: float) -> str:
    """Return a round duration for an axis: 0, 5 ms, 2 s, 1 min."""
    if seconds == 0:
        return "0"
    whole = ((86_400.0, "d"), (3600.0, "h"), (60.0, "min"))
    size, unit = next((pair for pair in whole if seconds % pair[0] == 0), None) or _unit(seconds)
    return f"{seconds / size:,.6g} {unit}"


def unit_of(seconds: float) -> float:
    """Return the size of the unit in which such durations are told."""
    return _unit(seconds)[0]


def compact(value: float) -> str:
    """Return a round number for an axis, short whatever its size: 250, 20k, 1.5M."""
    for size, least, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e3, 1e4, "k")):
        if value >= least:
            return f"{value / size:,.6g}{unit}"
    return f"{value:,.6g}"


def money(value: float | None) -> str:
    """Return a cost, with cents, or with four digits where it is less than one."""
    return NOTHING if value is None else f"{value:,.2f}" if value >= 1 or value == 0 else f"{value:.4f}"


def measure(name: str, value: float | None) -> str:
    """Return a value of one of the measures that a report has, with its unit."""
    if name == "output_tokens_per_s":
        return NOTHING if value is None else f"{amount(value)} tokens/s"
    if name == "output_tokens":
        return NOTHING if value is None else f"{amount(value)} tokens" if value < 10 else f"{value:,.0f} tokens"  # noqa: PLR2004
    return duration(value)
