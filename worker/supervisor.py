"""
The worker's slow pulse: once a second it looks at what changes without any message.

Gauges of windows and breakers, a rotated key, a health path that answers again, and the share of errors among the
answers of the last minutes.  It decides nothing about messages.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from worker.flow.circuit import CircuitState
from worker.pipeline.routes import Intake, Route
from worker.settings.schema import DamageSettings
from worker.telemetry.error_share import DamageMeter
from worker.telemetry.logs import get_logger
from worker.telemetry.metrics import Metrics

TICK_S = 1.0
DAMAGED = "errors"
"""The intake's reason while most answers are errors of one class."""
_STATES = {CircuitState.CLOSED: 0, CircuitState.HALF_OPEN: 1, CircuitState.OPEN: 2}

_log = get_logger("supervisor")


class Supervisor:
    """
    Looks after routes and intake.

    Args:
        routes: What is looked at.
        metrics: Gauges.
        damage: Share of errors.
        settings: From which share on something is done about it.
        intake: Paused when that share is reached and the operator wants it.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        routes: tuple[Route, ...],
        metrics: Metrics,
        damage: DamageMeter,
        settings: DamageSettings,
        intake: Intake,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._routes = routes
        self._metrics = metrics
        self._damage = damage
        self._settings = settings
        self._intake = intake
        self._clock = clock
        self._looked_at = clock()
        self._healthy: dict[str, bool] = {}
        self._probe_allowed: set[str] = set()
        """Routes on which a probe was allowed for the present key."""
        self._is_warned = False

    async def run(self) -> None:
        """
        Look once a second, for ever.

        Cancellation: leaves nothing behind.
        """
        while True:
            try:
                await self.look()
            except Exception:  # noqa: BLE001 - the pulse must go on; what it missed once it sees the next time
                self._failed("looking around")
            await asyncio.sleep(TICK_S)

    async def look(self) -> None:
        """Look once."""
        now = self._clock()
        elapsed, self._looked_at = now - self._looked_at, now
        self._look_at_damage()
        for route in self._routes:
            self._gauge(route, elapsed)
        # At once and each for itself: a health path that hangs must not keep the other routes waiting.
        await asyncio.gather(*(self._look_for_recovery(route) for route in self._routes if self._is_open(route)))

    def _is_open(self, route: Route) -> bool:
        if route.is_open():
            return True
        self._healthy.pop(route.name, None)
        self._probe_allowed.discard(route.name)
        return False

    def _gauge(self, route: Route, elapsed: float) -> None:
        gate = route.gate.statistics()
        self._metrics.window_limit.labels(route.name).set(gate.window.limit)
        self._metrics.held_messages.labels(route.name).set(gate.held)
        self._metrics.breaker_state.labels(route.name).set(_STATES[gate.breaker.route.state])
        if gate.breaker.route.state is not CircuitState.CLOSED:
            self._metrics.paused_seconds_total.labels(route.name).inc(elapsed)

    async def _look_for_recovery(self, route: Route) -> None:
        try:
            if route.backend.credentials_changed():
                if (
                    route.name not in self._probe_allowed
                ):  # one probe will tell, however long it takes until a message comes
                    self._probe_allowed.add(route.name)
                    _log.info("credentials_changed", backend=route.name)
                    route.gate.allow_probe()
                return
            self._probe_allowed.discard(route.name)
            is_healthy = await route.backend.probe()
        except Exception:  # noqa: BLE001 - one route's fault must not hide the others from the supervisor
            self._failed(f"looking after {route.name}")
            return
        if is_healthy and not self._healthy.get(route.name, False):
            _log.info("health_check_passed", backend=route.name)
            route.gate.allow_probe()
        self._healthy[route.name] = bool(is_healthy)

    def _failed(self, what: str) -> None:
        """Write down an exception nobody foresaw; called while it is handled."""
        self._metrics.internal_errors_total.inc()
        _log.exception("supervisor_failed", while_=what)

    def _look_at_damage(self) -> None:
        settings, damage = self._settings, self._damage.dominant()
        self._metrics.error_answer_share.clear()
        is_much = damage is not None and self._damage.answers >= settings.min_answers
        if damage is not None and is_much:
            self._metrics.error_answer_share.labels(damage.error_class).set(round(damage.share, 4))
        is_over = damage is not None and is_much and damage.share >= settings.warn_share
        if is_over and not self._is_warned and damage is not None:
            _log.error("error_share_high", error_class=damage.error_class, share=round(damage.share, 3))
        self._is_warned = is_over
        if settings.pause_share is not None:
            pause = damage is not None and is_much and damage.share >= settings.pause_share
            self._intake.set(DAMAGED, holds=pause)

    def details(self) -> dict[str, Any]:
        """Return what `/readyz` shows beside its verdict."""
        damage = self._damage.dominant()
        backends = {}
        for route in self._routes:
            gate = route.gate.statistics()
            backends[route.name] = {
                "breaker": gate.breaker.route.state.value,
                "error_class": gate.breaker.route.error_class,
                "models": {
                    model: {"breaker": circuit.state.value, "error_class": circuit.error_class}
                    for model, circuit in gate.breaker.models.items()
                    if circuit.state is not CircuitState.CLOSED
                },
                "window": gate.window.limit,
                "in_flight": gate.in_flight,
                "waiting": gate.waiting,
                "held": gate.held,
            }
        errors = None
        if damage is not None:
            errors = {"error_class": damage.error_class, "share": round(damage.share, 3), "answers": damage.count}
        return {"backends": backends, "intake_paused_by": list(self._intake.reasons), "errors": errors}
