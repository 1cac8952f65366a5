"""What is done with a delivery: every kind of end, with what is left to spend and what is known of the backend."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from worker.policy.backoff import Backoff
from worker.policy.blame import Blame
from worker.policy.budgets import Budget
from worker.policy.judge import (
    CONTRADICTED_PROBE_WAIT_S,
    DEADLINE_MARGIN_S,
    HEALTHY,
    MAX_CONTINUATIONS,
    MAX_COSTLY_OUTAGE_RETRIES,
    MAX_OUTAGE_RETRIES,
    MAX_OWN_FAILURES,
    MAX_RETRY_AFTER_PAUSE_S,
    AttemptEnd,
    BackendHealth,
    Cancelled,
    DeadlinePassed,
    End,
    NoRoute,
    NotAdmitted,
    Unexpected,
    judge,
    report,
)
from worker.policy.model import BreakerAction, Decision, Disposition, ErrorClass, ErrorEvent, Fault, Phase
from worker.policy.table import ROWS

REPLY, NACK, HOLD = Disposition.REPLY, Disposition.NACK, Disposition.HOLD
FIRST = Budget(max_delivery_attempts=5, delivery_attempt=1, lease_left_s=600.0, hold_max_s=600.0)
LAST = structs.replace(FIRST, delivery_attempt=5)
DOWN = BackendHealth(stopped_by=ErrorClass.SERVER_ERROR)
FAILED = Decision(
    disposition=NACK,
    error_class=ErrorClass.SERVER_ERROR,
    rule="builtin:server_error",
    reply_status=500,
    breaker=BreakerAction.COUNT,
    max_attempts=2,
)
GOOD = Decision(disposition=REPLY, breaker=BreakerAction.SUCCESS)
BUSY = replace(FAILED, disposition=HOLD, error_class=ErrorClass.OVERLOADED, is_overload=True)

TRIPPING = replace(BUSY, is_overload=False, breaker=BreakerAction.TRIP)


def an_end(decision: Decision = FAILED, *, event: ErrorEvent | None = None, **changes: Any) -> AttemptEnd:
    """An attempt that ended so, after a look at the others' attempts."""
    event = event or ErrorEvent(backend="b", path="/v1/chat/completions", phase=Phase.BODY, status=500)
    return AttemptEnd(event=event, decision=decision, **({"is_outage_checked": True} | changes))


# Outages.


def test_a_failure_first_waits_for_others_of_its_kind():
    """It is not final: a breaker that opens within a second says that the failure was the backend's."""
    assert judge(an_end(is_outage_checked=False), FIRST).needs_outage_check


def test_a_failure_beside_successes_is_nacked():
    """The breaker stayed closed while it waited."""
    verdict = judge(an_end(), FIRST)
    assert verdict.decision == FAILED
    assert not verdict.is_outage


def test_a_failure_among_failures_is_an_outage():
    """Behind an open breaker it is held, does not count, and no limit of its class applies."""
    spent = structs.replace(FIRST, attempts=2, counted_attempts=2)
    for is_checked in (False, True):
        verdict = judge(an_end(is_outage_checked=is_checked), spent, DOWN)
        assert (verdict.decision.disposition, verdict.decision.max_attempts) == (HOLD, None)
        assert verdict.decision.rule == "builtin:server_error+outage"
        assert verdict.is_outage


@pytest.mark.parametrize(
    ("error_class", "limit"),
    [
        (ErrorClass.SERVER_ERROR, 2 * 5),
        (ErrorClass.CONNECT, 2 * 5),
        (ErrorClass.CONNECTION_LOST, MAX_COSTLY_OUTAGE_RETRIES),
        (ErrorClass.TIMEOUT, MAX_COSTLY_OUTAGE_RETRIES),
        (ErrorClass.MALFORMED, MAX_COSTLY_OUTAGE_RETRIES),
        (ErrorClass.STREAM_BROKEN, MAX_COSTLY_OUTAGE_RETRIES),
    ],
)
def test_outage_retries_run_out(error_class, limit):
    """A failure that was attributed to outages so often is nacked, soon if each may have taken the server down."""
    failed = an_end(replace(FAILED, error_class=error_class, max_attempts=None))
    for failures, expected in ((limit, HOLD), (limit + 1, NACK)):
        again = structs.replace(failed, blame=Blame(failures=failures))
        assert judge(again, FIRST, DOWN).decision.disposition is expected


def test_outage_retries_run_out_where_nothing_is_counted():
    """Without a dead-letter policy there are no delivery attempts to compare them with."""
    uncounted = structs.replace(FIRST, max_delivery_attempts=None, delivery_attempt=None)
    for failures, expected in ((MAX_OUTAGE_RETRIES, HOLD), (MAX_OUTAGE_RETRIES + 1, NACK)):
        again = an_end(FAILED, blame=Blame(failures=failures))
        assert judge(again, uncounted, DOWN).decision.disposition is expected


# Blame.

CONTRADICTED = Blame(failures=1, is_contradicted=True)
OWN = Blame(failures=3, is_contradicted=True, is_served_since=True, failing_share=0.1)


@pytest.mark.parametrize("decision", [FAILED, BUSY, TRIPPING])
def test_what_others_contradict_tells_breaker_and_window_nothing(decision):
    """And the next probe waits a second, so that another message can be it."""
    told = report(an_end(decision, blame=CONTRADICTED), FIRST, is_probe=True)
    assert (told.breaker, told.is_overload, told.pause_s) == (BreakerAction.NONE, False, None)
    assert told.retry_after_s == CONTRADICTED_PROBE_WAIT_S


def test_what_is_a_messages_own_is_no_outage():
    """It is nacked at once, whatever the breaker says."""
    verdict = judge(an_end(FAILED, blame=OWN, is_outage_checked=False), FIRST, DOWN)
    assert (verdict.decision.disposition, verdict.is_outage, verdict.needs_outage_check) == (NACK, False, False)


def test_a_refused_connection_is_no_messages_own():
    """Whoever was served before: it counts for the breaker, and the message is held without spending an attempt."""
    refused = an_end(replace(FAILED, error_class=ErrorClass.CONNECT, disposition=HOLD), blame=OWN)
    assert report(refused, FIRST).breaker is BreakerAction.COUNT
    assert judge(refused, FIRST).decision.disposition is HOLD


def test_what_others_contradict_once_may_be_the_beginning_of_an_outage():
    """What began a little later may have been served before it: the failure waits like any other, then is held."""
    first = an_end(FAILED, blame=CONTRADICTED, is_outage_checked=False)
    assert judge(first, FIRST).needs_outage_check
    verdict = judge(first, FIRST, DOWN)
    assert (verdict.decision.disposition, verdict.is_outage) == (HOLD, True)
    assert judge(structs.replace(first, is_outage_checked=True), FIRST).decision.disposition is NACK


def test_a_failure_that_is_the_messages_own_is_not_held():
    """It goes back to the broker, with the rule saying why; on the last delivery attempt it is answered."""
    verdict = judge(an_end(BUSY, blame=OWN), FIRST)
    assert (verdict.decision.disposition, verdict.decision.rule) == (NACK, f"{BUSY.rule}+own")
    last = judge(an_end(BUSY, blame=OWN), structs.replace(FIRST, delivery_attempt=5))
    assert last.decision.disposition is REPLY


def test_a_single_failure_that_others_contradict_is_held_as_ever():
    """Anything fails once."""
    assert judge(an_end(BUSY, blame=CONTRADICTED), FIRST).decision.disposition is HOLD


def test_an_own_failure_is_answered_where_nothing_counts_delivery_attempts():
    """After so many failures in this process, over all deliveries."""
    uncounted = structs.replace(FIRST, max_delivery_attempts=None, delivery_attempt=None)
    for failures, expected in ((MAX_OWN_FAILURES - 1, NACK), (MAX_OWN_FAILURES, REPLY)):
        blame = structs.replace(OWN, failures=failures)
        for decision in (BUSY, FAILED):
            end = an_end(replace(decision, max_attempts=None), blame=blame)
            assert judge(end, uncounted).decision.disposition is expected


def test_unreadable_answers_are_an_outage_when_others_get_them_too():
    """A proxy whose page says 200: with the breaker open the message is held, and spends no attempt."""
    end = an_end(replace(FAILED, error_class=ErrorClass.MALFORMED))
    verdict = judge(end, FIRST, DOWN)
    assert (verdict.decision.disposition, verdict.is_outage) == (HOLD, True)
    assert judge(structs.replace(end, blame=OWN), FIRST, DOWN).decision.disposition is NACK


@pytest.mark.parametrize("changes", [{"breaker": BreakerAction.NONE}, {"disposition": REPLY}, {"disposition": HOLD}])
def test_only_a_nack_that_tells_the_breaker_may_be_an_outage(changes):
    """Everything else is final at once."""
    decision = replace(FAILED, **changes)
    for health in (HEALTHY, DOWN):
        verdict = judge(an_end(decision, is_outage_checked=False), FIRST, health)
        assert (verdict.decision, verdict.needs_outage_check, verdict.is_outage) == (decision, False, False)


def test_a_drain_attributes_nothing_to_an_outage_and_waits_for_none():
    """What failed is nacked at once."""
    draining = structs.replace(FIRST, is_draining=True)
    for health, is_checked in itertools.product((HEALTHY, DOWN), (False, True)):
        verdict = judge(an_end(is_outage_checked=is_checked), draining, health)
        assert (verdict.decision, verdict.needs_outage_check) == (FAILED, False)


# Continuation.


def test_a_stream_that_can_be_resumed_is_held():
    """The attempt counts like any other: the class's limit has the last word."""
    verdict = judge(an_end(can_resume=True), FIRST)
    assert (verdict.decision.disposition, verdict.decision.rule) == (HOLD, "builtin:server_error+continuation")
    assert verdict.is_continuation
    spent = judge(an_end(can_resume=True), structs.replace(FIRST, attempts=2, counted_attempts=2))
    assert spent.decision.disposition is REPLY


def test_a_stream_is_resumed_so_often():
    """A connection that breaks again and again may hold elsewhere."""
    verdict = judge(an_end(can_resume=True), structs.replace(FIRST, continuations=MAX_CONTINUATIONS))
    assert (verdict.decision.disposition, verdict.is_continuation) == (NACK, False)


def test_behind_an_open_breaker_it_is_an_outage_first():
    """What came is resumed all the same when the backend is back; the attempt does not count."""
    verdict = judge(an_end(can_resume=True), FIRST, DOWN)
    assert (verdict.is_outage, verdict.is_continuation) == (True, False)


# Deadlines.


@pytest.mark.parametrize("left_s", [DEADLINE_MARGIN_S, 0.0, -5.0])
def test_an_attempt_that_the_deadline_cut_says_nothing_about_the_backend(left_s):
    """The breaker learns nothing, and the answer names the deadline."""
    event = ErrorEvent(backend="b", path="/p", phase=Phase.BODY, fault=Fault.TOTAL_TIMEOUT)
    end, budget = an_end(event=event), structs.replace(FIRST, deadline_left_s=left_s)
    assert judge(end, budget).decision.error_class is ErrorClass.DEADLINE_EXCEEDED
    assert report(end, budget).breaker is BreakerAction.NONE


@pytest.mark.parametrize(
    ("event", "left_s"),
    [
        ({"fault": Fault.TOTAL_TIMEOUT}, 10.0),
        ({"fault": Fault.TOTAL_TIMEOUT}, None),
        ({"fault": Fault.TOTAL_TIMEOUT, "status": 500}, 0.01),
        ({"fault": Fault.IDLE_TIMEOUT}, 0.01),
    ],
    ids=["deadline far away", "no deadline", "an error status is the whole truth", "another timeout"],
)
def test_other_timeouts_are_the_backends(event, left_s):
    """They count for the breaker."""
    end = an_end(event=ErrorEvent(backend="b", path="/p", phase=Phase.BODY, **event))
    assert report(end, structs.replace(FIRST, deadline_left_s=left_s)).breaker is BreakerAction.COUNT


def test_a_deadline_that_passed_names_the_last_error_and_uncovers_nothing():
    """What a backend said about credentials stays out of this answer too."""
    auth = replace(FAILED, error_class=ErrorClass.AUTH, message=ROWS[ErrorClass.AUTH].says, expose_backend=False)
    decision = judge(DeadlinePassed(last=auth), FIRST).decision
    assert (decision.disposition, decision.reply_status) == (REPLY, 504)
    assert decision.message == "The request's deadline has passed.  Last error: " + auth.message
    assert (decision.verbatim, decision.expose_backend) == (False, False)
    assert judge(DeadlinePassed(), FIRST).decision.message == "The request's deadline has passed."


# What never came to an attempt, or was cut by the worker.


@pytest.mark.parametrize(
    ("end", "health", "expected"),
    [
        (NotAdmitted(is_draining=True), HEALTHY, (ErrorClass.ABORTED, "builtin:drain")),
        (NotAdmitted(is_draining=True), DOWN, (ErrorClass.SERVER_ERROR, "breaker:server_error")),
        (NotAdmitted(), DOWN, (ErrorClass.SERVER_ERROR, "breaker:server_error")),
        (NotAdmitted(), HEALTHY, (ErrorClass.OVERLOADED, "breaker:overloaded")),
        (NotAdmitted(last=FAILED), HEALTHY, (ErrorClass.SERVER_ERROR, "builtin:server_error")),
        (Cancelled(), HEALTHY, (ErrorClass.ABORTED, "builtin:drain")),
        (Cancelled(last=replace(FAILED, disposition=HOLD)), HEALTHY, (ErrorClass.SERVER_ERROR, "builtin:server_error")),
        (Unexpected(), HEALTHY, (ErrorClass.INTERNAL_ERROR, "builtin:internal_error")),
    ],
)
def test_it_is_nacked_and_on_the_last_attempt_answered_with_the_reason(end, health, expected):
    """The requester learns what kept the request waiting, not only that it waited."""
    first, last = judge(end, FIRST, health).decision, judge(end, LAST, health).decision
    assert (first.disposition, first.error_class, first.rule) == (NACK, *expected)
    assert (last.disposition, last.error_class) == (REPLY, expected[0])
    assert 400 <= last.reply_status <= 599


def test_who_waited_behind_refused_credentials_learns_the_class_only():
    """The backend's words stay covered."""
    decision = judge(NotAdmitted(), LAST, BackendHealth(stopped_by=ErrorClass.AUTH)).decision
    assert (decision.reply_status, decision.expose_backend, decision.verbatim) == (502, False, False)


def test_a_message_that_only_waited_is_not_refused_for_its_age():
    """Where attempts are not counted it is nacked, however old; an exception of the worker's is an attempt."""
    old = structs.replace(FIRST, delivery_attempt=None, attempts=0, counted_attempts=0, message_age_s=1e9)
    assert judge(NotAdmitted(), old, DOWN).decision.disposition is NACK
    assert judge(Unexpected(), old).decision.disposition is REPLY


def test_a_whole_answer_is_given_though_the_attempt_was_cancelled():
    """It is paid for."""
    assert judge(Cancelled(last=GOOD), FIRST).decision is GOOD


def test_no_route_is_a_404():
    """It names model and path."""
    decision = judge(NoRoute(model="m", path="/p"), FIRST).decision
    assert (decision.disposition, decision.reply_status) == (REPLY, 404)
    assert decision.message == "no backend serves model 'm' at /p"


# The wait before the next attempt.


def test_while_the_breaker_is_closed_the_backoff_decides():
    """Full jitter within the decision's bounds, and never before the backend's hint."""
    held = replace(FAILED, disposition=HOLD, max_attempts=None, backoff=Backoff(base_s=1.0, max_s=60.0))
    budget = structs.replace(FIRST, attempts=3)
    delays = [judge(an_end(held), budget, jitter=jitter).delay_s for jitter in (0.0, 0.5, 0.999)]
    assert delays == pytest.approx([0.0, 2.0, 3.996])
    assert judge(an_end(replace(held, retry_after_s=9.0)), budget, jitter=0.5).delay_s == 9.0


@pytest.mark.parametrize(
    ("blame", "delay_s"),
    [
        (Blame(), 9.0),
        (Blame(undecided=3), 0.5),
        (Blame(undecided=3, others_failing=1), 0.5),
        (Blame(undecided=3, others_failing=15), 9.0),
        (Blame(undecided=3, others_failing=1, failing_share=0.2), 0.5),
        (Blame(undecided=3, others_failing=9, failing_share=0.2), 9.0),
    ],
)
def test_a_hint_that_one_of_several_messages_heard_does_not_keep_its_lease(blame, delay_s):
    """It waits as its class does, since its next failure beside the success of others is its own."""
    held = replace(FAILED, disposition=HOLD, max_attempts=None, backoff=Backoff(base_s=1.0, max_s=60.0))
    hinted = an_end(replace(held, retry_after_s=9.0), blame=blame)
    assert judge(hinted, structs.replace(FIRST, attempts=1), jitter=0.5).delay_s == delay_s


def test_behind_an_open_breaker_another_message_is_the_next_probe():
    """What failed waits beyond the probe when others wait, and not at all when it is alone."""
    for jitter in (0.0, 0.9):
        alone = structs.replace(DOWN, next_probe_s=4.0)
        assert judge(an_end(), FIRST, alone, jitter=jitter).delay_s == 0.0
        assert judge(an_end(), FIRST, structs.replace(alone, has_others_waiting=True), jitter=jitter).delay_s >= 4.0


# What the gate is told.


def test_a_success_is_told_as_one():
    """Whatever else stands in the decision."""
    assert report(an_end(GOOD), FIRST).breaker is BreakerAction.SUCCESS


@pytest.mark.parametrize(
    ("is_fresh", "is_probe", "expected"),
    [
        (True, False, BreakerAction.COUNT),
        (False, False, BreakerAction.NONE),
        (False, True, BreakerAction.COUNT),
        (True, True, BreakerAction.COUNT),
    ],
)
def test_a_crowd_that_is_refused_together_is_one_failure(is_fresh, is_probe, expected):
    """Only what the window has not reacted to counts for the breaker, or what decides about an open one."""
    told = report(an_end(BUSY), FIRST, is_refusal_fresh=is_fresh, is_probe=is_probe)
    assert (told.breaker, told.is_overload) == (expected, True)
    other = report(an_end(), FIRST, is_refusal_fresh=is_fresh, is_probe=is_probe)
    assert (other.breaker, other.is_overload) == (BreakerAction.COUNT, False)


def test_a_rule_that_trips_is_heeded_also_for_an_overload():
    """An operator who writes `breaker: trip` gets it, for every refusal."""
    told = report(an_end(replace(BUSY, breaker=BreakerAction.TRIP)), FIRST, is_refusal_fresh=False)
    assert told.breaker is BreakerAction.TRIP


@pytest.mark.parametrize(
    ("hint_s", "pause_s"), [(None, None), (0.0, 0.0), (3.0, 3.0), (3600.0, MAX_RETRY_AFTER_PAUSE_S)]
)
def test_a_retry_after_pauses_the_window_for_a_minute_at_most(hint_s, pause_s):
    """So does the message itself wait."""
    busy = an_end(replace(BUSY, retry_after_s=hint_s), blame=Blame(others_failing=20))
    assert report(busy, FIRST).pause_s == pause_s
    assert judge(busy, FIRST).delay_s == min(hint_s or 0.0, 60.0)
    assert report(an_end(replace(FAILED, retry_after_s=hint_s)), FIRST).pause_s is None


@pytest.mark.parametrize(
    ("others", "share", "undecided", "is_believed"),
    [(0, 0.0, 0, False), (1, 0.0, 0, True), (1, 0.2, 0, False), (5, 0.2, 0, True), (1, 0.0, 9, False)],
)
def test_a_retry_after_is_believed_if_several_hear_it(others, share, undecided, is_believed):
    """One message alone pauses nothing, nor do several that chance explains, or of which those under way may tell."""
    blame = Blame(others_failing=others, failing_share=share, undecided=undecided)
    pause_s = report(an_end(replace(BUSY, retry_after_s=3600.0), blame=blame), FIRST).pause_s
    assert pause_s == (MAX_RETRY_AFTER_PAUSE_S if is_believed else None)


# Laws.

budgets = st.builds(
    Budget,
    max_delivery_attempts=st.sampled_from([None, 5]),
    delivery_attempt=st.sampled_from([None, 1, 4, 5, 9]),
    message_age_s=st.sampled_from([0.0, 1e9]),
    lease_left_s=st.floats(-10, 1e5),
    deadline_left_s=st.none() | st.floats(-10, 1e5),
    held_s=st.floats(0, 1e5),
    hold_max_s=st.floats(0, 1e5),
    attempts=st.integers(1, 40),
    counted_attempts=st.integers(1, 40),
    continuations=st.integers(0, 9),
    is_draining=st.booleans(),
    reply_on_last_attempt=st.booleans(),
)
healths = st.builds(
    BackendHealth,
    stopped_by=st.none() | st.sampled_from(ErrorClass),
    next_probe_s=st.none() | st.floats(-1, 300),
    has_others_waiting=st.booleans(),
)
decisions = st.builds(
    Decision,
    disposition=st.sampled_from(Disposition),
    error_class=st.sampled_from(ErrorClass),
    reply_status=st.sampled_from([400, 429, 500, 503]),
    breaker=st.sampled_from([BreakerAction.NONE, BreakerAction.COUNT, BreakerAction.TRIP]),
    retry_after_s=st.none() | st.floats(0, 1e5),
    max_attempts=st.none() | st.integers(1, 5),
    is_overload=st.booleans(),
)
latest = st.none() | decisions
ends = st.one_of(
    st.builds(an_end, decisions, is_outage_checked=st.booleans(), can_resume=st.booleans()),
    st.builds(NotAdmitted, last=latest, is_draining=st.booleans()),
    st.builds(DeadlinePassed, last=latest),
    st.builds(Cancelled, last=latest),
    st.builds(NoRoute, model=st.none() | st.text(max_size=9), path=st.just("/p")),
    st.just(Unexpected()),
)


@given(end=ends, budget=budgets, health=healths, jitter=st.floats(0, 0.999))
def test_every_end_has_a_sound_verdict(end: End, budget: Budget, health: BackendHealth, jitter: float):
    """A hold fits into lease, deadline and drain; an error is answered as one; the last nack is left by the switch only."""
    verdict = judge(end, budget, health, jitter=jitter)
    decision = verdict.decision
    if verdict.needs_outage_check:
        assert isinstance(end, AttemptEnd)
        assert not judge(structs.replace(end, is_outage_checked=True), budget, health, jitter=jitter).needs_outage_check
        return
    assert decision.error_class is not None
    assert 400 <= decision.reply_status <= 599
    if decision.disposition is HOLD:
        assert isinstance(end, AttemptEnd)
        assert not budget.is_draining
        assert verdict.delay_s < budget.lease_left_s
        assert budget.deadline_left_s is None or verdict.delay_s < budget.deadline_left_s
    is_counted = budget.delivery_attempt is not None and budget.max_delivery_attempts is not None
    if decision.disposition is NACK and is_counted and budget.reply_on_last_attempt:
        assert budget.delivery_attempt < budget.max_delivery_attempts
    if verdict.is_outage:
        assert health.stopped_by is not None
    assert not (verdict.is_outage and verdict.is_continuation)


# Another server of the same route.


ELSEWHERE = BackendHealth(has_untried_target=True)


@pytest.mark.parametrize("stopped_by", [None, ErrorClass.SERVER_ERROR])
def test_another_server_is_tried_at_once(stopped_by: ErrorClass | None) -> None:
    """Without waiting for an outage to show, for a probe or for a backoff; the attempt counts."""
    health = structs.replace(ELSEWHERE, stopped_by=stopped_by, next_probe_s=9.0, has_others_waiting=True)
    verdict = judge(an_end(is_outage_checked=False), FIRST, health)
    assert (verdict.decision.disposition, verdict.delay_s, verdict.is_outage) == (HOLD, 0.0, False)
    assert verdict.decision.rule.endswith("+failover")


@pytest.mark.parametrize(
    "end",
    [
        an_end(replace(FAILED, error_class=ErrorClass.CONNECTION_LOST)),
        an_end(replace(FAILED, error_class=ErrorClass.TIMEOUT)),
        an_end(blame=OWN),
        an_end(GOOD),
    ],
    ids=["connection lost", "timeout", "its own", "an answer"],
)
def test_what_costs_a_server_much_is_not_tried_at_the_next(end: AttemptEnd) -> None:
    """One prompt that takes servers down, or always fails, goes no further."""
    assert "+failover" not in judge(end, FIRST, ELSEWHERE).decision.rule


def test_nothing_is_tried_elsewhere_during_a_drain() -> None:
    """The next pod does it."""
    budget = structs.replace(FIRST, is_draining=True)
    assert judge(an_end(), budget, ELSEWHERE).decision.disposition is NACK
