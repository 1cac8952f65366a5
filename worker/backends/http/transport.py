"""
httpx's transport interface, in both directions; the only file that knows httpx.

`HttpTransport` puts our connections under an `httpx.AsyncClient`, or whatever else takes a transport.
`ForeignTransport` lets any other transport take the place of our connections under the worker: a recorded server in a
test, another network.  The worker itself goes neither way: httpx's requests and responses cost a third of an attempt,
and importing it a third of the start.

Exceptions keep httpx's meanings: `ConnectError` and `ConnectTimeout` only where no request was sent, `DecodingError`
where what came is no response or cannot be unpacked.

Source: https://www.python-httpx.org/advanced/transports/; https://www.python-httpx.org/exceptions/.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

import httpx

from worker.backends.http.coding import decoder_for
from worker.backends.http.connection import Connection, Headers, Request, Sink, StaleConnectionError, words_of
from worker.backends.http.pool import Pool
from worker.backends.http.tls import Tls
from worker.errors import BackendError
from worker.policy.model import Fault
from worker.settings.schema import TlsSettings

CONNECT_S = 5.0
"""Where a request sets no limit, as httpx's client has it."""
MAX_BUFFERED_BYTES = 256 * 1024
"""Of a body that is not read; then the connection is not read either."""

_NAMES: dict[str, type[httpx.RequestError]] = {
    Fault.CONNECT: httpx.ConnectError,
    Fault.CONNECT_TIMEOUT: httpx.ConnectTimeout,
    Fault.CONNECTION_LOST: httpx.ReadError,
    Fault.DECODING: httpx.DecodingError,
}


class HttpTransport(httpx.AsyncBaseTransport):
    """
    Our connections for users of httpx: one pool for each origin; no redirects, cookies or settings of the environment.

    Of the extension `timeout` the limit of connecting (`connect`, seconds) is kept; the others are the caller's.
    A body is unpacked, and the response then claims neither its coding nor its length.
    """

    def __init__(self) -> None:
        self._pools: dict[tuple[str, str, int | None], Pool] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """
        Return when the response's headers are there; its stream must be closed.

        Raises:
            httpx.RequestError: As the module says.

        Cancellation: closes the connection.
        """
        url = request.url
        if url.scheme not in {"http", "https"} or not url.host:
            raise httpx.UnsupportedProtocol(f"{url.scheme!r} is no protocol of this transport", request=request)
        origin = (url.scheme, url.host, url.port)
        pool = self._pools.get(origin)
        if pool is None:
            tls = Tls(TlsSettings()).context if url.scheme == "https" else None
            pool = self._pools[origin] = Pool(f"{url.scheme}://{url.netloc.decode()}", tls=tls)
        limit = request.extensions.get("timeout", {}).get("connect")
        outgoing = await _outgoing(request, pool)
        try:
            try:
                connection = await pool.acquire(CONNECT_S if limit is None else limit)
                return await _Exchange(connection, request).response(outgoing)
            except StaleConnectionError:
                connection = await pool.connect(CONNECT_S if limit is None else limit)
                return await _Exchange(connection, request).response(outgoing)
        except BackendError as error:
            raise _translated(error, request) from error

    async def aclose(self) -> None:
        """
        Close every connection; idempotent.

        Cancellation: connections may stay open until the process ends; call it again.
        """
        for pool in self._pools.values():
            await pool.aclose()


async def _outgoing(request: httpx.Request, pool: Pool) -> Request:
    body = await request.aread()
    skipped = {b"transfer-encoding", b"content-length"}
    headers = [b"%b: %b\r\n" % pair for pair in request.headers.raw if pair[0].lower() not in skipped]
    if body or "content-length" in request.headers:
        headers.append(b"content-length: %d\r\n" % len(body))
    method = request.method.encode()
    line = b"%b %b%b HTTP/1.1\r\n" % (method, pool.line_prefix, request.url.raw_path)
    return Request(b"".join((line, pool.line_headers, *headers, b"\r\n")), body, is_head=request.method == "HEAD")


def _translated(error: BackendError, request: httpx.Request) -> httpx.RequestError:
    return _NAMES.get(error.fault, httpx.ReadError)(error.detail, request=request)


class _Exchange(httpx.AsyncByteStream):
    """One exchange as a response whose body is read by its owner; the sink of its connection."""

    def __init__(self, connection: Connection, request: httpx.Request) -> None:
        self._connection = connection
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._head = self._loop.create_future()
        self._pieces: deque[bytes] = deque()
        self._size = 0
        self._is_paused = False
        self._news = asyncio.Event()
        self._done: asyncio.Future[None] | None = None

    async def response(self, outgoing: Request) -> httpx.Response:
        """Send the request and return when the headers are there."""
        await self._connection.read_up()
        self._done = done = self._connection.start(outgoing, self)
        done.add_done_callback(self._end)
        try:
            status, headers = await self._head
        except BaseException:
            self._connection.give_up(done)
            raise
        if any(name.lower() == b"content-encoding" for name, _ in headers):
            unpacked = {b"content-encoding", b"content-length"}
            headers = [pair for pair in headers if pair[0].lower() not in unpacked]
        return httpx.Response(status, headers=headers, stream=self, request=self._request)

    def _end(self, done: asyncio.Future[None]) -> None:
        error = None if done.cancelled() else done.exception()
        if not self._head.done() and error is not None:
            self._head.set_exception(error)
        self._news.set()

    def connected(self) -> None:
        """See `Sink`."""

    def sent(self) -> None:
        """See `Sink`."""

    def head(self, status: int, headers: Headers) -> None:
        """Let `response` return."""
        if not self._head.done():
            self._head.set_result((status, headers))

    def feed(self, data: bytes) -> float | None:
        """Keep a part of the body until it is read."""
        self._pieces.append(data)
        self._size += len(data)
        if self._size > MAX_BUFFERED_BYTES and not self._is_paused:
            self._is_paused = True
            self._connection.pause()
        self._news.set()
        return None

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        done = self._done
        assert done is not None
        while not self._pieces:
            if done.done():
                error = done.exception()
                if isinstance(error, BackendError):
                    raise _translated(error, self._request) from error
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        data = self._pieces.popleft()
        self._size -= len(data)
        if self._is_paused and not self._pieces and not done.done():  # another's, then
            self._is_paused = False
            self._connection.resume()
        return data

    async def aclose(self) -> None:
        """
        Close the connection if not everything has come.

        Cancellation: the connection is closed all the same.
        """
        assert self._done is not None
        self._connection.give_up(self._done)


class ForeignTransport:
    """
    Another transport in the place of a `Pool`.

    Args:
        transport: It sends the requests; httpx's names of its failures tell how far they came.
        base_url: Of the server.
    """

    def __init__(self, transport: httpx.AsyncBaseTransport, base_url: str) -> None:
        self._transport = transport
        self._origin = httpx.URL(base_url)

    async def exchange(self, request: Request, sink: Sink, connect_s: float) -> None:
        """See `Pool.exchange`; when the request was `sent` is not known here."""
        line, *headers = request.head.decode("latin-1").rstrip("\r\n").split("\r\n")
        method, target, _ = line.split(" ")
        outgoing = httpx.Request(
            method,
            self._origin.copy_with(raw_path=target.encode()),
            headers=[(name, value) for name, _, value in (header.partition(": ") for header in headers)],
            stream=httpx.ByteStream(request.body),
            extensions={"timeout": {"connect": connect_s, "pool": connect_s}},
        )
        try:
            response = await self._transport.handle_async_request(outgoing)
            stream = response.stream
            assert isinstance(stream, httpx.AsyncByteStream)  # what an asynchronous transport returns
            try:
                sink.head(response.status_code, response.headers.raw)
                await push(_unpacked(response, stream), sink)
            finally:
                await stream.aclose()
        except (httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise BackendError(Fault.CONNECT_TIMEOUT, words_of(error.__cause__ or error)) from error
        except (httpx.ConnectError, httpx.UnsupportedProtocol) as error:
            raise BackendError(Fault.CONNECT, words_of(error.__cause__ or error)) from error
        except httpx.DecodingError as error:
            raise BackendError(Fault.DECODING, words_of(error.__cause__ or error)) from error
        except TimeoutError:
            raise  # the attempt's own limits
        except (httpx.HTTPError, OSError) as error:
            raise BackendError(Fault.CONNECTION_LOST, words_of(error.__cause__ or error)) from error


async def _unpacked(response: httpx.Response, stream: httpx.AsyncByteStream) -> AsyncIterator[bytes]:
    decoder = decoder_for(response.headers.get("content-encoding", ""))
    async for data in stream:
        for piece in (data,) if decoder is None else decoder.feed(data):
            yield piece
    if decoder is not None:
        decoder.close()


async def push(chunks: AsyncIterator[bytes], sink: Sink) -> None:
    """
    Push a body into a sink until it has ended, or until the sink wants no more and its wait for the end is over.

    Raises:
        Exception: What the iterator or the sink raises.

    Cancellation: leaves the iterator as it is.
    """
    async for chunk in chunks:
        wait = sink.feed(chunk)
        if wait is not None:
            break
    else:
        return
    with contextlib.suppress(BackendError, httpx.HTTPError, OSError):  # a TimeoutError is an OSError
        async with asyncio.timeout(wait):
            async for _ in chunks:
                pass
