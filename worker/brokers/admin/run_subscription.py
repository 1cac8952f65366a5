"""
The subscription that a run over a file makes for its answers alone, and removes at its end.

The only caller is the client's side (`submit`, `collect`, `retry-failed`); the worker makes and removes nothing.

Source: https://cloud.google.com/pubsub/docs/subscription-message-filter#filtering_syntax.
"""

from collections.abc import Awaitable
from typing import Any

import grpc
from google.protobuf import empty_pb2
from google.pubsub_v1 import types

from worker.errors import BrokerError, BrokerResourceError

TIMEOUT_S = 20.0
ACK_DEADLINE_S = 10
"""Pub/Sub's least: the answers that a killed `collect` had are back soon."""
_SUBSCRIBER = "/google.pubsub.v1.Subscriber"
_RETRYABLE = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}

_Subscription: Any = types.Subscription.pb()
_DeleteRequest: Any = types.DeleteSubscriptionRequest.pb()


async def create_run_subscription(
    channel: grpc.aio.Channel, name: str, topic: str, *, attribute: str, value: str
) -> None:
    """
    Create a subscription that delivers only the messages with this attribute, and that never expires.

    One of this name that exists already is taken to be the same.

    Args:
        channel: Open.
        name: Full name.
        topic: Full name.
        attribute: Name of an attribute.
        value: Letters and digits.

    Raises:
        BrokerResourceError: The topic is missing, or it is refused; permanent.
        BrokerError: Pub/Sub cannot be reached; retryable.

    Cancellation: it may exist.
    """
    subscription = _Subscription(
        name=name, topic=topic, ack_deadline_seconds=ACK_DEADLINE_S, filter=f'attributes.{attribute} = "{value}"'
    )
    subscription.expiration_policy.SetInParent()  # without a time to live it never expires
    call = channel.unary_unary(
        f"{_SUBSCRIBER}/CreateSubscription",
        request_serializer=_Subscription.SerializeToString,
        response_deserializer=_Subscription.FromString,
    )
    await _made(call(subscription, timeout=TIMEOUT_S), name, "created", ignored=grpc.StatusCode.ALREADY_EXISTS)


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
    request = _DeleteRequest(subscription=name)
    await _made(call(request, timeout=TIMEOUT_S), name, "deleted", ignored=grpc.StatusCode.NOT_FOUND)


async def _made(call: Awaitable[Any], name: str, verb: str, *, ignored: grpc.StatusCode) -> None:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        if error.code() is ignored:
            return
        kind = BrokerError if error.code() in _RETRYABLE else BrokerResourceError
        raise kind(f"{name}: cannot be {verb}: {error.code().name}: {error.details()}") from error
