from typing import Any

import pytest
from google.pubsub_v1 import types

from worker.emulators.pubsub import limits
from worker.emulators.pubsub.errors import FailedPreconditionError, InvalidArgumentError


def message(data: bytes = b"x", **fields: Any) -> Any:
    return types.PubsubMessage.pb()(data=data, **fields)


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
    limits.check_messages(messages)


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
    """With INVALID_ARGUMENT and the numbers, as the service words it."""
    with pytest.raises(InvalidArgumentError, match=text):
        limits.check_messages(messages)


def test_a_request_has_one_ordering_key() -> None:
    """Also no key and a key do not mix."""
    with pytest.raises(FailedPreconditionError, match="the same ordering key"):
        limits.check_messages([message(ordering_key="a"), message()])


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
    """By the limit it meets first."""
    limits.check_publish_size(10_000_000)
    with pytest.raises(InvalidArgumentError, match=text):
        limits.check_publish_size(size)


@pytest.mark.parametrize(
    "path",
    ["projects/p/topics/abc", "projects/my.project:x/topics/A-_.~+%9", "projects/p/topics/" + "a" * 255],
)
def test_a_documented_name_is_accepted(path: str) -> None:
    """3 to 255 characters, a letter first; any project."""
    limits.check_name("topics", path)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "abc",
        "projects/p/topics/ab",
        "projects/p/topics/1abc",
        "projects/p/topics/goog-topic",
        "projects/p/topics/a b c",
        "projects/p/topics/abc/def",
        "projects//topics/abc",
        "projects/p/subscriptions/abc",
        "projects/p/topics/abc\n",
        "projects/p/topics/" + "a" * 256,
    ],
)
def test_any_other_name_is_refused(path: str) -> None:
    """In the words of the service."""
    with pytest.raises(InvalidArgumentError, match=r"Invalid \[topics\] name: \(name="):
        limits.check_name("topics", path)


def test_a_parent_is_a_project() -> None:
    """Lists are asked of `projects/P`."""
    limits.check_project("projects/p")
    with pytest.raises(InvalidArgumentError, match=r"Invalid \[projects\] name"):
        limits.check_project("p")
