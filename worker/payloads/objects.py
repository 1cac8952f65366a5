"""
Buckets of Google Cloud Storage, S3 and Azure, read and written with obstore (docs/decisions/0019).

The only module that imports obstore, which is an extra.  Credentials come from where each service's own tools find them
(metadata server, `GOOGLE_APPLICATION_CREDENTIALS`, `AWS_*`, `AZURE_*`) or from the settings.  The library's own retries
are off: the policy decides about reads, the pipeline repeats writes.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from datetime import timedelta
from typing import Any

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError
from obstore.store import AzureStore, GCSStore, S3Store
from pydantic import SecretStr

from worker.errors import PayloadError, SettingsError
from worker.policy.model import Fault
from worker.ports import OpenPayload
from worker.settings.schema import PayloadSettings
from worker.wire.object_uri import ObjectUri

_CHUNK_BYTES = 1 << 20
_PART_BYTES = 8 << 20
_PARTS = 2
"""Of a streamed upload: so much of it is in memory at once; S3's least is 5 MiB, and 10,000 parts make 80 GB."""
_MAX_DETAIL_CHARS = 300
_NO_RETRIES = {"max_retries": 0, "retry_timeout": timedelta(seconds=1)}
_QUERY = re.compile(r"\?\S*")
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "bucket does not exist", "container does not exist")
"""In the services' 404 for a bucket, which is the operator's mistake and no requester's."""
_OF_A_STORE = (BaseError, FileNotFoundError, OSError, TimeoutError)


class BucketStore:
    """
    The objects below one prefix.

    Args:
        store: Of obstore; its own prefix is set.
        timeout_s: For one object.
    """

    def __init__(self, store: Any, *, timeout_s: float) -> None:
        self._store = store
        self._timeout_s = timeout_s

    @asynccontextmanager
    async def open(self, key: str) -> AsyncIterator[OpenPayload]:
        """Ask for an object; its content is read as it comes.  See `worker.ports.Payloads.open`."""
        try:
            async with asyncio.timeout(self._timeout_s):
                found = await obstore.get_async(self._store, key)
        except _OF_A_STORE as error:
            raise _fault(error) from None
        async with aclosing(_chunks(found)) as chunks:
            yield OpenPayload(size=found.meta["size"], chunks=chunks)

    async def write(self, key: str, data: bytes) -> None:
        """
        Put an object in one request, so that it is there as a whole or not at all.

        Raises:
            PayloadError: As `worker.ports.Payloads.write`.

        Cancellation: the object may or may not be written.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                await obstore.put_async(
                    self._store, key, data, attributes={"Content-Type": "application/json"}, use_multipart=False
                )
        except _OF_A_STORE as error:
            raise _fault(error) from None

    async def write_stream(self, key: str, chunks: AsyncIterable[bytes]) -> int:
        """
        Put an object of any length as its content comes; return its bytes.

        Raises:
            PayloadError: As `worker.ports.Payloads.write`.

        Cancellation: nothing is put, as after an exception of `chunks`; a rule of the bucket removes parts of uploads.
        """
        size, broken = 0, list[Exception]()

        async def counted() -> AsyncIterator[bytes]:
            nonlocal size
            try:
                async for chunk in chunks:
                    size += len(chunk)
                    yield chunk
            except Exception as error:  # the library would raise one of its own
                broken.append(error)
                raise

        try:
            await obstore.put_async(self._store, key, counted(), chunk_size=_PART_BYTES, max_concurrency=_PARTS)
        except Exception as error:
            if broken:
                raise broken[0] from None
            if isinstance(error, _OF_A_STORE):
                raise _fault(error) from None
            raise
        return size

    async def read(self, key: str, *, start: int = 0, length: int | None = None) -> AsyncGenerator[bytes, None]:
        """
        Yield a part of an object; see `worker.payloads.files.FileStore.read`.

        One request for every few megabytes: a reader may take its time, and a request has `timeout_s`.

        Raises:
            PayloadError: As `worker.ports.Payloads.open`.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                size: int = (await obstore.head_async(self._store, key))["size"]
            end = size if length is None else min(size, start + length)
            for position in range(start, end, _PART_BYTES):
                async with asyncio.timeout(self._timeout_s):
                    part = await obstore.get_range_async(
                        self._store, key, start=position, end=min(end, position + _PART_BYTES)
                    )
                yield bytes(part)
        except _OF_A_STORE as error:
            raise _fault(error) from None

    async def delete(self, key: str) -> None:
        """
        Delete an object; one that is not there is deleted already.

        Raises:
            PayloadError: The bucket cannot be reached or written.

        Cancellation: the object may or may not be deleted.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                await obstore.delete_async(self._store, key)
        except FileNotFoundError as error:
            if any(sign in str(error) for sign in _NO_BUCKET):
                raise _fault(error) from None
        except _OF_A_STORE as error:
            raise _fault(error) from None


async def _chunks(found: Any) -> AsyncGenerator[bytes, None]:
    """Yield the content as it comes; the library's own timeout, which began with the request, ends it."""
    try:
        async for chunk in found.stream(min_chunk_size=_CHUNK_BYTES):
            yield bytes(chunk)
    except _OF_A_STORE as error:
        raise _fault(error) from None


def build_bucket_store(prefix: ObjectUri, settings: PayloadSettings) -> BucketStore:
    """
    Return the store of one prefix; nothing is connected.

    Raises:
        SettingsError: An option is not known, or no store can be made of them; permanent.
    """
    options = {name: value.get_secret_value() for name, value in _options(prefix, settings).items()}
    client: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=min(settings.connect_s, settings.timeout_s)),
        "timeout": timedelta(seconds=settings.timeout_s),
    }
    if any(value.startswith("http://") for value in options.values()):
        client["allow_http"] = True
    kind: Any = {"gs": GCSStore, "s3": S3Store, "az": AzureStore}[prefix.scheme]
    try:
        store = kind(
            prefix.bucket,
            prefix=prefix.key or None,
            config=options,
            client_options=client,
            retry_config=_NO_RETRIES,
        )
    except (BaseError, ValueError, TypeError) as error:  # the text names the option, never its value
        raise SettingsError([f"payloads.{prefix.scheme}_options: {_first_line(error)}"]) from None
    return BucketStore(store, timeout_s=settings.timeout_s)


def _options(prefix: ObjectUri, settings: PayloadSettings) -> Mapping[str, SecretStr]:
    options: Mapping[str, SecretStr] = getattr(settings, f"{prefix.scheme}_options")
    return options


def _fault(error: Exception) -> PayloadError:
    text = _first_line(error)
    if isinstance(error, FileNotFoundError):
        if any(sign in str(error) for sign in _NO_BUCKET):
            return PayloadError(Fault.PAYLOAD_UNAVAILABLE, text)
        return PayloadError(Fault.PAYLOAD_NOT_FOUND)
    if isinstance(error, PermissionDeniedError):
        return PayloadError(Fault.PAYLOAD_REFUSED, text)
    return PayloadError(Fault.PAYLOAD_UNAVAILABLE, text or "no answer within payloads.timeout_s")


def _first_line(error: Exception) -> str:
    """Return what the library says, without its own dump and without queries of URLs, which may hold signatures."""
    return _QUERY.sub("", str(error).partition("\n")[0])[:_MAX_DETAIL_CHARS]
