"""The declared messages are Pub/Sub's."""

from typing import Any

import pytest
from google.iam.v1 import iam_policy_pb2
from google.pubsub_v1 import types

from worker.brokers import messages
from worker.brokers.messages import PubsubMessage, ReceivedMessage

LIBRARY = {
    name: getattr(iam_policy_pb2, name) if name.startswith("TestIam") else getattr(types, name).pb()
    for name, declared in vars(messages).items()
    if hasattr(declared, "FromString") and declared.DESCRIPTOR.full_name.startswith("inference_worker.")
}


def assert_same(ours: Any, theirs: Any) -> None:
    """Every field of ours is the one of theirs, down to the messages inside."""
    for field in ours.fields:
        other = theirs.fields_by_name[field.name]
        described = [(each.number, each.type, each.is_repeated, each.has_presence) for each in (field, other)]
        assert described[0] == described[1], field.full_name
        if field.message_type is not None:
            assert field.message_type.GetOptions().map_entry == other.message_type.GetOptions().map_entry
            assert_same(field.message_type, other.message_type)


@pytest.mark.parametrize("name", LIBRARY)
def test_a_message_has_the_fields_of_the_library(name: str) -> None:
    """By name, number, type and being repeated."""
    assert_same(getattr(messages, name).DESCRIPTOR, LIBRARY[name].DESCRIPTOR)


def test_every_message_is_compared() -> None:
    """The two of IAM as well."""
    assert {"PubsubMessage", "StreamingPullResponse", "TestIamPermissionsResponse"} <= set(LIBRARY)


def test_what_the_library_writes_is_read_and_written_again() -> None:
    """Bytes, attributes, times and counts; a field that is not declared is kept."""
    theirs = types.ReceivedMessage(
        ack_id="a",
        message={
            "data": b"\x00\xff",
            "attributes": {"k": "v"},
            "message_id": "1",
            "publish_time": "2026-01-01T00:00:00Z",
        },
        delivery_attempt=3,
    )
    sent = types.ReceivedMessage.serialize(theirs)
    ours = ReceivedMessage.FromString(sent)
    assert (ours.ack_id, ours.delivery_attempt, ours.message.data) == ("a", 3, b"\x00\xff")
    assert dict(ours.message.attributes) == {"k": "v"}
    assert ours.message.publish_time.ToJsonString() == "2026-01-01T00:00:00Z"
    assert types.ReceivedMessage.deserialize(ours.SerializeToString()) == theirs
    subscription = types.Subscription(name="projects/p/subscriptions/s", filter="attributes:a")
    kept = messages.Subscription.FromString(types.Subscription.serialize(subscription)).SerializeToString()
    assert types.Subscription.deserialize(kept) == subscription


def test_two_packages_live_beside_each_other() -> None:
    """The library's class of the same name is another one."""
    assert PubsubMessage is not types.PubsubMessage.pb()
