"""Log probabilities: kept as they came, merged as lists, and judged as strictly as everything else."""

import json
import tracemalloc
from typing import Any

import msgspec
import pytest

from tests.support.streams import CHAT, TEXT, feed_all
from worker.backends.streams.accumulator import MalformedEventError
from worker.backends.streams.choices import ChoicesAccumulator
from worker.backends.streams.reading import accumulator_for
from worker.backends.streams.sse import Event
from worker.wire.endpoints import endpoint_of

ROLE = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
ENTRY = '{"token":"a","logprob":-0.10,"bytes":[97],"top_logprobs":[{"token":"ü","logprob":-1E-3,"bytes":null}]}'


def a_chunk(logprobs: str, content: str = "a", finish: str = "null") -> Event:
    choice = f'{{"index":0,"delta":{{"content":"{content}"}},"logprobs":{logprobs},"finish_reason":{finish}}}'
    return Event(f'{{"choices":[{choice}]}}'.encode())


def accumulated(*events: Event, path: str = CHAT, first: dict[str, Any] | None = None) -> ChoicesAccumulator:
    accumulator = accumulator_for(endpoint_of(path))
    assert isinstance(accumulator, ChoicesAccumulator)
    accumulator.feed(Event(json.dumps(ROLE if first is None else first).encode()))
    feed_all(accumulator, events)
    return accumulator


def test_entries_stand_in_the_answer_byte_for_byte() -> None:
    """Neither the digits of a number nor the way a character is written are the worker's to change."""
    chunks = [a_chunk(f'{{"content":[{ENTRY}],"refusal":null}}') for _ in range(3)]
    answer = accumulated(*chunks, a_chunk("null", "", '"stop"')).result()
    assert f'"content":[{ENTRY},{ENTRY},{ENTRY}]'.encode() in answer


def test_a_partial_has_them_too() -> None:
    """What came before a break is encoded like an answer."""
    accumulator = accumulated(a_chunk(f'{{"content":[{ENTRY}]}}'))
    assert ENTRY.encode() in msgspec.json.encode(accumulator.partial())
    assert not accumulator.is_text_only


@pytest.mark.parametrize(
    "logprobs",
    [
        ['{"content":[1]}', '{"content":[]}', '{"content":[2,3]}'],
        ['{"content":[1],"refusal":null}', '{"content":null,"refusal":[2]}', '{"content":[3]}'],
        ['{"content":null}', "null", "{}"],
        ["{}", '{"refusal":[{"token":"\\ud83d\\ude00"}]}', '{"content":[1e999]}'],
        ['{"content":[1]}', '{"content":[2],"more":"x"}', '{"content":[3]}'],
        ['{"tokens":["a"],"top_logprobs":[null],"text_offset":[0]}', '{"tokens":["b"],"top_logprobs":[{"b":1}]}'],
        ['{"content":"no list"}', '{"content":[1]}'],
    ],
)
def test_the_short_cut_merges_them_like_the_general_rules(logprobs: list[str]) -> None:
    """Lists extend, nulls change nothing and stay null, whatever else comes along; named events take the general way."""
    plain = [a_chunk(each) for each in logprobs if "1e999" not in each]
    named = [Event(event.data, "chunk") for event in plain]
    end = a_chunk("null", "", '"stop"')
    results = [json.loads(accumulated(*events, end).result()) for events in (plain, named)]
    assert results[0] == results[1]


def test_those_of_completions_are_kept_as_well() -> None:
    """Four lists side by side, and the tokens of a multi-byte character."""
    first = {"choices": [{"index": 0, "text": "", "logprobs": None, "finish_reason": None}]}
    data = '{"choices":[{"index":0,"text":"a","logprobs":{"tokens":["ü"],"token_logprobs":[-0.50],"text_offset":[7]}}]}'
    accumulator = accumulated(Event(data.encode()), Event(data.encode()), path=TEXT, first=first)
    assert b'"token_logprobs":[-0.50,-0.50]' in msgspec.json.encode(accumulator.partial())


@pytest.mark.parametrize(
    "entry", [b'{"token":"\xff"}', b'{"token":"\xed\xa0\xbd"}', b'{"logprob":NaN}', b'{"logprob":01}', b'{"logprob":1']
)
def test_what_is_not_json_breaks_the_stream(entry: bytes) -> None:
    """Kept unread, but not unchecked: a reply is always JSON in UTF-8."""
    accumulator = accumulated(a_chunk(f'{{"content":[{ENTRY}]}}'))
    with pytest.raises(MalformedEventError):
        accumulator.feed(Event(a_chunk('{"content":[@]}').data.replace(b"@", entry)))
    assert accumulator.content_events == 1


def test_halves_of_an_emoji_in_an_entry_are_mended() -> None:
    """A lone half is JSON that nothing else can read: it is replaced, like anywhere in an answer."""
    accumulator = accumulated(a_chunk('{"content":[{"token":"\\ud83d"}]}'), a_chunk("null", "", '"stop"'))
    logprobs = json.loads(accumulator.result())["choices"][0]["logprobs"]
    assert logprobs == {"content": [{"token": "\ufffd"}]}


def test_they_take_little_more_memory_than_their_bytes() -> None:
    """As trees of objects they would take four times as much."""
    events = [a_chunk(f'{{"content":[{",".join([ENTRY] * 6)}]}}', str(n % 10)) for n in range(300)]
    size = sum(len(event.data) for event in events)
    accumulator = accumulated()
    tracemalloc.start()
    try:
        feed_all(accumulator, (Event(bytes(bytearray(event.data))) for event in events))
        assert tracemalloc.get_traced_memory()[0] < 2 * size
    finally:
        tracemalloc.stop()
