"""
Topics and subscriptions of a local run: made anew in the embedded server, which starts empty.

The running worker never creates anything in Google Cloud: infrastructure is declared (deploy/).
"""

from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import duration_pb2
from google.pubsub_v1 import types

ACK_DEADLINE_S = 60
LOCAL_ATTEMPTS = 5
"""Delivery attempts of a local run: Pub/Sub's least, so that a line that fails for good is answered within a minute."""
LOCAL_BACKOFF_S = (1, 10)

_Topic: Any = types.Topic.pb()
_Subscription: Any = types.Subscription.pb()


@dataclass(frozen=True, slots=True)
class LocalNames:
    """Full names of what a local run uses."""

    request_topic: str
    response_subscription: str


async def create_local_resources(channel: grpc.aio.Channel, project: str, requests: str, responses: str) -> LocalNames:
    """
    Create a topic and a subscription of the same name for requests and for responses, and a dead-letter topic.

    Raises:
        grpc.aio.AioRpcError: The server refused; permanent.

    Cancellation: some of them may exist.
    """
    for name in (requests, responses, "dead-letters"):
        topic = _Topic(name=f"projects/{project}/topics/{name}")
        await _create(channel, "/google.pubsub.v1.Publisher/CreateTopic", topic)
    backoff = types.RetryPolicy.pb()(
        minimum_backoff=duration_pb2.Duration(seconds=LOCAL_BACKOFF_S[0]),
        maximum_backoff=duration_pb2.Duration(seconds=LOCAL_BACKOFF_S[1]),
    )
    policy = types.DeadLetterPolicy.pb()(
        dead_letter_topic=f"projects/{project}/topics/dead-letters", max_delivery_attempts=LOCAL_ATTEMPTS
    )
    extra = {requests: {"retry_policy": backoff, "dead_letter_policy": policy}}
    for name in (requests, responses, "dead-letters"):
        subscription = _Subscription(
            name=f"projects/{project}/subscriptions/{name}",
            topic=f"projects/{project}/topics/{name}",
            ack_deadline_seconds=ACK_DEADLINE_S,
            **extra.get(name, {}),
        )
        await _create(channel, "/google.pubsub.v1.Subscriber/CreateSubscription", subscription)
    return LocalNames(f"projects/{project}/topics/{requests}", f"projects/{project}/subscriptions/{responses}")


async def _create(channel: grpc.aio.Channel, method: str, resource: Any) -> None:
    call = channel.unary_unary(
        method, request_serializer=type(resource).SerializeToString, response_deserializer=type(resource).FromString
    )
    await call(resource, timeout=30, wait_for_ready=True)
