"""
Output from the event loop: lines are collected while a write is under way and go out with the next one.

One write a burst instead of one a line, no write on the event loop's thread, and whoever hands in a line can wait until
it is with the operating system: that is what an ack waits for.
"""

import asyncio
from collections.abc import Callable

from worker.client.io.lane import Lane
from worker.client.ports import LineSink

_MAX_WRITE_BYTES = 4 * 1024 * 1024
"""Lines joined for one write; bounds the copy, a single line may be larger."""


class OutputPump:
    """
    Writes lines to a sink on a thread of its own.

    Args:
        sink: Where they go; not closed.
    """

    def __init__(self, sink: LineSink) -> None:
        self._sink = sink
        self._lane = Lane("output")
        self._queue: list[tuple[bytes, asyncio.Future[None], Callable[[], None]]] = []
        self._task: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        self._failed = asyncio.Event()

    async def put(self, line: bytes, written: Callable[[], None]) -> None:
        """
        Write one line; returns when it is with the operating system.

        Args:
            line: With its newline.
            written: Called once when it is, on the event loop, also when nobody waits any more.

        Raises:
            OutputError: It was not written, and no later line will be.

        Cancellation: the line is written all the same.
        """
        if self._failure is not None:
            raise self._failure
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((line, future, written))
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        await future

    async def watch(self) -> None:
        """Raise the failure of a write once there is one; never returns.  Cancellation: leaves nothing behind."""
        await self._failed.wait()
        assert self._failure is not None
        raise self._failure

    async def aclose(self, grace_s: float) -> bool:
        """
        Write what is left and end the thread; idempotent.

        Returns:
            `False` when a write still blocked after `grace_s` seconds, or failed: the rest is not written.

        Cancellation: like `grace_s` over.
        """
        try:
            if self._task is not None:
                await asyncio.wait({self._task}, timeout=grace_s)
        finally:
            is_idle = self._task is None
            if self._task is not None:
                self._task.cancel()
            self._lane.close()
        return is_idle and self._failure is None

    async def _run(self) -> None:
        try:
            while self._queue:
                await self._write(self._next())
        except Exception as error:  # noqa: BLE001 - raised by `watch` and by every `put`
            self._failure = error
            self._failed.set()
            for _, future, _ in self._queue:
                _fail(future, error)
            self._queue.clear()
        finally:
            self._task = None

    def _next(self) -> "list[tuple[bytes, asyncio.Future[None], Callable[[], None]]]":
        size = count = 0
        for line, _, _ in self._queue:
            size += len(line)
            if count and size > _MAX_WRITE_BYTES:
                break
            count += 1
        batch, self._queue = self._queue[:count], self._queue[count:]
        return batch

    async def _write(self, batch: "list[tuple[bytes, asyncio.Future[None], Callable[[], None]]]") -> None:
        try:
            await self._lane.call(self._sink.write, b"".join(line for line, _, _ in batch))
        except Exception as error:
            for _, future, _ in batch:
                _fail(future, error)
            raise
        for _, future, written in batch:
            written()
            if not future.done():
                future.set_result(None)


def _fail(future: "asyncio.Future[None]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
