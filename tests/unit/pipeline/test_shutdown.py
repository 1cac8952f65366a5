"""What goes on after a cancellation, and for how long."""

import asyncio

import pytest

from tests.support.virtual_time import loop_time, settle, virtual_time
from worker.pipeline.shutdown import ShutdownGrace


def _grace(settle_s: float = 40.0) -> ShutdownGrace:
    return ShutdownGrace(settle_s, clock=loop_time)


@virtual_time
async def test_without_a_cancellation_it_only_waits() -> None:
    """The work may take as long as it likes, and its exception is the caller's."""

    async def fail() -> None:
        await asyncio.sleep(3600)
        raise RuntimeError("bug")

    with pytest.raises(RuntimeError, match="bug"):
        await _grace().finish(fail())
    assert loop_time() == 3600


@virtual_time
async def test_work_goes_on_after_a_cancellation_and_its_end_is_awaited() -> None:
    """The cancellation is reported and not raised."""
    ended: list[float] = []

    async def work() -> None:
        await asyncio.sleep(30)
        ended.append(loop_time())

    finishing = asyncio.ensure_future(_grace().finish(work()))
    await asyncio.sleep(10)
    finishing.cancel()
    assert await finishing == 10.0
    assert ended == [30.0]


@virtual_time
async def test_an_end_and_a_cancellation_in_the_same_turn_of_the_loop() -> None:
    """Both are noted, and nothing is left to be reported to the loop."""
    reported: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reported.append(context))
    go_on = loop.create_future()

    async def work() -> None:
        await go_on

    finishing = asyncio.ensure_future(_grace().finish(work()))
    await settle()
    go_on.set_result(None)
    await asyncio.sleep(0)  # the work has ended, and the task that waits for it has not been told
    finishing.cancel()
    assert await finishing == 0.0
    assert reported == []


@pytest.mark.parametrize(("cancelled_at", "ends_at"), [(None, 140.0), (80.0, 120.0), (10.0, 100.0)])
def test_work_is_stopped_when_its_time_is_over(cancelled_at: float | None, ends_at: float) -> None:
    """The time counts from the first cancellation of the delivery; what is over is over at once."""

    @virtual_time
    async def run() -> None:
        stopped: list[float] = []
        await asyncio.sleep(100)

        async def work() -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                await asyncio.sleep(1)
                stopped.append(loop_time())

        finishing = asyncio.ensure_future(_grace().finish(work(), cancelled_at))
        await settle()
        if cancelled_at is None:
            finishing.cancel()
        await finishing
        assert stopped == [ends_at + 1]

    run()


@virtual_time
async def test_work_that_is_quick_gets_its_turn_even_when_the_time_is_over() -> None:
    """What needs no waiting is always done."""
    done: list[int] = []

    async def work() -> None:
        done.append(1)

    await _grace().finish(work(), -1000.0)
    assert done == [1]


@virtual_time
async def test_hurry_reaches_those_that_wait_and_those_to_come() -> None:
    """After it everything ends within its time; a longer one changes nothing."""
    grace = _grace()
    never = asyncio.get_running_loop().create_future()
    waiting = asyncio.ensure_future(grace.wait(never))
    await asyncio.sleep(5)
    grace.hurry(2.0)
    grace.hurry(30.0)
    await waiting
    assert loop_time() == 7.0
    await grace.wait(never)
    assert loop_time() == 7.0
    assert not never.done()
