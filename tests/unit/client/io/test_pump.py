"""The thread for blocking calls, the output that is fed from the event loop, and the bound of unanswered lines."""

import asyncio
import threading

import pytest

from worker.client.errors import OutputError
from worker.client.io.lane import Lane
from worker.client.io.pump import OutputPump
from worker.client.slots import Slots


class Sink:
    """Keeps what is written; blocks while its gate is shut."""

    def __init__(self):
        self.writes = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.failure = None

    def write(self, data):
        self.entered.set()
        self.gate.wait()
        if self.failure is not None:
            raise self.failure
        self.writes.append(data)


async def until(event):
    """Wait for a thread's event without blocking the loop."""
    await asyncio.to_thread(event.wait, 10)


async def test_lane_returns_and_raises():
    """A call's result and its exception come back to whoever awaits it."""
    lane = Lane("test")
    assert await lane.call(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await lane.call(divmod, 1, 0)
    lane.close()


async def test_lane_makes_one_call_at_a_time_in_order():
    """Calls are made one after the other, in the order they were asked for, on one thread."""
    lane = Lane("test")
    seen = []

    def note(number):
        seen.append((number, threading.current_thread().name, threading.current_thread().daemon))

    await asyncio.gather(*(lane.call(note, number) for number in range(20)))
    assert seen == [(number, "test", True) for number in range(20)]
    lane.close()


async def test_cancelled_call_does_not_disturb_the_next():
    """A result that nobody waits for any more is dropped."""
    lane = Lane("test")
    gate = threading.Event()
    blocked = asyncio.ensure_future(lane.call(gate.wait))
    await asyncio.sleep(0)
    blocked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await blocked
    gate.set()
    assert await lane.call(lambda: 5) == 5
    lane.close()


def test_call_that_outlives_the_loop_ends_quietly():
    """A read that blocks for ever does not keep the program, nor raise when it returns after the loop's end."""
    gate = threading.Event()
    lane = Lane("test")

    async def main():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(lane.call(gate.wait), 0)

    asyncio.run(main())
    gate.set()
    lane.close()
    lane._thread.join(10)
    assert not lane._thread.is_alive()


async def test_lines_that_arrive_during_a_write_go_out_together():
    """One write a burst: what comes while a write is under way is joined into the next."""
    sink = Sink()
    sink.gate.clear()
    pump = OutputPump(sink)
    done = []
    puts = [asyncio.ensure_future(pump.put(b"0\n", lambda: done.append(0)))]
    await until(sink.entered)
    puts += [asyncio.ensure_future(pump.put(b"%d\n" % n, lambda n=n: done.append(n))) for n in range(1, 5)]
    await asyncio.sleep(0)
    assert not any(put.done() for put in puts)
    assert done == []
    sink.gate.set()
    await asyncio.gather(*puts)
    assert sink.writes == [b"0\n", b"1\n2\n3\n4\n"]
    assert done == [0, 1, 2, 3, 4]
    assert await pump.aclose(1)


async def test_large_lines_are_not_joined():
    """The copy that joining makes is bounded."""
    sink = Sink()
    sink.gate.clear()
    pump = OutputPump(sink)
    line = b"x" * 3_000_000 + b"\n"
    puts = [asyncio.ensure_future(pump.put(line, lambda: None)) for _ in range(4)]
    await until(sink.entered)
    sink.gate.set()
    await asyncio.gather(*puts)
    assert [len(data) for data in sink.writes] == [len(line)] * 4
    assert await pump.aclose(1)


async def test_cancelled_put_is_written_all_the_same():
    """Cancelling whoever waits does not take the line back, and it still counts as written."""
    sink = Sink()
    sink.gate.clear()
    pump = OutputPump(sink)
    done = []
    first = asyncio.ensure_future(pump.put(b"1\n", lambda: done.append(1)))
    await until(sink.entered)
    second = asyncio.ensure_future(pump.put(b"2\n", lambda: done.append(2)))
    await asyncio.sleep(0)
    first.cancel()
    second.cancel()
    await asyncio.wait({first, second})
    sink.gate.set()
    assert await pump.aclose(10)
    assert b"".join(sink.writes) == b"1\n2\n"
    assert done == [1, 2]


async def test_failure_reaches_everybody():
    """A failed write fails the lines of its batch, those behind it, later ones, and whoever watches."""
    sink = Sink()
    sink.gate.clear()
    sink.failure = OutputError("out.jsonl: No space left on device")
    pump = OutputPump(sink)
    watching = asyncio.ensure_future(pump.watch())
    written = []
    puts = [asyncio.ensure_future(pump.put(b"1\n", lambda: written.append(1)))]
    await until(sink.entered)
    puts.append(asyncio.ensure_future(pump.put(b"2\n", lambda: written.append(2))))
    await asyncio.sleep(0)
    sink.gate.set()
    for outcome in await asyncio.gather(*puts, watching, return_exceptions=True):
        assert isinstance(outcome, OutputError)
    with pytest.raises(OutputError, match="No space left"):
        await pump.put(b"3\n", lambda: written.append(3))
    assert written == []
    assert not await pump.aclose(1)


async def test_blocked_output_is_given_up_after_the_grace():
    """Closing does not wait for ever on a pipe that nobody empties."""
    sink = Sink()
    sink.gate.clear()
    pump = OutputPump(sink)
    put = asyncio.ensure_future(pump.put(b"1\n", lambda: None))
    await until(sink.entered)
    assert not await pump.aclose(0)
    put.cancel()
    sink.gate.set()


async def test_slots_bound_number_and_bytes():
    """Entering waits while there are too many lines or too many bytes inside."""
    slots = Slots(2, 100)
    await slots.enter(60)
    third = asyncio.ensure_future(slots.enter(60))
    await asyncio.sleep(0)
    assert not third.done()
    slots.leave(60)
    await third
    await slots.enter(10)
    fourth = asyncio.ensure_future(slots.enter(1))
    await asyncio.sleep(0)
    assert not fourth.done()
    slots.leave(10)
    await fourth
    assert (slots.count, slots.bytes) == (2, 61)


async def test_slots_let_one_large_line_in():
    """A line larger than the bound enters when it is alone."""
    slots = Slots(5, 100)
    await slots.enter(1000)
    other = asyncio.ensure_future(slots.enter(0))
    await asyncio.sleep(0)
    assert not other.done()
    slots.leave(1000)
    await other


async def test_slots_tell_when_they_are_empty():
    """`empty` returns when the last one has left, at once when nobody is inside."""
    slots = Slots(2, 100)
    await slots.empty()
    await slots.enter(1)
    waiting = asyncio.ensure_future(slots.empty())
    await asyncio.sleep(0)
    assert not waiting.done()
    slots.leave(1)
    await waiting


def test_window_of_nothing_is_refused():
    """A window below one could never answer anything."""
    with pytest.raises(ValueError, match="at least 1"):
        Slots(0, 100)
