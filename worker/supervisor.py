"""
What happens once a second, without any message: the supervisor.

It lets more messages be leased while a backend is stopped (`flow.shares`; also as soon as a breaker opens), notices a
rotated key or a health path that answers again, lets messages go to another server when theirs has stopped
(`Router.move_waiting`), and checks the share of errors among the recent answers.  It decides nothing about messages.

It also shows the state of routes and models, but only when `/metrics` or `/readyz` asks.  Models are named by
requesters: a route shows at most as many names as it has lanes, for as long as the process lives, and all others
together as `other`.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import msgspec
from msgspec import structs

from worker.flow.circuit import CircuitState
from worker.flow.gate import GateStatistics
from worker.flow.lane import MAX_LANES, SHARED, LaneStatistics
from worker.flow.shares import extra_leases
from worker.pipeline.routes import IntakePause, Router, Target
from worker.ports import Subscriber
from worker.settings.schema import ErrorLimitSettings
from worker.telemetry.error_share import ErrorShare
from worker.telemetry.logs import get_logger
from worker.telemetry.metrics import OTHER, LabelCap, Metrics

TICK_S = 1.0
LEASES_EVERY_S = 0.25
"""How often it is looked whether more messages may be leased, seconds."""
TOO_MANY_ERRORS = "errors"
"""Reason of the intake's pause while most answers are errors of one class."""
_STATES = {CircuitState.CLOSED: 0, CircuitState.HALF_OPEN: 1, CircuitState.OPEN: 2}

_log = get_logger("supervisor")


class ModelState(msgspec.Struct, frozen=True, kw_only=True):
    """What is shown of a model, or of all that are shown together."""

    breaker: CircuitState
    """The worst one of several; so are `error_class` and `failing_share`."""
    error_class: str | None
    window: int
    in_flight: int
    waiting: int
    held: int
    failing_share: float

    @classmethod
    def of(cls, lanes: Sequence[LaneStatistics]) -> Self:
        """Sum lanes up, at least one."""
        worst = max((lane.circuit for lane in lanes), key=lambda circuit: _STATES[circuit.state])
        return cls(
            breaker=worst.state,
            error_class=worst.error_class,
            window=sum(lane.limit for lane in lanes),
            in_flight=sum(lane.in_flight for lane in lanes),
            waiting=sum(lane.waiting for lane in lanes),
            held=sum(lane.held for lane in lanes),
            failing_share=round(max(lane.failing_share for lane in lanes), 3),
        )


class Supervisor:
    """
    Watches the backends and the share of errors.

    Args:
        router: Its routes.
        metrics: Its gauges are set.
        error_share: Counts the answers.
        error_limit: Shares at which an error is logged and the intake is paused.
        intake: Paused at `pause_share`.
        subscriber: Is told how many messages it may lease beyond its limit.
        max_in_flight: That limit.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        router: Router,
        metrics: Metrics,
        error_share: ErrorShare,
        error_limit: ErrorLimitSettings,
        intake: IntakePause,
        *,
        subscriber: Subscriber,
        max_in_flight: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._router = router
        self._targets = router.targets
        self._metrics = metrics
        self._error_share = error_share
        self._error_limit = error_limit
        self._intake = intake
        self._subscriber = subscriber
        self._max_in_flight = max_in_flight
        self._clock = clock
        self._last_check = clock()
        self._labels = {each.name: LabelCap(tuple(each.known_models), MAX_LANES) for each in router.targets}
        self._healthy: dict[str, bool] = {}
        self._key_probed: set[str] = set()
        """Targets that were allowed a probe for their changed key."""
        self._has_warned = False

    async def run(self) -> None:
        """
        Check once a second, for ever, and more often how many messages may be leased.

        Cancellation: leaves nothing behind.
        """
        while True:
            try:
                await self.check()
            except Exception:  # noqa: BLE001 - the checks must go on; the next one sees what this one missed
                self._failed("checking")
            for _ in range(round(TICK_S / LEASES_EVERY_S)):
                await asyncio.sleep(LEASES_EVERY_S)
                self._share_leases()

    async def check(self) -> None:
        """Check once.  Cancellation: leaves nothing behind."""
        now = self._clock()
        elapsed, self._last_check = now - self._last_check, now
        self._check_error_share()
        stopped = [target for target in self._targets if self._is_open(target)]
        for target in stopped:
            self._metrics.paused_seconds_total.labels(target.name).inc(elapsed)
        if stopped:
            self._router.move_waiting()
        self._share_leases()
        # Concurrently: a health path that hangs must not keep the other servers waiting.
        await asyncio.gather(*(self._check_recovery(target) for target in stopped))

    def breaker_changed(self) -> None:
        """Let more messages be leased if what opened keeps some back; to be called on the event loop."""
        asyncio.get_running_loop().call_soon(self._share_leases)  # the gate is not done with the change yet

    def _share_leases(self) -> None:
        loads = (route.load() for route in self._router.routes)
        self._subscriber.allow_extra(extra_leases(loads, self._max_in_flight))

    def _is_open(self, target: Target) -> bool:
        if target.is_open():
            return True
        self._healthy.pop(target.name, None)
        self._key_probed.discard(target.name)
        return False

    def set_gauges(self) -> None:
        """Set the gauges of backends and models to what is the case now; to be called before a scrape."""
        metrics = self._metrics
        for gauge in (
            metrics.model_breaker_state,
            metrics.model_window_limit,
            metrics.model_in_flight,
            metrics.model_waiting_messages,
            metrics.model_held_messages,
            metrics.model_failing_share,
        ):
            gauge.clear()  # models that are no longer remembered
        for target in self._targets:
            gate = target.gate.statistics()
            circuits = [gate.circuit, *(lane.circuit for lane in gate.lanes.values())]
            metrics.window_limit.labels(target.name).set(gate.limit)
            metrics.held_messages.labels(target.name).set(gate.held)
            metrics.breaker_state.labels(target.name).set(max(_STATES[circuit.state] for circuit in circuits))
            for model, state in self._models(target, gate).items():
                labels = target.name, model
                metrics.model_breaker_state.labels(*labels).set(_STATES[state.breaker])
                metrics.model_window_limit.labels(*labels).set(state.window)
                metrics.model_in_flight.labels(*labels).set(state.in_flight)
                metrics.model_waiting_messages.labels(*labels).set(state.waiting)
                metrics.model_held_messages.labels(*labels).set(state.held)
                metrics.model_failing_share.labels(*labels).set(state.failing_share)

    def _models(self, target: Target, gate: GateStatistics) -> dict[str, ModelState]:
        """Return the state of a server's models by the name that they are shown by."""
        lanes: dict[str, list[LaneStatistics]] = {}
        for model, lane in gate.lanes.items():
            if _has_something_to_show(lane):
                label = OTHER if model == SHARED else self._labels[target.name].label(model or None)
                lanes.setdefault(label, []).append(lane)
        return {label: ModelState.of(several) for label, several in lanes.items()}

    async def _check_recovery(self, target: Target) -> None:
        try:
            if target.backend.credentials_changed():
                if target.name not in self._key_probed:  # one probe is enough, however long until a message comes
                    self._key_probed.add(target.name)
                    _log.info("credentials_changed", backend=target.name)
                    target.gate.allow_probe()
                return
            self._key_probed.discard(target.name)
            is_healthy = await target.backend.probe()
        except Exception:  # noqa: BLE001 - one server's fault must not hide the others from the supervisor
            self._failed(f"checking {target.name}")
            return
        if is_healthy and not self._healthy.get(target.name, False):
            _log.info("health_check_passed", backend=target.name)
            target.gate.allow_probe()
        self._healthy[target.name] = bool(is_healthy)

    def _failed(self, what: str) -> None:
        """Log an unforeseen exception; called while it is handled."""
        self._metrics.internal_errors_total.inc()
        _log.exception("supervisor_failed", while_=what)

    def _check_error_share(self) -> None:
        settings, dominant = self._error_limit, self._error_share.dominant()
        self._metrics.error_answer_share.clear()
        share = 0.0
        if dominant is not None and self._error_share.answers >= settings.min_answers:
            share = dominant.share
            self._metrics.error_answer_share.labels(dominant.error_class).set(round(share, 4))
            if share >= settings.warn_share and not self._has_warned:
                _log.error("error_share_high", error_class=dominant.error_class, share=round(share, 3))
        self._has_warned = share >= settings.warn_share
        if settings.pause_share is not None:
            self._intake.set(TOO_MANY_ERRORS, holds=share >= settings.pause_share)

    def details(self) -> dict[str, Any]:
        """Return what `/readyz` shows beside its verdict."""
        dominant = self._error_share.dominant()
        backends = {}
        for target in self._targets:
            gate = target.gate.statistics()
            backends[target.name] = {
                "breaker": gate.circuit.state.value,
                "error_class": gate.circuit.error_class,
                "models": {model: structs.asdict(state) for model, state in self._models(target, gate).items()},
                "window": gate.limit,
                "in_flight": gate.in_flight,
                "waiting": gate.waiting,
                "held": gate.held,
                "failing_share": round(gate.failing_share, 3),
            }
        errors = None
        if dominant is not None:
            errors = {
                "error_class": dominant.error_class,
                "share": round(dominant.share, 3),
                "answers": dominant.count,
            }
        return {"backends": backends, "intake_paused_by": list(self._intake.reasons), "errors": errors}


def _has_something_to_show(lane: LaneStatistics) -> bool:
    """Say whether the lane is more than a name: one that a backend refused at once must not use up a label."""
    circuit = lane.circuit
    is_pristine = circuit.state is CircuitState.CLOSED and circuit.failures == 0
    return not is_pristine or lane.in_flight > 0 or lane.waiting > 0 or lane.window.served > 0
