"""
httpx's transport on aiohttp's connections: the only file that knows both.

Above it there are `httpx.Request`, `httpx.Response` and httpx's exceptions; below it one `aiohttp.ClientSession`, made
when the first request is sent.  What the two ask of each other is translated once and not copied: a URL is parsed once,
the headers go over as they are, and a body's chunks are handed on as aiohttp has them.

An exception says what happened, as httpx means its names: `ConnectError` and `ConnectTimeout` only where no request was
sent, `DecodingError` where what came is no response or cannot be unpacked.  (httpx-aiohttp 0.2 calls a connection that
was reset under a running request a connect timeout.)  aiohttp's own is its cause.

A route's requests differ in two or three headers.  httpx takes every header apart to keep it as bytes, and the
transport would put them together again; that is 0.01 ms of CPU a request, a tenth of an attempt.  So a
`PreparedRequest` makes httpx's headers only where they are asked for, by another transport or a test.

Unlike httpx's transports this one unpacks compressed bodies, piece by piece as aiohttp does; the response then claims
neither its coding nor its length.  httpx's decoders unpack a whole read at once, whatever it becomes.

Source: https://www.python-httpx.org/advanced/transports/; aiohttp 3.14, `client_exceptions.py`.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from functools import cached_property, lru_cache
from typing import Any

import aiohttp
import httpx
from aiohttp.http_exceptions import ContentEncodingError
from multidict import CIMultiDict
from yarl import URL

from worker.backends.http.connections import (
    ExchangeConnector,
    ExchangeRequest,
    ExchangeResponse,
    StaleConnectionError,
    UnreadableResponseError,
    fresh_only,
    read_before_failure,
)

KEEPALIVE_S = 4.0
"""How long an idle connection is kept: below uvicorn's 5 s (vLLM, SGLang), so that a request is not sent into a
connection the server is just closing (https://www.uvicorn.org/settings/#timeouts)."""

MAX_CACHED_URLS = 256
_UNPACKED = (b"content-encoding", b"content-length")

_ENDS: tuple[tuple[type[Exception], type[httpx.RequestError]], ...] = (
    (aiohttp.ConnectionTimeoutError, httpx.ConnectTimeout),
    (aiohttp.ClientConnectorError, httpx.ConnectError),
    (aiohttp.InvalidURL, httpx.UnsupportedProtocol),
    (aiohttp.NonHttpUrlClientError, httpx.UnsupportedProtocol),
    (aiohttp.ServerDisconnectedError, httpx.RemoteProtocolError),
    (aiohttp.ClientResponseError, httpx.RemoteProtocolError),
    (aiohttp.ClientError, httpx.ReadError),
    (OSError, httpx.ReadError),
)
"""The first that fits."""


class PreparedRequest(httpx.Request):
    """
    One request of a route.

    Args:
        method: In upper case.
        url: Not copied.
        fixed: The headers of every request, shared by them; names in lower case.
        own: The headers of this one; they come before those of the same name.  Likewise.
        stream: The body.
        extensions: As of `httpx.Request`.
    """

    def __init__(
        self,
        method: str,
        url: httpx.URL,
        *,
        fixed: Mapping[str, str],
        own: Mapping[str, str],
        stream: httpx.AsyncByteStream,
        extensions: Mapping[str, Any],
    ) -> None:
        # Everything that httpx's constructor sets for a request with a `stream`, but for the headers.
        self.method = method
        self.url = url
        self.stream = stream
        self.extensions = dict(extensions)
        self._fixed = fixed
        self._own = own

    @cached_property
    def headers(self) -> httpx.Headers:  # type: ignore[override]  # a cached property can be set as well
        """All headers; made when asked for, and from then on what is in force."""
        return httpx.Headers(self.plain_headers())

    def plain_headers(self) -> dict[str, str]:
        """Return the headers as they were given."""
        return {**self._fixed, **self._own}


def open_session() -> aiohttp.ClientSession:
    """
    Return aiohttp's client with everything off that the worker does itself or not at all; call it on the event loop.

    No redirects, no cookies, no proxies or passwords of the environment, no retries (aiohttp repeats no POST), no limit
    of connections: the window above is the limit.  What its connections do besides is in `connections`.
    """
    return aiohttp.ClientSession(
        connector=ExchangeConnector(limit=0, keepalive_timeout=KEEPALIVE_S, ttl_dns_cache=10),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),
        request_class=ExchangeRequest,
        response_class=ExchangeResponse,
        max_line_size=64 * 1024,
        max_field_size=64 * 1024,
    )


class AiohttpTransport(httpx.AsyncBaseTransport):
    """
    Sends requests as they are: their headers and nothing else, no redirects.

    A request is sent a second time only where a kept connection turned out to be of no use (`StaleConnectionError`):
    then once, at once, on a fresh one.

    Of the extension `timeout` the limit of connecting (`connect`, seconds) is kept; the others are the caller's.

    Args:
        open_session: Makes the session, on the event loop, when the first request is sent.
    """

    def __init__(self, open_session: Callable[[], aiohttp.ClientSession] = open_session) -> None:
        self._open_session = open_session
        self._session: aiohttp.ClientSession | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """
        Return when the response's headers are there; its stream must be closed.

        Raises:
            httpx.RequestError: As the module says.

        Cancellation: closes the connection.
        """
        session = self._session
        if session is None:
            session = self._session = self._open_session()
        try:
            try:
                response = await _send(session, request)
            except StaleConnectionError:
                before = fresh_only.set(True)
                try:
                    response = await _send(session, request)
                finally:
                    fresh_only.reset(before)
        except (aiohttp.ClientError, OSError) as error:
            raise _translated(error, request) from error
        headers = response.raw_headers
        if "content-encoding" in response.headers:
            headers = tuple(each for each in headers if each[0].lower() not in _UNPACKED)
        return httpx.Response(response.status, headers=headers, stream=_Body(response, request), request=request)

    async def aclose(self) -> None:
        """
        Close every connection; idempotent.

        Cancellation: connections may stay open until the process ends; call it again.
        """
        if self._session is not None:
            await self._session.close()


async def _send(session: aiohttp.ClientSession, request: httpx.Request) -> aiohttp.ClientResponse:
    stream = request.stream
    return await session.request(
        request.method,
        _parsed(str(request.url)),
        headers=headers_of(request),
        data=(b"".join(stream) or None) if isinstance(stream, httpx.ByteStream) else stream,
        allow_redirects=False,
        timeout=_limits(request.extensions.get("timeout", {}).get("connect")),
    )


class _Body(httpx.AsyncByteStream):
    """The body of a response as it comes, unpacked."""

    def __init__(self, response: aiohttp.ClientResponse, request: httpx.Request) -> None:
        self._response = response
        self._request = request
        self._next = response.content.readany

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        try:
            chunk = await self._next()
        except (aiohttp.ClientError, OSError) as error:
            chunk = read_before_failure(self._response.content)
            if not chunk:
                raise _translated(error, self._request) from error
        if not chunk:
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        """
        Return the connection to the pool, or close it if not everything was read.

        Cancellation: the connection is released all the same.
        """
        self._response.release()
        try:
            await self._response.wait_for_close()
        except (aiohttp.ClientError, OSError) as error:
            raise _translated(error, self._request) from error


@lru_cache(maxsize=MAX_CACHED_URLS)
def _parsed(url: str) -> URL:
    return URL(url, encoded=True)  # httpx has escaped it


@lru_cache(maxsize=16)
def _limits(connect_s: float | None) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=None, connect=connect_s, sock_connect=connect_s)


def _translated(error: Exception, request: httpx.Request) -> httpx.RequestError:
    if isinstance(error, UnreadableResponseError) or isinstance(error.__cause__, ContentEncodingError):
        return httpx.DecodingError(str(error), request=request)
    if isinstance(error, StaleConnectionError) and not error.is_sent:
        return httpx.ConnectError(str(error), request=request)
    return next(end for kind, end in _ENDS if isinstance(error, kind))(str(error), request=request)


def headers_of(request: httpx.Request) -> Mapping[str, str]:
    """Return a request's headers for aiohttp, by the short way if they were not asked for."""
    if isinstance(request, PreparedRequest) and "headers" not in request.__dict__:
        return request.plain_headers()
    return CIMultiDict([(name.decode(), value.decode()) for name, value in request.headers.raw])
