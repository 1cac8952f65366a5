"""
The budgets that overrule a decision: how often a message may be tried, how long it may be kept.

`judge` applies them last, over a decision of any origin (table, operators' rule, hook), so that no rule can keep a
message for ever or lose it silently.  In order: attempts of the class, the
deadline, what is left to hold with, the last attempt.  Everything is a plain number measured by the caller; nothing
here reads a clock.

Source: house decision; `delivery_attempt` and the dead-letter policy:
    https://cloud.google.com/pubsub/docs/handling-failures#dead-letter_topic
"""

from dataclasses import replace

import msgspec

from worker.policy.model import Decision, Disposition
from worker.policy.own_replies import deadline_passed

MAX_RETRY_AFTER_S = 60.0
"""Longest wait for a Retry-After before the backend is asked again: one header must not idle a message, or a worker,
for an hour in which others are served."""


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """What is left to spend on one delivery, at the moment of the decision."""

    max_delivery_attempts: int | None
    """Of the subscription's dead-letter policy; `None` without one, or when it is not known."""
    delivery_attempt: int | None
    """The broker's count, from 1; `None` when the subscription does not count."""
    message_age_s: float = 0.0
    """Since the broker took the message."""
    max_message_age_s: float = 604_800.0
    """Ends the retries where attempts are not counted."""
    lease_left_s: float
    """Until the lease can no longer be extended."""
    deadline_left_s: float | None = None
    """Until the request's own deadline; `None` without one."""
    held_s: float = 0.0
    """How long this delivery has been held so far."""
    hold_max_s: float
    """The setting's bound of holding; a decision may bring its own."""
    attempts: int = 1
    """Attempts of this delivery in this process; 0: it only waited."""
    counted_attempts: int = 1
    """... of them those that count against a class's limit: not the ones attributed to an outage."""
    continuations: int = 0
    """Times this delivery was held to resume a broken stream."""
    is_draining: bool = False
    """The worker is shutting down: nothing is held any more."""
    reply_on_last_attempt: bool = True
    """`False` leaves the last nack to the dead-letter topic."""

    @property
    def outage_retries(self) -> int:
        """Attempts that were attributed to outages."""
        return self.attempts - self.counted_attempts


def apply_budgets(decision: Decision, budget: Budget, *, delay_s: float | None = None) -> Decision:
    """
    Return the decision that the budgets leave.

    A decision to reply is never changed.  What is changed carries `+budget:<name>` in its rule, once per change.

    Args:
        decision: Of the table, a rule or a hook.
        budget: What is left.
        delay_s: Seconds until the next attempt, from `next_delay_s`; `None`: the backend's Retry-After, or 0.
    """
    if decision.disposition is Disposition.REPLY:
        return decision
    if _attempts_used_up(decision, budget):
        return _reply(decision, "max_attempts")
    if budget.deadline_left_s is not None and budget.deadline_left_s <= 0:
        return deadline_passed(decision, rule=f"{decision.rule}+budget:deadline")
    if decision.disposition is Disposition.HOLD:
        delay = delay_s if delay_s is not None else decision.retry_after_s or 0.0
        spent = _spent_of_hold(decision, budget, delay)
        if spent is None:
            return decision
        decision = replace(decision, disposition=Disposition.NACK, rule=f"{decision.rule}+budget:{spent}")
    spent = _spent_of_nack(budget)
    return decision if spent is None else _reply(decision, spent)


def next_delay_s(decision: Decision, attempt: int, jitter: float) -> float:
    """
    Return how many seconds to wait before the next attempt in this process.

    The backend's Retry-After is a lower bound of the decision's backoff, up to `MAX_RETRY_AFTER_S`.

    Args:
        decision: Has both.
        attempt: Attempts so far, from 1.
        jitter: A uniform random number in [0, 1).
    """
    return max(min(decision.retry_after_s or 0.0, MAX_RETRY_AFTER_S), decision.backoff.delay_s(attempt, jitter))


def _attempts_used_up(decision: Decision, budget: Budget) -> bool:
    """
    Say whether the class's limit of attempts is reached, by the broker's count or this process's, whichever is higher.

    Only `delivery_attempt` survives a change of pods; it counts expiries too, so it is the pessimistic one.
    """
    if decision.max_attempts is None or budget.counted_attempts == 0:
        return False
    return max(budget.delivery_attempt or 0, budget.counted_attempts) >= decision.max_attempts


def _spent_of_hold(decision: Decision, budget: Budget, delay_s: float) -> str | None:
    """Return the name of what does not allow to hold for another `delay_s`, or `None` when everything does."""
    hold_max_s = budget.hold_max_s if decision.hold_max_s is None else decision.hold_max_s
    if budget.is_draining:
        return "draining"
    if budget.lease_left_s <= delay_s:
        return "lease"
    if budget.deadline_left_s is not None and budget.deadline_left_s <= delay_s:
        return "deadline_near"
    return "hold_max" if budget.held_s + delay_s >= hold_max_s else None


def _spent_of_nack(budget: Budget) -> str | None:
    """
    Return the name of what makes this nack the last one, or `None` when the message will come again.

    Where attempts are not counted the age ends the retries, but a message without an attempt is not refused for it.
    The age ends them even with `reply_on_last_attempt` off: without counting no dead-letter topic takes over.
    """
    if budget.delivery_attempt is not None and budget.max_delivery_attempts is not None:
        is_last = budget.delivery_attempt >= budget.max_delivery_attempts
        return "last_attempt" if is_last and budget.reply_on_last_attempt else None
    return "age" if budget.counted_attempts > 0 and budget.message_age_s > budget.max_message_age_s else None


def _reply(decision: Decision, spent: str) -> Decision:
    return replace(decision, disposition=Disposition.REPLY, rule=f"{decision.rule}+budget:{spent}", retry_after_s=None)
