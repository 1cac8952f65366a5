"""
The control topic: every worker hears every message on it, by a subscription of its own.

It is the one thing that a running worker makes: a subscription that all workers shared would tell each message to one
of them only.  It is removed at the end of the process, and expires a day after a process that was killed.

A worker that starts later hears what was said before, as far as the topic retains messages: the new subscription is
set back (https://cloud.google.com/pubsub/docs/replay-overview#topic_message_retention).

Source: ADR 25.
"""

import time
import uuid
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf import empty_pb2, timestamp_pb2
from google.pubsub_v1 import types

from worker.brokers.subscriber import PubSubSubscriber
from worker.errors import BrokerResourceError, MessageError
from worker.ports import Settlement
from worker.telemetry.logs import get_logger
from worker.telemetry.metrics import Metrics
from worker.wire.control import CancelRequest, decode_control
from worker.wire.message import ReceivedMessage

EXPIRY_S = 86_400
"""Pub/Sub's least for an idle subscription."""
RETENTION_S = 86_400
ACK_DEADLINE_S = 10
TIMEOUT_S = 20.0
_SUBSCRIBER = "/google.pubsub.v1.Subscriber"
_AWAY = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
_NO_HISTORY = {
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.PERMISSION_DENIED,
}
_Subscription: Any = types.Subscription.pb()
_DeleteRequest: Any = types.DeleteSubscriptionRequest.pb()
_SeekRequest: Any = types.SeekRequest.pb()
_SeekResponse: Any = types.SeekResponse.pb()

_log = get_logger("control")


def new_name(topic: str) -> str:
    """Return the full name of a subscription to a topic (full name) that no other process has."""
    _, project, _, short = topic.split("/")
    return f"projects/{project}/subscriptions/{short[:200]}-{uuid.uuid4().hex}"


async def create(channel: grpc.aio.Channel, name: str, topic: str, *, since: float) -> None:
    """
    Make the subscription of one process, and set it back where the topic retains messages.

    Args:
        channel: Open.
        name: See `new_name`.
        topic: Full name.
        since: Unix seconds.

    Raises:
        BrokerResourceError: The topic is missing or making one is refused; permanent.
        ConnectionError: Pub/Sub cannot be reached; retryable.

    Cancellation: it may exist, and expires.
    """
    wanted = _Subscription(name=name, topic=topic, ack_deadline_seconds=ACK_DEADLINE_S)
    wanted.message_retention_duration.FromSeconds(RETENTION_S)
    wanted.expiration_policy.ttl.FromSeconds(EXPIRY_S)
    try:
        await _call(channel, "CreateSubscription", wanted, _Subscription)
    except grpc.aio.AioRpcError as error:
        if error.code() in _AWAY:
            raise ConnectionError(f"{topic}: {error.code().name}: {error.details()}") from error
        raise BrokerResourceError(
            f"the control topic {topic}: a subscription cannot be made: {error.code().name}: {error.details()}"
        ) from error
    moment = timestamp_pb2.Timestamp()
    moment.FromSeconds(int(since))
    try:
        await _call(channel, "Seek", _SeekRequest(subscription=name, time=moment), _SeekResponse)
    except grpc.aio.AioRpcError as error:
        if error.code() not in _NO_HISTORY | _AWAY:
            raise BrokerResourceError(f"{name}: cannot be set back: {error.details()}") from error
        _log.info("control_history_unavailable", topic=topic, error=error.details())


async def _call(channel: grpc.aio.Channel, method: str, request: Any, answer: Any) -> Any:
    call = channel.unary_unary(
        f"{_SUBSCRIBER}/{method}",
        request_serializer=type(request).SerializeToString,
        response_deserializer=answer.FromString,
    )
    return await call(request, timeout=TIMEOUT_S)


class ControlListener:
    """
    Hears the control topic.

    Args:
        channel: Open; closed at the end.
        subscriber: Of the subscription that `create` made.
        on_cancel: Called on the event loop with each cancellation; raises nothing.
        metrics: Counts the messages.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        subscriber: PubSubSubscriber,
        on_cancel: Callable[[CancelRequest], None],
        metrics: Metrics,
    ) -> None:
        self._channel = channel
        self._subscriber = subscriber
        self._on_cancel = on_cancel
        self._metrics = metrics

    async def run(self) -> None:
        """
        Hear until closed.  A subscription that is gone ends it with a log line: requests go on, uncancelled.

        Cancellation: nothing more is heard.
        """
        try:
            await self._subscriber.run(self._handle)
        except BrokerResourceError as error:
            _log.error("control_lost", error=str(error))

    async def _handle(self, message: ReceivedMessage) -> Settlement:
        try:
            request = decode_control(message.data, message.publish_time or time.time())
        except MessageError as error:
            self._metrics.control_messages_total.labels("unusable").inc()
            _log.warning("control_message_unusable", message_id=message.message_id, error=error.reason)
        else:
            self._metrics.control_messages_total.labels("ok").inc()
            self._on_cancel(request)
        return Settlement.ACK

    async def aclose(self) -> None:
        """
        End and remove the subscription; idempotent.

        Cancellation: it stays, and expires.
        """
        await self._subscriber.drain(0)
        try:
            await _call(
                self._channel,
                "DeleteSubscription",
                _DeleteRequest(subscription=self._subscriber.subscription),
                empty_pb2.Empty,
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                _log.info(
                    "control_subscription_left", subscription=self._subscriber.subscription, error=error.details()
                )
        await self._channel.close(None)
