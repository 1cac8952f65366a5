"""
The wire: request and response messages, and nothing else.

The only implementation of the contract in `docs/contract.md`.  `decode_request` turns the data of one Pub/Sub message
into a `RequestMessage` or raises `MessageError` with a sentence for the requester; `encode_response` does the
opposite.  The body is never parsed into objects: it travels as the exact bytes that stood in the message, and so does
the metadata, so big integers, key order and number spelling survive.  This module knows nothing of brokers, HTTP or
retries.

Paths are judged here only for their shape (no host, no `..`); which of them are allowed is a setting.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec

from worker.errors import MessageError

MAX_PUBSUB_MESSAGE_BYTES = 10_000_000
"""Pub/Sub's limit for one message, data and attributes together: 10 MB
(https://cloud.google.com/pubsub/quotas#resource_limits).  The broker counts decimal megabytes."""

MAX_ATTRIBUTES = 100
MAX_ATTRIBUTE_KEY_BYTES = 256
MAX_ATTRIBUTE_VALUE_BYTES = 1024
"""Limits of attributes (https://cloud.google.com/pubsub/quotas#resource_limits)."""

MAX_PATH_CHARS = 2048
"""House decision: longer than any path of the API, shorter than any server's limit of a request line (8 KiB)."""

_KNOWN_KEYS = "path, metadata, body, body_uri, deadline, priority, headers"
_SEGMENT_UP = re.compile(r"(?:^|/)(?:\.|%2e){2}(?:/|$)", re.IGNORECASE)
_SCHEME = re.compile(r"^/*[A-Za-z][A-Za-z0-9+.-]*://")
_CONTROL = re.compile(r"[\x00-\x20\x7f\\#]")
_ABSENT = msgspec.Raw(b"")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedMessage:
    """One delivery, as the broker gave it; has no `ack()`: the processor returns a verdict instead."""

    message_id: str
    """The broker's id, the same for every redelivery."""
    data: bytes
    attributes: Mapping[str, str] = field(default_factory=dict)
    publish_time: float = 0.0
    """Unix seconds at which the broker accepted it."""
    delivery_attempt: int | None = None
    """From 1; `None` when the subscription has no dead-letter policy and so does not count."""
    ordering_key: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMessage:
    """A decoded request."""

    path: str
    """Begins with `/`; may carry a query."""
    body: bytes | None
    """The exact JSON object bytes of the message, `None` when `body_uri` names them instead."""
    metadata: bytes = b"{}"
    """Raw JSON object; echoed as it is."""
    body_uri: str | None = None
    deadline: float | None = None
    """Unix seconds after which no answer is wanted but the error that says so."""
    priority: int = 0
    """Larger is sooner, within what one worker has leased."""
    headers: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None
    """`body.model` when it is a string."""
    stream: bool = False
    """`body.stream` is `true`."""


class _Envelope(msgspec.Struct, forbid_unknown_fields=True):
    path: msgspec.Raw = _ABSENT
    metadata: msgspec.Raw = _ABSENT
    body: msgspec.Raw = _ABSENT
    body_uri: msgspec.Raw = _ABSENT
    deadline: msgspec.Raw = _ABSENT
    priority: msgspec.Raw = _ABSENT
    headers: msgspec.Raw = _ABSENT


class _BodyPeek(msgspec.Struct):
    model: Any = None
    stream: Any = None


_decode_envelope = msgspec.json.Decoder(_Envelope).decode
_decode_keys = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_peek = msgspec.json.Decoder(_BodyPeek).decode
_decode_text = msgspec.json.Decoder(str).decode
_decode_number = msgspec.json.Decoder(float | str).decode
_decode_int = msgspec.json.Decoder(int).decode
_decode_headers = msgspec.json.Decoder(dict[str, str]).decode


def decode_request(data: bytes) -> RequestMessage:
    """
    Decode the data of one request message.

    Args:
        data: UTF-8 JSON, shape `{"path": str, "metadata": {…}?, "body": {…}}`; `body_uri` may stand for `body`;
            optional `deadline` (RFC 3339 text or Unix seconds), `priority` (integer), `headers` (text to text).

    Returns:
        The request; `body` and `metadata` are the exact bytes of the message.

    Raises:
        MessageError: Not a request; permanent.  Carries the metadata where it could be read.
    """
    try:
        return _decode(data)
    except MessageError as error:
        error.metadata = salvage_metadata(data)
        raise


def _decode(data: bytes) -> RequestMessage:
    if not data:
        raise MessageError("the message has no data; expected a JSON object with path and body")
    try:
        data.decode("utf-8")  # msgspec does not look into raw values
    except UnicodeDecodeError as error:
        raise MessageError(f"the message is not UTF-8 (byte {error.start})") from None
    try:
        envelope = _decode_envelope(data)
    except RecursionError:
        raise MessageError("the message is nested too deeply") from None
    except msgspec.ValidationError as error:
        raise _envelope_error(error) from None
    except msgspec.DecodeError as error:
        raise MessageError(f"the message is not JSON: {_plain(error)}") from None
    if (body := _optional(envelope.body)) is None and _optional(envelope.body_uri) is None:
        raise MessageError("body is missing", param="body")
    if body is not None and _optional(envelope.body_uri) is not None:
        raise MessageError("body and body_uri exclude each other", param="body_uri")
    if body is not None and not body.startswith(b"{"):
        raise MessageError("body must be a JSON object", param="body")
    metadata = bytes(envelope.metadata) or b"{}"
    if not metadata.startswith(b"{"):
        raise MessageError("metadata must be a JSON object", param="metadata")
    peek = _decode_peek(body) if body is not None else _BodyPeek()
    return RequestMessage(
        path=_path(envelope.path),
        body=body,
        metadata=metadata,
        body_uri=_body_uri(envelope.body_uri),
        deadline=_deadline(envelope.deadline),
        priority=_priority(envelope.priority),
        headers=_headers(envelope.headers),
        model=peek.model if isinstance(peek.model, str) else None,
        stream=peek.stream is True,
    )


def salvage_metadata(data: bytes) -> bytes:
    """Return the metadata of a message that is no request, as raw JSON; `{}` where none can be read."""
    try:
        data.decode("utf-8")
        raw = bytes(_decode_keys(data).get("metadata", b"{}"))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return b"{}"
    return raw if raw.startswith(b"{") else b"{}"


def _envelope_error(error: msgspec.ValidationError) -> MessageError:
    text = str(error)
    if "unknown field" in text:
        name = text.split("`")[1]
        return MessageError(f"unknown key {name!r}; known keys are {_KNOWN_KEYS}", param=name)
    return MessageError("the message must be a JSON object with path and body")


def _plain(error: Exception) -> str:
    return str(error).removeprefix("JSON is malformed: ")


def _optional(raw: msgspec.Raw) -> bytes | None:
    return bytes(raw) or None


def _path(raw: msgspec.Raw) -> str:
    if not bytes(raw):
        raise MessageError("path is missing", param="path")
    try:
        return normalise_path(_decode_text(raw))
    except msgspec.ValidationError:
        raise MessageError("path must be a string", param="path") from None


def normalise_path(path: str) -> str:
    """
    Return the path with exactly one leading slash.

    Raises:
        MessageError: Empty, too long, with a scheme, a host, a `..` segment, a fragment, white space or control
            characters; permanent.
    """
    if _SCHEME.match(path) or path.startswith("//"):
        raise MessageError("path must not name a scheme or a host", param="path")
    if not path or path == "/":
        raise MessageError("path is empty", param="path")
    if len(path) > MAX_PATH_CHARS:
        raise MessageError(f"path is longer than {MAX_PATH_CHARS} characters", param="path")
    if _CONTROL.search(path) or not path.isascii():
        raise MessageError("path must be plain ASCII without white space, backslash or fragment", param="path")
    if _SEGMENT_UP.search(path.partition("?")[0]):
        raise MessageError("path must not contain '..' segments", param="path")
    return path if path.startswith("/") else "/" + path


def _body_uri(raw: msgspec.Raw) -> str | None:
    if not bytes(raw):
        return None
    try:
        return _decode_text(raw)
    except msgspec.ValidationError:
        raise MessageError("body_uri must be a string", param="body_uri") from None


def _deadline(raw: msgspec.Raw) -> float | None:
    if not bytes(raw) or bytes(raw) == b"null":
        return None
    try:
        value = _decode_number(raw)
        if isinstance(value, float):
            return value
        moment = datetime.fromisoformat(value)
    except (msgspec.ValidationError, ValueError):
        raise MessageError("deadline must be RFC 3339 text or Unix seconds", param="deadline") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _priority(raw: msgspec.Raw) -> int:
    if not bytes(raw):
        return 0
    try:
        return _decode_int(raw)
    except msgspec.ValidationError:
        raise MessageError("priority must be an integer", param="priority") from None


def _headers(raw: msgspec.Raw) -> dict[str, str]:
    if not bytes(raw):
        return {}
    try:
        return {name.lower(): value for name, value in _decode_headers(raw).items()}
    except msgspec.ValidationError:
        raise MessageError("headers must map text to text", param="headers") from None


def encode_request(
    *, path: str, body: bytes, metadata: bytes = b"{}", deadline: float | None = None, priority: int | None = None
) -> bytes:
    """Return the data of a request message; `body` and `metadata` are raw JSON objects and are not checked."""
    extra = b"" if deadline is None else b',"deadline":%s' % msgspec.json.encode(deadline)
    extra += b"" if priority is None else b',"priority":%d' % priority
    return b'{"path":%s,"metadata":%s,"body":%s%s}' % (msgspec.json.encode(path), metadata, body, extra)


def encode_response(status_code: int, metadata: bytes, body: bytes, *, stats: bytes | None = None) -> bytes:
    """
    Return the data of a response message, `{"status_code": int, "metadata": {…}, "body": {…}}`.

    Args:
        status_code: HTTP status of the answer.
        metadata: Raw JSON object, as it came with the request.
        body: Raw JSON; embedded byte for byte, so it must be valid (the policy has seen to that).
        stats: Raw JSON object for the opt-in `stats` key, or `None` for none.
    """
    tail = b"}" if stats is None else b',"stats":%s}' % stats
    return b'{"status_code":%d,"metadata":%s,"body":%s%s' % (status_code, metadata, body, tail)


def is_json_object(data: bytes) -> bool:
    """Whether the bytes are one valid JSON object in UTF-8."""
    try:
        data.decode("utf-8")
        _decode_keys(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def message_bytes(data: bytes, attributes: Mapping[str, str]) -> int:
    """Return the size that Pub/Sub's limit of a message counts, in bytes: data, attribute names and values."""
    return len(data) + sum(len(key.encode()) + len(value.encode()) for key, value in attributes.items())


def clip_attributes(attributes: Mapping[str, str]) -> dict[str, str]:
    """
    Return attributes the broker will take: values cut to 1,024 bytes, over-long or empty names left out.

    A reply must not be lost because a header of the backend is long; what is cut is never part of the answer.
    """
    kept: dict[str, str] = {}
    for key, value in attributes.items():
        if not key or len(key.encode()) > MAX_ATTRIBUTE_KEY_BYTES or key.startswith("goog"):
            continue
        if len(kept) == MAX_ATTRIBUTES:
            break
        encoded = value.encode("utf-8", "replace")
        kept[key] = encoded[:MAX_ATTRIBUTE_VALUE_BYTES].decode("utf-8", "ignore")
    return kept
