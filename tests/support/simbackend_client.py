"""A client of the simulated server that sees bytes, shared by its integration tests."""

import asyncio
import json
import re
from typing import Any

import aiohttp

from worker.emulators.openai import SimBackend

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
