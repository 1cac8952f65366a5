"""
Draws SVG: a few shapes, axes and scales.  Pure; independent of reports.

Colours are CSS classes, so that the page decides about light and dark.  Every drawing has a title and a description for
readers who cannot see it, and every text is escaped.

Source: names for drawings, https://www.w3.org/TR/svg-aam-1.0/ and https://www.w3.org/WAI/tutorials/images/complex/.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from itertools import pairwise

WIDE, NARROW = 940.0, 460.0
"""Widths of a drawing over the whole page and over half of it."""
PLOT_HEIGHT = 210.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 12.0, 14.0, 30.0
"""Space around a plot, for axes and their labels."""
ROW_HEIGHT = 26.0
"""Height of a row in a drawing with one row for each name."""
CHAR_WIDTH = 7.2
"""Approximate width of a character of a label."""
_MAX_LABEL_CHARS = 24


class Drawing:
    """
    One SVG element under construction.

    Args:
        key: Unique on the page; letters, digits and hyphens.
        width: Of the coordinate system; the page scales it.
        height: The same, downwards.
        title: Name of the drawing.
        description: The content in words and numbers.
    """

    def __init__(self, key: str, width: float, height: float, *, title: str, description: str) -> None:
        self.width = width
        self.height = height
        self._parts = [
            f'<svg viewBox="0 0 {_at(width)} {_at(height)}" role="img" aria-labelledby="{key}-t {key}-d">',
            f'<title id="{key}-t">{escape(title)}</title><desc id="{key}-d">{escape(description)}</desc>',
        ]

    def rect(self, x: float, y: float, width: float, height: float, style: str, *, tip: str = "") -> None:
        """Add a rectangle; `tip` is shown under the pointer."""
        place = f'x="{_at(x)}" y="{_at(y)}" width="{_at(width)}" height="{_at(height)}"'
        self._parts.append(f'<rect class="{style}" {place}{_end(tip, "rect")}')

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        """Add a straight line."""
        self._parts.append(f'<line class="{style}" x1="{_at(x1)}" y1="{_at(y1)}" x2="{_at(x2)}" y2="{_at(y2)}"/>')

    def path(self, points: Sequence[tuple[float, float]], style: str) -> None:
        """Add a line through points."""
        places = " ".join(f"{_at(x)},{_at(y)}" for x, y in points)
        self._parts.append(f'<polyline class="{style}" points="{places}"/>')

    def circle(self, x: float, y: float, radius: float, style: str, *, tip: str = "") -> None:
        """Add a dot."""
        self._parts.append(
            f'<circle class="{style}" cx="{_at(x)}" cy="{_at(y)}" r="{_at(radius)}"{_end(tip, "circle")}'
        )

    def text(self, x: float, y: float, text: str, style: str = "label", *, anchor: str = "start") -> None:
        """Add a line of text; `anchor` is start, middle or end."""
        self._parts.append(
            f'<text class="{style}" x="{_at(x)}" y="{_at(y)}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def tick(self, x: float, y: float, text: str) -> None:
        """Add the label of a place on a horizontal axis, kept inside the drawing."""
        half = CHAR_WIDTH * len(text) / 2
        self.text(min(max(x, half), self.width - half), y, text, anchor="middle")

    def render(self) -> str:
        """Return the element."""
        return "\n".join([*self._parts, "</svg>"])


def _at(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _end(tip: str, tag: str) -> str:
    return f"><title>{escape(tip)}</title></{tag}>" if tip else "/>"


Scale = Callable[[float], float]
"""From a value to a coordinate."""


def linear(low: float, high: float, start: float, end: float) -> Scale:
    """Return the scale that takes `low` to `start` and `high` to `end`."""
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    """Return the same with equal distances for equal ratios; values are above 0."""
    inner = linear(math.log(low), math.log(high), start, end)
    return lambda value: inner(math.log(max(value, low)))


def vertical_axis(
    drawing: Drawing, highest: float, label: Callable[[float], str], *, top: float = TOP, unit: float = 1.0
) -> Scale:
    """Draw the grid of an axis upwards from 0 to at least `highest`, in round units, and return its scale."""
    steps = [step * unit for step in round_steps(highest / unit)]
    y = linear(0, steps[-1], drawing.height - BOTTOM, top)
    for value in steps:
        drawing.line(LEFT, y(value), drawing.width - RIGHT, y(value), "axis" if value == 0 else "grid")
        drawing.text(LEFT - 8, y(value) + 4, label(value), anchor="end")
    return y


def label_room(names: Iterable[str]) -> float:
    """Return the width that labels to the left of their rows need."""
    return 16 + CHAR_WIDTH * min(_MAX_LABEL_CHARS, max(map(len, names), default=0))


def cut(name: str) -> str:
    """Return a name that fits into the room of `label_room`."""
    return name if len(name) <= _MAX_LABEL_CHARS else name[: _MAX_LABEL_CHARS - 1] + "…"


def round_steps(top: float, count: int = 4) -> Iterator[float]:
    """Yield about `count` round values (1, 2 or 5 times a power of ten) from 0, the last at or above `top`."""
    step = _round_up(max(top, 1e-9) / count)
    for index in range(math.ceil(top / step - 1e-9) + 1 if top > 0 else 2):
        yield index * step


def _round_up(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * (1 - 1e-9))


def log_ticks(
    low: float, high: float, x: Scale, label: Callable[[float], str], *, is_time: bool = False
) -> list[tuple[float, str]]:
    """
    Return round values between two positive ones, each with its label, for a logarithmic axis.

    The finest of these whose labels do not touch: tens of powers of ten, powers of ten, with 2 and 5 times those,
    every multiple of them, and for values that are close together equal steps.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    powers = [10.0**power for power in range(first, last + 1)]
    sets = [[value for value in powers if round(math.log10(value)) % every == 0] for every in (6, 3, 2, 1)]
    sets += [[factor * power for power in powers for factor in factors] for factors in ((1, 2, 5), range(1, 10))]
    if is_time and high > _MINUTE_S:  # seconds are decimal, minutes and hours are not
        below = [[value for value in values if value < _MINUTE_S] for values in sets]
        sets = [[*values, *_LOG_TIMES[::every]] for values in below for every in (4, 2, 1)]
    for count in (3, 4, 5, 6):
        step = _round_up((high - low) / count)
        sets.append([index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)])
    fitting: list[tuple[float, str]] = []
    for values in sets:
        labels = [(value, label(value)) for value in values if low <= value <= high]
        if len(labels) > len(fitting) and all(_is_apart(x, *pair) for pair in pairwise(labels)):
            fitting = labels
    return fitting


def _is_apart(x: Scale, left: tuple[float, str], right: tuple[float, str]) -> bool:
    return x(right[0]) - x(left[0]) > CHAR_WIDTH * ((len(left[1]) + len(right[1])) / 2 + 1)


_MINUTE_S, _HOUR_S, _DAY_S = 60.0, 3600.0, 86_400.0
_LOG_TIMES = (
    *(_MINUTE_S * count for count in (1, 5, 10, 30)),
    *(_HOUR_S * count for count in (1, 4, 12)),
    *(_DAY_S * count for count in (2, 7, 28, 91, 364, 3640)),
)
"""Round times from a minute on, for a logarithmic axis; every second or fourth where all are too many."""
_TIME_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 4 * 3600, 6 * 3600)
_LONG_STEPS = (12 * 3600, 86400, 2 * 86400, 7 * 86400, 28 * 86400, 91 * 86400, 364 * 86400)


def time_ticks(span_s: float, count: int = 8) -> Iterator[tuple[float, str]]:
    """Yield at most `count` round times from 0 to `span_s` seconds, each with its label."""
    steps = (*_TIME_STEPS, *_LONG_STEPS)
    step = next((step for step in steps if span_s / step < count), steps[-1] * math.ceil(span_s / steps[-1] / count))
    size, unit = next((pair for pair in ((86400, "d"), (3600, "h"), (60, "min")) if step >= pair[0]), (1, "s"))
    for index in range(math.floor(span_s / step + 1e-9) + 1):
        yield index * step, f"{index * step / size:g} {unit}"
