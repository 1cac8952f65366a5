"""The values of the gate: what the end of an attempt says, and what can be seen from outside."""

from dataclasses import dataclass

from worker.flow.breaker import BreakerEffect, BreakerScope, BreakerStatistics
from worker.flow.window.types import WindowStatistics


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptSignal:
    """What the end of one attempt says about the backend."""

    breaker: BreakerEffect = BreakerEffect.NONE
    """Applied as it is.  `SUCCESS` also counts as served for the window."""
    overload: bool = False
    """The backend refused for lack of capacity: the window decreases."""
    pause_s: float | None = None
    """Of an overload: how long the window admits nothing, seconds; `None` for no pause."""
    error_class: str = ""
    """Shown while the breaker is open."""
    scope: BreakerScope = BreakerScope.ROUTE
    retry_after_s: float | None = None
    """The server's Retry-After for the breaker's next probe, seconds."""
    work: float | None = None
    """Size of the answer, for example output tokens; `None` when unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateStatistics:
    """A gate at one instant."""

    window: WindowStatistics
    breaker: BreakerStatistics
    in_flight: int
    """Permits not finished."""
    waiting: int
    """Callers of `admit` that wait, held ones included."""
    held: int
    """... of them messages that were tried before (`AdmissionOrder.held`)."""
    paused: bool
    """Stopped by `pause`."""
    closed: bool
