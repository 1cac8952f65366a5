"""
Not answering twice: what was answered is remembered, across redeliveries and, with Redis, across pods.

An entry is written after the answer is published and before the request is acked.  On a hit the delivery is acked and
nothing else: its answer is out.  A crash between publish and ack gives a second answer all the same, which consumers
recognise by `request_message_id`.

A message is always remembered by its id, so that its redelivery is recognised.  A key of the requester's own is
remembered for good answers and final errors only: whoever sends a request again after a 503 wants another try.

A store that cannot be reached never keeps a message from being answered: it counts as "not known", and after its
first failure it is left alone for a while, so that an outage of the store does not cost every message a wait.
"""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec

from worker.delivery import Delivery, Reply
from worker.errors import SettingsError
from worker.pipeline.memory_dedupe import Dedupe, MemoryDedupe
from worker.policy.model import ErrorClass
from worker.settings.schema import DedupeSettings
from worker.telemetry.logs import get_logger
from worker.telemetry.metrics import Metrics

REDIS_TIMEOUT_S = 2.0
"""Longest wait for Redis per message: an answer is worth more than the knowledge that it might be a second one."""
REDIS_REST_S = 15.0
"""How long Redis is left alone after a failure, until one message tries it again: with its timeout an outage costs one
message in so many seconds a wait, and none of the others.  House decision."""

_NO_FINGERPRINT = "-"
"""Of a message id: its data never changes."""

_log = get_logger("dedupe")
_decode_keys = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class DedupeStore(Protocol):
    """Where answered requests are remembered."""

    async def get(self, key: str, fingerprint: str) -> Dedupe:
        """Say what is known of a key; never raises for a store that is down: that is `MISS`."""

    async def put(self, key: str, fingerprint: str) -> None:
        """Remember a key for the store's time to live; never raises for a store that is down."""

    async def aclose(self) -> None:
        """Close connections; idempotent."""


class MemoryStore:
    """This process only."""

    def __init__(self, settings: DedupeSettings) -> None:
        self._entries = MemoryDedupe(settings.capacity, settings.ttl_s, now=time.monotonic)

    async def get(self, key: str, fingerprint: str) -> Dedupe:
        """See `DedupeStore.get`."""
        return self._entries.get(key, fingerprint)

    async def put(self, key: str, fingerprint: str) -> None:
        """See `DedupeStore.put`."""
        self._entries.put(key, fingerprint)

    async def aclose(self) -> None:
        """Nothing to close."""


class RedisStore:
    """
    All pods that share the Redis server; needs the extra `redis`.

    A call that fails leaves Redis alone for `REDIS_REST_S`; whatever comes meanwhile is not known and not remembered,
    which is counted for each message and written down once.  Then one message tries it, whatever the others do.

    Args:
        settings: Address and time to live.
        metrics: Counts what Redis was not asked or told.
        now: Monotonic seconds.

    Raises:
        SettingsError: The extra is not installed, or the URL is none; permanent.
    """

    def __init__(
        self, settings: DedupeSettings, metrics: Metrics, *, now: Callable[[], float] = time.monotonic
    ) -> None:
        try:
            from redis import asyncio as redis  # noqa: PLC0415 - an extra
        except ImportError:
            raise SettingsError(["dedupe.store: redis needs the extra `redis` to be installed"]) from None
        assert settings.redis_url is not None
        self._ttl_ms = int(settings.ttl_s * 1000)
        self._metrics = metrics
        self._now = now
        self._rests_until: float | None = None
        """Monotonic seconds; `None` while Redis answers."""
        self._errors: Any = (redis.RedisError, OSError, TimeoutError)
        try:
            self._redis: Any = redis.from_url(
                settings.redis_url.get_secret_value(),
                socket_timeout=REDIS_TIMEOUT_S,
                socket_connect_timeout=REDIS_TIMEOUT_S,
                decode_responses=True,
            )
        except ValueError:  # its text holds the URL, and that a password
            raise SettingsError(["dedupe.redis_url: is not a URL that Redis can be reached by"]) from None

    async def get(self, key: str, fingerprint: str) -> Dedupe:
        """See `DedupeStore.get`."""
        known = await self._try("get", lambda: self._redis.get(_redis_key(key)))
        if known is None:
            return Dedupe.MISS
        return Dedupe.HIT if known == fingerprint else Dedupe.CONFLICT

    async def put(self, key: str, fingerprint: str) -> None:
        """See `DedupeStore.put`."""
        await self._try("put", lambda: self._redis.set(_redis_key(key), fingerprint, px=self._ttl_ms))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    async def _try(self, operation: str, call: Callable[[], Awaitable[Any]]) -> Any:
        """Return what Redis says, `None` when it is left alone or fails."""
        rests_until, now = self._rests_until, self._now()
        if rests_until is not None and now < rests_until:
            self._metrics.dedupe_skipped_total.labels(operation).inc()
            return None
        if rests_until is not None:
            self._rests_until = now + REDIS_REST_S  # this call finds out; the others need not wait for it
        try:
            async with asyncio.timeout(REDIS_TIMEOUT_S):  # in all: the library's own are per step
                answer = await call()
        except self._errors as error:
            self._metrics.dedupe_skipped_total.labels(operation).inc()
            if self._rests_until is None:
                _log.error("dedupe_store_unreachable", error=str(error))
            self._rests_until = self._now() + REDIS_REST_S
            return None
        if rests_until is not None:
            self._rests_until = None
            _log.info("dedupe_store_recovered")
        return answer


def _redis_key(key: str) -> str:
    return f"inference-worker:answered:{key}"


def build_store(settings: DedupeSettings, metrics: Metrics) -> DedupeStore | None:
    """Return the store of the settings, `None` for none; raises as `RedisStore`."""
    if settings.store == "none":
        return None
    return RedisStore(settings, metrics) if settings.store == "redis" else MemoryStore(settings)


class Deduper:
    """
    Knows by which key a delivery is recognised, and asks the store.

    Args:
        store: `None` remembers nothing.
        metadata_key: Key of the metadata that identifies a request; `None`: the message id.
    """

    def __init__(self, store: DedupeStore | None, metadata_key: str | None = None) -> None:
        self._store = store
        self._metadata_key = metadata_key

    def key(self, delivery: Delivery) -> str:
        """Return the key of a delivery: the value under `metadata_key` as JSON unless it is null, else the id."""
        if self._metadata_key is not None and delivery.request is not None:
            value = bytes(_decode_keys(delivery.request.metadata).get(self._metadata_key, b"null"))
            if value != b"null":
                return "m:" + value.decode()
        return _id_key(delivery)

    async def get(self, delivery: Delivery) -> Dedupe:
        """Say whether the delivery's request was answered already."""
        if self._store is None:
            return Dedupe.MISS
        known = await self._store.get(_id_key(delivery), _NO_FINGERPRINT)
        key = self.key(delivery)
        if known is Dedupe.MISS and key != _id_key(delivery):
            known = await self._store.get(key, _fingerprint(delivery))
        return known

    async def put(self, delivery: Delivery, reply: Reply) -> None:
        """Remember the answer: by the requester's key if it is one to the request itself, else by the message's id."""
        if self._store is None:
            return
        key = self.key(delivery)
        if key == _id_key(delivery) or reply.retryable or reply.error_class == ErrorClass.IDEMPOTENCY_CONFLICT:
            await self._store.put(_id_key(delivery), _NO_FINGERPRINT)
        else:
            await self._store.put(key, _fingerprint(delivery))

    async def aclose(self) -> None:
        """Close the store."""
        if self._store is not None:
            await self._store.aclose()


def _id_key(delivery: Delivery) -> str:
    return "i:" + delivery.message.message_id


def _fingerprint(delivery: Delivery) -> str:
    """Return the digest of the request behind a requester's key."""
    request = delivery.request
    assert request is not None  # it brought the key
    return hashlib.sha256(request.path.encode() + b"\0" + (request.body or b"")).hexdigest()
