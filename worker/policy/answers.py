"""
Judges the body of a 2xx answer: is it an answer at all?

The hot path.  The body is walked once by msgspec into structs that hold the two or three fields the verdict needs;
everything else is skipped without building Python objects (about 1 us for 1 KB).

Kept in step with: `backends/accumulate.py`, whose results pass here like any unary body.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import msgspec

from worker.wire.body import RequestBody, decode_object
from worker.wire.endpoints import CHAT, EMBEDDINGS, RESPONSES, endpoint_of

_ABORTED = frozenset({"abort", "error"})
"""vLLM and SGLang end a request this way when they drain or when the engine drops it; OpenRouter says `error`."""


MAX_OBJECTS = 400_000
"""Of one answer, walked in some 60 ms in which nothing else is done.  An answer of ten megabytes with log probabilities
has less than half of that."""


class Flaw(StrEnum):
    """Why a 2xx body is no answer."""

    MALFORMED = "malformed"
    """Empty, not JSON, cut short, not an object, or of more objects than can be looked at."""
    EMPTY = "empty"
    """An answer without anything in it."""
    ABORTED = "aborted"
    """The backend gave up on the request in the middle."""
    ERROR = "error"
    """The body is an error under a success status."""


class _Item(msgspec.Struct):
    """Anything that must be an object."""


class _Choice(msgspec.Struct):
    finish_reason: Any = None


class _Completion(msgspec.Struct):
    choices: list[_Choice] | None = None
    error: Any = None


class _Embeddings(msgspec.Struct):
    data: list[_Item] | None = None
    error: Any = None


class _Response(msgspec.Struct):
    status: Any = None
    output: list[_Item] | None = None
    error: Any = None


class _Other(msgspec.Struct):
    error: Any = None


_Document = _Completion | _Embeddings | _Response | _Other
_DECODERS: Mapping[str | None, msgspec.json.Decoder[Any]] = {
    CHAT.output: msgspec.json.Decoder(_Completion),
    EMBEDDINGS.output: msgspec.json.Decoder(_Embeddings),
    RESPONSES.output: msgspec.json.Decoder(_Response),
}
"""By the key of the results; chats and completions have the same skeleton."""
_OTHER: msgspec.json.Decoder[Any] = msgspec.json.Decoder(_Other)


def find_flaw(path: str, body: bytes, *, input_is_empty: bool = False) -> Flaw | None:
    """
    Return why a 2xx body is no answer, or `None` for a good one.

    Args:
        path: Path of the request, with any query; its API says what an answer must hold.
        body: The complete body.
        input_is_empty: The request asked about nothing, so that `data: []` is right.

    Source: RFC 8259 for JSON (NaN and Infinity are not), https://platform.openai.com/docs/api-reference for the shapes.
    """
    if len(body) > MAX_OBJECTS and body.count(b"{") > MAX_OBJECTS:
        return Flaw.MALFORMED
    document = decode_object(_DECODERS.get(endpoint_of(path).output, _OTHER), body)
    match document:
        case None:
            flaw: Flaw | None = Flaw.MALFORMED
        case _Completion(choices=choices) if choices:
            flaw = Flaw.ABORTED if any(_is_aborted(choice) for choice in choices) else None
        case _Response():
            flaw = _flaw_of_response(document)
        case _ if document.error is not None:
            flaw = Flaw.ERROR
        case _Embeddings(data=data):
            flaw = None if data or (data is not None and input_is_empty) else Flaw.EMPTY
        case _Completion():
            flaw = Flaw.EMPTY
        case _:
            flaw = None
    return flaw


def asks_about_nothing(path: str, body: RequestBody) -> bool:
    """
    Say whether a request asks for the embeddings of no text at all, `"input": []`.

    OpenAI refuses that; servers that do not answer it with a success and an empty `data`.

    Args:
        path: Of the request, with any query.
        body: Of the request.
    """
    endpoint = endpoint_of(path)
    if endpoint is not EMBEDDINGS or endpoint.input is None:
        return False
    asked = body.raw(endpoint.input)
    return asked.startswith(b"[") and not asked[1:-1].strip()


def _is_aborted(choice: _Choice) -> bool:
    return isinstance(choice.finish_reason, str) and choice.finish_reason in _ABORTED


def _flaw_of_response(document: _Response) -> Flaw | None:
    """
    Judge a Responses object by its own status.

    `incomplete` is an answer (a length limit or a filter cut it), `queued` and `in_progress` are what `background`
    asks for.  Without a status it is judged by its output.
    """
    if document.status == "failed" or (document.error is not None and not document.output):
        return Flaw.ERROR
    if document.status == "cancelled":
        return Flaw.ABORTED
    if document.output is None:
        return Flaw.EMPTY
    return Flaw.EMPTY if not document.output and document.status in {None, "completed"} else None
