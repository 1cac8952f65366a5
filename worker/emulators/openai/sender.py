"""
Puts the bytes of one answer on a connection, rightly or wrongly.

aiohttp parses requests and keeps connections; the answers are written here, directly, because faults need bytes that a
framework would refuse to send (see `wire`).  `SENT` and `SENT_AND_CLOSE` tell aiohttp that everything has been written.
"""

import asyncio
from collections.abc import Mapping

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import HttpVersion11
from aiohttp.web_request import BaseRequest

from worker.emulators.openai import listener, wire
from worker.emulators.openai.error_shapes import Answer
from worker.emulators.openai.sse import Ending

_JOIN_BYTES = 1 << 16
"""Writes are handed to the socket in pieces of this size when nothing has to be waited for."""
_BREAK_PAUSE_S = 0.01
"""Time for the client to read what came before: a reset overtakes data, and parsers drop a spoilt segment whole."""


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

    Every method raises ConnectionResetError when the client has gone.
    """

    __slots__ = ("_request", "_request_id")

    def __init__(self, request: BaseRequest, request_id: str) -> None:
        """Answer `request`; `request_id` goes into the header `x-request-id` of every answer."""
        self._request = request
        self._request_id = request_id

    def _write(self, data: bytes) -> None:
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has gone")
        transport.write(data)

    def _headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        return {"x-request-id": self._request_id, **headers}

    def answer(self, answer: Answer) -> web.StreamResponse:
        """Send a whole answer."""
        keep = self._request.keep_alive
        head = wire.head(
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
        self._write(wire.head(answer.status, answer.content_type, headers, length=len(answer.body), close=True))
        if delay_s:
            await asyncio.sleep(delay_s)
        self._write(answer.body[:sent])
        return SENT_AND_CLOSE

    def reset(self) -> web.StreamResponse:
        """Send nothing and reset the connection."""
        listener.reset(self._request.transport)
        return SENT_AND_CLOSE

    def close(self) -> web.StreamResponse:
        """Send nothing more and close the connection."""
        return SENT_AND_CLOSE

    def begin_stream(self, ending: Ending) -> "StreamSender":
        """Send the head of a server-sent event stream that will end in the given way."""
        chunked = self._request.version >= HttpVersion11 and ending != "unframed"
        keep = chunked and self._request.keep_alive and ending == "done"
        headers = self._headers({"Cache-Control": "no-cache"})
        head = wire.head(200, "text/event-stream", headers, length=None, chunked=chunked, close=not keep)
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

    async def write(self, data: bytes) -> None:
        """Add data to the body; cancellation: what was not flushed is not sent."""
        self._buffer += wire.chunk(data) if self._chunked else data
        if len(self._buffer) >= _JOIN_BYTES:
            await self.flush()

    async def flush(self) -> None:
        """Send what was written, and wait while the client is slow. Cancellation: it is sent, later."""
        if not self._buffer:
            return
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has gone")
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
                self._buffer += wire.LAST_CHUNK if self._chunked else b""
            case "mid_chunk":
                self._buffer += wire.cut_chunk(b": cut\n")
            case "bad_chunk":
                self._buffer += wire.ILLEGAL_CHUNK
        await self.flush()
        if how == "rst":
            listener.reset(self._request.transport)
        return SENT if self._keep else SENT_AND_CLOSE
