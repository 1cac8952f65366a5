"""
A message: what may be published, how it is stored, and its bytes on the wire.

A message is parsed and serialised once, when it is published.  From then on it is two immutable pieces: `body` (data,
attributes, ordering key as the publisher sent them) and `stamp` (message id and publish time, which the server adds).
Protobuf fields may be in any order and the last field of a kind wins, so a delivery is the concatenation of the two,
and forwarding to a dead-letter topic appends attributes and a new stamp.  A message is not parsed or serialised again,
whatever the number of subscriptions, redeliveries and responses.

No other module knows field numbers; `tests/unit/emulators/pubsub/test_messages.py` checks each against Google's
generated classes.  Checks raise before the engine changes anything, so that a refused request has no effect.

Sources: https://protobuf.dev/programming-guides/encoding/#last-one-wins,
https://cloud.google.com/pubsub/quotas#resource_limits
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from worker.emulators.pubsub.errors import FailedPreconditionError, InvalidArgumentError, check_bounds, too_large

_MAX_PUBLISH_BYTES = 10_000_000
"""Size of one publish request, and so of one message."""

_MAX_PAYLOAD_BYTES = 10_485_760
"""Above this size the front end of the service answers, with another text
(https://github.com/standard-ai/hedwig-rust/issues/18)."""

_MAX_PUBLISH_MESSAGES = 1_000
_MAX_ATTRIBUTES = 100
_MAX_ATTRIBUTE_KEY_BYTES = 256
_MAX_ATTRIBUTE_VALUE_BYTES = 1_024
_MAX_ORDERING_KEY_BYTES = 1_024

_NO_ATTRIBUTES: Mapping[str, str] = MappingProxyType({})

# Tags: field number << 3 | 2 (length-delimited) or | 0 (varint), from google/pubsub/v1/pubsub.proto.
_ATTRIBUTES = b"\x12"  # PubsubMessage.attributes = 2
_MESSAGE_ID = b"\x1a"  # PubsubMessage.message_id = 3
_PUBLISH_TIME = b"\x22"  # PubsubMessage.publish_time = 4
_ENTRY_KEY = b"\x0a"  # map entry key = 1
_ENTRY_VALUE = b"\x12"  # map entry value = 2
_SECONDS = b"\x08"  # Timestamp.seconds = 1
_NANOS = b"\x10"  # Timestamp.nanos = 2
_ACK_ID = b"\x0a"  # ReceivedMessage.ack_id = 1
_MESSAGE = b"\x12"  # ReceivedMessage.message = 2
_DELIVERY_ATTEMPT = b"\x18"  # ReceivedMessage.delivery_attempt = 3
_RECEIVED_MESSAGES = b"\x0a"  # PullResponse.received_messages = 1, StreamingPullResponse.received_messages = 1


class StoredMessage(NamedTuple):
    """
    One published message, shared by all subscriptions that hold it.

    A named tuple, because the server makes ten thousand a second and a frozen dataclass takes three times as long.
    """

    sequence: int
    """Position in publish order over the whole server; the message id is its decimal form."""
    body: bytes
    """Serialised `PubsubMessage` without message id and publish time."""
    stamp: bytes
    """Serialised message id and publish time, appended to `body`."""
    publish_ns: int
    """Publish time, nanoseconds since the Unix epoch."""
    attributes: Mapping[str, str]
    """For filters."""
    ordering_key: str
    """Empty when the message is not ordered."""

    @property
    def message_id(self) -> str:
        """The id that the publisher received."""
        return str(self.sequence)

    @property
    def size_bytes(self) -> int:
        """Size of the serialised `PubsubMessage`, which clients use for flow control."""
        return len(self.body) + len(self.stamp)


def check_publish_size(size_bytes: int) -> None:
    """Refuse a serialised publish request over 10 MB, with the text of the service for that size."""
    if size_bytes > _MAX_PAYLOAD_BYTES:
        raise InvalidArgumentError(f"Request payload size exceeds the limit: {_MAX_PAYLOAD_BYTES} bytes.")
    if size_bytes > _MAX_PUBLISH_BYTES:
        raise InvalidArgumentError(too_large("request_size", size_bytes, _MAX_PUBLISH_BYTES))


def check_messages(messages: Sequence[Any]) -> None:
    """
    Refuse a publish request if any of its messages is invalid.

    Args:
        messages: Protobuf `PubsubMessage` objects.

    Raises:
        InvalidArgumentError: Wrong number of messages, an empty message, wrong attributes or ordering key; permanent.
        FailedPreconditionError: More than one ordering key in the request (seen from the service in
            https://github.com/yoshidan/google-cloud-rust/issues/226); permanent.
    """
    check_bounds("message_count", len(messages), 1, _MAX_PUBLISH_MESSAGES)
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
    if key_bytes > _MAX_ORDERING_KEY_BYTES:
        raise InvalidArgumentError(too_large("ordering_key size", key_bytes, _MAX_ORDERING_KEY_BYTES))


def _check_attributes(attributes: Any) -> None:
    """Refuse too many attributes, and attributes with a key or value that is too long, empty or reserved."""
    if len(attributes) > _MAX_ATTRIBUTES:
        raise InvalidArgumentError(too_large("attribute count", len(attributes), _MAX_ATTRIBUTES))
    for key, value in attributes.items():
        if not key:
            raise InvalidArgumentError("One of the attributes in the request has an empty key.")
        _check_attribute_size("key", key, _MAX_ATTRIBUTE_KEY_BYTES)
        _check_attribute_size("value", value, _MAX_ATTRIBUTE_VALUE_BYTES)
        # Google's clients send their trace context as googclient_*; other names with goog are reserved.
        if key.startswith("goog") and not key.startswith("googclient_"):
            raise InvalidArgumentError(f"Attribute keys must not start with goog (key={key}).")


def _check_attribute_size(part: str, text: str, maximum: int) -> None:
    """Refuse a text that is too long; worded as in https://github.com/googleapis/google-cloud-python/issues/7906."""
    size = len(text.encode())
    if size > maximum:
        raise InvalidArgumentError(
            f"One of the attributes in the request has a {part} that is too long. The length is {size} characters, "
            f"but the maximum allowed is {maximum}. Refer to https://cloud.google.com/pubsub/quotas for more "
            "information."
        )


def store(message: Any, sequence: int, publish_ns: int) -> StoredMessage:
    """
    Turn a published protobuf `PubsubMessage` into a stored one.

    Args:
        message: Parsed from the request.  A message id or publish time in it is removed, since the service sets both.
        sequence: See `StoredMessage.sequence`.
        publish_ns: See `StoredMessage.publish_ns`.
    """
    if message.message_id or message.HasField("publish_time"):
        message.ClearField("message_id")
        message.ClearField("publish_time")
    return StoredMessage(
        sequence,
        message.SerializeToString(),
        _stamp(sequence, publish_ns),
        publish_ns,
        dict(message.attributes) if message.attributes else _NO_ATTRIBUTES,
        message.ordering_key,
    )


def with_attributes(message: StoredMessage, added: Mapping[str, str], sequence: int, publish_ns: int) -> StoredMessage:
    """Return a copy with a new message id and publish time; `added` replaces attributes of the same name."""
    entries = b"".join(
        _field(_ATTRIBUTES, _field(_ENTRY_KEY, key.encode()) + _field(_ENTRY_VALUE, value.encode()))
        for key, value in added.items()
    )
    return StoredMessage(
        sequence,
        message.body + entries,
        _stamp(sequence, publish_ns),
        publish_ns,
        {**message.attributes, **added},
        message.ordering_key,
    )


def encode_received(deliveries: Iterable[tuple[str, StoredMessage, int]]) -> bytes:
    """
    Serialise a `PullResponse`, which is also a `StreamingPullResponse` without its further fields.

    Args:
        deliveries: Ack id, message, and delivery attempt (counts from 1; 0 leaves the field unset).
    """
    parts: list[bytes] = []
    for ack_id, message, attempt in deliveries:
        ack_bytes = ack_id.encode()
        body, stamp = message.body, message.stamp
        size = len(body) + len(stamp)
        head = b"%b%b%b%b%b" % (_ACK_ID, _varint(len(ack_bytes)), ack_bytes, _MESSAGE, _varint(size))
        tail = b"%b%b" % (_DELIVERY_ATTEMPT, _varint(attempt)) if attempt else b""
        parts += (_RECEIVED_MESSAGES, _varint(len(head) + size + len(tail)), head, body, stamp, tail)
    return b"".join(parts)


def _stamp(sequence: int, publish_ns: int) -> bytes:
    """Serialise message id and publish time; zero seconds or nanoseconds are written as well, which is allowed."""
    seconds, nanos = divmod(publish_ns, 1_000_000_000)
    time = _SECONDS + _varint(seconds) + _NANOS + _varint(nanos)
    return _field(_MESSAGE_ID, b"%d" % sequence) + _field(_PUBLISH_TIME, time)


def _field(tag: bytes, value: bytes) -> bytes:
    """Serialise one length-delimited field."""
    return tag + _varint(len(value)) + value


def _varint(number: int) -> bytes:
    """Serialise a number >= 0 in base 128, lowest group first."""
    if number < len(_SMALL):
        return _SMALL[number]
    groups = bytearray()
    while number > 127:  # noqa: PLR2004 - seven bits a byte
        groups.append(number & 127 | 128)
        number >>= 7
    groups.append(number)
    return bytes(groups)


_SMALL = tuple(bytes([number]) for number in range(128)) + tuple(
    bytes([number & 127 | 128, number >> 7]) for number in range(128, 1 << 14)
)
"""Varints of one and two bytes, precomputed: lengths of ids and of messages up to 16 KB."""
