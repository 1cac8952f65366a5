"""
One delivery while it is worked on: what came, what was spent on it, and the answer that goes out.

Plain data of the processor and the publishing of answers; measures nothing by itself.
"""

from dataclasses import dataclass
from typing import Any

from worker.policy.budgets import Budget
from worker.policy.model import Decision, ErrorEvent
from worker.ports import AttemptResult, ResumePoint
from worker.wire.message import ReceivedMessage, RequestMessage


@dataclass(slots=True, eq=False)
class Delivery:
    """
    Working state of one delivery.

    Attributes:
        message: As it came.
        received_at: Monotonic seconds of its hand-over.
        request: `None` until it is decoded, and for what is no request.
    """

    message: ReceivedMessage
    received_at: float
    request: RequestMessage | None = None
    backend: str | None = None
    """Name of the route."""
    tries: int = 0
    """Attempts in this process, from 1."""
    charged_tries: int = 0
    """... of them those that count against a class's limit: not the ones lost to an outage."""
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
    """Times the delivery was kept because its next attempt can go on from that."""
    event: ErrorEvent | None = None
    """How the latest attempt ended."""
    decision: Decision | None = None
    """About the latest attempt, budgets included once they were asked."""
    cancelled_at: float | None = None
    """Monotonic seconds at which the processor was told to give up."""
    is_answered: bool = False
    """The broker has the answer: whatever happens now, the message is acked."""
    trace: Any = None
    """What the tracer remembers, with `trace_id`; `None` when nothing is traced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The settings that bound a delivery; see `worker.settings.schema`."""

    max_lease_duration_s: float
    max_message_age_s: float
    hold_max_s: float
    reply_on_last_attempt: bool
    max_delivery_attempts: int | None
    """`None` when the subscription does not count."""

    def budget(self, delivery: Delivery, *, now: float, now_unix: float, draining: bool) -> Budget:
        """Return what is left to spend on the delivery."""
        deadline = delivery.request.deadline if delivery.request is not None else None
        return Budget(
            max_delivery_attempts=self.max_delivery_attempts,
            delivery_attempt=delivery.message.delivery_attempt,
            message_age_s=max(0.0, now_unix - delivery.message.publish_time),
            max_message_age_s=self.max_message_age_s,
            lease_left_s=self.max_lease_duration_s - (now - delivery.received_at),
            deadline_left_s=None if deadline is None else deadline - now_unix,
            held_s=delivery.held_s,
            hold_max_s=self.hold_max_s,
            attempts=delivery.charged_tries,
            draining=draining,
            reply_on_last_attempt=self.reply_on_last_attempt,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer before it is published."""

    status_code: int
    body: bytes
    metadata: bytes = b"{}"
    error_class: str | None = None
    truncated: bool = False
    stats: bytes | None = None
    retryable: bool = False
