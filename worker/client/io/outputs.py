"""
Output lines: one answer, one line.  Pure, no I/O.

An answer is the data and attributes of a message on the response topic, or a `Refusal` of `lines`.  Its line is

* for a message-shaped line `{"id": "line-1-0a1b2c3d", "status_code": 200, "metadata": {...}, "body": {...}}`, with
  `body_uri` and `stats` where the answer has them, and for an error of a backend the `url` that was asked;
* for a batch line OpenAI's `{"id": "batch_req_line-1-0a1b2c3d", "custom_id": "...", "response": {"status_code",
  "request_id", "body"} | null, "error": null | {"code", "message"}}`, with `url` and `stats` beside them as above.

Metadata, body and stats are copied byte for byte, except that a line break between JSON tokens (of a backend that
indents its JSON) becomes a space.  JSON has no raw line breaks inside strings, so nothing else
changes.

`response` of a batch line is null when no server answered: refused messages, failed connections, timeouts, a 200 that
was not JSON.  The text that a broken stream had generated is kept: then `response` holds it in addition to the error.

Source: https://platform.openai.com/docs/api-reference/batch/request-output.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from worker.client.io.lines import Refusal, Shape
from worker.wire.http import is_success
from worker.wire.usage import NO_USAGE, read_usage

_ABSENT = msgspec.Raw(b"")
_MAX_MESSAGE_CHARS = 2_000
"""Bound of `error.message` in a batch line; the whole text stands in the body."""
_BREAKS = bytes.maketrans(b"\r\n", b"  ")

_CODES = {
    400: "invalid_request",
    401: "authentication_error",
    403: "permission_denied",
    404: "not_found",
    408: "request_timeout",
    409: "conflict",
    413: "request_too_large",
    422: "invalid_request",
    429: "rate_limit_exceeded",
    503: "overloaded",
    504: "request_timeout",
}
"""`error.code` for an answer that has none; the words are OpenAI's error codes and our own classes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer, with the fields that its line and the summary need."""

    status_code: int
    metadata: bytes = b"{}"
    body: bytes | None
    """Raw JSON; `None` when `body_uri` names it instead."""
    body_uri: bytes | None = None
    """Raw JSON string."""
    stats: bytes | None = None
    error_class: str | None = None
    """`None` for a good answer."""
    request_id: str | None = None
    """The backend's id of the request, else the message id of the request."""
    input_tokens: int | None = None
    output_tokens: int | None = None
    backend: str | None = None
    """Name of the route that was asked last."""
    attempt_s: float | None = None
    """How long the backend took for the last attempt, seconds."""
    url: str | None = None
    """Where the request was posted; only of errors."""
    is_local: bool = False
    """Made here: no worker has received the line."""

    @property
    def is_error(self) -> bool:
        """Whether the status is no success."""
        return not is_success(self.status_code)


class _Response(msgspec.Struct):
    status_code: int
    metadata: msgspec.Raw = _ABSENT
    body: msgspec.Raw = _ABSENT
    body_uri: msgspec.Raw = _ABSENT
    stats: msgspec.Raw = _ABSENT


class _Stats(msgspec.Struct):
    ttlt_s: float | None = None


_decode_response = msgspec.json.Decoder(_Response).decode
_decode_stats = msgspec.json.Decoder(_Stats).decode


def decode_answer(data: bytes, attributes: Mapping[str, str]) -> Answer:
    """
    Return the answer in a message of the response topic.

    A message that is not an answer (from another program, with our attributes) becomes a 502 `malformed_answer`: the
    line still gets a well-formed output.
    """
    try:
        data.decode("utf-8")  # msgspec does not validate raw values
        response = _decode_response(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        text = f"The message on the response topic is not an answer: {error}"
        return local_answer(Refusal(status_code=502, code="malformed_answer", message=text))
    body = _one_line(response.body)
    usage = read_usage(body or b"") or NO_USAGE
    stats = _one_line(response.stats)
    return Answer(
        status_code=response.status_code,
        metadata=_one_line(response.metadata) or b"{}",
        body=body,
        body_uri=_one_line(response.body_uri),
        stats=stats,
        error_class=_error_class(response.status_code, attributes),
        request_id=attributes.get("backend_request_id") or attributes.get("request_message_id"),
        input_tokens=usage.input,
        output_tokens=usage.output,
        backend=attributes.get("backend"),
        attempt_s=_attempt_s(stats),
    )


def local_answer(refusal: Refusal) -> Answer:
    """Return the answer to a line that was refused here; the body is an error in OpenAI's shape."""
    kind = "invalid_request_error" if refusal.status_code < 500 else "server_error"  # noqa: PLR2004 - the requester's fault
    error = {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}
    return Answer(
        status_code=refusal.status_code,
        metadata=refusal.metadata,
        body=msgspec.json.encode({"error": error}),
        error_class=refusal.code,
        is_local=True,
    )


def error_message(answer: Answer) -> str:
    """Return the words of an error answer, as they stand in `error.message` of a batch line."""
    return error_of(answer)["message"]


def error_of(answer: Answer) -> dict[str, str]:
    """Return `{"code", "message"}` of an error answer, neither empty, as they stand in a batch line."""
    return _explain(answer, _object(answer.body))


def has_response(answer: Answer) -> bool:
    """Whether an error answer is what a server answered, rather than what the worker says of its own accord."""
    return not answer.is_local and _is_servers_answer(_object(answer.body))


def output_line(line_id: str, shape: Shape, custom_id: bytes, answer: Answer) -> bytes:
    """Return the line for an answer in the shape of its request, with its newline."""
    if shape is Shape.BATCH:
        return batch_line(line_id, custom_id, answer)
    return message_line(line_id, answer)


def message_line(line_id: str, answer: Answer) -> bytes:
    """Return the line of a message-shaped request, with its newline."""
    head = b'{"id":"%s","status_code":%d,"metadata":%s' % (line_id.encode(), answer.status_code, answer.metadata)
    return head + _tail(answer) + _extras(answer) + b"}\n"


def batch_line(line_id: str, custom_id: bytes, answer: Answer) -> bytes:
    """
    Return the line of a batch request, with its newline.

    Args:
        line_id: `id` is `batch_req_` followed by this.
        custom_id: Raw JSON, as in the input line.
        answer: Body objects of any shape; `error` is filled for every status but 2xx.
    """
    response = error = b"null"
    is_answered = True
    if answer.is_error:
        body = _object(answer.body)
        is_answered = not answer.is_local and _is_servers_answer(body)
        error = msgspec.json.encode(_explain(answer, body))
    if is_answered:
        request_id = msgspec.json.encode(answer.request_id)
        response = b'{"status_code":%d,"request_id":%s%s}' % (answer.status_code, request_id, _tail(answer))
    return b'{"id":"batch_req_%s","custom_id":%s,"response":%s,"error":%s%s}\n' % (
        line_id.encode(),
        custom_id,
        response,
        error,
        _extras(answer),
    )


def _tail(answer: Answer) -> bytes:
    tail = b"" if answer.body is None and answer.body_uri else b',"body":%s' % (answer.body or b"null")
    if answer.body_uri:
        tail += b',"body_uri":%s' % answer.body_uri
    return tail


def _extras(answer: Answer) -> bytes:
    stats = b"" if answer.stats is None else b',"stats":%s' % answer.stats
    return stats if answer.url is None else b',"url":%s%s' % (msgspec.json.encode(answer.url), stats)


def _attempt_s(stats: bytes | None) -> float | None:
    try:
        return None if stats is None else _decode_stats(stats).ttlt_s
    except msgspec.DecodeError:
        return None


def _one_line(raw: msgspec.Raw) -> bytes | None:
    data = bytes(raw)
    if b"\n" in data or b"\r" in data:
        data = data.translate(_BREAKS)
    return data or None


def _error_class(status_code: int, attributes: Mapping[str, str]) -> str | None:
    if is_success(status_code):
        return None
    return attributes.get("error_class") or "unclassified"


def _object(body: bytes | None) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(body or b"{}")
    except (msgspec.DecodeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _is_servers_answer(body: dict[str, Any]) -> bool:
    """
    Whether an error body contains a server's error or a part of its answer.

    The worker's own envelope has `backend` and `attempts` beside OpenAI's keys: `backend` is null when no response
    came, and holds a 2xx when a response came that was not an answer (docs/contract.md, the error envelope).
    """
    error = body.get("error")
    if "partial" in body or not isinstance(error, dict) or not error.keys() >= {"backend", "attempts"}:
        return True
    backend = error["backend"]
    status = backend.get("status") if isinstance(backend, dict) else None
    return isinstance(status, int) and not is_success(status)


def _explain(answer: Answer, body: dict[str, Any]) -> dict[str, str]:
    """Return code and message, neither empty, for an error of any shape."""
    error = body.get("error")
    inner = error if isinstance(error, dict) else {**body, "message": error if isinstance(error, str) else None}
    code = inner.get("code")
    if not isinstance(code, str) or not code:
        known = answer.error_class if answer.error_class != "unclassified" else None
        code = known or _CODES.get(answer.status_code, f"http_{answer.status_code}")
    texts = (inner.get("message"), body.get("message"), body.get("detail"))
    message = next((text for text in texts if isinstance(text, str) and text.strip()), None)
    return {"code": code, "message": (message or f"The answer has status {answer.status_code}.")[:_MAX_MESSAGE_CHARS]}
