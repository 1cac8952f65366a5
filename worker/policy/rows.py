"""
What is done about each class of failure: the rows of the table, as data.

`Disposition` by thought: what is final is answered; what is not the message's fault is held, since holding costs no
delivery attempt; what may be the message's fault is nacked, so that a prompt that kills a server runs out of attempts.
`docs/error-policy.md` shows these rows to operators, and a test compares the two.

Source: house decision; the servers' behaviour behind each row is cited in `signals` and in the golden samples.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from worker.policy.model import Backoff, BreakerAction, Disposition, ErrorClass, Scope


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What is done about one class of failure."""

    do: Disposition
    reply_status: int | None = None
    """Status of the answer when it comes to one; `None`: the backend's own."""
    fallback_status: int = 502
    """In place of the backend's own status where it gave none that says error."""
    retryable: bool = False
    max_tries: int | None = None
    breaker: BreakerAction = BreakerAction.NONE
    scope: Scope = Scope.BACKEND
    is_overload: bool = False
    verbatim: bool = True
    expose_backend: bool = True
    backoff: Backoff = field(default_factory=Backoff)
    says: str = ""
    """Message of the answer when the backend gave none, or none that may be shown."""


_REPLY, _NACK, _HOLD = Disposition.REPLY, Disposition.NACK, Disposition.HOLD
_COUNT, _TRIP = BreakerAction.COUNT, BreakerAction.TRIP

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
        do=_HOLD, fallback_status=429, retryable=True, breaker=_TRIP, says="The account's quota is used up."
    ),
    ErrorClass.AUTH: Row(
        do=_HOLD,
        reply_status=502,
        retryable=True,
        breaker=_TRIP,
        verbatim=False,
        expose_backend=False,
        says="The backend refuses the worker's credentials.",
    ),
    ErrorClass.FORBIDDEN: Row(do=_REPLY, reply_status=403, breaker=_COUNT, says="The backend forbids this request."),
    ErrorClass.MODEL_NOT_FOUND: Row(
        do=_REPLY, reply_status=404, scope=Scope.MODEL, says="The backend has no such model."
    ),
    ErrorClass.NOT_READY: Row(
        do=_HOLD, reply_status=503, retryable=True, breaker=_TRIP, says="The backend is not ready to serve."
    ),
    ErrorClass.CONNECT: Row(
        do=_HOLD, reply_status=502, retryable=True, breaker=_COUNT, says="The backend could not be reached."
    ),
    ErrorClass.SERVER_ERROR: Row(
        do=_NACK, fallback_status=502, retryable=True, breaker=_COUNT, says="The backend failed."
    ),
    ErrorClass.TIMEOUT: Row(
        do=_NACK,
        reply_status=504,
        retryable=True,
        max_tries=2,
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
        max_tries=3,
        breaker=_COUNT,
        says="The backend's answer is not JSON.",
    ),
    ErrorClass.EMPTY_CHOICES: Row(
        do=_NACK, reply_status=502, retryable=True, max_tries=2, says="The backend's answer holds no result."
    ),
    ErrorClass.ABORTED: Row(
        do=_NACK, reply_status=503, retryable=True, breaker=_COUNT, says="The backend gave up on the request."
    ),
    ErrorClass.STREAM_BROKEN: Row(
        do=_NACK, reply_status=502, retryable=True, max_tries=3, breaker=_COUNT, says="The stream broke before its end."
    ),
    ErrorClass.STREAM_IDLE: Row(
        do=_NACK, reply_status=504, retryable=True, max_tries=2, breaker=_COUNT, says="The stream stopped sending data."
    ),
    ErrorClass.MODEL_TIME_EXCEEDED: Row(
        do=_REPLY, reply_status=504, says="The model took longer than its server allows."
    ),
    ErrorClass.REPLY_TOO_LARGE: Row(
        do=_REPLY, reply_status=502, verbatim=False, says="The answer is larger than a message may be."
    ),
    ErrorClass.BAD_MESSAGE: Row(
        do=_REPLY, reply_status=400, verbatim=False, says="The message is not a valid request."
    ),
    ErrorClass.DEADLINE_EXCEEDED: Row(
        do=_REPLY, reply_status=504, retryable=True, verbatim=False, says="The request's deadline has passed."
    ),
    ErrorClass.IDEMPOTENCY_CONFLICT: Row(
        do=_REPLY, reply_status=409, verbatim=False, says="The key was used before with another request."
    ),
    ErrorClass.INTERNAL_ERROR: Row(
        do=_NACK, reply_status=500, retryable=True, verbatim=False, expose_backend=False, says="The worker failed."
    ),
}
