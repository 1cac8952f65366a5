"""
The server on an event loop in a thread of its own, for tests and programs whose own loop may block.

A blocked test loop must not stop the broker: leases would not end, and what the test wants to see would not happen.
"""

import asyncio
import threading
from types import TracebackType
from typing import Any, Self

from worker.emulators.pubsub.faults import Faults
from worker.emulators.pubsub.server import LocalPubSub


class LocalPubSubThread:
    """
    A `LocalPubSub` in its own thread.  Use it as `with LocalPubSubThread() as server`, or call `start` and `stop`.

    Threads: every method may be called from any thread but the server's own.

    Args:
        host, port, options: As for `LocalPubSub`.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0, **options: Any) -> None:
        self._server = LocalPubSub(host, port, **options)
        self._ready = threading.Event()
        self._stopping: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: BaseException | None = None
        self._grace_s = 0.0
        self._thread = threading.Thread(target=self._run, name="localpubsub", daemon=True)

    @property
    def address(self) -> str:
        """`host:port`, the value for `PUBSUB_EMULATOR_HOST`."""
        return self._server.address

    @property
    def port(self) -> int:
        """The port bound."""
        return self._server.port

    @property
    def faults(self) -> Faults:
        """The test interface."""
        return self._server.faults

    def advance(self, seconds: float) -> None:
        """Let time pass for the server; see `LocalPubSub.advance`."""
        self._server.advance(seconds)

    def start(self) -> None:
        """Start the thread and return once the port is open; raises OSError as `LocalPubSub.start`."""
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def stop(self, grace_s: float = 0.0) -> None:
        """Stop the server as `LocalPubSub.stop` does, and return once its thread ended; may be called again."""
        loop, stopping = self._loop, self._stopping
        if loop is not None and stopping is not None and self._thread.is_alive():
            self._grace_s = grace_s
            loop.call_soon_threadsafe(stopping.set)
            self._thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        try:
            await self._server.start()
        except BaseException as failure:  # noqa: BLE001 - handed to the thread that called `start`
            self._failure = failure
            return
        finally:
            self._ready.set()
        await self._stopping.wait()
        await self._server.stop(self._grace_s)
