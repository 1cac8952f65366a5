"""
Bodies in object storage: which objects a request may name, and where the bodies of large answers go.

A request's `body_uri` must stand below one of `payloads.request_prefixes`; each prefix has a store of its own, which
reaches nothing outside it.  An answer goes to `payloads.reply_prefix/SUBSCRIPTION/MESSAGE_ID.json`: a message that is
answered again overwrites its first answer.  Nothing is ever deleted; a rule of the bucket does that (docs/payloads.md).

A refused object is the requester's affair only where others can be read: until the first one was, the worker's own
permission is missing, and the messages are held as in any other outage.
"""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Protocol

from worker.errors import PayloadError, SettingsError, how_to_get
from worker.payloads.files import FileStore
from worker.policy.model import Fault
from worker.ports import OpenPayload, StoredPayload
from worker.settings.schema import PayloadSettings, Settings
from worker.wire.object_uri import ObjectUri, parse_object_prefix, parse_object_uri

_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")


class Store(Protocol):
    """The objects below one prefix; keys are relative to it."""

    def open(self, key: str) -> AbstractAsyncContextManager[OpenPayload]:
        """See `worker.ports.Payloads.open`."""

    async def write(self, key: str, data: bytes) -> None:
        """
        Write an object, all or nothing.

        Raises:
            PayloadError: As `worker.ports.Payloads.write`.

        Cancellation: the object may or may not be written.
        """


class _Prefix:
    """One allowed prefix of requests."""

    def __init__(self, uri: ObjectUri, store: Store) -> None:
        self.uri = uri
        self.store = store
        self.is_readable = False
        """Something below it was read, or is known not to exist."""

    def explained(self, error: PayloadError) -> PayloadError:
        """Return what an error means: a refusal concerns one object only where others can be read."""
        if error.fault == Fault.PAYLOAD_NOT_FOUND:
            self.is_readable = True
        if error.fault != Fault.PAYLOAD_REFUSED or self.is_readable:
            return error
        detail = f"No object below {self.uri} could be read yet.  {error.detail}"
        return PayloadError(Fault.PAYLOAD_UNAVAILABLE, detail)


def build_store(prefix: ObjectUri, settings: PayloadSettings) -> Store:
    """
    Return the store of one prefix; nothing is connected.

    Raises:
        SettingsError: The extra is not installed, or an option is not known; permanent.
    """
    if prefix.scheme == "file":
        return FileStore(Path("/") / prefix.key)
    try:
        from worker.payloads.objects import build_bucket_store  # noqa: PLC0415 - of an extra
    except ImportError:
        raise SettingsError([f"payloads: {prefix}: {how_to_get('payloads')}"]) from None
    return build_bucket_store(prefix, settings)


class PayloadStores:
    """
    Object storage within the settings; see `worker.ports.Payloads`.

    Args:
        settings: Prefixes and limits.
        subscription: Short name of the request subscription, so that two of them do not share names of answers.
        build: Makes the store of a prefix.

    Raises:
        SettingsError: As `build_store`; every fault is named.
    """

    def __init__(
        self,
        settings: PayloadSettings,
        *,
        subscription: str,
        build: Callable[[ObjectUri, PayloadSettings], Store] = build_store,
    ) -> None:
        self._max_bytes = settings.max_bytes
        self._subscription = _safe(subscription)
        self._prefixes = list[_Prefix]()
        self._reply: tuple[ObjectUri, Store] | None = None
        faults = list[str]()
        for text in settings.request_prefixes:
            uri = parse_object_prefix(text)
            try:
                self._prefixes.append(_Prefix(uri, build(uri, settings)))
            except SettingsError as error:
                faults += error.faults
        if settings.reply_prefix is not None:
            uri = parse_object_prefix(settings.reply_prefix)
            try:
                self._reply = uri, build(uri, settings)
            except SettingsError as error:
                faults += error.faults
        if faults:
            raise SettingsError(list(dict.fromkeys(faults)))
        self.can_write = self._reply is not None

    def check(self, uri: str) -> None:
        """See `worker.ports.Payloads.check`."""
        self._find(uri)

    @asynccontextmanager
    async def open(self, uri: str) -> AsyncIterator[OpenPayload]:
        """See `worker.ports.Payloads.open`."""
        prefix, key = self._find(uri)
        async with AsyncExitStack() as stack:
            try:
                payload = await stack.enter_async_context(prefix.store.open(key))
            except PayloadError as error:
                raise prefix.explained(error) from None
            prefix.is_readable = True
            if payload.size > self._max_bytes:
                detail = f"It has {payload.size} bytes; {self._max_bytes} are allowed."
                raise PayloadError(Fault.PAYLOAD_TOO_LARGE, detail)
            yield payload

    async def write(self, message_id: str, body: bytes) -> StoredPayload:
        """See `worker.ports.Payloads.write`."""
        assert self._reply is not None
        prefix, store = self._reply
        key = f"{self._subscription}/{_safe(message_id)}.json"
        sha256 = await asyncio.to_thread(lambda: hashlib.sha256(body).hexdigest())
        try:
            await store.write(key, body)
        except PayloadError as error:  # whatever it is, it concerns every answer
            raise PayloadError(Fault.PAYLOAD_UNAVAILABLE, error.detail) from None
        folder = f"{prefix.key}/" if prefix.key else ""
        return StoredPayload(uri=str(ObjectUri(prefix.scheme, prefix.bucket, folder + key)), sha256=sha256)

    def _find(self, uri: str) -> tuple[_Prefix, str]:
        named = parse_object_uri(uri)
        for prefix in self._prefixes:
            if (key := named.below(prefix.uri)) is not None:
                return prefix, key
        raise ValueError("is not below a prefix that this worker may read")


def build_payloads(settings: Settings) -> PayloadStores:
    """
    Return object storage as the settings allow it; nothing is connected.

    Raises:
        SettingsError: As `PayloadStores`.
    """
    return PayloadStores(
        settings.payloads, subscription=settings.pubsub.sources()[0].request_subscription.rpartition("/")[2]
    )


def _safe(name: str) -> str:
    """Return a name as one segment of a key; a broker's ids are digits, of anything else a digest stands for it."""
    return name if _NAME.fullmatch(name) else hashlib.sha256(name.encode()).hexdigest()
