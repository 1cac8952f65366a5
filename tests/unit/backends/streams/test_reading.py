"""Reading one streamed answer: what is known of it however it ends, and what restarts which timer."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.streams import (
    DONE_BYTES,
    ERROR,
    HEL,
    LIMITS,
    LO,
    ROLE,
    STOP,
    USAGE,
    WHOLE,
    Reading,
    Step,
    delta,
    sse,
    tool,
    usage_chunk,
)
from tests.support.virtual_time import loop_time, virtual_time
from worker.backends.http.attempt_timer import AttemptTimer
from worker.backends.streams.reading import LINGER_S, holds_events
from worker.errors import BackendError
from worker.policy.model import Fault
from worker.ports import ResumePoint
from worker.settings.schema import TimeoutSettings

# A whole answer


@virtual_time
async def test_a_whole_stream_is_one_body() -> None:
    """The body, the usage and the number of events with text; nothing is partial, nothing to go on from is lost."""
    reading = Reading(*WHOLE)
    result = await reading.read()
    assert reading.text == "Hello"
    assert (result.stream_usage, result.content_events, result.partial) == (USAGE, 2, None)
    assert (result.in_stream, result.missing_done) == (False, False)


@virtual_time
async def test_the_first_token_is_the_first_text() -> None:
    """Neither the role nor usage is text; the callback is called once."""
    reading = Reading(1.0, ROLE, 2.0, sse(usage_chunk(prompt_tokens=3)), 3.0, HEL, 4.0, LO, STOP, DONE_BYTES)
    result = await reading.read()
    assert (result.first_token_at, reading.tokens) == (6.0, [6.0])


@pytest.mark.parametrize(
    "fields", [{"reasoning": "hm"}, {"reasoning_content": "hm"}, {"refusal": "no"}, tool(0, "a", "f", "")]
)
def test_thoughts_refusals_and_tool_calls_are_text_too(fields: dict[str, Any]) -> None:
    """A model that thinks or acts before it speaks has begun all the same."""

    @virtual_time
    async def run() -> None:
        reading = Reading(ROLE, 2.0, sse(delta(**fields)), 2.0, STOP, DONE_BYTES)
        assert (await reading.read()).first_token_at == 2.0

    run()


@virtual_time
async def test_an_answer_without_text_has_no_first_token() -> None:
    """Absent is none, not 0."""
    reading = Reading(ROLE, STOP, DONE_BYTES)
    result = await reading.read()
    assert (result.first_token_at, reading.tokens) == (None, [])


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_the_last_event_needs_no_blank_line(cut: int) -> None:
    """Servers forget it; what a stream ends in counts."""

    @virtual_time
    async def run() -> None:
        reading = Reading(HEL, STOP[: len(STOP) - cut])
        await reading.read()
        assert (reading.text, reading.result.partial) == ("Hel", None)

    run()


@virtual_time
async def test_a_whole_answer_leaves_no_partial_of_what_it_went_on_from() -> None:
    """What the result was given before the stream began is in the answer now."""
    reading = Reading(HEL, STOP, DONE_BYTES)
    reading.result.partial = b"{}"
    assert (await reading.read()).partial is None


@virtual_time
async def test_a_finish_reason_without_done_is_whole() -> None:
    """The missing `[DONE]` is told."""
    result = await Reading(HEL, LO, STOP).read()
    assert (result.partial, result.missing_done) == (None, True)


@pytest.mark.parametrize(
    "end", [ConnectionResetError("cut"), BackendError(Fault.CONNECTION_LOST), sse({}) + b"data: {{\n\n", 60.0, 1e9]
)
def test_nothing_spoils_an_answer_that_is_whole(end: Step) -> None:
    """A connection that breaks, babbles or stays open behind the last finish reason changes nothing."""

    @virtual_time
    async def run() -> None:
        reading = Reading(HEL, LO, STOP, end)
        result = await reading.read()
        assert (reading.text, result.partial, result.missing_done) == ("Hello", None, True)
        assert loop_time() <= LIMITS["idle_s"]

    run()


@virtual_time
async def test_what_follows_a_whole_answer_is_waited_for() -> None:
    """Usage, and `[DONE]`, some seconds late still count; the end of the response is waited for a little."""
    reading = Reading(HEL, STOP, 7.0, sse(usage_chunk(**USAGE)), 7.0, DONE_BYTES, 100.0)
    result = await reading.read()
    assert (result.stream_usage, result.missing_done) == (USAGE, False)
    assert loop_time() == 14.0 + LINGER_S


@pytest.mark.parametrize(
    "steps",
    [
        [
            sse(delta("stop", content="He")),
            1.0,
            sse(delta("stop", content="l")),
            7.0,
            sse(delta("stop", content="lo")),
            DONE_BYTES,
        ],
        [sse(delta("stop", content=word)) for word in "Hello"],
        [ROLE, sse(delta(content="He")), sse(delta("tool_calls")), 7.0, sse(delta(content="llo")), STOP, DONE_BYTES],
        [ROLE, sse(delta("stop", content="He")) + sse(delta(content="llo")) + STOP, DONE_BYTES],
    ],
    ids=["every chunk finishes", "no done", "a pause", "one packet"],
)
def test_text_behind_a_finish_reason_takes_it_back(steps: list[Step]) -> None:
    """The answer goes on, with the usual limits, and nothing of it is lost."""

    @virtual_time
    async def run() -> None:
        reading = Reading(*steps)
        result = await reading.read()
        assert (reading.text, result.partial) == ("Hello", None)

    run()


@pytest.mark.parametrize(
    "end", [[1e6], [ConnectionResetError("cut")], [b"data: bye\n\n", sse(delta("stop", content="!"))]]
)
def test_where_finish_reasons_prove_nothing_an_answer_has_to_end(end: list[Step]) -> None:
    """Silence or a broken connection in the middle is never a good answer."""

    @virtual_time
    async def run() -> None:
        words = [sse(delta("stop", content=word)) for word in ("Hel", "lo")]
        reading = Reading(*words, *end)
        if isinstance(end[0], Exception):
            with pytest.raises(ConnectionResetError):
                await reading.read()
        else:
            assert await reading.fail() in {Fault.IDLE_TIMEOUT, Fault.STREAM_BROKEN}
        assert not reading.result.is_whole
        assert reading.text.startswith("Hello")

    run()


@pytest.mark.parametrize(
    "babble",
    [
        b"data: bye\n\n",
        b"data: null\n\n",
        b"data: 7\n\n",
        b'data: {"choices": [], "usage": {"a": NaN}}\n\n',
        b"data: {{\n\n",
        b"x" * 9000,
    ],
)
@pytest.mark.parametrize("size", [1, 7, 64, 10**6])
def test_where_the_network_cuts_makes_no_difference(babble: bytes, size: int) -> None:
    """What follows a whole answer cannot spoil it, in the same packet or in the next."""

    @virtual_time
    async def run() -> None:
        stream = HEL + LO + STOP + babble
        reading = Reading(*[stream[at : at + size] for at in range(0, len(stream), size)], max_bytes=5000)
        assert (await reading.read()).is_whole
        assert reading.text == "Hello"

    run()


@virtual_time
async def test_what_breaks_a_stream_breaks_it_after_what_came_before() -> None:
    """The first token is noted although the same packet has an event that cannot be read."""
    reading = Reading(2.0, HEL + b"data: bye\n\n")
    assert await reading.fail() is Fault.STREAM_BROKEN
    assert (reading.result.first_token_at, reading.text) == (2.0, "Hel")


@pytest.mark.parametrize(
    ("head", "is_labelled", "expected"),
    [
        (b"data: {}", False, True),
        (b"\xef\xbb\xbf\r\n: hi", False, True),
        (b"id: 1", False, True),
        (b"retry:", False, True),
        (b"event: x", True, True),
        (b'{"choices": []}', True, False),
        (b"\n [1]", True, False),
        (b"<html>", True, False),
        (b"hello", True, True),
        (b"hello", False, False),
        (b"", True, None),
        (b"\n", False, None),
        (b"da", False, None),
        (b"dat!", False, False),
    ],
)
def test_the_first_bytes_say_what_a_body_is(head: bytes, is_labelled: bool, expected: bool | None) -> None:
    """The label decides only about what could be anything."""
    assert holds_events(head, is_labelled=is_labelled) is expected


@virtual_time
async def test_an_error_behind_the_finish_reason_fails_the_answer() -> None:
    """Any error event does, whatever came before; `[DONE]` behind it proves nothing."""
    result = await Reading(HEL, STOP, ERROR, DONE_BYTES).read()
    assert (result.in_stream, json.loads(result.body)["error"]["message"]) == (True, "boom")
    assert result.partial is not None


# Broken


@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize(
    "error", [TimeoutError("slow"), ConnectionResetError("cut"), OSError("gone"), BackendError(Fault.CONNECTION_LOST)]
)
def test_what_came_before_an_exception_survives_it(error: Exception, at: int) -> None:
    """Broken behind any chunk: the partial holds exactly the text until then, and the exception is what it was."""

    @virtual_time
    async def run() -> None:
        reading = Reading(*WHOLE[:at], error)
        with pytest.raises(type(error)):
            await reading.read()
        assert_partial(reading, at)

    run()


def assert_partial(reading: Reading, chunks: int) -> None:
    """What so many chunks of `WHOLE` leave behind."""
    text = ["", "", "Hel", "Hello"][chunks]
    assert reading.result.body == b"".join(WHOLE[:chunks])  # its beginning, for people
    assert reading.result.content_events == [0, 0, 1, 2][chunks]
    assert reading.result.resume_point == ResumePoint(text="x", tokens=1)
    if not text:
        assert reading.result.partial is None
        return
    assert reading.text == text
    assert json.loads(reading.result.partial or b"")["choices"][0]["finish_reason"] is None


@pytest.mark.parametrize("at", range(4))
def test_what_came_before_a_cancellation_survives_it(at: int) -> None:
    """Stopped behind any chunk the cancellation goes on, and the result has what came."""

    @virtual_time
    async def run() -> None:
        reading = Reading(*WHOLE[:at], 1e6)
        task = asyncio.ensure_future(reading.read())
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert_partial(reading, at)

    run()


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [DONE_BYTES],
        [ROLE, HEL],
        [HEL, DONE_BYTES],
        [HEL, b'data: {"choices": [{"del'],
        [b": only\n\n: comments\n\n"],
    ],
    ids=["nothing", "done alone", "cut", "done without finish", "torn", "comments"],
)
def test_an_end_without_the_protocols_end_is_broken(steps: list[Step]) -> None:
    """However well the connection ended: `[DONE]` proves nothing."""

    @virtual_time
    async def run() -> None:
        reading = Reading(*steps)
        assert await reading.fail() is Fault.STREAM_BROKEN
        assert (reading.result.partial is not None) is (HEL in steps)

    run()


@virtual_time
async def test_a_malformed_event_breaks_the_stream_and_is_shown() -> None:
    """Its data is the body, for people; what came before is kept."""
    reading = Reading(HEL, b"data: <html>\n\n")
    assert await reading.fail() is Fault.STREAM_BROKEN
    assert (reading.result.body, reading.text) == (b"<html>", "Hel")


@virtual_time
async def test_an_error_event_first_leaves_no_partial() -> None:
    """It is a plain error that happens to come as an event."""
    result = await Reading(ERROR, DONE_BYTES).read()
    assert (result.in_stream, result.partial, result.content_events) == (True, None, 0)


@virtual_time
async def test_an_error_event_ends_the_reading() -> None:
    """What follows it is not waited for long, and changes nothing."""
    reading = Reading(HEL, ERROR, LO, STOP, 1e6)
    result = await reading.read()
    assert result.in_stream
    assert reading.text == "Hel"
    assert loop_time() <= LINGER_S


@virtual_time
async def test_too_many_bytes_are_too_large() -> None:
    """The limit is that of all events together."""
    reading = Reading(*[HEL] * 100, max_bytes=2000)
    assert await reading.fail() is Fault.RESPONSE_TOO_LARGE
    assert reading.result.partial is not None


# Timers


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
    reading = Reading(ROLE, *[9.0, HEL] * 9, STOP, DONE_BYTES)
    result = await reading.read()
    assert (loop_time(), result.content_events) == (81.0, 9)


@virtual_time
async def test_data_without_text_is_a_sign_of_life_once_it_began() -> None:
    """Usage with every chunk, or a tool's name: the server works."""
    reading = Reading(HEL, *[9.0, sse(usage_chunk(prompt_tokens=1))] * 5, STOP, DONE_BYTES)
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
