"""Streams: whole ones add up to the unary answer in every dialect, broken ones break where they should."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.simbackend.answers import Identity, chat_body, completion_body
from worker.simbackend.dialects import DIALECTS, Dialect
from worker.simbackend.dice import Dice
from worker.simbackend.error_shapes import Kind
from worker.simbackend.events import Event
from worker.simbackend.generation import Generation, generate
from worker.simbackend.options import SimOptions
from worker.simbackend.responses import response_body, response_events
from worker.simbackend.sse import BOM, PLAIN, Act, Break, End, StreamFault, Wait, Write, frame, script
from worker.simbackend.stream import chunk_events
from worker.simbackend.validation import Call, Endpoint, check

ME = Identity("job-1", 1_800_000_000)
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"properties": {"q": {"type": "string"}}}}}
    for name in "ab"
]


def a_call(endpoint: Endpoint = Endpoint.CHAT, **body: Any) -> Call:
    """Return a streamed call that asks for usage where it can."""
    base: dict[str, Any] = {"model": "m", "stream": True}
    if endpoint is Endpoint.RESPONSES:
        base["input"] = "hi"
    else:
        base["stream_options"] = {"include_usage": True}
        base |= (
            {"messages": [{"role": "user", "content": "hi"}]} if endpoint is Endpoint.CHAT else {"prompt": ["a", "b"]}
        )
    return check(endpoint, {**base, **body}, SimOptions())


def says(call: Call, body: bytes = b"x", **settings: Any) -> Generation:
    """Return what the model says."""
    return generate(call, Dice(0, body), SimOptions.of(**settings))


def events_of(call: Call, dialect: str = "openai", **settings: Any) -> list[Event]:
    """Return the events of a whole stream."""
    return chunk_events(call, says(call, **settings), DIALECTS[dialect], ME)


def read(data: bytes) -> list[Any]:
    """Return the payloads of a stream, by the rules of server-sent events; `[DONE]` as a text."""
    payloads = []
    for block in re.split(rb"(?:\r\n|\n|\r){2}", data.removeprefix(BOM)):
        lines = re.split(rb"\r\n|\n|\r", block)
        parts = [line[6:] for line in lines if line.startswith(b"data: ")]
        if parts:
            text = b"\n".join(parts)
            payloads.append("[DONE]" if text == b"[DONE]" else json.loads(text))
    return payloads


def written(acts: list[Act]) -> bytes:
    """Return the bytes that a script writes."""
    return b"".join(act.data for act in acts if isinstance(act, Write))


def add(old: Any, new: Any) -> Any:
    """Merge a delta's value into what came before: texts and lists append, objects recurse, otherwise the last wins."""
    if isinstance(old, dict) and isinstance(new, dict):
        merged = dict(old)
        for key, value in new.items():
            if value is None and key in merged:
                continue
            once = key in {"role", "id", "type", "name", "finish_reason"}
            merged[key] = value if once or key not in merged else add(merged[key], value)
        return merged
    if isinstance(old, list) and isinstance(new, list):
        if all(isinstance(item, dict) and "index" in item for item in old + new):
            by_index = {item["index"]: item for item in old}
            for item in new:
                by_index[item["index"]] = add(by_index.get(item["index"], {}), item)
            return [by_index[index] for index in sorted(by_index)]
        return old + new
    return old + new if isinstance(old, str) and isinstance(new, str) else (old if new is None else new)


def assembled(chunks: list[Any], kind: str) -> dict[str, Any]:
    """Return the body that chunks add up to."""
    body: dict[str, Any] = {}
    choices: list[Any] = []
    for chunk in chunks:
        if chunk == "[DONE]":
            continue
        choices = add(choices, chunk["choices"])
        body |= {key: value for key, value in chunk.items() if value not in (None, "", 0) and key != "choices"}
    for choice in choices:
        if "delta" in choice:
            choice["message"] = choice.pop("delta")
    return {**body, "object": kind, "choices": choices}


def canon(value: Any) -> Any:
    """Return JSON without what a stream cannot or need not repeat: nulls, empty texts and lists, padding, indexes."""
    if isinstance(value, dict):
        dropped = {"obfuscation", "index"}
        kept = {key: canon(inner) for key, inner in value.items() if key not in dropped}
        return {key: inner for key, inner in kept.items() if inner not in (None, "", [], {})}
    return [canon(inner) for inner in value] if isinstance(value, list) else value


REQUESTS: list[dict[str, Any]] = [
    {},
    {"n": 3},
    {"logprobs": True, "max_tokens": 4},
    {"tools": TOOLS, "tool_choice": "required"},
    {"reasoning_effort": "low"},
    {"reasoning_effort": "low", "max_tokens": 5, "n": 2},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("request_body", REQUESTS, ids=lambda body: ",".join(body) or "plain")
def test_chat_chunks_add_up_to_the_unary_body(dialect: str, request_body: dict[str, Any]) -> None:
    """In every dialect the merged chunks equal the body that the same request gets without a stream."""
    call = a_call(**request_body)
    row: Dialect = DIALECTS[dialect]
    for body in (b"1", b"2", b"3"):
        generation = says(call, body)
        chunks = read(written(script(chunk_events(call, generation, row, ME))))
        assert chunks[-1] == "[DONE]"
        assert canon(assembled(chunks, "chat.completion")) == canon(chat_body(call, generation, row, ME))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("request_body", [{}, {"n": 2}, {"logprobs": 1}, {"echo": True, "max_tokens": 2}])
def test_text_chunks_add_up_to_the_unary_body(dialect: str, request_body: dict[str, Any]) -> None:
    """Text completions too."""
    call = a_call(Endpoint.COMPLETIONS, **request_body)
    generation = says(call)
    chunks = read(written(script(chunk_events(call, generation, DIALECTS[dialect], ME))))
    whole = completion_body(call, generation, DIALECTS[dialect], ME)
    assert canon(assembled(chunks, "text_completion")) == canon(whole)


@pytest.mark.parametrize(
    "body",
    [{}, {"max_output_tokens": 2}, {"reasoning": {"effort": "low"}}, {"tools": TOOLS, "tool_choice": "required"}],
)
def test_a_streamed_response_ends_with_the_unary_body(body: dict[str, Any]) -> None:
    """The terminal event carries the unary body, deltas add up to its text, and events are numbered."""
    call = a_call(Endpoint.RESPONSES, **body)
    generation = says(call)
    events = read(written(script(response_events(call, generation, DIALECTS["vllm"], ME))))
    whole = response_body(call, generation, DIALECTS["vllm"], ME)
    assert events[-1]["response"] == whole
    assert events[-1]["type"] == f"response.{whole['status']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    deltas = "".join(event["delta"] for event in events if event["type"].endswith(".delta"))
    inside = [item.get("arguments") or item["content"][0]["text"] for item in whole["output"]]
    assert deltas == "".join(inside)


def test_azure_begins_with_an_empty_chunk() -> None:
    """Azure's first chunk has no choices but the filter results of the prompt."""
    first = events_of(a_call(), "azure")[0].payload
    assert first is not None
    assert (first["choices"], "prompt_filter_results" in first) == ([], True)


def test_tgi_and_ollama_repeat_the_role() -> None:
    """Every delta of TGI and Ollama has the role; OpenAI's first only."""
    for dialect, count in (("tgi", 24), ("ollama", 24), ("openai", 1)):
        payloads = [
            event.payload for event in events_of(a_call(), dialect) if event.payload and event.payload["choices"]
        ]
        roles = sum("role" in payload["choices"][0]["delta"] for payload in payloads)
        assert (roles == count) if dialect == "openai" else (roles == len(payloads))


@pytest.mark.parametrize("place", ["own_chunk", "empty_delta", "finish_chunk", "first_chunk"])
def test_usage_can_stand_anywhere(place: Any) -> None:
    """Usage is sent once with the whole count, wherever it is wanted."""
    call = a_call()
    events = chunk_events(call, says(call), DIALECTS["vllm"], ME, place)
    counted = [event.payload["usage"] for event in events if event.payload and event.payload.get("usage")]
    assert [usage["completion_tokens"] for usage in counted] == [says(call).completion_tokens]


def test_usage_is_sent_only_when_asked_for() -> None:
    """Without `include_usage` no chunk has usage."""
    call = check(
        Endpoint.CHAT, {"model": "m", "stream": True, "messages": [{"role": "user", "content": "x"}]}, SimOptions()
    )
    assert not any("usage" in (event.payload or {}) for event in events_of(call))


def test_no_choices_still_make_a_stream() -> None:
    """An answer without choices is one chunk that has none."""
    call = a_call()
    events = chunk_events(call, Generation([], 3), DIALECTS["vllm"], ME)
    assert [event.payload["choices"] for event in events if event.payload] == [[], []]


@pytest.mark.parametrize(("name", "end"), [("lf", b"\n"), ("crlf", b"\r\n"), ("cr", b"\r")])
def test_line_endings(name: Any, end: bytes) -> None:
    """All three line endings of the format can be sent, with or without a byte order mark."""
    data = frame(Event({"a": 1}, name="x"), StreamFault(line_ending=name))
    assert data == b"event: x" + end + b'data: {"a":1}' + end + end
    acts = script([Event({"a": 1})], StreamFault(line_ending=name, bom=True))
    assert written(acts).startswith(BOM + b"data")


def test_json_over_several_lines_is_the_same_json() -> None:
    """A payload over several data lines joins to the same JSON."""
    data = frame(Event({"a": [1, "é"]}), StreamFault(multiline=True))
    assert data.count(b"data: ") > 3
    assert read(data) == [{"a": [1, "é"]}]


@given(st.integers(1, 40))
def test_splitting_changes_no_byte(size: int) -> None:
    """Writes of any size together are the stream, none is longer, and some cut a character."""
    whole = written(script(events_of(a_call())))
    acts = script(events_of(a_call()), StreamFault(split_bytes=size))
    writes = [act.data for act in acts if isinstance(act, Write)]
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
    whole = written(script(events_of(a_call())))
    acts = script(events_of(a_call()), StreamFault(Break(kind), **where))
    sent = written(acts)
    assert whole.startswith(sent)
    assert acts[-1] == End(ending)  # type: ignore[arg-type]
    assert [isinstance(act, End) for act in acts].count(True) == 1
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
    acts = script(events_of(a_call()), fault)
    assert written(acts) == written(script(events_of(a_call())))
    waits = [place for place, act in enumerate(acts) if isinstance(act, Wait)]
    assert [acts[place] for place in waits] == [Wait(9.0, interval)]
    assert len(read(written(acts[: waits[0]]))) == 2


def test_streams_without_an_end() -> None:
    """`[DONE]`, every finish_reason and the last blank line can be left out."""
    payloads = read(written(script(events_of(a_call(n=2)), StreamFault(missing_done=True))))
    assert payloads[-1] != "[DONE]"
    payloads = read(written(script(events_of(a_call(n=2)), StreamFault(missing_finish_reason=True))))
    assert payloads[-1] == "[DONE]"
    assert not any(choice["finish_reason"] for chunk in payloads[:-1] for choice in chunk["choices"])
    assert written(script(events_of(a_call()), StreamFault(missing_last_blank=True))).endswith(b"data: [DONE]")
    call = a_call(Endpoint.RESPONSES)
    events = response_events(call, says(call), DIALECTS["openai"], ME)
    last = read(written(script(events, StreamFault(missing_finish_reason=True))))[-1]
    assert last["type"] == "response.output_item.done"


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("place", [0, 4, None])
def test_error_events_are_the_dialects(dialect: str, place: int | None) -> None:
    """An error event comes first or later, ends the stream, and `[DONE]` follows where the server sends it."""
    row = DIALECTS[dialect]
    fault = StreamFault(Break.ERROR_EVENT, after_events=place, error=Kind.OVERLOADED)
    payloads = read(
        written(script(events_of(a_call(), dialect), fault, dialect, done_after_error=row.done_after_error))
    )
    assert (payloads[-1:] == ["[DONE]"]) is row.done_after_error
    errors = [payload for payload in payloads if isinstance(payload, dict) and "error" in payload]
    assert len(errors) == (0 if dialect == "ollama" else 1)
    if place is not None:
        assert len(payloads) == place + len(errors) + row.done_after_error


def test_the_responses_api_has_its_own_errors() -> None:
    """A flat `error` event, or `response.failed` with the error inside."""
    call = a_call(Endpoint.RESPONSES)
    for kind in (Break.ERROR_EVENT, Break.FAILED_EVENT):
        events = response_events(call, says(call), DIALECTS["openai"], ME)
        last = read(written(script(events, StreamFault(kind, after_events=3, error=Kind.OVERLOADED))))[-1]
        error = last if kind is Break.ERROR_EVENT else last["response"]["error"]
        assert last["type"] == ("error" if kind is Break.ERROR_EVENT else "response.failed")
        assert error["code"] == "server_is_overloaded"
        assert last["sequence_number"] == 3


def test_writes_say_how_many_tokens_they_stand_for() -> None:
    """Token counts grow with the writes up to the whole generation, so that a stream can be paced."""
    call = a_call()
    counts = [act.tokens for act in script(events_of(call), PLAIN) if isinstance(act, Write)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, says(call).completion_tokens)
