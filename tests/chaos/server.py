"""The embedded Pub/Sub server as disasters need it: it can go away and come back on its port, and let time pass."""

from worker.emulators.pubsub import LocalPubSubThread


class ChaosServer(LocalPubSubThread):
    """
    A `LocalPubSubThread` that can be restarted.

    Between `go_away` and `come_back` nothing listens: connections are broken and new ones refused.  Topics, messages
    and attempts are kept, as a broker with a disk keeps them; leases run on.
    """

    def go_away(self) -> None:
        """Break every connection and close the port."""
        self._call(lambda: self._server.stop(0))

    def come_back(self) -> None:
        """Listen on the same port again."""
        self._call(self._server.start)
