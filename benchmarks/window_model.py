"""What a simulation of the window is told, what it asks a rule, and what it measures."""

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

from worker.flow.window.adaptive import Outcome


class Rule(Protocol):
    """What a worker asks about concurrency; `worker.flow.AdaptiveWindow` has exactly these."""

    @property
    def limit(self) -> int: ...
    @property
    def in_flight(self) -> int: ...
    def has_room(self) -> bool: ...
    def opens_at(self) -> float | None: ...
    def reopen(self) -> None: ...
    def start(self, *, streamed: bool) -> Any: ...
    def first_byte(self, ticket: Any) -> None: ...
    def is_refusal_fresh(self, ticket: Any) -> bool: ...
    def finish(self, ticket: Any, outcome: Outcome, *, work: float | None, pause_s: float | None) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The backend from one instant on."""

    seconds: float
    capacity: int
    """0: it refuses connections, and what was running is lost."""
    storm: bool = False
    """It refuses everything new with a 429, and finishes what it has."""
    sizes: str | None = None
    """Sizes of the requests that start from now on; `None`: the scenario's."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One experiment."""

    name: str
    sizes: str
    """`short`, `llm` or `mixed`."""
    phases: tuple[Phase, ...]
    queue: float = math.inf
    """Requests that wait, as a multiple of the capacity."""
    retry_after_s: float | None = None
    streamed: bool = False
    """The worker sees the first byte."""
    tokens: bool = True
    """The worker sees the size of the answer."""
    connections: bool = True
    """The worker sees that a probe was connected; the breaker closes then if refused connections had opened it."""
    slowdown: float = 0.0
    """A request's time grows by this share for every other that runs."""
    sharing: bool = False
    """No queue: everything runs at once and shares the capacity."""
    workers: int = 1

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)


@dataclass
class PhaseResult:
    """What was measured in one phase."""

    work: float = 0.0
    found_s: float | None = None


@dataclass
class Result:
    """What was measured in one run."""

    phases: list[PhaseResult] = field(default_factory=list)
    served: int = 0
    rejected: int = 0
    waited_s: float = 0.0
    served_by: list[int] = field(default_factory=list)
    trace: list[tuple[float, int, int, int, int]] = field(default_factory=list)
    """(time, limit, running, queued, capacity), once a second."""

    @property
    def work(self) -> float:
        return sum(phase.work for phase in self.phases)

    @property
    def rejected_share(self) -> float:
        return self.rejected / max(1, self.rejected + self.served)

    @property
    def mean_wait_s(self) -> float:
        return self.waited_s / max(1, self.served)
