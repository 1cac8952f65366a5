"""The transport between httpx's API and aiohttp's connections: what each makes of the other."""

import errno
import gzip
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import httpx
import pytest
from aiohttp.connector import Connection as Connected

from tests.support.raw_http import CHUNKED, Connection, always, answer, raw_server, until
from worker.backends.http.transport import MAX_CACHED_URLS, AiohttpTransport, _parsed


@pytest.fixture
async def transport() -> AsyncIterator[AiohttpTransport]:
    opened = AiohttpTransport()
    yield opened
    await opened.aclose()


def a_request(url: str, body: bytes = b"{}", **more: Any) -> httpx.Request:
    return httpx.Request("POST", url, content=body, **more)


async def test_an_ordinary_client_can_use_it(transport: AiohttpTransport) -> None:
    """It keeps httpx's contract: under `httpx.AsyncClient` request and answer are what they should be."""
    async with raw_server(always(answer(b'{"a": 1}', "X-A: 1", "X-A: 2"))) as server:
        async with httpx.AsyncClient(transport=transport) as client:
            response = await client.post(server.url + "/v1/x?a=%20b", json={"q": "\u00fc"})
        assert (response.status_code, response.json()) == (200, {"a": 1})
        assert response.headers.get_list("x-a") == ["1", "2"]
        assert response.request.url == server.url + "/v1/x?a=%20b"
    ((head, body),) = server.requests
    assert head.startswith(b"POST /v1/x?a=%20b HTTP/1.1\r\n")
    assert head.lower().count(b"\r\nhost: ") == 1
    assert head.lower().count(b"\r\ncontent-length: ") == 1
    assert body.decode() == '{"q":"\u00fc"}'


async def test_it_opens_one_session_and_closes_it(transport: AiohttpTransport) -> None:
    """Made by the first request, shared by all, closed once and for good; closing one that was never used is nothing."""
    await transport.aclose()
    sessions: list[aiohttp.ClientSession] = []

    def open_session() -> aiohttp.ClientSession:
        sessions.append(aiohttp.ClientSession())
        return sessions[-1]

    other = AiohttpTransport(open_session)
    assert not sessions
    async with raw_server(always(answer(b"{}"))) as server:
        for _ in range(3):
            response = await other.handle_async_request(a_request(server.url))
            assert await response.aread() == b"{}"
            await response.aclose()
        assert server.connections == 1
        await other.aclose()
        await other.aclose()
    assert [session.closed for session in sessions] == [True]


async def test_a_packed_body_is_handed_over_unpacked(transport: AiohttpTransport) -> None:
    """In pieces, and the headers then say nothing of the packing, or httpx would unpack it again."""
    body = b"a" * 5_000_000
    packed = gzip.compress(body)
    async with raw_server(always(answer(packed, "Content-Encoding: gzip", "X-A: 1"))) as server:
        response = await transport.handle_async_request(a_request(server.url))
        pieces = [piece async for piece in response.aiter_bytes()]
    assert b"".join(pieces) == body
    assert max(map(len, pieces)) < len(body)
    assert "content-encoding" not in response.headers
    assert "content-length" not in response.headers
    assert response.headers["x-a"] == "1"


async def test_a_body_that_is_not_read_costs_the_connection(transport: AiohttpTransport) -> None:
    """Closing the response does not wait for the server."""

    async def begin(connection: Connection) -> None:
        await connection.read_request()
        await connection.send(answer(b"{", length=10))
        await connection.wait_closed_by_peer()

    async with raw_server(begin) as server:
        response = await transport.handle_async_request(a_request(server.url))
        await response.aclose()
        await until(lambda: server.closed_by_peer)


class FailingConnector(aiohttp.TCPConnector):
    """Makes no connections."""

    def __init__(self, error: Callable[[aiohttp.ClientRequest], Exception]) -> None:
        super().__init__()
        self._error = error
        self.limits: list[aiohttp.ClientTimeout] = []

    async def connect(self, req: aiohttp.ClientRequest, *_: Any, **more: Any) -> Connected:
        self.limits.append(more["timeout"])
        raise self._error(req)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (lambda req: aiohttp.ClientConnectorError(req.connection_key, OSError()), httpx.ConnectError),
        (lambda req: aiohttp.ClientConnectorSSLError(req.connection_key, OSError()), httpx.ConnectError),
        (lambda _: TimeoutError(), httpx.ConnectTimeout),
        (lambda _: TimeoutError(errno.ETIMEDOUT, "x"), httpx.ConnectTimeout),
        (lambda _: aiohttp.ServerDisconnectedError(), httpx.RemoteProtocolError),
        (lambda _: aiohttp.ClientOSError(errno.ECONNRESET, "x"), httpx.ReadError),
        (lambda _: aiohttp.ClientPayloadError(), httpx.ReadError),
        (lambda _: ssl.SSLError("x"), httpx.ReadError),
        (lambda _: ConnectionResetError("x"), httpx.ReadError),
    ],
    ids=["refused", "no TLS", "silence", "timeout of the OS", "disconnected", "reset", "payload", "TLS", "OS error"],
)
async def test_an_exception_says_what_httpx_means_by_it(
    error: Callable[[aiohttp.ClientRequest], Exception], expected: type[httpx.RequestError]
) -> None:
    """A connection that broke under its request is none that did not come about; the cause is kept."""
    connector = FailingConnector(error)
    transport = AiohttpTransport(lambda: aiohttp.ClientSession(connector=connector))
    request = a_request("http://h", extensions={"timeout": {"connect": 3.0}})
    with pytest.raises(httpx.RequestError) as caught:
        await transport.handle_async_request(request)
    assert type(caught.value) is expected
    assert isinstance(caught.value.__cause__, aiohttp.ClientError | OSError)
    assert caught.value.request is request
    assert [(limit.total, limit.connect, limit.sock_connect) for limit in connector.limits] == [(None, 3.0, 3.0)]
    await transport.aclose()


@pytest.mark.parametrize("url", ["ftp://h/x", "/x"])
async def test_what_is_no_url_of_http_is_refused(url: str, transport: AiohttpTransport) -> None:
    """Nothing is sent."""
    with pytest.raises(httpx.UnsupportedProtocol):
        await transport.handle_async_request(a_request(url))


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (CHUNKED + b"1\r\n{\r\nzz\r\n", httpx.DecodingError),
        (answer(b"{", length=10), httpx.ReadError),
        (answer(b"no gzip", "Content-Encoding: gzip"), httpx.DecodingError),
    ],
    ids=["a bad chunk", "cut", "a bad packing"],
)
async def test_a_body_that_breaks_says_so_in_httpxs_words(
    response: bytes, expected: type[httpx.RequestError], transport: AiohttpTransport
) -> None:
    """Also in the middle."""

    async def script(connection: Connection) -> None:
        await connection.read_request()
        await connection.send(response)

    async def read(url: str) -> None:
        response = await transport.handle_async_request(a_request(url))
        try:
            await response.aread()
        finally:
            await response.aclose()

    async with raw_server(script) as server:
        with pytest.raises(httpx.RequestError) as caught:
            await read(server.url)
        assert type(caught.value) is expected
        assert caught.value.request.url == server.url


def test_urls_are_parsed_once_and_few_are_kept() -> None:
    """Paths come from requesters."""
    assert _parsed("http://h/1") is _parsed("http://h/1")
    assert _parsed.cache_info().maxsize == MAX_CACHED_URLS
