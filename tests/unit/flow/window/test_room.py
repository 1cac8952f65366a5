"""How a limit takes effect in time: poured out, dipped, closed, bounded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fakeclock import FakeClock
from worker.flow.window.room import Room


def a_room(clock: FakeClock, limit: int = 8, minimum: int = 1, maximum: int = 64) -> Room:
    return Room(limit, minimum, maximum, now=clock.now)


def test_growth_is_poured_out_evenly(clock):
    """Half of the time gives half of the difference; afterwards all of it."""
    room = a_room(clock)
    assert room.grow(16.0, 1.0)
    assert room.current() == 8
    clock.advance(0.5)
    assert room.current() == 12
    clock.advance(0.5)
    assert room.current() == 16


def test_the_next_place_is_announced_exactly(clock):
    """`opens_at` is the instant at which one more may start, and not before."""
    room = a_room(clock)
    room.grow(16.0, 1.0)
    for in_flight in range(8, 16):
        at = room.opens_at(in_flight)
        assert at is not None
        clock.advance(at - clock.now() - 1e-3)
        assert not room.has_room(in_flight)
        clock.advance(1.1e-3)
        assert room.has_room(in_flight)
    assert room.opens_at(16) is None


def test_there_is_nothing_to_announce_where_there_is_room_or_never_will_be(clock):
    """With room, and at the final limit, no instant is named."""
    room = a_room(clock)
    assert room.opens_at(3) is None
    assert room.opens_at(8) is None


def test_a_decrease_ends_the_pouring(clock):
    """What was being given out is not given out after a decrease."""
    room = a_room(clock)
    room.grow(64.0, 1.0)
    room.set(4.0)
    clock.advance(1.0)
    assert room.current() == 4


def test_closing_gives_no_room_and_the_later_instant_wins(clock):
    """A shorter Retry-After does not shorten a longer one."""
    room = a_room(clock)
    room.close(clock.now() + 5.0)
    room.close(clock.now() + 2.0)
    assert not room.has_room(0)
    assert room.opens_at(0) == clock.now() + 5.0
    clock.advance(5.0)
    assert room.has_room(0)
    assert room.closed_until is None


def test_after_closing_the_room_is_poured_out(clock):
    """No stampede at the end of a Retry-After."""
    room = a_room(clock)
    room.close(clock.now() + 5.0)
    room.pour(0.0, 1.0)
    clock.advance(5.0)
    assert room.current() == 1
    clock.advance(0.5)
    assert room.current() == 4
    clock.advance(0.5)
    assert room.current() == 8


def test_a_dip_lowers_the_room_and_not_the_limit(clock):
    """It ends without a trace."""
    room = a_room(clock)
    room.dip(2.5)
    assert (room.current(), room.final(), room.limit, room.dipped) == (5, 5, 8.0, True)
    room.dip(0.0)
    assert (room.current(), room.dipped) == (8, False)


def test_one_place_remains_whatever_the_dip(clock):
    """Below the minimum nothing would ever tell that capacity is back."""
    room = a_room(clock, limit=1)
    room.dip(0.9)
    assert room.current() == 1


def test_bounds_move_the_limit(clock):
    """A limit outside the new bounds is moved to the nearer one."""
    room = a_room(clock)
    room.set_bounds(10, 20)
    assert (room.current(), room.minimum, room.maximum) == (10, 10, 20)
    room.set_bounds(1, 4)
    assert room.current() == 4


@pytest.mark.parametrize("bounds", [(0, 8, 8), (9, 8, 64), (1, 8, 7)])
def test_impossible_bounds_are_refused(clock, bounds):
    """1 <= minimum <= initial <= maximum, at the start and later."""
    minimum, limit, maximum = bounds
    with pytest.raises(ValueError, match="minimum"):
        Room(limit, minimum, maximum, now=clock.now)
    with pytest.raises(ValueError, match="minimum"):
        a_room(clock).set_bounds(5, 4)


@given(
    st.lists(
        st.tuples(st.sampled_from(["grow", "set", "dip", "pour", "close", "wait"]), st.floats(0, 100)), max_size=30
    )
)
def test_the_room_stays_within_its_bounds(steps):
    """Whatever is done, 2 <= current <= 50, and an announced instant really gives room."""
    clock = FakeClock()
    room = Room(8, 2, 50, now=clock.now)
    for verb, value in steps:
        match verb:
            case "grow":
                room.grow(value, 1.0)
            case "set":
                room.set(value)
            case "dip":
                room.dip(value)
            case "pour":
                room.pour(value / 10.0, 1.0)
            case "close":
                room.close(clock.now() + value / 10.0)
            case _:
                clock.advance(value / 10.0)
        assert 2 <= room.current() <= 50
        at = room.opens_at(room.current())
        if at is not None:
            clock.advance(max(0.0, at - clock.now()))
            assert room.closed_until is None
