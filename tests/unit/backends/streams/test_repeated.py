"""Packets of events that differ in their text alone are split and not parsed: the same answer, whatever is in them."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.streams import CHAT, TEXT
from worker.backends.http.attempt_timer import AttemptTimer
from worker.backends.streams.choices import ChoicesAccumulator
from worker.backends.streams.reading import StreamedAnswer, accumulator_for
from worker.errors import BackendError
from worker.ports import AttemptResult
from worker.settings.schema import TimeoutSettings
from worker.wire.endpoints import endpoint_of

TOP = '"id":"c1","object":"chat.completion.chunk","created":7,"model":"m"'


def chat(text: str, *, top: str = TOP, key: str = "content", more: str = "") -> bytes:
    """An event as a server writes it; the text stands there as it is."""
    return f'data: {{{top},"choices":[{{"index":0,"delta":{{"{key}":"{text}"}},"finish_reason":null{more}}}]}}\n\n'.encode()


def completion(text: str) -> bytes:
    return f'data: {{{TOP},"choices":[{{"index":0,"text":"{text}","finish_reason":null}}]}}\n\n'.encode()


STOP = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'


class Read:
    """What one stream became, with the number of packets that were not parsed."""

    def __init__(self, packets: list[bytes], *, path: str = CHAT, quick: bool = True, max_bytes: int = 10**6) -> None:
        accumulator = accumulator_for(endpoint_of(path))
        assert isinstance(accumulator, ChoicesAccumulator)
        self._packets = packets
        self._max_bytes = max_bytes
        self._accumulator = accumulator
        self.split = 0
        repeated = accumulator.feed_repeated

        def feed_repeated(data: bytes) -> bool:
            was = quick and repeated(data)
            self.split += was
            return was

        accumulator.feed_repeated = feed_repeated  # type: ignore[method-assign]
        self.result = AttemptResult()
        self.error = ""

    async def read(self) -> "Read":
        timer = AttemptTimer(TimeoutSettings(), 60.0)
        answer = StreamedAnswer(self._accumulator, self.result, timer, max_bytes=self._max_bytes, clock=lambda: 1.0)
        async with timer:
            try:
                for packet in self._packets:
                    if answer.feed(packet) is not None:
                        break
                answer.end()
            except BackendError as error:
                self.error = str(error)
            finally:
                answer.close()
        return self

    @property
    def left(self) -> tuple[Any, ...]:
        result = self.result
        return (
            *(result.body, result.partial, result.content_events, result.is_whole, result.in_stream),
            *(result.stream_usage, result.first_token_at, self.error),
        )


async def compared(packets: list[bytes], path: str = CHAT, **more: Any) -> Read:
    """Read with and without the short cut: both leave the same."""
    quick = await Read(packets, path=path, **more).read()
    parsed = await Read(packets, path=path, quick=False, **more).read()
    assert quick.left == parsed.left
    return quick


@pytest.mark.parametrize(("path", "write"), [(CHAT, chat), (TEXT, completion)])
async def test_most_packets_are_split(path: str, write: Callable[[str], bytes]) -> None:
    """One event or several, with an empty text among them."""
    packets = [write("a"), write("b"), write(" c"), write(" d") + write("") + write("\u00fc e"), write("!" * 5)]

    read = await compared([*packets, STOP], path)
    assert read.split == 3  # the first of its kind is merged in general, the second one decoded
    assert json.loads(read.result.body)["choices"][0]["finish_reason"] == "stop"
    assert "ab c d\u00fc e!!!!!" in read.result.body.decode()
    assert read.result.content_events == 6


SIMPLE = [chat("a"), chat("b")]
ODD: dict[str, list[bytes]] = {
    "an escape": [chat(r"\n"), chat(r"\"x"), chat(r"\u00e9"), chat(r"\\")],
    "a raw control character": [chat("\t")],
    "a line end in the text": [chat("x\ny")],
    "half a character": [chat("\u00fc")[:-40].replace("\u00fc".encode(), b"\xc3") + chat("x")[-40:]],
    "a character cut in two events": [chat("@@").replace(b"@@", b"\xc3") + chat("@@").replace(b"@@", b"\xbc")],
    "no quotation mark": [chat("x")[:-60] + chat("x")[-60:]],
    "more behind it": [chat("x"), chat("y", more=',"stop_reason":1'), chat("z")],
    "another top": [chat("x"), chat("y", top=TOP.replace("7", "8")), chat("z")],
    "another kind": [chat("x", key="reasoning"), chat("y", key="reasoning"), chat("z"), chat("w", key="reasoning")],
    "the end of one, the rest of another": [chat("x")[:-3], chat("y")[-3:] + chat("z"), chat("w")],
    "an event without its blank line": [chat("x")[:-1], chat("y")],
    "other line ends": [chat("x").replace(b"\n", b"\r\n"), chat("y")],
    "a comment": [b": hello\n\n", chat("x"), b": hello\n" + chat("y")],
    "a name": [b"event: x\n" + chat("x"), b"event: error\n", chat("y")],
    "two data lines": [b"data: \n" + chat("x"), chat("y")],
    "a finish reason, and more text": [STOP[:-14], chat("x"), chat("y"), chat("z")],
    "an error": [chat("x") + b'data: {"error":{"message":"no"}}\n\n', chat("y")],
    "an error of the same kind": [chat("x"), chat('","error":"y')],
    "a quotation that ends it": [chat('"}}],"choices":[{"delta":{"content":"y')],
    "the text is a field's": [chat("stop"), chat("c1"), chat("index"), chat("x")],
    "the overlap of both ends": [chat("x")[:-1] + b"\n", chat("")[:60] + chat("")[60:]],
    "two choices": [chat("x").replace(b'"index":0', b'"index":1'), chat("y"), chat("z").replace(b'"index":0', b'"index":1')],
    "a tool call": [
        chat("x").replace(b'"content":"x"', b'"tool_calls":[{"index":0,"id":"a","function":{"name":"f","arguments":""}}]'),
        *(chat("x").replace(b'"content":"x"', b'"tool_calls":[{"index":0,"function":{"arguments":"1"}}]') for _ in range(3)),
        chat("y"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("packets", ODD.values(), ids=ODD)
@pytest.mark.parametrize("cut", [False, True], ids=["in packets", "in one"])
async def test_what_only_looks_the_same_is_parsed(packets: list[bytes], cut: bool) -> None:
    """Whatever stands between the quotation marks, before and behind them."""

    stream = [b"".join(packets)] if cut else packets
    await compared([*SIMPLE, *stream, chat("later"), STOP])
    await compared([*SIMPLE, chat("c"), *stream, *stream, chat("later"), STOP])


async def test_a_stream_that_is_too_long_is_cut_at_the_same_byte() -> None:
    """The limit counts what is not parsed as well."""

    packets = [chat("a" * 9) for _ in range(30)]
    for limit in range(1000, 3000, 97):
        assert (await compared(packets, max_bytes=limit)).error


PIECES = st.one_of(
    st.text(max_size=3),
    st.sampled_from(["a", " b", "\u00fc", r"\n", r"\"", "\\", '"', "c1", "stop", "", "\t", "\u2028", "data: ", "\n\n"]),
)
EVENTS = st.one_of(
    st.builds(chat, PIECES),
    st.builds(chat, PIECES),
    st.builds(chat, PIECES, key=st.sampled_from(["content", "reasoning", "refusal", "role"])),
    st.sampled_from([STOP, STOP[:-14], b": x\n\n", b"\n", b'data: {"error":"x"}\n\n', chat("x")[:-1], chat("y")[6:]]),
)


@given(st.lists(EVENTS, max_size=12), st.lists(st.integers(0, 2000), max_size=4), st.booleans())
async def test_any_stream_is_read_the_same_way(events: list[bytes], cuts: list[int], whole_events: bool) -> None:
    """Events in a packet each, or cut anywhere."""

    packets = events
    if not whole_events:
        stream = b"".join(events)
        places = sorted({min(cut, len(stream)) for cut in cuts})
        packets = [stream[start:end] for start, end in zip([0, *places], [*places, len(stream)], strict=True)]
    await compared([*SIMPLE, *packets, chat("z"), chat("z"), STOP])
