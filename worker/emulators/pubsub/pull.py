"""
Pull and StreamingPull: gRPC around `Subscription.take`.

Each call has a `Receiver` whose `wake` sets an event, so that no task polls.  A stream has one task that reads requests
(acks, deadline changes, pings) and one that writes all responses, those to requests included.  The engine decides what
may be sent; a write that waits because its client reads slowly delays no other stream.

Responses stay below 4 MiB, the default receive limit of gRPC: a client that knows only `PUBSUB_EMULATOR_HOST` has that
limit, and after one larger response it would reopen its stream again and again.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

from google.pubsub_v1 import types

from worker.emulators.pubsub.broker import Broker
from worker.emulators.pubsub.deliveries import Receiver
from worker.emulators.pubsub.errors import InvalidArgumentError, PubSubError, check_bounds, too_small
from worker.emulators.pubsub.messages import encode_received
from worker.emulators.pubsub.resources import ACK_DEADLINE_S
from worker.emulators.pubsub.rpc import check_ack_deadline, parse

MAX_RESPONSE_MESSAGES = 1_000
"""As many as the service accepts in one publish request."""

MAX_RESPONSE_BYTES = 3_500_000
"""Sum of message sizes; ack ids take the rest up to 4 MiB.  A single larger message is sent alone."""

_PULL_WAIT_S = 30.0
"""Longest wait of a Pull for its first message: "a bounded amount of time" in google/pubsub/v1/pubsub.proto."""

_PULL_WAIT_SHARE = 0.9
"""Share of the client's deadline that a Pull waits, so that an empty answer still arrives in time."""

_PullRequest = types.PullRequest.pb()
_StreamingPullRequest = types.StreamingPullRequest.pb()
_StreamingPullResponse = types.StreamingPullResponse.pb()


async def pull(broker: Broker, data: bytes, client_wait_s: float | None) -> bytes:
    """
    Answer a Pull with the messages that are ready, or wait for the first one.

    Args:
        broker: The broker.
        data: Serialised `PullRequest`.
        client_wait_s: Seconds until the client's deadline; `None` without a deadline.

    Returns:
        Serialised `PullResponse`; without messages when none became ready in time.

    Raises:
        PubSubError: The request is wrong, or the subscription cannot be pulled from.

    Cancellation: nothing is leased.
    """
    request = parse(_PullRequest, data)
    if request.max_messages < 1:
        raise InvalidArgumentError(too_small("max_messages", request.max_messages, 1))
    subscription = broker.subscription(request.subscription)
    wait_s = _PULL_WAIT_S if client_wait_s is None else min(_PULL_WAIT_S, client_wait_s * _PULL_WAIT_SHARE)
    event = asyncio.Event()
    receiver = Receiver(event.set)
    subscription.attach(receiver)
    try:
        async with asyncio.timeout(0 if request.return_immediately else wait_s):
            while True:
                event.clear()
                if receiver.error is not None:
                    raise receiver.error
                limit = min(request.max_messages, MAX_RESPONSE_MESSAGES)
                if taken := subscription.take(receiver, limit, MAX_RESPONSE_BYTES):
                    return encode_received(taken)
                await event.wait()
    except TimeoutError:
        return b""
    finally:
        subscription.detach(receiver)


class PullStream:
    """
    One StreamingPull from its first request to its end.

    Args:
        broker: The broker.
        requests: Serialised `StreamingPullRequest` messages; they end when the client closes its side.
    """

    def __init__(self, broker: Broker, requests: AsyncIterable[bytes]) -> None:
        self._broker = broker
        self._requests = requests
        self._event = asyncio.Event()
        self._receiver = Receiver(self._event.set)
        self._replies: list[bytes] = []  # serialised parts of responses: ack confirmations and answers to pings
        self._answers_pings = False
        self._is_half_closed = False
        self._is_mute = False
        self.subscription_path = ""

    def mute(self) -> None:
        """Send nothing more, whatever comes, and stay open."""
        self._is_mute = True

    def break_off(self, error: PubSubError) -> None:
        """End the stream with this error after the write that is in progress."""
        self._receiver.close(error)

    async def run(self, context: Any) -> None:
        """
        Serve the stream until the client closes it.

        Args:
            context: The `grpc.aio.ServicerContext`; only `write` is used.

        Raises:
            PubSubError: The reason why the server ends it.

        Cancellation: the client disconnected; its messages are redelivered when their leases end.
        """
        requests = aiter(self._requests)
        first = await anext(requests, None)
        if first is None:
            return
        subscription = self._open(parse(_StreamingPullRequest, first))
        subscription.attach(self._receiver)
        reader = asyncio.create_task(self._read(requests), name=f"streaming-pull-reader {self.subscription_path}")
        try:
            while not (self._is_half_closed and not self._replies):
                self._event.clear()
                if self._receiver.error is not None:
                    raise self._receiver.error
                response = self._next_response()
                if response:
                    await context.write(response)
                else:
                    await self._event.wait()
        finally:
            subscription.detach(self._receiver)
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader

    def _open(self, request: Any) -> Any:
        """Apply the first request, which has the settings of the stream, and return the subscription."""
        if not request.subscription:
            raise InvalidArgumentError("The first StreamingPullRequest must set subscription.")
        subscription = self._broker.subscription(request.subscription)
        self.subscription_path = request.subscription
        self._set_deadline(request.stream_ack_deadline_seconds)
        self._receiver.limit(request.max_outstanding_messages, request.max_outstanding_bytes)
        self._answers_pings = request.protocol_version > 0
        self._apply(request)
        return subscription

    async def _read(self, requests: AsyncIterator[bytes]) -> None:
        """Apply requests until the client closes its side; a wrong request ends the stream."""
        try:
            async for data in requests:
                request = parse(_StreamingPullRequest, data)
                if request.subscription:
                    raise InvalidArgumentError("subscription may only be set in the first StreamingPullRequest.")
                if request.max_outstanding_messages or request.max_outstanding_bytes or request.protocol_version:
                    raise InvalidArgumentError("Flow control may only be set in the first StreamingPullRequest.")
                if request.stream_ack_deadline_seconds:
                    self._set_deadline(request.stream_ack_deadline_seconds)
                self._apply(request)
                if self._answers_pings and not data:
                    self._reply(b"")
        except PubSubError as error:
            self._receiver.close(error)
        else:
            self._is_half_closed = True
            self._event.set()

    def _apply(self, request: Any) -> None:
        """Apply the acks and deadline changes of a request, and confirm them on an exactly-once subscription."""
        if len(request.modify_deadline_ack_ids) != len(request.modify_deadline_seconds):
            raise InvalidArgumentError("modify_deadline_ack_ids and modify_deadline_seconds must have the same size.")
        subscription = self._broker.subscription(self.subscription_path)
        confirmation = _StreamingPullResponse()
        if request.ack_ids:
            invalid = set(subscription.acknowledge(request.ack_ids))
            _confirm(confirmation.acknowledge_confirmation, request.ack_ids, invalid)
        if request.modify_deadline_ack_ids:
            invalid = set()
            changes = zip(request.modify_deadline_ack_ids, request.modify_deadline_seconds, strict=True)
            for ack_id, seconds in changes:
                check_ack_deadline(seconds)
                invalid.update(subscription.modify_ack_deadline([ack_id], seconds))
            _confirm(confirmation.modify_ack_deadline_confirmation, request.modify_deadline_ack_ids, invalid)
        if subscription.policy.is_exactly_once and confirmation.ListFields():
            self._reply(confirmation.SerializeToString())

    def _set_deadline(self, seconds: int) -> None:
        check_bounds("stream_ack_deadline_seconds", seconds, *ACK_DEADLINE_S)
        self._receiver.ack_deadline_s = float(seconds)

    def _reply(self, part: bytes) -> None:
        self._replies.append(part)
        self._event.set()

    def _next_response(self) -> bytes:
        """Return the next serialised response; empty when there is none."""
        if self._is_mute:
            return b""
        subscription = self._broker.subscription(self.subscription_path)
        properties = _PROPERTIES[subscription.policy.is_exactly_once, subscription.policy.is_ordered]
        if self._replies:
            return self._replies.pop(0) + properties
        taken = subscription.take(self._receiver, MAX_RESPONSE_MESSAGES, MAX_RESPONSE_BYTES)
        return encode_received(taken) + properties if taken else b""


def _confirm(confirmation: Any, ack_ids: Any, invalid: set[str]) -> None:
    confirmation.ack_ids.extend(ack_id for ack_id in ack_ids if ack_id not in invalid)
    confirmation.invalid_ack_ids.extend(ack_id for ack_id in ack_ids if ack_id in invalid)


def _properties(*, is_exactly_once: bool, is_ordered: bool) -> bytes:
    response = _StreamingPullResponse()
    response.subscription_properties.SetInParent()
    response.subscription_properties.exactly_once_delivery_enabled = is_exactly_once
    response.subscription_properties.message_ordering_enabled = is_ordered
    return bytes(response.SerializeToString())


_PROPERTIES = {
    (is_exactly_once, is_ordered): _properties(is_exactly_once=is_exactly_once, is_ordered=is_ordered)
    for is_exactly_once in (False, True)
    for is_ordered in (False, True)
}
"""The part of every response that describes the subscription; appended, as protobuf fields may be in any order."""
