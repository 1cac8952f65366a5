"""A server of raw bytes: each test writes what one connection sends and when, including what no real server should."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable


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
async def raw_server(script: Script) -> AsyncIterator[RawServer]:
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

    listener = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 24)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
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
