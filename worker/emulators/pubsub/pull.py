"""
Pull and StreamingPull: the shell around `Subscription.take`.

A receiver is a `Receiver` whose `wake` sets an event; nobody polls.  A stream has one reader (requests: acks, deadline
changes, pings) and one writer (this task); what the reader wants said goes through the writer.  The engine decides what
may be sent; a write that does not return, because the client reads slowly, holds back nothing but its own stream.

Responses stay below gRPC's default receive limit of 4 MiB: that is what a client has that was only told
`PUBSUB_EMULATOR_HOST`, and one larger response makes it reopen its stream for ever.
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
"""As many as a publish request may carry."""

MAX_RESPONSE_BYTES = 3_500_000
"""Of messages; the rest up to 4 MiB is room for ack ids.  A single larger message is sent alone."""

_PULL_WAIT_S = 30.0
"""How long a Pull waits for a first message when the client sets no deadline: "a bounded amount of time" in
google/pubsub/v1/pubsub.proto."""

_PULL_WAIT_SHARE = 0.9
"""Part of the client's deadline that a Pull waits, so that the empty answer still arrives."""

_PullRequest = types.PullRequest.pb()
_StreamingPullRequest = types.StreamingPullRequest.pb()
_StreamingPullResponse = types.StreamingPullResponse.pb()


async def pull(broker: Broker, data: bytes, client_wait_s: float | None) -> bytes:
    """
    Answer a Pull: what is there, or the first that comes.

    Args:
        broker: Where to pull from.
        data: Serialised `PullRequest`.
        client_wait_s: Seconds the client will wait; `None` for ever.

    Returns:
        Serialised `PullResponse`; without messages when none came in time.

    Raises:
        PubSubError: As the subscription's state demands.

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
        broker: Where to pull from.
        requests: Serialised `StreamingPullRequest` messages; their end is the client's half-close.
    """

    def __init__(self, broker: Broker, requests: AsyncIterable[bytes]) -> None:
        self._broker = broker
        self._requests = requests
        self._event = asyncio.Event()
        self._receiver = Receiver(self._event.set)
        self._notes: list[bytes] = []  # serialised parts of responses: confirmations and answers to pings
        self._answers_pings = False
        self._is_half_closed = False
        self.subscription_path = ""

    def break_off(self, error: PubSubError) -> None:
        """End the stream with this error at the next opportunity."""
        self._receiver.close(error)

    async def run(self, context: Any) -> None:
        """
        Serve the stream until the client closes it.

        Args:
            context: The `grpc.aio.ServicerContext`; only `write` is used.

        Raises:
            PubSubError: Why the server ends it.

        Cancellation: the client went away; what it holds comes back when the leases end.
        """
        requests = aiter(self._requests)
        first = await anext(requests, None)
        if first is None:
            return
        subscription = self._open(parse(_StreamingPullRequest, first))
        subscription.attach(self._receiver)
        reader = asyncio.create_task(self._read(requests), name=f"streaming-pull-reader {self.subscription_path}")
        try:
            while not (self._is_half_closed and not self._notes):
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
        """Take the settings of the first request; returns the subscription."""
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
        """Take in requests until the half-close; a wrong one ends the stream."""
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
                    self._note(b"")
        except PubSubError as error:
            self._receiver.close(error)
        else:
            self._is_half_closed = True
            self._event.set()

    def _apply(self, request: Any) -> None:
        """Do the acks and deadline changes of a request; on an exactly-once subscription, note what became of them."""
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
            self._note(confirmation.SerializeToString())

    def _set_deadline(self, seconds: int) -> None:
        check_bounds("stream_ack_deadline_seconds", seconds, *ACK_DEADLINE_S)
        self._receiver.ack_deadline_s = float(seconds)

    def _note(self, part: bytes) -> None:
        self._notes.append(part)
        self._event.set()

    def _next_response(self) -> bytes:
        """Return the next serialised response, empty when there is nothing to say."""
        subscription = self._broker.subscription(self.subscription_path)
        if self._notes:
            return self._notes.pop(0) + _PROPERTIES[subscription.policy.is_exactly_once, subscription.policy.is_ordered]
        taken = subscription.take(self._receiver, MAX_RESPONSE_MESSAGES, MAX_RESPONSE_BYTES)
        if not taken:
            return b""
        properties = _PROPERTIES[subscription.policy.is_exactly_once, subscription.policy.is_ordered]
        return encode_received(taken) + properties


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
"""What every response says of the subscription; appended, since protobuf fields may stand in any order."""
