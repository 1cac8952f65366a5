"""
Puts the parts of `inference-worker batches serve` together, starts and stops them.

A process has one or more roles: `api` answers clients, `collector` stores answers, `coordinator` takes batches from one
status to the next (or stands by).  Each may run in any number of processes; all of them share a database, a place for
files and the topics.

On SQLite the tables are made at start.  A database that is away is waited for: what the process is for comes back with
it, and a restart would cure nothing.
"""

import asyncio
import socket
import time
import uuid
from collections.abc import Awaitable, Callable, Collection
from contextlib import AsyncExitStack
from enum import StrEnum
from typing import Any, Protocol

import sqlalchemy as sa
from prometheus_client import ProcessCollector

from worker.batches.api.app import build_app
from worker.batches.api.server import ApiServer
from worker.batches.api.storage import Storage
from worker.batches.collector import DEAD_LETTER_WAIT_S, Collector
from worker.batches.coordinator import Coordinator, HasModel
from worker.batches.events import EventTeller
from worker.batches.lines import dead_letter_of
from worker.batches.metrics import BatchMetrics
from worker.batches.migrate import migrate
from worker.batches.models import Models
from worker.batches.objects import Objects, open_objects
from worker.batches.secrets import database_url, signing_key
from worker.batches.store import Store, StoreUnavailableError, open_engine
from worker.brokers.connection import Broker
from worker.errors import SettingsError
from worker.flow.clock import wait_for
from worker.ports import Payloads
from worker.settings.schema import NO_BACKEND, PayloadSettings, PubSubSettings, RouteSettings, Settings
from worker.telemetry.logs import get_logger
from worker.telemetry.metrics import Metrics
from worker.telemetry.probes import Probes

COLLECTED_MESSAGES = 1_000
"""Answers leased at once by one collector: two transactions' worth."""
STORE_PATIENCE_S = 2.0
"""Between two tries to reach the database at start."""
API_GRACE_S = 20.0
COLLECTOR_GRACE_S = 10.0
SETTLE_S = 10.0
_METHODS = frozenset({"GET", "HEAD", "POST", "DELETE"})

_log = get_logger("batches")


class Role(StrEnum):
    """What a process does."""

    API = "api"
    COORDINATOR = "coordinator"
    COLLECTOR = "collector"


ALL_ROLES = frozenset(Role)


class _Part(Protocol):
    async def run(self) -> None: ...

    async def drain(self, grace_s: float) -> None: ...


class BatchServer:
    """
    The parts of one process.

    Args:
        settings: All of them; `batches`, `pubsub`, `payloads`, `backend` (for the list of models) and `http` are read.
        roles: What this process does.
        on_ready: Called with the port of the API, or `None`, when every part runs.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        roles: Collection[Role] = ALL_ROLES,
        on_ready: Callable[[int | None], object] = lambda _port: None,
    ) -> None:
        self._settings = settings
        self._roles = frozenset(roles)
        self._on_ready = on_ready
        self._is_stopping = asyncio.Event()
        self._is_ready = False
        self._metrics = Metrics()
        self._batch_metrics = BatchMetrics(self._metrics.registry)
        ProcessCollector(registry=self._metrics.registry)
        self._parts: list[tuple[Role, _Part, float]] = []
        self._port: int | None = None

    def stop(self) -> None:
        """Begin to stop: requests and answers that are here are finished."""
        self._is_stopping.set()

    async def run(self) -> None:
        """
        Serve until `stop`.

        Raises:
            SettingsError: Something cannot work; permanent.
            SchemaError: `batches migrate` has to be run; permanent.
            BrokerResourceError: A topic or subscription is gone or refused; permanent.

        Cancellation: stops at once.
        """
        async with AsyncExitStack() as stack:
            probes = Probes(self._metrics.registry, self._details)
            http_port = await probes.start(self._settings.http.host, self._settings.http.port)
            stack.push_async_callback(probes.aclose)
            await self._build(stack)
            if self._is_stopping.is_set():
                return
            tasks = {asyncio.create_task(part.run(), name=role): role for role, part, _ in self._parts}
            stopping = asyncio.create_task(self._is_stopping.wait())
            self._is_ready = True
            probes.succeed()
            self._on_ready(self._port)
            _log.info("batch_server_started", roles=sorted(self._roles), port=self._port, http_port=http_port)
            try:
                await asyncio.wait({*tasks, stopping}, return_when=asyncio.FIRST_COMPLETED)
                self._is_ready = False
                stopping.cancel()
                await asyncio.gather(*(part.drain(grace_s) for _, part, grace_s in self._parts))
                await asyncio.gather(*tasks)
            finally:
                stopping.cancel()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, stopping, return_exceptions=True)
            _log.info("batch_server_stopped")

    def _count_request(self, method: str, route: str, status: int, duration_s: float) -> None:
        known = method if method in _METHODS else "other"
        self._batch_metrics.api_request_duration_seconds.labels(known, route, str(status)).observe(duration_s)

    def _details(self) -> dict[str, Any]:
        return {"ready": self._is_ready, "roles": sorted(self._roles)}

    async def _build(self, stack: AsyncExitStack) -> None:
        settings = self._settings
        store = await self._open_store(stack)
        if store is None:
            return
        objects = await asyncio.to_thread(open_objects, settings.batches.files, settings.payloads)
        models = Models(models_route(settings), time.monotonic)
        stack.push_async_callback(models.aclose)
        if Role.API in self._roles:
            self._add_api(stack, store, objects, models)
        if self._roles & {Role.COORDINATOR, Role.COLLECTOR}:
            await self._add_workers(stack, store, objects, models)

    async def _open_store(self, stack: AsyncExitStack) -> Store | None:
        """Return the store once it can be reached; `None`: stopped before that."""
        engine = open_engine(database_url(self._settings.batches))
        store = Store(engine)
        stack.callback(store.close)
        is_told = False
        while not self._is_stopping.is_set():
            try:
                if engine.dialect.name == "sqlite":
                    await asyncio.to_thread(migrate, engine)
                await asyncio.to_thread(store.check)
            except (StoreUnavailableError, sa.exc.OperationalError) as error:
                if not is_told:
                    _log.warning("batch_store_away", role="start", error=str(error).partition("\n")[0])
                is_told = True
                await wait_for(self._is_stopping, STORE_PATIENCE_S)
            else:
                return store
        return None

    def _add_api(self, stack: AsyncExitStack, store: Store, objects: Objects, models: Models) -> None:
        batches = self._settings.batches
        storage = Storage(store, objects)
        stack.callback(storage.close)
        try:
            app = build_app(storage, models, batches, on_request=self._count_request)
            server = ApiServer(app, batches.host, batches.port)
        except OSError as error:
            reason = f"batches: cannot listen on {batches.host}:{batches.port}: {error.strerror}"
            raise SettingsError([reason]) from None
        self._port = server.port
        self._parts.append((Role.API, server, API_GRACE_S))

    async def _add_workers(self, stack: AsyncExitStack, store: Store, objects: Objects, models: Models) -> None:
        batches = self._settings.batches
        broker = await Broker.connect(pubsub_settings(self._settings))
        stack.push_async_callback(broker.aclose)
        if Role.COORDINATOR in self._roles:
            publisher = broker.publisher()
            stack.push_async_callback(publisher.aclose)
            topic = None
            if batches.event_topic:
                topic = broker.publisher(batches.event_topic)
                stack.push_async_callback(topic.aclose)
            control = None
            if self._settings.pubsub.control_topic is not None:
                control = broker.publisher(self._settings.pubsub.control_topic)
                stack.push_async_callback(control.aclose)
            events = EventTeller(
                store,
                webhook_url=batches.webhook_url,
                signing_key=signing_key(batches),
                publisher=topic,
                metrics=self._batch_metrics,
            )
            stack.push_async_callback(events.aclose)
            coordinator = Coordinator(
                store,
                objects,
                publisher,
                batches,
                owner=f"{socket.gethostname()[:40]}-{uuid.uuid4().hex[:12]}",
                events=events,
                models=_served(models),
                control=control,
                metrics=self._batch_metrics,
            )
            self._parts.append((Role.COORDINATOR, coordinator, 0.0))
        if Role.COLLECTOR in self._roles:
            subscriber = broker.subscriber(self._metrics, settle_s=SETTLE_S)
            collector = Collector(
                store, subscriber, self._batch_metrics, payloads=stored_replies(self._settings.payloads)
            )
            self._parts.append((Role.COLLECTOR, collector, COLLECTOR_GRACE_S))
            if batches.dead_letter_subscription:
                await self._add_dead_letters(stack, store)

    async def _add_dead_letters(self, stack: AsyncExitStack, store: Store) -> None:
        batches = self._settings.batches
        named = {"request_subscription": batches.dead_letter_subscription}
        broker = await Broker.connect(pubsub_settings(self._settings).model_copy(update=named))
        stack.push_async_callback(broker.aclose)
        subscriber = broker.subscriber(self._metrics, settle_s=SETTLE_S)
        collector = Collector(store, subscriber, self._batch_metrics, read=dead_letter_of, wait_s=DEAD_LETTER_WAIT_S)
        self._parts.append((Role.COLLECTOR, collector, COLLECTOR_GRACE_S))


def pubsub_settings(settings: Settings) -> PubSubSettings:
    """
    Return how Pub/Sub is reached: answers come from `batches.response_subscription`, lines go to `request_topic`.

    Raises:
        SettingsError: One of them is not named; permanent.
    """
    batches = settings.batches
    faults = [
        f"batches.{name}: is required (WORKER_BATCHES__{name.upper()})"
        for name in ("request_topic", "response_subscription")
        if not getattr(batches, name)
    ]
    if faults:
        raise SettingsError(faults)
    return settings.pubsub.model_copy(
        update={
            "request_subscription": batches.response_subscription,
            "response_topic": batches.request_topic,
            "max_in_flight": COLLECTED_MESSAGES,
        }
    )


def stored_replies(settings: PayloadSettings) -> Payloads | None:
    """
    Return where the workers put bodies that no message carries; `None`: `payloads.reply_prefix` does not say.

    Raises:
        SettingsError: The place cannot be used; permanent.
    """
    if settings.reply_prefix is None:
        _log.info("batch_replies_in_storage_not_fetched", setting="payloads.reply_prefix")
        return None
    from worker.payloads.stores import PayloadStores  # noqa: PLC0415 - where bodies stand in object storage

    readable = settings.model_copy(update={"request_prefixes": [settings.reply_prefix], "reply_prefix": None})
    return PayloadStores(readable, subscription="")


def models_route(settings: Settings) -> RouteSettings | None:
    """Return where the list of models is asked for; `None`: nowhere."""
    url = settings.batches.models_url
    backend = settings.backend
    if backend is not None and backend.base_url == NO_BACKEND:
        backend = None
    if url is None and backend is None:
        return None
    fields = {} if backend is None else {name: getattr(backend, name) for name in type(backend).model_fields}
    return RouteSettings(name="models", **{**fields, **({} if url is None else {"base_url": url})})


def _served(models: Models) -> Callable[[], Awaitable[HasModel | None]]:
    async def served() -> HasModel | None:
        found = await models.get()
        return None if found.names is None else found.has

    return served
