"""
From a decision to the answer, and the decisions that no backend has a part in: what the worker says of its own accord.

The table of `worker.policy` judges attempts; the constants are for what never came to one, or was cut by the worker.
"""

from worker.delivery import Delivery, Reply
from worker.errors import MessageError
from worker.policy.model import Decision, Disposition, ErrorClass, ErrorEvent, Phase
from worker.policy.reply import bad_message_body, error_reply, idempotency_conflict_body, partial_of

INTERNAL = Decision(
    disposition=Disposition.NACK,
    error_class=ErrorClass.INTERNAL_ERROR,
    rule="builtin:internal_error",
    retryable=True,
    reply_status=500,
    verbatim=False,
    expose_backend=False,
    message="The worker failed.",
)
"""An exception nobody foresaw."""
INTERRUPTED = Decision(
    disposition=Disposition.NACK,
    error_class=ErrorClass.ABORTED,
    rule="builtin:drain",
    retryable=True,
    reply_status=503,
    message="The worker was stopped before the backend had answered.",
)
"""Cut by a shutdown before anything else was known."""
TOO_LATE = Decision(
    disposition=Disposition.REPLY,
    error_class=ErrorClass.DEADLINE_EXCEEDED,
    rule="builtin:deadline",
    retryable=True,
    reply_status=504,
    verbatim=False,
    message="The request's deadline has passed.",
)
"""The requester wants no answer any more but the one that says so."""


def build_reply(delivery: Delivery, decision: Decision, *, stats: bytes | None = None) -> Reply:
    """
    Return the answer that a decision to reply gives, with these stats.

    An error carries what the latest attempt had of an answer when it broke, even if it was cut by the worker itself;
    nothing of earlier attempts.
    """
    metadata = delivery.request.metadata if delivery.request is not None else b"{}"
    event = delivery.event
    if decision.error_class is None:
        assert event is not None
        return Reply(status_code=decision.reply_status, body=event.body, metadata=metadata, stats=stats)
    if event is None:  # never tried, or cut before the attempt was judged
        event = ErrorEvent(backend=delivery.backend or "", path="", phase=Phase.PREPARE)
    partial = partial_of(decision, event, delivery.result.partial if delivery.result is not None else None)
    status, body = error_reply(decision, event, attempts=delivery.tries, partial=partial)
    return Reply(
        status_code=status,
        body=body,
        metadata=metadata,
        error_class=decision.error_class,
        truncated=partial is not None,
        stats=stats,
        retryable=decision.retryable,
    )


def no_route(model: str | None, path: str) -> Decision:
    """Return the decision about a request that no route takes."""
    return Decision(
        disposition=Disposition.REPLY,
        error_class=ErrorClass.MODEL_NOT_FOUND,
        rule="builtin:no_route",
        reply_status=404,
        verbatim=False,
        message=f"no backend serves model {model!r} at {path}",
    )


def refusal(error: MessageError) -> Reply:
    """Return the answer to what is no request."""
    body = bad_message_body(error.reason, param=error.param)
    return Reply(status_code=400, body=body, metadata=error.metadata, error_class=ErrorClass.BAD_MESSAGE)


def conflict(key: str, metadata: bytes) -> Reply:
    """Return the answer to a request under a key that another request was answered under."""
    body = idempotency_conflict_body(key)
    return Reply(status_code=409, body=body, metadata=metadata, error_class=ErrorClass.IDEMPOTENCY_CONFLICT)
