"""How numbers are written for people, in the text and on the page alike.  Pure."""

import math

from worker.client.report.results import Percentile

NOTHING = "-"
"""Not known, or too few values."""
WEAK = "*"
"""Behind a percentile that few values lie beyond."""


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
    """Return a share of 0 to 1 in percent; what is not nothing is never shown as nothing."""
    percent = value * 100
    if 0 < percent < 0.1:  # noqa: PLR2004 - the smallest that one decimal can show
        return "<0.1 %"
    return f"{percent:.1f} %"


def percentile(found: Percentile | None) -> str:
    """Return a percentile in seconds, marked when it is weak."""
    return NOTHING if found is None else amount(found.value) + (WEAK if found.is_weak else "")


def span(seconds: float | None) -> str:
    """Return a duration in the unit that suits it."""
    if seconds is None:
        return NOTHING
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{amount(seconds)} s"
