"""
Reads the metrics of gates again and again, and tells the route's targets which part of their windows they may use.

What a reading means is in `flow.metric_gate`.  A reading that fails changes nothing until the last good one is too old;
then the side holds that the settings name, as it does before the first reading.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from worker.errors import MetricSourceError
from worker.flow.clock import Now
from worker.flow.metric_gate import MetricGate, MetricSignal
from worker.pipeline.routes import Target
from worker.ports import MetricSource
from worker.settings.schema import Settings
from worker.telemetry.logs import StateLog, get_logger
from worker.telemetry.metrics import Metrics

_log = get_logger("metric_gate")
_state_log = StateLog("metric_gate")


class MetricGateLoop:
    """
    One gate: its source, and the targets that it is for.

    Args:
        source: Of the numbers.
        gate: What they mean.
        targets: At least one; their gates get the part.
        metrics: Show part, numbers and failed readings, for each target.
        interval_s: Between two readings, seconds.
        is_open_without: Names the side without data in the log.
    """

    def __init__(
        self,
        source: MetricSource,
        gate: MetricGate,
        targets: Sequence[Target],
        metrics: Metrics,
        *,
        interval_s: float,
        is_open_without: bool,
    ) -> None:
        self.targets = tuple(targets)
        self._source = source
        self._gate = gate
        self._metrics = metrics
        self._interval_s = interval_s
        self._side = "open" if is_open_without else "closed"
        self._values: Sequence[float] = ()
        self._error: str | None = None
        """Of the last reading; `None` after a good one, and before the first."""
        self._told_reason: str | None = None
        """Why there is no recent reading, as it was told last; `None` while there is one."""
        self._part = gate.part()
        self._apply()

    async def run(self) -> None:
        """
        Read and apply, for ever.

        Cancellation: leaves the part as it is.
        """
        while True:
            await self.read()
            await asyncio.sleep(self._interval_s)

    async def read(self) -> None:
        """Read once, and apply what that means.  Cancellation: closes the connection; nothing is applied."""
        try:
            values = await self._source.read()
            self._gate.take(values, sum(target.gate.in_flight for target in self.targets))
        except MetricSourceError as error:
            self._failed(error.reason, error.detail)
        except Exception as error:  # noqa: BLE001 - without readings the gate would hold its last part for ever
            self._metrics.internal_errors_total.inc()
            _log.exception("metric_gate_broken", backend=self._name)
            self._failed("internal", repr(error))
        else:
            self._succeeded(values)
        self._apply()

    def details(self) -> dict[str, Any]:
        """Return what `/readyz` shows of it."""
        age_s = self._gate.age_s
        return {
            "part": round(self._part, 3),
            "is_stale": self._gate.is_stale,
            "age_s": None if age_s is None else round(age_s, 1),
            "values": dict(zip((each.name for each in self._gate.signals), self._values, strict=False)),
            "error": self._error,
        }

    @property
    def _name(self) -> str:
        """The target's, or that of the route for several."""
        return self.targets[0].name if len(self.targets) == 1 else self.targets[0].name.rpartition("/")[0]

    def _succeeded(self, values: Sequence[float]) -> None:
        self._values = values
        if self._told_reason is not None:
            _state_log.info("metric_gate_recovered", backend=self._name)
        self._error = self._told_reason = None
        for target in self.targets:
            for signal, value in zip(self._gate.signals, values, strict=True):
                self._metrics.metric_gate_value.labels(target.name, signal.name).set(value)

    def _failed(self, reason: str, detail: str) -> None:
        for target in self.targets:
            self._metrics.metric_gate_failures_total.labels(target.name, reason).inc()
        if self._gate.is_stale and self._told_reason != reason:
            self._told_reason = reason
            _log.error("metric_gate_stale", backend=self._name, error=detail, gate=self._side)
        elif self._error is None:
            _log.warning("metric_gate_read_failed", backend=self._name, error=detail)
        self._error = detail

    def _apply(self) -> None:
        before, self._part = self._part, self._gate.part()
        if (before > 0.0) != (self._part > 0.0):
            _log.info("metric_gate_opened" if self._part > 0.0 else "metric_gate_closed", backend=self._name)
        for target in self.targets:
            target.gate.set_part(self._part)
            self._metrics.metric_gate_part.labels(target.name).set(self._part)
            self._metrics.metric_gate_stale.labels(target.name).set(int(self._gate.is_stale))


def build_metric_gates(
    settings: Settings, sources: Mapping[str, MetricSource], targets: Sequence[Target], metrics: Metrics, *, now: Now
) -> list[MetricGateLoop]:
    """
    Return the gates of all routes: one for all servers of a route, or one for each where each has its own metrics.

    Args:
        settings: Free of conflicts.
        sources: By the name of the route, or of the target.
        targets: Of all routes.
        metrics: See `MetricGateLoop`.
        now: Monotonic seconds.
    """
    by_name = {target.name: target for target in targets}
    loops = []
    for route in settings.all_routes():
        gate = route.metric_gate
        names = [each.name for each in route.targets()]
        groups = {route.name: names} if route.name in sources else {name: [name] for name in names}
        for source, gated in groups.items() if gate.is_used else ():
            is_open = gate.without_data == "open"
            rule = MetricGate(
                [
                    MetricSignal(
                        name=name,
                        whole_at=signal.whole_at,
                        closed_at=signal.closed_at,
                        is_without_own=signal.without_own,
                    )
                    for name, signal in gate.named_signals()
                ],
                is_open_without=is_open,
                stale_after_s=gate.stale_after_s,
                rise_s=gate.rise_s,
                now=now,
            )
            of_source = [by_name[name] for name in gated]
            loop = MetricGateLoop(
                sources[source], rule, of_source, metrics, interval_s=gate.interval_s, is_open_without=is_open
            )
            loops.append(loop)
    return loops
