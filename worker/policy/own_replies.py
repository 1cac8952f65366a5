"""
Decisions that no backend has a part in: what the worker says of its own accord.

Each is built from the row of its class in `rows`, so that it cannot say anything else than the table.
"""

from dataclasses import replace

from worker.policy.model import Decision, Disposition, ErrorClass
from worker.policy.table import ROWS


def own_decision(
    error_class: ErrorClass, rule: str, *, disposition: Disposition | None = None, message: str = ""
) -> Decision:
    """
    Return a decision of the worker's own: the row of a class without an attempt behind it.

    It tells the breaker nothing, and no body of a backend stands in its answer.

    Args:
        error_class: Whose row it is.
        rule: Shown in log and `policy explain`.
        disposition: `None`: the row's.
        message: For the requester; empty: the row's.
    """
    row = ROWS[error_class]
    return Decision(
        disposition=disposition or row.do,
        error_class=error_class,
        rule=rule,
        retryable=row.retryable,
        reply_status=row.fixed_status,
        verbatim=False,
        expose_backend=row.expose_backend,
        message=message or row.says,
        backoff=row.backoff,
        scope=row.scope,
    )


INTERNAL = own_decision(ErrorClass.INTERNAL_ERROR, "builtin:internal_error")
"""An exception of the worker's own code."""
INTERRUPTED = own_decision(
    ErrorClass.ABORTED, "builtin:drain", message="The worker was stopped before the backend had answered."
)
"""Stopped by a drain before anything else was known."""


def deadline_passed(last: Decision | None = None, *, rule: str = "builtin:deadline") -> Decision:
    """
    Return the decision about a request whose deadline has passed.

    Args:
        last: About the latest attempt; its error is named in the message, and what it covers stays covered.
        rule: Shown in log and `policy explain`.
    """
    decision = own_decision(ErrorClass.DEADLINE_EXCEEDED, rule)
    if last is None:
        return decision
    message = f"{decision.message}  Last error: {last.message}" if last.message else decision.message
    return replace(decision, message=message, expose_backend=last.expose_backend)


def deadline_unreachable(needed_s: float, last: Decision | None = None) -> Decision:
    """
    Return the decision about a request whose deadline is nearer than an answer can be.

    Args:
        needed_s: What recent answers took at least, seconds.
        last: See `deadline_passed`.
    """
    decision = deadline_passed(last, rule="builtin:deadline_unreachable")
    passed = ROWS[ErrorClass.DEADLINE_EXCEEDED].says
    message = f"The request's deadline cannot be met: recent answers of this model took {needed_s:.3g} s and more."
    return replace(decision, message=decision.message.replace(passed, message))


WITHDRAWN = own_decision(ErrorClass.CANCELLED, "builtin:cancelled")
"""The requester wants no answer any more."""


def no_route(model: str | None, path: str) -> Decision:
    """Return the decision about a request that no route takes."""
    message = f"no backend serves model {model!r} at {path}"
    return own_decision(ErrorClass.MODEL_NOT_FOUND, "builtin:no_route", message=message)


def never_started(error_class: ErrorClass) -> Decision:
    """
    Return the decision about a delivery that only waited, because its route is stopped or busy.

    Args:
        error_class: What opened the breaker, or `overloaded`.
    """
    decision = own_decision(error_class, f"breaker:{error_class}", disposition=Disposition.NACK)
    return replace(decision, retryable=True)
