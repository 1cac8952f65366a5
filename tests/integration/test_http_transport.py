"""Our connections under httpx's API: what each makes of the other."""

import gzip
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.support.raw_http import CHUNKED, Connection, always, answer, pause, raw_server, until
from worker.backends.http.transport import MAX_BUFFERED_BYTES, HttpTransport


@pytest.fixture
async def transport() -> AsyncIterator[HttpTransport]:
    opened = HttpTransport()
    yield opened
    await opened.aclose()


def a_request(url: str, body: bytes = b"{}", **more: Any) -> httpx.Request:
    return httpx.Request("POST", url, content=body, **more)


async def test_an_ordinary_client_can_use_it(transport: HttpTransport) -> None:
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


async def test_it_keeps_its_connections_and_closes_them(transport: HttpTransport) -> None:
    """Shared by all requests; closing twice, or one that was never used, is nothing."""
    await transport.aclose()
    async with raw_server(always(answer(b"{}"))) as server:
        for _ in range(3):
            response = await transport.handle_async_request(a_request(server.url))
            assert await response.aread() == b"{}"
            await response.aclose()
        assert server.connections == 1
        await transport.aclose()
        await transport.aclose()


async def test_a_body_that_nobody_reads_is_not_read_either(transport: HttpTransport) -> None:
    """A slow reader slows the server down, and gets everything."""
    body = b"a" * 20_000_000
    sent: list[int] = []

    async def script(connection: Connection) -> None:
        await connection.read_request()
        await connection.send(answer(body))
        sent.append(len(body))

    async with raw_server(script) as server:
        response = await transport.handle_async_request(a_request(server.url))
        await pause(0.05)
        assert not sent
        assert await response.aread() == body
        await response.aclose()


async def test_a_body_that_is_read_late_is_in_nobodys_way(transport: HttpTransport) -> None:
    """Its connection carries the next request before its last piece was taken, and both bodies are whole."""
    body = b"a" * (MAX_BUFFERED_BYTES + 1000)
    async with raw_server(always(answer(body))) as server:
        first = await transport.handle_async_request(a_request(server.url))
        await until(lambda: server.requests)
        await pause(0.05)
        second = await transport.handle_async_request(a_request(server.url))
        assert [await first.aread(), await second.aread()] == [body, body]
        third = await transport.handle_async_request(a_request(server.url))
        assert await third.aread() == body
        for response in (first, second, third):
            await response.aclose()


async def test_a_packed_body_is_handed_over_unpacked(transport: HttpTransport) -> None:
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


async def test_a_body_that_is_not_read_costs_the_connection(transport: HttpTransport) -> None:
    """Closing the response does not wait for the server."""

    async def begin(connection: Connection) -> None:
        await connection.read_request()
        await connection.send(answer(b"{", length=10))
        await connection.wait_closed_by_peer()

    async with raw_server(begin) as server:
        response = await transport.handle_async_request(a_request(server.url))
        await response.aclose()
        await until(lambda: server.closed_by_peer)


async def test_a_connection_that_did_not_come_about_says_so(transport: HttpTransport) -> None:
    """The request is there, and the system's words."""
    request = a_request("http://127.0.0.1:1", extensions={"timeout": {"connect": 3.0}})
    with pytest.raises(httpx.ConnectError, match=re.escape("127.0.0.1:1: ConnectionRefusedError: ")) as caught:
        await transport.handle_async_request(request)
    assert caught.value.request is request


@pytest.mark.parametrize("url", ["ftp://h/x", "/x"])
async def test_what_is_no_url_of_http_is_refused(url: str, transport: HttpTransport) -> None:
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
    response: bytes, expected: type[httpx.RequestError], transport: HttpTransport
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
