"""How a limit takes effect over time: it ramps up, probes down, is closed by a pause, and keeps its bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fakeclock import FakeClock
from worker.flow.window.ramped_limit import RampedLimit


def a_limit(clock: FakeClock, limit: int = 8, minimum: int = 1, maximum: int = 64) -> RampedLimit:
    return RampedLimit(limit, minimum, maximum, now=clock.now)


def test_growth_takes_effect_evenly(clock):
    """After half of the time, half of the difference is there; at its end, all of it."""
    limit = a_limit(clock)
    assert limit.grow(16.0, 1.0)
    assert limit.current() == 8
    clock.advance(0.5)
    assert limit.current() == 12
    clock.advance(0.5)
    assert limit.current() == 16


def test_the_next_start_is_announced_exactly(clock):
    """One more request may start at `opens_at` and not before."""
    limit = a_limit(clock)
    limit.grow(16.0, 1.0)
    for in_flight in range(8, 16):
        at = limit.opens_at(in_flight)
        assert at is not None
        clock.advance(at - clock.now() - 1e-3)
        assert not limit.has_room(in_flight)
        clock.advance(1.1e-3)
        assert limit.has_room(in_flight)
    assert limit.opens_at(16) is None


def test_no_start_is_announced_with_room_or_at_the_end_of_the_ramp(clock):
    """Where time alone changes nothing, `opens_at` is `None`."""
    limit = a_limit(clock)
    assert limit.opens_at(3) is None
    assert limit.opens_at(8) is None


def test_a_decrease_ends_the_ramp(clock):
    """Growth that has not taken effect yet never does."""
    limit = a_limit(clock)
    limit.grow(64.0, 1.0)
    limit.set(4.0)
    clock.advance(1.0)
    assert limit.current() == 4


def test_closing_gives_no_room_and_the_later_instant_wins(clock):
    """A shorter pause does not shorten a longer one."""
    limit = a_limit(clock)
    limit.close(clock.now() + 5.0)
    limit.close(clock.now() + 2.0)
    assert not limit.has_room(0)
    assert limit.opens_at(0) == clock.now() + 5.0
    clock.advance(5.0)
    assert limit.has_room(0)
    assert limit.closed_until is None


def test_after_a_pause_the_limit_ramps_up(clock):
    """The end of a pause causes no burst."""
    limit = a_limit(clock)
    limit.close(clock.now() + 5.0)
    limit.ramp_up(0.0, 1.0)
    clock.advance(5.0)
    assert limit.current() == 1
    clock.advance(0.5)
    assert limit.current() == 4
    clock.advance(0.5)
    assert limit.current() == 8


def test_probing_down_lowers_the_limit_and_not_its_target(clock):
    """The end restores the limit as it was."""
    limit = a_limit(clock)
    limit.probe_down(2.5)
    assert (limit.current(), limit.after_ramp(), limit.target, limit.is_probing_down) == (5, 5, 8.0, True)
    limit.probe_down(0.0)
    assert (limit.current(), limit.is_probing_down) == (8, False)


def test_one_request_may_run_however_deep_the_probe(clock):
    """Below the minimum no attempt would ever show that capacity is back."""
    limit = a_limit(clock, limit=1)
    limit.probe_down(0.9)
    assert limit.current() == 1


@pytest.mark.parametrize("bounds", [(0, 8, 8), (9, 8, 64), (1, 8, 7)])
def test_impossible_bounds_are_refused(clock, bounds):
    """1 <= minimum <= initial <= maximum."""
    minimum, limit, maximum = bounds
    with pytest.raises(ValueError, match="minimum"):
        RampedLimit(limit, minimum, maximum, now=clock.now)


@given(
    st.lists(
        st.tuples(st.sampled_from(["grow", "set", "probe_down", "ramp_up", "close", "wait"]), st.floats(0, 100)),
        max_size=30,
    )
)
def test_the_limit_stays_within_its_bounds(steps):
    """Whatever is done, 2 <= current <= 50, and an announced instant is one at which the pause is over."""
    clock = FakeClock()
    limit = RampedLimit(8, 2, 50, now=clock.now)
    for verb, value in steps:
        match verb:
            case "grow":
                limit.grow(value, 1.0)
            case "set":
                limit.set(value)
            case "probe_down":
                limit.probe_down(value)
            case "ramp_up":
                limit.ramp_up(value / 10.0, 1.0)
            case "close":
                limit.close(clock.now() + value / 10.0)
            case _:
                clock.advance(value / 10.0)
        assert 2 <= limit.current() <= 50
        at = limit.opens_at(limit.current())
        if at is not None:
            clock.advance(max(0.0, at - clock.now()))
            assert limit.closed_until is None
