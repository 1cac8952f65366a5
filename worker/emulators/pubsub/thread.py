"""The embedded Pub/Sub server on a thread of its own."""

from typing import Any

from worker.emulators.pubsub.faults import Faults
from worker.emulators.pubsub.server import LocalPubSub
from worker.emulators.thread import EmulatorThread


class LocalPubSubThread(EmulatorThread):
    """
    A `LocalPubSub` in its own thread.  Use it as `with LocalPubSubThread() as server`, or call `start` and `stop`.

    Threads: every method may be called from any thread but the server's own.

    Args:
        host, port, options: As for `LocalPubSub`.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0, **options: Any) -> None:
        super().__init__("localpubsub")
        self._server = LocalPubSub(host, port, **options)
        self._grace_s = 0.0

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

    def stop(self, grace_s: float = 0.0) -> None:
        """Stop the server as `LocalPubSub.stop` does, and return once its thread ended; may be called again."""
        self._grace_s = grace_s
        super().stop()

    async def _open(self) -> None:
        await self._server.start()

    async def _close(self) -> None:
        await self._server.stop(self._grace_s)
