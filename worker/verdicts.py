"""
Decisions and answers that no backend has a part in: what the worker says of its own accord.

The table of `worker.policy` judges attempts; these are for what never came to one, or was cut by the worker itself.
"""

from worker.delivery import Reply
from worker.errors import MessageError
from worker.policy.model import Decision, Disposition, ErrorClass
from worker.policy.reply import bad_message_body, idempotency_conflict_body

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
