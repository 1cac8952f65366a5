"""
The vocabulary of failures: what happened to one attempt, and what is to be done about it.

Everything here is a frozen value without behaviour beyond validation.  The rules that lead from an `ErrorEvent` to a
`Decision` are in `table`, the budgets that may overrule one in `budgets`.  `ErrorClass` is the one vocabulary shared by
log field, metric label, reply attribute, runbook heading and test id; `docs/operations.md` must name every member.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

from worker.policy.backoff import Backoff


class ErrorClass(StrEnum):
    """What kind of failure it was; one member per row of the table."""

    CONTENT_FILTER = "content_filter"
    CONTEXT_LENGTH = "context_length"
    INVALID_REQUEST = "invalid_request"
    RATE_LIMITED = "rate_limited"
    OVERLOADED = "overloaded"
    QUOTA = "quota"
    AUTH = "auth"
    FORBIDDEN = "forbidden"
    MODEL_NOT_FOUND = "model_not_found"
    NOT_READY = "not_ready"
    CONNECT = "connect"
    SERVER_ERROR = "server_error"
    TIMEOUT = "timeout"
    CONNECTION_LOST = "connection_lost"
    MALFORMED = "malformed"
    EMPTY_ANSWER = "empty_answer"
    ABORTED = "aborted"
    STREAM_BROKEN = "stream_broken"
    STREAM_IDLE = "stream_idle"
    MODEL_TIME_EXCEEDED = "model_time_exceeded"
    REPLY_TOO_LARGE = "reply_too_large"
    REPLY_REFUSED = "reply_refused"
    PAYLOAD_NOT_FOUND = "payload_not_found"
    PAYLOAD_TOO_LARGE = "payload_too_large"
    PAYLOAD_MISMATCH = "payload_mismatch"
    PAYLOAD_REFUSED = "payload_refused"
    PAYLOAD_UNAVAILABLE = "payload_unavailable"
    BAD_MESSAGE = "bad_message"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    CANCELLED = "cancelled"
    IDEMPOTENCY_CONFLICT = "idempotency_conflict"
    INTERNAL_ERROR = "internal_error"


class Phase(StrEnum):
    """How far an attempt had come; decides whether the backend may have worked on it."""

    PREPARE = "prepare"
    CONNECT = "connect"
    SEND = "send"
    HEADERS = "headers"
    BODY = "body"
    STREAM = "stream"
    PARSE = "parse"


class Disposition(StrEnum):
    """What is to be done with the delivery."""

    REPLY = "reply"
    """Publish an answer, wait for the broker's id, then ack."""
    NACK = "nack"
    """Redelivered by the subscription's retry policy; costs one delivery attempt."""
    HOLD = "hold"
    """Keep the lease, wait in this process, make another attempt; costs no delivery attempt."""


class Fault(StrEnum):
    """What broke when there is no complete HTTP response; the exception kinds of the backend port."""

    CONNECT = "connect"
    """Refused, DNS, TLS: the request was not sent."""
    CONNECT_TIMEOUT = "connect_timeout"
    """No connection within `timeouts.connect_s`: the request was not sent."""
    FIRST_BYTE_TIMEOUT = "first_byte_timeout"
    """Sent, but no response headers within `timeouts.first_byte_s`."""
    IDLE_TIMEOUT = "idle_timeout"
    """A stream without a data event for `timeouts.idle_s`."""
    TOTAL_TIMEOUT = "total_timeout"
    """Not complete within `timeouts.total_s` or the request's deadline."""
    CONNECTION_LOST = "connection_lost"
    """Reset or closed after the request was sent, before the response was complete."""
    DECODING = "decoding"
    """What the server sent is no HTTP response, or its content encoding is broken."""
    RESPONSE_TOO_LARGE = "response_too_large"
    """More bytes than the configured limit of a response."""
    STREAM_BROKEN = "stream_broken"
    """A stream that ended without the protocol's own end, or held an undecodable event."""
    REQUEST_UNUSABLE = "request_unusable"
    """The backend's service cannot take the request, as it is: found before anything was sent."""
    REQUEST_TOO_LARGE = "request_too_large"
    """The body has more bytes than the backend's service takes: found before anything was sent."""
    CREDENTIALS = "credentials"
    """The worker has no credentials to sign a request with: nothing was sent."""
    PAYLOAD_NOT_FOUND = "payload_not_found"
    """The object that `body_uri` names does not exist."""
    PAYLOAD_TOO_LARGE = "payload_too_large"
    """It has more bytes than `payloads.max_bytes`."""
    PAYLOAD_MISMATCH = "payload_mismatch"
    """Its SHA-256 is not that of the message's attribute."""
    PAYLOAD_REFUSED = "payload_refused"
    """Object storage refuses this object, while others were read."""
    PAYLOAD_UNAVAILABLE = "payload_unavailable"
    """Object storage cannot be reached, throttles, failed, or refuses the worker altogether."""
    INTERNAL = "internal"
    """An unexpected exception of the worker's own code."""


class BreakerAction(StrEnum):
    """What an attempt's end tells the route's breaker."""

    SUCCESS = "success"
    """The backend works: closes it, resets the count."""
    NONE = "none"
    """Says nothing about the backend."""
    COUNT = "count"
    """One more failure in a row; trips at the threshold."""
    TRIP = "trip"
    """Opens at once."""


class Scope(StrEnum):
    """What a failure concerns, and what an open breaker stops."""

    BACKEND = "backend"
    """All that goes to the backend: the host, the account."""
    MODEL = "model"
    """The requests of one model."""


class ErrorEvent(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to one attempt: the input of every rule and of the operator's hook."""

    backend: str
    """Name of the route, as in the settings."""
    path: str
    """Normalised path of the request, for example `/v1/chat/completions`."""
    model: str | None = None
    """The `model` of the request's body, `None` when it has none."""
    phase: Phase
    """How far the attempt came."""
    status: int | None = None
    """HTTP status; `None` when no response headers came."""
    headers: Mapping[str, str] = {}
    """Response headers, names in lower case."""
    body: bytes = b""
    """Response body as far as it came (for a stream: the error event's data, if one came)."""
    fault: Fault | None = None
    """What broke; `None` when a complete HTTP response came."""
    detail: str = ""
    """Text of the exception, for people; never matched by built-in rules."""
    in_stream: bool = False
    """The error came inside a stream whose HTTP status was 2xx."""
    has_partial: bool = False
    """Something of an answer was accumulated before the failure."""
    input_is_empty: bool = False
    """The request's `input` was an empty list, so that an empty `data` is the right answer to it (embeddings)."""
    delivery_attempt: int | None = None
    """The broker's count, from 1; `None` when the subscription does not count."""
    attempts: int = 1
    """Attempts of this delivery in this process, this one included, from 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What is to be done about an attempt's end, and which rule said so."""

    disposition: Disposition
    error_class: ErrorClass | None = None
    """`None` for a good answer."""
    rule: str = "builtin:ok"
    """`builtin:<class>`, the operator's rule name, `hook:<name>`; `+budget:<rule>` is appended by the budgets."""
    retryable: bool = False
    """Whether the same request could succeed later; stands in the error envelope."""
    reply_status: int = 200
    """Status code of the answer if it is given now."""
    reply_code: str | None = None
    """`error.code` of the envelope; `None`: the class.  When set, the envelope is used whatever `verbatim` says."""
    verbatim: bool = True
    """Whether the backend's JSON body may stand in the answer as it is."""
    expose_backend: bool = True
    """Whether the backend's text may stand in the error envelope (never for `auth`)."""
    message: str = ""
    """The normalised message of the backend, or ours; bounded to 2 KiB."""
    retry_after_s: float | None = None
    """The backend's hint (Retry-After, retry-after-ms), if there is one and it is to be honoured; seconds."""
    backoff: Backoff = field(default_factory=Backoff)
    hold_max_s: float | None = None
    """Bound of this class's holding; `None`: the setting's."""
    max_attempts: int | None = None
    """Limit of attempts of this class; `None`: the delivery's own budget alone."""
    breaker: BreakerAction = BreakerAction.NONE
    scope: Scope = Scope.MODEL
    is_overload: bool = False
    """A capacity signal: the adaptive window decreases once per flight."""
