"""
Turns whatever a server sent as an error body into the same few facts.

The table, the operators' rules and the error reply read `Facts` and never the raw body.  Every shape seen in the field
is recognised: OpenAI and Azure (`error` object), vLLM and llama.cpp (the same with a number as code), SGLang (flat),
TGI, KubeAI and Ollama (`error` is a string), FastAPI (`detail`), Envoy, nginx and llm-d (text or HTML), LiteLLM (an
event-stream frame under an error status), SageMaker (`ModelError` around the container's own answer) and a list of
one element around any of these.

What is promised: no exception for any bytes; at most `MAX_BODY_BYTES` are parsed; every text in the result is bounded.
What is refused: guessing.  Nothing here looks for words inside a text, since a server may echo the prompt in it.
"""

import contextlib
import json
import re
from collections.abc import Mapping
from enum import StrEnum

import msgspec
from msgspec import structs

MAX_BODY_BYTES = 256 * 1024
"""Error bodies beyond this are text: `json.loads` takes about 10 ms a MiB, and servers echo whole prompts in 422s."""

MAX_MESSAGE_BYTES = 2 * 1024
"""Longest message kept; the envelope of error replies promises the same bound."""

_MAX_FIELD_BYTES = 256
_TITLE = re.compile(rb"<title>([^<]{1,200})</title>", re.IGNORECASE)
_GATEWAY = re.compile(
    r"litellm\.\w{1,64}: (?:(?:litellm\.)?\w{1,64}(?:Error|Exception): )?(?:\w{1,64}Exception ?[-:] ?)?",
    re.ASCII,
)
_DECODER = json.JSONDecoder(strict=False)
_MAX_DETAILS = 16
_LINE_END = re.compile(rb"\r\n|\n|\r")
"""In bytes: line separators of Unicode (U+2028, U+0085) end no line of an event stream."""
_STARTS = (b"data:", b"event:")
_FIELDS = (*_STARTS, b"id:", b"retry:", b":")
_HTML = (b"<!doctype", b"<html", b"<head", b"<body")


class Shape(StrEnum):
    """Which of the known forms a body had."""

    EMPTY = "empty"
    NESTED = "nested"
    """`{"error": {...}}`"""
    FLAT = "flat"
    """`{"message": ...}` without an `error` key."""
    STRING = "string"
    """`{"error": "text"}`"""
    DETAIL = "detail"
    """`{"detail": ...}`"""
    OBJECT = "object"
    """A JSON object that says nothing of an error."""
    JSON = "json"
    """JSON, but not an object."""
    HTML = "html"
    TEXT = "text"


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What an error body says, in one vocabulary."""

    shape: Shape = Shape.EMPTY
    wrapped: tuple[str, ...] = ()
    """What was around it, outermost first: `sse`, `list`, `sagemaker`."""
    message: str = ""
    """For people, at most 2 KiB; built-in rules match it from its first character only."""
    type: str | None = None
    code: str | None = None
    """As text, also where the server sent a number."""
    param: str | None = None
    inner_code: str | None = None
    """Azure's `innererror.code`, or the `reason` in Google's `details`."""
    status_hint: int | None = None
    """An HTTP status (400..599) that the body names; all there is inside a stream."""
    status: int | None = None
    """The HTTP status that counts: of the container behind SageMaker where there is one, else the response's."""
    payload: bytes = b""
    """The JSON text the facts came from, without what was around it; empty when it was not JSON."""

    @property
    def is_error(self) -> bool:
        """Whether the body itself says that something failed."""
        return self.shape in {Shape.NESTED, Shape.FLAT, Shape.STRING, Shape.DETAIL}


def normalise(status: int | None, headers: Mapping[str, str], body: bytes) -> Facts:
    """
    Read the facts out of one body.

    Args:
        status: HTTP status, `None` when there is none (the error event of a stream).
        headers: Response headers, names in lower case.  A content type of events does not make events of plain JSON:
            the data of one event of a stream comes here without what was around it.
        body: Raw bytes; may be empty, cut, in any encoding.

    Returns:
        The facts; never raises.

    Source: the servers' own code, named at each sample in `tests/unit/policy/golden`.
    """
    head = body[:MAX_BODY_BYTES]
    is_stream = looks_like_events(headers, head) and not head.lstrip().startswith((b"{", b"["))
    data = first_data(head) if is_stream else None
    if data is not None or (is_stream and _begins_with(head, _FIELDS)):
        facts = _of_document(data or b"", ("sse",))
    elif len(body) > MAX_BODY_BYTES:
        facts = _of_text(head, ())
    else:
        facts = _of_document(head, ())
    name = _aws_error_name(headers)
    if name is not None and facts.type is None:
        facts = structs.replace(facts, type=name)
    return facts if facts.status is not None else structs.replace(facts, status=status)


def _of_document(data: bytes, wrapped: tuple[str, ...]) -> Facts:
    """Read one document that nothing but JSON is wrapped around any more."""
    data = data.removeprefix(b"\xef\xbb\xbf").strip()
    if not data:
        return Facts(wrapped=wrapped)
    document = _parse(data)
    if isinstance(document, list) and len(document) == 1:
        wrapped, document = (*wrapped, "list"), document[0]
        data = json.dumps(document).encode()
    if document is None:
        return _of_text(data, wrapped)
    if not isinstance(document, dict):
        return Facts(shape=Shape.JSON, wrapped=wrapped, message=bounded_bytes(data, MAX_MESSAGE_BYTES))
    if "OriginalStatusCode" in document:
        return _of_sagemaker(document, data, wrapped)
    return structs.replace(_of_object(document), wrapped=wrapped, payload=data)


def _parse(data: bytes) -> object:
    """Return the JSON value, or `None` when it is none, is too deep, or is `null`."""
    try:
        return json.loads(data.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None


def _of_text(data: bytes, wrapped: tuple[str, ...]) -> Facts:
    """Text and HTML: an HTML page is told by its title, which is all that proxies put there."""
    if data[:64].lower().startswith(_HTML):
        title = _TITLE.search(data[:4096])
        text = title.group(1).strip() if title else data
        return Facts(shape=Shape.HTML, wrapped=wrapped, message=bounded_bytes(text, MAX_MESSAGE_BYTES))
    return Facts(shape=Shape.TEXT, wrapped=wrapped, message=bounded_bytes(data, MAX_MESSAGE_BYTES))


def _of_object(document: dict[str, object]) -> Facts:
    """Read the facts of an object whose `error` is an object, a string, or not there."""
    error = document.get("error")
    errors = document.get("errors")
    if error is None and isinstance(errors, list) and errors and isinstance(errors[0], dict):
        error = errors[0]
    if isinstance(error, str):
        kind = _text(document.get("error_type")) or _text(document.get("type"))
        return _facts(Shape.STRING, document, message=error, kind=kind)
    if isinstance(error, dict):
        return _facts(Shape.NESTED, error, message=_message(error), kind=_kind(error))
    if "detail" in document and not document.keys() & {"message", "Message"}:
        detail = document["detail"]
        if isinstance(detail, dict) and "detail" not in detail and (inner := _of_object(detail)).is_error:
            return structs.replace(inner, shape=Shape.DETAIL)
        return _facts(Shape.DETAIL, document, message=_message(document), kind=_kind(document))
    if document.keys() & {"message", "Message", "msg", "ErrorCode"} or document.get("object") == "error":
        return _facts(Shape.FLAT, document, message=_message(document), kind=_kind(document))
    return Facts(shape=Shape.OBJECT)


def _facts(shape: Shape, fields: dict[str, object], *, message: str, kind: str | None) -> Facts:
    code, hint = _code(fields)
    inner = fields.get("innererror") or fields.get("inner_error")
    inner_code = _text(inner.get("code")) if isinstance(inner, dict) else _reason(fields.get("details"))
    return Facts(
        shape=shape,
        message=bounded(message, MAX_MESSAGE_BYTES),
        type=kind,
        code=code,
        param=_text(fields.get("param")),
        inner_code=inner_code,
        status_hint=hint,
    )


def _reason(details: object) -> str | None:
    """Return the reason out of Google's list of details (https://cloud.google.com/apis/design/errors#error_info)."""
    if not isinstance(details, list):
        return None
    reasons = (_text(each.get("reason")) for each in details[:_MAX_DETAILS] if isinstance(each, dict))
    return next((reason for reason in reasons if reason is not None), None)


def quoted_facts(facts: Facts) -> Facts | None:
    """
    Return what the provider behind a gateway said, `None` where the message does not quote one.

    LiteLLM puts the names of its exceptions before the provider's words, which may be a whole JSON document with the
    gateway's own remarks behind it.

    Source: https://github.com/BerriAI/litellm/blob/main/litellm/litellm_core_utils/exception_mapping_utils.py
    """
    prefix = _GATEWAY.match(facts.message)
    if prefix is None:
        return None
    words = facts.message[prefix.end() :]
    document = None
    if words.startswith(("{", "b'{", 'b"{')):
        with contextlib.suppress(ValueError, RecursionError):
            document, _ = _DECODER.raw_decode(words, words.index("{"))
    if isinstance(document, dict):
        quoted = _of_object(document)
        if quoted.is_error:
            return structs.replace(quoted, status=facts.status)
    return Facts(shape=facts.shape, message=words, status=facts.status)


def _message(fields: dict[str, object]) -> str:
    for name in ("message", "Message", "detail", "msg"):
        value = fields.get(name)
        if isinstance(value, str):
            return value
        if value is not None:
            return json.dumps(value)
    return ""


def _kind(fields: dict[str, object]) -> str | None:
    """Return `type`, or what Google's and Kubernetes' errors have in its place."""
    return _text(fields.get("type")) or _text(fields.get("reason")) or _text(fields.get("status"))


def _code(fields: dict[str, object]) -> tuple[str | None, int | None]:
    """
    Return the code as text and the HTTP status it names, if it names one.

    TGI puts `http_status_code: 422` into every error inside a stream, whatever happened, so that number is no hint.
    """
    for name in ("code", "ErrorCode", "http_status_code", "statusCode", "status"):
        value = fields.get(name)
        text = _text(value)
        if text is None or (name == "status" and not isinstance(value, int)):
            continue
        hint = int(text) if re.fullmatch(r"[45]\d\d", text, re.ASCII) else None
        return text, (None if (name, hint) == ("http_status_code", 422) else hint)
    return None, None


def _text(value: object) -> str | None:
    """Return a field as bounded text; empty, absent, and structured values count as absent."""
    if value is None or value == "" or isinstance(value, (dict, list, bool)):
        return None
    return bounded(value if isinstance(value, str) else json.dumps(value), _MAX_FIELD_BYTES)


def _of_sagemaker(document: dict[str, object], data: bytes, wrapped: tuple[str, ...]) -> Facts:
    """
    Unwrap SageMaker's `ModelError`: the container's own status and body are what the table is about.

    Source: https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_runtime_InvokeEndpoint.html (ModelError).
    """
    original = document.get("OriginalStatusCode")
    status = original if isinstance(original, int) and 400 <= original <= 599 else None  # noqa: PLR2004 error statuses
    inner_text = document.get("OriginalMessage")
    inner_bytes = inner_text.encode("utf-8", "replace") if isinstance(inner_text, str) else b""
    inner = _of_document(inner_bytes, ())  # ends: each level of quoting inside quoting doubles the backslashes
    return structs.replace(
        inner,
        wrapped=(*wrapped, "sagemaker", *inner.wrapped),
        message=inner.message or bounded(_message(document), MAX_MESSAGE_BYTES),
        payload=inner.payload or data,
        status=status,
    )


def _aws_error_name(headers: Mapping[str, str]) -> str | None:
    """Return the bare name out of `x-amzn-errortype: com.amazon#Name:http://...`."""
    value = headers.get("x-amzn-errortype", "")
    return bounded(value.partition(":")[0].rpartition("#")[2].strip(), _MAX_FIELD_BYTES) or None


def looks_like_events(headers: Mapping[str, str], body: bytes) -> bool:
    """
    Say whether a body is an event stream, by its content type or by its first bytes.

    Some proxies answer a request for a stream with an error status *and* a body in the form of an event stream.

    Args:
        headers: Names in lower case.
        body: The body; a byte order mark and leading blank lines are tolerated.
    """
    if headers.get("content-type", "").lower().startswith("text/event-stream"):
        return True
    return _begins_with(body, _STARTS)


def _begins_with(body: bytes, words: tuple[bytes, ...]) -> bool:
    return body.lstrip(b"\xef\xbb\xbf\r\n ").startswith(words)


def first_data(body: bytes) -> bytes | None:
    """
    Return the data of the first event that is not `[DONE]`, or `None` when there is none.

    Several `data:` lines of one event are joined with a line feed; an event that the text ends in is taken too,
    since servers forget the last blank line.
    """
    lines: list[bytes] = []
    for line in [*_LINE_END.split(body.removeprefix(b"\xef\xbb\xbf")), b""]:
        if line.startswith(b"data:"):
            lines.append(line[5:].removeprefix(b" "))
        elif not line and lines:
            data = b"\n".join(lines)
            if data.strip() != b"[DONE]":
                return data
            lines = []
    return None


def bounded(text: str, limit_bytes: int) -> str:
    """
    Return the beginning of a text, at most `limit_bytes` long as UTF-8, free of lone surrogates.

    A character is never cut; a lone surrogate, which UTF-8 cannot carry, becomes `?`.
    """
    data = text[:limit_bytes].encode("utf-8", "replace")
    return data[:limit_bytes].decode("utf-8", "ignore")


def bounded_bytes(data: bytes, limit_bytes: int) -> str:
    """Return the beginning of what may or may not be UTF-8 as text; what is not becomes U+FFFD."""
    return bounded(data[:limit_bytes].decode("utf-8", "replace"), limit_bytes)
