"""The simulated server on an event loop and a thread of its own, for callers whose loop may block or who have none."""

import asyncio
import threading
from collections.abc import Callable, Collection, Coroutine
from typing import Any, Self, TypeVar

from worker.emulators.openai.options import SimOptions
from worker.emulators.openai.server import RESET_PARTS, SimBackend

T = TypeVar("T")

_PATIENCE_S = 30.0
"""How long a call waits for the server's thread: everything it does takes milliseconds."""


class SimBackendThread:
    """
    A running `SimBackend`, as a plain context manager.

    Threads: every method may be called from any thread; the methods wait for the server's thread.
    """

    def __init__(self, options: SimOptions | None = None, host: str = "127.0.0.1", port: int = 0) -> None:
        """Take the arguments of `SimBackend`; nothing runs yet."""
        self._options = options
        self._host = host
        self._port = port
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._failure: BaseException | None = None
        self._backend: SimBackend | None = None
        self._thread = threading.Thread(target=self._run, name="simbackend", daemon=True)
        self.base_url = ""
        """URL of the server, without `/v1`."""
        self.control_url = ""
        """URL below which `/sim/` always answers."""

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait(_PATIENCE_S)
        if self._failure is not None:
            self._thread.join(_PATIENCE_S)
            raise self._failure
        return self

    def __exit__(self, *_: object) -> None:
        if self._loop is not None and self._stopping is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(_PATIENCE_S)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as failure:  # noqa: BLE001 - handed to the thread that waits in __enter__
            self._failure = failure
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        async with SimBackend(self._options, self._host, self._port) as backend:
            self._backend = backend
            self.base_url, self.control_url = backend.base_url, backend.control_url
            self._ready.set()
            try:
                await self._stopping.wait()
            finally:
                self._backend = None

    def _call(self, ask: Callable[[SimBackend], Coroutine[Any, Any, T]]) -> T:
        if self._backend is None or self._loop is None:
            raise RuntimeError("the simulated server is not running")
        return asyncio.run_coroutine_threadsafe(ask(self._backend), self._loop).result(_PATIENCE_S)

    def control(self, document: object) -> dict[str, Any]:
        """Do as `SimBackend.control`."""
        return self._call(lambda backend: backend.control(document))

    def reset(self, parts: Collection[str] = RESET_PARTS) -> None:
        """Do as `SimBackend.reset`."""
        self._call(lambda backend: backend.reset(parts))

    def snapshot(self, *, series: bool = False) -> dict[str, Any]:
        """Do as `SimBackend.snapshot`."""

        async def read(backend: SimBackend) -> dict[str, Any]:
            return backend.snapshot(series=series)

        return self._call(read)
