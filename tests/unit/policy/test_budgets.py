"""The budgets that overrule a decision, each rule alone and all of them together."""

import itertools
import random

import pytest

from worker.policy.backoff import Backoff
from worker.policy.budgets import Budget, apply_budgets, next_delay_s
from worker.policy.model import BreakerAction, Decision, Disposition, ErrorClass

REPLY, NACK, HOLD = Disposition.REPLY, Disposition.NACK, Disposition.HOLD


def a_decision(disposition: Disposition = NACK, **changes) -> Decision:
    """An error's decision."""
    given = {"error_class": ErrorClass.SERVER_ERROR, "rule": "r", "reply_status": 500, "retryable": True} | changes
    return Decision(disposition=disposition, **given)


def a_budget(**changes) -> Budget:
    """A budget with plenty of everything."""
    given = {
        "max_delivery_attempts": 20,
        "delivery_attempt": 1,
        "lease_left_s": 1000.0,
        "hold_max_s": 1000.0,
    }
    return Budget(**(given | changes))


def test_plenty_left_changes_nothing():
    """With every budget untouched the decision stands as it was made."""
    for disposition in Disposition:
        decision = a_decision(disposition)
        assert decision is apply_budgets(decision, a_budget(), delay_s=1.0)


def test_a_reply_is_never_changed():
    """Neither a passed deadline, nor a drain, nor age changes what is final; a good answer least of all."""
    poor = a_budget(
        deadline_left_s=-1.0,
        is_draining=True,
        lease_left_s=0.0,
        delivery_attempt=20,
        message_age_s=1e9,
        counted_attempts=99,
    )
    good = Decision(disposition=REPLY, breaker=BreakerAction.SUCCESS)
    final = a_decision(REPLY, max_attempts=1)
    assert good is apply_budgets(good, poor)
    assert final is apply_budgets(final, poor)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        pytest.param({"is_draining": True}, "draining", id="draining"),
        pytest.param({"lease_left_s": 5.0}, "lease", id="the lease ends with the delay"),
        pytest.param({"lease_left_s": 0.0}, "lease", id="no lease left"),
        pytest.param({"deadline_left_s": 5.0}, "deadline_near", id="the deadline comes with the delay"),
        pytest.param({"held_s": 995.0}, "hold_max", id="held for as long as the setting allows"),
        pytest.param({"hold_max_s": 0.0}, "hold_max", id="holding switched off"),
    ],
)
def test_a_hold_that_does_not_fit_is_nacked(changes, why):
    """A hold whose next try would come too late goes back to the broker, and the rule says why."""
    result = apply_budgets(a_decision(HOLD), a_budget(**changes), delay_s=5.0)
    assert (NACK, f"r+budget:{why}") == (result.disposition, result.rule)


@pytest.mark.parametrize(
    "changes",
    [{"lease_left_s": 5.1}, {"deadline_left_s": 5.1}, {"held_s": 994.9}],
    ids=["lease", "deadline", "hold_max"],
)
def test_a_hold_that_just_fits_stands(changes):
    """Anything left after the delay is enough to hold."""
    assert apply_budgets(a_decision(HOLD), a_budget(**changes), delay_s=5.0).disposition is HOLD


def test_retry_after_longer_than_the_hold_budget_is_nacked():
    """Without a delay from the caller the backend's own hint must fit."""
    decision = a_decision(HOLD, retry_after_s=2000.0)
    assert apply_budgets(decision, a_budget()).disposition is NACK


def test_a_class_has_its_own_hold_bound():
    """A decision's bound of holding goes before the setting's, in both directions."""
    budget = a_budget(held_s=100.0)
    assert apply_budgets(a_decision(HOLD, hold_max_s=50.0), budget, delay_s=1.0).disposition is NACK
    assert apply_budgets(a_decision(HOLD, hold_max_s=5000.0), a_budget(held_s=999.5), delay_s=1.0).disposition is HOLD


@pytest.mark.parametrize(("attempt", "expected"), [(19, NACK), (20, REPLY), (21, REPLY)])
def test_the_last_permitted_attempt_is_answered(attempt, expected):
    """Where a nack would be the last, the requester gets the last error instead of silence."""
    result = apply_budgets(a_decision(), a_budget(delivery_attempt=attempt))
    assert expected is result.disposition
    if expected is REPLY:
        assert result.rule == "r+budget:last_attempt"
        assert (result.reply_status, result.retryable) == (500, True)


def test_the_switch_leaves_the_last_nack_to_the_dead_letter_topic():
    """`reply_on_last_attempt: false` keeps the nack of a decision and of a hold that ran out."""
    budget = a_budget(delivery_attempt=20, reply_on_last_attempt=False, is_draining=True)
    assert apply_budgets(a_decision(NACK), budget).disposition is NACK
    assert apply_budgets(a_decision(HOLD), budget).disposition is NACK


def test_a_hold_that_runs_out_on_the_last_attempt_is_answered():
    """Both rules leave their names: the hold that did not fit and the attempt that was the last."""
    result = apply_budgets(a_decision(HOLD), a_budget(delivery_attempt=20, lease_left_s=0.0))
    assert (result.disposition, result.rule) == (REPLY, "r+budget:lease+budget:last_attempt")


@pytest.mark.parametrize(
    ("delivery_attempt", "attempts", "expected"),
    [(1, 1, NACK), (2, 1, NACK), (3, 1, REPLY), (1, 3, REPLY), (None, 2, NACK), (None, 3, REPLY), (7, 1, REPLY)],
)
def test_tries_are_counted_by_the_broker_or_here_whichever_is_more(delivery_attempt, attempts, expected):
    """A class's limit of attempts is reached by either count; a change of pods resets only ours."""
    decision = a_decision(max_attempts=3)
    result = apply_budgets(decision, a_budget(delivery_attempt=delivery_attempt, counted_attempts=attempts))
    assert expected is result.disposition
    if expected is REPLY:
        assert result.rule == "r+budget:max_attempts"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({"delivery_attempt": None}, REPLY, id="no counting at all"),
        pytest.param({"max_delivery_attempts": None}, REPLY, id="a count without a known limit"),
        pytest.param({}, NACK, id="counted: age plays no part"),
        pytest.param({"delivery_attempt": None, "counted_attempts": 0}, NACK, id="never tried"),
        pytest.param({"delivery_attempt": None, "message_age_s": 604_800.0}, NACK, id="exactly as old as allowed"),
        pytest.param({"delivery_attempt": None, "reply_on_last_attempt": False}, REPLY, id="nothing else would end it"),
    ],
)
def test_age_ends_the_retries_where_nobody_counts(changes, expected):
    """A try that fails on an old message is answered when no attempts are counted; an untried one never is."""
    assert expected is apply_budgets(a_decision(), a_budget(**({"message_age_s": 604_801.0} | changes))).disposition


@pytest.mark.parametrize("disposition", [NACK, HOLD])
def test_a_passed_deadline_is_answered_as_such(disposition):
    """Past the deadline nothing is tried again; the answer says so and names the last error."""
    decision = a_decision(disposition, message="boom", reply_code="x")
    result = apply_budgets(decision, a_budget(deadline_left_s=0.0))
    assert (result.disposition, result.error_class, result.reply_status) == (REPLY, ErrorClass.DEADLINE_EXCEEDED, 504)
    assert result.message.endswith("Last error: boom")
    assert (result.reply_code, result.verbatim, result.rule) == (None, False, "r+budget:deadline")


def test_every_combination_ends_in_a_sound_decision():
    """Over all combinations: a hold fits, a draining worker never holds, a last nack is only left by the switch."""
    axes = {
        "max_delivery_attempts": (None, 5),
        "delivery_attempt": (None, 1, 5),
        "message_age_s": (0.0, 1e9),
        "lease_left_s": (0.0, 100.0),
        "deadline_left_s": (None, -1.0, 1.0, 100.0),
        "held_s": (0.0, 1000.0),
        "counted_attempts": (0, 1, 9),
        "is_draining": (False, True),
        "reply_on_last_attempt": (False, True),
    }
    decisions = [
        a_decision(disposition, max_attempts=attempts, hold_max_s=bound)
        for disposition, attempts, bound in itertools.product(Disposition, (None, 3), (None, 10.0))
    ]
    for values in itertools.product(*axes.values()):
        budget = Budget(hold_max_s=500.0, **dict(zip(axes, values, strict=True)))
        for decision in decisions:
            check_sound(decision, budget, apply_budgets(decision, budget, delay_s=2.0))


def check_sound(before: Decision, budget: Budget, after: Decision) -> None:
    """Assert what must hold whatever the budget."""
    order = [HOLD, NACK, REPLY]
    assert order.index(after.disposition) >= order.index(before.disposition), "budgets only ever end things sooner"
    assert (after is before) == (after.disposition is before.disposition)
    if after.disposition is HOLD:
        assert not budget.is_draining
        assert budget.lease_left_s > 2.0
        assert budget.deadline_left_s is None or budget.deadline_left_s > 2.0
        assert budget.held_s + 2.0 < (before.hold_max_s or 500.0)
    if after.disposition is NACK:
        counted = budget.delivery_attempt is not None and budget.max_delivery_attempts is not None
        if counted and budget.reply_on_last_attempt:
            assert budget.delivery_attempt < budget.max_delivery_attempts
        if not counted and budget.counted_attempts:
            assert budget.message_age_s <= budget.max_message_age_s
    if after.disposition is not REPLY:
        assert budget.deadline_left_s is None or budget.deadline_left_s > 0
        attempts = max(budget.delivery_attempt or 0, budget.counted_attempts)
        assert before.max_attempts is None or attempts < before.max_attempts or budget.counted_attempts == 0


def test_retry_after_is_a_lower_bound():
    """No wait is shorter than the backend's hint, and a longer backoff stands."""
    rng = random.Random(7)
    asked = a_decision(HOLD, retry_after_s=30.0, backoff=Backoff(base_s=60.0, max_s=60.0))
    delays = [next_delay_s(asked, 1, rng.random()) for _ in range(400)]
    assert min(delays) == 30.0
    assert max(delays) > 50.0
