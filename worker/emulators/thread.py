"""
An emulator on an event loop in a thread of its own, for tests and programs whose own loop may block or that have none.

A blocked test loop must not stop an emulator: leases would not end, answers would not come, and what the test checks
would not happen.
"""

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")

_CALL_TIMEOUT_S = 30.0
"""How long a call waits for the emulator's thread: everything it does takes milliseconds."""


class EmulatorThread(ABC):
    """
    The thread of one emulator.  Use it as a context manager, or call `start` and `stop`; it runs once.

    Threads: every method may be called from any thread but the emulator's own.
    """

    def __init__(self, name: str) -> None:
        """Give the thread a name; nothing runs yet."""
        self._ready = threading.Event()
        self._stopping: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @abstractmethod
    async def _open(self) -> None:
        """Start the emulator, on its thread; cancellation does not occur."""

    @abstractmethod
    async def _close(self) -> None:
        """Stop the emulator, on its thread; cancellation does not occur."""

    def start(self) -> None:
        """Start the thread and return once the emulator listens; raises what its start raises, for example OSError."""
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def stop(self) -> None:
        """Stop the emulator and return once its thread has ended; may be called again."""
        loop, stopping = self._loop, self._stopping
        if loop is not None and stopping is not None and self._thread.is_alive():
            loop.call_soon_threadsafe(stopping.set)
            self._thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _call(self, function: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """
        Run a coroutine function on the emulator's loop and return its result.

        Raises:
            RuntimeError: The emulator does not run.
            TimeoutError: The emulator's thread did not answer; permanent.
        """
        if self._loop is None or not self._thread.is_alive():
            raise RuntimeError(f"{self._thread.name} is not running")
        return asyncio.run_coroutine_threadsafe(function(), self._loop).result(_CALL_TIMEOUT_S)

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as failure:
            if self._ready.is_set():
                raise
            self._failure = failure  # raised in the thread that called `start`
        finally:
            self._ready.set()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        await self._open()
        self._ready.set()
        await self._stopping.wait()
        await self._close()
