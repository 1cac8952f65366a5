"""The embedded Pub/Sub server as disasters need it: it can go away and come back on its port, and let time pass."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from worker.emulators.pubsub import LocalPubSubThread


class ChaosServer(LocalPubSubThread):
    """
    A `LocalPubSubThread` that can be restarted.

    Between `go_away` and `come_back` nothing listens: connections are broken and new ones refused.  Topics, messages
    and attempts are kept, as a broker with a disk keeps them; leases run on.
    """

    def go_away(self) -> None:
        """Break every connection and close the port."""
        self._wait_for(self._server.stop(0))

    def come_back(self) -> None:
        """Listen on the same port again."""
        self._wait_for(self._server.start())

    def _wait_for(self, coroutine: Coroutine[Any, Any, None]) -> None:
        assert self._loop is not None
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)
