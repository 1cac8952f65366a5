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
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256

import msgspec

from worker.wire.message import MAX_PUBSUB_MESSAGE_BYTES, is_batch_line, message_bytes, read_metadata_leniently

LINE_ID = "line_id"
"""Attribute that carries the id of a line in the request and in its answer."""
LINE_SHAPE = "line_shape"
"""Attribute `batch` of batch lines: the shape of the answer, for a consumer without the input."""
COPY_ATTRIBUTES = (LINE_ID, LINE_SHAPE)
"""What the worker's setting `reply.copy_attributes` must name, so that answers can be matched to lines."""

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
    refusal: Refusal | None = None


class _Keys(msgspec.Struct):
    path: msgspec.Raw = _ABSENT
    custom_id: msgspec.Raw = _ABSENT
    url: msgspec.Raw = _ABSENT


_decode_keys = msgspec.json.Decoder(_Keys).decode
_decode_text = msgspec.json.Decoder(str).decode


def parse_line_id(text: str) -> tuple[int, int] | None:
    """Return number and hash of a line id, with or without `batch_req_` before it; `None` for any other text."""
    match = _LINE_ID.fullmatch(text)
    return None if match is None else (int(match[1]), int(match[2], 16))


def short_digest(data: bytes) -> str:
    """Return the first eight hex digits of the SHA-256."""
    return sha256(data).hexdigest()[:8]


def prepare(line: RawLine) -> Prepared:
    """
    Return what to publish for a line, or why nothing is published; no content of a line raises.

    Args:
        line: Not blank.
    """
    if line.size > len(line.data):
        refusal = Refusal(
            status_code=413,
            code="line_too_long",
            message=f"The line has {line.size} bytes; lines of more than {MAX_LINE_BYTES} bytes are not read.",
        )
        return _refused(line, Shape.MESSAGE, refusal)
    shape, custom_id = _shape_of(line.data)
    attributes = {LINE_ID: line.line_id}
    if shape is Shape.BATCH:
        attributes[LINE_SHAPE] = shape.value
    if message_bytes(line.data, attributes) > MAX_PUBSUB_MESSAGE_BYTES:
        return _refused(line, shape, too_large(line.data), custom_id)
    return Prepared(line_id=line.line_id, shape=shape, data=line.data, attributes=attributes, custom_id=custom_id)


def _shape_of(data: bytes) -> tuple[Shape, bytes]:
    """Return the shape of a line, and the raw JSON of its custom_id, `null` for none that can be returned."""
    try:
        keys = _decode_keys(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Shape.MESSAGE, b"null"
    if not is_batch_line([name for name in _Keys.__struct_fields__ if bytes(getattr(keys, name))]):
        return Shape.MESSAGE, b"null"
    return Shape.BATCH, b"null" if _text(keys.custom_id) is None else bytes(keys.custom_id)


def too_large(data: bytes) -> Refusal:
    """Return the refusal for a line that does not fit into one Pub/Sub message."""
    return Refusal(
        status_code=413,
        code="request_too_large",
        message=f"The request has {len(data)} bytes; a Pub/Sub message holds at most {MAX_PUBSUB_MESSAGE_BYTES} bytes, "
        "attributes included.",
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
    return Prepared(
        line_id=prepared.line_id,
        shape=prepared.shape,
        attributes=prepared.attributes,
        custom_id=prepared.custom_id,
        refusal=refusal,
    )


def _text(raw: msgspec.Raw) -> str | None:
    """Return a JSON string's text; `None` for anything else and for text that is not UTF-8."""
    try:
        return _decode_text(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _refused(line: RawLine, shape: Shape, refusal: Refusal, custom_id: bytes = b"null") -> Prepared:
    return Prepared(
        line_id=line.line_id,
        shape=shape,
        attributes={LINE_ID: line.line_id},
        custom_id=custom_id,
        refusal=refusal,
    )
