"""
The drawings of the page.  Pure.

Over time: answers and tokens.  Of durations: a histogram for all answers, a line with dots for each model.  Of errors:
a bar for each class.
"""

from collections.abc import Callable, Sequence

from worker.client.report.results import PERCENTS, Bin, GroupReport, Percentile, RunReport, Spread
from worker.client.report.svg import (
    BOTTOM,
    CHAR_WIDTH,
    LEFT,
    NARROW,
    PLOT_HEIGHT,
    RIGHT,
    ROW_HEIGHT,
    WIDE,
    Drawing,
    Scale,
    cut,
    label_room,
    linear,
    log_ticks,
    logarithmic,
    time_ticks,
    vertical_axis,
)
from worker.client.report.text import WEAK, amount, count, share
from worker.client.sketch import Bar

_MARKS_TOP = 36.0
"""Where the lines of percentiles begin; above them are their names and values."""


def plot_answers(report: RunReport) -> str:
    """Draw good answers and errors a second over time, errors on top."""

    def describe(item: Bin) -> str:
        return f"{count(item.good)} good, {count(item.errors)} errors"

    peak = max((item.good + item.errors for item in report.bins), default=0) / report.bin_s
    description = (
        f"{count(report.timed)} answers over {amount(report.duration_s)} seconds,"
        f" {amount(report.answers_per_s)} a second on average, {amount(peak)} a second at the peak,"
        f" counted every {amount(report.bin_s)} seconds."
    )
    values = [((item.good, "good"), (item.errors, "errors")) for item in report.bins]
    return _over_time(report, "answers", ("Answers over time", description), values, describe)


def plot_tokens(report: RunReport) -> str:
    """Draw output tokens a second over time, by the end of the answers they belong to."""
    tokens = report.total.tokens["output"]
    description = (
        f"{count(tokens.total)} output tokens, {amount(tokens.per_s)} a second on average; each answer's tokens are"
        " counted when it was complete."
    )
    values = [((item.output_tokens, "tokens"),) for item in report.bins]
    return _over_time(
        report, "tokens", ("Output tokens over time", description), values, lambda item: count(item.output_tokens)
    )


def _over_time(
    report: RunReport,
    key: str,
    names: tuple[str, str],
    values: Sequence[tuple[tuple[int, str], ...]],
    describe: Callable[[Bin], str],
) -> str:
    drawing = Drawing(f"plot-{key}", WIDE, PLOT_HEIGHT, title=names[0], description=names[1])
    width_s, origin = report.bin_s, report.bins[0].start
    span = width_s * len(report.bins)
    x = linear(0, span, LEFT, WIDE - RIGHT)
    y = vertical_axis(drawing, max(sum(part for part, _ in parts) for parts in values) / width_s)
    for moment, label in time_ticks(span):
        drawing.tick(x(moment), PLOT_HEIGHT - 10, label)
    bar = max(0.6, (x(width_s) - x(0)) * 0.86)
    for item, parts in zip(report.bins, values, strict=True):
        below = 0.0
        left, moment = x(item.start - origin), item.start - origin
        for part, style in parts:
            if part:
                top, bottom = y((below + part) / width_s), y(below / width_s)
                tip = f"{amount(moment)} to {amount(moment + width_s)} s: {describe(item)}"
                drawing.rect(left, top, bar, bottom - top, style, tip=tip)
                below += part
    return drawing.render()


def plot_errors(report: RunReport) -> str:
    """Draw how many answers each error class has."""
    groups = report.error_classes
    summary = ", ".join(f"{group.name} {count(group.answers)}" for group in groups)
    height = ROW_HEIGHT * len(groups) + 4
    drawing = Drawing("plot-errors", WIDE, height, title="Errors by class", description=f"{summary}.")
    left = label_room(group.name for group in groups)
    x = linear(0, max(group.answers for group in groups), left, WIDE - 150)
    for place, group in enumerate(groups):
        y = ROW_HEIGHT * place + 4
        drawing.text(left - 10, y + 14, cut(group.name), anchor="end")
        drawing.rect(
            left, y, max(2.0, x(group.answers) - left), ROW_HEIGHT - 8, "errors", tip=f"{group.name}: {group.answers}"
        )
        label = f"{count(group.answers)} ({share(group.answers / report.total.answers)})"
        drawing.text(x(group.answers) + 8, y + 14, label)
    return drawing.render()


def plot_distribution(key: str, title: str, bars: Sequence[Bar], spread: Spread) -> str:
    """Draw a histogram over a logarithmic axis, with a mark at every percentile that may be shown."""
    summary = ", ".join(
        f"p{percent} {amount(item.value)} s{' (weak)' if item.is_weak else ''}" for percent, item in _known(spread)
    )
    description = (
        f"{count(spread.count)} answers from {amount(spread.minimum)} to {amount(spread.maximum)} seconds; {summary}."
    )
    drawing = Drawing(f"plot-{key}", NARROW, PLOT_HEIGHT, title=title, description=description)
    y = vertical_axis(drawing, max(bar.count for bar in bars), top=_MARKS_TOP + 6)
    positive = [bar for bar in bars if bar.low > 0]
    zeros = [bar for bar in bars if bar.low == 0]
    start = LEFT + (40.0 if zeros else 4.0)
    for bar in zeros:
        drawing.rect(LEFT + 6, y(bar.count), 20, y(0) - y(bar.count), "good", tip=f"0 s: {count(bar.count)}")
        drawing.text(LEFT + 16, PLOT_HEIGHT - 10, "0", anchor="middle")
    if positive:
        x = logarithmic(positive[0].low, positive[-1].high, start, NARROW - RIGHT)
        for value, label in log_ticks(positive[0].low, positive[-1].high, x):
            drawing.tick(x(value), PLOT_HEIGHT - 10, label)
        for bar in positive:
            if bar.count:
                tip = f"{amount(bar.low)} to {amount(bar.high)} s: {count(bar.count)}"
                width = max(1.0, x(bar.high) - x(bar.low) - 1)
                drawing.rect(x(bar.low), y(bar.count), width, y(0) - y(bar.count), "good", tip=tip)
        _mark_percentiles(drawing, spread, x, positive[0].low)
    return drawing.render()


def _mark_percentiles(drawing: Drawing, spread: Spread, x: Scale, low: float) -> None:
    """Draw a line at each percentile, its name above and its value in the corner."""
    items = _known(spread)
    summary = " · ".join(f"p{percent} {amount(item.value)} s{WEAK if item.is_weak else ''}" for percent, item in items)
    drawing.text(drawing.width - RIGHT, 12, summary, "tag", anchor="end")
    shared: list[tuple[float, str]] = []
    for percent, item in items:
        if item.value < low:
            continue
        at = x(item.value)
        drawing.line(at, _MARKS_TOP, at, drawing.height - BOTTOM, "mark weak" if item.is_weak else "mark")
        name = f"p{percent}"
        if shared and at - shared[-1][0] < CHAR_WIDTH * len(f"{shared[-1][1]} {name}") / 2:
            at, name = (at + shared[-1][0]) / 2, f"{shared.pop()[1]} {name}"  # too close for a label each
        shared.append((at, name))
    for at, name in shared:
        drawing.tick(at, _MARKS_TOP - 4, name)


def plot_ranges(key: str, title: str, groups: Sequence[GroupReport], name: str) -> str:
    """Draw p50, p90 and p99 of one duration for each group as dots on a line, logarithmic."""
    found = [(group, group.durations[name]) for group in groups]
    rows = [(group, spread) for group, spread in found if (middle := spread.percentiles[50]) and middle.value > 0]
    if not rows:
        return ""
    values = [item.value for _, spread in rows for _, item in _known(spread)]
    low, high = min(values) / 1.15, max(values) * 1.15
    summary = "; ".join(
        f"{group.name}: " + ", ".join(f"p{percent} {amount(item.value)} s" for percent, item in _known(spread))
        for group, spread in rows
    )
    height = ROW_HEIGHT * len(rows) + BOTTOM + 4
    drawing = Drawing(f"plot-{key}", NARROW, height, title=title, description=f"{summary}.")
    left = label_room(group.name for group, _ in rows)
    x = logarithmic(low, high, left, NARROW - RIGHT - 16)
    for value, label in log_ticks(low, high, x):
        drawing.line(x(value), 0, x(value), height - BOTTOM, "grid")
        drawing.tick(x(value), height - 10, label)
    for place, (group, spread) in enumerate(rows):
        y = ROW_HEIGHT * (place + 0.5) + 2
        items = _known(spread)
        drawing.text(left - 10, y + 4, cut(group.name), anchor="end")
        drawing.line(x(items[0][1].value), y, x(items[-1][1].value), y, "range")
        for percent, item in items:
            weak = ", weak" if item.is_weak else ""
            tip = f"{group.name} p{percent}: {amount(item.value)} s{weak}"
            drawing.circle(x(item.value), y, 5.5, f"dot p{percent}{' weak' if item.is_weak else ''}", tip=tip)
    return drawing.render()


def _known(spread: Spread) -> list[tuple[int, Percentile]]:
    """Return the percentiles that may be shown, in ascending order."""
    return [(percent, item) for percent in PERCENTS if (item := spread.percentiles[percent]) is not None]
