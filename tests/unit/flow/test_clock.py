"""The event loop's clock, and the one the tests use instead."""

import asyncio

from tests.support.fakeclock import FakeClock
from worker.flow.clock import LoopClock


async def test_the_loops_clock_is_monotonic_and_its_timers_run():
    """A timer at `now` runs soon, a cancelled one never."""
    clock = LoopClock()
    before = clock.now()
    ran: list[str] = []
    done = asyncio.Event()
    clock.call_at(before, lambda: ran.append("cancelled")).cancel()
    clock.call_at(before, done.set)
    await asyncio.wait_for(done.wait(), 5)
    assert clock.now() >= before
    assert ran == []


def test_the_fake_clock_runs_timers_in_order_at_their_instants():
    """Each sees its own time; what they schedule within the step runs too."""
    clock = FakeClock(0.0)
    seen: list[tuple[str, float]] = []
    clock.call_at(2.0, lambda: seen.append(("b", clock.now())))
    clock.call_at(1.0, lambda: (seen.append(("a", clock.now())), clock.call_at(1.5, lambda: seen.append(("c", 1.5)))))
    clock.call_at(1.0, lambda: seen.append(("never", 0.0))).cancel()
    clock.advance(3.0)
    assert seen == [("a", 1.0), ("c", 1.5), ("b", 2.0)]
    assert (clock.now(), clock.pending()) == (3.0, 0)
