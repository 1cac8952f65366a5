"""What is left to spend on a delivery."""

import pytest

from tests.support.pipeline import a_delivery
from worker.delivery import Delivery, Limits
from worker.wire.body import RequestBody
from worker.wire.message import ReceivedMessage, RequestMessage

LIMITS = Limits(
    max_lease_duration_s=600.0,
    max_message_age_s=3600.0,
    hold_max_s=300.0,
    reply_on_last_attempt=True,
    max_delivery_attempts=5,
)


def _delivery(**request: float) -> Delivery:
    message = ReceivedMessage(message_id="m", data=b"", publish_time=1_000.0, delivery_attempt=2)
    return a_delivery(RequestMessage(path="/p", body=RequestBody(b"{}"), **request), message)


def test_the_budget_counts_from_receipt_publishing_and_deadline() -> None:
    """The lease from the hand-over, the age from the publishing, the deadline from now."""
    delivery = _delivery(deadline=1_130.0)
    delivery.attempts, delivery.counted_attempts, delivery.continuations, delivery.held_s = 4, 3, 1, 12.0
    budget = LIMITS.budget(delivery, now=100.0, now_unix=1_100.0, is_draining=True)
    assert budget.lease_left_s == 500.0
    assert budget.message_age_s == 100.0
    assert budget.deadline_left_s == pytest.approx(30.0)
    assert (budget.delivery_attempt, budget.max_delivery_attempts) == (2, 5)
    assert (budget.attempts, budget.counted_attempts, budget.continuations) == (4, 3, 1)
    assert (budget.held_s, budget.hold_max_s) == (12.0, 300.0)
    assert (budget.is_draining, budget.reply_on_last_attempt) == (True, True)


def test_without_deadline_or_request_there_is_no_deadline() -> None:
    """`None` is no limit, not a passed one."""
    delivery = _delivery()
    assert LIMITS.budget(delivery, now=0.0, now_unix=1_000.0, is_draining=False).deadline_left_s is None
    delivery.request = None
    assert LIMITS.budget(delivery, now=0.0, now_unix=1_000.0, is_draining=False).deadline_left_s is None


def test_a_clock_that_was_set_back_makes_no_negative_age() -> None:
    """A message cannot be younger than new."""
    assert LIMITS.budget(_delivery(), now=0.0, now_unix=1.0, is_draining=False).message_age_s == 0.0


def test_deliveries_are_told_apart_by_identity() -> None:
    """Two deliveries of one message are two, also in a set."""
    assert len({_delivery(), _delivery()}) == 2
