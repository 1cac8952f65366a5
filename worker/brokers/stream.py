"""
One streaming pull of Google's client, as the subscriber supervises it.

Both lease-extension bounds are fixed at 60 s.  Otherwise the library would follow the 99th percentile of processing
time up to 600 s, and a killed pod's messages would stay away for ten minutes.
"""

import asyncio
import time
from typing import Any

from google.api_core import exceptions
from google.cloud.pubsub_v1.subscriber.message import Message

from worker.brokers.flow_control import library_limits
from worker.brokers.scheduler import LoopScheduler
from worker.errors import BrokerResourceError
from worker.settings.schema import PubSubSettings
from worker.telemetry.logs import get_logger
from worker.wire.message import ReceivedMessage

LEASE_EXTENSION_S = 60
"""How far every lease is extended at a time: after a SIGKILL its messages come back within this."""
LEASE_MARGIN_S = 180
"""Added to our own lease budget before the library drops a lease silently: a maintainer's round and the settling."""
PERMANENT = (
    exceptions.NotFound,
    exceptions.PermissionDenied,
    exceptions.InvalidArgument,
    exceptions.FailedPrecondition,
)
"""Errors that another try would meet again."""
UNAUTHENTICATED_PATIENCE_S = 600.0
"""Refused credentials are renewed and tried again for so many seconds: a token is revoked before its time, a key is
rotated, the metadata server is not ready.  House decision."""

_log = get_logger("broker")


class Stream:
    """One `subscribe()` call: its scheduler, its future, and whether it began to end."""

    def __init__(self, client: Any, subscription: str, settings: PubSubSettings, arrived: Any) -> None:
        self._subscription = subscription
        self.opened_at = time.monotonic()
        self.messages = 0
        """Delivered by this stream and not settled: what the server counts against its limit."""
        self.ending = asyncio.Event()
        self.has_stopped = asyncio.Event()
        longest_s = 2 * settings.max_lease_duration_s + LEASE_MARGIN_S  # it may have waited once as long as it may run
        self.scheduler = LoopScheduler(asyncio.get_running_loop(), longest_s, self.ending.set, self.has_stopped.set)
        self.future = client.subscribe(
            subscription,
            callback=lambda message: arrived(self, message),
            flow_control=library_limits(settings, longest_s, LEASE_EXTENSION_S),
            scheduler=self.scheduler,
            await_callbacks_on_shutdown=True,
        )
        self._manager = self.future._StreamingPullFuture__manager  # noqa: SLF001 - nothing public tells what is on hold
        self.closed = asyncio.wrap_future(self.future)
        self.closed.add_done_callback(self._ended)

    def _ended(self, closed: "asyncio.Future[Any]") -> None:
        if not closed.cancelled():
            closed.exception()  # retrieved; `error` reads it
        self.ending.set()

    @property
    def error(self) -> BaseException | None:
        """Why the stream ended; `None` while it runs and after an ordinary end."""
        return self.closed.exception() if self.closed.done() and not self.closed.cancelled() else None

    @property
    def is_unauthenticated(self) -> bool:
        """Whether it ended because the credentials were refused."""
        return isinstance(self.error, exceptions.Unauthenticated)

    def raise_if_permanent(self, *, was_deferred: bool, unauthenticated_s: float) -> None:
        """
        Raise `BrokerResourceError` if it ended because the subscription is gone or refused.

        Args:
            was_deferred: It was kept back by our own flow control, so that its end says nothing.
            unauthenticated_s: For how long the credentials have been refused.
        """
        error = self.error
        is_permanent = isinstance(error, PERMANENT) or (
            self.is_unauthenticated and unauthenticated_s >= UNAUTHENTICATED_PATIENCE_S
        )
        if is_permanent and not was_deferred:
            raise BrokerResourceError(f"{self._subscription}: {error}") from error
        if error is not None and not isinstance(error, exceptions.GoogleAPICallError | exceptions.RetryError):
            _log.error("pull_failed", exc_info=error)

    def on_hold(self) -> tuple[int, int]:
        """Return messages and bytes that wait in the library for another of their ordering key; from any thread."""
        return self._manager._messages_on_hold.size, self._manager._on_hold_bytes  # noqa: SLF001

    def cancel(self) -> None:
        """Stop pulling; leases are kept until what was delivered is settled."""
        self.scheduler.expect_shutdown()
        self.future.cancel()


def received(message: Message, received_at: float) -> ReceivedMessage:
    """Return what the processor sees of a delivery whose lease began at `received_at`, monotonic seconds."""
    published = message.publish_time
    return ReceivedMessage(
        message_id=message.message_id,
        data=message.data,
        attributes=dict(message.attributes),
        publish_time=published.timestamp() if published is not None else 0.0,
        delivery_attempt=message.delivery_attempt,
        ordering_key=message.ordering_key or "",
        received_at=received_at,
    )
