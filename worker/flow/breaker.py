"""
The breaker of one route: a circuit for the backend and, where a failure concerns one model only, one for that model.

An attempt starts when both allow it.  Names of models come from requesters, so nothing is remembered of a model that
works: a circuit exists from a model's first failure until it is closed again, and there are at most `MAX_MODELS` of
them.  A failure of one model says nothing about the route; a success is one of the route and of the model.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from worker.flow.circuit import Circuit, CircuitConfig, CircuitState, CircuitStatistics, Pass
from worker.flow.clock import Now

MAX_MODELS = 256
"""House decision: far above the models one backend serves; those beyond it have no circuit, and fail one by one."""

CONNECT = "connect"
"""The error class of a connection that was refused or not made."""


class BreakerEffect(StrEnum):
    """What the end of an attempt says about the backend."""

    SUCCESS = "success"
    """It works: closes the breaker, ends the row of failures."""
    NONE = "none"
    """Nothing."""
    COUNT = "count"
    """One more failure in a row."""
    TRIP = "trip"
    """It cannot work now: opens at once."""


class BreakerScope(StrEnum):
    """What an open breaker stops."""

    ROUTE = "route"
    MODEL = "model"


@dataclass(frozen=True, slots=True)
class BreakerPass:
    """The right to make one attempt; `Breaker.report` takes it at the end."""

    route: Pass
    model: str | None
    model_pass: Pass | None
    """`None` when no circuit existed for the model at the start."""
    model_closes: int
    """How many model circuits had closed by the start: shows that a failure is older than the recovery."""

    @property
    def is_probe(self) -> bool:
        """Whether the attempt is a probe of the route."""
        return self.route.is_probe

    @property
    def is_any_probe(self) -> bool:
        """Whether the attempt is a probe, of the route or of its model."""
        return self.route.is_probe or (self.model_pass is not None and self.model_pass.is_probe)


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerStatistics:
    """A breaker at one instant."""

    route: CircuitStatistics
    models: Mapping[str, CircuitStatistics]
    """Only models with failures in a row or an open circuit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerChange:
    """A circuit that was closed opened, or one that was open closed."""

    model: str | None
    """Whose circuit; `None`: the route's."""
    error_class: str
    """Why it opened, or last stayed open."""
    open_s: float | None
    """How long it was open, seconds; `None`: it opened."""


class Breaker:
    """
    Decides whether an attempt on a route may start.

    Args:
        config: Thresholds, the same for route and models.
        now: Monotonic seconds.
        jitter: Uniform numbers in [0, 1); see `Circuit`.
        on_change: Called when a circuit opens or closes, before the report that caused it returns; raises nothing and
            does not call the breaker.
    """

    def __init__(
        self,
        config: CircuitConfig | None = None,
        *,
        now: Now,
        jitter: Callable[[], float] = random.random,
        on_change: Callable[[BreakerChange], None] | None = None,
    ) -> None:
        self._config = config or CircuitConfig()
        self._now = now
        self._jitter = jitter
        self._on_change = on_change
        self._route = Circuit(self._config, now, jitter=jitter)
        self._models: dict[str, Circuit] = {}
        self._model_closes = 0

    @property
    def is_closed(self) -> bool:
        """Whether the route's circuit is closed, so that an attempt is no probe of it."""
        return self._route.state is CircuitState.CLOSED

    def allows_route(self) -> bool:
        """Whether the route's circuit lets an attempt start now."""
        return self._route.allows()

    def allows_model(self, model: str | None) -> bool:
        """Whether the model's circuit, if there is one, lets an attempt start now."""
        circuit = self._models.get(model) if model is not None else None
        return circuit is None or circuit.allows()

    def stopping(self, model: str | None) -> CircuitStatistics | None:
        """Return the circuit that keeps a model's attempts back: the route's, else the model's; `None` while closed."""
        for circuit in (self._route, self._models.get(model) if model is not None else None):
            if circuit is not None and circuit.state is not CircuitState.CLOSED:
                return circuit.statistics()
        return None

    def route_changes_at(self) -> float | None:
        """Return the instant from which the route allows an attempt without any report; `None` while closed."""
        return self._route.changes_at()

    def model_changes_at(self, model: str) -> float | None:
        """Return the same instant for one model's circuit; `None` while it is closed or does not exist."""
        circuit = self._models.get(model)
        return circuit.changes_at() if circuit is not None else None

    def enter(self, model: str | None = None) -> BreakerPass:
        """
        Begin an attempt.

        Raises:
            RuntimeError: It is not allowed; an error of the caller.
        """
        circuit = self._models.get(model) if model is not None else None
        if circuit is not None and not circuit.allows():
            raise RuntimeError("the model's circuit is open")
        model_pass = circuit.enter() if circuit is not None else None
        return BreakerPass(self._route.enter(), model, model_pass, self._model_closes)

    def report(
        self,
        token: BreakerPass,
        effect: BreakerEffect,
        *,
        error_class: str = "",
        scope: BreakerScope = BreakerScope.ROUTE,
        retry_after_s: float | None = None,
    ) -> bool:
        """
        Report the end of an attempt.

        Returns:
            Whether a circuit that was open is closed now, so that the attempts it kept back may start.
        """
        if effect is BreakerEffect.SUCCESS:
            model_closed = self._record_model_success(token)
            return self._record_success(None, self._route, token.route) or model_closed
        if effect is BreakerEffect.NONE:
            self._route.record_ignored(token.route)
            self._record_model_ignored(token)
            return False
        trip = effect is BreakerEffect.TRIP
        if scope is BreakerScope.MODEL and token.model is not None:
            self._route.record_ignored(token.route)
            self._record_model_failure(token, error_class, trip=trip, retry_after_s=retry_after_s)
        else:
            self._record_failure(None, self._route, token.route, error_class, trip=trip, retry_after_s=retry_after_s)
            self._record_model_ignored(token)
        return False

    def connected(self, token: BreakerPass) -> bool:
        """Report that a connection stands; return whether that closed a route opened by refused connections."""
        if self._route.error_class != CONNECT:
            return False
        return self._record_success(None, self._route, token.route)

    def allow_probe(self) -> None:
        """Allow a probe of the route and of every model at once."""
        for circuit in (self._route, *self._models.values()):
            circuit.allow_probe()

    def statistics(self) -> BreakerStatistics:
        """Return a snapshot."""
        return BreakerStatistics(
            route=self._route.statistics(),
            models={name: circuit.statistics() for name, circuit in self._models.items()},
        )

    def _record_success(self, model: str | None, circuit: Circuit, token: Pass) -> bool:
        error_class, opened_at = circuit.error_class, circuit.opened_at
        has_closed = circuit.record_success(token)
        if has_closed and self._on_change is not None and opened_at is not None:
            open_s = self._now() - opened_at
            self._on_change(BreakerChange(model=model, error_class=error_class or "", open_s=open_s))
        return has_closed

    def _record_failure(
        self,
        model: str | None,
        circuit: Circuit,
        token: Pass,
        error_class: str,
        *,
        trip: bool,
        retry_after_s: float | None,
    ) -> None:
        was_closed = circuit.opened_at is None
        circuit.record_failure(token, error_class, trip=trip, retry_after_s=retry_after_s)
        if was_closed and self._on_change is not None and circuit.opened_at is not None:
            self._on_change(BreakerChange(model=model, error_class=error_class, open_s=None))

    def _record_model_success(self, token: BreakerPass) -> bool:
        circuit = self._models.get(token.model) if token.model is not None else None
        if circuit is None or token.model is None or token.model_pass is None:
            return False
        closed = self._record_success(token.model, circuit, token.model_pass)
        self._model_closes += closed
        if circuit.is_pristine:
            del self._models[token.model]
        return closed

    def _record_model_ignored(self, token: BreakerPass) -> None:
        circuit = self._models.get(token.model) if token.model is not None else None
        if circuit is not None and token.model_pass is not None:
            circuit.record_ignored(token.model_pass)

    def _record_model_failure(
        self, token: BreakerPass, error_class: str, *, trip: bool, retry_after_s: float | None
    ) -> None:
        assert token.model is not None
        if token.model_pass is None and token.model_closes != self._model_closes:
            return
        circuit = self._models.get(token.model)
        if circuit is None:
            if len(self._models) >= MAX_MODELS and not self._forget_one():
                return
            circuit = self._models[token.model] = Circuit(self._config, self._now, jitter=self._jitter)
        # An attempt that began before the circuit existed counts in its first generation and in no later one.
        model_pass = token.model_pass or Pass(0, is_probe=False)
        self._record_failure(token.model, circuit, model_pass, error_class, trip=trip, retry_after_s=retry_after_s)

    def _forget_one(self) -> bool:
        """Forget the oldest model that is only counting; open circuits are kept."""
        for name, circuit in self._models.items():
            if circuit.state is CircuitState.CLOSED:
                del self._models[name]
                return True
        return False
