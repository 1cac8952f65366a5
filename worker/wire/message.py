"""
The wire: request and response messages, and nothing else.

The only implementation of the contract in `docs/contract.md`.  `decode_request` turns the data of one Pub/Sub message
into a `RequestMessage` or raises `MessageError` with a sentence for the requester; `encode_response` does the
opposite.  The body is never parsed into objects: it travels as the exact bytes that stood in the message, and so does
the metadata, so big integers, key order and number spelling survive.  This module knows nothing of brokers, HTTP or
retries.

Paths are judged for their shape only (`worker.wire.http`); which of them are allowed is a setting.
"""

import json
import re
from collections.abc import Container, Iterator, Mapping
from datetime import UTC, datetime
from functools import lru_cache

import msgspec
from msgspec import structs

from worker.errors import MessageError
from worker.wire.body import RequestBody, is_json_object
from worker.wire.http import is_header, normalise_path

MAX_PUBSUB_MESSAGE_BYTES = 10_000_000
"""Pub/Sub's limit for one message, data and attributes together: 10 MB
(https://cloud.google.com/pubsub/quotas#resource_limits).  The broker counts decimal megabytes."""

MAX_ATTRIBUTES = 100
MAX_ATTRIBUTE_KEY_BYTES = 256
MAX_ATTRIBUTE_VALUE_BYTES = 1024
"""Limits of attributes (https://cloud.google.com/pubsub/quotas#resource_limits)."""

BODY_SHA256 = "body_sha256"
"""Attribute of a request or an answer whose body is an object: the SHA-256 of its content, 64 hex digits."""
RUN_ID = "run_id"
"""Attribute of a request that belongs to a run over a file: the run's id."""
RUN_ROUND = "run_round"
"""Attribute of a request of a run that is sent again on purpose: `2` the first time."""
LINE_ID = "line_id"
"""Attribute of a request of a run: the line of the file, by number and hash."""
LINE_SHAPE = "line_shape"
"""Attribute `batch` of a request that was made from an OpenAI batch line: the shape of its line in the output."""
RUN_ATTRIBUTES = (RUN_ID, RUN_ROUND, LINE_ID, LINE_SHAPE)
"""Attributes of a request that its answer always carries, so that a run works with every worker's settings."""

MAX_LENIENT_BYTES = 1_000_000
"""Longest message read leniently: the walk builds Python objects, tens of bytes for each byte at worst, and that is
more than a requester's mistake should cost the others.  House decision."""

MAX_DEADLINE_S = 1e11
"""Larger numbers are no Unix seconds (the year 5138) but milliseconds (1973 and later) or smaller units."""

_KNOWN_KEYS = ("path", "metadata", "body", "body_uri", "deadline", "priority", "headers")
_BATCH_KEYS = ("custom_id", "method", "url", "body")
"""An OpenAI batch line, which is a request as well
(https://platform.openai.com/docs/api-reference/batch/request-input)."""
_ALL_KEYS = frozenset(_KNOWN_KEYS)
_FRAME_BYTES = len('"":,')
"""What stands around a key and its value, at least; in place of the last comma the brace."""
_REPEATED_BYTES = _FRAME_BYTES + min(map(len, (*_KNOWN_KEYS, *_BATCH_KEYS))) + len("0")
"""What a key takes that is given a second time, at least."""
_NAMED_KEYS = 5
"""Unknown keys named in a refusal, and `_KEY_CHARS` of each: the reason must stay small whatever was sent."""
_KEY_CHARS = 64

_KEY = re.compile(rb'[ \t\r\n{,]*("(?:[^"\\]|\\.)*")[ \t\r\n]*:[ \t\r\n]*')
_HALF = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}.{0,5}\Z")  # so near the end the parser misses the other half
_END = re.compile(rb"[ \t\r\n]*\}")
_SCAN = json.JSONDecoder(strict=False, parse_int=str, parse_float=str).raw_decode  # no numbers: digits may be many
_GAP = re.compile(r"[ \t\r\n]*")
_MOMENT = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d")


class ReceivedMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One delivery, as the broker gave it; has no `ack()`: the processor returns a verdict instead."""

    message_id: str
    """The broker's id, the same for every redelivery."""
    data: bytes
    attributes: Mapping[str, str] = {}
    publish_time: float = 0.0
    """Unix seconds at which the broker accepted it."""
    delivery_attempt: int | None = None
    """From 1; `None` when the subscription has no dead-letter policy and so does not count."""
    ordering_key: str = ""
    received_at: float | None = None
    """Monotonic seconds at which its lease began here, before any wait in the subscriber; `None`: now."""
    source: str = ""
    """Id of its subscription where the worker has several; empty otherwise."""

    @property
    def key(self) -> str:
        """What no other message has: its id, which is the broker's for one topic only, and its source."""
        return f"{self.source}-{self.message_id}" if self.source else self.message_id


class RequestMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A decoded request."""

    path: str
    """Begins with `/`; may carry a query."""
    body: RequestBody | None
    """The exact JSON object bytes of the message, `None` while they stand where `body_uri` says."""
    metadata: bytes = b"{}"
    """Raw JSON object; echoed as it is."""
    body_uri: str | None = None
    """The object that holds the body; `None` where the message itself does."""
    body_sha256: str | None = None
    """Of that object, 64 hex digits in lower case; `None` where it is not to be checked."""
    deadline: float | None = None
    """Unix seconds after which no answer is wanted but the error that says so."""
    priority: int = 0
    """Larger is sooner, within what one worker has leased."""
    headers: Mapping[str, str] = {}
    model: str | None = None
    """`body.model` when it is a string."""
    tenant: str | None = None
    """For whom it is; `None` where tenants are not told apart."""
    shares_window: bool = False
    """Its tenant has no window of its own."""

    @property
    def lane(self) -> str | None:
        """Name of the requests that share its fate at a backend: its model, and its tenant if there is one."""
        return self.model if self.tenant is None or self.shares_window else f"{self.tenant}/{self.model or ''}"


_decode_keys = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_text = msgspec.json.Decoder(str).decode
_decode_number = msgspec.json.Decoder(float | str).decode
_decode_int = msgspec.json.Decoder(int).decode
_decode_headers = msgspec.json.Decoder(dict[str, str | None]).decode


def decode_request(data: bytes) -> RequestMessage:
    """
    Decode the data of one request message.

    Args:
        data: UTF-8 JSON, shape `{"path": str, "metadata": {…}?, "body": {…}}`; `body_uri` may stand for `body`;
            optional `deadline` (RFC 3339 text or Unix seconds), `priority` (integer), `headers` (text to text).  Or an
            OpenAI batch line, `{"custom_id": str, "method": "POST", "url": str, "body": {…}}`.

    Returns:
        The request; `body` and `metadata` are the exact bytes of the message.  The metadata of a batch line are
        `{"custom_id": …}`.

    Raises:
        MessageError: Not a request; permanent.  Carries the metadata where it could be read.
    """
    try:
        return _decode(data)
    except MessageError as error:
        error.metadata = read_metadata_leniently(data)
        raise
    except RecursionError:
        raise MessageError("the message is nested too deeply", metadata=read_metadata_leniently(data)) from None


def metadata_value(metadata: bytes, key: str) -> str | None:
    """
    Return one value of a request's metadata as JSON, `None` where it is absent or null.

    Args:
        metadata: A JSON object, of a request that was decoded.
        key: At the top level.
    """
    value = bytes(_decode_keys(metadata).get(key, b"null"))
    return None if value == b"null" else value.decode()


def _decode(data: bytes) -> RequestMessage:
    fields = _fields(data)
    body, body_uri = fields.get("body"), fields.get("body_uri")
    if body is None and body_uri is None:
        raise MessageError("body is missing", param="body")
    if body is not None and body_uri is not None:
        raise MessageError("body and body_uri exclude each other", param="body_uri")
    if body is not None and not body.startswith(b"{"):
        raise MessageError("body must be a JSON object", param="body")
    metadata = fields.get("metadata", b"{}")
    if not metadata.startswith(b"{"):
        raise MessageError("metadata must be a JSON object", param="metadata")
    view = RequestBody(body) if body is not None else None
    return RequestMessage(
        path=_path(fields.get("path")),
        body=view,
        metadata=metadata,
        body_uri=_text(body_uri, "body_uri") if body_uri is not None else None,
        deadline=_deadline(fields["deadline"]) if "deadline" in fields else None,
        priority=_priority(fields["priority"]) if "priority" in fields else 0,
        headers=_headers(fields["headers"]) if "headers" in fields else {},
        model=_model(view) if view is not None else None,
    )


def with_body(request: RequestMessage, data: bytes) -> RequestMessage:
    """
    Return the request with the body that its `body_uri` names.

    Raises:
        MessageError: The object holds no JSON object; permanent.
    """
    if not is_json_object(data):
        raise MessageError("body_uri must name a JSON object", param="body_uri", metadata=request.metadata)
    body = RequestBody(data)
    try:
        return structs.replace(request, body=body, model=_model(body))
    except MessageError as error:
        error.metadata = request.metadata
        raise


def _model(body: RequestBody) -> str | None:
    model = body.raw("model")
    return _text(model, "body") if model.startswith(b'"') else None


def _fields(data: bytes) -> dict[str, bytes]:
    """Return the raw values of the top level: valid JSON, none unknown, none twice; a null is as good as absent."""
    if not data:
        raise MessageError("the message has no data; expected a JSON object with path and body")
    try:
        if not data.isascii():
            data.decode("utf-8")  # msgspec does not look into raw values
        fields = {name: bytes(raw) for name, raw in _decode_keys(data).items()}
    except UnicodeDecodeError as error:
        raise MessageError(f"the message is not UTF-8 (byte {error.start})") from None
    except msgspec.ValidationError:
        raise MessageError("the message must be a JSON object with path and body") from None
    except msgspec.DecodeError as error:
        raise MessageError(f"the message is not JSON: {_fault(error, data)}") from None
    has_others = not fields.keys() <= _ALL_KEYS
    is_batch = has_others and is_batch_line(fields)
    known = _BATCH_KEYS if is_batch else _KNOWN_KEYS
    if has_others and (unknown := [name[:_KEY_CHARS] for name in fields if name not in known]):
        names = ", ".join(repr(name) for name in unknown[:_NAMED_KEYS]) + (", …" if len(unknown) > _NAMED_KEYS else "")
        raise MessageError(
            f"unknown key{'s' if len(unknown) > 1 else ''} {names}; known keys are {', '.join(known)}",
            param=unknown[0],
        )
    if (repeated := _find_repeated(data, fields)) is not None:
        raise MessageError(f"{repeated} is given twice", param=repeated)
    if b"null" in fields.values():
        fields = {name: raw for name, raw in fields.items() if raw != b"null" or name == "path"}
    return _request_of_batch_line(fields) if is_batch else fields


def is_batch_line(keys: Container[str]) -> bool:
    """Whether a JSON object with these keys at its top level is meant as an OpenAI batch line."""
    return "path" not in keys and ("custom_id" in keys or "url" in keys)


def _request_of_batch_line(fields: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the fields of the request that a batch line means."""
    for name in _BATCH_KEYS:
        if name not in fields:
            raise MessageError(f"{name} is missing", param=name)
    if not _text(fields["custom_id"], "custom_id"):
        raise MessageError("custom_id must not be empty", param="custom_id")
    if _text(fields["method"], "method") != "POST":
        raise MessageError("method must be POST", param="method")
    url = _text(fields["url"], "url")
    try:
        normalise_path(url)
    except MessageError as error:
        raise MessageError(error.reason.replace("path", "url", 1), param="url") from None
    return {"path": fields["url"], "metadata": _metadata_of(fields["custom_id"]), "body": fields["body"]}


def _metadata_of(custom_id: bytes) -> bytes:
    return b'{"custom_id":%s}' % custom_id


def _find_repeated(data: bytes, fields: Mapping[str, bytes]) -> str | None:
    """
    Return a key that stands twice in a valid object, `None` when there is none.

    Of such a key the parser kept the last value; which one the requester meant cannot be known
    (https://datatracker.ietf.org/doc/html/rfc8259#section-4).  The values need no second parse: walking over the ones
    that were kept must lead exactly to the end.  Usually their sizes alone leave no room for one more.
    """
    surplus = len(data) - 1
    for known, value in fields.items():
        surplus -= _FRAME_BYTES + len(known) + len(value)
    if surplus < _REPEATED_BYTES:
        return None
    position, name, seen = 0, "", set[str]()
    while (match := _KEY.match(data, position)) is not None:
        name = _decode_text(match[1])
        if name in seen or not data.startswith(fields[name], match.end()):
            return name
        seen.add(name)
        position = match.end() + len(fields[name])
    return name if seen and _END.match(data, position) is None else None


def read_metadata_leniently(data: bytes) -> bytes:
    """
    Return the metadata of a message that is no request, as raw JSON; `{}` where none can be read.

    A requester whose message is refused needs its metadata to know which one it was, and the usual mistakes (`NaN` from
    a language's own JSON writer, a raw line break, a cut at the end, a byte that is not UTF-8) leave it readable.  The
    metadata of a batch line are its custom_id.
    """
    try:
        fields: Mapping[str, bytes] = {key: bytes(value) for key, value in _decode_keys(data).items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        fields = dict(reversed(list(_walk_top_level(data))))  # of a key that stands twice the first value
    raw = fields.get("metadata", b"{}")
    if "custom_id" in fields and is_batch_line(fields):
        raw = _metadata_of(fields["custom_id"])
    # Halves of surrogate pairs are JSON, but parsers of consumers refuse them, msgspec's among them.
    return raw if is_json_object(raw) and RequestBody(raw).is_object else b"{}"


def _walk_top_level(data: bytes) -> Iterator[tuple[str, bytes]]:
    """
    Yield key and raw value of a JSON object's top level, in order, until it can be followed no further.

    Raises nothing, whatever the bytes; what is over `MAX_LENIENT_BYTES` yields nothing.  A value is cut out as it
    stands and may itself not be valid JSON.
    """
    if len(data) > MAX_LENIENT_BYTES:
        return
    text = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    position, expected = 0, "{"
    try:
        while text[position := _gap(text, position)] == expected:
            key, position = _SCAN(text, _gap(text, position + 1))
            position = _gap(text, position)
            if not isinstance(key, str) or text[position] != ":":
                return
            start = _gap(text, position + 1)
            _, position = _SCAN(text, start)
            yield key, text[start:position].encode("utf-8", "surrogateescape")
            expected = ","
    except (ValueError, IndexError, RecursionError):  # the cut, or nested too deeply
        return


def _gap(text: str, position: int) -> int:
    match = _GAP.match(text, position)
    assert match is not None  # it matches nothing as well
    return match.end()


def _fault(error: Exception, data: bytes) -> str:
    text = str(error).removeprefix("JSON is malformed: ")
    return "invalid utf-16 surrogate pair" if "truncated" in text and _HALF.search(data[-12:]) else text


def _text(raw: bytes, name: str) -> str:
    try:
        return _decode_text(raw)
    except msgspec.DecodeError:
        raise MessageError(f"{name} must be a string", param=name) from None


@lru_cache(maxsize=256)
def _path(raw: bytes | None) -> str:
    """Read the path; few are used, so each is looked at once."""
    if raw is None:
        raise MessageError("path is missing", param="path")
    return normalise_path(_text(raw, "path"))


def _deadline(raw: bytes) -> float:
    try:
        value = _decode_number(raw)
        moment = value if isinstance(value, float) else _moment(value)
    except (msgspec.DecodeError, ValueError, OverflowError):
        raise MessageError("deadline must be RFC 3339 text or Unix seconds", param="deadline") from None
    if abs(moment) > MAX_DEADLINE_S and isinstance(value, float):
        raise MessageError("deadline must be RFC 3339 text or Unix seconds, not milliseconds", param="deadline")
    return moment


def _moment(text: str) -> float:
    if _MOMENT.match(text) is None:  # the library reads all of ISO 8601: "20261231" and week dates
        raise ValueError(text)
    moment = datetime.fromisoformat(text.upper())
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _priority(raw: bytes) -> int:
    try:
        return _decode_int(raw)
    except (msgspec.DecodeError, ValueError):
        raise MessageError("priority must be an integer", param="priority") from None


def _headers(raw: bytes) -> dict[str, str]:
    try:
        headers = {name: value for name, value in _decode_headers(raw).items() if value is not None}
    except msgspec.DecodeError:
        raise MessageError("headers must map text to text", param="headers") from None
    for name, value in headers.items():
        if not is_header(name, value):
            raise MessageError(f"{name[:_KEY_CHARS]!r} is not a usable header", param="headers")
    return {name.lower(): value for name, value in headers.items()}


def encode_request(
    *, path: str, body: bytes, metadata: bytes = b"{}", deadline: float | None = None, priority: int | None = None
) -> bytes:
    """Return the data of a request message; `body` and `metadata` are raw JSON objects and are not checked."""
    extra = b"" if deadline is None else b',"deadline":%s' % msgspec.json.encode(deadline)
    extra += b"" if priority is None else b',"priority":%d' % priority
    return b'{"path":%s,"metadata":%s,"body":%s%s}' % (msgspec.json.encode(path), metadata, body, extra)


def encode_response(
    status_code: int, metadata: bytes, body: bytes, *, stats: bytes | None = None, body_uri: str | None = None
) -> bytes:
    """
    Return the data of a response message, `{"status_code": int, "metadata": {…}, "body": {…}}`.

    Args:
        status_code: HTTP status of the answer.
        metadata: Raw JSON object, as it came with the request.
        body: Raw JSON; embedded byte for byte, so it must be valid (the policy has seen to that).
        stats: Raw JSON object for the opt-in `stats` key, or `None` for none.
        body_uri: The object that holds the body; the message then has the key `body_uri` and no `body`.
    """
    tail = b"}" if stats is None else b',"stats":%s}' % stats
    if body_uri is not None:
        uri = msgspec.json.encode(body_uri)
        return b'{"status_code":%d,"metadata":%s,"body_uri":%s%s' % (status_code, metadata, uri, tail)
    return b'{"status_code":%d,"metadata":%s,"body":%s%s' % (status_code, metadata, body, tail)


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
        if len(value) > MAX_ATTRIBUTE_VALUE_BYTES or not value.isascii():
            encoded = value.encode("utf-8", "replace")
            value = encoded[:MAX_ATTRIBUTE_VALUE_BYTES].decode("utf-8", "ignore")  # noqa: PLW2901
        kept[key] = value
    return kept
