"""
Builds the body of an answer that is an error: the backend's own JSON where that is allowed, our envelope elsewhere.

Whatever the backend sent (HTML, nothing, half a JSON document, invalid UTF-8), what comes out is one JSON object in
UTF-8 of bounded size.  The envelope is OpenAI's error object with three more fields, so that clients which know that
one read ours:

    {"error": {"message", "type", "param", "code", "backend": {"status", "body", "text", "request_id"} | null,
               "attempts", "retryable"},
     "partial": {"choices": [...]}, "truncated": true}

`partial` and `truncated` are there only when something of an answer was accumulated; a partial answer is never a 200.
"""

from typing import Any

import msgspec

from worker.policy.model import Decision, ErrorClass, ErrorEvent
from worker.policy.normalise import (
    MAX_BODY_BYTES,
    MAX_MESSAGE_BYTES,
    Facts,
    bounded,
    bounded_bytes,
    normalise,
)
from worker.policy.table import REFUSED_BEFORE, ROWS
from worker.wire.body import RequestBody, is_json_object
from worker.wire.http import request_id_of

MAX_ENVELOPE_BYTES = MAX_BODY_BYTES + 32 * 1024
"""No error answer without a partial is longer: a backend's body of at most `MAX_BODY_BYTES` and some bounded texts,
each of which JSON may make six times as long (`\\u0000`)."""

_OURS = frozenset(
    {
        ErrorClass.BAD_MESSAGE,
        ErrorClass.CANCELLED,
        ErrorClass.DEADLINE_EXCEEDED,
        ErrorClass.IDEMPOTENCY_CONFLICT,
        ErrorClass.INTERNAL_ERROR,
        ErrorClass.PAYLOAD_MISMATCH,
        ErrorClass.PAYLOAD_NOT_FOUND,
        ErrorClass.PAYLOAD_REFUSED,
        ErrorClass.PAYLOAD_TOO_LARGE,
        ErrorClass.PAYLOAD_UNAVAILABLE,
        ErrorClass.REPLY_TOO_LARGE,
        ErrorClass.REPLY_REFUSED,
    }
)
"""Classes of the worker's own making: `worker_error`; everything else is a `backend_error`."""


def error_reply(
    decision: Decision,
    event: ErrorEvent,
    *,
    attempts: int,
    partial: bytes | None = None,
) -> tuple[int, bytes]:
    """
    Return the status code and the body of an error answer.

    Args:
        decision: What was decided; `error_class` is not `None`.
        event: What happened, with the backend's body.
        attempts: Attempts in all, for the requester's information.
        partial: What was accumulated of the answer, a JSON object; `None` or empty when nothing was.

    Returns:
        The status and one JSON object in UTF-8, at most `MAX_ENVELOPE_BYTES` long beside the partial.
    """
    facts = normalise(event.status, event.headers, event.body)
    partial = partial_of(decision, event, partial)
    if not partial and _may_stand_verbatim(decision, event, facts):
        return decision.reply_status, facts.payload
    backend = None
    if decision.expose_backend and event.status is not None:
        backend = _backend(event, facts, is_partial=partial is event.body)
    return decision.reply_status, _envelope(
        decision.error_class or ErrorClass.INTERNAL_ERROR,
        message=decision.message,
        code=decision.reply_code,
        param=facts.param if decision.expose_backend else None,
        backend=backend,
        attempts=attempts,
        retryable=decision.retryable,
        partial=partial,
        is_ours=event.fault in REFUSED_BEFORE,
    )


def partial_of(decision: Decision, event: ErrorEvent, partial: bytes | None) -> bytes | None:
    """
    Return the partial answer that an error answer carries, `None` when it carries none.

    A whole answer of which its server says that it gave up in the middle is one too.

    Args:
        decision: What was decided.
        event: What happened, with the backend's body.
        partial: What was accumulated of a stream, a JSON object; `None` or empty when nothing was.
    """
    if partial and is_json_object(partial):
        return partial
    is_aborted = decision.error_class is ErrorClass.ABORTED and _is_embeddable(event.body)
    return event.body if is_aborted else None


def bad_message_body(message: str, *, param: str | None = None) -> bytes:
    """
    Return the body for a message that is no request; its status code is 400.

    Args:
        message: What is wrong, naming the key.
        param: The key at fault.
    """
    return _envelope(ErrorClass.BAD_MESSAGE, message=message, param=param)


def reply_too_large_body(size_bytes: int, limit_bytes: int, *, attempts: int = 1) -> bytes:
    """Return the body that takes the place of an answer that no message can carry; its status code is 502."""
    message = f"The answer has {size_bytes} bytes; a message may have {limit_bytes}."
    return _envelope(ErrorClass.REPLY_TOO_LARGE, message=message, attempts=attempts)


def reply_refused_body(*, attempts: int = 1) -> bytes:
    """Return the body that takes the place of an answer that the broker refuses; its status code is 502."""
    return _envelope(ErrorClass.REPLY_REFUSED, message=ROWS[ErrorClass.REPLY_REFUSED].says, attempts=attempts)


def idempotency_conflict_body(key: str) -> bytes:
    """Return the body for a key that was used before with another request; its status code is 409."""
    message = f"{ROWS[ErrorClass.IDEMPOTENCY_CONFLICT].says}  Key: {bounded(key, 256)}"
    return _envelope(ErrorClass.IDEMPOTENCY_CONFLICT, message=message)


def _may_stand_verbatim(decision: Decision, event: ErrorEvent, facts: Facts) -> bool:
    """
    Say whether the backend's own JSON is the answer.

    Only an error may: a success object under an error status would read as an answer without an `error` key.
    """
    is_error = facts.is_error or (400 <= (event.status or 0) <= 599 and not _is_like_an_answer(facts.payload))  # noqa: PLR2004
    return decision.verbatim and decision.reply_code is None and is_error and _is_embeddable(facts.payload)


def _is_like_an_answer(payload: bytes) -> bool:
    if not _is_embeddable(payload):
        return False
    body = RequestBody(payload)
    return any(body.raw(key) for key in ("choices", "output", "data"))


def _is_embeddable(data: bytes) -> bool:
    return 0 < len(data) <= MAX_BODY_BYTES and is_json_object(data)


def _backend(event: ErrorEvent, facts: Facts, *, is_partial: bool) -> dict[str, Any]:
    """Describe the backend's response; its body is there once: verbatim, as text, or as the partial."""
    is_whole = event.fault is None  # otherwise it is the beginning of something, whatever that looks like
    body = facts.payload if is_whole and not is_partial and _is_embeddable(facts.payload) else None
    request_id = request_id_of(event.headers)
    text = None if body is not None or is_partial or not event.body.strip() else event.body
    return {
        "status": event.status,
        "body": None if body is None else msgspec.Raw(body),
        "text": None if text is None else bounded_bytes(text, MAX_MESSAGE_BYTES),
        "request_id": None if request_id is None else bounded(request_id, 256),
    }


def _envelope(
    error_class: ErrorClass,
    *,
    message: str = "",
    code: str | None = None,
    param: str | None = None,
    backend: dict[str, Any] | None = None,
    attempts: int = 0,
    retryable: bool = False,
    partial: bytes | None = None,
    is_ours: bool = False,
) -> bytes:
    envelope: dict[str, Any] = {
        "error": {
            "message": bounded(message or ROWS[error_class].says, MAX_MESSAGE_BYTES),
            "type": "worker_error" if is_ours or error_class in _OURS else "backend_error",
            "param": None if param is None else bounded(param, 256),
            "code": code or error_class.value,
            "backend": backend,
            "attempts": attempts,
            "retryable": retryable,
        }
    }
    if partial:
        envelope |= {"partial": msgspec.Raw(partial), "truncated": True}
    return msgspec.json.encode(envelope)
