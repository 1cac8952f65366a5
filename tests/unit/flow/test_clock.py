"""The event loop's clock, and the one the tests use instead."""

import asyncio

from tests.support.fakeclock import FakeClock
from tests.support.virtual_time import virtual_time
from worker.flow.clock import LoopClock, wait_for


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


@virtual_time
async def test_a_wait_ends_with_the_event_or_with_its_time():
    """Whichever is first, and without an error."""
    loop = asyncio.get_running_loop()
    started, event = loop.time(), asyncio.Event()
    loop.call_later(3, event.set)
    await wait_for(event, 2)
    assert (loop.time() - started, event.is_set()) == (2, False)
    await wait_for(event, 10)
    assert loop.time() - started == 3
    await wait_for(event, 10)
    assert loop.time() - started == 3


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
