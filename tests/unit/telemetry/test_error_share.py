"""The share of one error class among the answers of the last minutes."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fakeclock import FakeClock
from worker.telemetry.error_share import BUCKETS, Damage, DamageMeter


def a_meter(clock: FakeClock, *answers: str | None, horizon_s: float = 300.0) -> DamageMeter:
    meter = DamageMeter(horizon_s, now=clock.now)
    for answer in answers:
        meter.add(answer)
    return meter


def test_the_dominant_class_is_a_share_of_all_answers(clock):
    """Good answers count below the line."""
    meter = a_meter(clock, "auth", "auth", "timeout", None)
    assert meter.dominant() == Damage("auth", 0.5, 2)
    assert meter.answers == 4


def test_without_errors_nothing_dominates(clock):
    """Neither in silence nor among good answers only."""
    assert a_meter(clock).dominant() is None
    assert a_meter(clock, None, None).dominant() is None


def test_equals_are_ordered_by_name(clock):
    """The same answers give the same line in the log."""
    dominant = a_meter(clock, "timeout", "auth").dominant()
    assert dominant is not None
    assert dominant.error_class == "auth"


def test_a_limit_is_exceeded_by_share_and_number(clock):
    """Exactly the limit is borne; a few errors prove nothing."""
    meter = a_meter(clock, "auth", None)
    assert not meter.exceeds(0.5, 1)
    assert meter.exceeds(0.49, 1)
    assert not meter.exceeds(0.49, 2)
    assert not a_meter(clock).exceeds(0.0, 0)


def test_old_answers_are_forgotten(clock):
    """After the sliding time nothing is left of them."""
    meter = a_meter(clock, *["auth"] * 10)
    clock.advance(150.0)
    meter.add(None)
    assert meter.dominant() == Damage("auth", 10 / 11, 10)
    clock.advance(150.0 + 300.0 / BUCKETS)
    assert meter.dominant() is None
    assert meter.answers == 1


def test_clear_forgets_everything(clock):
    """An operator has looked and lets it go on."""
    meter = a_meter(clock, "auth")
    meter.clear()
    assert (meter.dominant(), meter.answers) == (None, 0)


def test_memory_is_bounded_by_time_not_by_answers(clock):
    """A million answers need no more than the buckets."""
    meter = a_meter(clock)
    for _ in range(10_000):
        meter.add("auth")
        clock.advance(1.0)
    assert len(meter._buckets) <= BUCKETS


def test_a_horizon_is_positive(clock):
    """Nothing is measured over no time."""
    with pytest.raises(ValueError, match="horizon_s"):
        DamageMeter(0.0, now=clock.now)


@given(st.lists(st.tuples(st.floats(0, 30), st.sampled_from([None, "a", "b"])), max_size=80))
def test_it_agrees_with_counting_everything(events):
    """Up to the width of one bucket, against the naive way."""
    clock = FakeClock(0.0)
    meter = DamageMeter(60.0, now=clock.now)
    seen: list[tuple[float, str | None]] = []
    for pause, answer in events:
        clock.advance(pause)
        meter.add(answer)
        seen.append((clock.now(), answer))
        width = 60.0 / BUCKETS
        at_most = Counter(name for at, name in seen if at > clock.now() - 60.0 - 1e-9)
        at_least = Counter(name for at, name in seen if at > clock.now() - 60.0 + width)
        assert at_least.total() <= meter.answers <= at_most.total()
        dominant = meter.dominant()
        if dominant is not None:
            assert at_least[dominant.error_class] <= dominant.count <= at_most[dominant.error_class]
