"""
What a shutdown still waits for: an answer that exists is published even when its delivery is cancelled, for a while.

A drain cancels what still runs when its grace is over.  From that moment each delivery has `settle_s` for whatever
must not be dropped in the middle; a second signal shortens it for all of them.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any


class ShutdownGrace:
    """
    Lets work go on beyond a cancellation, for a bounded time.

    Args:
        settle_s: That time, seconds.
        clock: Monotonic seconds.
    """

    def __init__(self, settle_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._settle_s = settle_s
        self._clock = clock
        self._hurried: asyncio.Future[None] | None = None
        """Done when the time of a hurry is over; made on the loop that first waits."""

    def hurry(self, settle_s: float) -> None:
        """
        Leave everything `settle_s` from now, also what is waited for already.

        Threads: the event loop's only.
        """
        self._settle_s = min(self._settle_s, settle_s)
        asyncio.get_running_loop().call_later(settle_s, self._time_is_up)

    def _time_is_up(self) -> None:
        if not self._hurry().done():
            self._hurry().set_result(None)

    def _hurry(self) -> "asyncio.Future[None]":
        if self._hurried is None:
            self._hurried = asyncio.get_running_loop().create_future()
        return self._hurried

    async def finish(self, work: Coroutine[Any, Any, None], cancelled_at: float | None = None) -> float | None:
        """
        See the work through, or stop it when its time is over; either way it has ended on return.

        Args:
            work: What must not be dropped in the middle.
            cancelled_at: When its delivery was cancelled, by the clock; `None` while it is not.

        Returns:
            When the delivery was cancelled; `None` if it was not.

        Raises:
            Exception: What the work raised.

        Cancellation: swallowed once; the work goes on for `settle_s`.  A second one stops it at once.
        """
        task = asyncio.get_running_loop().create_task(work)
        with suppress(asyncio.CancelledError):
            if cancelled_at is None:
                try:
                    await _end_of(task)
                except asyncio.CancelledError:
                    cancelled_at = self._clock()
            if not task.done():
                await self.wait(task, cancelled_at)
        if not task.done():
            task.cancel()
            await _end_of(task)
        if not task.cancelled():
            task.result()
        return cancelled_at

    async def wait(self, future: "asyncio.Future[Any]", since: float | None = None) -> None:
        """
        Wait for a future, at most until `settle_s` after an instant (`None`: now); it is never cancelled.

        Cancellation: leaves nothing behind.
        """
        now = self._clock()
        left = max(0.0, (now if since is None else since) + self._settle_s - now)
        await asyncio.wait({future, self._hurry()}, timeout=left, return_when=asyncio.FIRST_COMPLETED)


async def _end_of(task: "asyncio.Task[Any]") -> None:
    """
    Wait until the task has ended, however it does; what `asyncio.wait` does for several, at a third of its cost.

    Cancellation: the task goes on; nothing is left behind.
    """
    ended = asyncio.get_running_loop().create_future()

    def tell(_: object) -> None:
        if not ended.done():  # cancelled in the same turn of the loop
            ended.set_result(None)

    task.add_done_callback(tell)
    try:
        await ended
    except asyncio.CancelledError:
        task.remove_done_callback(tell)
        raise
