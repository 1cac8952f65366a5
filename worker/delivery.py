"""
One delivery while it is worked on: what came, what was spent on it, and the answer that goes out.

Plain data, written by the processor alone.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec

from worker.errors import MessageError
from worker.policy.budgets import Budget
from worker.policy.model import Decision, ErrorClass, ErrorEvent, Phase
from worker.policy.reply import bad_message_body, error_reply, idempotency_conflict_body, partial_of
from worker.policy.table import ROWS
from worker.ports import AttemptResult, ResumePoint
from worker.wire.message import ReceivedMessage, RequestMessage


class Delivery(msgspec.Struct, eq=False):
    """
    Working state of one delivery.

    Attributes:
        message: As it came.
        received_at: Monotonic seconds at which its lease began here.
        request: `None` until it is decoded, and for what is no request.
    """

    message: ReceivedMessage
    received_at: float
    request: RequestMessage | None = None
    backend: str | None = None
    """Name of the target of the latest attempt; before the first one, that of the route."""
    failed_at: tuple[str, ...] = ()
    """Names of targets, of a route with several, at which an attempt failed."""
    attempts: int = 0
    """Attempts in this process."""
    counted_attempts: int = 0
    """... of them those that count against a class's limit: not the ones attributed to an outage."""
    held_s: float = 0.0
    """Time in holding before and between attempts."""
    first_attempt_at: float | None = None
    """Monotonic seconds."""
    queue_s: float | None = None
    """From the publishing of the message to its first attempt here."""
    result: AttemptResult | None = None
    """Of the latest attempt."""
    resume_point: ResumePoint | None = None
    """What the latest attempt left for the next one to go on from."""
    continuations: int = 0
    """Times the delivery was held so that its next attempt could go on from that."""
    reserved_tokens: float | None = None
    """What it has reserved of its tenant's limits; `None`: nothing."""
    limited_until: float | None = None
    """Monotonic seconds until which these limits make it wait."""
    is_tried_late: bool = False
    """It is sent though its deadline is nearer than recent answers took."""
    event: ErrorEvent | None = None
    """How the latest attempt ended."""
    decision: Decision | None = None
    """About the latest attempt; in the end, about the delivery."""
    is_running: bool = False
    """An attempt is under way, or is being judged."""
    cancelled_at: float | None = None
    """Monotonic seconds at which the processor was told to give up."""
    is_withdrawn: bool = False
    """It was cancelled while it was worked on."""
    is_concluded: bool = False
    """Its outcome is known: it can be cancelled no more."""
    task: "asyncio.Task[Any] | None" = None
    """Works on it, where requests can be cancelled."""
    is_answered: bool = False
    """The broker has the answer: whatever happens now, the message is acked."""

    def start_attempt(self, now: float, now_unix: float) -> AttemptResult:
        """Count an attempt that starts now and return the empty result that it fills."""
        self.attempts += 1
        self.counted_attempts += 1
        if self.first_attempt_at is None:
            self.first_attempt_at = now
            self.queue_s = max(0.0, now_unix - self.message.publish_time)
        self.result = AttemptResult()
        return self.result


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The settings that bound a delivery; see `worker.settings.schema`."""

    max_lease_duration_s: float
    max_message_age_s: float
    hold_max_s: float
    reply_on_last_attempt: bool
    max_delivery_attempts: int | None
    """`None` when the subscription does not count."""
    attempts_of: Mapping[str, int | None] = {}
    """The same by source of a message, where there are several."""

    def budget(self, delivery: Delivery, *, now: float, now_unix: float, is_draining: bool) -> Budget:
        """Return what is left to spend on the delivery."""
        deadline = delivery.request.deadline if delivery.request is not None else None
        return Budget(
            max_delivery_attempts=self.attempts_of.get(delivery.message.source, self.max_delivery_attempts),
            delivery_attempt=delivery.message.delivery_attempt,
            message_age_s=max(0.0, now_unix - delivery.message.publish_time),
            max_message_age_s=self.max_message_age_s,
            lease_left_s=self.max_lease_duration_s - (now - delivery.received_at),
            deadline_left_s=None if deadline is None else deadline - now_unix,
            held_s=delivery.held_s,
            hold_max_s=self.hold_max_s,
            attempts=delivery.attempts,
            counted_attempts=delivery.counted_attempts,
            continuations=delivery.continuations,
            is_draining=is_draining,
            reply_on_last_attempt=self.reply_on_last_attempt,
        )


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """An answer before it is published."""

    status_code: int
    body: bytes
    body_uri: str | None = None
    """The object that the body was written to; the answer then names it."""
    body_sha256: str | None = None
    """Of that object."""
    metadata: bytes = b"{}"
    error_class: str | None = None
    reason: str = ""
    """What is wrong, in words for the log, where no decision about an attempt has them."""
    truncated: bool = False
    stats: bytes | None = None
    retryable: bool = False


class Nack(msgspec.Struct, frozen=True, kw_only=True):
    """The message is redelivered."""

    reason: str
    """Label of the metric: the error class, or `drain`."""


class AlreadyAnswered(msgspec.Struct, frozen=True):
    """The message's answer is out; only the ack is missing."""


Outcome = Reply | Nack | AlreadyAnswered
"""What the walk of a delivery ends in."""


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
    if event is None:  # there was no attempt, or it was cut before its end was judged
        event = ErrorEvent(backend=delivery.backend or "", path="", phase=Phase.PREPARE)
    partial = partial_of(decision, event, delivery.result.partial if delivery.result is not None else None)
    status, body = error_reply(decision, event, attempts=delivery.attempts, partial=partial)
    return Reply(
        status_code=status,
        body=body,
        metadata=metadata,
        error_class=decision.error_class,
        truncated=partial is not None,
        stats=stats,
        retryable=decision.retryable,
    )


def bad_message(error: MessageError) -> Reply:
    """Return the answer to a message that is not a request."""
    return Reply(
        status_code=ROWS[ErrorClass.BAD_MESSAGE].fixed_status,
        body=bad_message_body(error.reason, param=error.param),
        metadata=error.metadata,
        error_class=ErrorClass.BAD_MESSAGE,
        reason=error.reason,
    )


def conflict(key: str, metadata: bytes) -> Reply:
    """Return the answer to a request under a key that another request was answered under."""
    return Reply(
        status_code=ROWS[ErrorClass.IDEMPOTENCY_CONFLICT].fixed_status,
        body=idempotency_conflict_body(key),
        metadata=metadata,
        error_class=ErrorClass.IDEMPOTENCY_CONFLICT,
        reason="the idempotency key was used with another body",
    )
