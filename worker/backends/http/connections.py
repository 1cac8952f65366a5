"""
aiohttp's connections, with the rules that keep one request's answer from becoming another's.

aiohttp hands a kept connection to the next request as long as it is open, and takes whatever has arrived or arrives on
it for the answer.  Here a connection is *quiet* until a request is written to it, and again from the end of the answer
on:

* Bytes that arrive on a quiet connection belong to no request.  The connection is closed, and so is one whose socket
  has something to read (bytes, or its end) at the moment a request would be written.
* A connection is not reused before two ticks of `TICK_S` have passed since its last answer: what a server sends too
  much, it sends at once.  Once it did, none is reused for `DISTRUST_S`: what comes even later looks like an answer.
* A connection that ends before a request was written to it, or a reused one that ends before one byte of the answer or
  says that it was idle for too long (408), raises `StaleConnectionError`: the transport then asks once more, on a fresh
  connection.

`on_connected` is called when a request is about to be written, long before any answer; a context variable, because the
session between the transport and the request has no place for an argument.

aiohttp 3.14's C parser forgets the body when the framing turns out to be broken after the headers were delivered (an
illegal chunk header, say): the connection is closed, and the reader of the body waits for ever.  So the protocol fails
a body that has neither ended nor failed, with the parser's words.  It also forgets the headers that came in the same
bytes; so they are given to it apart, and what came before the error is read wherever the network cut it.  To check when
aiohttp is updated: `_get`, `_conns`, `_acquired` and `_factory` of its connector, `_payload`, `_parser` and `_buffer`
of its protocol, `_read_nowait` and `_buffer` of its reader.
"""

import asyncio
import functools
import select
from collections.abc import Callable
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any, Self

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ConnectionKey
from aiohttp.connector import Connection
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader

TICK_S = 0.003
"""Ticks and not a clock: after a pause of the process the clock says that time has passed in which nothing was read.
Until a connection has settled, the next request opens another one if others are under way (so that there are a few
more in all), and else waits: there are servers that serve one connection after the other."""
SETTLE_TICKS = 2
DISTRUST_S = 60.0
STRAY_S = 1.0
"""Bytes that come later after an answer say nothing of other connections: proxies announce so that they close one."""
MAX_WORDS = 512
"""Characters of a parser's complaint, which quotes what it could not read."""

on_connected: ContextVar[Callable[[], None] | None] = ContextVar("on_connected", default=None)
"""Called for each request of this context when it is about to be written to a connection."""
fresh_only: ContextVar[bool] = ContextVar("fresh_only", default=False)
"""Whether requests of this context take no kept connection."""
BROKEN = "the connection ended inside the response"
BROKEN_HEADERS = "the connection ended inside the headers of the response"
_END_OF_HEADERS = b"\r\n\r\n"


class StaleConnectionError(aiohttp.ServerDisconnectedError):
    """
    The connection was of no use for this request; a fresh one may be.

    Args:
        is_sent: Whether some of the request was written.
        why: What happened.
    """

    def __init__(self, why: str, *, is_sent: bool) -> None:
        super().__init__(why)
        self.is_sent = is_sent


class UnreadableResponseError(aiohttp.ClientPayloadError):
    """What the server sent is no HTTP response; the text is the parser's."""


class ExchangeProtocol(ResponseHandler):
    """One connection; see the module."""

    def __init__(self, connector: "ExchangeConnector", loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._connector = connector
        self._begun_at = 0.0
        self._ended_at = -STRAY_S
        self._poll: select.poll | None = None
        self.settles_at = 0
        """The connector's count of ticks at which it may be reused."""
        self.is_reused = False
        """It has carried an answer before the request that was written last."""
        self.is_begun = False
        """A request was written, and its answer is not complete."""
        self.has_answered = False
        """Something has arrived since the last request was written."""

    def begin(self) -> None:
        """
        Make it the connection of one request; called right before that is written.

        Raises:
            StaleConnectionError: It has ended, or bytes have arrived that belong to no request; it is closed.
        """
        if not self.is_connected() or self._buffer or self._tail or self._is_readable():
            self._drop()
            raise StaleConnectionError("the connection ended, or spoke, before the request was sent", is_sent=False)
        self.is_begun, self.is_reused, self.has_answered = True, self.has_answered, False
        self._begun_at = self._loop.time()
        self._payload = None

    def end(self) -> None:
        """The answer is complete: whatever else arrives belongs to no request."""
        self.is_begun = False
        self._ended_at = self._loop.time()
        self.settles_at = self._connector.watch()
        if self._buffer:
            self._drop_stray()

    def is_idle_timeout(self) -> bool:
        """
        Whether a 408 that has just come was sent because nothing had come, and crossed the request on its way.

        Source: https://www.rfc-editor.org/rfc/rfc9110#section-15.5.9; Go's client does the same.
        """
        return self.is_reused and self._should_close and self._loop.time() - self._begun_at < STRAY_S

    def _is_readable(self) -> bool:
        """Whether the socket has bytes, or its end, that the event loop has not read."""
        if self._poll is None:
            assert self.transport is not None
            self._poll = select.poll()
            self._poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(self._poll.poll(0))

    def _drop(self) -> None:
        self.force_close()
        if self.transport is not None:
            self.transport.abort()

    def _drop_stray(self) -> None:
        self._buffer.clear()
        self._drop()
        if self.is_begun or self._loop.time() - self._ended_at < STRAY_S:
            self._connector.distrust()

    def _is_answered(self) -> bool:
        """Whether the answer to the last request is complete, though it was not taken yet."""
        payload = self._payload
        return payload is not None and payload is not EMPTY_PAYLOAD and payload.is_eof()

    def _has_headers(self) -> bool:
        return self._payload is not None

    def data_received(self, data: bytes) -> None:
        """Take bytes of the answer; without a request they end the connection."""
        if data and (not self.is_begun or self._is_answered()):
            self.force_close() if self.is_begun else self._drop_stray()
            return
        self.has_answered = True
        if not self._has_headers() and 0 <= (end := data.find(_END_OF_HEADERS)) < len(data) - len(_END_OF_HEADERS):
            end += len(_END_OF_HEADERS)
            super().data_received(data[:end])
            data = data[end:]
            if self._has_headers():
                self.data_received(data)
                return
        super().data_received(data)
        if self._buffer and not self.is_begun:  # the answer ended in these bytes, and another one began
            self._drop_stray()

    def set_exception(self, exc: BaseException, *cause: BaseException) -> None:
        """Fail the request, and its body when the parser has given up on it."""
        super().set_exception(exc, *cause)
        if isinstance(exc, HttpProcessingError):
            self._parser = None  # its end-of-file would replace the words
            self._fail(self._payload, UnreadableResponseError(words_of(exc, *cause)))

    def connection_lost(self, exc: BaseException | None) -> None:
        """Fail whatever waits."""
        payload = self._payload
        super().connection_lost(exc)
        self._fail(payload, aiohttp.ClientPayloadError(BROKEN))

    @staticmethod
    def _fail(payload: StreamReader | None, error: Exception) -> None:
        if payload is not None and not payload.is_eof() and payload.exception() is None:
            payload.set_exception(error)


def read_before_failure(body: StreamReader) -> bytes:
    """Return what came of a body that failed before anything read it; empty when it was read."""
    return body._read_nowait(-1) if body._buffer else b""  # noqa: SLF001 - every public way raises the failure first


def words_of(*errors: BaseException) -> str:
    """Return the first complaint that has words, on one line of at most `MAX_WORDS` characters."""
    said = (error.message if isinstance(error, HttpProcessingError) else str(error) for error in errors)
    words = next((text for text in said if text), "") or type(errors[-1]).__name__
    return " ".join(words[: 4 * MAX_WORDS].split())[:MAX_WORDS]


class ExchangeConnector(aiohttp.TCPConnector):
    """Makes `ExchangeProtocol` connections, and lets them settle before they are reused."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._distrusted_until = 0.0
        self._ticks = 0
        self._ticks_until = 0
        self._ticking: asyncio.TimerHandle | None = None
        make: Callable[..., ResponseHandler] = functools.partial(ExchangeProtocol, self)
        self._factory = functools.partial(make, loop=self._loop)

    def distrust(self) -> None:
        """Reuse no connection for a while."""
        self._distrusted_until = self._loop.time() + DISTRUST_S

    def watch(self) -> int:
        """Return the count of ticks at which a connection whose answer has just ended may be reused."""
        self._ticks_until = self._ticks + SETTLE_TICKS
        if self._ticking is None:
            self._ticking = self._loop.call_later(TICK_S, self._tick)
        return self._ticks_until

    def _tick(self) -> None:
        self._ticks += 1
        again = self._ticks < self._ticks_until and not self._closed
        self._ticking = self._loop.call_later(TICK_S, self._tick) if again else None

    def _may_reuse(self) -> bool:
        return not fresh_only.get() and self._loop.time() >= self._distrusted_until

    async def _get(self, key: ConnectionKey, traces: list[Any]) -> Connection | None:
        """
        Return a kept connection, `None` where a fresh one must be made.

        Cancellation: nothing was taken.
        """
        while (idle := self._conns.get(key)) and self._may_reuse():
            if self._has_settled(idle[0][0]):
                kept = await super()._get(key, traces)  # not the oldest, if that has ended
                if kept is None or kept.protocol is None or self._has_settled(kept.protocol):
                    return kept
                kept.close()
            elif self._acquired:
                break
            else:
                await asyncio.sleep(TICK_S)
        return None

    def _has_settled(self, protocol: ResponseHandler) -> bool:
        return not isinstance(protocol, ExchangeProtocol) or protocol.settles_at <= self._ticks


class ExchangeRequest(aiohttp.ClientRequest):
    """Tells its connection when it is written."""

    async def send(self, conn: Connection) -> aiohttp.ClientResponse:
        """
        Write the request; a body is written by a task of its own.

        Cancellation: the connection must be closed.
        """
        if not self._body:
            _begin(conn)
        return await super().send(conn)

    async def write_bytes(
        self, writer: AbstractStreamWriter, conn: Connection, content_length: int | None = None
    ) -> None:
        """
        Write headers and body, in the same step as `ExchangeProtocol.begin`.

        Cancellation: the connection must be closed.
        """
        if self._body:
            try:
                _begin(conn)
            except StaleConnectionError as error:
                if conn.protocol is not None:
                    conn.protocol.set_exception(error)
                return
        await super().write_bytes(writer, conn, content_length)


def _begin(conn: Connection) -> None:
    protocol = conn.protocol
    if not isinstance(protocol, ExchangeProtocol):
        raise StaleConnectionError("the connection was given up", is_sent=False)
    protocol.begin()
    if (told := on_connected.get()) is not None:
        told()


class ExchangeResponse(aiohttp.ClientResponse):
    """Tells its connection when it is complete."""

    async def start(self, connection: Connection) -> Self:
        """
        Read the headers; see `aiohttp.ClientResponse.start`.

        Raises:
            StaleConnectionError: As the module says.
            UnreadableResponseError: What came is no response.

        Cancellation: closes the connection.
        """
        protocol = connection.protocol
        assert isinstance(protocol, ExchangeProtocol)
        try:
            await super().start(connection)
        except StaleConnectionError:
            raise
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            if not protocol.is_begun or (protocol.is_reused and not protocol.has_answered):
                raise StaleConnectionError(str(error), is_sent=protocol.is_begun) from error
            if protocol.has_answered and isinstance(error, aiohttp.ServerDisconnectedError):
                raise aiohttp.ServerDisconnectedError(BROKEN_HEADERS) from error
            raise
        except aiohttp.ClientResponseError as error:
            cause = error.__cause__
            raise UnreadableResponseError(error.message if cause is None else words_of(cause)) from cause
        if self.status == HTTPStatus.REQUEST_TIMEOUT and protocol.is_idle_timeout():
            raise StaleConnectionError("the server gave the idle connection up", is_sent=True)
        self.content.on_eof(protocol.end)
        return self
