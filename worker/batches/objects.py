"""
The contents of files: a folder, or a prefix of a bucket.

An object is written as a whole or not at all, and never changed.  What a file holds is found by its `object_key`, so
that a batch goes on reading its input when the file was deleted: the content is removed when nothing needs it.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable
from pathlib import Path
from typing import Protocol

from worker.errors import PayloadError, SettingsError, how_to_get
from worker.payloads.files import FileStore
from worker.policy.model import Fault
from worker.settings.schema import PayloadSettings
from worker.wire.object_uri import parse_object_prefix

QUEUED_CHUNKS = 2
"""Of an `ObjectWriter`: written, and not yet taken by the storage."""
WRITE_BYTES = 1 << 20
"""An `ObjectWriter` hands on chunks of at least this size."""


class Objects(Protocol):
    """Objects below one prefix; keys are relative to it."""

    async def write_stream(self, key: str, chunks: AsyncIterable[bytes]) -> int:
        """
        Write an object as its content comes; return its bytes.  It is durable then, and not there before.

        Raises:
            PayloadError: It cannot be written: unreachable, full, refused; retryable.

        Cancellation: nothing is written, as after an exception of `chunks`.
        """

    def read(self, key: str, *, start: int = 0, length: int | None = None) -> AsyncGenerator[bytes, None]:
        """
        Yield a part of an object, from byte `start`, `length` bytes at most.

        Raises:
            PayloadError: `payload_not_found`, or it cannot be read; retryable.
        """

    async def delete(self, key: str) -> None:
        """
        Delete an object; one that is not there is deleted already.

        Raises:
            PayloadError: It cannot be deleted; retryable.

        Cancellation: it may or may not be deleted.
        """


def open_objects(place: str, settings: PayloadSettings) -> Objects:
    """
    Return the objects of a folder or a prefix; a folder is made, of a bucket nothing is asked.

    Args:
        place: A folder, or `file://`, `gs://`, `s3://`, `az://`.
        settings: Options of the buckets.

    Raises:
        SettingsError: The place cannot be used, or the extra `payloads` is not installed; permanent.
    """
    if "://" not in place or place.startswith("file://"):
        folder = Path(place.removeprefix("file://"))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError([f"batches.files: {folder}: {error.strerror}"]) from None
        return FileStore(folder)
    try:
        prefix = parse_object_prefix(place)
    except ValueError as error:
        raise SettingsError([f"batches.files: {error}"]) from None
    try:
        from worker.payloads.objects import build_bucket_store  # noqa: PLC0415 - of an extra
    except ImportError:
        raise SettingsError([f"batches.files: {prefix}: {how_to_get('payloads')}"]) from None
    return build_bucket_store(prefix, settings)


def is_missing(error: PayloadError) -> bool:
    """Whether an object is not there, rather than its storage."""
    return error.fault == Fault.PAYLOAD_NOT_FOUND


class ObjectWriter:
    """
    Writes an object piece by piece, for those that write several at once.

    The object is begun with its first piece: without any it is not written.
    """

    def __init__(self, objects: Objects, key: str) -> None:
        self._objects = objects
        self._key = key
        self._buffer = bytearray()
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue(QUEUED_CHUNKS)
        self._task: asyncio.Task[int] | None = None
        self.lines = 0
        """Pieces written."""

    async def write(self, data: bytes) -> None:
        """
        Take one piece.

        Raises:
            PayloadError: The storage gave up.

        Cancellation: the object must be abandoned.
        """
        self.lines += 1
        self._buffer += data
        if len(self._buffer) >= WRITE_BYTES:
            await self._flush()

    async def _flush(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._objects.write_stream(self._key, self._pieces()))
        await self._put(bytes(self._buffer))
        self._buffer.clear()

    async def _put(self, piece: bytes | None) -> None:
        """Hand a piece on, unless the storage has given up: then raise what it raised."""
        assert self._task is not None
        putting = asyncio.ensure_future(self._queue.put(piece))
        try:
            await asyncio.wait({putting, self._task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not putting.done():
                putting.cancel()
        if self._task.done():
            self._task.result()

    async def _pieces(self) -> AsyncGenerator[bytes, None]:
        while (piece := await self._queue.get()) is not None:
            yield piece

    async def commit(self) -> int:
        """
        Write what is left; return the bytes of the object, 0 when there is none.

        Raises:
            PayloadError: As `Objects.write_stream`.

        Cancellation: the object must be abandoned.
        """
        if self._buffer:
            await self._flush()
        if self._task is None:
            return 0
        await self._put(None)
        return await self._task

    async def abandon(self) -> None:
        """
        Leave nothing of an object that was not committed; idempotent.

        Cancellation: the storage goes on to clean up.
        """
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
