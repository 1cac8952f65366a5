"""Streamed answers of the simulated backend, in every dialect: equal to whole ones, and broken in every way."""

import asyncio
import json
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest

from tests.support.random_bodies import canon
from tests.support.raw_http import Open, invoke
from worker.backends.openai import HttpBackend
from worker.emulators.openai import SimBackend, SimOptions
from worker.emulators.openai.dialects import DIALECTS
from worker.errors import BackendError
from worker.policy.model import Fault, Phase
from worker.ports import AttemptResult, BackendRequest
from worker.wire.body import RequestBody

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
USER = {"role": "user", "content": "Tell me something."}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}}
]
QUESTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"messages": [USER]}),
    "chat n=3": (CHAT, {"messages": [USER], "n": 3}),
    "chat cut": (CHAT, {"messages": [USER], "max_tokens": 2}),
    "chat tools": (CHAT, {"messages": [USER], "tools": TOOLS, "tool_choice": "required"}),
    "chat logprobs": (CHAT, {"messages": [USER], "logprobs": True, "top_logprobs": 2}),
    "chat reasoning": (CHAT, {"messages": [USER], "reasoning_effort": "low"}),
    "chat json": (CHAT, {"messages": [USER], "response_format": {"type": "json_object"}}),
    "completion": (TEXT, {"prompt": "Once", "max_tokens": 20}),
    "completions": (TEXT, {"prompt": ["one", "two"], "n": 2, "logprobs": 2, "echo": True}),
    "response": (RESPONSES, {"input": "hi"}),
    "response cut": (RESPONSES, {"input": "hi", "max_output_tokens": 3}),
    "response tools": (
        RESPONSES,
        {"input": "hi", "tools": [{"type": "function", "name": "weather"}], "tool_choice": "required"},
    ),
}
CHATTY = {"model": "m", "messages": [USER]}


@pytest.fixture
async def sim() -> AsyncIterator[SimBackend]:
    async with SimBackend(SimOptions.of(dialect="vllm")) as backend:
        yield backend


@pytest.fixture
def open_backend(open_backend: Open) -> Open:
    """Backends that are asked for streams wherever that is possible, unless a test says otherwise."""
    return partial(open_backend, stream="auto")


async def ask(backend: HttpBackend, path: str, body: dict[str, Any], **more: Any) -> AttemptResult:
    headers = {"x-request-id": "1"}
    return await invoke(backend, path, json.dumps({"model": "m", **body}).encode(), headers=headers, **more)


def canonical(result: AttemptResult) -> Any:
    """What is compared of an answer: everything but its nulls and its time."""
    body = json.loads(result.body)
    body.pop("created_at", None)
    return canon(body)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("question", QUESTIONS)
async def test_an_assembled_answer_equals_the_whole_one(
    sim: SimBackend, open_backend: Open, dialect: str, question: str
) -> None:
    """The same question, streamed and not, has the same answer and the same usage, in every server's shapes."""
    await sim.control({"settings": {"dialect": dialect}})
    path, body = QUESTIONS[question]
    streamed = await ask(open_backend(sim.base_url, stream="always"), path, body)
    whole = await ask(open_backend(sim.base_url, stream="never"), path, body)
    assert (streamed.streamed, whole.streamed) == (True, False)
    assert canonical(streamed) == canonical(whole)
    assert streamed.stream_usage == json.loads(whole.body)["usage"]
    assert streamed.first_token_at is not None
    assert streamed.started <= streamed.first_token_at <= (streamed.ended or 0)


@pytest.mark.parametrize(
    "form",
    [
        {"line_ending": "crlf"},
        {"line_ending": "cr"},
        {"bom": True},
        {"split_bytes": 1},
        {"split_bytes": 7},
        {"multiline": True},
        {"missing_last_blank": True},
        {"missing_done": True},
        *({"usage_on": place} for place in ("own_chunk", "empty_delta", "finish_chunk", "first_chunk")),
    ],
    ids=str,
)
@pytest.mark.parametrize("question", ["chat", "completions", "response"])
async def test_the_form_of_a_stream_makes_no_difference(
    sim: SimBackend, open_backend: Open, form: dict[str, Any], question: str
) -> None:
    """Line ends, borders of packets, forgotten ends, usage anywhere: the same answer."""
    path, body = QUESTIONS[question]
    backend = open_backend(sim.base_url, stream="always")
    plain = await ask(backend, path, body)
    await sim.control({"mode": "stream", **form})
    bent = await ask(backend, path, body)
    assert canonical(bent) == canonical(plain)
    assert bent.missing_done is (form == {"missing_done": True} and path != RESPONSES)


@pytest.mark.parametrize("body", [{}, {"stream": False}, {"stream": True}, {"stream": True, "stream_options": {}}])
@pytest.mark.parametrize("stream", ["auto", "always", "never", "as_requested"])
async def test_a_request_always_gets_one_json_answer(
    sim: SimBackend, open_backend: Open, stream: str, body: dict[str, Any]
) -> None:
    """Whatever the setting and whatever the request says; its usage is there in any case."""
    result = await ask(open_backend(sim.base_url, stream=stream), CHAT, {"messages": [USER], **body})
    answer = json.loads(result.body)
    assert answer["object"] == "chat.completion"
    wants = body.get("stream") is True
    assert result.streamed is (stream in {"auto", "always"} or (stream == "as_requested" and wants))
    assert "usage" in answer
    assert not result.streamed or result.stream_usage is not None


# Broken


@pytest.mark.parametrize("after", [0, 1, 2, 5])
@pytest.mark.parametrize("kind", ["rst", "eof", "close_eof", "chunk_cut", "mid_chunk", "bad_chunk"])
@pytest.mark.parametrize("question", ["chat", "completion", "response"])
async def test_a_broken_connection_breaks_the_stream(
    sim: SimBackend, open_backend: Open, question: str, kind: str, after: int
) -> None:
    """Whatever the transport makes of it: a fault, and what had come is known."""
    path, body = QUESTIONS[question]
    await sim.control({"mode": "stream", "break": kind, "after_events": after})
    backend = open_backend(sim.base_url, stream="always")
    result = AttemptResult()
    with pytest.raises(BackendError) as caught:
        await backend.invoke(
            BackendRequest(path=path, body=RequestBody(json.dumps({"model": "m", **body}).encode())), result
        )
    assert caught.value.fault in {Fault.STREAM_BROKEN, Fault.CONNECTION_LOST, Fault.DECODING}
    assert (result.phase, result.status, result.streamed) == (Phase.STREAM, 200, True)
    assert (result.partial is not None) is (result.content_events > 0) is (result.first_token_at is not None)
    assert result.body.startswith((b"data:", b"event:", b":")) or not result.body


@pytest.mark.parametrize("question", ["chat", "completion", "response"])
async def test_cut_at_any_byte_nothing_is_taken_for_a_whole_answer(
    sim: SimBackend, open_backend: Open, question: str
) -> None:
    """A stream that ends well at any byte is whole with every character, or broken with a true beginning."""
    path, body = QUESTIONS[question]
    backend = open_backend(sim.base_url, stream="always")
    whole = await ask(backend, path, body)
    text = _text(json.loads(whole.body))
    faults: set[str] = set()
    for after in range(0, 4000, 37):
        await sim.control({"mode": "stream", "break": "eof", "after_bytes": after})
        result = AttemptResult()
        request = BackendRequest(path=path, body=RequestBody(json.dumps({"model": "m", **body}).encode()))
        try:
            await backend.invoke(request, result)
        except BackendError as error:
            faults.add(error.fault)
            assert text.startswith(_text(json.loads(result.partial)) if result.partial else "")
        else:
            assert _text(json.loads(result.body)) == text
    assert faults == {Fault.STREAM_BROKEN}


def _text(body: dict[str, Any]) -> str:
    if "choices" in body:
        choice = body["choices"][0]
        return str(choice.get("text") or (choice.get("message") or {}).get("content") or "")
    parts = [part for item in body["output"] for part in item.get("content", [])]
    return "".join(part.get("text", "") for part in parts)


@pytest.mark.parametrize("kind", ["idle", "comments"])
async def test_a_silent_stream_is_idle(sim: SimBackend, open_backend: Open, kind: str) -> None:
    """No data, or nothing but comments, which would keep a timer of reads alive."""
    await sim.control({"mode": "stream", "break": kind, "after_events": 4, "comment_every_s": 0.02})
    backend = open_backend(sim.base_url, timeouts={"idle_s": 0.15, "total_s": 10})
    result = AttemptResult()
    with pytest.raises(BackendError) as caught:
        await backend.invoke(BackendRequest(path=CHAT, body=RequestBody(json.dumps(CHATTY).encode())), result)
    assert (caught.value.fault, result.phase) == (Fault.IDLE_TIMEOUT, Phase.STREAM)
    assert result.partial is not None


async def test_a_slow_but_steady_stream_is_not_idle(sim: SimBackend, open_backend: Open) -> None:
    """Three times as long as the silence that is allowed."""
    await sim.control({"settings": {"tokens_per_s": 20, "answer_tokens": 20}})
    backend = open_backend(sim.base_url, timeouts={"idle_s": 0.2, "total_s": 10})
    result = await ask(backend, CHAT, {"messages": [USER]})
    assert result.content_events >= 10
    assert result.ended is not None
    assert result.ended - result.started > 0.4


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("after", [0, 3])
async def test_an_error_event_is_the_answer(sim: SimBackend, open_backend: Open, dialect: str, after: int) -> None:
    """As a first event without a partial, later with one; a server that hides it just ends."""
    await sim.control({"settings": {"dialect": dialect}})
    fault = {"mode": "stream", "break": "error_event", "after_events": after, "error": "overloaded"}
    await sim.control(fault)
    backend, result = open_backend(sim.base_url, stream="always"), AttemptResult()
    request = BackendRequest(path=CHAT, body=RequestBody(json.dumps(CHATTY).encode()))
    if dialect == "ollama":
        with pytest.raises(BackendError) as caught:
            await backend.invoke(request, result)
        assert caught.value.fault is Fault.STREAM_BROKEN
    else:
        await backend.invoke(request, result)
        assert result.in_stream
        assert json.loads(result.body)["error"]["message"]
    assert (result.partial is not None) is (result.content_events > 0) is (after > 0)


@pytest.mark.parametrize("kind", ["error_event", "failed_event"])
@pytest.mark.parametrize("after", [1, 6])
async def test_a_failed_response_is_an_error(sim: SimBackend, open_backend: Open, kind: str, after: int) -> None:
    """Both ways of the Responses API to say so."""
    await sim.control({"mode": "stream", "break": kind, "after_events": after, "error": "rate_limit"})
    result = await ask(open_backend(sim.base_url, stream="always"), RESPONSES, {"input": "hi"})
    assert result.in_stream
    assert b"rate_limit_exceeded" in result.body
    assert (result.partial is not None) is (result.content_events > 0)


async def test_cancelled_in_the_middle_it_leaves_what_came(sim: SimBackend, open_backend: Open) -> None:
    """The connection is closed, so that the server can stop; the result has the text so far."""
    await sim.control({"settings": {"tokens_per_s": 50, "answer_tokens": 100}})
    backend = open_backend(sim.base_url)
    result, begun = AttemptResult(), asyncio.Event()
    request = BackendRequest(path=CHAT, body=RequestBody(json.dumps(CHATTY).encode()), on_first_token=begun.set)
    task = asyncio.ensure_future(backend.invoke(request, result))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert result.partial is not None
    assert result.ended is not None
    await sim.stats.wait_for(lambda stats: stats.client_disconnects == 1)


async def test_the_connection_of_a_stream_is_used_again(sim: SimBackend, open_backend: Open) -> None:
    """Reading goes on to the end of the response, past `[DONE]`."""
    backend = open_backend(sim.base_url)
    for _ in range(3):
        await ask(backend, CHAT, {"messages": [USER]})
    assert len(backend._pool._connections) == 1
