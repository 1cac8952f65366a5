"""
Input lines: the shape of a line, and the message that is published for it.  Pure, no I/O.

Every line is published byte for byte, also one that is not JSON: only the worker judges messages, and it answers a bad
one with a 400, so that every line gets an answer.  An OpenAI batch line `{custom_id, method, url, body}` (any object
that has `custom_id` or `url` and no `path`) gets its answer in OpenAI's shape, every other line as a message.  A line
that no message can carry is refused here, with an answer in the usual shape.

The id of a line is `line-<number>-<hash>`: its number in the file from 1, blank lines counted, and the first eight hex
digits of the SHA-256 of its bytes, without byte order mark and line end.  A changed line therefore has another id.

Source: batch lines, https://platform.openai.com/docs/api-reference/batch/request-input.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from hashlib import sha256
from sys import intern

import msgspec

from worker.wire.body import RequestBody
from worker.wire.message import (
    LINE_ID,
    LINE_SHAPE,
    MAX_PUBSUB_MESSAGE_BYTES,
    is_batch_line,
    message_bytes,
    read_metadata_leniently,
)

MAX_LINE_BYTES = 32_000_000
"""A longer line is not kept in memory.  House decision: three times the size of a message, so that the answer to a line
that is only too large for the broker can still have its metadata."""

_LINE_ID = re.compile(r"(?:batch_req_)?line-([1-9][0-9]{0,17})-([0-9a-f]{8})")
"""A line's id, also as it stands in the output of a batch line."""

_MAX_OVERHEAD_BYTES = 1024
"""Bytes that a broker may count besides data and attributes; a rejected message this near the limit was too large."""

_ABSENT = msgspec.Raw(b"")


class Shape(StrEnum):
    """The format of a line, and of its answer."""

    MESSAGE = "message"
    """A request message, or anything else."""
    BATCH = "batch"
    """An OpenAI batch line."""


@dataclass(frozen=True, slots=True)
class RawLine:
    """One line of the input that is not blank."""

    number: int
    """From 1, blank lines counted."""
    data: bytes
    """Without line end and byte order mark; empty when the line is longer than the reader's limit."""
    size: int
    """Bytes of the line, also when `data` was not kept."""
    digest: str
    """First eight hex digits of the SHA-256 of the line."""

    @classmethod
    def of(cls, number: int, data: bytes) -> "RawLine":
        """Return a line with its size and hash."""
        return cls(number, data, len(data), short_digest(data))

    @property
    def line_id(self) -> str:
        """`line-<number>-<hash>`."""
        return f"line-{self.number}-{self.digest}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """The reason why a line is answered here and not published."""

    status_code: int
    code: str
    """The value of `error.code`."""
    message: str
    param: str | None = None
    metadata: bytes = b"{}"
    """Raw JSON object; that of the line when it can be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What to publish for one line, or why nothing is published."""

    line_id: str
    shape: Shape
    data: bytes = b""
    """Data of the message; empty when refused."""
    attributes: Mapping[str, str]
    custom_id: bytes = b"null"
    """Raw JSON of a batch line's custom_id; `null` when there is none to return."""
    path: str = ""
    """Where the request is to be posted, as the line says it; empty when it says nothing that can be read."""
    refusal: Refusal | None = None


class _Keys(msgspec.Struct):
    path: msgspec.Raw = _ABSENT
    custom_id: msgspec.Raw = _ABSENT
    url: msgspec.Raw = _ABSENT


_decode_keys = msgspec.json.Decoder(_Keys).decode
_decode_text = msgspec.json.Decoder(str).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def parse_line_id(text: str) -> tuple[int, int] | None:
    """Return number and hash of a line id, with or without `batch_req_` before it; `None` for any other text."""
    match = _LINE_ID.fullmatch(text)
    return None if match is None else (int(match[1]), int(match[2], 16))


def short_digest(data: bytes) -> str:
    """Return the first eight hex digits of the SHA-256."""
    return sha256(data).hexdigest()[:8]


def prepare(line: RawLine, model: str | None = None) -> Prepared:
    """
    Return what to publish for a line, or why nothing is published; no content of a line raises.

    Args:
        line: Not blank.
        model: Put into the body in the place of its own; `None` leaves the line as it is.
    """
    if line.size > len(line.data):
        refusal = Refusal(
            status_code=413,
            code="line_too_long",
            message=f"The line has {line.size} bytes; lines of more than {MAX_LINE_BYTES} bytes are not read.",
        )
        return Prepared(line_id=line.line_id, shape=Shape.MESSAGE, attributes={LINE_ID: line.line_id}, refusal=refusal)
    try:
        keys = _decode_keys(line.data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        keys = _Keys()
    is_batch = is_batch_line([name for name in _Keys.__struct_fields__ if bytes(getattr(keys, name))])
    attributes = {LINE_ID: line.line_id}
    if is_batch:
        attributes[LINE_SHAPE] = Shape.BATCH.value
    prepared = Prepared(
        line_id=line.line_id,
        shape=Shape.BATCH if is_batch else Shape.MESSAGE,
        data=line.data if model is None else _with_model(line.data, model),
        attributes=attributes,
        custom_id=bytes(keys.custom_id) if is_batch and _text(keys.custom_id) is not None else b"null",
        path=intern(_text(keys.url if is_batch else keys.path) or ""),  # one object for all lines that wait
    )
    if message_bytes(prepared.data, attributes) > MAX_PUBSUB_MESSAGE_BYTES:
        return refuse(prepared, too_large(line.data))
    return prepared


def _with_model(data: bytes, model: str) -> bytes:
    """Return the line with another model in its body; a line without a body that is an object stays as it is."""
    try:
        fields = _decode_fields(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return data
    body = RequestBody(bytes(fields.get("body", b"")))
    if not body.is_object:
        return data
    values = {**fields, "body": body.with_changes({"model": msgspec.json.encode(model)})}
    return b"{" + b",".join(msgspec.json.encode(key) + b":" + bytes(raw) for key, raw in values.items()) + b"}"


def too_large(data: bytes) -> Refusal:
    """Return the refusal for a line that does not fit into one Pub/Sub message."""
    return Refusal(
        status_code=413,
        code="request_too_large",
        message=f"The request has {len(data)} bytes; a Pub/Sub message holds at most {MAX_PUBSUB_MESSAGE_BYTES} bytes, "
        "attributes included.  A larger body can stand in object storage, with `body_uri` in place of `body` "
        "(docs/payloads.md).",
        metadata=read_metadata_leniently(data),
    )


def rejected(data: bytes, reason: str) -> Refusal:
    """Return the refusal for a message that the broker rejected."""
    if len(data) > MAX_PUBSUB_MESSAGE_BYTES - _MAX_OVERHEAD_BYTES:
        return too_large(data)
    return Refusal(
        status_code=400,
        code="request_rejected",
        message=f"The broker rejects the request: {reason}",
        metadata=read_metadata_leniently(data),
    )


def refuse(prepared: Prepared, refusal: Refusal) -> Prepared:
    """Return the line as refused, with nothing to publish."""
    return replace(prepared, data=b"", refusal=refusal)


def _text(raw: msgspec.Raw) -> str | None:
    """Return a JSON string's text; `None` for anything else and for text that is not UTF-8."""
    try:
        return _decode_text(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
