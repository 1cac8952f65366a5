"""
What stands in the lines of a batch: input lines become messages, answers become results, results output lines.  Pure.

Source: sections 1.6, 1.8 and 1.11 of the contract (docs/decisions/0023).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, NamedTuple

import msgspec

from worker.batches.ids import BATCH, is_id, line_id
from worker.batches.states import Status
from worker.batches.store import Batch, Outcome
from worker.client.io.outputs import Answer, decode_answer, error_of, has_response
from worker.policy.model import ErrorClass
from worker.wire.message import LINE_ID, RUN_ID, encode_request
from worker.wire.usage import NO_USAGE, read_usage

TENANT = "tenant"
"""Attribute of a line's message: whose it is, for `request.tenant_attribute` of the workers."""
IDEMPOTENCY_KEY = "idempotency_key"
"""Key of a line's metadata, the same whenever the line is published: for `dedupe.metadata_key` of the workers."""
ENDED = {Status.CANCELLED: "batch_cancelled", Status.EXPIRED: "batch_expired"}
"""`error.code` of a line that a batch ended before."""
_ENDED_MESSAGES = {
    Status.CANCELLED: "This line has no result: the batch was cancelled first.",
    Status.EXPIRED: "This line has no result: the batch expired first.",
}
REPLY_IN_STORAGE = "reply_in_storage"
"""`error.code` of a line whose answer stands in object storage, from which it was not fetched."""
DEAD_LETTERED = "dead_lettered"
"""`error.code` of a line whose request Pub/Sub moved to the dead-letter topic."""
DELIVERIES = "CloudPubSubDeadLetterSourceDeliveryCount"
"""Attribute that Pub/Sub adds to such a message
(https://cloud.google.com/pubsub/docs/handling-failures#dead_letter_topic)."""
EXPIRED = ENDED[Status.EXPIRED]
_MAX_MESSAGE_CHARS = 500
_ERROR_STATUSES = range(300, 600)
_ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class InputLine(msgspec.Struct):
    """The parts of a validated input line that are used again."""

    custom_id: msgspec.Raw
    url: str
    body: msgspec.Raw


_BREAKS = bytes.maketrans(b"\r\n", b"  ")
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_text = msgspec.json.Decoder(str).decode
_decode_line = msgspec.json.Decoder(InputLine).decode
_encode = msgspec.json.encode


def decode_line(data: bytes) -> InputLine:
    """Return a line that was validated; `custom_id` and `body` as they stand in it."""
    return _decode_line(data)


class Message(NamedTuple):
    """A request message."""

    data: bytes
    attributes: dict[str, str]


def request_of(batch: Batch, record: int, line: int, data: bytes) -> Message:
    """
    Return the message of a record.

    Args:
        batch: Whose deadline it has.
        record: Its number, by which its answer is known.
        line: Its line in the file, for those who look at the message.
        data: The line, validated.
    """
    parts = _decode_line(data)
    metadata = _encode({"batch_id": batch.id, "line": line, IDEMPOTENCY_KEY: line_id(batch.id, record)})
    body = encode_request(path=parts.url, body=bytes(parts.body), metadata=metadata, deadline=batch.expires_at)
    return Message(body, {RUN_ID: batch.id, LINE_ID: str(record), TENANT: batch.tenant})


def _place_of(attributes: Mapping[str, str]) -> tuple[str, int] | None:
    """Return batch and record of a line's message; `None`: it is no line's."""
    batch_id, record = attributes.get(RUN_ID, ""), attributes.get(LINE_ID, "")
    if not is_id(batch_id, BATCH) or not record.isascii() or not record.isdigit() or len(record) > 9:  # noqa: PLR2004 - a 32-bit integer
        return None
    return batch_id, int(record)


class _Origin(msgspec.Struct):
    line: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]


class _Dead(msgspec.Struct):
    metadata: _Origin


_decode_origin = msgspec.json.Decoder(_Origin).decode
_decode_dead = msgspec.json.Decoder(_Dead).decode


def _line_in(metadata: bytes) -> int | None:
    """Return the line that `request_of` put into a message's metadata; `None`: it is not there any more."""
    try:
        return _decode_origin(metadata).line
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def dead_letter_of(data: bytes, attributes: Mapping[str, str]) -> Outcome | None:
    """
    Return the result of a line whose request Pub/Sub has given up, from the message on the dead-letter topic.

    Args:
        data: Of the message: the request itself.
        attributes: Of the message: the request's, and Pub/Sub's own.

    Returns:
        `None`: it is not the request of a line of a batch.
    """
    if (place := _place_of(attributes)) is None:
        return None
    try:
        line = _decode_dead(data).metadata.line
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        line = None
    times = attributes.get(DELIVERIES, "")
    often = f"delivered {times} times" if times.isascii() and times.isdigit() else "delivered as often as it may be"
    return Outcome(
        batch_id=place[0],
        record=place[1],
        line=line,
        is_ok=False,
        code=DEAD_LETTERED,
        message=f"The request was {often} and no worker answered it.",
    )


def stored_at(data: bytes, attributes: Mapping[str, str]) -> str | None:
    """Return where the body of an answer stands that no message carries; `None`: it is in the message."""
    uri = decode_answer(data, attributes).body_uri
    return None if uri is None else _text_in(uri)


def _text_in(raw: bytes) -> str:
    """Return a JSON string, or whatever else stands there as text."""
    try:
        return _decode_text(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return raw.decode("utf-8", "replace")


def outcome_of(data: bytes, attributes: Mapping[str, str], stored: bytes | None = None) -> Outcome | None:
    """
    Return the result that a message of the response topic carries.

    Args:
        data: Of the message.
        attributes: Of the message.
        stored: What was read at `stored_at`; without it such an answer becomes an error that says where it is.

    Returns:
        `None`: it is not the answer to a line of a batch.
    """
    if (found := _place_of(attributes)) is None:
        return None
    answer = decode_answer(data, attributes)
    if answer.body_uri is not None and stored is not None:
        answer = replace(answer, body=_one_line(stored), body_uri=None)
    place: dict[str, Any] = {"batch_id": found[0], "record": found[1], "request_id": answer.request_id}
    place["line"] = _line_in(answer.metadata)
    if answer.error_class == ErrorClass.DEADLINE_EXCEEDED:  # which is the batch's
        return Outcome(**place, is_ok=False, code=EXPIRED, message=_ENDED_MESSAGES[Status.EXPIRED])
    if not answer.is_error:
        return _good(place, answer)
    told = error_of(answer)
    if not has_response(answer) or answer.status_code not in _ERROR_STATUSES:
        return Outcome(**place, is_ok=False, code=told["code"], message=told["message"])
    return Outcome(
        **place,
        is_ok=False,
        status_code=answer.status_code,
        code=told["code"],
        message=told["message"],
        body=_error_body(answer, told),
    )


def _one_line(body: bytes) -> bytes:
    """Return a JSON object as it can stand in a line, or nothing where it is none."""
    try:
        body.decode("utf-8")  # msgspec does not validate raw values
        _decode_object(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return b""
    return body.strip().translate(_BREAKS)  # JSON has line breaks between tokens only


def _good(place: dict[str, Any], answer: Answer) -> Outcome:
    if answer.body_uri is not None:
        text = f"The answer was too large for a message and stands in {_text_in(answer.body_uri)}."
        return Outcome(**place, is_ok=False, code=REPLY_IN_STORAGE, message=text)
    if answer.body is None or not answer.body.startswith(b"{"):
        return Outcome(**place, is_ok=False, code="malformed", message="The answer's body is not a JSON object.")
    usage = read_usage(answer.body) or NO_USAGE
    return Outcome(
        **place,
        is_ok=True,
        status_code=answer.status_code,
        body=answer.body,
        input_tokens=usage.input,
        cached_tokens=usage.input_cached,
        output_tokens=usage.output,
        reasoning_tokens=usage.output_reasoning,
    )


class _ErrorBody(msgspec.Struct):
    error: msgspec.Raw


_decode_error_body = msgspec.json.Decoder(_ErrorBody).decode


def _error_body(answer: Answer, told: Mapping[str, str]) -> bytes:
    """Return an error's body; one that has no `error` is put into one."""
    body = answer.body or b""
    try:
        if bytes(_decode_error_body(body).error) not in (b"null", b""):
            return body
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass  # it is another object, or none: wrapped below
    kind = _ERROR_TYPES.get(answer.status_code, "invalid_request_error" if answer.status_code < 500 else "server_error")  # noqa: PLR2004
    error = {"message": told["message"][:_MAX_MESSAGE_CHARS], "type": kind, "param": None, "code": told["code"]}
    return _encode({"error": error})


def is_unrun(outcome: Outcome, ended: Status | None) -> bool:
    """
    Whether a result says that its batch ended first, in the words of the workers.

    A line is withdrawn by the cancellation of its batch; in any other batch somebody cancelled its request alone.
    """
    return not outcome.is_ok and (
        outcome.code == EXPIRED or (outcome.code == ErrorClass.CANCELLED and ended is Status.CANCELLED)
    )


def result_line(outcome: Outcome, custom_id: bytes, ended: Status | None) -> bytes:
    """
    Return the line of a result, with its newline.

    Args:
        outcome: The result.
        custom_id: Raw JSON, as in the input.
        ended: How the batch ended, if that left lines without a result.
    """
    if is_unrun(outcome, ended):
        return ended_line(outcome.batch_id, outcome.record, custom_id, ended or Status.EXPIRED)
    response = error = b"null"
    if outcome.body is not None:
        response = b'{"status_code":%d,"request_id":%s,"body":%s}' % (
            outcome.status_code or 0,
            _encode(outcome.request_id or line_id(outcome.batch_id, outcome.record)),
            outcome.body,
        )
    if not outcome.is_ok:
        error = _encode({"code": outcome.code, "message": outcome.message})
    return _line(outcome.batch_id, outcome.record, custom_id, response, error)


def ended_line(batch_id: str, record: int, custom_id: bytes, ended: Status) -> bytes:
    """Return the line of a record without a result, with its newline."""
    error = _encode({"code": ENDED[ended], "message": _ENDED_MESSAGES[ended]})
    return _line(batch_id, record, custom_id, b"null", error)


def _line(batch_id: str, record: int, custom_id: bytes, response: bytes, error: bytes) -> bytes:
    return b'{"id":"%s","custom_id":%s,"response":%s,"error":%s}\n' % (
        line_id(batch_id, record).encode(),
        custom_id,
        response,
        error,
    )


def ended_message(ended: Status) -> str:
    """Return `error.message` of a record without a result."""
    return _ENDED_MESSAGES[ended]
