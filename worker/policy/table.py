"""
The table: which class an attempt's end belongs to, and what is done about that class.

Literals hold the rules: `ROWS` (class -> what to do) and the statuses and faults that speak for themselves here,
`SIGNALS` (words -> class) in `signals`.  Nothing here knows budgets (`budgets`), operators' rules (`rules`) or what
happens to a delivery in the end (`judge`).

`Disposition` by thought: what is final is answered; what is not the message's fault is held, since holding costs no
delivery attempt; what may be the message's fault is nacked, so that a prompt that kills a server runs out of attempts.
`docs/error-policy.md` shows the rows to operators, and a test compares the two.

Source: house decision; the servers' behaviour behind each row is cited in `signals` and in the golden samples.
"""

from collections.abc import Mapping
from dataclasses import replace

import msgspec

from worker.policy.answers import Flaw, find_flaw
from worker.policy.backoff import Backoff
from worker.policy.model import (
    BreakerAction,
    Decision,
    Disposition,
    ErrorClass,
    ErrorEvent,
    Fault,
    Phase,
    Scope,
)
from worker.policy.normalise import Facts, bounded
from worker.policy.retry_after import retry_after_s, should_retry
from worker.policy.signals import match_signal

FORBIDDEN_IN_A_ROW = 3
"""So many different models or paths of a route that are answered 403 are about our credentials, not about one request;
counted as `flow.evidence.ForbiddenRow` does, where nothing is served."""

_MAX_DETAIL_BYTES = 512
"""Of a library's or parser's words in the message of an error."""

_CONFLICT_MAX_ATTEMPTS = 2
"""A 409 is a lock timeout to OpenAI's own client, which retries it; a second one is the answer."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What is done about one class of failure."""

    do: Disposition
    reply_status: int | None = None
    """Status of the answer when it comes to one; `None`: the backend's own."""
    fallback_status: int = 502
    """In place of the backend's own status where it gave none that says error."""
    retryable: bool = False
    max_attempts: int | None = None
    breaker: BreakerAction = BreakerAction.NONE
    scope: Scope = Scope.MODEL
    is_overload: bool = False
    verbatim: bool = True
    expose_backend: bool = True
    backoff: Backoff = msgspec.field(default_factory=Backoff)
    says: str = ""
    """Message of the answer when the backend gave none, or none that may be shown."""

    @property
    def fixed_status(self) -> int:
        """Status of an answer that no backend has a part in."""
        return self.reply_status or self.fallback_status


_REPLY, _NACK, _HOLD = Disposition.REPLY, Disposition.NACK, Disposition.HOLD
_COUNT, _TRIP = BreakerAction.COUNT, BreakerAction.TRIP
_BACKEND = Scope.BACKEND

ROWS: Mapping[ErrorClass, Row] = {
    ErrorClass.CONTENT_FILTER: Row(do=_REPLY, fallback_status=400, says="The backend's content filter refused it."),
    ErrorClass.CONTEXT_LENGTH: Row(do=_REPLY, reply_status=400, says="The input is longer than the model's context."),
    ErrorClass.INVALID_REQUEST: Row(do=_REPLY, fallback_status=400, says="The backend refused the request as invalid."),
    ErrorClass.RATE_LIMITED: Row(
        do=_HOLD,
        reply_status=429,
        retryable=True,
        breaker=_COUNT,
        is_overload=True,
        says="The backend limits its rate.",
    ),
    ErrorClass.OVERLOADED: Row(
        do=_HOLD, reply_status=503, retryable=True, breaker=_COUNT, is_overload=True, says="The backend is overloaded."
    ),
    ErrorClass.QUOTA: Row(
        do=_HOLD,
        fallback_status=429,
        retryable=True,
        breaker=_TRIP,
        scope=_BACKEND,
        says="The account's quota is used up.",
    ),
    ErrorClass.AUTH: Row(
        do=_HOLD,
        reply_status=502,
        retryable=True,
        breaker=_TRIP,
        scope=_BACKEND,
        verbatim=False,
        expose_backend=False,
        says="The backend refuses the worker's credentials.",
    ),
    ErrorClass.FORBIDDEN: Row(do=_REPLY, reply_status=403, says="The backend forbids this request."),
    ErrorClass.MODEL_NOT_FOUND: Row(do=_REPLY, reply_status=404, says="The backend has no such model."),
    ErrorClass.NOT_READY: Row(
        do=_HOLD, reply_status=503, retryable=True, breaker=_TRIP, says="The backend is not ready to serve."
    ),
    ErrorClass.CONNECT: Row(
        do=_HOLD,
        reply_status=502,
        retryable=True,
        breaker=_COUNT,
        scope=_BACKEND,
        says="The backend could not be reached.",
    ),
    ErrorClass.SERVER_ERROR: Row(
        do=_NACK, fallback_status=502, retryable=True, breaker=_COUNT, says="The backend failed."
    ),
    ErrorClass.TIMEOUT: Row(
        do=_NACK,
        reply_status=504,
        retryable=True,
        max_attempts=2,
        breaker=_COUNT,
        says="The backend did not answer in time.",
    ),
    ErrorClass.CONNECTION_LOST: Row(
        do=_NACK, reply_status=502, retryable=True, breaker=_COUNT, says="The connection to the backend was lost."
    ),
    ErrorClass.MALFORMED: Row(
        do=_NACK,
        reply_status=502,
        retryable=True,
        max_attempts=3,
        breaker=_COUNT,
        says="The backend's answer is not JSON.",
    ),
    ErrorClass.EMPTY_ANSWER: Row(
        do=_NACK, reply_status=502, retryable=True, max_attempts=2, says="The backend's answer holds no result."
    ),
    ErrorClass.ABORTED: Row(
        do=_NACK, reply_status=503, retryable=True, breaker=_COUNT, says="The backend gave up on the request."
    ),
    ErrorClass.STREAM_BROKEN: Row(
        do=_NACK,
        reply_status=502,
        retryable=True,
        max_attempts=3,
        breaker=_COUNT,
        says="The stream broke before its end.",
    ),
    ErrorClass.STREAM_IDLE: Row(
        do=_NACK,
        reply_status=504,
        retryable=True,
        max_attempts=2,
        breaker=_COUNT,
        says="The stream stopped sending data.",
    ),
    ErrorClass.MODEL_TIME_EXCEEDED: Row(
        do=_REPLY, reply_status=504, says="The model took longer than its server allows."
    ),
    ErrorClass.REPLY_TOO_LARGE: Row(
        do=_REPLY, reply_status=502, verbatim=False, says="The answer is larger than a message may be."
    ),
    ErrorClass.REPLY_REFUSED: Row(
        do=_REPLY, reply_status=502, verbatim=False, says="Pub/Sub refuses the answer, while it accepts others."
    ),
    ErrorClass.PAYLOAD_NOT_FOUND: Row(
        do=_REPLY, reply_status=404, verbatim=False, says="The object that body_uri names does not exist."
    ),
    ErrorClass.PAYLOAD_TOO_LARGE: Row(
        do=_REPLY, reply_status=413, verbatim=False, says="The object that body_uri names is too large."
    ),
    ErrorClass.PAYLOAD_MISMATCH: Row(
        do=_REPLY, reply_status=409, verbatim=False, says="The object that body_uri names has another SHA-256."
    ),
    ErrorClass.PAYLOAD_REFUSED: Row(
        do=_REPLY, reply_status=403, verbatim=False, says="The worker may not read the object that body_uri names."
    ),
    ErrorClass.PAYLOAD_UNAVAILABLE: Row(
        do=_HOLD, reply_status=503, retryable=True, verbatim=False, says="Object storage does not serve the body."
    ),
    ErrorClass.BAD_MESSAGE: Row(
        do=_REPLY, reply_status=400, verbatim=False, says="The message is not a valid request."
    ),
    ErrorClass.DEADLINE_EXCEEDED: Row(
        do=_REPLY, reply_status=504, retryable=True, verbatim=False, says="The request's deadline has passed."
    ),
    ErrorClass.CANCELLED: Row(do=_REPLY, reply_status=499, verbatim=False, says="The request was cancelled."),
    ErrorClass.IDEMPOTENCY_CONFLICT: Row(
        do=_REPLY, reply_status=409, verbatim=False, says="The key was used before with another request."
    ),
    ErrorClass.INTERNAL_ERROR: Row(
        do=_NACK, reply_status=500, retryable=True, verbatim=False, expose_backend=False, says="The worker failed."
    ),
}

_FAULTS: Mapping[Fault, ErrorClass] = {
    Fault.CONNECT: ErrorClass.CONNECT,
    Fault.CONNECT_TIMEOUT: ErrorClass.CONNECT,
    Fault.FIRST_BYTE_TIMEOUT: ErrorClass.TIMEOUT,
    Fault.IDLE_TIMEOUT: ErrorClass.STREAM_IDLE,
    Fault.TOTAL_TIMEOUT: ErrorClass.TIMEOUT,
    Fault.CONNECTION_LOST: ErrorClass.CONNECTION_LOST,
    Fault.DECODING: ErrorClass.MALFORMED,
    Fault.RESPONSE_TOO_LARGE: ErrorClass.REPLY_TOO_LARGE,
    Fault.STREAM_BROKEN: ErrorClass.STREAM_BROKEN,
    Fault.REQUEST_UNUSABLE: ErrorClass.INVALID_REQUEST,
    Fault.REQUEST_TOO_LARGE: ErrorClass.INVALID_REQUEST,
    Fault.CREDENTIALS: ErrorClass.AUTH,
    Fault.PAYLOAD_NOT_FOUND: ErrorClass.PAYLOAD_NOT_FOUND,
    Fault.PAYLOAD_TOO_LARGE: ErrorClass.PAYLOAD_TOO_LARGE,
    Fault.PAYLOAD_MISMATCH: ErrorClass.PAYLOAD_MISMATCH,
    Fault.PAYLOAD_REFUSED: ErrorClass.PAYLOAD_REFUSED,
    Fault.PAYLOAD_UNAVAILABLE: ErrorClass.PAYLOAD_UNAVAILABLE,
    Fault.INTERNAL: ErrorClass.INTERNAL_ERROR,
}

REFUSED_BEFORE: Mapping[Fault, int] = {Fault.REQUEST_UNUSABLE: 400, Fault.REQUEST_TOO_LARGE: 413}
"""Status of the answer to a request that the worker refuses in the service's place; the message has its own words."""

_STATUSES: Mapping[int, ErrorClass] = {
    401: ErrorClass.AUTH,
    402: ErrorClass.QUOTA,
    403: ErrorClass.FORBIDDEN,
    407: ErrorClass.AUTH,
    408: ErrorClass.TIMEOUT,
    409: ErrorClass.SERVER_ERROR,
    424: ErrorClass.SERVER_ERROR,
    425: ErrorClass.SERVER_ERROR,
    429: ErrorClass.RATE_LIMITED,
    499: ErrorClass.TIMEOUT,
    501: ErrorClass.INVALID_REQUEST,
    503: ErrorClass.OVERLOADED,
}
"""What a bare status means; any other 4xx is `invalid_request`, any other 5xx `server_error`.  424 is TGI's word for a
failed generation; 425 (RFC 8470) asks for a repeat."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
"""Not followed: a request must not go where the operator has not said.  All messages get it, as with a refused key, so
it is of that class."""

ANSWER_STATUSES = frozenset({200, 201, 202, 203})
"""Statuses under which a body is an answer.  204 and 205 have none, 206 is a part of one
(https://www.rfc-editor.org/rfc/rfc9110#section-15.3)."""
_LAST_STATUS = 599

_FLAWS: Mapping[Flaw, ErrorClass] = {
    Flaw.MALFORMED: ErrorClass.MALFORMED,
    Flaw.EMPTY: ErrorClass.EMPTY_ANSWER,
    Flaw.ABORTED: ErrorClass.ABORTED,
    Flaw.ERROR: ErrorClass.SERVER_ERROR,
}

_STANDS_IN_STREAM = frozenset(
    {
        ErrorClass.CONTENT_FILTER,
        ErrorClass.CONTEXT_LENGTH,
        ErrorClass.INVALID_REQUEST,
        ErrorClass.MODEL_NOT_FOUND,
        ErrorClass.MODEL_TIME_EXCEEDED,
        ErrorClass.FORBIDDEN,
        ErrorClass.QUOTA,
        ErrorClass.AUTH,
    }
)
"""An error event with one of these classes keeps it even after text has come; any other one then broke the stream.
Quota and credentials are among them since no second attempt with *this* message can repair them."""


def is_good_answer(event: ErrorEvent) -> bool:
    """Say whether the attempt ended in a complete, well-formed answer; the hot path."""
    if event.fault is not None or event.in_stream or event.status not in ANSWER_STATUSES:
        return False
    return find_flaw(event.path, event.body, input_is_empty=event.input_is_empty) is None


_OK = Decision(disposition=Disposition.REPLY, breaker=BreakerAction.SUCCESS)


def accept(event: ErrorEvent) -> Decision:
    """Return the decision about a good answer: give it, and tell the breaker that the backend works."""
    status = event.status or 200
    return _OK if status == 200 else replace(_OK, reply_status=status)  # noqa: PLR2004


def classify(event: ErrorEvent, facts: Facts, *, forbidden_in_a_row: int = 0) -> ErrorClass | None:
    """
    Return the class of an attempt's end, or `None` for a good answer.

    The order is the rule: an error status (even if the connection broke after it: a status is the whole truth), then
    an error event inside a stream, then what broke, then what is wrong with a 2xx body.

    Args:
        event: What happened.
        facts: Of its body.
        forbidden_in_a_row: Of a 403: see `engine.ErrorPolicy.decide`.
    """
    error_class = _class_of_end(event, facts)
    if error_class is ErrorClass.FORBIDDEN and forbidden_in_a_row >= FORBIDDEN_IN_A_ROW:
        return ErrorClass.AUTH
    return error_class


def _class_of_end(event: ErrorEvent, facts: Facts) -> ErrorClass | None:
    status = event.status
    if event.fault is Fault.INTERNAL or (status is None and event.fault is None and not event.in_stream):
        return ErrorClass.INTERNAL_ERROR  # in the second case neither a response nor a reason: ours to fix
    if status in _REDIRECTS:
        return ErrorClass.AUTH
    if status is not None and 400 <= status <= _LAST_STATUS:  # noqa: PLR2004
        return _class_of_status(facts, facts.status or status)
    if event.in_stream:
        return _class_of_stream_error(event, facts)
    if event.fault is not None:
        return _class_of_fault(event.fault, event.phase)
    return _class_of_answer(event, facts)


def _class_of_answer(event: ErrorEvent, facts: Facts) -> ErrorClass | None:
    """Classify a complete response whose status is no error."""
    if event.status not in ANSWER_STATUSES:
        return ErrorClass.MALFORMED
    flaw = find_flaw(event.path, event.body, input_is_empty=event.input_is_empty)
    if flaw is Flaw.ERROR or (flaw is Flaw.MALFORMED and facts.is_error):  # the latter: a list around an error
        return _class_of_body(facts) or ErrorClass.SERVER_ERROR
    return None if flaw is None else _FLAWS[flaw]


def _class_of_status(facts: Facts, status: int) -> ErrorClass:
    signal = match_signal(facts, status)
    if signal is not None:
        return signal.error_class
    default = ErrorClass.INVALID_REQUEST if status < 500 else ErrorClass.SERVER_ERROR  # noqa: PLR2004
    return _STATUSES.get(status, default)


def _class_of_body(facts: Facts) -> ErrorClass | None:
    """Classify an error that came without an error status, by its own words and by the status it names."""
    signal = match_signal(facts, facts.status_hint)
    if signal is not None:
        return signal.error_class
    return None if facts.status_hint is None else _class_of_status(facts, facts.status_hint)


def _class_of_fault(fault: Fault, phase: Phase) -> ErrorClass:
    if phase is Phase.STREAM and fault in {Fault.CONNECTION_LOST, Fault.DECODING}:
        return ErrorClass.STREAM_BROKEN
    return _FAULTS[fault]


def _class_of_stream_error(event: ErrorEvent, facts: Facts) -> ErrorClass:
    """
    Classify an error inside a stream, whatever followed it.

    As the first event it is a plain error with the code it names; after text has come it broke the stream, unless it
    is final anyway.
    """
    fallback = ErrorClass.STREAM_BROKEN if event.fault is None else _class_of_fault(event.fault, Phase.STREAM)
    if not facts.is_error:
        return fallback
    error_class = _class_of_body(facts) or ErrorClass.STREAM_BROKEN
    if event.has_partial and error_class not in _STANDS_IN_STREAM:
        return ErrorClass.STREAM_BROKEN
    return error_class


def decide(error_class: ErrorClass, event: ErrorEvent, facts: Facts, *, now_unix: float) -> Decision:
    """Return what the row of a class says about this event."""
    row = ROWS[error_class]
    hint_s = retry_after_s(event.headers, now_unix=now_unix)
    decision = Decision(
        disposition=row.do,
        error_class=error_class,
        rule=f"builtin:{error_class}",
        retryable=row.retryable,
        reply_status=row.reply_status or _own_status(event, facts, row.fallback_status),
        verbatim=row.verbatim,
        expose_backend=row.expose_backend,
        message=_message(event, facts, row),
        retry_after_s=None if row.do is Disposition.REPLY else hint_s,
        backoff=row.backoff,
        max_attempts=_CONFLICT_MAX_ATTEMPTS if event.status == 409 else row.max_attempts,  # noqa: PLR2004
        breaker=row.breaker,
        scope=_scope(error_class, event, row),
        is_overload=row.is_overload,
    )
    return _heed_verdict(decision, event)


def _scope(error_class: ErrorClass, event: ErrorEvent, row: Row) -> Scope:
    """Return what the failure concerns: a gateway that answers was reached; what it did not reach serves a model."""
    if error_class is ErrorClass.CONNECT and event.status is not None:
        return Scope.MODEL
    return row.scope


def _message(event: ErrorEvent, facts: Facts, row: Row) -> str:  # noqa: PLR0911 - one return a source of words
    """Return the backend's words where they are an error's and may be shown, ours with what broke otherwise."""
    status = event.status or 0
    if status in _REDIRECTS:
        to = bounded(event.headers.get("location", "nowhere"), _MAX_DETAIL_BYTES)
        return f"The backend redirects ({status}) to {to}; base_url should be the address that answers."
    if not row.expose_backend:
        return row.says
    if event.fault in REFUSED_BEFORE and event.detail:
        return bounded(event.detail, _MAX_DETAIL_BYTES)
    is_error = facts.is_error or event.in_stream or 400 <= status <= _LAST_STATUS  # noqa: PLR2004
    if is_error and facts.message and event.fault is not Fault.STREAM_BROKEN:
        return facts.message
    if event.fault is not None and event.detail:
        return f"{row.says}  {bounded(event.detail, _MAX_DETAIL_BYTES)}"
    if event.fault is None and status and status not in ANSWER_STATUSES and not is_error:
        return f"The backend answered with status {status}, under which there is no answer."
    return row.says


def _own_status(event: ErrorEvent, facts: Facts, fallback: int) -> int:
    if event.fault is not None and event.fault in REFUSED_BEFORE:
        return REFUSED_BEFORE[event.fault]
    status = facts.status or event.status or 0
    if status < 400:  # noqa: PLR2004 inside a stream, or under a success status, only the body names one
        status = facts.status_hint or 0
    return status if 400 <= status <= 599 else fallback  # noqa: PLR2004


_FINAL_BY_REQUEST = frozenset({ErrorClass.SERVER_ERROR, ErrorClass.TIMEOUT})
_REPEAT_BY_REQUEST = frozenset({ErrorClass.INVALID_REQUEST})


def _heed_verdict(decision: Decision, event: ErrorEvent) -> Decision:
    """
    Apply `x-should-retry`, where it can only concern this message.

    `false` makes a server error final, `true` gives a refused request a second attempt.  A class that is held is left
    alone: OpenAI marks an exhausted quota with `false`, and answering a whole queue with it is what holding prevents.
    """
    verdict = should_retry(event.headers)
    if verdict is False and decision.error_class in _FINAL_BY_REQUEST:
        return replace(decision, disposition=Disposition.REPLY, retryable=False, retry_after_s=None)
    if verdict is True and decision.error_class in _REPEAT_BY_REQUEST:
        return replace(decision, disposition=Disposition.NACK, retryable=True, max_attempts=_CONFLICT_MAX_ATTEMPTS)
    return decision
