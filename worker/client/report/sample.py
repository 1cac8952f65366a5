"""
The values that a report takes from one output line.  Pure, no I/O.

Both shapes of `outputs` are read: message lines and OpenAI batch lines.  The worker's measurements (`stats`) take
precedence, so that a report and the live metrics agree; without them the body is read, and times are unknown.  An
unknown value is `None`, never 0.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

import msgspec

from worker.client.io.lines import parse_line_id
from worker.client.io.outputs import Answer, error_message
from worker.client.summary import ErrorExample, one_line
from worker.wire.http import is_success
from worker.wire.usage import NO_USAGE, Usage, read_usage

_ABSENT = msgspec.Raw(b"")
_MAX_NAME_CHARS = 128
"""Longer names of models and errors are cut; they come from requesters and servers."""

_Duration = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
_Count = Annotated[int, msgspec.Meta(ge=0)]
_Status = Annotated[int, msgspec.Meta(ge=100, le=999)]


class NoAnswerError(Exception):
    """The line is not an answer; the message is the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One answer."""

    is_error: bool
    status_code: int | None
    """`None` for batch lines without a server's answer: their shape has no place for it."""
    error_class: str | None
    """`None` for a good answer."""
    model: str | None
    """The requested model, else the model in the answer."""
    is_truncated: bool
    """An error that carries part of an answer."""
    tenant: str | None
    """`None` where the worker tells no tenants apart."""
    tokens: Usage
    measured: "Measured | None"
    """`None` when the line has no `stats`."""
    finish_reasons: tuple[str, ...] = ()
    """Of a good answer: why the generation of each choice ended, as the server says it."""


class Measured(msgspec.Struct, frozen=True):
    """The `stats` of an answer; durations in seconds."""

    ttft_s: _Duration | None = None
    ttlt_s: _Duration | None = None
    tpot_s: _Duration | None = None
    queue_s: _Duration | None = None
    held_s: _Duration | None = None
    attempts: _Count | None = None
    delivery_attempt: _Count | None = None
    streamed: bool = False
    salvaged_tokens: _Count | None = None
    request_time: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    """When the last attempt started."""
    model: str | None = None
    tenant: str | None = None
    cost: Annotated[float, msgspec.Meta(ge=0, le=1e12)] | None = None
    """In the currency of the worker's prices."""
    error_class: str | None = None
    variant: str | None = None
    """Which variant of the model answered."""
    tokens: Usage = NO_USAGE

    @property
    def started(self) -> float | None:
        """Unix seconds at which the last attempt started."""
        return None if self.request_time is None else self.request_time.timestamp()

    @property
    def ended(self) -> float | None:
        """Unix seconds at which the last attempt ended."""
        started = self.started
        return None if started is None or self.ttlt_s is None else started + self.ttlt_s


class _Response(msgspec.Struct):
    status_code: _Status
    body: msgspec.Raw = _ABSENT


class _Failure(msgspec.Struct):
    code: Any = None
    message: Any = None


class _Line(msgspec.Struct):
    status_code: _Status | None = None
    body: msgspec.Raw = _ABSENT
    stats: Measured | None = None
    custom_id: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    response: _Response | None = None
    error: _Failure | None = None
    id: Any = None
    url: Any = None


class _Error(msgspec.Struct):
    code: Any = None
    type: Any = None


class _Body(msgspec.Struct):
    model: Any = None
    error: Any = None
    code: Any = None
    type: Any = None
    truncated: Any = None


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _Incomplete(msgspec.Struct):
    reason: str | None = None


class _Finished(msgspec.Struct):
    """What chat completions and completions (`choices`) and the Responses API (`status`) say about the end."""

    choices: list[_Choice] | None = None
    status: str | None = None
    incomplete_details: _Incomplete | None = None


_decode_line = msgspec.json.Decoder(_Line).decode
_decode_body = msgspec.json.Decoder(_Body).decode
_decode_finished = msgspec.json.Decoder(_Finished).decode


def read_sample(line: bytes) -> Sample:
    """
    Return the values of an output line.

    Raises:
        NoAnswerError: The line is torn, from another program, or not JSON.
    """
    try:
        parsed = _decode_line(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NoAnswerError(str(error)) from None
    if parsed.custom_id is not msgspec.UNSET:
        return _batch_sample(parsed)
    if parsed.status_code is None:
        raise NoAnswerError("has neither `status_code` nor `custom_id`")
    is_error = not is_success(parsed.status_code)
    return _sample(parsed, parsed.status_code, bytes(parsed.body), is_error=is_error)


def read_example(line: bytes, place: int) -> ErrorExample:
    """
    Return an output line that is an error as an example of its class.

    Args:
        line: One that `read_sample` has read.
        place: Of the line in the output, from 1; taken for the number of the input line where its id has none.
    """
    parsed = _decode_line(line)
    key = parse_line_id(parsed.id) if isinstance(parsed.id, str) else None
    if parsed.error is not None and isinstance(parsed.error.message, str):
        message = parsed.error.message
    else:
        response = parsed.response or parsed
        status, body = response.status_code, bytes(response.body)
        message = error_message(Answer(status_code=status or 0, body=body))
    return ErrorExample(
        number=place if key is None else key[0],
        message=one_line(message),
        url=one_line(parsed.url) if isinstance(parsed.url, str) else None,
    )


def _batch_sample(line: _Line) -> Sample:
    response = line.response
    if response is None and line.error is None:
        raise NoAnswerError("has neither `response` nor `error`")
    status = None if response is None else response.status_code
    is_error = line.error is not None or (status is not None and not is_success(status))
    code = line.error.code if line.error is not None else None
    return _sample(line, status, b"" if response is None else bytes(response.body), is_error=is_error, code=code)


def _sample(line: _Line, status: int | None, body: bytes, *, is_error: bool, code: Any = None) -> Sample:
    stats = line.stats
    parsed = _read_body(body) if is_error or stats is None or stats.model is None else _Body()
    usage = stats.tokens if stats is not None else None if is_error else read_usage(body)
    return Sample(
        is_error=is_error,
        status_code=status,
        error_class=_error_class(stats, status, parsed, code) if is_error else None,
        model=_name(stats.model if stats is not None else None) or _name(parsed.model),
        tenant=_name(stats.tenant) if stats is not None else None,
        is_truncated=is_error and parsed.truncated is True,
        tokens=usage or NO_USAGE,
        measured=stats,
        finish_reasons=() if is_error else tuple(_finish_reasons(body)),
    )


def _finish_reasons(body: bytes) -> Iterator[str]:
    """Yield why each choice of a good answer ended; nothing where the API has no such thing, or another shape."""
    try:
        found = _decode_finished(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return
    for choice in found.choices or ():
        if (reason := _name(choice.finish_reason)) is not None:
            yield reason
    if found.choices is None and (status := _name(found.status)) is not None:
        details = found.incomplete_details
        yield _name(details.reason if details is not None else None) or status


def _read_body(body: bytes) -> _Body:
    try:
        return _decode_body(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _Body()


def _error_class(stats: Measured | None, status: int | None, body: _Body, code: Any) -> str:
    """Return the worker's class, which is also the code of its own errors; else the server's code or type."""
    known = stats.error_class if stats is not None else None
    inner = body.error if isinstance(body.error, dict) else {}
    candidates = (known, code, inner.get("code"), inner.get("type"), body.code, body.type)
    found = next((name for name in map(_name, candidates) if name), None)
    return found or (f"http_{status}" if status is not None else "unclassified")


def _name(value: Any) -> str | None:
    """Return a name without control characters, which a terminal would obey."""
    if not isinstance(value, str) or not value:
        return None
    return "".join(char if char.isprintable() else "\ufffd" for char in value[:_MAX_NAME_CHARS])
