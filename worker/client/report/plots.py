"""
The drawings of the page.  Pure.

Over time: answers, attempts, times and tokens.  Of durations and sizes: a histogram for all answers, a line with dots
for each model.  Of counts by name: a bar for each.  What is drawn over the whole page is drawn a second time for a
phone, since a drawing that is only made smaller has letters too small to read.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby

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
from worker.client.report.text import WEAK, amount, compact, count, duration, measure, round_duration, share, unit_of
from worker.client.sketch import Bar

_MARKS_TOP = 36.0
"""Where the lines of percentiles begin; above them are their names and values."""


def plot_answers(report: RunReport, width: float) -> str:
    """Draw good answers and errors a second over time, errors on top."""

    def describe(item: Bin) -> str:
        return f"{count(item.good)} good, {count(item.errors)} errors"

    peak = max((item.good + item.errors for item in report.bins), default=0) / report.bin_s
    description = (
        f"{count(report.timed)} answers over {duration(report.duration_s)},"
        f" {amount(report.answers_per_s)} a second on average, {amount(peak)} a second at the peak,"
        f" counted every {duration(report.bin_s)}."
    )
    values = [((item.good, "good"), (item.errors, "errors")) for item in report.bins]
    return _bars_over_time(
        report, width, "answers", ("Answers over time", description), values=values, describe=describe
    )


def plot_attempts(report: RunReport, width: float) -> str:
    """Draw the attempts a second that the answers took, those after the first on top."""
    values, further = [], 0
    for item in report.bins:
        answers = item.good + item.errors
        more = max(0, item.attempts - answers)
        further += more
        values.append(((min(answers, item.attempts), "good"), (more, "errors")))
    total = sum(item.attempts for item in report.bins)
    description = (
        f"{count(total)} attempts, {count(further)} of them after the first; those of each answer are counted when it"
        " was complete."
    )
    return _bars_over_time(
        report,
        width,
        "attempts",
        ("Attempts over time", description),
        values=values,
        describe=lambda item: f"{count(item.attempts)} for {count(item.good + item.errors)} answers",
    )


def plot_tokens(report: RunReport, width: float) -> str:
    """Draw output tokens a second over time, by the end of the answers they belong to."""
    tokens = report.total.tokens["output"]
    description = (
        f"{count(tokens.total)} output tokens, {amount(tokens.per_s)} a second on average; each answer's tokens are"
        " counted when it was complete."
    )
    values = [((item.output_tokens, "tokens"),) for item in report.bins]
    return _bars_over_time(
        report,
        width,
        "tokens",
        ("Output tokens over time", description),
        values=values,
        describe=lambda item: count(item.output_tokens),
    )


def plot_times(report: RunReport, width: float) -> str:
    """Draw the median and the 90th percentile of the time to the last token of good answers over time."""
    lines: Mapping[str, list[tuple[int, float | None]]] = {
        "p50": [(place, item.ttlt_p50) for place, item in enumerate(report.bins)],
        "p90": [(place, item.ttlt_p90) for place, item in enumerate(report.bins)],
    }
    known = [value for points in lines.values() for _, value in points if value is not None]
    if not known:
        return ""
    description = (
        f"Medians from {duration(min(value for _, value in lines['p50'] if value is not None))} to"
        f" {duration(max(value for _, value in lines['p50'] if value is not None))}, of the answers that were complete"
        f" within {duration(report.bin_s)} each; gaps where there were none."
    )
    names = ("Times over time", description)
    unit = unit_of(max(known))
    drawing, x, y = _time_plot(report, width, "times", names, highest=max(known), label=round_duration, unit=unit)
    middle = report.bin_s / 2
    for name, points in lines.items():
        for is_known, run in groupby(points, key=lambda point: point[1] is not None):
            if not is_known:
                continue
            places = [(x(place * report.bin_s + middle), y(value or 0.0)) for place, value in run]
            if len(places) > 1:
                drawing.path(places, f"trend {name}")
            else:
                drawing.circle(*places[0], 2.0, f"spot {name}")
    return drawing.render()


def _time_plot(
    report: RunReport,
    width: float,
    key: str,
    names: tuple[str, str],
    *,
    highest: float,
    label: Callable[[float], str],
    unit: float = 1.0,
) -> tuple[Drawing, Scale, Scale]:
    """Return a drawing with its axes, and the scales of seconds since the first bin and of values."""
    suffix = "" if width == WIDE else "-small"
    drawing = Drawing(f"plot-{key}{suffix}", width, PLOT_HEIGHT, title=names[0], description=names[1])
    span = report.bin_s * len(report.bins)
    x = linear(0, span, LEFT, width - RIGHT)
    y = vertical_axis(drawing, highest, label, unit=unit)
    for moment, text in time_ticks(span, 8 if width == WIDE else 5):
        drawing.tick(x(moment), PLOT_HEIGHT - 10, text)
    return drawing, x, y


def _bars_over_time(
    report: RunReport,
    width: float,
    key: str,
    names: tuple[str, str],
    *,
    values: Sequence[tuple[tuple[int, str], ...]],
    describe: Callable[[Bin], str],
) -> str:
    width_s, origin = report.bin_s, report.bins[0].start
    highest = max(sum(part for part, _ in parts) for parts in values) / width_s
    drawing, x, y = _time_plot(report, width, key, names, highest=highest, label=compact)
    bar = max(0.6, (x(width_s) - x(0)) * 0.86)
    for item, parts in zip(report.bins, values, strict=True):
        below = 0.0
        left, moment = x(item.start - origin), item.start - origin
        for part, style in parts:
            if part:
                top, bottom = y((below + part) / width_s), y(below / width_s)
                tip = f"{duration(moment)} to {duration(moment + width_s)}: {describe(item)}"
                drawing.rect(left, top, bar, bottom - top, style, tip=tip)
                below += part
    return drawing.render()


def plot_counts(key: str, title: str, counts: Mapping[str, int], style: str, width: float) -> str:
    """Draw a bar for each name, with its count and its share of all of them."""
    suffix = "" if width == WIDE else "-small"
    summary = ", ".join(f"{name} {count(number)}" for name, number in counts.items())
    height = ROW_HEIGHT * len(counts) + 4
    drawing = Drawing(f"plot-{key}{suffix}", width, height, title=title, description=f"{summary}.")
    left, total = label_room(counts), sum(counts.values())
    labels = {name: f"{count(number)} ({share(number / total)})" for name, number in counts.items()}
    x = linear(0, max(counts.values()), left, width - 16 - CHAR_WIDTH * max(map(len, labels.values())))
    for place, (name, number) in enumerate(counts.items()):
        y = ROW_HEIGHT * place + 4
        drawing.text(left - 10, y + 14, cut(name), anchor="end")
        drawing.rect(left, y, max(2.0, x(number) - left), ROW_HEIGHT - 8, style, tip=f"{name}: {number}")
        drawing.text(max(left + 2.0, x(number)) + 8, y + 14, labels[name])
    return drawing.render()


def axis_label(name: str) -> Callable[[float], str]:
    """Return how values of a measure stand on an axis."""
    return compact if name.startswith("output_tokens") else round_duration


def plot_distribution(name: str, title: str, bars: Sequence[Bar], spread: Spread) -> str:
    """
    Draw a histogram over a logarithmic axis, with a mark at every percentile that may be shown.

    Args:
        name: Of the measure; decides about units.
        title: Of the drawing.
        bars: Of the histogram.
        spread: Of the same values.
    """
    summary = ", ".join(
        f"p{percent} {measure(name, item.value)}{' (weak)' if item.is_weak else ''}" for percent, item in _known(spread)
    )
    description = (
        f"{count(spread.count)} answers from {measure(name, spread.minimum)} to {measure(name, spread.maximum)};"
        f" {summary}. The axis is logarithmic."
    )
    key = f"plot-{name.replace('_', '-')}"
    drawing = Drawing(key, NARROW, PLOT_HEIGHT, title=title, description=description)
    y = vertical_axis(drawing, max(bar.count for bar in bars), compact, top=_MARKS_TOP + 6)
    positive = [bar for bar in bars if bar.low > 0]
    zeros = [bar for bar in bars if bar.low == 0]
    start = LEFT + (40.0 if zeros else 4.0)
    for bar in zeros:
        drawing.rect(LEFT + 6, y(bar.count), 20, y(0) - y(bar.count), "good", tip=f"0: {count(bar.count)}")
        drawing.text(LEFT + 16, PLOT_HEIGHT - 10, "0", anchor="middle")
    if positive:
        x = logarithmic(positive[0].low, positive[-1].high, start, NARROW - RIGHT)
        least = start + CHAR_WIDTH if zeros else 0.0
        label = axis_label(name)
        for value, text in log_ticks(positive[0].low, positive[-1].high, x, label, is_time=label is round_duration):
            if x(value) - CHAR_WIDTH * len(text) / 2 >= least:  # not into the 0 of the zeros
                drawing.tick(x(value), PLOT_HEIGHT - 10, text)
        for bar in positive:
            if bar.count:
                tip = f"{measure(name, bar.low)} to {measure(name, bar.high)}: {count(bar.count)}"
                width = max(1.0, x(bar.high) - x(bar.low) - 1)
                drawing.rect(x(bar.low), y(bar.count), width, y(0) - y(bar.count), "good", tip=tip)
        _mark_percentiles(drawing, name, spread, x, positive[0].low)
    return drawing.render()


def _mark_percentiles(drawing: Drawing, name: str, spread: Spread, x: Scale, low: float) -> None:
    """Draw a line at each percentile, its name above and its value in the corner."""
    items = _known(spread)
    summary = " · ".join(
        f"p{percent} {measure(name, item.value)}{WEAK if item.is_weak else ''}" for percent, item in items
    )
    drawing.text(drawing.width - RIGHT, 12, summary, "tag", anchor="end")
    shared: list[tuple[float, str]] = []
    for percent, item in items:
        if item.value < low:
            continue
        at = x(item.value)
        drawing.line(at, _MARKS_TOP, at, drawing.height - BOTTOM, "mark weak" if item.is_weak else "mark")
        mark = f"p{percent}"
        while shared and at - shared[-1][0] < CHAR_WIDTH * (len(f"{shared[-1][1]}{mark}") / 2 + 1):
            before, others = shared.pop()
            at, mark = (at + before) / 2, f"{others} {mark}"  # too close for a label each
        shared.append((at, mark))
    for at, mark in shared:
        drawing.tick(at, _MARKS_TOP - 4, mark)


def plot_ranges(title: str, groups: Iterable[GroupReport], name: str) -> str:
    """Draw p50, p90 and p99 of one duration for each group as dots on a line, logarithmic."""
    found = [(group, group.durations[name]) for group in groups]
    rows = [(group, spread) for group, spread in found if (middle := spread.percentiles[50]) and middle.value > 0]
    if not rows:
        return ""
    values = [item.value for _, spread in rows for _, item in _known(spread)]
    low, high = min(values) / 1.15, max(values) * 1.15
    summary = "; ".join(
        f"{group.name}: " + ", ".join(f"p{percent} {duration(item.value)}" for percent, item in _known(spread))
        for group, spread in rows
    )
    height = ROW_HEIGHT * len(rows) + BOTTOM + 4
    key = f"plot-models-{name.replace('_', '-')}"
    drawing = Drawing(key, NARROW, height, title=title, description=f"{summary}. The axis is logarithmic.")
    left = label_room(group.name for group, _ in rows)
    x = logarithmic(low, high, left, NARROW - RIGHT - 16)
    for value, label in log_ticks(low, high, x, round_duration, is_time=True):
        drawing.line(x(value), 0, x(value), height - BOTTOM, "grid")
        drawing.tick(x(value), height - 10, label)
    for place, (group, spread) in enumerate(rows):
        y = ROW_HEIGHT * (place + 0.5) + 2
        items = _known(spread)
        drawing.text(left - 10, y + 4, cut(group.name), anchor="end")
        drawing.line(x(items[0][1].value), y, x(items[-1][1].value), y, "range")
        for percent, item in items:
            weak = ", weak" if item.is_weak else ""
            tip = f"{group.name} p{percent}: {duration(item.value)}{weak}"
            drawing.circle(x(item.value), y, 5.5, f"dot p{percent}{' weak' if item.is_weak else ''}", tip=tip)
    return drawing.render()


def _known(spread: Spread) -> list[tuple[int, Percentile]]:
    """Return the percentiles that may be shown, in ascending order."""
    return [(percent, item) for percent in PERCENTS if (item := spread.percentiles[percent]) is not None]
