"""What goes on after a cancellation, and for how long."""

import asyncio

import pytest

from tests.support.pipeline import a_delivery
from tests.support.virtual_time import loop_time, settle, virtual_time
from worker.pipeline.shutdown import Finisher


def _finisher(settle_s: float = 40.0) -> Finisher:
    return Finisher(settle_s, clock=loop_time)


@virtual_time
async def test_without_a_cancellation_it_only_waits() -> None:
    """The work may take as long as it likes, and its exception is the caller's."""

    async def fail() -> None:
        await asyncio.sleep(3600)
        raise RuntimeError("bug")

    with pytest.raises(RuntimeError, match="bug"):
        await _finisher().finish(a_delivery(), fail())
    assert loop_time() == 3600


@virtual_time
async def test_work_goes_on_after_a_cancellation_and_its_end_is_awaited() -> None:
    """The cancellation is noted in the delivery and not raised."""
    delivery, ended = a_delivery(), []

    async def work() -> None:
        await asyncio.sleep(30)
        ended.append(loop_time())

    finishing = asyncio.ensure_future(_finisher().finish(delivery, work()))
    await asyncio.sleep(10)
    finishing.cancel()
    await finishing
    assert (ended, delivery.cancelled_at) == ([30.0], 10.0)


@virtual_time
async def test_an_end_and_a_cancellation_in_the_same_turn_of_the_loop() -> None:
    """Both are noted, and nothing is left to be reported to the loop."""
    reported: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reported.append(context))
    delivery, go_on = a_delivery(), loop.create_future()

    async def work() -> None:
        await go_on

    finishing = asyncio.ensure_future(_finisher().finish(delivery, work()))
    await settle()
    go_on.set_result(None)
    await asyncio.sleep(0)  # the work has ended, and whoever waits for it has not been told
    finishing.cancel()
    await finishing
    assert (reported, delivery.cancelled_at) == ([], 0.0)


@pytest.mark.parametrize(("cancelled_at", "ends_at"), [(None, 140.0), (80.0, 120.0), (10.0, 100.0)])
def test_work_is_stopped_when_its_time_is_over(cancelled_at: float | None, ends_at: float) -> None:
    """The time counts from the first cancellation of the delivery; what is over is over at once."""

    @virtual_time
    async def run() -> None:
        stopped, delivery = [], a_delivery()
        await asyncio.sleep(100)
        delivery.cancelled_at = cancelled_at

        async def work() -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                await asyncio.sleep(1)
                stopped.append(loop_time())

        finishing = asyncio.ensure_future(_finisher().finish(delivery, work()))
        await settle()
        if cancelled_at is None:
            finishing.cancel()
        await finishing
        assert stopped == [ends_at + 1]

    run()


@virtual_time
async def test_work_that_is_quick_gets_its_turn_even_when_the_time_is_over() -> None:
    """What needs no waiting is always done."""
    delivery, done = a_delivery(), []
    delivery.cancelled_at = -1000.0

    async def work() -> None:
        done.append(1)

    await _finisher().finish(delivery, work())
    assert done == [1]


@virtual_time
async def test_hurry_reaches_those_that_wait_and_those_to_come() -> None:
    """After it everything ends within its time; a longer one changes nothing."""
    finisher = _finisher()
    never = asyncio.get_running_loop().create_future()
    waiting = asyncio.ensure_future(finisher.wait(never))
    await asyncio.sleep(5)
    finisher.hurry(2.0)
    finisher.hurry(30.0)
    await waiting
    assert loop_time() == 7.0
    await finisher.wait(never)
    assert loop_time() == 7.0
    assert not never.done()
