"""The simulated server: a client that sees bytes, and its answers and streams made without a server."""

import asyncio
import json
import re
from typing import Any

import aiohttp

from worker.emulators.openai import SimBackend
from worker.emulators.openai.answers import Identity, chunk_events
from worker.emulators.openai.dialects import DIALECTS
from worker.emulators.openai.generation import Generation, generate
from worker.emulators.openai.options import SimOptions
from worker.emulators.openai.seeded import Draws
from worker.emulators.openai.sse import BOM, Event, StreamStep, Write
from worker.emulators.openai.validation import Call, Endpoint, check

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
STREAM = {**CHAT, "stream": True}


async def post(http: aiohttp.ClientSession, sim: SimBackend, body: Any = CHAT) -> tuple[int, bytes, Any]:
    """Return status, body and headers of one chat request."""
    async with http.post(sim.base_url + "/v1/chat/completions", json=body) as response:
        return response.status, await response.read(), response.headers


async def raw(sim: SimBackend, body: Any = STREAM) -> tuple[bytes, int]:
    """Return every byte of the answer to a request and how the connection ended: 0 or an errno."""
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(*sim.base_url.removeprefix("http://").split(":"))
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    writer.write(head % len(data) + data)
    received = bytearray()
    ended = 0
    try:
        while part := await reader.read(65536):
            received += part
    except OSError as error:
        ended = error.errno or -1
    writer.close()
    return bytes(received), ended


def unchunked(answer: bytes) -> bytes:
    """Return the data of the whole chunks of an answer."""
    rest = answer.partition(b"\r\n\r\n")[2]
    data = b""
    while match := re.match(rb"([0-9a-f]+)\r\n", rest):
        size = int(match[1], 16)
        if size == 0 or len(rest) < match.end() + size + 2:
            break
        data += rest[match.end() : match.end() + size]
        rest = rest[match.end() + size + 2 :]
    return data


def normal(data: bytes) -> bytes:
    """Return a stream without the id, which differs between repeats of a request."""
    return re.sub(rb"chatcmpl-\w+", b"id", data)


ME = Identity("job-1", 1_800_000_000)


def stream_call(endpoint: Endpoint = Endpoint.CHAT, **body: Any) -> Call:
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


def unary_call(endpoint: Endpoint = Endpoint.CHAT, **body: Any) -> Call:
    """Return a checked call."""
    base: dict[Endpoint, dict[str, Any]] = {
        Endpoint.CHAT: {"messages": [{"role": "user", "content": "hello"}]},
        Endpoint.COMPLETIONS: {"prompt": "once"},
        Endpoint.RESPONSES: {"input": "hi"},
        Endpoint.EMBEDDINGS: {"input": "hi"},
        Endpoint.MODERATIONS: {"input": "hi"},
        Endpoint.IMAGES: {"prompt": "hi"},
        Endpoint.EDITS: {"prompt": "hi", "images": [{"file_id": "file-1"}]},
    }
    return check(endpoint, {"model": "m", **base[endpoint], **body}, SimOptions())


def generated(call: Call, body: bytes = b"x", *, seed: int = 0, **settings: Any) -> Generation:
    """Return what the model says to a call."""
    return generate(call, Draws(seed, body), SimOptions.of(**settings))


def events_of(call: Call, dialect: str = "openai", **settings: Any) -> list[Event]:
    """Return the events of a whole stream."""
    return chunk_events(call, generated(call, **settings), DIALECTS[dialect], ME)


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


def written(steps: list[StreamStep]) -> bytes:
    """Return the bytes that the steps write."""
    return b"".join(step.data for step in steps if isinstance(step, Write))
