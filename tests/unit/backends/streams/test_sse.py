"""Behaviour of the byte-level event parser: every cut of every stream gives the same events as the specification's text."""

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.backends.streams.sse import Event, EventTooLargeError, SSEParser
from worker.errors import BackendError
from worker.policy.model import Fault

BOM = b"\xef\xbb\xbf"


def parse(stream: bytes, cuts: list[int] | None = None, **kwargs) -> list[Event]:
    """Feed the stream, cut at the given positions."""
    parser = SSEParser(**kwargs)
    events, start = [], 0
    for cut in sorted(cuts or []):
        events += parser.feed(stream[start:cut])
        start = max(start, cut)
    return events + parser.feed(stream[start:]) + parser.close()


def datas(stream: bytes, cuts: list[int] | None = None) -> list[bytes]:
    return [event.data for event in parse(stream, cuts)]


def by_the_book(stream: bytes) -> list[tuple[str, bytes, bool]]:
    """The specification's dispatch, line by line; our one addition: what is pending at the end is handed out, marked."""
    events, name, data = [], "", None
    for line in lines_by_the_book(stream.removeprefix(BOM)):
        field, colon, value = line.partition(b":")
        value = value[1:] if colon and value[:1] == b" " else value
        if not line:
            if data is not None:
                events.append((name, data[:-1], True))
            name, data = "", None
        elif field == b"data":
            data = (data or b"") + value + b"\n"
        elif field == b"event":
            name = value.decode("utf-8", "replace")
    return [*events, (name, data[:-1], False)] if data is not None else events


def lines_by_the_book(stream: bytes) -> list[bytes]:
    """The specification's lines, one byte at a time."""
    lines, line, position = [], bytearray(), 0
    while position < len(stream):
        byte = stream[position]
        position += 1
        if byte not in b"\r\n":
            line.append(byte)
            continue
        if byte == 0x0D and stream[position : position + 1] == b"\n":
            position += 1
        lines.append(bytes(line))
        line = bytearray()
    return [*lines, bytes(line)] if line else lines


PIECES = st.sampled_from(
    [
        b"\r", b"\n", b"\r\n", b"\n\n", b"\r\r", b"\r\n\r\n", b"data", b"data:", b"data: ", b"data:  ", b":", b": ping", b" ",
        b"event: ", b"event:error", b"id: 1", b"retry: 10", b"{}", b'{"a":"b"}', b"[DONE]", BOM, b"\x00", b"\xff",
        "ü".encode(), "\u2028".encode(), "\u0085".encode(), b"\x0b\x0c\x1c", "😀".encode(),
    ]
)  # fmt: skip
STREAMS = st.lists(PIECES | st.binary(max_size=3), max_size=40).map(b"".join)


@settings(max_examples=200, deadline=None)
@given(STREAMS, st.lists(st.integers(0, 120), max_size=12))
def test_every_cut_gives_the_events_of_the_specification(stream, cuts):
    """Whatever the bytes and wherever the network cut them, the events are those of the written algorithm."""
    events = parse(stream, cuts)
    assert [(event.name, event.data, event.is_terminated) for event in events] == by_the_book(stream)


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"], ids=["LF", "CR", "CRLF"])
def test_each_line_end_at_each_single_cut(end):
    """One stream per kind of line end, cut in two at every byte: never another event, never a lost one."""
    stream = end.join([b": hi", b'data: {"a":', b'data: "\xc3\xbc"}', b"", b"event: x", b"data: [DONE]", b"", b""])
    expected = [Event(b'{"a":\n"\xc3\xbc"}', ""), Event(b"[DONE]", "x")]
    for cut in range(len(stream) + 1):
        assert parse(stream, [cut]) == expected, cut
    assert parse(stream, list(range(len(stream)))) == expected


def test_lf_after_a_cr_in_an_earlier_chunk_belongs_to_it_only_when_it_comes_next():
    """A CR ends its line at once; an LF that opens a later chunk is swallowed, one that does not is a line of its own."""
    parser = SSEParser()
    assert parser.feed(b"data: a\r") == []
    assert parser.feed(b"\n") == []
    assert parser.feed(b"\r") == [Event(b"a")]
    assert parser.feed(b"data: b\rdata: c") == []
    assert parser.feed(b"\n\n") == [Event(b"b\nc")]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_other_separators_do_not_end_a_line(separator):
    """What `str.splitlines` takes for a line end may stand inside a JSON string."""
    data = f'{{"text": "a{separator}b"}}'.encode()
    assert datas(b"data: " + data + b"\n\n") == [data]


def test_split_utf8_arrives_whole():
    """A character cut by a packet border is one character again, since nothing is decoded on the way."""
    stream = 'data: {"text": "ü€😀"}\n\n'.encode()
    for cut in range(len(stream)):
        assert datas(stream, [cut]) == [stream[6:-2]]


def test_one_byte_order_mark_is_dropped_at_the_start_only():
    """The mark may come in pieces; a second one, or a later one, is an unknown field."""
    for cut in range(5):
        assert datas(BOM + b"data: a\n\n" + BOM + b"data: b\n\ndata: c\n\n", [cut]) == [b"a", b"c"]
    assert datas(BOM + BOM + b"data: a\n\n") == []


def test_comments_are_not_returned():
    """A keep-alive gives no event, so an idle timer that is restarted for each event is not restarted."""
    parser = SSEParser()
    assert parser.feed(b": keep-alive\n\n:\n\n: OPENROUTER PROCESSING\n\n") == []
    assert parser.feed(b"data: a\n: inside\ndata: b\n\n") == [Event(b"a\nb")]


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (b"data:a\n\n", [b"a"]),
        (b"data:  a\n\n", [b" a"]),
        (b"data\n\n", [b""]),
        (b"data:\ndata:\n\n", [b"\n"]),
        (b"event: x\n\n", []),
        (b"data : a\n\n", []),
        (b"DATA: a\n\n", []),
        (b"\n\n\n", []),
        (b"data: a\nid: 7\nretry: 5\n\n", [b"a"]),
    ],
)
def test_fields(stream, expected):
    """One space after the colon is dropped; unknown fields are ignored; without data there is no event."""
    assert datas(stream) == expected


def test_the_name_belongs_to_one_event():
    """`event` names the event it stands in and no later one; the last one wins; broken UTF-8 is replaced."""
    assert [e.name for e in parse(b"event: a\nevent: b\ndata: 1\n\ndata: 2\n\nevent: \xff\ndata: 3\n\n")] == [
        "b",
        "",
        "\ufffd",
    ]


def test_a_name_without_a_colon_is_none():
    """`event` alone takes the name back."""
    assert parse(b"event: a\nevent\ndata: 1\n\n") == [Event(b"1", "")]


@pytest.mark.parametrize("end", [b"", b"\n", b"\r", b"\r\n"], ids=["nothing", "LF", "CR", "CRLF"])
def test_a_missing_last_blank_line_loses_nothing(end):
    """Servers forget it; the event is handed out at the end of the stream, and says that it may be torn."""
    stream = b"data: a\n\nevent: x\ndata: [DONE]" + end
    assert parse(stream) == [Event(b"a"), Event(b"[DONE]", "x", is_terminated=False)]
    assert parse(stream, list(range(len(stream)))) == parse(stream)


def test_closing_twice_gives_nothing_more():
    """`close` is idempotent."""
    parser = SSEParser()
    parser.feed(b"data: a")
    assert len(parser.close()) == 1
    assert parser.close() == []


@pytest.mark.parametrize(
    "stream",
    [
        b"data: " + b"x" * 200 + b"\n\n",
        b"data: " + b"x" * 200,
        b"data: xxxxxxxxxx\n" * 20 + b"\n",
        b"event: " + b"x" * 200 + b"\n\n",
        b": " + b"x" * 200,
        b"\n\ndata: ok\n\n" + b"x" * 200 + b":\n\n",
    ],
    ids=["line", "unfinished", "many lines", "name", "comment", "unknown field"],
)
def test_an_event_over_the_limit_is_an_error(stream):
    """Nothing grows without bound, whatever field it stands in; the fault is the policy's `response_too_large`."""
    for cuts in ([], list(range(len(stream)))):
        with pytest.raises(EventTooLargeError) as raised:
            parse(stream, cuts, max_event_bytes=100)
        assert isinstance(raised.value, BackendError)
        assert raised.value.fault == Fault.RESPONSE_TOO_LARGE


def test_the_limit_is_for_one_event_not_for_the_stream():
    """A stream of any length passes a limit that each of its events keeps; comments between them do not add up."""
    stream = (b": keep-alive\n" + b"data: " + b"x" * 80 + b"\n\n") * 100 + b": ping\n" * 100
    for step in (1, 50, 150, len(stream)):
        assert len(parse(stream, list(range(0, len(stream), step)), max_event_bytes=100)) == 100, step


def test_memory_does_not_grow_with_the_stream():
    """After megabytes of comments and events the parser holds less than two chunks."""
    parser = SSEParser()
    chunk = (b": keep-alive comment, of no meaning\n\n" + b'data: {"a": 1}\n\n') * 300 + b"data: unfinished"
    parser.feed(chunk)
    parser.feed(b"\n\n")
    tracemalloc.start()
    try:
        for _ in range(60):
            parser.feed(chunk)
            parser.feed(b"\n\n")
        assert tracemalloc.get_traced_memory()[0] < 2 * len(chunk)
    finally:
        tracemalloc.stop()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=64), max_size=20))
def test_random_bytes_raise_nothing(chunks):
    """Any bytes at all are a stream, if perhaps one without events."""
    parser = SSEParser()
    for chunk in chunks:
        parser.feed(chunk)
    parser.close()
