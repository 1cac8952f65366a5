"""
Store and files as the routes use them: called from the event loop, without blocking it.

The store is synchronous; its calls run in threads of their own, as many as it has connections, so that a database that
hangs does not take the threads in which files are written.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from worker.batches.ids import FILE, make_id
from worker.batches.objects import Objects
from worker.batches.store import File, Store, StoreUnavailableError
from worker.errors import PayloadError

T = TypeVar("T")

THREADS = 8
INSIST_S = 8.0
"""How long a change is tried again while the database is away: a restart takes seconds, and a client that is answered
with an error repeats a creation whose commit may have been stored."""
INSIST_PAUSE_S = 0.25
PIECE_BYTES = 1 << 20
"""Handed to the storage of files at once."""


class Storage:
    """
    Store and files.

    Args:
        store: Where files and batches are described.
        objects: Where the contents of files are.
    """

    def __init__(self, store: Store, objects: Objects) -> None:
        self.store = store
        self.objects = objects
        self._threads = ThreadPoolExecutor(THREADS, "batches-api-store")

    def close(self) -> None:
        """End the threads; calls that run are not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def call(self, function: Callable[[], T]) -> T:
        """
        Run a call of the store in a thread.

        Raises:
            StoreUnavailableError: And what else the call raises.

        Cancellation: the call goes on.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    async def insist(self, function: Callable[[], T]) -> T:
        """
        Run a call that may be repeated, again and again while the database is away, for `INSIST_S` seconds.

        Raises:
            StoreUnavailableError: It is still away; what the call stores may be stored all the same.

        Cancellation: the call goes on.
        """
        end = time.monotonic() + INSIST_S
        while True:
            try:
                return await self.call(function)
            except StoreUnavailableError:
                if time.monotonic() >= end:
                    raise
            await asyncio.sleep(INSIST_PAUSE_S)

    async def write_file(
        self,
        tenant: str,
        chunks: AsyncIterator[bytes],
        *,
        filename: str,
        purpose: str,
        keep_s: int,
        check: Callable[[], Awaitable[int | None]] | None = None,
    ) -> File:
        """
        Write a file and return it; until then it is not visible.

        Args:
            tenant: Whose.
            chunks: The content, in order; what it raises is raised, and nothing is kept.
            filename: As it is shown.
            purpose: OpenAI's word.
            keep_s: Seconds until it expires.
            check: Called when the content is written; returns other seconds, or raises and nothing is kept.

        Raises:
            PayloadError: The storage of files is away or full; retryable.
            StoreUnavailableError: The database is away; retryable.

        Cancellation: nothing is kept.
        """
        file_id = make_id(FILE)
        key = f"uploads/{file_id}"
        now = int(await self.call(self.store.now))
        draft = File(
            id=file_id,
            tenant=tenant,
            purpose=purpose,
            filename=filename,
            bytes=0,
            created_at=now,
            expires_at=now + keep_s,
            object_key=key,
        )
        await self.insist(lambda: self.store.begin_file(draft))
        source = _Source(chunks)
        try:
            size = await self.objects.write_stream(key, source.pieces())
            other_s = None if check is None else await check()
            expires_at = None if other_s is None else now + other_s
            written = await self.insist(lambda: self.store.finish_file(file_id, size, expires_at=expires_at))
        except BaseException as error:  # noqa: BLE001 - raised again
            # What cannot be deleted now is found a day later by the housekeeping: the file was never shown.
            with suppress(PayloadError, StoreUnavailableError):
                await self.objects.delete(key)
                await self.call(lambda: self.store.abandon_file(file_id))
            raise source.fault or error from None
        if written is None:  # a day went by
            raise StoreUnavailableError("the file was removed while it was written")
        return written


class _Source:
    """
    The content of a file on its way to the storage.

    Args:
        chunks: As they come from the socket, some kilobytes each.
    """

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self.fault: Exception | None = None
        """What `chunks` raised: a storage may raise something of its own instead."""

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Yield the content in pieces that are worth a system call in a thread."""
        piece = bytearray()
        try:
            async for chunk in self._chunks:
                piece += chunk
                if len(piece) >= PIECE_BYTES:
                    yield bytes(piece)
                    piece.clear()
        except Exception as error:
            self.fault = error
            raise
        if piece:
            yield bytes(piece)
