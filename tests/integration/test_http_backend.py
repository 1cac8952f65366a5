"""The HTTP backend against raw sockets: what stands on the wire, and what an answer becomes."""

import asyncio
import gzip
import itertools
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.raw_http import BODY, CHUNKED, Connection, Open, always, answer, invoke, raw_server
from worker.backends.http.connection import SLICE_BYTES
from worker.backends.openai import MAX_CACHED_PATHS, HttpBackend
from worker.policy.model import Phase
from worker.settings.schema import RouteSettings

# What stands on the wire


async def test_the_request_is_exactly_what_was_given(open_backend: Open) -> None:
    """Method, path, the body's bytes and few headers; no compression, cookies or agent of a library."""
    async with raw_server(always(answer(b"{}", "Set-Cookie: a=b"))) as server:
        backend = open_backend(server.url, api_key="sk-1", headers={"X-Team": "a b"})
        for _ in range(2):
            await invoke(backend, "/v1/chat/completions?a=1", headers={"x-tenant": "t"})
    for head, body in server.requests:
        line, *headers = head.decode().rstrip().split("\r\n")
        assert line == "POST /v1/chat/completions?a=1 HTTP/1.1"
        assert sorted(header.lower() for header in headers) == [
            "accept-encoding: identity",
            "accept: application/json",
            "authorization: bearer sk-1",
            f"content-length: {len(BODY)}",
            "content-type: application/json",
            f"host: {server.url.removeprefix('http://')}",
            "user-agent: pubsub-inference-worker",
            "x-team: a b",
            "x-tenant: t",
        ]
        assert body == BODY


@pytest.mark.parametrize("size", [0, 1, SLICE_BYTES, SLICE_BYTES + 1, 2 * SLICE_BYTES, 9_000_001])
async def test_bodies_of_any_size_arrive_whole(size: int, open_backend: Open) -> None:
    """Large bodies go in slices, with their length up front and not chunked."""
    body = (bytes(range(256)) * (size // 256 + 1))[:size]
    async with raw_server(always(answer(b"{}"))) as server:
        await invoke(open_backend(server.url), body=body)
    ((head, received),) = server.requests
    assert received == body
    assert b"transfer-encoding" not in head.lower()
    assert f"content-length: {size}\r\n".encode() in head.lower()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(st.binary(max_size=2000))
async def test_no_byte_of_a_body_is_special(body: bytes) -> None:
    """Whatever the bytes, they arrive, and come back."""

    async def echo(connection: Connection) -> None:
        _, received = await connection.read_request()
        await connection.send(answer(received))

    async with raw_server(echo) as server:
        backend = HttpBackend(RouteSettings(name="r", base_url=server.url))
        result = await invoke(backend, body=body)
        await backend.aclose()
    assert (result.body, server.requests[0][1]) == (body, body)


@pytest.mark.parametrize(
    ("prefix", "path", "asked"),
    [
        ("", "/v1/chat/completions", "/v1/chat/completions"),
        ("/", "/v1/chat/completions", "/v1/chat/completions"),
        ("/v1", "/v1/chat/completions", "/v1/chat/completions"),
        ("/openai/v1/", "/v1/chat/completions", "/openai/v1/chat/completions"),
        ("/openai", "/v1/chat/completions", "/openai/v1/chat/completions"),
        ("/v1", "/v1beta/x", "/v1/v1beta/x"),
        ("", "/v1/models/a%2Fb?x=%20", "/v1/models/a%2Fb?x=%20"),
    ],
)
async def test_a_path_follows_the_base_url(prefix: str, path: str, asked: str, open_backend: Open) -> None:
    """A prefix is kept, a doubled `/v1` is written once, escapes stay as they are."""
    async with raw_server(always(answer(b"{}"))) as server:
        await invoke(open_backend(server.url + prefix), path)
    assert server.requests[0][0].startswith(f"POST {asked} HTTP/1.1\r\n".encode())


async def test_many_paths_do_not_grow_the_cache(open_backend: Open) -> None:
    """Paths come from requesters: what is remembered of them is bounded, and right all the same."""
    async with raw_server(always(answer(b"{}"))) as server:
        backend = open_backend(server.url + "/v1")
        for n in range(2 * MAX_CACHED_PATHS):
            await invoke(backend, f"/v1/{n}")
    asked = [head.split(b" ", 2)[1].decode() for head, _ in server.requests]
    assert asked == [f"/v1/{n}" for n in range(2 * MAX_CACHED_PATHS)]
    assert len(backend._request_lines) <= MAX_CACHED_PATHS


async def test_a_connection_is_used_again(open_backend: Open) -> None:
    """One request after the other needs one connection; at the same time, one each."""
    async with raw_server(always(answer(b"{}"))) as server:
        backend = open_backend(server.url)
        for _ in range(5):
            await invoke(backend)
        assert server.connections == 1
        await asyncio.gather(*(invoke(backend) for _ in range(200)))
        assert 1 < server.connections <= 200
    assert len(server.requests) == 205


async def test_the_environments_proxy_is_not_used(open_backend: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests go where the settings say."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    async with raw_server(always(answer(b"{}"))) as server:
        assert (await invoke(open_backend(server.url))).status == 200


# The key


async def test_a_rotated_key_is_used_and_noticed(open_backend: Open, tmp_path: Path) -> None:
    """A changed file is read again, and the change is visible until the next attempt, whatever probes do meanwhile."""
    key = tmp_path / "key"
    key.write_text("sk-old\n")
    async with raw_server(always(answer(b"{}"))) as server:
        backend = open_backend(server.url, api_key_file=str(key), breaker={"health_path": "/health"})
        backend._key._clock = itertools.count(
            start=time.monotonic() + 2, step=2
        ).__next__  # every look is a second later
        await invoke(backend)
        assert not backend.credentials_changed()
        (tmp_path / "new").write_text("sk-new-longer")
        (tmp_path / "new").rename(key)
        assert await backend.probe() is True
        assert backend.credentials_changed()
        await invoke(backend)
        assert not backend.credentials_changed()
    keys = [line for head, _ in server.requests for line in head.split(b"\r\n") if line.lower().startswith(b"auth")]
    assert [line.split()[-1] for line in keys] == [b"sk-old", b"sk-new-longer", b"sk-new-longer"]


# What an answer becomes


async def test_an_answer_fills_the_result(open_backend: Open) -> None:
    """Status, headers in lower case, the body's bytes, the backend's id of the request, and times."""
    head = ("X-Request-ID: r-7", "RETRY-AFTER: 3", "X-Latin: é")
    async with raw_server(always(answer(BODY, *head, status="429 Slow Down"))) as server:
        result = await invoke(open_backend(server.url))
    assert (result.status, result.body, result.phase) == (429, BODY, Phase.PARSE)
    assert (result.headers["retry-after"], result.headers["content-type"]) == ("3", "application/json")
    assert result.backend_request_id == "r-7"
    assert result.ended is not None
    assert result.ended >= result.started > 0


@pytest.mark.parametrize("status", [200, 204, 307, 308, 400, 401, 429, 500, 503, 599])
async def test_every_status_is_an_answer(status: int, open_backend: Open) -> None:
    """An error status raises nothing, a redirect is not followed."""
    async with raw_server(always(answer(b"", "Location: /elsewhere", status=f"{status} X"))) as server:
        result = await invoke(open_backend(server.url))
    assert (result.status, result.body, len(server.requests)) == (status, b"", 1)


PIECES = {
    "chunked": [CHUNKED, b"1\r\n{\r\n", b"1\r\n}\r\n", b"0\r\n\r\n"],
    "chunked with extension and trailer": [CHUNKED, b"2;a=b\r\n{}\r\n0\r\nX: y\r\n\r\n"],
    "byte by byte": [bytes([byte]) for byte in answer(b"{}")],
    "early hints": [b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", answer(b"{}")],
    "continue": [b"HTTP/1.1 100 Continue\r\n\r\n", answer(b"{}")],
    "headers of 60 KB": [answer(b"{}", "X: " + "a" * 60_000)],
}


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
async def test_the_same_answer_in_any_shape(pieces: list[bytes], open_backend: Open) -> None:
    """How the bytes were cut and framed makes no difference."""
    async with raw_server(always(*pieces)) as server:
        result = await invoke(open_backend(server.url))
    assert (result.status, result.body) == (200, b"{}")


async def test_a_body_may_end_with_the_connection(open_backend: Open) -> None:
    """HTTP/1.0 servers give no length."""

    async def script(connection: Connection) -> None:
        await connection.read_request()
        await connection.send(b"HTTP/1.0 200 OK\r\n\r\n{}")

    async with raw_server(script) as server:
        assert (await invoke(open_backend(server.url))).body == b"{}"


async def test_a_compressed_answer_is_read(open_backend: Open) -> None:
    """A server that compresses without being asked is understood."""
    async with raw_server(always(answer(gzip.compress(BODY), "Content-Encoding: gzip"))) as server:
        backend = open_backend(server.url)
        assert [(await invoke(backend)).body for _ in range(2)] == [BODY, BODY]
    assert server.connections == 1


@pytest.mark.parametrize("size", [999, 1000])
async def test_an_answer_within_the_limit_passes(size: int, open_backend: Open) -> None:
    """The limit itself is allowed."""
    async with raw_server(always(answer(b"a" * size))) as server:
        assert len((await invoke(open_backend(server.url, max_response_bytes=1000))).body) == size


@pytest.mark.parametrize("size", [10, 9_000_000])
async def test_an_answer_that_comes_before_the_request_is_read_counts(size: int, open_backend: Open) -> None:
    """A server that refuses a large request from its headers is heard, not called lost."""

    async def refuse(connection: Connection) -> None:
        await connection.reader.readuntil(b"\r\n\r\n")
        await connection.send(answer(b'{"error":"too large"}', "Connection: close", status="413 Too Large"))
        await connection.wait_closed_by_peer()

    async with raw_server(refuse) as server:
        result = await invoke(open_backend(server.url), body=b"x" * size)
    assert (result.status, result.body) == (413, b'{"error":"too large"}')
