"""
The unary methods of the API in one table: serialised request in, serialised response out.

Each entry parses its request, calls the broker, and serialises the answer.  Methods that only the service has are in
the table as well, so that a client is told which feature is missing.  `abort` is the only place that turns the engine's
errors into gRPC statuses.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.pubsub_v1 import types
from google.rpc import error_details_pb2, status_pb2

from worker.emulators.pubsub.broker import Broker
from worker.emulators.pubsub.clock import NS_PER_S
from worker.emulators.pubsub.errors import (
    AckIdError,
    InvalidArgumentError,
    PubSubError,
    UnimplementedError,
    check_bounds,
)
from worker.emulators.pubsub.messages import check_publish_size
from worker.emulators.pubsub.resources import ACK_DEADLINE_S

Answer = Callable[[bytes], bytes]
"""Answers one call: serialised request to serialised response; raises PubSubError."""

PUBLISHER = "google.pubsub.v1.Publisher"
SUBSCRIBER = "google.pubsub.v1.Subscriber"

_NO_LEASE = "PERMANENT_FAILURE_INVALID_ACK_ID"

_UNIMPLEMENTED: dict[str, dict[str, str]] = {
    PUBLISHER: {"ListTopicSnapshots": "snapshots"},
    SUBSCRIBER: dict.fromkeys(
        ("GetSnapshot", "ListSnapshots", "CreateSnapshot", "UpdateSnapshot", "DeleteSnapshot"), "snapshots"
    ),
    "google.pubsub.v1.SchemaService": dict.fromkeys(
        (
            "CreateSchema",
            "GetSchema",
            "ListSchemas",
            "ListSchemaRevisions",
            "CommitSchema",
            "RollbackSchema",
            "DeleteSchemaRevision",
            "DeleteSchema",
            "ValidateSchema",
            "ValidateMessage",
        ),
        "schemas",
    ),
    "google.iam.v1.IAMPolicy": dict.fromkeys(("SetIamPolicy", "GetIamPolicy", "TestIamPermissions"), "access control"),
}

_PublishRequest = types.PublishRequest.pb()
_PublishResponse = types.PublishResponse.pb()


def unary_methods(broker: Broker) -> dict[str, dict[str, Answer]]:
    """Return the unary methods by service and name, without Pull, which waits."""
    table = {PUBLISHER: _publisher_methods(broker), SUBSCRIBER: _subscriber_methods(broker)}
    for service, features in _UNIMPLEMENTED.items():
        methods = table.setdefault(service, {})
        for method, feature in features.items():
            methods[method] = _unimplemented(feature)
    return table


def parse(message_type: Any, data: bytes) -> Any:
    """Return the protobuf message; raises InvalidArgumentError if the bytes cannot be parsed."""
    try:
        return message_type.FromString(data)
    except DecodeError as error:
        raise InvalidArgumentError(f"The request cannot be parsed as {message_type.DESCRIPTOR.full_name}.") from error


async def abort(context: Any, error: PubSubError) -> NoReturn:
    """
    End a call with the error's status; the ack ids of an `AckIdError` go into the status details.

    Cancellation: the client has disconnected and gets no status.

    Source: https://cloud.google.com/apis/design/errors#error_model; clients require that the status in the details
    repeats code and message exactly.
    """
    metadata: tuple[tuple[str, bytes], ...] = ()
    if isinstance(error, AckIdError):
        info = error_details_pb2.ErrorInfo(
            reason="EXACTLY_ONCE_ACKID_FAILURE", domain="pubsub.googleapis.com", metadata=dict(error.failures)
        )
        details = any_pb2.Any()
        details.Pack(info)
        number, _ = grpc.StatusCode[error.status].value
        status = status_pb2.Status(code=number, message=str(error), details=[details])
        metadata = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(grpc.StatusCode[error.status], str(error), metadata)
    raise AssertionError("abort returned")


def check_ack_deadline(seconds: int) -> None:
    """Refuse a deadline that ModifyAckDeadline does not allow; 0 is a nack."""
    check_bounds("ack_deadline_seconds", seconds, 0, ACK_DEADLINE_S[1])


def _publisher_methods(broker: Broker) -> dict[str, Answer]:
    def publish(data: bytes) -> bytes:
        check_publish_size(len(data))
        request = parse(_PublishRequest, data)
        message_ids = broker.publish(request.topic, request.messages)
        return bytes(_PublishResponse(message_ids=message_ids).SerializeToString())

    def list_topics(request: Any) -> Any:
        topics, token = broker.list_topics(request.project, request.page_size, request.page_token)
        return types.ListTopicsResponse.pb()(topics=topics, next_page_token=token)

    def list_topic_subscriptions(request: Any) -> Any:
        paths, token = broker.list_topic_subscriptions(request.topic, request.page_size, request.page_token)
        return types.ListTopicSubscriptionsResponse.pb()(subscriptions=paths, next_page_token=token)

    return {
        "Publish": publish,
        "CreateTopic": _method(types.Topic, broker.create_topic),
        "GetTopic": _method(types.GetTopicRequest, lambda r: broker.get_topic(r.topic)),
        "UpdateTopic": _method(types.UpdateTopicRequest, lambda r: broker.update_topic(r.topic, r.update_mask.paths)),
        "DeleteTopic": _method(types.DeleteTopicRequest, lambda r: broker.delete_topic(r.topic)),
        "ListTopics": _method(types.ListTopicsRequest, list_topics),
        "ListTopicSubscriptions": _method(types.ListTopicSubscriptionsRequest, list_topic_subscriptions),
        "DetachSubscription": _method(
            types.DetachSubscriptionRequest, lambda r: broker.detach_subscription(r.subscription)
        ),
    }


def _subscriber_methods(broker: Broker) -> dict[str, Answer]:
    def list_subscriptions(request: Any) -> Any:
        found, token = broker.list_subscriptions(request.project, request.page_size, request.page_token)
        return types.ListSubscriptionsResponse.pb()(subscriptions=found, next_page_token=token)

    def acknowledge(request: Any) -> None:
        _check_ack_ids(request.ack_ids)
        _raise_failures(broker.subscription(request.subscription).acknowledge(request.ack_ids))

    def modify_ack_deadline(request: Any) -> None:
        _check_ack_ids(request.ack_ids)
        check_ack_deadline(request.ack_deadline_seconds)
        subscription = broker.subscription(request.subscription)
        _raise_failures(subscription.modify_ack_deadline(request.ack_ids, request.ack_deadline_seconds))

    def modify_push_config(request: Any) -> None:
        broker.subscription(request.subscription)
        if request.push_config.ListFields():
            raise UnimplementedError.of("push subscriptions")

    def seek(request: Any) -> None:
        target = request.WhichOneof("target")
        if target == "snapshot":
            raise UnimplementedError.of("snapshots")
        if target is None:
            broker.subscription(request.subscription)
            raise InvalidArgumentError(
                "No target was specified in the SeekRequest. Must specify either a time or a snapshot"
            )
        broker.seek(request.subscription, request.time.seconds * NS_PER_S + request.time.nanos)

    return {
        "CreateSubscription": _method(types.Subscription, broker.create_subscription),
        "GetSubscription": _method(types.GetSubscriptionRequest, lambda r: broker.get_subscription(r.subscription)),
        "UpdateSubscription": _method(
            types.UpdateSubscriptionRequest,
            lambda r: broker.update_subscription(r.subscription, r.update_mask.paths),
        ),
        "DeleteSubscription": _method(
            types.DeleteSubscriptionRequest, lambda r: broker.delete_subscription(r.subscription)
        ),
        "ListSubscriptions": _method(types.ListSubscriptionsRequest, list_subscriptions),
        "Acknowledge": _method(types.AcknowledgeRequest, acknowledge),
        "ModifyAckDeadline": _method(types.ModifyAckDeadlineRequest, modify_ack_deadline),
        "ModifyPushConfig": _method(types.ModifyPushConfigRequest, modify_push_config),
        "Seek": _method(types.SeekRequest, seek),
    }


def _method(request_type: Any, call: Callable[[Any], Any]) -> Answer:
    """Wrap a call on protobuf messages; `None` is answered as an empty message, whatever its type."""
    message_type = request_type.pb()

    def answer(data: bytes) -> bytes:
        response = call(parse(message_type, data))
        return b"" if response is None else bytes(response.SerializeToString())

    return answer


def _unimplemented(feature: str) -> Answer:
    def answer(_: bytes) -> bytes:
        raise UnimplementedError.of(feature)

    return answer


def _check_ack_ids(ack_ids: Any) -> None:
    if not ack_ids:
        raise InvalidArgumentError("No ack ids specified.")


def _raise_failures(ack_ids: list[str]) -> None:
    if ack_ids:
        raise AckIdError(dict.fromkeys(ack_ids, _NO_LEASE))
