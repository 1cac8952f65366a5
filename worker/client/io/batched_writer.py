"""
Output from the event loop: lines that arrive during a write are collected and written together by the next one.

A burst of lines takes one write, and no write runs on the event loop's thread.  `write` returns when the operating
system has the line; only then is its answer acked.
"""

import asyncio
from collections.abc import Callable

from worker.client.io.blocking import BlockingThread
from worker.client.ports import LineSink

_MAX_WRITE_BYTES = 4 * 1024 * 1024
"""Lines joined for one write; bounds the copy, a single line may be larger."""

_Queued = tuple[bytes, "asyncio.Future[None]", Callable[[], None]]
"""A line, the future of its `write`, and what to call after the write."""


class BatchedWriter:
    """
    Writes lines to a sink on its own thread.

    Args:
        sink: Where the lines go; not closed.
    """

    def __init__(self, sink: LineSink) -> None:
        self._sink = sink
        self._thread = BlockingThread("output")
        self._queue: list[_Queued] = []
        self._task: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        self._failed = asyncio.Event()

    async def write(self, line: bytes, written: Callable[[], None]) -> None:
        """
        Write one line; return when the operating system has it.

        Args:
            line: With its newline.
            written: Called once after the write, on the event loop, also when the caller was cancelled.

        Raises:
            OutputError: The line was not written, and no later line will be.

        Cancellation: the line is still written.
        """
        if self._failure is not None:
            raise self._failure
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((line, future, written))
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        await future

    async def watch(self) -> None:
        """Wait for a write to fail and raise its error; never returns.  Cancellation: leaves nothing behind."""
        await self._failed.wait()
        assert self._failure is not None
        raise self._failure

    async def aclose(self, grace_s: float) -> bool:
        """
        Write the remaining lines and end the thread; idempotent.

        Returns:
            `False` when a write failed or still blocks after `grace_s` seconds: the remaining lines are not written.

        Cancellation: gives up the remaining lines at once, as after `grace_s` seconds.
        """
        try:
            if self._task is not None:
                await asyncio.wait({self._task}, timeout=grace_s)
        finally:
            is_idle = self._task is None
            if self._task is not None:
                self._task.cancel()
            self._thread.close()
        return is_idle and self._failure is None

    async def _run(self) -> None:
        try:
            while self._queue:
                await self._write_batch(self._next_batch())
        except Exception as error:  # noqa: BLE001 - raised by `watch` and by every `write`
            self._failure = error
            self._failed.set()
            for _, future, _ in self._queue:
                _fail(future, error)
            self._queue.clear()
        finally:
            self._task = None

    def _next_batch(self) -> list[_Queued]:
        size = count = 0
        for line, _, _ in self._queue:
            size += len(line)
            if count and size > _MAX_WRITE_BYTES:
                break
            count += 1
        batch, self._queue = self._queue[:count], self._queue[count:]
        return batch

    async def _write_batch(self, batch: list[_Queued]) -> None:
        try:
            await self._thread.call(self._sink.write, b"".join(line for line, _, _ in batch))
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
