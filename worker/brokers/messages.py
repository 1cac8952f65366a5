"""
The messages of Pub/Sub's API that a worker sends and receives, as protobuf classes.

They are the library's in everything that travels (`google.pubsub.v1`, field by field; a test compares them), with the
fields that a worker has a use for; others are kept as they came.  They are declared here because importing one type of
the client library imports all of it, its clients and transports with `requests` and `cryptography`: 0.2 s of CPU at
each start, twice what everything else of Pub/Sub takes.  Their package has a name of its own, so that both can be
loaded in one process.

Source: https://github.com/googleapis/googleapis/blob/master/google/pubsub/v1/pubsub.proto and `google/iam/v1`.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

from google.protobuf import descriptor_pool, duration_pb2, message_factory, timestamp_pb2
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto

_PACKAGE = "inference_worker.pubsub"
_FILE = "inference_worker/pubsub.proto"
_TEXT, _BYTES = FieldDescriptorProto.TYPE_STRING, FieldDescriptorProto.TYPE_BYTES
_BOOL, _INT32, _INT64 = FieldDescriptorProto.TYPE_BOOL, FieldDescriptorProto.TYPE_INT32, FieldDescriptorProto.TYPE_INT64
_DURATION, _TIMESTAMP = duration_pb2.Duration.DESCRIPTOR.full_name, timestamp_pb2.Timestamp.DESCRIPTOR.full_name
_ENTRY = "AttributesEntry"
"""A map travels as a list of pairs, whose type is declared inside of the message."""

_Kind: TypeAlias = "FieldDescriptorProto.Type.ValueType | str"
"""A scalar, or the name of a message."""
_Fields: TypeAlias = "Mapping[str, tuple[int, _Kind | list[_Kind]]]"
"""Number and kind by name; a kind in a list is repeated."""
_MESSAGES: Mapping[str, _Fields] = {
    "PubsubMessage": {
        "data": (1, _BYTES),
        "attributes": (2, [f"{_PACKAGE}.PubsubMessage.{_ENTRY}"]),
        "message_id": (3, _TEXT),
        "publish_time": (4, _TIMESTAMP),
        "ordering_key": (5, _TEXT),
    },
    "PublishRequest": {"topic": (1, _TEXT), "messages": (2, ["PubsubMessage"])},
    "PublishResponse": {"message_ids": (1, [_TEXT])},
    "ReceivedMessage": {"ack_id": (1, _TEXT), "message": (2, "PubsubMessage"), "delivery_attempt": (3, _INT32)},
    "StreamingPullRequest": {
        "subscription": (1, _TEXT),
        "stream_ack_deadline_seconds": (5, _INT32),
        "client_id": (6, _TEXT),
        "max_outstanding_messages": (7, _INT64),
        "max_outstanding_bytes": (8, _INT64),
        "protocol_version": (10, _INT64),
    },
    "StreamingPullResponse": {
        "received_messages": (1, ["ReceivedMessage"]),
        "subscription_properties": (4, "SubscriptionProperties"),
    },
    "SubscriptionProperties": {
        "exactly_once_delivery_enabled": (1, _BOOL),
        "message_ordering_enabled": (2, _BOOL),
    },
    "AcknowledgeRequest": {"subscription": (1, _TEXT), "ack_ids": (2, [_TEXT])},
    "ModifyAckDeadlineRequest": {
        "subscription": (1, _TEXT),
        "ack_deadline_seconds": (3, _INT32),
        "ack_ids": (4, [_TEXT]),
    },
    "Topic": {"name": (1, _TEXT)},
    "GetTopicRequest": {"topic": (1, _TEXT)},
    "Subscription": {
        "name": (1, _TEXT),
        "topic": (2, _TEXT),
        "ack_deadline_seconds": (5, _INT32),
        "enable_message_ordering": (10, _BOOL),
        "dead_letter_policy": (13, "DeadLetterPolicy"),
        "retry_policy": (14, "RetryPolicy"),
        "enable_exactly_once_delivery": (16, _BOOL),
    },
    "DeadLetterPolicy": {"dead_letter_topic": (1, _TEXT), "max_delivery_attempts": (2, _INT32)},
    "RetryPolicy": {"minimum_backoff": (1, _DURATION), "maximum_backoff": (2, _DURATION)},
    "GetSubscriptionRequest": {"subscription": (1, _TEXT)},
    "TestIamPermissionsRequest": {"resource": (1, _TEXT), "permissions": (2, [_TEXT])},
    "TestIamPermissionsResponse": {"permissions": (1, [_TEXT])},
}


def _add_fields(message: DescriptorProto, fields: _Fields) -> None:
    for name, (number, kind) in fields.items():
        label = FieldDescriptorProto.LABEL_REPEATED if isinstance(kind, list) else FieldDescriptorProto.LABEL_OPTIONAL
        field = message.field.add(name=name, number=number, label=label)
        [one] = kind if isinstance(kind, list) else [kind]
        if isinstance(one, str):
            field.type_name = f".{one}" if "." in one else f".{_PACKAGE}.{one}"
        else:
            field.type = one


def _build() -> dict[str, Any]:
    file = FileDescriptorProto(name=_FILE, package=_PACKAGE, syntax="proto3")
    file.dependency.extend([duration_pb2.DESCRIPTOR.name, timestamp_pb2.DESCRIPTOR.name])
    for name, fields in _MESSAGES.items():
        _add_fields(file.message_type.add(name=name), fields)
    entry = file.message_type[0].nested_type.add(name=_ENTRY)
    entry.options.map_entry = True
    _add_fields(entry, {"key": (1, _TEXT), "value": (2, _TEXT)})
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(file.SerializeToString())
    types = {name: pool.FindMessageTypeByName(f"{_PACKAGE}.{name}") for name in _MESSAGES}
    return {name: message_factory.GetMessageClass(kind) for name, kind in types.items()}


_CLASSES = _build()
PubsubMessage = _CLASSES["PubsubMessage"]
PublishRequest = _CLASSES["PublishRequest"]
PublishResponse = _CLASSES["PublishResponse"]
ReceivedMessage = _CLASSES["ReceivedMessage"]
StreamingPullRequest = _CLASSES["StreamingPullRequest"]
StreamingPullResponse = _CLASSES["StreamingPullResponse"]
AcknowledgeRequest = _CLASSES["AcknowledgeRequest"]
ModifyAckDeadlineRequest = _CLASSES["ModifyAckDeadlineRequest"]
Topic = _CLASSES["Topic"]
GetTopicRequest = _CLASSES["GetTopicRequest"]
Subscription = _CLASSES["Subscription"]
DeadLetterPolicy = _CLASSES["DeadLetterPolicy"]
RetryPolicy = _CLASSES["RetryPolicy"]
GetSubscriptionRequest = _CLASSES["GetSubscriptionRequest"]
TestIamPermissionsRequest = _CLASSES["TestIamPermissionsRequest"]
TestIamPermissionsResponse = _CLASSES["TestIamPermissionsResponse"]
