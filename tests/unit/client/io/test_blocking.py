"""The thread for calls that may block for ever."""

import asyncio
import threading

import pytest

from worker.client.io.blocking import BlockingThread


async def test_call_returns_and_raises():
    """A call's result and its exception reach the caller."""
    thread = BlockingThread("test")
    assert await thread.call(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await thread.call(divmod, 1, 0)
    thread.close()


async def test_thread_makes_one_call_at_a_time_in_order():
    """Calls are made one after the other, in the order of the calls, on one thread."""
    thread = BlockingThread("test")
    seen = []

    def note(number):
        seen.append((number, threading.current_thread().name, threading.current_thread().daemon))

    await asyncio.gather(*(thread.call(note, number) for number in range(20)))
    assert seen == [(number, "test", True) for number in range(20)]
    thread.close()


async def test_cancelled_call_does_not_disturb_the_next():
    """The result of a cancelled call is dropped."""
    thread = BlockingThread("test")
    gate = threading.Event()
    blocked = asyncio.ensure_future(thread.call(gate.wait))
    await asyncio.sleep(0)
    blocked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await blocked
    gate.set()
    assert await thread.call(lambda: 5) == 5
    thread.close()


def test_call_that_outlives_the_loop_ends_quietly():
    """A read that blocks for ever does not keep the program, nor raise when it returns after the loop's end."""
    gate = threading.Event()
    thread = BlockingThread("test")

    async def main():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(thread.call(gate.wait), 0)

    asyncio.run(main())
    gate.set()
    thread.close()
    thread._thread.join(10)
    assert not thread._thread.is_alive()
