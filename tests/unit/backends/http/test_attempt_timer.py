"""The limits of one attempt, on virtual time."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from tests.support.virtual_time import loop_time, virtual_time
from worker.backends.http.attempt_timer import AttemptTimer
from worker.policy.model import Fault
from worker.settings.schema import TimeoutSettings

LIMITS = TimeoutSettings(first_byte_s=10, idle_s=3, total_s=60)


async def _ends(
    act: Callable[[AttemptTimer], Awaitable[None]], limits: TimeoutSettings = LIMITS
) -> tuple[float, Fault]:
    """Return after how long an attempt is ended, and for what."""
    began = loop_time()
    timer = AttemptTimer(limits, limits.total_s)

    async def attempt() -> None:
        async with timer:
            await act(timer)
            await asyncio.sleep(1000)

    with pytest.raises(TimeoutError):
        await attempt()
    return round(loop_time() - began, 3), timer.fault


@virtual_time
async def test_silence_from_the_start() -> None:
    """The first sign has a limit of its own, longer than that of silence."""

    async def nothing(timer: AttemptTimer) -> None:
        timer.await_first_byte()

    assert await _ends(nothing) == (10, Fault.FIRST_BYTE_TIMEOUT)


@virtual_time
async def test_asking_again_starts_the_wait_for_a_first_sign_anew() -> None:
    """As a request in another form does."""

    async def twice(timer: AttemptTimer) -> None:
        timer.await_first_byte()
        await asyncio.sleep(7)
        timer.await_first_byte()

    assert await _ends(twice) == (17, Fault.FIRST_BYTE_TIMEOUT)


@pytest.mark.parametrize("signs", [1, 2, 7])
@virtual_time
async def test_silence_later(signs: int) -> None:
    """Every sign of life moves the limit, the last one counts."""

    async def chunks(timer: AttemptTimer) -> None:
        timer.await_first_byte()
        for _ in range(signs):
            await asyncio.sleep(2)
            timer.restart_idle()

    assert await _ends(chunks) == (2 * signs + 3, Fault.IDLE_TIMEOUT)


@virtual_time
async def test_a_limit_that_comes_nearer_is_kept() -> None:
    """Headers after eight of ten seconds: now three of silence are too many."""

    async def late(timer: AttemptTimer) -> None:
        timer.await_first_byte()
        await asyncio.sleep(8)
        timer.restart_idle()

    assert await _ends(late) == (11, Fault.IDLE_TIMEOUT)


@virtual_time
async def test_signs_of_life_do_not_move_the_total() -> None:
    """It ends a lively attempt too, under its own name."""

    async def lively(timer: AttemptTimer) -> None:
        while True:
            await asyncio.sleep(1)
            timer.restart_idle()

    assert await _ends(lively) == (60, Fault.TOTAL_TIMEOUT)


@virtual_time
async def test_without_a_limit_of_the_first_sign_the_total_holds() -> None:
    """`None` waits for as long as the attempt may last."""

    async def nothing(timer: AttemptTimer) -> None:
        timer.await_first_byte()

    limits = LIMITS.model_copy(update={"first_byte_s": None})
    assert await _ends(nothing, limits) == (60, Fault.TOTAL_TIMEOUT)


@virtual_time
async def test_what_was_stopped_never_ends_by_itself() -> None:
    """The answer is there; a wait that begins afterwards is bounded again."""
    timer = AttemptTimer(LIMITS, 5000)
    async with timer:
        timer.restart_idle()
        timer.stop()
        await asyncio.sleep(1000)
        timer.restart_idle()
        await asyncio.sleep(2)
    await asyncio.sleep(1000)


@virtual_time
async def test_a_sign_in_the_last_instant_counts() -> None:
    """The limit has been seen to pass, and before it is carried out the answer goes on."""
    timer = AttemptTimer(LIMITS, 60)
    async with timer:
        timer.restart_idle()
        await asyncio.sleep(2.999)
        asyncio.get_running_loop().call_later(0.001, timer.restart_idle)  # after the look, before the cancellation
        await asyncio.sleep(2)


@virtual_time
async def test_a_cancellation_is_no_timeout() -> None:
    """It passes through, and no timer is left."""
    timer = AttemptTimer(LIMITS, 60)

    async def attempt() -> None:
        async with timer:
            await asyncio.sleep(1000)

    task = asyncio.ensure_future(attempt())
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert timer._timer is None


def test_a_limit_that_has_passed_is_not_moved_again() -> None:
    """A body that comes as fast as it is read shows a sign of life before every cancellation."""
    timers = []

    async def attempt() -> None:
        timers.append(AttemptTimer(LIMITS, 0.05))
        async with timers[0]:
            end = time.monotonic() + 0.06
            while time.monotonic() < end:
                pass  # the loop is busy
            for _ in range(10_000):
                timers[0].restart_idle()
                await asyncio.sleep(0)

    with pytest.raises(TimeoutError):
        asyncio.run(attempt())
    assert timers[0].fault is Fault.TOTAL_TIMEOUT
