"""The share of one error class among the answers of the last minutes."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fakeclock import FakeClock
from worker.telemetry.error_share import BUCKETS, DominantError, ErrorShare


def a_share(clock: FakeClock, *answers: str | None, window_s: float = 300.0) -> ErrorShare:
    share = ErrorShare(window_s, now=clock.now)
    for answer in answers:
        share.add(answer)
    return share


def test_the_dominant_class_is_a_share_of_all_answers(clock):
    """Good answers count below the line."""
    share = a_share(clock, "auth", "auth", "timeout", None)
    assert share.dominant() == DominantError("auth", 0.5, 2)
    assert share.answers == 4


def test_without_errors_nothing_dominates(clock):
    """Neither in silence nor among good answers only."""
    assert a_share(clock).dominant() is None
    assert a_share(clock, None, None).dominant() is None


def test_equals_are_ordered_by_name(clock):
    """The same answers give the same line in the log."""
    dominant = a_share(clock, "timeout", "auth").dominant()
    assert dominant is not None
    assert dominant.error_class == "auth"


def test_old_answers_are_forgotten(clock):
    """After the window nothing is left of them."""
    share = a_share(clock, *["auth"] * 10)
    clock.advance(150.0)
    share.add(None)
    assert share.dominant() == DominantError("auth", 10 / 11, 10)
    clock.advance(150.0 + 300.0 / BUCKETS)
    assert share.dominant() is None
    assert share.answers == 1


def test_memory_is_bounded_by_time_not_by_answers(clock):
    """A million answers need no more than the buckets."""
    share = a_share(clock)
    for _ in range(10_000):
        share.add("auth")
        clock.advance(1.0)
    assert len(share._buckets) <= BUCKETS


def test_a_window_is_positive(clock):
    """Nothing is measured over no time."""
    with pytest.raises(ValueError, match="window_s"):
        ErrorShare(0.0, now=clock.now)


@given(st.lists(st.tuples(st.floats(0, 30), st.sampled_from([None, "a", "b"])), max_size=80))
def test_it_agrees_with_counting_everything(events):
    """Up to the width of one bucket, against the naive way."""
    clock = FakeClock(0.0)
    share = ErrorShare(60.0, now=clock.now)
    seen: list[tuple[float, str | None]] = []
    for pause, answer in events:
        clock.advance(pause)
        share.add(answer)
        seen.append((clock.now(), answer))
        width = 60.0 / BUCKETS
        at_most = Counter(name for at, name in seen if at > clock.now() - 60.0 - 1e-9)
        at_least = Counter(name for at, name in seen if at > clock.now() - 60.0 + width)
        assert at_least.total() <= share.answers <= at_most.total()
        dominant = share.dominant()
        if dominant is not None:
            assert at_least[dominant.error_class] <= dominant.count <= at_most[dominant.error_class]
