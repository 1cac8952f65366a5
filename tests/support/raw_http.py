"""A server of raw bytes, which writes what no real server should, and attempts against it."""

import asyncio
import contextlib
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from worker.backends.openai import HttpBackend
from worker.errors import BackendError
from worker.policy.model import Fault, Phase
from worker.ports import AttemptResult, BackendRequest
from worker.settings.schema import RouteSettings
from worker.wire.body import RequestBody


class Connection:
    """One accepted connection; `requests` of all of them stand in the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, server: "RawServer") -> None:
        self.reader = reader
        self.writer = writer
        self._server = server

    async def read_request(self) -> tuple[bytes, bytes]:
        """Return head and body of one request; IncompleteReadError at the end of the connection."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = next(
            (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
        )
        body = await self.reader.readexactly(length)
        self._server.requests.append((head, body))
        return head, body

    async def send(self, data: bytes) -> None:
        """Send and wait until the kernel has it."""
        self.writer.write(data)
        await self.writer.drain()

    def reset(self) -> None:
        """Close with RST: the other side reads ECONNRESET."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def wait_closed_by_peer(self) -> None:
        """Return when the other side has closed; counted by the server."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass
        self._server.closed_by_peer += 1


async def until(condition: Callable[[], object]) -> None:
    """Return when the condition holds; the test's own time limit bounds it."""
    while not condition():  # noqa: ASYNC110 - any condition, not one that an event was made for
        await asyncio.sleep(0)


async def pause(seconds: float) -> None:
    """The pace of a server, in real time."""
    await asyncio.sleep(seconds)


Script = Callable[[Connection], Awaitable[None]]


class RawServer:
    """A listening server; `url` is its address, `requests` what came, `connections` how many."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[tuple[bytes, bytes]] = []
        self.connections = 0
        self.closed_by_peer = 0


@contextlib.asynccontextmanager
async def raw_server(script: Script, tls: ssl.SSLContext | None = None) -> AsyncIterator[RawServer]:
    """Serve every connection with the script, on loopback; ends what still runs when left."""
    server = RawServer()
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.connections += 1
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await script(Connection(reader, writer, server))
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 24, ssl=tls)
    server.url = f"http{'' if tls is None else 's'}://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def answer(body: bytes, *headers: str, status: str = "200 OK", length: int | None = None) -> bytes:
    """Return a whole response; `length` stands for the true one."""
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json"]
    lines += [*headers, f"Content-Length: {len(body) if length is None else length}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def always(*pieces: bytes) -> Script:
    """Answer every request of a connection with the pieces."""

    async def script(connection: Connection) -> None:
        while True:
            await connection.read_request()
            for piece in pieces:
                await connection.send(piece)

    return script


BODY = b'{"model" : "m","n":12345678901234567890, "x":"\\u00e9\xc3\xa9"}\n'
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
SHORT = {"connect_s": 0.1, "idle_s": 0.1, "total_s": 5}

Open = Callable[..., HttpBackend]
"""A base URL and settings of a route to a backend; the fixture `open_backend`."""


async def invoke(backend: HttpBackend, path: str = "/v1/x", body: bytes = BODY, **more: Any) -> AttemptResult:
    result = AttemptResult()
    await backend.invoke(BackendRequest(path=path, body=RequestBody(body), **more), result)
    return result


class Attempt:
    """One attempt, its result, and how it ended."""

    def __init__(self, base_url: str, timeouts: dict[str, Any] | None = None, **route: Any) -> None:
        settings = {"name": "r", "base_url": base_url, "timeouts": {**SHORT, **(timeouts or {})}, **route}
        self.backend = HttpBackend(RouteSettings.model_validate(settings))
        self.result = AttemptResult()
        self.seconds = 0.0

    async def fail(self, body: bytes = b"{}", timeout_s: float | None = None) -> BackendError:
        """Return the error with which it must end."""
        began = time.monotonic()
        with pytest.raises(BackendError) as caught:
            await self.backend.invoke(
                BackendRequest(path="/v1/x", body=RequestBody(body), timeout_s=timeout_s), self.result
            )
        self.seconds = time.monotonic() - began
        await self.backend.aclose()
        assert self.result.ended is not None
        assert isinstance(caught.value.fault, Fault)
        return caught.value

    def outcome(self, error: BackendError) -> tuple[str, Phase, int | None]:
        return error.fault, self.result.phase, self.result.status
