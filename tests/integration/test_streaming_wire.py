"""Streams on raw sockets: what is asked for, every recorded shape, and servers that do something else than they should."""

import asyncio
import gzip
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.random_bodies import canon
from tests.support.raw_http import Connection, Open, Script, answer, invoke, pause, raw_server
from tests.support.streams import DONE_BYTES, HEL, LO, STOP, WHOLE, delta, sse
from tests.support.waiting import eventually
from worker.errors import BackendError
from worker.policy.model import Fault, Phase
from worker.ports import AttemptResult, BackendRequest, ResumePoint
from worker.wire.body import RequestBody

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODY = b'{"model":"m", "messages":[{"role":"user","content":"\\u00e9"}], "seed":12345678901234567890}'
SHAPES = {
    file.stem: (file.read_bytes(), json.loads(file.with_suffix(".json").read_bytes()))
    for file in sorted((Path(__file__).parents[1] / "streams").glob("*.sse"))
}
WHOLE_BODY = b'{"choices":[{"index":0,"message":{"role":"assistant","content":"Hi"},"finish_reason":"stop"}]}'


@pytest.fixture
def open_backend(open_backend: Open) -> Open:
    """Backends that are asked for streams wherever that is possible, unless a test says otherwise."""
    return partial(open_backend, stream="auto")


def stream(*pieces: bytes, content_type: str = "text/event-stream", end: bool = True, extra: str = "") -> list[bytes]:
    """A chunked response, one chunk a piece."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nTransfer-Encoding: chunked\r\n{extra}\r\n".encode()
    chunks = [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces if piece]
    return [head, *chunks, *([b"0\r\n\r\n"] if end else [])]


def replies(*answers: list[bytes]) -> Script:
    """Answer one request after the other, the last answer for ever."""
    waiting = list(answers)

    async def script(connection: Connection) -> None:
        while True:
            await connection.read_request()
            pieces = waiting.pop(0) if len(waiting) > 1 else waiting[0]
            for piece in pieces:
                await connection.send(piece)
                await asyncio.sleep(0)

    return script


def refusal(param: str, message: str = "not supported") -> list[bytes]:
    body = {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": "unsupported_value"}}
    return [answer(json.dumps(body).encode(), status="400 Bad Request")]


def text(result: AttemptResult) -> str:
    return str(json.loads(result.body)["choices"][0]["message"]["content"])


# What is asked for


async def test_the_request_is_the_given_one_with_two_more_keys(open_backend: Open) -> None:
    """Every byte of the body stands behind them as it came, and no header is another one."""
    async with raw_server(replies(stream(*WHOLE))) as server:
        await invoke(open_backend(server.url), CHAT, BODY)
    ((head, body),) = server.requests
    assert body == b'{"stream":true,"stream_options":{"include_usage":true},' + BODY[1:]
    assert b"\r\naccept: application/json\r\n" in head.lower()


async def test_what_asks_for_a_stream_itself_is_sent_byte_for_byte(open_backend: Open) -> None:
    """Also with white space in unusual places."""
    body = b'{ "stream" :true , "stream_options": {"include_usage":true}, "messages":[] } '
    async with raw_server(replies(stream(*WHOLE))) as server:
        await invoke(open_backend(server.url), CHAT, body)
    assert server.requests[0][1] == body


async def test_never_means_never(open_backend: Open) -> None:
    """Not a byte is added, and a stream that is asked for is not."""
    async with raw_server(replies([answer(WHOLE_BODY)])) as server:
        backend = open_backend(server.url, stream="never")
        await invoke(backend, CHAT, BODY)
        await invoke(backend, CHAT, b'{"stream": true, "a":1}')
    assert [body for _, body in server.requests] == [BODY, b'{"a":1}']


# What comes


@pytest.mark.parametrize("size", [1, 11, 100_000])
@pytest.mark.parametrize("name", SHAPES)
async def test_recorded_shapes(name: str, size: int, open_backend: Open) -> None:
    """The stream of every server, cut into chunks of any size, becomes the answer or the failure that it stands for."""
    data, expected = SHAPES[name]
    path = "/v1/responses" if b"event: response" in data else TEXT if b'"text_completion"' in data else CHAT
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    async with raw_server(replies([b"".join(stream(*pieces))])) as server:
        result = await invoke(open_backend(server.url), path, b'{"model":"m"}')
    if "partial" not in expected:
        assert canon(json.loads(result.body)) == canon(expected)
        assert (result.in_stream, result.partial) == (False, None)
        return
    assert result.in_stream
    assert json.loads(result.body) == expected["error"]
    assert canon(json.loads(result.partial) if result.partial else None) == canon(expected["partial"])


async def test_a_server_that_does_not_stream_is_read_as_ever(open_backend: Open) -> None:
    """JSON in answer to a request for a stream is the answer, byte for byte."""
    async with raw_server(replies([answer(WHOLE_BODY)])) as server:
        result = await invoke(open_backend(server.url), CHAT, BODY)
    assert (result.body, result.streamed, result.first_token_at, result.stream_usage) == (WHOLE_BODY, False, None, None)


@pytest.mark.parametrize("content_type", ["text/plain", "application/json", "application/octet-stream"])
async def test_a_stream_under_another_name_is_a_stream(content_type: str, open_backend: Open) -> None:
    """Proxies label things; the first bytes say what it is."""
    async with raw_server(replies(stream(*WHOLE, content_type=content_type))) as server:
        result = await invoke(open_backend(server.url), CHAT, BODY)
    assert (text(result), result.stream_usage) == ("Hello", {"prompt_tokens": 3, "completion_tokens": 2})


@pytest.mark.parametrize("content_type", ["application/json", "text/event-stream"])
@pytest.mark.parametrize("blank", [b"\xef\xbb\xbf", b"\r\n ", b"\xef\xbb\xbf\n"])
@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings"])
async def test_json_is_json_under_any_name_and_behind_a_byte_order_mark(
    path: str, blank: bytes, content_type: str, open_backend: Open
) -> None:
    """The mark is no part of the answer."""
    async with raw_server(replies(stream(blank + WHOLE_BODY, content_type=content_type))) as server:
        result = await invoke(open_backend(server.url), path, BODY)
    assert (result.body.strip(), result.streamed) == (WHOLE_BODY, False)
    assert len(server.requests) == 1


async def test_a_stream_that_was_not_asked_for_is_assembled(open_backend: Open) -> None:
    """Some servers know nothing else."""
    async with raw_server(replies(stream(*WHOLE))) as server:
        result = await invoke(open_backend(server.url, stream="never"), CHAT, BODY)
    assert text(result) == "Hello"


async def test_what_cannot_be_assembled_stays_what_it_is(open_backend: Open) -> None:
    """On another path the policy will find that it is no JSON."""
    async with raw_server(replies(stream(HEL, DONE_BYTES))) as server:
        result = await invoke(open_backend(server.url), "/v1/embeddings", BODY)
    assert (result.body, result.streamed) == (HEL + DONE_BYTES, False)


async def test_a_compressed_stream_is_unpacked(open_backend: Open) -> None:
    """Some proxies compress although that was not asked for."""
    packed = gzip.compress(b"".join(WHOLE))
    pieces = [packed[at : at + 20] for at in range(0, len(packed), 20)]
    async with raw_server(replies(stream(*pieces, extra="Content-Encoding: gzip\r\n"))) as server:
        result = await invoke(open_backend(server.url), CHAT, BODY)
    assert text(result) == "Hello"


@pytest.mark.parametrize("status", ["400 Bad Request", "429 Too Many Requests", "500 Internal Server Error"])
async def test_an_error_status_with_a_stream_is_an_error(status: str, open_backend: Open) -> None:
    """LiteLLM puts its errors into events, under their status: the policy reads them there."""
    frame = b'data: {"error": {"message": "no", "code": "429"}}\n\ndata: [DONE]\n\n'
    response = [answer(frame, status=status).replace(b"application/json", b"text/event-stream")]
    async with raw_server(replies(response)) as server:
        result = await invoke(open_backend(server.url), CHAT, BODY)
    assert (result.body, result.status, result.streamed, result.in_stream) == (frame, int(status[:3]), False, False)


async def test_too_many_bytes_end_the_stream(open_backend: Open) -> None:
    """All events together."""
    async with raw_server(replies(stream(*[HEL] * 100))) as server:
        backend, result = open_backend(server.url, max_response_bytes=3000), AttemptResult()
        with pytest.raises(BackendError) as caught:
            await backend.invoke(BackendRequest(path=CHAT, body=RequestBody(BODY)), result)
    assert caught.value.fault is Fault.RESPONSE_TOO_LARGE


async def test_the_end_of_the_connection_does_not_spoil_a_whole_answer(open_backend: Open) -> None:
    """A reset behind the last finish reason."""

    result = AttemptResult()

    async def script(connection: Connection) -> None:
        await connection.read_request()
        await connection.send(b"".join(stream(HEL, LO, STOP, end=False)))
        await eventually(lambda: result.first_token_at is not None)  # it has read the segment; a reset overtakes data
        connection.reset()

    async with raw_server(script) as server:
        await open_backend(server.url).invoke(BackendRequest(path=CHAT, body=RequestBody(BODY)), result)
    assert (text(result), result.missing_done, result.phase) == ("Hello", True, Phase.PARSE)


@pytest.mark.parametrize("cut", [False, True])
async def test_a_broken_chunk_does_not_spoil_a_whole_answer(cut: bool, open_backend: Open) -> None:
    """In the same write as the answer and its headers, or in the next one."""
    whole = b"".join(stream(HEL, LO, STOP, end=False))

    async def script(connection: Connection) -> None:
        await connection.read_request()
        if cut:
            await connection.send(whole)
            await pause(0.01)
        await connection.send(b"ZZ\r\n" if cut else whole + b"ZZ\r\n")
        await connection.wait_closed_by_peer()

    async with raw_server(script) as server:
        result = await invoke(open_backend(server.url), CHAT, BODY)
        assert (text(result), result.missing_done) == ("Hello", True)


async def test_what_came_before_a_broken_chunk_is_kept(open_backend: Open) -> None:
    """All in one write; the words are the parser's."""
    async with raw_server(replies([b"".join(stream(HEL, end=False)) + b"ZZ\r\n"])) as server:
        result = AttemptResult()
        with pytest.raises(BackendError) as caught:
            await open_backend(server.url).invoke(BackendRequest(path=CHAT, body=RequestBody(BODY)), result)
    assert (caught.value.fault, result.status, result.content_events) == (Fault.DECODING, 200, 1)
    assert "chunk size" in caught.value.detail


# Servers that refuse


@pytest.mark.parametrize(
    ("refusals", "forms"),
    [
        ([refusal("stream")], [2, 0]),
        ([refusal("stream_options")], [2, 1]),
        ([refusal("stream_options"), refusal("stream")], [2, 1, 0]),
        ([refusal("", "Streaming is not supported by this model.")], [2, 0]),
    ],
)
async def test_a_refused_form_is_lowered_within_the_attempt(
    refusals: list[list[bytes]], forms: list[int], open_backend: Open, logs: list[Any]
) -> None:
    """Nothing was generated yet; what was taken in the end is asked for at once the next time, and told once."""
    good = stream(*WHOLE) if forms[-1] else [answer(WHOLE_BODY)]
    async with raw_server(replies(*refusals, good)) as server:
        backend = open_backend(server.url)
        results = [await invoke(backend, CHAT, BODY) for _ in range(2)]
    assert [result.status for result in results] == [200, 200]
    asked = [json.loads(body) for _, body in server.requests]
    assert [("stream" in body) + ("stream_options" in body) for body in asked] == [*forms, forms[-1]]
    assert len([line for line in logs if line["event"] == "streaming_refused"]) == 1


async def test_a_lowered_form_has_its_own_first_byte(open_backend: Open) -> None:
    """The silence behind the second request is no silence inside the first one's answer."""

    async def script(connection: Connection) -> None:
        await connection.read_request()
        await connection.send(refusal("stream")[0])
        await connection.read_request()
        await connection.wait_closed_by_peer()

    async with raw_server(script) as server:
        backend = open_backend(server.url, timeouts={"idle_s": 0.05, "first_byte_s": 0.2, "total_s": 5})
        result = AttemptResult()
        with pytest.raises(BackendError) as caught:
            await backend.invoke(BackendRequest(path=CHAT, body=RequestBody(BODY)), result)
    assert (caught.value.fault, result.phase) == (Fault.FIRST_BYTE_TIMEOUT, Phase.HEADERS)


async def test_a_connection_lost_while_lowering_the_form_is_no_refusal(open_backend: Open) -> None:
    """What the first request was told does not stand for the second one's end."""

    async def script(connection: Connection) -> None:
        await connection.read_request()
        if len(server.requests) == 1:
            await connection.send(refusal("stream")[0])
            await connection.read_request()  # and on the fresh connection, on which it is asked again, neither

    async with raw_server(script) as server:
        backend, result = open_backend(server.url), AttemptResult()
        with pytest.raises(BackendError) as caught:
            await backend.invoke(BackendRequest(path=CHAT, body=RequestBody(BODY)), result)
    assert (caught.value.fault, result.phase) == (Fault.CONNECTION_LOST, Phase.HEADERS)
    assert (result.status, result.body, result.headers) == (None, b"", {})


# Going on


async def test_a_completion_is_continued_on_any_server(open_backend: Open) -> None:
    """The text that came stands behind the prompt; the answer is all of it."""

    def part(text: str, finish: str | None = None) -> bytes:
        return sse({"object": "text_completion", "choices": [{"index": 0, "text": text, "finish_reason": finish}]})

    request = BackendRequest(path=TEXT, body=RequestBody(b'{"prompt":"Once","max_tokens":9}'))
    async with raw_server(
        replies(stream(part(" upon"), part(" a")), stream(part(" time", "stop"), DONE_BYTES))
    ) as server:
        backend, result = open_backend(server.url, continuation="prompt"), AttemptResult()
        with pytest.raises(BackendError):
            await backend.invoke(request, result)
        assert result.resume_point == ResumePoint(text=" upon a", tokens=2)
        again = await invoke(backend, TEXT, request.body.data, resume_point=result.resume_point)
    sent = json.loads(server.requests[1][1])
    assert (sent["prompt"], sent["max_tokens"]) == ("Once upon a", 7)
    assert json.loads(again.body)["choices"][0]["text"] == " upon a time"
    assert again.salvaged_tokens == 2


async def test_what_was_salvaged_survives_a_server_that_is_away(open_backend: Open) -> None:
    """A refused connection leaves it for the next attempt, and for the answer if there is none."""
    backend, result = open_backend("http://127.0.0.1:1", continuation="vllm"), AttemptResult()
    request = BackendRequest(path=CHAT, body=RequestBody(BODY), resume_point=ResumePoint(text="Hel", tokens=1))
    with pytest.raises(BackendError) as caught:
        await backend.invoke(request, result)
    assert caught.value.fault is Fault.CONNECT
    assert (result.resume_point, result.content_events) == (request.resume_point, 0)
    assert result.partial is not None
    assert "Hel" in result.partial.decode()


async def test_a_continuation_that_breaks_again_leaves_all_that_came(open_backend: Open) -> None:
    """What it began with and what it added."""
    async with raw_server(replies(stream(sse(delta(content="lo "))))) as server:
        backend, result = open_backend(server.url, continuation="vllm"), AttemptResult()
        request = BackendRequest(path=CHAT, body=RequestBody(BODY), resume_point=ResumePoint(text="Hel", tokens=1))
        with pytest.raises(BackendError):
            await backend.invoke(request, result)
    assert result.resume_point == ResumePoint(text="Hello", tokens=2)
    assert json.loads(result.partial or b"")["choices"][0]["message"]["content"] == "Hello "
