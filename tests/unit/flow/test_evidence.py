"""What the attempts of a lane say about each other."""

from hypothesis import given
from hypothesis import strategies as st

from worker.flow.evidence import FORBIDDEN_QUIET_S, MAX_FORBIDDEN, MAX_SUSPECTS, Evidence, ForbiddenRow
from worker.policy.blame import Blame


def test_a_success_that_began_before_contradicts_nothing() -> None:
    """The backend may have gone away between the two starts; one that began later shows that it had not."""
    evidence = Evidence()
    evidence.served("a", 1)
    assert not evidence.failed("m", 2).is_contradicted
    evidence.served("b", 3)
    assert evidence.failed("m", 4).is_contradicted


def test_what_had_begun_when_a_message_failed_makes_no_failure_its_own() -> None:
    """At the beginning of an outage it may still be served; what begins afterwards shows that there is no outage."""
    evidence = Evidence()
    evidence.failed("m", 1, latest=5)
    evidence.served("began before the failure was known", 5)
    second = evidence.failed("m", 6)
    assert (second.is_contradicted, second.is_served_since, second.is_own(is_refusal=False)) == (True, False, False)
    evidence.served("began afterwards", 7)
    third = evidence.failed("m", 8)
    assert (third.is_served_since, third.is_own(is_refusal=False)) == (True, True)


def test_failures_are_counted_over_deliveries_until_the_message_is_served() -> None:
    """The message is known again by its key; without a key it is not."""
    evidence = Evidence()
    assert [evidence.failed("m", number).failures for number in (1, 2, 3)] == [1, 2, 3]
    assert evidence.failed(None, 4).failures == evidence.failed(None, 5).failures == 1
    evidence.served("m", 6)
    assert evidence.failed("m", 7).failures == 1


def test_the_share_of_failing_messages_leaves_out_what_nothing_good_followed() -> None:
    """Failures that may be an outage's count once one was served, and then no more than a few of them."""
    evidence = Evidence()
    for number in range(50):
        evidence.failed(str(number), number)
    assert evidence.failing_share == 0.0
    evidence.served("good", 50)
    assert 0.4 < evidence.failing_share < 0.8
    for number in range(51, 200):
        evidence.served(str(number), number)
    assert evidence.failing_share == 0.0


def test_repeats_of_a_message_do_not_raise_the_share() -> None:
    """One message that fails a hundred times is one message."""
    evidence = Evidence()
    for number in range(0, 200, 2):
        evidence.failed("m", number)
        evidence.served(str(number), number + 1)
    assert evidence.failing_share < 0.03


def test_other_messages_that_failed_are_counted_since_the_last_success() -> None:
    """Each once, and never the message itself."""
    evidence = Evidence()
    assert [evidence.failed(key, number).others_failing for number, key in enumerate("aabca")] == [0, 0, 1, 2, 2]
    evidence.served("x", 9)
    assert evidence.failed("a", 10).others_failing == 0


def test_a_message_that_others_contradict_is_in_no_row():
    """It fails again and again, which is no news about the others."""
    evidence = Evidence()
    evidence.failed("m", 1)
    evidence.served("other", 2)
    assert [evidence.failed("m", number).is_contradicted for number in (3, 4)] == [True, True]
    assert evidence.failed("fresh", 5, undecided=7) == Blame(undecided=7, failing_share=1 / 10)


def test_a_message_stands_behind_by_its_failures_until_the_lane_reopens() -> None:
    """What failed in an outage is not behind for it; what it failed before is remembered."""
    evidence = Evidence()
    evidence.failed("m", 1)
    evidence.failed("m", 2)
    assert (evidence.rank("m"), evidence.rank("other"), evidence.rank(None)) == (2, 0, 0)
    evidence.forgive()
    assert evidence.rank("m") == 0
    assert evidence.failed("m", 3).failures == 3


def test_memory_is_bounded() -> None:
    """The message that failed longest ago is forgotten first."""
    evidence = Evidence()
    for number in range(MAX_SUSPECTS + 10):
        evidence.failed(str(number), number)
    assert evidence.rank("0") == 0
    assert evidence.rank(str(MAX_SUSPECTS + 9)) == 1
    assert len(evidence._suspects) == MAX_SUSPECTS


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=200))
def test_whatever_happens_the_share_is_one_and_the_counts_fit(history: list[tuple[bool, int]]) -> None:
    """The share stays between 0 and 1; the running count is that of the remembered attempts."""
    evidence = Evidence()
    for number, (is_served, key) in enumerate(history):
        if is_served:
            evidence.served(str(key), number)
        else:
            blame = evidence.failed(str(key), number)
            assert blame.failures >= 1
        assert 0.0 <= evidence.failing_share < 1.0
        assert evidence._failed_first == sum(evidence._first_attempts)


def a_row(*refused: tuple[str | None, str]) -> ForbiddenRow:
    row = ForbiddenRow()
    for model, path in refused:
        row.forbidden(model, path)
    return row


def test_a_row_of_403s_counts_each_model_and_path_once() -> None:
    """One requester is refused as often as it asks for what it may not have."""
    assert a_row(*[("m", "/a")] * 50).length("m", "/a", 0.0) == 1
    assert a_row(("m", "/a"), ("m", "/b")).length("n", "/a", 0.0) == 3
    assert a_row((None, "/a"), ("", "/a")).length(None, "/a", 0.0) == 2


def test_a_success_ends_a_row_of_403s_and_none_begins_within_a_minute() -> None:
    """The credentials are good; those refused within that minute count once it is over."""
    row = a_row(("k", "/a"), ("l", "/a"))
    row.served(100.0)
    assert row.length("m", "/a", 100.0 + FORBIDDEN_QUIET_S) == 1
    row.forbidden("k", "/a")
    row.forbidden("l", "/a")
    assert row.length("m", "/a", 99.9 + FORBIDDEN_QUIET_S) == 0
    assert row.length("m", "/a", 100.0 + FORBIDDEN_QUIET_S) == 3


def test_a_row_of_403s_remembers_few_names() -> None:
    """Requesters choose them."""
    row = a_row(*((str(number), "/a") for number in range(1000)))
    assert row.length("m", "/a", 0.0) == MAX_FORBIDDEN + 1
