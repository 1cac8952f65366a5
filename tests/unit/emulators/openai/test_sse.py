"""Bytes of a stream: how they may look, where they break, how they end."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.simulated_openai import ME, events_of, generated, read, stream_call, written
from worker.emulators.openai.dialects import DIALECTS, Kind
from worker.emulators.openai.responses import response_events
from worker.emulators.openai.sse import BOM, PLAIN, Break, End, Event, StreamFault, Wait, Write, frame, stream_steps
from worker.emulators.openai.validation import Endpoint


@pytest.mark.parametrize(("name", "end"), [("lf", b"\n"), ("crlf", b"\r\n"), ("cr", b"\r")])
def test_line_endings(name: Any, end: bytes) -> None:
    """All three line endings of the format can be sent, with or without a byte order mark."""
    data = frame(Event({"a": 1}, name="x"), StreamFault(line_ending=name))
    assert data == b"event: x" + end + b'data: {"a":1}' + end + end
    steps = stream_steps([Event({"a": 1})], StreamFault(line_ending=name, bom=True))
    assert written(steps).startswith(BOM + b"data")


def test_json_over_several_lines_is_the_same_json() -> None:
    """A payload over several data lines joins to the same JSON."""
    data = frame(Event({"a": [1, "é"]}), StreamFault(multiline=True))
    assert data.count(b"data: ") > 3
    assert read(data) == [{"a": [1, "é"]}]


@given(st.integers(1, 40))
def test_splitting_changes_no_byte(size: int) -> None:
    """Writes of any size together are the stream, none is longer, and some cut a character."""
    whole = written(stream_steps(events_of(stream_call())))
    steps = stream_steps(events_of(stream_call()), StreamFault(split_bytes=size))
    writes = [step.data for step in steps if isinstance(step, Write)]
    assert b"".join(writes) == whole
    assert max(map(len, writes)) <= size
    if size == 1:
        assert any(data[0] & 0xC0 == 0x80 for data in writes)


@pytest.mark.parametrize(
    "where", [{"after_bytes": 100}, {"after_bytes": 0}, {"after_events": 3}, {}, {"after_bytes": 10**9}]
)
@pytest.mark.parametrize(
    ("kind", "ending"),
    [("rst", "rst"), ("eof", "done"), ("close_eof", "unframed"), ("chunk_cut", "fin"), ("mid_chunk", "mid_chunk"), ("bad_chunk", "bad_chunk")],
)  # fmt: skip
def test_streams_break_at_the_byte(kind: str, ending: str, where: dict[str, int]) -> None:
    """What is sent is the beginning of the whole stream, cut at the wanted place, and ends in the wanted way."""
    whole = written(stream_steps(events_of(stream_call())))
    steps = stream_steps(events_of(stream_call()), StreamFault(Break(kind), **where))
    sent = written(steps)
    assert whole.startswith(sent)
    assert steps[-1] == End(ending)  # type: ignore[arg-type]
    assert [isinstance(step, End) for step in steps].count(True) == 1
    if "after_bytes" in where:
        assert len(sent) == min(where["after_bytes"], len(whole))
    elif "after_events" in where:
        assert len(read(sent)) == 3
    else:
        assert len(sent) == len(whole) // 2


@pytest.mark.parametrize(("kind", "interval"), [("idle", None), ("comments", 0.5)])
def test_stalled_streams_go_on_afterwards(kind: str, interval: float | None) -> None:
    """An idle time or comments stand between two parts of a whole stream."""
    fault = StreamFault(Break(kind), after_events=2, idle_s=9.0, comment_every_s=0.5)
    steps = stream_steps(events_of(stream_call()), fault)
    assert written(steps) == written(stream_steps(events_of(stream_call())))
    waits = [place for place, step in enumerate(steps) if isinstance(step, Wait)]
    assert [steps[place] for place in waits] == [Wait(9.0, interval)]
    assert len(read(written(steps[: waits[0]]))) == 2


def test_streams_without_an_end() -> None:
    """`[DONE]`, every finish_reason and the last blank line can be left out."""
    payloads = read(written(stream_steps(events_of(stream_call(n=2)), StreamFault(missing_done=True))))
    assert payloads[-1] != "[DONE]"
    payloads = read(written(stream_steps(events_of(stream_call(n=2)), StreamFault(missing_finish_reason=True))))
    assert payloads[-1] == "[DONE]"
    assert not any(choice["finish_reason"] for chunk in payloads[:-1] for choice in chunk["choices"])
    assert written(stream_steps(events_of(stream_call()), StreamFault(missing_last_blank=True))).endswith(
        b"data: [DONE]"
    )
    call = stream_call(Endpoint.RESPONSES)
    events = response_events(call, generated(call), DIALECTS["openai"], ME)
    last = read(written(stream_steps(events, StreamFault(missing_finish_reason=True))))[-1]
    assert last["type"] == "response.output_item.done"


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("place", [0, 4, None])
def test_error_events_are_the_dialects(dialect: str, place: int | None) -> None:
    """An error event comes first or later, ends the stream, and `[DONE]` follows where the server sends it."""
    row = DIALECTS[dialect]
    fault = StreamFault(Break.ERROR_EVENT, after_events=place, error=Kind.OVERLOADED)
    payloads = read(
        written(stream_steps(events_of(stream_call(), dialect), fault, dialect, done_after_error=row.done_after_error))
    )
    assert (payloads[-1:] == ["[DONE]"]) is row.done_after_error
    errors = [payload for payload in payloads if isinstance(payload, dict) and "error" in payload]
    assert len(errors) == (0 if dialect == "ollama" else 1)
    if place is not None:
        assert len(payloads) == place + len(errors) + row.done_after_error


def test_the_responses_api_has_its_own_errors() -> None:
    """A flat `error` event, or `response.failed` with the error inside."""
    call = stream_call(Endpoint.RESPONSES)
    for kind in (Break.ERROR_EVENT, Break.FAILED_EVENT):
        events = response_events(call, generated(call), DIALECTS["openai"], ME)
        last = read(written(stream_steps(events, StreamFault(kind, after_events=3, error=Kind.OVERLOADED))))[-1]
        error = last if kind is Break.ERROR_EVENT else last["response"]["error"]
        assert last["type"] == ("error" if kind is Break.ERROR_EVENT else "response.failed")
        assert error["code"] == "server_is_overloaded"
        assert last["sequence_number"] == 3


def test_writes_say_how_many_tokens_they_stand_for() -> None:
    """Token counts grow with the writes up to the whole generation, so that a stream can be paced."""
    call = stream_call()
    counts = [step.tokens for step in stream_steps(events_of(call), PLAIN) if isinstance(step, Write)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, generated(call).completion_tokens)
