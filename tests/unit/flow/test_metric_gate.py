"""Which part of a window a metric leaves: at once less, slowly more, and what holds without a reading."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fakeclock import FakeClock
from worker.flow.metric_gate import MetricGate, MetricSignal

WAITING = MetricSignal(name="waiting", whole_at=0.0, closed_at=4.0)
CACHE = MetricSignal(name="cache", whole_at=0.8, closed_at=0.95)


def a_metric_gate(
    clock: FakeClock, *signals: MetricSignal, is_open_without: bool = False, rise_s: float = 0.0
) -> MetricGate:
    return MetricGate(
        signals or (WAITING,), is_open_without=is_open_without, stale_after_s=15.0, rise_s=rise_s, now=clock.now
    )


@pytest.mark.parametrize(
    ("whole_at", "closed_at", "value", "part"),
    [
        (0.0, 4.0, 0.0, 1.0),
        (0.0, 4.0, -1.0, 1.0),
        (0.0, 4.0, 1.0, 0.75),
        (0.0, 4.0, 4.0, 0.0),
        (0.0, 4.0, 400.0, 0.0),
        (0.0, 4.0, math.inf, 0.0),
        (10.0, 2.0, 12.0, 1.0),
        (10.0, 2.0, 6.0, 0.5),
        (10.0, 2.0, 2.0, 0.0),
        (10.0, 2.0, -math.inf, 0.0),
    ],
)
def test_the_part_changes_evenly_between_two_numbers(
    whole_at: float, closed_at: float, value: float, part: float
) -> None:
    """Numbers of a load and numbers of what is free; beyond the two nothing changes."""
    assert MetricSignal(name="a", whole_at=whole_at, closed_at=closed_at).part(value, own=3) == pytest.approx(part)


def test_own_attempts_are_no_load_of_others() -> None:
    """They are subtracted where that is asked for, and a count of others is never below 0."""
    signal = MetricSignal(name="running", whole_at=0.0, closed_at=10.0, is_without_own=True)
    assert signal.part(12.0, own=7) == pytest.approx(0.5)
    assert signal.part(3.0, own=7) == 1.0


def test_the_least_part_counts(clock: FakeClock) -> None:
    """One signal that leaves nothing closes the gate, whatever the other says."""
    gate = a_metric_gate(clock, WAITING, CACHE)
    gate.take([1.0, 0.5], own=0)
    assert gate.part() == 0.75
    gate.take([1.0, 0.97], own=0)
    assert gate.part() == 0.0


def test_the_part_falls_at_once_and_rises_slowly(clock: FakeClock) -> None:
    """From nothing to all in `rise_s`; a fall on the way begins anew from there."""
    gate = a_metric_gate(clock, is_open_without=True, rise_s=10.0)
    gate.take([4.0], own=0)
    assert gate.part() == 0.0
    gate.take([0.0], own=0)
    clock.advance(5.0)
    assert gate.part() == pytest.approx(0.5)
    gate.take([3.0], own=0)
    assert gate.part() == 0.25
    gate.take([0.0], own=0)
    clock.advance(1.0)
    assert gate.part() == pytest.approx(0.35)
    clock.advance(9.0)
    gate.take([0.0], own=0)
    assert gate.part() == 1.0


@pytest.mark.parametrize(("is_open", "side"), [(True, 1.0), (False, 0.0)])
def test_the_configured_side_holds_without_a_recent_reading(clock: FakeClock, *, is_open: bool, side: float) -> None:
    """Before the first one, and again once the last one is too old."""
    gate = a_metric_gate(clock, is_open_without=is_open)
    assert (gate.part(), gate.is_stale, gate.age_s) == (side, True, None)
    gate.take([2.0], own=0)
    clock.advance(15.0)
    assert (gate.part(), gate.is_stale, gate.age_s) == (0.5, False, 15.0)
    clock.advance(0.1)
    assert (gate.part(), gate.is_stale) == (side, True)
    gate.take([2.0], own=0)
    assert (gate.part(), gate.is_stale) == (0.5, False)


def test_an_open_side_is_reached_slowly_too(clock: FakeClock) -> None:
    """What waits does not start all at once because a source went away."""
    gate = a_metric_gate(clock, is_open_without=True, rise_s=10.0)
    gate.take([4.0], own=0)
    parts = []
    for _ in range(18):
        parts.append(gate.part())
        clock.advance(1.0)
    assert parts == pytest.approx([*[0.0] * 16, 0.1, 0.2])


@given(
    st.lists(
        st.tuples(st.floats(0.0, 8.0), st.floats(0.0, 30.0), st.booleans()),
        min_size=1,
        max_size=40,
    )
)
def test_the_part_never_exceeds_what_is_wanted_and_never_leaps_up(steps: list[tuple[float, float, bool]]) -> None:
    """Between 0 and 1, at most the signal's own part while fresh, and a rise no faster than 1 in `rise_s`."""
    clock = FakeClock()
    gate = a_metric_gate(clock, rise_s=10.0)
    before = gate.part()
    for value, seconds, is_read in steps:
        clock.advance(seconds)
        if is_read:
            gate.take([value], own=0)
        part = gate.part()
        assert 0.0 <= part <= 1.0
        assert part <= before + seconds / 10.0 + 1e-9
        if is_read:
            assert part <= WAITING.part(value, 0)
        before = part
