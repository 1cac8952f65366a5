"""When a failure is a message's own, and how long a row has to be to speak against the backend."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.policy.blame import MAX_ROW, ROW_CHANCE, UNKNOWN, Blame, row_length

shares = st.floats(0.0, 1.0)


@given(st.integers(1, 100), shares)
def test_what_no_success_contradicts_is_never_a_messages_own(failures: int, share: float) -> None:
    """An outage looks the same to each of its messages, however often it fails."""
    assert not Blame(failures=failures, failing_share=share).is_own


@given(st.integers(1, 100), shares)
def test_more_failures_never_speak_for_a_message(failures: int, share: float) -> None:
    """Once its failures are its own, one more does not change that."""
    before = Blame(failures=failures, is_contradicted=True, failing_share=share)
    after = Blame(failures=failures + 1, is_contradicted=True, failing_share=share)
    assert after.is_own or not before.is_own


def test_a_first_failure_is_never_a_messages_own() -> None:
    """Anything fails once."""
    assert not UNKNOWN.is_own
    assert not Blame(is_contradicted=True).is_own


@pytest.mark.parametrize(("share", "failures"), [(0.0, 2), (0.05, 2), (0.2, 3), (0.5, 7)])
def test_the_more_messages_fail_the_more_failures_it_takes(share: float, failures: int) -> None:
    """Where many fail by chance, a message may fail a few times by chance."""
    own = [Blame(failures=count, is_contradicted=True, failing_share=share).is_own for count in range(1, 20)]
    assert own.index(True) + 1 == failures


@given(shares, shares, st.integers(1, 10))
def test_a_row_grows_with_the_share_and_is_bounded(low: float, high: float, least: int) -> None:
    """Never shorter than without failures, never longer than the bound."""
    low, high = min(low, high), max(low, high)
    assert least <= row_length(low, least) <= row_length(high, least) <= MAX_ROW


@given(st.floats(0.01, 0.8), st.integers(1, 10))
def test_chance_does_not_explain_a_row(share: float, least: int) -> None:
    """So many failures in a row are as improbable as they are said to be."""
    assert share ** row_length(share, least) <= ROW_CHANCE * (1 + 1e-9)
