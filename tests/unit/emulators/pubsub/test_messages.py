from typing import Any

from google.pubsub_v1 import types
from hypothesis import given
from hypothesis import strategies as st

from worker.emulators.pubsub.messages import encode_received, store, with_attributes

PubsubMessage = types.PubsubMessage.pb()

messages = st.builds(
    PubsubMessage,
    data=st.binary(max_size=40_000),
    attributes=st.dictionaries(st.text(max_size=10), st.text(max_size=10), max_size=3),
    ordering_key=st.text(max_size=10),
)
deliveries = st.lists(st.tuples(st.text(min_size=1, max_size=300), messages, st.integers(0, 100_000)), max_size=4)
publish_times = st.integers(0, 4_000_000_000_000_000_000)


@given(deliveries, publish_times)
def test_a_response_parses_as_google_parses_it(given_deliveries: list[Any], publish_ns: int) -> None:
    """Concatenated pieces are a valid PullResponse and StreamingPullResponse with every field in its place."""
    stored = [
        (ack_id, store(PubsubMessage.FromString(message.SerializeToString()), 16_000_000_000 + i, publish_ns), attempt)
        for i, (ack_id, message, attempt) in enumerate(given_deliveries)
    ]
    data = encode_received(stored)
    assert types.StreamingPullResponse.pb().FromString(data).SerializeToString(deterministic=True) == (
        types.PullResponse.pb().FromString(data).SerializeToString(deterministic=True)
    )
    received = types.PullResponse.pb().FromString(data).received_messages
    assert len(received) == len(given_deliveries)
    for i, (item, (ack_id, message, attempt)) in enumerate(zip(received, given_deliveries, strict=True)):
        assert item.ack_id == ack_id
        assert item.delivery_attempt == attempt
        assert item.message.message_id == str(16_000_000_000 + i)
        assert item.message.publish_time.ToNanoseconds() == publish_ns
        assert (item.message.data, item.message.ordering_key) == (message.data, message.ordering_key)
        assert dict(item.message.attributes) == dict(message.attributes)


def test_the_publisher_cannot_choose_id_and_time() -> None:
    """What the service sets is taken out of a published message."""
    message = PubsubMessage(data=b"x", message_id="mine")
    message.publish_time.seconds = 5
    message.publish_time.nanos = 7
    stored = store(message, 42, 3_000_000_000)
    parsed = PubsubMessage.FromString(stored.body + stored.stamp)
    assert parsed.message_id == "42"
    assert parsed.publish_time.ToNanoseconds() == 3_000_000_000


def test_a_forwarded_message_keeps_its_content_under_a_new_name() -> None:
    """Added attributes win, the others stay; id and time are those of the second publication, nanoseconds included."""
    stored = store(PubsubMessage(data=b"x", attributes={"a": "1", "b": "2"}, ordering_key="k"), 1, 1_999_999_999)
    forwarded = with_attributes(stored, {"b": "3", "c": "4"}, 2, 5_000_000_000)
    parsed = PubsubMessage.FromString(forwarded.body + forwarded.stamp)
    assert parsed.data == b"x"
    assert parsed.ordering_key == "k"
    assert dict(parsed.attributes) == {"a": "1", "b": "3", "c": "4"} == forwarded.attributes
    assert parsed.message_id == forwarded.message_id == "2"
    assert parsed.publish_time.ToNanoseconds() == 5_000_000_000


def test_the_size_is_what_a_client_counts() -> None:
    """Flow control on both sides uses the serialised message."""
    stored = store(
        PubsubMessage(data=b"x" * 300, attributes={"a": "b"}), 16_000_000_000_000_000, 1_700_000_000_000_001_000
    )
    assert stored.size_bytes == PubsubMessage.FromString(stored.body + stored.stamp).ByteSize()
