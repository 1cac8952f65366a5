"""
Composition root and lifecycle: build, run, drain, close.  The only file that knows every part.

`Service.run` returns the process's exit code:

* 0: stopped by `stop` (SIGTERM, SIGINT) and drained.
* 1: the subscription or the topic is gone or refused; what ran was finished first.
* 2: the settings cannot be used (raised as `SettingsError` before anything was leased).

Start-up failures are told in one line on `/startupz` and in the log.
"""

import asyncio
import functools
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from prometheus_client import ProcessCollector

from worker.backends.metric_source import HttpMetricSource
from worker.backends.openai import HttpBackend
from worker.brokers.connection import Broker, source_of
from worker.delivery import Limits
from worker.errors import BrokerResourceError, SettingsError, how_to_get
from worker.flow.clock import LoopClock, wait_for
from worker.flow.lane import BreakerChange
from worker.flow.queue import Share
from worker.pipeline.attempt import Attempts
from worker.pipeline.cancels import Cancels
from worker.pipeline.dead_letters import DeadLetters
from worker.pipeline.dedupe import Deduper, build_store
from worker.pipeline.metric_gates import MetricGateLoop, build_metric_gates
from worker.pipeline.processor import Processor, Rules
from worker.pipeline.referenced_bodies import ReferencedBodies
from worker.pipeline.replies import Replier
from worker.pipeline.routes import IntakePause, Router, build_routes
from worker.pipeline.tenants import LimitStore, Tenants, build_limits
from worker.policy.engine import load_policy
from worker.policy.hook import HookOutcome, HookReport
from worker.policy.prices import Price, PriceTable
from worker.ports import Payloads, Publisher, Subscriber
from worker.settings.conflicts import section_of
from worker.settings.schema import RequestSettings, RouteSettings, Settings
from worker.supervisor import Supervisor
from worker.telemetry.error_share import ErrorShare
from worker.telemetry.logs import StateLog, get_logger
from worker.telemetry.metrics import Metrics
from worker.telemetry.probes import Probes
from worker.telemetry.record import Recorder
from worker.telemetry.tracing import Tracer
from worker.wire.control import CancelRequest

if TYPE_CHECKING:
    from worker.brokers.control import ControlListener
from worker.wire.sagemaker import FIELDS

START_RETRY_S = 2.0
"""Wait between attempts to reach Pub/Sub at start; the startup probe ends them after two minutes."""
FIRST_PULL_S = 2.0
"""How long the first pull must last before the worker counts as started, where its permission could not be checked."""
HURRY_SETTLE_S = 2.0
"""Time for the last answers after a second SIGTERM."""

_log = get_logger("service")
_state_log = StateLog("service")


class Service:
    """
    One worker process.

    Args:
        settings: In force.

    Raises:
        SettingsError: A rule or hook of the error policy cannot be used, or tracing is on without its extra.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._metrics = Metrics()
        ProcessCollector(registry=self._metrics.registry)
        self._stopping = asyncio.Event()
        self._stops = 0
        self._subscriber: Subscriber | None = None
        self._processor: Processor | None = None
        self._supervisor: Supervisor | None = None
        self._policy = load_policy(
            settings.policy.rules, hook_timeout_s=settings.policy.hook_timeout_s, on_hook=self._hook_asked
        )
        self._control: ControlListener | None = None
        self._metric_sources: dict[str, HttpMetricSource] = {}
        """Of the metric gates, by the name of the route or, where each server has its own, of the target."""
        self._metric_gates: list[MetricGateLoop] = []
        self._limits_store: LimitStore | None = None
        """Keeps the limits of tenants; `None` where none has any."""
        self._may_surely_pull = False
        self._probes = Probes(self._metrics.registry, self._details, on_scrape=self._set_gauges)
        self._tracer = _build_tracer(settings)
        self._closing: list[Any] = [self._tracer]
        """Parts with `aclose`, in the order of opening."""
        self._hurrying: list[asyncio.Task[None]] = []

    @property
    def has_started(self) -> bool:
        """Whether the start-up is complete: a fault that comes later did not prevent the start."""
        return self._probes.startup_failure is None

    def stop(self) -> None:
        """
        Begin the drain; the second call cuts its grace to nothing.

        Threads: the event loop's only (a signal handler of the loop).
        """
        self._stops += 1
        self._stopping.set()
        self._metrics.draining.set(1)
        if self._stops > 1 and self._subscriber is not None and self._processor is not None:
            _log.warning("drain_hurried")
            self._processor.hurry(HURRY_SETTLE_S)
            self._hurrying.append(asyncio.get_running_loop().create_task(self._subscriber.drain(0)))

    async def run(self) -> int:
        """
        Run until stopped; return the exit code.

        Raises:
            SettingsError: Found unusable only now (key file, credentials, port); exit code 2.

        Cancellation: like a second `stop`, then everything is closed.
        """
        settings = self._settings
        self._metrics.build_info.labels(version("pubsub-inference-worker")).set(1)
        port = await self._probes.start(settings.http.host, settings.http.port)
        try:
            backends, deduper, payloads = self._build_local()
            broker = await Broker.connect(settings.pubsub)
            self._closing.append(broker)
            publisher = broker.publisher()
            self._closing.append(publisher)
            self._subscriber = broker.subscriber(self._metrics, settle_s=settings.drain.settle_s)
            limits = await self._reach_broker(broker)
            if limits is None or self._stopping.is_set():  # nothing is leased yet, and nothing needs to be
                return 0
            self._build(broker, publisher, limits, backends, deduper, payloads=payloads)
            _state_log.info(
                "worker_started", http_port=port, subscription=broker.names.subscription, topic=broker.names.topic
            )
            return await self._serve()
        except (BrokerResourceError, SettingsError) as error:
            if not self.has_started:
                self._probes.startup_failure = error.one_line
            raise
        finally:
            await self._aclose()

    def _build_local(self) -> tuple[list[HttpBackend], Deduper, Payloads | None]:
        """
        Build what needs nothing but this machine, so that its faults are told at once, whatever Pub/Sub does.

        Raises:
            SettingsError: A key file cannot be read, an extra is missing; every fault is named.
        """
        settings, faults = self._settings, list[str]()
        backends, deduper, payloads = list[HttpBackend](), None, None
        for route in settings.all_routes():
            try:
                backends += [_build_backend(target) for target in route.targets()]
            except SettingsError as error:
                faults += [f"{section_of(route, settings)}.{fault}" for fault in error.faults]
                continue
            try:
                self._metric_sources |= _build_metric_sources(route)
            except SettingsError as error:
                faults += [f"{section_of(route, settings)}.metric_gate.{fault}" for fault in error.faults]
        try:
            deduper = Deduper(build_store(settings.dedupe, self._metrics), settings.dedupe.metadata_key)
        except SettingsError as error:
            faults += error.faults
        try:
            payloads = _build_payloads(settings)
        except SettingsError as error:
            faults += error.faults
        try:
            self._limits_store = build_limits(settings.tenants, self._metrics)
        except SettingsError as error:
            faults += error.faults
        self._closing += [
            *backends,
            *self._metric_sources.values(),
            *(part for part in (deduper, self._limits_store) if part is not None),
        ]
        if faults or deduper is None:
            raise SettingsError(faults)
        return backends, deduper, payloads

    async def _reach_broker(self, broker: Broker) -> Limits | None:
        """Check subscription and topic, waiting for a broker that is away; return `None` when stopped meanwhile."""
        pubsub = self._settings.pubsub
        while not self._stopping.is_set():
            try:
                self._may_surely_pull = await broker.check()
                limits = await self._limits()
                self._control = await broker.control(self._metrics, self._cancel, pubsub.control_remember_s)
            except ConnectionError as error:
                self._probes.startup_failure = f"Pub/Sub cannot be reached: {error}"
                _log.warning("broker_unreachable", error=str(error))
                await wait_for(self._stopping, START_RETRY_S)
            else:
                self._closing += [self._control] if self._control is not None else []
                return limits
        return None

    def _build(
        self,
        broker: Broker,
        publisher: Publisher,
        limits: Limits,
        backends: list[HttpBackend],
        deduper: Deduper,
        *,
        payloads: Payloads | None,
    ) -> None:
        """Put the parts together, bottom up."""
        settings, metrics, clock = self._settings, self._metrics, LoopClock()
        error_share = ErrorShare(settings.policy.error_limit.window_s, now=time.monotonic)
        recorder = Recorder(
            metrics,
            error_share,
            tracer=self._tracer,
            paths=tuple(settings.request.allowed_paths),
            models=tuple(model for route in settings.all_routes() for model in route.match.models),
            tenants=self._tenant_names(),
            prices=PriceTable([Price(**price.model_dump()) for price in settings.prices]),
            include_stats=settings.reply.include_stats,
            answer_ratio=settings.log.answer_ratio,
        )
        router = Router(
            build_routes(
                settings,
                {each.name: each for each in backends},
                clock,
                on_breaker_change=functools.partial(self._breaker_changed, recorder),
                foreign_headers=_sagemaker_headers(settings),
            )
        )
        self._metric_gates = build_metric_gates(settings, self._metric_sources, router.targets, metrics, now=clock.now)
        intake = IntakePause(router.targets, self._intake_changed)
        replier = Replier(
            publisher,
            recorder,
            intake,
            copy_attributes=tuple(settings.reply.copy_attributes),
            lease_s=settings.pubsub.max_lease_duration_s,
            payloads=payloads if payloads is not None and payloads.can_write else None,
        )
        tenants = Tenants(settings.tenants, self._shares(), self._limits_store, metrics)
        attempts = Attempts(recorder, send_idempotency_key=settings.request.idempotency_key)
        self._processor = Processor(
            router=router,
            policy=self._policy,
            attempts=attempts,
            replier=replier,
            recorder=recorder,
            rules=Rules(
                request=_allowed_headers(settings),
                limits=limits,
                settle_s=settings.drain.settle_s,
                deadline_chance=settings.policy.deadline_chance,
                tenants_share_windows=settings.tenants.windows == "shared",
            ),
            deduper=deduper,
            bodies=self._build_bodies(payloads, recorder),
            dead_letters=self._build_dead_letters(broker),
            tenants=tenants if tenants.is_used else None,
            cancels=Cancels(settings.pubsub.control_remember_s) if self._control is not None else None,
        )
        assert self._subscriber is not None
        self._supervisor = Supervisor(
            router,
            metrics,
            error_share,
            settings.policy.error_limit,
            intake,
            subscriber=self._subscriber,
            max_in_flight=settings.pubsub.most_in_flight,
        )

    def _breaker_changed(self, recorder: Recorder, route: str, change: BreakerChange) -> None:
        recorder.breaker_changed(route, change)
        if self._supervisor is not None:
            self._supervisor.breaker_changed()

    def _build_bodies(self, payloads: Payloads | None, recorder: Recorder) -> ReferencedBodies | None:
        if payloads is None or not self._settings.payloads.request_prefixes:
            return None
        return ReferencedBodies(payloads, recorder, max_bytes=self._settings.pubsub.max_in_flight_bytes)

    def _build_dead_letters(self, broker: Broker) -> DeadLetters | None:
        if self._settings.dead_letter.topic is None:
            return None
        publisher = broker.publisher(self._settings.dead_letter.topic)
        self._closing.append(publisher)
        return DeadLetters(publisher, self._metrics)

    async def _limits(self) -> Limits:
        assert self._subscriber is not None
        settings = self._settings
        attempts = settings.pubsub.max_delivery_attempts
        subscriber = self._subscriber
        attempts_of = {
            source: await subscriber.max_delivery_attempts(source) if attempts == "auto" else attempts
            for source in self._shares()
        }
        return Limits(
            attempts_of=attempts_of,
            max_lease_duration_s=settings.pubsub.max_lease_duration_s,
            max_message_age_s=settings.pubsub.max_message_age_s,
            hold_max_s=settings.policy.hold_max_s or settings.pubsub.max_lease_duration_s,
            reply_on_last_attempt=settings.policy.reply_on_last_attempt,
            max_delivery_attempts=await self._default_attempts() if not attempts_of else None,
        )

    async def _default_attempts(self) -> int | None:
        assert self._subscriber is not None
        attempts = self._settings.pubsub.max_delivery_attempts
        return await self._subscriber.max_delivery_attempts() if attempts == "auto" else attempts

    def _cancel(self, request: CancelRequest) -> None:
        if self._processor is not None:
            self._processor.cancel(request)

    def _tenant_names(self) -> tuple[str, ...] | None:
        """Return the tenants that the settings name; `None` where they tell none apart."""
        request, tenants = self._settings.request, self._settings.tenants
        if request.tenant_attribute is None and request.tenant_metadata_key is None:
            return None
        return (*tenants.weights, *(each.tenant for each in tenants.limits))

    def _shares(self) -> dict[str, Share]:
        """Return the part of the window that each of several subscriptions has, by source."""
        several = self._settings.pubsub.subscriptions
        return {source_of(each.name): Share(each.level, source_of(each.name), each.weight) for each in several}

    async def _serve(self) -> int:
        """Pull until stopped or until the subscription is lost, then drain."""
        assert self._subscriber is not None
        assert self._processor is not None
        assert self._supervisor is not None
        loop = asyncio.get_running_loop()
        pulse = loop.create_task(self._supervisor.run())
        pulling = loop.create_task(self._subscriber.run(self._processor.handle, self._processor.begin_drain))
        stopping = loop.create_task(self._stopping.wait())
        hearing = loop.create_task(self._control.run()) if self._control is not None else None
        gating = [loop.create_task(each.run()) for each in self._metric_gates]
        startup = loop.call_later(0 if self._may_surely_pull else FIRST_PULL_S, self._probes.succeed)
        try:
            await asyncio.wait({pulling, stopping}, return_when=asyncio.FIRST_COMPLETED)
            self._metrics.draining.set(1)
            started = loop.time()
            _state_log.info("drain_started", grace_s=self._settings.drain.grace_s)
            await self._subscriber.drain(self._settings.drain.grace_s)
            await pulling
        finally:
            startup.cancel()
            running = [task for task in (pulse, stopping, pulling, hearing, *gating) if task is not None]
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        _state_log.info("drain_finished", seconds=round(loop.time() - started, 3))
        return 0

    async def _aclose(self) -> None:
        """Close every part, also when one of them fails to."""
        closing = [part.aclose for part in reversed(self._closing)]
        if self._subscriber is not None:
            closing.insert(0, functools.partial(self._subscriber.drain, 0))  # drained already, or never run
        for close in [*closing, self._probes.aclose]:
            try:
                await close()
            except Exception:  # noqa: BLE001 - the others are to be closed too, and what led here is to be told
                self._metrics.internal_errors_total.inc()
                _log.exception("close_failed")
        await asyncio.gather(*self._hurrying, return_exceptions=True)

    def _hook_asked(self, report: HookReport) -> None:
        self._metrics.policy_hook_total.labels(report.outcome.value).inc()
        if report.outcome in {HookOutcome.RAISED, HookOutcome.TIMED_OUT}:
            _log.error("policy_hook_failed", hook=report.hook, outcome=report.outcome, error=report.detail)

    def _intake_changed(self, reason: str, holds: bool) -> None:
        self._metrics.intake_paused.labels(reason).set(int(holds))
        _log.warning("intake_paused" if holds else "intake_resumed", reason=reason)

    def _details(self) -> dict[str, Any]:
        """Return the readiness verdict and what stands beside it."""
        is_open = self._subscriber is not None and self._subscriber.is_open
        details = self._supervisor.details() if self._supervisor is not None else {}
        for gate in self._metric_gates:
            for target in gate.targets:
                details["backends"][target.name]["metric_gate"] = gate.details()
        return {"ready": is_open and not self._stopping.is_set(), "pulling": is_open, **details}

    def _set_gauges(self) -> None:
        if self._supervisor is not None:
            self._supervisor.set_gauges()


def _build_backend(route: RouteSettings) -> HttpBackend:
    """
    Return the backend of a route.

    Raises:
        SettingsError: A file cannot be read, or an extra is missing.
    """
    if not route.is_sagemaker:
        return HttpBackend(route)
    try:
        from worker.backends.sagemaker import SageMakerBackend  # noqa: PLC0415 - of an extra
    except ImportError:
        raise SettingsError([f"sagemaker: {how_to_get('sagemaker')}"]) from None
    return SageMakerBackend(route)


def _build_metric_sources(route: RouteSettings) -> dict[str, HttpMetricSource]:
    """
    Return what a route's metric gate reads: one source for all its servers, or one for each.

    Raises:
        SettingsError: A file cannot be read.
    """
    gate = route.metric_gate
    if not gate.is_used:
        return {}
    if gate.url:
        return {route.name: HttpMetricSource(route, gate)}
    return {target.name: HttpMetricSource(target, gate) for target in route.targets()}


def _sagemaker_headers(settings: Settings) -> frozenset[str]:
    """Return the headers that are allowed only since they set a field of SageMaker on some route."""
    fields = {FIELDS[name].header for route in settings.all_routes() for name in route.sagemaker.message_fields}
    return frozenset(fields - set(settings.request.allowed_headers))


def _allowed_headers(settings: Settings) -> RequestSettings:
    """Return the settings of requests, with the headers by which messages may set fields of SageMaker."""
    allowed = [*settings.request.allowed_headers, *sorted(_sagemaker_headers(settings))]
    return settings.request.model_copy(update={"allowed_headers": allowed})


def _build_payloads(settings: Settings) -> Payloads | None:
    if not settings.payloads.is_used:
        return None
    from worker.payloads.stores import build_payloads  # noqa: PLC0415 - most workers need none of it

    return build_payloads(settings)


def _build_tracer(settings: Settings) -> Tracer:
    if not settings.tracing.enabled:
        return Tracer()
    from worker.telemetry.otel import build_tracer  # noqa: PLC0415 - of an extra

    return build_tracer(settings)
