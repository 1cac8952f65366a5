"""
The subscription that a run over a file makes for its answers alone, and removes at its end.

The only caller is the client's side (`submit`, `collect`, `retry-failed`); the worker makes and removes nothing.

Source: https://cloud.google.com/pubsub/docs/subscription-message-filter#filtering_syntax.
"""

from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import empty_pb2
from google.pubsub_v1 import types

from worker.errors import BrokerError, BrokerResourceError

TIMEOUT_S = 20.0
ACK_DEADLINE_S = 10
"""Pub/Sub's least: the answers that a killed `collect` had are back soon."""
RETENTIONS_S = (31 * 86_400, 7 * 86_400)
"""How long answers are kept that are not collected: Pub/Sub's most, and the most of servers that refuse that (Google's
emulator).  Pub/Sub's default is 7 days."""
DELETED_TOPIC = "_deleted-topic_"
"""Stands for the topic of a subscription whose topic was deleted."""
_SUBSCRIBER = "/google.pubsub.v1.Subscriber"
_TOO_LONG = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE}
_RETRYABLE = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}

_Subscription: Any = types.Subscription.pb()
_GetRequest: Any = types.GetSubscriptionRequest.pb()
_DeleteRequest: Any = types.DeleteSubscriptionRequest.pb()


@dataclass(frozen=True, slots=True, kw_only=True)
class SubscriptionState:
    """What Pub/Sub says about a subscription; without the permission to ask, nothing."""

    fault: str | None = None
    """Why it gets no further message: a phrase about it; `None` where nothing is known to be wrong."""
    holds_messages: bool = True
    """Those that it got before a fault can still be had."""
    topic: str = ""
    """Full name; empty for an unknown one."""
    filter: str = ""
    retention_s: float | None = None
    """How long it keeps a message; `None` for an unknown time."""


async def create_run_subscription(
    channel: grpc.aio.Channel, name: str, topic: str, *, attribute: str, value: str
) -> None:
    """
    Create a subscription that delivers only the messages with this attribute.

    It keeps them as long as Pub/Sub permits, and never expires: an idle one would expire after 31 days by default.
    One that exists already is taken if it has the same topic and filter.

    Args:
        channel: Open.
        name: Full name.
        topic: Full name.
        attribute: Name of an attribute.
        value: Letters and digits.

    Raises:
        BrokerResourceError: The topic is missing, it is refused, or another one has the name; permanent.
        BrokerError: Pub/Sub cannot be reached; retryable.

    Cancellation: it may exist.
    """
    call = channel.unary_unary(
        f"{_SUBSCRIBER}/CreateSubscription",
        request_serializer=_Subscription.SerializeToString,
        response_deserializer=_Subscription.FromString,
    )
    wanted = f'attributes.{attribute} = "{value}"'
    for retention_s in RETENTIONS_S:
        subscription = _Subscription(name=name, topic=topic, ack_deadline_seconds=ACK_DEADLINE_S, filter=wanted)
        subscription.message_retention_duration.FromSeconds(retention_s)
        subscription.expiration_policy.SetInParent()  # without a time to live it never expires
        try:
            await call(subscription, timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() in _TOO_LONG and retention_s != RETENTIONS_S[-1]:
                continue
            if error.code() is grpc.StatusCode.NOT_FOUND:
                raise BrokerResourceError(f"the response topic {topic} does not exist") from error
            if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
                raise _failure(error, name, "created") from error
            found = await look_at_subscription(channel, name)
            if found.topic not in {"", topic} or found.filter not in {"", wanted}:
                raise BrokerResourceError(f"{name}: exists, and is not for these answers") from None
        return


async def look_at_subscription(channel: grpc.aio.Channel, name: str) -> SubscriptionState:
    """
    Return what Pub/Sub says about a subscription; nothing where it may not be asked.

    Raises:
        BrokerError: Pub/Sub cannot be reached; retryable.

    Cancellation: leaves nothing behind.
    """
    call = channel.unary_unary(
        f"{_SUBSCRIBER}/GetSubscription",
        request_serializer=_GetRequest.SerializeToString,
        response_deserializer=_Subscription.FromString,
    )
    try:
        found = await call(
            _GetRequest(subscription=name),
            timeout=TIMEOUT_S,
            metadata=(("x-goog-request-params", f"subscription={name}"),),
        )
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.NOT_FOUND:
            return SubscriptionState(fault="does not exist", holds_messages=False)
        if error.code() is grpc.StatusCode.PERMISSION_DENIED:  # to consume is another permission
            return SubscriptionState()
        raise _failure(error, name, "looked at") from error
    fault = None
    if found.topic == DELETED_TOPIC:
        fault = "gets no answers any more: its topic was deleted"
    elif found.detached:
        fault = "was detached from its topic"
    retention_s = found.message_retention_duration.ToTimedelta().total_seconds()
    return SubscriptionState(
        fault=fault,
        holds_messages=not found.detached,
        topic=found.topic,
        filter=found.filter,
        retention_s=retention_s or None,
    )


async def delete_run_subscription(channel: grpc.aio.Channel, name: str) -> None:
    """
    Delete a subscription; one that is gone already is no error.

    Raises:
        BrokerResourceError: It is refused; permanent.
        BrokerError: Pub/Sub cannot be reached; retryable.

    Cancellation: it may be gone.
    """
    call = channel.unary_unary(
        f"{_SUBSCRIBER}/DeleteSubscription",
        request_serializer=_DeleteRequest.SerializeToString,
        response_deserializer=empty_pb2.Empty.FromString,
    )
    try:
        await call(_DeleteRequest(subscription=name), timeout=TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise _failure(error, name, "deleted") from error


def _failure(error: grpc.aio.AioRpcError, name: str, verb: str) -> BrokerError:
    kind = BrokerError if error.code() in _RETRYABLE else BrokerResourceError
    return kind(f"{name}: cannot be {verb}: {error.code().name}: {error.details()}")
