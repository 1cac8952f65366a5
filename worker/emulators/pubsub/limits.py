"""
The limits of the service, and the checks of what a client sends.

Pure functions that raise; the engine calls them before it changes anything, so a refused request leaves no trace.
Bounds of subscriptions and topics themselves are in `resources`.

Source: https://cloud.google.com/pubsub/quotas#resource_limits
"""

import re
from collections.abc import Sequence
from typing import Any

from worker.emulators.pubsub.errors import FailedPreconditionError, InvalidArgumentError, too_large, too_small

MAX_PUBLISH_BYTES = 10_000_000
"""One publish request, and so one message."""

MAX_PAYLOAD_BYTES = 10_485_760
"""Above this the service's front end answers, with another text (https://github.com/standard-ai/hedwig-rust/issues/18)."""

MAX_PUBLISH_MESSAGES = 1_000
MAX_ATTRIBUTES = 100
MAX_ATTRIBUTE_KEY_BYTES = 256
MAX_ATTRIBUTE_VALUE_BYTES = 1_024
MAX_ORDERING_KEY_BYTES = 1_024

MAX_ACK_DEADLINE_S = 600
MIN_STREAM_ACK_DEADLINE_S = 10

_NAME = re.compile(r"projects/[^/]+/(topics|subscriptions)/(?!goog)[A-Za-z][A-Za-z0-9\-_.~+%]{2,254}")
"""Source: https://cloud.google.com/pubsub/docs/pubsub-basics#resource_names"""

_PROJECT = re.compile(r"projects/[^/]+")


def check_name(kind: str, path: str) -> None:
    """
    Refuse a path that cannot name a resource of this kind.

    Args:
        kind: `topics` or `subscriptions`.
        path: The full path, `projects/P/topics/T`.

    Raises:
        InvalidArgumentError: Permanent.
    """
    match = _NAME.fullmatch(path)
    if match is None or match[1] != kind:
        raise InvalidArgumentError(f"Invalid [{kind}] name: (name={path})")


def check_project(path: str) -> None:
    """Refuse a parent that is not `projects/P`; any project exists here."""
    if _PROJECT.fullmatch(path) is None:
        raise InvalidArgumentError(f"Invalid [projects] name: (name={path})")


def check_publish_size(size_bytes: int) -> None:
    """Refuse a serialised publish request over 10 MB with the text of whichever limit of the service it meets first."""
    if size_bytes > MAX_PAYLOAD_BYTES:
        raise InvalidArgumentError(f"Request payload size exceeds the limit: {MAX_PAYLOAD_BYTES} bytes.")
    if size_bytes > MAX_PUBLISH_BYTES:
        raise InvalidArgumentError(too_large("request_size", size_bytes, MAX_PUBLISH_BYTES))


def check_messages(messages: Sequence[Any]) -> None:
    """
    Refuse a publish request of which any message is unacceptable; one bad message fails its whole request.

    Args:
        messages: Protobuf `PubsubMessage` objects.

    Raises:
        InvalidArgumentError: Count, emptiness, attributes or ordering key; permanent.
        FailedPreconditionError: More than one ordering key in the request (seen from the service in
            https://github.com/yoshidan/google-cloud-rust/issues/226); permanent.
    """
    if not messages:
        raise InvalidArgumentError(too_small("message_count", 0, 1))
    if len(messages) > MAX_PUBLISH_MESSAGES:
        raise InvalidArgumentError(too_large("message_count", len(messages), MAX_PUBLISH_MESSAGES))
    ordering_key = messages[0].ordering_key
    for message in messages:
        if message.attributes:
            _check_attributes(message.attributes)
        elif not message.data:
            raise InvalidArgumentError(
                "Some messages in the batch are empty. Every message must contain either non-empty data, or at least "
                "one attribute."
            )
        if message.ordering_key != ordering_key:
            raise FailedPreconditionError(
                "In a single publish request, all messages must have no ordering key or they must all have the same "
                "ordering key."
            )
    key_bytes = len(ordering_key.encode())
    if key_bytes > MAX_ORDERING_KEY_BYTES:
        raise InvalidArgumentError(too_large("ordering_key size", key_bytes, MAX_ORDERING_KEY_BYTES))


def _check_attributes(attributes: Any) -> None:
    """Refuse too many, too long, unnamed or reserved attributes."""
    if len(attributes) > MAX_ATTRIBUTES:
        raise InvalidArgumentError(too_large("attribute count", len(attributes), MAX_ATTRIBUTES))
    for key, value in attributes.items():
        if not key:
            raise InvalidArgumentError("One of the attributes in the request has an empty key.")
        _check_attribute_size("key", key, MAX_ATTRIBUTE_KEY_BYTES)
        _check_attribute_size("value", value, MAX_ATTRIBUTE_VALUE_BYTES)
        # Google's own clients put their trace context under googclient_; the rest of the prefix is reserved.
        if key.startswith("goog") and not key.startswith("googclient_"):
            raise InvalidArgumentError(f"Attribute keys must not start with goog (key={key}).")


def _check_attribute_size(part: str, text: str, maximum: int) -> None:
    """Word it as in https://github.com/googleapis/google-cloud-python/issues/7906."""
    size = len(text.encode())
    if size > maximum:
        raise InvalidArgumentError(
            f"One of the attributes in the request has a {part} that is too long. The length is {size} characters, "
            f"but the maximum allowed is {maximum}. Refer to https://cloud.google.com/pubsub/quotas for more "
            "information."
        )
