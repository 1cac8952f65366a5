"""
Routes: which backend a request goes to, and the gate in front of each.

Routes are tried in the order of the settings; the first whose patterns all match takes the request.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from worker.flow.breaker import Breaker
from worker.flow.circuit import CircuitConfig, CircuitState, CircuitStatistics, ProbeSchedule
from worker.flow.clock import Clock
from worker.flow.gate import RouteGate
from worker.flow.window.adaptive import AdaptiveWindow
from worker.ports import Backend
from worker.settings.schema import RouteMatch, RouteSettings


@dataclass(slots=True, eq=False)
class Route:
    """One backend with its gate."""

    name: str
    backend: Backend
    gate: RouteGate
    clock: Clock
    match: RouteMatch = field(default_factory=RouteMatch)
    forbidden_in_a_row: int = 0
    """403s without a success between them; three say that our credentials are refused, not one request."""

    def breaker(self) -> CircuitStatistics:
        """Return a snapshot of the route's breaker."""
        return self.gate.statistics().breaker.route

    def is_open(self) -> bool:
        """Whether the breaker keeps attempts back."""
        return self.breaker().state is not CircuitState.CLOSED

    def blocked_by(self, model: str | None) -> CircuitStatistics | None:
        """Return the circuit that keeps a model's attempts back: the route's, else the model's own; `None`: none."""
        breaker = self.gate.statistics().breaker
        own = breaker.models.get(model) if model is not None else None
        for circuit in (breaker.route, own):
            if circuit is not None and circuit.state is not CircuitState.CLOSED:
                return circuit
        return None

    def takes(self, model: str | None, path: str) -> bool:
        """Whether every list of patterns that is given matches."""
        if self.match.models and not any(fnmatchcase(model or "", pattern) for pattern in self.match.models):
            return False
        return not self.match.paths or any(fnmatchcase(path, pattern) for pattern in self.match.paths)


class Router:
    """Finds the route of a request; remembers nothing about requests."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self.routes = tuple(routes)

    def find(self, model: str | None, path: str) -> Route | None:
        """Return the first route that takes it, `None` when there is none."""
        for route in self.routes:
            if route.takes(model, path):
                return route
        return None


def build_route(settings: RouteSettings, backend: Backend, clock: Clock) -> Route:
    """Return a route with its window and breaker behind a gate; `clock` is that of the running event loop."""
    window, breaker = settings.window, settings.breaker
    probe = ProbeSchedule(breaker.probe_interval_s, breaker.max_probe_interval_s)
    gate = RouteGate(
        AdaptiveWindow(window.initial, window.min, window.max, now=clock.now),
        Breaker(CircuitConfig(failures=breaker.failures, probe=probe), now=clock.now),
        clock,
    )
    return Route(name=settings.name, backend=backend, gate=gate, clock=clock, match=settings.match)


class Intake:
    """
    Whether messages may be started at all, for reasons that concern the whole worker.

    Each reason pauses every gate; they open again when the last reason is gone.  Attempts under way go on, leases are
    kept, and since no slot frees, the broker's flow control stops the pull by itself.

    Args:
        routes: Their gates are paused and resumed.
        on_change: Called with a reason and whether it holds now.
    """

    def __init__(self, routes: Iterable[Route], on_change: Callable[[str, bool], None]) -> None:
        self._gates = [route.gate for route in routes]
        self._on_change = on_change
        self._reasons: set[str] = set()

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why nothing is started; empty while open."""
        return tuple(sorted(self._reasons))

    def set(self, reason: str, holds: bool) -> None:
        """Add or remove a reason; idempotent."""
        if holds == (reason in self._reasons):
            return
        if holds:
            self._reasons.add(reason)
        else:
            self._reasons.discard(reason)
        self._on_change(reason, holds)
        for gate in self._gates:
            if self._reasons:
                gate.pause()
            else:
                gate.resume()
