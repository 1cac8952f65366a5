"""Requests that go on from what a broken stream had generated."""

import json
from typing import Any

import pytest

from tests.support.streams import TEXT, delta, event, feed, feed_all, tool, usage_chunk
from worker.backends.request.continuation import can_continue, continue_call, resume_point_of
from worker.backends.request.stream import Form
from worker.ports import ResumePoint
from worker.wire.body import RequestBody
from worker.wire.endpoints import endpoint_of

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "hello"}
CONVERSATION = {"model": "m", "messages": [USER]}
RESUME_POINT = ResumePoint(text='He said "hi",', tokens=40)
OPENED = {"role": "assistant", "content": 'He said "hi",'}


def continued(mode: Any, path: str, body: dict[str, Any] | bytes, form: Form = Form.STREAM_WITH_USAGE) -> Any:
    """The request that is sent instead, `None` where there is none."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    call = continue_call(mode, endpoint_of(path), RequestBody(data), form=form, resume_point=RESUME_POINT)
    if call is None:
        return None
    assert call.salvaged_tokens == 40
    sent = json.loads(call.body)
    assert sent.pop("stream") is True
    assert sent.pop("stream_options") == {"include_usage": True}
    return sent


def test_vllm_goes_on_from_an_open_last_message() -> None:
    """Both keys, since there they exclude each other and one has a default."""
    assert continued("vllm", CHAT, CONVERSATION) == {
        "model": "m",
        "messages": [USER, OPENED],
        "continue_final_message": True,
        "add_generation_prompt": False,
    }


def test_sglang_has_one_key() -> None:
    """The other one is unknown to it."""
    sent = continued("sglang", CHAT, CONVERSATION)
    assert (sent["continue_final_message"], sent["messages"][-1]) == (True, OPENED)
    assert "add_generation_prompt" not in sent


@pytest.mark.parametrize("mode", ["vllm", "sglang", "prompt"])
def test_a_completion_goes_on_behind_its_prompt(mode: str) -> None:
    """The text follows the prompt, whose own bytes stay; the limit is what is left of it."""
    data = b'{"prompt":"\\u00dcber","max_tokens":100}'
    assert continued(mode, TEXT, data) == {"prompt": 'ÜberHe said "hi",', "max_tokens": 60}


def test_the_earlier_messages_keep_their_bytes() -> None:
    """A conversation may hold megabytes of images: nothing of it is decoded."""
    data = b'{"messages":[ {"role":"user","content":"\\u00e9","x":1.0e3} ]}'
    rest = ResumePoint(text="a", tokens=1)
    call = continue_call("sglang", endpoint_of(CHAT), RequestBody(data), form=Form.STREAM, resume_point=rest)
    assert call is not None
    assert b'[ {"role":"user","content":"\\u00e9","x":1.0e3} ,{"role":"assistant","content":"a"}]' in call.body


@pytest.mark.parametrize(("limit", "left"), [(100, 60), (41, 1), (40, 1), (5, 1)])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_limit_of_tokens_is_what_is_left_of_it(name: str, limit: int, left: int) -> None:
    """At least one token: a limit of none is refused."""
    assert continued("vllm", CHAT, {**CONVERSATION, name: limit})[name] == left


@pytest.mark.parametrize(
    "body",
    [
        {"n": 2},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        {"guided_json": {"type": "object"}},
        {"structured_outputs": {"regex": "a"}},
        {"regex": "a+"},
        {"logprobs": True},
        {"echo": True},
        {"min_tokens": 5},
        {"continue_final_message": True, "messages": [USER, OPENED]},
        {"messages": [USER, OPENED]},
        {"messages": []},
        {"messages": "hello"},
        {"messages": [1]},
    ],
)
def test_what_would_start_over_starts_anew(body: dict[str, Any]) -> None:
    """Grammars, tools, several answers and texts that the request began itself are not continued."""
    assert continued("vllm", CHAT, {**CONVERSATION, **body}) is None


@pytest.mark.parametrize(
    "body", [{"tools": []}, {"response_format": {"type": "text"}}, {"n": 1}, {"logprobs": False}, {"stop": ["x"]}]
)
def test_what_asks_for_nothing_special_is_continued(body: dict[str, Any]) -> None:
    """Defaults that are written out change nothing."""
    assert continued("vllm", CHAT, {**CONVERSATION, **body})["continue_final_message"] is True


@pytest.mark.parametrize(
    ("mode", "path", "body"),
    [
        ("off", CHAT, CONVERSATION),
        ("prompt", CHAT, CONVERSATION),
        ("vllm", "/v1/responses", {"input": "hi"}),
        ("off", TEXT, {"prompt": "a", "max_tokens": 9}),
        ("prompt", TEXT, {"prompt": "a"}),
        ("prompt", TEXT, {"prompt": ["a"], "max_tokens": 9}),
        ("prompt", TEXT, {"prompt": [1, 2], "max_tokens": 9}),
        ("prompt", TEXT, {"prompt": "a", "max_tokens": 9, "suffix": "b"}),
        ("prompt", TEXT, {"prompt": "a", "max_tokens": 9, "echo": True}),
    ],
)
def test_what_the_setting_does_not_cover_starts_anew(mode: str, path: str, body: dict[str, Any]) -> None:
    """Chats need a server's own way; completions one prompt of text and a limit that says what is left."""
    assert continued(mode, path, body) is None


def test_a_request_that_is_not_streamed_is_not_continued() -> None:
    """The rest has to be put behind the text, which is done event by event."""
    assert continued("vllm", CHAT, CONVERSATION, Form.UNARY) is None


def test_the_continuation_begins_with_the_text() -> None:
    """What the server says is put behind what was there."""
    body = RequestBody(json.dumps(CONVERSATION).encode())
    call = continue_call("vllm", endpoint_of(CHAT), body, form=Form.STREAM, resume_point=RESUME_POINT)
    assert call is not None
    accumulator = call.new_accumulator()
    assert accumulator is not None
    feed_all(accumulator, [event(delta(content=" and left.")), event(delta("stop"))])
    message = json.loads(accumulator.result())["choices"][0]["message"]
    assert message["content"] == 'He said "hi", and left.'


def test_what_is_salvaged() -> None:
    """The text without white space at its end, and about a token for each event with text."""
    assert resume_point_of(feed(delta(content="Hel"), delta(content="lo ")), None) == ResumePoint(
        text="Hello", tokens=2
    )
    assert resume_point_of(feed(delta(content="lo"), prefix={0: "Hel"}), 7) == ResumePoint(text="Hello", tokens=8)


def test_the_servers_own_count_is_better() -> None:
    """Some send usage with every chunk, and several tokens in one event."""
    accumulator = feed(delta(content="Hello there"), usage_chunk(prompt_tokens=5, completion_tokens=4))
    assert resume_point_of(accumulator, 10) == ResumePoint(text="Hello there", tokens=14)


@pytest.mark.parametrize(
    "deltas",
    [
        [{"role": "assistant", "content": ""}],
        [{"content": " \n"}],
        [{"reasoning": "hm"}],
        [{"reasoning_content": "hm"}, {"content": "Hello"}],
        [{"content": "Let me see"}, tool(0, "a", "f", "{")],
        [{"refusal": "no"}],
    ],
)
def test_nothing_but_text_is_salvaged(deltas: list[dict[str, Any]]) -> None:
    """Thoughts, tool calls and refusals cannot be put into a message that goes on."""
    assert resume_point_of(feed(*[delta(**each) for each in deltas]), None) is None


def test_responses_are_not_continued() -> None:
    """The API has no such thing."""
    for path in ("/v1/responses", "/v1/embeddings"):
        assert not can_continue("vllm", endpoint_of(path), RequestBody(b"{}"))
