"""When a failure is a message's own, and how long a row has to be to speak against the backend."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.policy.blame import MAX_ROW, ROW_CHANCE, UNKNOWN, Blame, is_in_doubt, is_outlasted, speaks_against_backend

shares = st.floats(0.0, 1.0)


@given(st.integers(1, 100), shares)
def test_what_no_success_contradicts_is_never_a_messages_own(failures: int, share: float) -> None:
    """An outage looks the same to each of its messages, however often it fails."""
    assert not Blame(failures=failures, failing_share=share).is_own(is_refusal=False)


@given(st.integers(1, 100), shares)
def test_more_failures_never_speak_for_a_message(failures: int, share: float) -> None:
    """Once its failures are its own, one more does not change that."""
    before = Blame(failures=failures, is_contradicted=True, is_served_since=True, failing_share=share)
    after = Blame(failures=failures + 1, is_contradicted=True, is_served_since=True, failing_share=share)
    for is_refusal in (False, True):
        assert after.is_own(is_refusal=is_refusal) or not before.is_own(is_refusal=is_refusal)


def test_a_first_failure_is_never_a_messages_own() -> None:
    """Anything fails once."""
    assert not UNKNOWN.is_own(is_refusal=False)
    assert not Blame(is_contradicted=True, is_served_since=True).is_own(is_refusal=False)


@pytest.mark.parametrize(
    ("share", "failures", "is_refusal"),
    [
        (0.0, 2, False),
        (0.05, 2, False),
        (0.2, 3, False),
        (0.5, 7, False),
        (0.0, 3, True),
        (0.05, 3, True),
        (0.5, 7, True),
    ],
)
def test_the_more_messages_fail_the_more_failures_it_takes(share: float, failures: int, is_refusal: bool) -> None:
    """Where many fail by chance, a message may fail a few times by chance; refusals come in bursts."""
    blames = [
        Blame(failures=count, is_contradicted=True, is_served_since=True, failing_share=share) for count in range(1, 20)
    ]
    own = [blame.is_own(is_refusal=is_refusal) for blame in blames]
    assert own.index(True) + 1 == failures


def row_length(share: float, least: int, undecided: int = 0) -> int:
    """Return the shortest row that speaks against the backend."""
    longest = MAX_ROW + undecided
    return next(row for row in range(longest + 1) if speaks_against_backend(row, least, share, undecided))


@given(shares, shares, st.integers(1, 10), st.integers(0, 100))
def test_a_row_grows_with_the_share_and_is_bounded(low: float, high: float, least: int, undecided: int) -> None:
    """Never shorter than without failures, never longer than the bound."""
    low, high = min(low, high), max(low, high)
    assert least <= row_length(low, least, undecided) <= row_length(high, least, undecided)
    assert row_length(high, least, undecided) <= MAX_ROW + undecided


@given(shares, st.integers(1, 10), st.integers(0, 100), st.integers(0, 100))
def test_a_row_grows_with_what_is_undecided(share: float, least: int, few: int, many: int) -> None:
    """Failures that end first, of many attempts that began together, are no row."""
    few, many = min(few, many), max(few, many)
    assert row_length(share, least, few) <= row_length(share, least, many)


@given(shares, st.integers(1, 10), st.integers(0, 100))
def test_a_longer_row_speaks_too(share: float, least: int, undecided: int) -> None:
    """Once it speaks, each further failure leaves it so."""
    speaks = [speaks_against_backend(row, least, share, undecided) for row in range(MAX_ROW + undecided + 5)]
    assert speaks == sorted(speaks)


@given(st.floats(0.01, 0.8), st.integers(1, 10), st.integers(0, 30))
def test_chance_does_not_explain_a_row(share: float, least: int, undecided: int) -> None:
    """So many failures are as improbable as they are said to be, by the exact distribution."""
    row = row_length(share, least, undecided)
    if row == MAX_ROW + undecided:
        return
    n = row + undecided
    tail = sum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(row, n + 1))
    assert tail <= ROW_CHANCE * (1 + 1e-9)


@pytest.mark.parametrize(
    ("share", "undecided", "row"),
    [
        (0.0, 0, 2),
        (0.0, 100, 2),
        (0.05, 0, 4),
        (0.2, 0, 6),
        (0.2, 16, 19),
        (0.2, 60, 39),
        (0.5, 0, 14),
        (1.0, 0, 64),
        (0.2, 200, 89),
    ],
)
def test_the_row_that_opens_a_breaker_at_some_shares(share: float, undecided: int, row: int) -> None:
    """What an operator sees."""
    assert row_length(share, 2, undecided) == row


@pytest.mark.parametrize(
    ("row", "share", "undecided", "is_doubtful"),
    [(2, 0.0, 0, False), (2, 0.0, 1, True), (2, 0.0, 14, True), (13, 0.0, 3, False), (2, 0.3, 14, False)],
)
def test_what_is_under_way_may_tell_what_a_row_is(row: int, share: float, undecided: int, *, is_doubtful: bool) -> None:
    """As long as little is known of the share that fails, and unless nearly all have failed."""
    assert is_in_doubt(row, share, undecided) is is_doubtful


@pytest.mark.parametrize(
    ("row", "share", "outlasting", "is_chance"),
    [
        (2, 0.0, 0, False),
        (3, 0.0, 1, True),
        (5, 0.0, 1, False),
        (5, 0.0, 2, True),
        (20, 0.0, 32, False),
        (20, 0.0, 33, True),
        (20, 0.5, 10, True),
    ],
)
def test_a_row_that_many_outlast_may_be_chance(row: int, share: float, outlasting: int, *, is_chance: bool) -> None:
    """Where up to a fifth fails at once, and answers take long; none outlasts a row when all fail."""
    assert is_outlasted(row, share, outlasting) is is_chance
