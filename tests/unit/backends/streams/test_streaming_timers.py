"""What the timers of a streamed answer take for a sign of life, and which limit it was."""

import asyncio
from collections.abc import Callable

import pytest

from tests.support.streaming_chunks import usage_chunk
from tests.support.streaming_reading import DONE, HEL, LO, ROLE, STOP, Reading, Step, sse
from tests.support.virtual_time import loop_time, virtual_time
from worker.backends.http.attempt_timer import AttemptTimer
from worker.policy.model import Fault
from worker.settings.schema import TimeoutSettings


@virtual_time
async def test_comments_are_no_sign_of_life() -> None:
    """Keep-alive comments every second: silent for `idle_s` since the last data."""
    reading = Reading(HEL, 3.0, LO, *[1.0, b": keep-alive\n\n"] * 30)
    assert await reading.fail() is Fault.IDLE_TIMEOUT
    assert (loop_time(), reading.text) == (13.0, "Hello")


@pytest.mark.parametrize("nothing", [b'data: {"type": "keepalive"}\n\n', b"event: ping\ndata: {}\n\n", b"data:\n\n"])
def test_heartbeats_are_no_sign_of_life_either(nothing: bytes) -> None:
    """Some servers send theirs as events."""

    @virtual_time
    async def run() -> None:
        reading = Reading(HEL, *[1.0, nothing] * 30)
        assert await reading.fail() is Fault.IDLE_TIMEOUT
        assert loop_time() == 10.0

    run()


@virtual_time
async def test_slow_but_steady_data_is_no_silence() -> None:
    """A token every nine seconds, for as long as the whole attempt may take."""
    reading = Reading(ROLE, *[9.0, HEL] * 9, STOP, DONE)
    result = await reading.read()
    assert (loop_time(), result.content_events) == (81.0, 9)


@virtual_time
async def test_data_without_text_is_a_sign_of_life_once_it_began() -> None:
    """Usage with every chunk, or a tool's name: the server works."""
    reading = Reading(HEL, *[9.0, sse(usage_chunk(prompt_tokens=1))] * 5, STOP, DONE)
    await reading.read()
    assert loop_time() == 45.0


@pytest.mark.parametrize("before", [[], [ROLE], [ROLE, 20.0, b": hi\n\n"], [sse(usage_chunk(prompt_tokens=1))]])
def test_until_the_first_text_the_first_bytes_limit_holds(before: list[Step]) -> None:
    """A server that queues requests behind its headers is not silent in the middle of an answer."""

    @virtual_time
    async def run() -> None:
        reading = Reading(*before, 1e6)
        assert await reading.fail() is Fault.FIRST_BYTE_TIMEOUT
        assert loop_time() == 50.0

    run()


@pytest.mark.parametrize("steps", [[ROLE, 1e6], [HEL, *[9.0, HEL] * 50], [ROLE, 45.0, HEL, 9.0, HEL, 1e6]])
def test_the_total_limit_holds_throughout(steps: list[Step]) -> None:
    """Before the first text, in between, and when it comes before the end of a silence."""

    @virtual_time
    async def run() -> None:
        reading = Reading(*steps, first_byte_s=60.0, total_s=60.0)
        assert await reading.fail() is Fault.TOTAL_TIMEOUT
        assert loop_time() == 60.0

    run()


@virtual_time
async def test_without_a_limit_of_its_own_the_first_byte_has_the_total() -> None:
    """The default: a server that does not stream begins when it is done."""
    timer = AttemptTimer(TimeoutSettings(total_s=30), 20.0)

    async def wait() -> None:
        async with timer:
            timer.await_first_byte()
            await asyncio.sleep(1e6)

    with pytest.raises(TimeoutError):
        await wait()
    assert (timer.fault, loop_time()) == (Fault.TOTAL_TIMEOUT, 20.0)


def test_each_limit_has_its_own_fault() -> None:
    """Three limits, three faults."""
    steps: dict[Fault, Callable[[], Reading]] = {
        Fault.FIRST_BYTE_TIMEOUT: lambda: Reading(1e6),
        Fault.IDLE_TIMEOUT: lambda: Reading(HEL, 1e6),
        Fault.TOTAL_TIMEOUT: lambda: Reading(*[5.0, HEL] * 50),
    }

    @virtual_time
    async def run() -> None:
        assert [await build().fail() for build in steps.values()] == list(steps)

    run()
