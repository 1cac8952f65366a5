"""What a simulation of the window is told, what it asks a rule, and what it measures."""

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

from worker.emulators.openai.engine_model import EngineModel
from worker.flow.circuit import Pass
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
    others_per_s: float = 0.0
    """Requests a second that other clients send to the engine."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One experiment."""

    name: str
    sizes: str
    """A kind that `window_sim.size` knows."""
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
    engine: EngineModel | None = None
    """The backend is this engine; `capacity` is then the window that it is best asked with."""
    workers: int = 1
    leased: int = 256
    """Messages that a worker leases at once."""

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)


@dataclass(frozen=True, kw_only=True)
class Size:
    """The size of one request."""

    seconds: float = 0.0
    """What it needs alone on an idle backend with slots, after its first byte."""
    prompt: int = 0
    """Tokens of its prompt, for an engine."""
    tokens: float
    """Tokens of its answer."""


class Owner(Protocol):
    """The worker that sends a request."""

    def fill(self) -> None: ...
    def connect(self, request: "Request") -> None: ...
    def begin(self, request: "Request") -> None: ...
    def end(self, request: "Request", outcome: Outcome, retry_after_s: float | None = None) -> None: ...


@dataclass(eq=False)
class Request:
    """One message, through all its attempts."""

    owner: Owner
    size: Size
    attempts: int = 0
    sent_at: float = 0.0
    ticket: Any = None
    circuit_pass: Pass | None = None


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
