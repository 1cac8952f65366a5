"""
The pipeline as `worker.service` builds it, on fakes and on virtual time: real policy, real flow, no network.

Make a `Pipeline` inside a test that runs on `virtual_time`; its clocks are the loop's.
"""

import asyncio
import itertools
import random
from typing import Any

import msgspec

from tests.support.fakes import FakeBackend, FakePayloads, FakePublisher, FakeSubscriber, Published
from tests.support.virtual_time import loop_time, unix_time
from worker.delivery import Delivery, Limits
from worker.flow.circuit import CircuitState, CircuitStatistics
from worker.flow.clock import LoopClock
from worker.flow.gate import GateStatistics
from worker.flow.lane import BreakerChange, LaneStatistics
from worker.pipeline.attempt import Attempts
from worker.pipeline.cancels import Cancels
from worker.pipeline.dead_letters import DeadLetters
from worker.pipeline.dedupe import Deduper, MemoryStore
from worker.pipeline.processor import Processor, Rules
from worker.pipeline.referenced_bodies import ReferencedBodies
from worker.pipeline.replies import Replier
from worker.pipeline.routes import IntakePause, Router, Target, build_routes
from worker.pipeline.tenants import MemoryLimits, Tenants, build_limits
from worker.policy.engine import ErrorPolicy
from worker.policy.judge import OUTAGE_DETECTION_S
from worker.policy.prices import Price, PriceTable
from worker.ports import Settlement
from worker.settings.schema import (
    BreakerSettings,
    DedupeSettings,
    ErrorLimitSettings,
    RequestSettings,
    RouteMatch,
    Settings,
    TenantSettings,
)
from worker.supervisor import Supervisor
from worker.telemetry.error_share import ErrorShare
from worker.telemetry.metrics import Metrics
from worker.telemetry.record import Recorder
from worker.wire.message import ReceivedMessage, RequestMessage

LEASE_S = 21_600.0
_ids = itertools.count(1)

BODY = {"model": "m", "messages": []}
METADATA = {"id": 12345678901234567890, "b": {"x": [1, 2.50]}, "a": "ü"}


def data(body: Any = None, *, path: str = "/v1/chat/completions", metadata: Any = METADATA, **more: Any) -> bytes:
    """Return the data of a request message."""
    return msgspec.json.encode({"path": path, "metadata": metadata, "body": BODY if body is None else body, **more})


def referring(uri: str = "gs://b/1", **more: Any) -> bytes:
    """Return the data of a request message whose body is an object."""
    return msgspec.json.encode({"path": "/v1/chat/completions", "metadata": METADATA, "body_uri": uri, **more})


def message(payload: bytes | None = None, *, attempt: int | None = None, **more: Any) -> ReceivedMessage:
    """Return a delivery that was published just now."""
    return ReceivedMessage(
        message_id=more.pop("message_id", f"id{next(_ids)}"),
        data=data() if payload is None else payload,
        publish_time=more.pop("publish_time", unix_time()),
        delivery_attempt=attempt,
        **more,
    )


def a_delivery(request: RequestMessage | None = None, received: ReceivedMessage | None = None) -> Delivery:
    """Return the working state of one delivery that has just come."""
    delivery = Delivery(received or ReceivedMessage(message_id="1", data=b"{}"), 0.0)
    delivery.request = request
    return delivery


class Pipeline:
    """
    Everything between the broker's two sides.

    Args:
        backends: One route each; the first takes what no other's `match` takes if it has none itself.  Or the
            targets, by name, of `routes`.
        more: Settings by short name; see the body.
    """

    def __init__(self, *backends: FakeBackend, publisher: FakePublisher | None = None, **more: Any) -> None:
        self.backend = backends[0] if backends else FakeBackend()
        self.publisher = publisher or FakePublisher()
        self.dead_topic = FakePublisher()
        self.metrics = Metrics()
        self.clock = LoopClock()
        self._watching: Supervisor | None = None
        window = more.pop("window", 16)
        self._rng: random.Random | None = more.pop("rng", None)
        matches = more.pop("matches", [RouteMatch()] * max(1, len(backends)))
        self.error_share = ErrorShare(300.0, now=loop_time)
        self.recorder = Recorder(
            self.metrics,
            self.error_share,
            tracer=more.pop("tracer", None),
            include_stats=more.pop("include_stats", False),
            answer_ratio=more.pop("answer_ratio", 1.0),
            tenants=() if "request" in more else None,
            prices=PriceTable([Price(**price) for price in more.pop("prices", ())]),
            clock=loop_time,
            wall_clock=unix_time,
        )
        bounds = {"initial": window, "min": 1, "max": 64}
        breaker: BreakerSettings = more.pop("breaker", BreakerSettings())
        each = {"base_url": "http://b", "window": bounds, "breaker": breaker.model_dump()}
        served = backends or (self.backend,)
        routes = more.pop("routes", None)
        if routes is None:
            routes = [
                {**each, "name": backend.name, "match": match.model_dump()}
                for backend, match in zip(served, matches, strict=True)
            ]
        else:
            routes = [{**(each if "base_urls" not in route else {**each, "base_url": ""}), **route} for route in routes]
        settings = Settings.model_validate({"routes": routes})
        by_name = {backend.name: backend for backend in served}
        self.router = Router(
            build_routes(settings, by_name, self.clock, on_breaker_change=self._breaker_changed, rng=self._rng),
            self._rng,
        )
        self.targets = self.router.targets
        self.pauses: list[tuple[str, bool]] = []
        self.intake = IntakePause(self.targets, lambda reason, holds: self.pauses.append((reason, holds)))
        lease_s = more.pop("lease_s", LEASE_S)
        payloads: FakePayloads | None = more.pop("payloads", None)
        self.replier = Replier(
            self.publisher,
            self.recorder,
            self.intake,
            copy_attributes=more.pop("copy_attributes", ()),
            lease_s=lease_s,
            payloads=payloads,
            clock=loop_time,
        )
        policy = more.pop("policy", None) or ErrorPolicy(now_unix=unix_time)
        self.policy = policy
        self.attempts = Attempts(self.recorder, wall_clock=unix_time, **more.pop("attempts", {}))
        dedupe = more.pop("dedupe", DedupeSettings())
        store = more.pop("store", None) or MemoryStore(dedupe)
        self.deduper = Deduper(store, dedupe.metadata_key)
        self.limits = Limits(
            max_lease_duration_s=lease_s,
            max_message_age_s=more.pop("max_message_age_s", 604_800.0),
            hold_max_s=more.pop("hold_max_s", lease_s),
            reply_on_last_attempt=more.pop("reply_on_last_attempt", True),
            max_delivery_attempts=more.pop("max_delivery_attempts", 5),
        )
        rules = Rules(
            request=more.pop("request", RequestSettings()),
            limits=self.limits,
            settle_s=more.pop("settle_s", 40.0),
            tenants_share_windows=more.get("tenants", {}).get("windows") == "shared",
            deadline_chance=more.pop("deadline_chance", 0.1),
            outage_detection_s=more.pop("outage_detection_s", OUTAGE_DETECTION_S),
        )
        max_bytes = more.pop("max_payload_bytes", 1_000_000)
        bodies = None if payloads is None else ReferencedBodies(payloads, self.recorder, max_bytes=max_bytes)
        dead_letters = DeadLetters(self.dead_topic, self.metrics) if more.pop("dead_letters", False) else None
        settings_of_tenants = TenantSettings.model_validate(more.pop("tenants", {}))
        self.tenants = Tenants(
            settings_of_tenants,
            more.pop("sources", {}),
            build_limits(settings_of_tenants, self.metrics) and MemoryLimits(loop_time),
            self.metrics,
            clock=loop_time,
        )
        self.processor = Processor(
            router=more.pop("router", None) or self.router,
            policy=policy,
            attempts=self.attempts,
            replier=self.replier,
            recorder=more.pop("recorder", None) or self.recorder,
            rules=rules,
            deduper=self.deduper,
            bodies=bodies,
            dead_letters=dead_letters,
            tenants=self.tenants if self.tenants.is_used else None,
            cancels=Cancels(86_400.0, unix_time) if more.pop("can_cancel", False) else None,
            clock=loop_time,
            wall_clock=unix_time,
            rng=self._rng,
        )
        assert not more, f"unknown: {more}"

    def _breaker_changed(self, route: str, change: BreakerChange) -> None:
        self.recorder.breaker_changed(route, change)
        if self._watching is not None:
            self._watching.breaker_changed()

    @property
    def target(self) -> Target:
        """The first one."""
        return self.targets[0]

    @property
    def gate(self) -> GateStatistics:
        return self.target.gate.statistics()

    @property
    def lane(self) -> LaneStatistics:
        """The lane of the model that `BODY` names."""
        return self.gate.lanes["m"]

    @property
    def circuit(self) -> CircuitStatistics:
        """The first route's circuit, or that of the lane while the former is closed."""
        circuit = self.gate.circuit
        return circuit if circuit.state is not CircuitState.CLOSED or not self.gate.lanes else self.lane.circuit

    @property
    def answers(self) -> list[Published]:
        return self.publisher.published

    @property
    def answer(self) -> Published:
        """The only answer."""
        assert len(self.answers) == 1, self.answers
        return self.answers[0]

    async def handle(self, received: ReceivedMessage | None = None) -> Settlement:
        """Process one delivery to its end."""
        return await self.processor.handle(received or message())

    def start(self, received: ReceivedMessage | None = None) -> "asyncio.Task[Settlement]":
        """Begin to process one delivery."""
        return asyncio.ensure_future(self.processor.handle(received or message()))

    def serve(self, subscriber: FakeSubscriber) -> "asyncio.Task[None]":
        """Begin to process everything a subscription has, under a supervisor."""
        return asyncio.ensure_future(self._serve(subscriber))

    async def _serve(self, subscriber: FakeSubscriber) -> None:
        self._watching = self.supervisor(subscriber)
        watching = asyncio.ensure_future(self._watching.run())
        try:
            await subscriber.run(self.processor.handle, self.processor.begin_drain)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    def supervisor(self, subscriber: FakeSubscriber | None = None, **error_limit: Any) -> Supervisor:
        """Return the supervisor of the routes."""
        subscriber = subscriber or FakeSubscriber()
        return Supervisor(
            self.router,
            self.metrics,
            self.error_share,
            ErrorLimitSettings(**error_limit),
            self.intake,
            subscriber=subscriber,
            max_in_flight=subscriber.max_in_flight,
            clock=loop_time,
        )

    def count(self, metric: str, *labels: str) -> float:
        """Return a counter's or gauge's value."""
        child = getattr(self.metrics, metric)
        return float((child.labels(*labels) if labels else child).value)

    def assert_nothing_leaks(self) -> None:
        """No permit is out, no waiter is left, no message is counted as running."""
        for target in self.targets:
            gate = target.gate.statistics()
            assert (gate.in_flight, gate.waiting, gate.held) == (0, 0, 0)
        assert self.metrics.in_flight.value == 0
        assert self.metrics.payload_memory_bytes.value == 0
        assert len(self.processor._in_flight) == 0
