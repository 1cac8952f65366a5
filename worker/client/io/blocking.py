"""
A thread for calls that may block for ever, such as reading from an idle pipe or writing to a full one.

`asyncio.to_thread` does not serve: the interpreter joins its threads when it exits, so that Ctrl-C would wait for the
next line on standard input.  This thread is a daemon; it makes one call at a time, in order.
"""

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class BlockingThread:
    """
    Runs blocking calls one after the other on its own thread.

    Args:
        name: Name of the thread, for debuggers.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[asyncio.Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """
        Return what the function returns, or raise what it raises.

        Cancellation: a call that has begun continues and its result is dropped; a queued call may still be made.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._calls.put((future, lambda: function(*args, **kwargs)))
        return await future

    def close(self) -> None:
        """End the thread after its queued calls; does not wait, since a call may block for ever."""
        self._calls.put(None)

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call = item
            try:
                outcome: tuple[Any, BaseException | None] = (call(), None)
            except BaseException as error:  # noqa: BLE001 - raised at the caller
                outcome = (None, error)
            try:
                future.get_loop().call_soon_threadsafe(_settle, future, *outcome)
            except RuntimeError:  # the loop has ended, and its waiting tasks with it
                return


def _settle(future: "asyncio.Future[Any]", result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
