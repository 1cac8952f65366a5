"""
Flow control where the messages are: at the server, one stream at a time.

The client library enforces its limits by no longer reading the stream, from full load down to 80 %.  Meanwhile the
server fills what was settled, and gRPC's buffer keeps messages whose leases are not extended: while requests take
minutes, or an outage lasts, up to a fifth of `max_in_flight` runs out at the broker, costs an attempt each, and comes
back into the same buffer.  So the library gets limits that it does not reach, everything that arrives is leased at
once, and the limits proper go to the server, in the first request of each stream.

A stream's limits can be set in its first request only, and the server knows nothing of what an earlier stream still
holds.  So a new stream gets the full limits, and its first request is deferred while more than one stream's worth is
held: at most twice the limits, however many streams a long outage wears out.

Source: google-cloud-pubsub 2.44, `streaming_pull_manager.py`, `maybe_pause_consumer`; `StreamingPullRequest` in
google/pubsub/v1/pubsub.proto.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from google.cloud import pubsub_v1
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcTransport

from worker.brokers.half_close import HalfClosing
from worker.settings.schema import PubSubSettings
from worker.wire.message import MAX_PUBSUB_MESSAGE_BYTES

PREFETCH_MESSAGES = 10_000
"""Added to the library's limit for servers that ignore theirs, as Google's emulator does: they send what they have, and
so much of it is leased.  Beyond that it stands in the buffer again: with 1,000, outages of a minute spent attempts."""
LOOK_S = 0.1
"""How often a deferred stream looks whether it may begin; a thread of gRPC's does it."""


def library_limits(settings: PubSubSettings, max_lease_s: float, extension_s: int) -> Any:
    """
    Return limits for the client library that a server which honours its own never reaches.

    Args:
        settings: Whose limits the server gets.
        max_lease_s: Seconds after which the library gives a lease up.
        extension_s: Seconds by which a lease is extended each time.
    """
    return pubsub_v1.types.FlowControl(
        max_messages=2 * settings.max_in_flight + PREFETCH_MESSAGES,
        max_bytes=2 * (settings.max_in_flight_bytes + MAX_PUBSUB_MESSAGE_BYTES),
        max_lease_duration=max_lease_s,
        min_duration_per_lease_extension=extension_s,
        max_duration_per_lease_extension=extension_s,
    )


class OutstandingMessages:
    """
    What was delivered and is not settled, over all streams.

    Written by the event loop, read by threads of gRPC's, one number at a time.

    Attributes:
        extra: Messages that may be held beyond the limit; they do not count when another stream is to begin.
        on_hold: Returns messages and bytes that the library keeps to itself, each behind another of its ordering key:
            leased, but not delivered yet.
        is_deferred: Whether the latest stream has not said its first request yet.  What a server makes of such a stream
            after hours is documented nowhere; whatever it answers says nothing about the subscription.
        is_closed: Set when nothing more is wanted: a stream that is deferred never begins.
    """

    def __init__(self, settings: PubSubSettings) -> None:
        self.max_messages = settings.max_in_flight
        self.max_bytes = settings.max_in_flight_bytes
        self.messages = 0
        self.size_bytes = 0
        self.extra = 0
        self.is_deferred = False
        self.is_closed = False
        self.on_hold: Callable[[], tuple[int, int]] = lambda: (0, 0)

    def add(self, size_bytes: int) -> None:
        """Count a delivery in."""
        self.messages += 1
        self.size_bytes += size_bytes

    def remove(self, size_bytes: int) -> None:
        """Count a delivery out."""
        self.messages -= 1
        self.size_bytes -= size_bytes

    def leaves_room(self) -> bool:
        """Return whether another stream may begin."""
        messages, size_bytes = self.on_hold()
        messages, size_bytes = messages + self.messages, size_bytes + self.size_bytes
        return messages - self.extra <= self.max_messages and size_bytes < self.max_bytes + MAX_PUBSUB_MESSAGE_BYTES


class LimitedTransport(SubscriberGrpcTransport):
    """
    The library's transport, whose streaming pulls carry our limits.

    Not an interceptor of gRPC's: the client library takes the error of an intercepted call for one more broken stream,
    and reopens for ever, without a pause, on a channel that is closed.

    Args:
        channel: An open channel.
        held: Decides when the next stream may begin.
        is_emulator: Its streams end as an emulator understands it.
    """

    def __init__(self, channel: grpc.Channel, held: OutstandingMessages, *, is_emulator: bool = False) -> None:
        self._outstanding = held
        self._is_emulator = is_emulator
        self._limited: StreamingPull | None = None
        super().__init__(channel=channel)

    @property
    def streaming_pull(self) -> Any:
        """The call, always the same object: the client looks its wrapper up by it."""
        if self._limited is None:
            call = super().streaming_pull
            self._limited = StreamingPull(HalfClosing(call) if self._is_emulator else call, self._outstanding)
        return self._limited


class StreamingPull(grpc.StreamStreamMultiCallable):  # type: ignore[type-arg]  # not subscriptable at run time
    """Writes our limits into the first request of each streaming pull, and keeps it back while there is no room."""

    def __init__(self, call: Any, held: OutstandingMessages) -> None:
        self._call = call
        self._outstanding = held

    def __call__(self, request_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        """Begin a stream; called on a thread of the library's, and does not wait."""
        requests = _Requests(request_iterator, self._outstanding)
        requests.call = call = self._call(iter(requests), *args, **kwargs)
        return call


class _Requests:
    """The requests of one stream; iterated on a thread of gRPC's that may wait."""

    def __init__(self, source: Any, held: OutstandingMessages, sleep: Callable[[float], None] = time.sleep) -> None:
        self._source = source
        self._outstanding = held
        self._sleep = sleep
        self.call: Any = None
        """Set once the call exists, which may be after the iteration began."""

    def __iter__(self) -> Iterator[Any]:
        source = iter(self._source)
        while not self._outstanding.leaves_room():
            self._outstanding.is_deferred = True
            self._sleep(LOOK_S)
            if self._outstanding.is_closed or (self.call is not None and not self.call.is_active()):
                return
        self._outstanding.is_deferred = False
        for first in source:
            first.max_outstanding_messages = self._outstanding.max_messages
            first.max_outstanding_bytes = self._outstanding.max_bytes
            yield first
            break
        yield from source
