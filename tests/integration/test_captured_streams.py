"""What real servers sent, streamed and not, for the same request: the requester gets the whole answer, or all of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.random_bodies import canon
from tests.support.raw_http import Connection, Open, Script, answer, invoke, raw_server

FOLDER = Path(__file__).parents[1] / "streams" / "captured"
CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
TOOLS = [{"type": "function", "function": {"name": "go"}}]
USER = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def server(streamed: bytes, whole: bytes) -> Script:
    """A server that streams if it is asked to."""

    async def script(connection: Connection) -> None:
        while True:
            _, body = await connection.read_request()
            if json.loads(body).get("stream") is True:
                await connection.send(streamed)
                return
            await connection.send(whole)

    return script


def captured(name: str) -> tuple[bytes, bytes]:
    """A server's stream and its whole answer."""
    return HEAD + (FOLDER / f"{name}.sse").read_bytes(), (FOLDER / f"{name}.json").read_bytes()


@pytest.mark.parametrize(
    ("name", "path", "more"),
    [
        ("llamacpp_python_chat", CHAT, {}),
        ("litellm_tools_mock", CHAT, {}),
        ("litellm_tools_mock", CHAT, {"tools": TOOLS}),
        ("litellm_chat_logprobs", CHAT, {"logprobs": True}),
        ("litellm_completion_logprobs", TEXT, {"logprobs": 1}),
        ("litellm_completion_logprobs", TEXT, {"logprobs": 0}),
        ("litellm_stop", CHAT, {"stop": [" "]}),
        ("litellm_stop", CHAT, {"stop": " "}),
        ("litellm_stop", CHAT, {"stop_token_ids": [7]}),
        ("vllm_echo_logprobs", TEXT, {"echo": True, "logprobs": 1}),
        ("vllm_tools_cut", CHAT, {"tools": TOOLS}),
        ("vllm_tools_named", CHAT, {"tools": TOOLS, "tool_choice": "required"}),
        ("llamacpp_completion_list", TEXT, {"prompt": ["one", "two"]}),
        ("transformers_chat", CHAT, {}),
    ],
)
async def test_what_streams_lack_comes_with_the_whole_answer(
    name: str, path: str, more: dict[str, Any], open_backend: Open
) -> None:
    """With `auto` the answer is the one that the server gives unstreamed, twice in a row."""
    streamed, whole = captured(name)
    async with raw_server(server(streamed, answer(whole))) as running:
        backend = open_backend(running.url, stream="auto")
        for _ in range(2):
            result = await invoke(backend, path, json.dumps({**USER, **more}).encode())
            assert canon(json.loads(result.body)) == canon(json.loads(whole))


@pytest.mark.parametrize("name", ["llamacpp_completion_list", "transformers_chat"])
async def test_a_stream_that_was_asked_for_is_assembled(name: str, open_backend: Open) -> None:
    """Nulls and empty strings of events leave no trace; the server's times differ from one request to the next."""
    streamed, whole = captured(name)
    expected = json.loads(whole)
    path = TEXT if expected["object"] == "text_completion" else CHAT
    body = {"model": "m", "stream": True, "prompt": ["one", "two"]}
    async with raw_server(server(streamed, answer(whole))) as running:
        result = await invoke(open_backend(running.url, stream="as_requested"), path, json.dumps(body).encode())
    assert result.streamed
    got = json.loads(result.body)
    for each in (got, expected):
        each.pop("timings", None)
    assert canon(got) == canon(expected)


@pytest.mark.parametrize("name", ["vllm_tools_cut", "vllm_tools_named"])
async def test_an_assembled_tool_call_always_has_arguments(name: str, open_backend: Open) -> None:
    """Clients' types refuse one without."""
    streamed, whole = captured(name)
    async with raw_server(server(streamed, answer(whole))) as running:
        body = json.dumps({**USER, "stream": True, "tools": TOOLS}).encode()
        result = await invoke(open_backend(running.url, stream="as_requested"), CHAT, body)
    (call,) = json.loads(result.body)["choices"][0]["message"]["tool_calls"]
    assert isinstance(call["function"]["arguments"], str)


GOOD = answer(b'{"object":"response","status":"completed","output":[{"type":"message"}]}')
TOO_LONG = answer((FOLDER / "llamacpp_python_too_long_400.json").read_bytes(), status="400 Bad Request")


@pytest.mark.parametrize("asks", [{}, {"stream": True}])
@pytest.mark.parametrize("stream", ["auto", "as_requested"])
async def test_an_error_that_only_the_stream_has_is_no_answer(
    stream: str, asks: dict[str, Any], open_backend: Open
) -> None:
    """An empty stream in the place of a 400, and a 500 for what is answered unstreamed."""
    empty = (FOLDER / "llamacpp_python_too_long_empty_stream.http").read_bytes()
    frame = (FOLDER / "litellm_responses_mock_500.json").read_bytes()
    failed = answer(frame, status="500 Internal Server Error")
    for path, streamed, whole, status in [(CHAT, empty, TOO_LONG, 400), (RESPONSES, failed, GOOD, 200)]:
        async with raw_server(server(streamed, whole)) as running:
            backend = open_backend(running.url, stream=stream)
            result = await invoke(backend, path, json.dumps({**USER, **asks}).encode())
        assert (result.status, result.streamed) == (status, False)


ERROR = b'{"error":{"message":"streams are not for you","type":"forbidden"}}'
WHOLE = b'{"choices":[{"index":0,"message":{"role":"assistant","content":"Hi"},"finish_reason":"stop"}],"usage":{"prompt_tokens":1}}'


@pytest.mark.parametrize(
    "streamed",
    [
        *[answer(ERROR, status=status) for status in ("403 No", "404 No", "405 No", "500 No", "401 No", "503 No")],
        HEAD + b"data: " + ERROR + b"\n\ndata: [DONE]\n\n",
        HEAD + ERROR,
        HEAD + b'data: {"choices":[{"index":0,"delta":{"content":"Hi"}}]}\n\ndata: [DONE]\n\n',
        HEAD + b'data: {"choices":[{"index":0,"delta":{"content":"Hi"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n',
        HEAD + b"data: hello\n\n",
        HEAD,
        HEAD + b"<html>no</html>",
    ],
)
async def test_what_only_streams_have_is_asked_for_as_a_whole(streamed: bytes, open_backend: Open) -> None:
    """The whole answer comes within the attempt, and at once the next time."""
    async with raw_server(server(streamed, answer(WHOLE))) as running:
        backend = open_backend(running.url, stream="auto")
        results = [await invoke(backend, CHAT, json.dumps(USER).encode()) for _ in range(2)]
    assert [result.body for result in results] == [WHOLE, WHOLE]
    assert [b'"stream"' in body for _, body in running.requests] == [True, False, False]


async def test_json_under_the_label_of_a_stream_is_json(open_backend: Open) -> None:
    """Byte for byte, and asked for once."""
    async with raw_server(server(HEAD + WHOLE, answer(WHOLE))) as running:
        result = await invoke(open_backend(running.url, stream="auto"), CHAT, json.dumps(USER).encode())
    assert (result.body, result.streamed, len(running.requests)) == (WHOLE, False, 1)
