from typing import Any

import pytest
from google.pubsub_v1 import types
from hypothesis import given
from hypothesis import strategies as st

from worker.emulators.pubsub.errors import FailedPreconditionError, InvalidArgumentError
from worker.emulators.pubsub.messages import check_messages, check_publish_size, encode_received, store, with_attributes

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
    """The concatenated parts are a valid PullResponse and StreamingPullResponse with every field."""
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
    """Both are removed from a published message."""
    message = PubsubMessage(data=b"x", message_id="mine")
    message.publish_time.seconds = 5
    message.publish_time.nanos = 7
    stored = store(message, 42, 3_000_000_000)
    parsed = PubsubMessage.FromString(stored.body + stored.stamp)
    assert parsed.message_id == "42"
    assert parsed.publish_time.ToNanoseconds() == 3_000_000_000


def test_a_forwarded_message_keeps_its_content() -> None:
    """Added attributes replace old ones, the others stay; id and time are those of the second publication."""
    stored = store(PubsubMessage(data=b"x", attributes={"a": "1", "b": "2"}, ordering_key="k"), 1, 1_999_999_999)
    forwarded = with_attributes(stored, {"b": "3", "c": "4"}, 2, 5_000_000_000)
    parsed = PubsubMessage.FromString(forwarded.body + forwarded.stamp)
    assert parsed.data == b"x"
    assert parsed.ordering_key == "k"
    assert dict(parsed.attributes) == {"a": "1", "b": "3", "c": "4"} == forwarded.attributes
    assert parsed.message_id == forwarded.message_id == "2"
    assert parsed.publish_time.ToNanoseconds() == 5_000_000_000


def test_the_size_is_what_a_client_counts() -> None:
    """Flow control of both sides uses the size of the serialised message."""
    stored = store(
        PubsubMessage(data=b"x" * 300, attributes={"a": "b"}), 16_000_000_000_000_000, 1_700_000_000_000_001_000
    )
    assert stored.size_bytes == PubsubMessage.FromString(stored.body + stored.stamp).ByteSize()


def message(data: bytes = b"x", **fields: Any) -> Any:
    return PubsubMessage(data=data, **fields)


@pytest.mark.parametrize(
    "messages",
    [
        [message()],
        [message(b"", attributes={"a": ""})],
        [message()] * 1_000,
        [message(attributes={f"k{i}": "" for i in range(100)})],
        [message(attributes={"k" * 256: "v" * 1_024})],
        [message(attributes={"googclient_traceparent": "00-1-2-01"})],
        [message(ordering_key="k" * 1_024)] * 2,
    ],
    ids=["plain", "attributes only", "1000", "100 attributes", "longest", "trace context", "ordered"],
)
def test_what_is_just_within_the_limits_is_accepted(messages: list[Any]) -> None:
    """Each documented limit is inclusive."""
    check_messages(messages)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([], "message_count is too small. You passed 0"),
        (
            [message()] * 1_001,
            "message_count is too large. You passed 1001 in the request, but the maximum value is 1000",
        ),
        ([message(), message(b"")], "Some messages in the batch are empty"),
        ([message(b"", ordering_key="k")], "Some messages in the batch are empty"),
        ([message(attributes={f"k{i}": "" for i in range(101)})], "attribute count is too large. You passed 101"),
        ([message(attributes={"k" * 257: ""})], "a key that is too long. The length is 257"),
        ([message(attributes={"k": "é" * 513})], "a value that is too long. The length is 1026 .* allowed is 1024"),
        ([message(attributes={"": "v"})], "an empty key"),
        ([message(attributes={"google": "v"})], "must not start with goog"),
        ([message(ordering_key="k" * 1_025)], "ordering_key size is too large. You passed 1025"),
    ],
    ids=[
        "none",
        "1001",
        "empty",
        "only a key",
        "101 attributes",
        "key",
        "value in bytes",
        "no name",
        "goog",
        "ordering",
    ],
)
def test_what_exceeds_a_limit_is_refused(messages: list[Any], text: str) -> None:
    """The error is INVALID_ARGUMENT with the numbers, worded as by the service."""
    with pytest.raises(InvalidArgumentError, match=text):
        check_messages(messages)


def test_a_request_has_one_ordering_key() -> None:
    """Messages with and without a key cannot be mixed."""
    with pytest.raises(FailedPreconditionError, match="the same ordering key"):
        check_messages([message(ordering_key="a"), message()])


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (
            10_000_001,
            "request_size is too large. You passed 10000001 in the request, but the maximum value is 10000000",
        ),
        (10_485_760, "request_size is too large"),
        (10_485_761, "Request payload size exceeds the limit: 10485760 bytes"),
    ],
)
def test_a_request_over_ten_megabytes_is_refused(size: int, text: str) -> None:
    """The text is that of the service for the size."""
    check_publish_size(10_000_000)
    with pytest.raises(InvalidArgumentError, match=text):
        check_publish_size(size)
