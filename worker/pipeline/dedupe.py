"""
Not answering twice: what was answered is remembered, across redeliveries and, with Redis, across pods.

An entry is written after the answer is published and before the request is acked.  On a hit the delivery is acked and
nothing else happens: its answer is published.  A crash between publish and ack gives a second answer all the same,
which consumers recognise by `request_message_id`.

A message is always remembered by its id, so that its redelivery is recognised.  A key that the requester chose is
remembered for good answers and final errors only: a request that is sent again after a 503 asks for another attempt.

A store that cannot be reached never keeps a message from being answered: it counts as a miss.  After a failure the
store is not asked for a while, so that an outage of the store does not make every message wait.
"""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Any, Protocol

from worker.delivery import Delivery, Reply
from worker.errors import SettingsError, how_to_get
from worker.policy.model import ErrorClass
from worker.settings.schema import DedupeSettings
from worker.telemetry.logs import StateLog, get_logger
from worker.telemetry.metrics import Metrics
from worker.wire.message import metadata_value

REDIS_TIMEOUT_S = 2.0
"""Longest wait for Redis per message: an answer is worth more than the knowledge that it might be a second one."""
REDIS_RETRY_S = 15.0
"""How long Redis is not asked after a failure; then one message asks it.  During an outage one message in so many
seconds waits for the timeout, and no other.  House decision."""

_NO_FINGERPRINT = "-"
"""The fingerprint of a message id: the data of a message never changes."""

_NO_ANSWERS = frozenset({ErrorClass.IDEMPOTENCY_CONFLICT, ErrorClass.CANCELLED})
"""Classes of answers that do not answer the request itself: under its key it may be sent again."""

_log = get_logger("dedupe")
_state_log = StateLog("dedupe")


class Dedupe(StrEnum):
    """What is known of a key."""

    MISS = "miss"
    """Nothing, or no longer."""
    HIT = "hit"
    """The same request was answered."""
    CONFLICT = "conflict"
    """Another request was answered under this key: the requester used it twice."""


class DedupeStore(Protocol):
    """Where answered requests are remembered."""

    async def get(self, key: str, fingerprint: str) -> Dedupe:
        """
        Return what is known of a key; a store that is down gives `MISS` and raises nothing.

        Args:
            key: The message id, or the requester's own key.
            fingerprint: Digest of the request; two requests are the same when their digests are.

        Cancellation: leaves nothing behind.
        """

    async def put(self, key: str, fingerprint: str) -> None:
        """
        Remember a key for the store's time to live; a store that is down raises nothing.

        Cancellation: the key may or may not be remembered.
        """

    async def aclose(self) -> None:
        """
        Close connections; idempotent.

        Cancellation: connections may stay open until the process ends.
        """


class MemoryStore:
    """
    The answered requests of this process; what was asked for or put least recently leaves first.

    Args:
        settings: Entries kept (about 200 bytes each), and how long an entry is believed after its last `put`.
        now: Monotonic seconds.
    """

    def __init__(self, settings: DedupeSettings, *, now: Callable[[], float] = time.monotonic) -> None:
        self._capacity = settings.capacity
        self._ttl_s = settings.ttl_s
        self._now = now
        self._entries: OrderedDict[str, tuple[str, float]] = OrderedDict()
        """Fingerprint and the instant at which the entry expires, by key."""

    async def get(self, key: str, fingerprint: str) -> Dedupe:
        """See `DedupeStore.get`."""
        entry = self._entries.get(key)
        if entry is None:
            return Dedupe.MISS
        known, expires_at = entry
        if self._now() >= expires_at:
            del self._entries[key]
            return Dedupe.MISS
        self._entries.move_to_end(key)
        return Dedupe.HIT if known == fingerprint else Dedupe.CONFLICT

    async def put(self, key: str, fingerprint: str) -> None:
        """See `DedupeStore.put`; the latest fingerprint of a key stays."""
        self._entries[key] = (fingerprint, self._now() + self._ttl_s)
        self._entries.move_to_end(key)
        if len(self._entries) > self._capacity:
            self._entries.popitem(last=False)

    async def aclose(self) -> None:
        """See `DedupeStore.aclose`; there is nothing to close."""


class RedisStore:
    """
    All pods that share the Redis server; needs the extra `redis`.

    After a call that failed Redis is not asked for `REDIS_RETRY_S`; requests that come meanwhile are neither found
    nor remembered, which is counted for each and logged once.  Then one message asks Redis again.

    Args:
        settings: Address and time to live.
        metrics: Counts the calls that were left out or failed.
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
            raise SettingsError([f"dedupe.store: redis: {how_to_get('redis')}"]) from None
        assert settings.redis_url is not None
        self._ttl_ms = int(settings.ttl_s * 1000)
        self._metrics = metrics
        self._now = now
        self._retry_at: float | None = None
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
        """See `DedupeStore.aclose`."""
        await self._redis.aclose()

    async def _try(self, operation: str, call: Callable[[], Awaitable[Any]]) -> Any:
        """Return what Redis says, `None` when the call is left out or fails."""
        retry_at, now = self._retry_at, self._now()
        if retry_at is not None and now < retry_at:
            self._metrics.dedupe_skipped_total.labels(operation).inc()
            return None
        if retry_at is not None:
            self._retry_at = now + REDIS_RETRY_S  # this call finds out; the others do not wait for it
        try:
            async with asyncio.timeout(REDIS_TIMEOUT_S):  # in all: the library's own are per step
                answer = await call()
        except self._errors as error:
            self._metrics.dedupe_skipped_total.labels(operation).inc()
            if self._retry_at is None:
                _log.error("dedupe_store_unreachable", error=str(error))
            self._retry_at = self._now() + REDIS_RETRY_S
            return None
        if retry_at is not None:
            self._retry_at = None
            _state_log.info("dedupe_store_recovered")
        return answer


def _redis_key(key: str) -> str:
    return f"inference-worker:answered:{key}"


def build_store(settings: DedupeSettings, metrics: Metrics) -> DedupeStore | None:
    """
    Return the store of the settings, `None` for `none`.

    Raises:
        SettingsError: As `RedisStore`.
    """
    if settings.store == "none":
        return None
    return RedisStore(settings, metrics) if settings.store == "redis" else MemoryStore(settings)


class Deduper:
    """
    Looks deliveries up in the store, by the key that identifies each.

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
            value = metadata_value(delivery.request.metadata, self._metadata_key)
            if value is not None:
                return "m:" + value
        return _id_key(delivery)

    async def get(self, delivery: Delivery) -> Dedupe:
        """
        Return whether the delivery's request was answered already.

        Cancellation: leaves nothing behind.
        """
        if self._store is None:
            return Dedupe.MISS
        id_key = _id_key(delivery)
        known = await self._store.get(id_key, _NO_FINGERPRINT)
        if known is Dedupe.MISS and self._metadata_key is not None and (key := self.key(delivery)) != id_key:
            known = await self._store.get(key, _fingerprint(delivery))
        return known

    async def put(self, delivery: Delivery, reply: Reply) -> None:
        """
        Remember the answer: by the requester's key if it answers the request itself, else by the message's id.

        Cancellation: the answer may or may not be remembered.
        """
        if self._store is None:
            return
        key, id_key = self.key(delivery), _id_key(delivery)
        if key == id_key or reply.retryable or reply.error_class in _NO_ANSWERS:
            await self._store.put(id_key, _NO_FINGERPRINT)
        else:
            await self._store.put(key, _fingerprint(delivery))

    async def aclose(self) -> None:
        """
        Close the store; idempotent.

        Cancellation: see `DedupeStore.aclose`.
        """
        if self._store is not None:
            await self._store.aclose()


def _id_key(delivery: Delivery) -> str:
    return "i:" + delivery.message.key


def _fingerprint(delivery: Delivery) -> str:
    """Return the digest of the request behind a requester's key."""
    request = delivery.request
    assert request is not None  # it brought the key
    if request.body_uri is not None:  # the same before and after the body was fetched
        body = f"{request.body_uri}\0{request.body_sha256}".encode()
    else:
        body = request.body.data if request.body is not None else b""
    return hashlib.sha256(request.path.encode() + b"\0" + body).hexdigest()
