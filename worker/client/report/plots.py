"""What happened over time, and which errors there were.  Pure."""

from collections.abc import Callable, Sequence

from worker.client.report.numbers import amount, count, share
from worker.client.report.results import RunReport
from worker.client.report.svg import (
    LEFT,
    PLOT_HEIGHT,
    RIGHT,
    ROW_HEIGHT,
    WIDE,
    Drawing,
    cut,
    label_room,
    linear,
    time_ticks,
    vertical_axis,
)
from worker.client.report.timeline import Bin


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
    says = ", ".join(f"{group.name} {count(group.answers)}" for group in groups)
    height = ROW_HEIGHT * len(groups) + 4
    drawing = Drawing("plot-errors", WIDE, height, title="Errors by class", description=f"{says}.")
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
