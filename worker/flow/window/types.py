"""
The values of the adaptive window: what goes in, what comes out, and the constants of its rule.

`docs/adaptive-window.md` has the measurements the constants were chosen by.
"""

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowTuning:
    """
    The constants of the rule.

    House decisions all, made with `benchmarks/window.py`; every one may be off by half without missing its targets.
    """

    grow_below: float = 0.10
    """Share of the window that waits in the backend, below which it grows; one request at least."""
    target: float = 0.15
    """Share that is left waiting when it shrinks: the backend never runs dry between an answer and the next request."""
    shrink_above: float = 0.25
    """Share that waits, above which it shrinks; two requests at least.  Below it lies the noise of a quarter flight."""
    strong: float = 0.50
    """Share that waits, for which 8 answers are enough to shrink."""
    least_keep: float = 0.25
    """What one decrease leaves of the window at least, whatever was measured."""
    growth: tuple[float, ...] = (1.0, 1.5, 2.0)
    """Factors of growth after growth that met no limit, each at least one more; the last one is slow start's."""
    round_share: float = 0.25
    """Answers that let the window grow, as a share of it; twice as many are needed to stay or to shrink."""
    round_least: int = 4
    """... and at least so many, or as many as the window has slots."""
    patience_s: float = 3.0
    """Mean time of an answer above which growth no longer waits for whole rounds, unless first bytes are reported.
    Five steps of growth that each wait for such an answer are more than the ten seconds a change may take."""
    dip: float = 0.10
    """How far below its queue the window drops to see the times without one, as a share of itself."""
    dip_every_s: float = 20.0
    """How often, seconds; ten times the mean time of an answer when that is longer."""
    pour_s: float = 1.0
    """Longest time over which new room is poured out, seconds; half the mean time of an answer when that is shorter."""
    refused_keep: tuple[float, ...] = (0.9, 0.75, 0.5)
    """What the first, second, and every further refusal of a row leaves of the window."""
    credit: float = 0.0065
    """What a good answer earns towards one refusal: with those of a falling capacity it stays below 1 % refused."""
    probe_every_s: float = 30.0
    """So often a refusal is risked without credit, seconds: few answers must not mean blindness."""


class Outcome(StrEnum):
    """How an attempt ended, as far as capacity is concerned."""

    OK = "ok"
    """Served."""
    OVERLOAD = "overload"
    """Refused for lack of capacity."""
    NEUTRAL = "neutral"
    """Anything else; says nothing about capacity."""


@dataclass(slots=True, eq=False)
class Ticket:
    """One attempt under way; made by `AdaptiveWindow.start`, ended by `finish`."""

    number: int
    started_at: float
    in_flight: int
    """Attempts under way at its start, itself included."""
    first_byte_s: float | None = None
    finished: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowStatistics:
    """A window at one instant."""

    limit: int
    """Attempts that may run at once now."""
    in_flight: int
    minimum: int
    maximum: int
    closed_until: float | None
    """Monotonic seconds until which nothing starts (Retry-After); `None` while open."""
    slow_start: bool
    """Still doubling: no limit of the backend was met yet."""
    waiting_share: float
    """Share of the window that was last found waiting in the backend, 0 to 1."""
    wait_s: float
    """How long it waited, seconds."""
    served: int
    rejected: int
    increases: int
    decreases: int
