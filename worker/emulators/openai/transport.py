"""
Connections and the bytes on them: the listening socket, HTTP/1.1 heads and chunks, and one answer sent well or badly.

aiohttp parses requests and keeps connections.  The answers are written here, directly, because rehearsals need bytes
that a framework refuses to send: a Content-Length that lies, a chunk that stops half-way, an illegal chunk header.
`SENT` and `SENT_AND_CLOSE` tell aiohttp that everything has been written.

Source: RFC 9112.
"""

import asyncio
import errno
import socket
import struct
from collections.abc import Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import HttpVersion11
from aiohttp.web_request import BaseRequest

from worker.emulators.openai.dialects import Answer
from worker.emulators.openai.sagemaker import FrameFault, Framer, model_error
from worker.emulators.openai.sse import Ending
from worker.wire.sagemaker import EVENT_STREAM, STREAM_CONTENT_TYPE

if TYPE_CHECKING:
    from aiohttp.web import Server
    from aiohttp.web_protocol import RequestHandler


LAST_CHUNK = b"0\r\n\r\n"
ILLEGAL_CHUNK = b"zz\r\n"
"""A chunk header that is not hexadecimal."""

_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


def response_head(
    status: int,
    content_type: str,
    headers: Mapping[str, str],
    *,
    length: int | None,
    chunked: bool = False,
    close: bool = False,
) -> bytes:
    """
    Return a response's head with its blank line.

    Args:
        status: Any number; one without a known phrase has none.
        content_type: Without it an empty text leaves the header out.
        headers: Further headers; values are sent as UTF-8.
        length: Content-Length; None leaves it out.
        chunked: Whether chunks follow.
        close: Whether the connection ends after the body.
    """
    lines = [_LINES.get(status) or f"HTTP/1.1 {status} \r\n".encode()]
    if content_type:
        lines.append(b"Content-Type: %b\r\n" % content_type.encode())
    if length is not None:
        lines.append(b"Content-Length: %d\r\n" % length)
    if chunked:
        lines.append(b"Transfer-Encoding: chunked\r\n")
    if close:
        lines.append(b"Connection: close\r\n")
    lines += [f"{name}: {value}\r\n".encode("utf-8", "surrogateescape") for name, value in headers.items()]
    lines.append(b"\r\n")
    return b"".join(lines)


def chunk(data: bytes) -> bytes:
    """Return data as one chunk; empty data gives nothing, because an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def cut_chunk(data: bytes) -> bytes:
    """Return a chunk that announces 16 bytes more than it has."""
    return b"%x\r\n%b" % (len(data) + 16, data)


_MAX_PORT = 65_535
BACKLOG = 1024
"""Connections the kernel holds ready: rehearsals open hundreds at once after an outage."""
_BIND_TRIES = 200
_BIND_PAUSE_S = 0.01
"""Together two seconds for a closed socket to free its port; an event loop closes it a turn later."""
_NO_LINGER = struct.pack("ii", 1, 0)


def reset(transport: asyncio.Transport | None) -> None:
    """Close a connection with a TCP reset: what was not sent is dropped, the other side sees an error."""
    if transport is None or transport.is_closing():
        return
    connection = transport.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    transport.abort()


def _bound(host: str, port: int) -> socket.socket:
    if not 0 <= port <= _MAX_PORT:  # the C library would take it modulo 65536
        raise OSError(errno.EINVAL, f"a port is a number from 0 to {_MAX_PORT}")
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setblocking(False)  # noqa: FBT003 - the standard library's signature
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock


class Listener:
    """
    A listening socket that can stop listening and come back on the same port.

    While it refuses, the port stays bound by a socket that does not listen: the kernel answers connection attempts with
    a reset, which clients see as "connection refused", and no other program can take the port meanwhile.
    """

    def __init__(self, server: "Server", host: str, port: int) -> None:
        """Serve connections at `host` and `port` (0 is any) with aiohttp's low-level `server`; opens nothing yet."""
        self._server = server
        self._host = host
        self.port = port
        """The real port once it is open."""
        self._listening: asyncio.Server | None = None
        self._reserved: socket.socket | None = None

    @property
    def is_open(self) -> bool:
        """Whether connections are accepted."""
        return self._listening is not None

    async def open(self) -> None:
        """
        Accept connections; does nothing if it already does.

        Raises:
            OSError: the address cannot be bound; permanent for this port.

        Cancellation: the socket may stay closed; call it again.
        """
        if self._listening is not None:
            return
        sock, self._reserved = self._reserved or _bound(self._host, self.port), None
        self.port = sock.getsockname()[1]
        self._listening = await asyncio.get_running_loop().create_server(self._server, sock=sock, backlog=BACKLOG)

    async def refuse(self) -> None:
        """
        Stop accepting and keep the port; open connections stay.

        Raises:
            OSError: another program took the port in the moment between; `open` will try again.

        Cancellation: accepts nothing; the port may be free for others.
        """
        if self._listening is None:
            return
        self._listening.close()
        self._listening = None
        for left in reversed(range(_BIND_TRIES)):
            try:
                self._reserved = _bound(self._host, self.port)
            except OSError:
                if not left:
                    raise
                await asyncio.sleep(_BIND_PAUSE_S)
            else:
                return

    def drop(self, kept: "RequestHandler | None" = None) -> None:
        """Reset every open connection but one."""
        for connection in self._server.connections:
            if connection is not kept:
                reset(connection.transport)

    async def aclose(self) -> None:
        """Stop for good: close the socket and every connection. Cancellation: connections may be left open."""
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None
        self.drop()
        await self._server.shutdown(0.05)


_JOIN_BYTES = 1 << 16
"""Size of the pieces written to the socket when no step waits."""
_BREAK_PAUSE_S = 0.01
"""Time for the client to read what came before: a reset overtakes data, and parsers drop a damaged segment whole."""


class _Written(web.StreamResponse):
    """An answer that is already on the wire; one object serves every request."""

    def __init__(self, *, keep: bool) -> None:
        super().__init__()
        self._keep_alive = keep

    async def prepare(self, request: BaseRequest) -> AbstractStreamWriter | None:  # noqa: ARG002 - aiohttp's signature
        return None

    async def write_eof(self, data: bytes = b"") -> None:  # noqa: ARG002 - aiohttp's signature
        return None


SENT = _Written(keep=True)
SENT_AND_CLOSE = _Written(keep=False)


class Sender:
    """
    The answering side of one request.

    Every method raises ConnectionResetError when the client has disconnected.
    """

    __slots__ = ("_request", "_request_id")

    def __init__(self, request: BaseRequest, request_id: str) -> None:
        """Answer `request`; `request_id` goes into the header `x-request-id` of every answer."""
        self._request = request
        self._request_id = request_id

    def _write(self, data: bytes) -> None:
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has disconnected")
        transport.write(data)

    def _headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        return {"x-request-id": self._request_id, **headers}

    def answer(self, answer: Answer) -> web.StreamResponse:
        """Send a whole answer."""
        keep = self._request.keep_alive
        head = response_head(
            answer.status,
            answer.content_type,
            self._headers(answer.headers),
            length=len(answer.body),
            close=not keep,
        )
        self._write(head + answer.body)
        return SENT if keep else SENT_AND_CLOSE

    async def answer_slowly(self, answer: Answer, delay_s: float, sent: int | None) -> web.StreamResponse:
        """
        Send the head, wait, then send the body, or only its first `sent` bytes and close.

        Cancellation: the answer stays incomplete; aiohttp closes the connection.
        """
        headers = self._headers(answer.headers)
        self._write(response_head(answer.status, answer.content_type, headers, length=len(answer.body), close=True))
        if delay_s:
            await asyncio.sleep(delay_s)
        self._write(answer.body[:sent])
        return SENT_AND_CLOSE

    def reset(self) -> web.StreamResponse:
        """Send nothing and reset the connection."""
        reset(self._request.transport)
        return SENT_AND_CLOSE

    def close(self) -> web.StreamResponse:
        """Send nothing more and close the connection."""
        return SENT_AND_CLOSE

    def begin_stream(self, ending: Ending) -> "StreamSender":
        """Send the head of a server-sent event stream that will end in the given way."""
        chunked = self._request.version >= HttpVersion11 and ending != "unframed"
        keep = chunked and self._request.keep_alive and ending == "done"
        headers = self._headers({"Cache-Control": "no-cache"})
        head = response_head(200, "text/event-stream", headers, length=None, chunked=chunked, close=not keep)
        return StreamSender(self._request, head, chunked=chunked, keep=keep)


class StreamSender:
    """The body of one stream, buffered until `flush`, so that a stream without pauses is few writes."""

    def __init__(self, request: BaseRequest, head: bytes, *, chunked: bool, keep: bool) -> None:
        """Begin with `head`, which is sent with the first flush."""
        self._request = request
        self._buffer = bytearray(head)
        self._chunked = chunked
        self._keep = keep
        self.tokens = 0
        """Tokens whose events were written."""

    @property
    def is_cut(self) -> bool:
        """Whether something that was written was left out on purpose."""
        return False

    async def write(self, data: bytes) -> None:
        """Add data to the body; cancellation: what was not flushed is not sent."""
        self._buffer += chunk(data) if self._chunked else data
        if len(self._buffer) >= _JOIN_BYTES:
            await self.flush()

    async def flush(self) -> None:
        """Send what was written, and wait while the client is slow. Cancellation: it is sent, later."""
        if not self._buffer:
            return
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has disconnected")
        transport.write(bytes(self._buffer))
        self._buffer.clear()
        await self._request.writer.drain()

    async def end(self, how: Ending) -> web.StreamResponse:
        """End the body as told. Cancellation: the connection is closed by aiohttp."""
        if how in {"rst", "mid_chunk", "bad_chunk"}:
            await self.flush()
            await asyncio.sleep(_BREAK_PAUSE_S)
        match how:
            case "done":
                self._buffer += LAST_CHUNK if self._chunked else b""
            case "mid_chunk":
                self._buffer += cut_chunk(b": cut\n")
            case "bad_chunk":
                self._buffer += ILLEGAL_CHUNK
        await self.flush()
        if how == "rst":
            reset(self._request.transport)
        return SENT if self._keep else SENT_AND_CLOSE


class InvocationSender(Sender):
    """
    The answering side of one request to SageMaker: the container's answers as the service passes them on.

    Attributes:
        fault: How the frames of the answer are broken.
    """

    __slots__ = ("_is_framed", "_own", "_variant", "fault")

    def __init__(
        self, request: BaseRequest, request_id: str, *, variant: str, is_framed: bool, headers: Mapping[str, str]
    ) -> None:
        """Answer `request` in the name of a variant; `headers` go into every answer."""
        super().__init__(request, request_id)
        self._variant = variant
        self._is_framed = is_framed
        self._own = headers
        self.fault = FrameFault()

    def _headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        own = {"x-amzn-RequestId": self._request_id, "x-Amzn-Invoked-Production-Variant": self._variant}
        return {**own, **self._own, **headers}

    def refuse(self, answer: Answer) -> web.StreamResponse:
        """Send an answer of the service itself."""
        return super().answer(answer)

    def answer(self, answer: Answer) -> web.StreamResponse:
        """Send a whole answer of the container: an error inside one of the service, a good one in frames if asked."""
        if answer.status >= HTTPStatus.BAD_REQUEST:
            return super().answer(model_error(answer.status, answer.body, self._variant))
        if not self._is_framed:
            return super().answer(answer)
        framer = Framer(self.fault)
        body = framer.feed(answer.body)
        headers = {**answer.headers, STREAM_CONTENT_TYPE: answer.content_type}
        head = response_head(200, EVENT_STREAM, self._headers(headers), length=None, chunked=True, close=True)
        self._write(head + chunk(body) + LAST_CHUNK)
        return SENT_AND_CLOSE

    async def answer_slowly(self, answer: Answer, delay_s: float, sent: int | None) -> web.StreamResponse:
        """See `Sender.answer_slowly`; in frames, an answer that stops early stops inside a chunk."""
        if not self._is_framed:
            return await super().answer_slowly(answer, delay_s, sent)
        headers = self._headers({**answer.headers, STREAM_CONTENT_TYPE: answer.content_type})
        self._write(response_head(200, EVENT_STREAM, headers, length=None, chunked=True, close=True))
        if delay_s:
            await asyncio.sleep(delay_s)
        body = chunk(Framer(self.fault).feed(answer.body[:sent]))
        self._write(body + (LAST_CHUNK if sent is None else b""))
        return SENT_AND_CLOSE

    def begin_stream(self, ending: Ending) -> "StreamSender":
        """Send the head of a stream: its events in frames, or as the one body of an unstreamed invocation."""
        if not self._is_framed:
            return super().begin_stream(ending)
        chunked = ending != "unframed"
        keep = chunked and self._request.keep_alive and ending == "done"
        headers = self._headers({STREAM_CONTENT_TYPE: "text/event-stream"})
        head = response_head(200, EVENT_STREAM, headers, length=None, chunked=chunked, close=not keep)
        return _FrameSender(self._request, head, chunked=chunked, keep=keep, framer=Framer(self.fault))


class _FrameSender(StreamSender):
    """The body of one stream in frames."""

    def __init__(self, request: BaseRequest, head: bytes, *, chunked: bool, keep: bool, framer: Framer) -> None:
        super().__init__(request, head, chunked=chunked, keep=keep)
        self._framer = framer

    @property
    def is_cut(self) -> bool:
        """Whether the frames were broken on purpose."""
        return self._framer.is_over

    async def write(self, data: bytes) -> None:
        """See `StreamSender.write`."""
        await super().write(self._framer.feed(data))
