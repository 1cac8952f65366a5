"""The HTTP backend: cancellation, probes, and another session in its place."""

import asyncio
import errno
import ssl
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from aiohttp.connector import Connection as Connected

from tests.http_attempt import Open, invoke
from tests.raw_http import Connection, always, answer, raw_server, until
from worker.backends.openai import HttpBackend
from worker.errors import BackendError
from worker.policy.model import Fault, Phase
from worker.ports import BackendRequest, Draft
from worker.settings import RouteSettings


async def test_cancellation_closes_the_connection(open_backend: Open) -> None:
    """A server that watches its connection stops generating."""

    async def hang(connection: Connection) -> None:
        await connection.read_request()
        await connection.wait_closed_by_peer()

    async with raw_server(hang) as server:
        task = asyncio.ensure_future(invoke(open_backend(server.url)))
        await until(lambda: server.requests)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: server.closed_by_peer)


async def test_cancellation_inside_the_body_closes_the_connection(open_backend: Open) -> None:
    """Also when the answer has begun; what is known stays in the draft."""
    draft = Draft()

    async def hang(connection: Connection) -> None:
        await connection.read_request()
        await connection.send(answer(b"{", length=10))
        await connection.wait_closed_by_peer()

    async with raw_server(hang) as server:
        backend = open_backend(server.url)
        task = asyncio.ensure_future(backend.invoke(BackendRequest(path="/v1/x", body=b"{}"), draft))
        await until(lambda: draft.status)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: server.closed_by_peer)
    assert (draft.status, draft.phase) == (200, Phase.BODY)
    assert draft.ended is not None


async def test_a_connection_is_told_before_anything_is_answered(open_backend: Open) -> None:
    """With the request sent and long before the headers; once for each attempt, whether the connection is new or kept."""
    told, go_on = asyncio.Event(), asyncio.Event()

    async def slow(connection: Connection) -> None:
        for _ in range(2):
            await connection.read_request()
            await go_on.wait()
            await connection.send(answer(b"{}"))

    async with raw_server(slow) as server:
        backend = open_backend(server.url)
        for _ in range(2):
            told.clear()
            go_on.clear()
            task = asyncio.ensure_future(invoke(backend, on_connected=told.set))
            await told.wait()
            assert not task.done()
            go_on.set()
            assert (await task).status == 200
        assert server.connections == 1


async def test_a_refused_connection_is_not_told(open_backend: Open) -> None:
    """Nor is one of an attempt before it in the same task."""
    told: list[int] = []
    async with raw_server(always(answer(b"{}"))) as server:
        await invoke(open_backend(server.url), on_connected=lambda: told.append(1))
        await invoke(open_backend(server.url))
    with pytest.raises(BackendError) as caught:
        await invoke(open_backend(server.url), on_connected=lambda: told.append(2))
    assert (caught.value.fault, told) == (Fault.CONNECT, [1])


@pytest.mark.parametrize(
    ("status", "verdict"), [("200 OK", True), ("204 No", True), ("503 No", False), ("307 X", False)]
)
async def test_a_probe_asks_the_health_path(status: str, verdict: bool, open_backend: Open) -> None:
    """GET, without the base URL's `/v1`; only a 2xx is well."""
    async with raw_server(always(answer(b"", status=status))) as server:
        assert await open_backend(server.url + "/a/v1", breaker={"health_path": "/health"}).probe() is verdict
    assert server.requests[0][0].startswith(b"GET /a/health HTTP/1.1\r\n")


async def test_a_probe_never_raises(open_backend: Open) -> None:
    """Nobody there, garbage or a reset are `False`; no health path is `None`."""

    async def garbage(connection: Connection) -> None:
        await connection.read_request()
        await connection.send(b"hello\r\n\r\n")

    async def reset(connection: Connection) -> None:
        await connection.read_request()
        connection.reset()

    health = {"health_path": "/health"}
    assert await open_backend("http://127.0.0.1:1", breaker=health).probe() is False
    assert await open_backend("http://nowhere.invalid", breaker=health).probe() is False
    for script in (garbage, reset):
        async with raw_server(script) as server:
            assert await open_backend(server.url, breaker=health).probe() is False
    assert await open_backend("http://127.0.0.1:1").probe() is None


async def test_a_probe_that_hangs_is_bounded(open_backend: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence is `False` within the probe's own limit."""
    monkeypatch.setattr("worker.backends.openai.PROBE_TIMEOUT_S", 0.05)

    async def hang(connection: Connection) -> None:
        await connection.read_request()
        await connection.wait_closed_by_peer()

    async with raw_server(hang) as server:
        assert await open_backend(server.url, breaker={"health_path": "/health"}).probe() is False


class FailingConnector(aiohttp.TCPConnector):
    """Makes no connections."""

    def __init__(self, error: Callable[[aiohttp.ClientRequest], Exception]) -> None:
        super().__init__()
        self._error = error

    async def connect(self, req: aiohttp.ClientRequest, *_: Any, **__: Any) -> Connected:
        raise self._error(req)


@pytest.mark.parametrize(
    ("error", "fault", "phase"),
    [
        (lambda req: aiohttp.ClientConnectorError(req.connection_key, OSError()), Fault.CONNECT, Phase.CONNECT),
        (lambda req: aiohttp.ClientConnectorSSLError(req.connection_key, OSError()), Fault.CONNECT, Phase.CONNECT),
        (lambda _: TimeoutError(), Fault.CONNECT_TIMEOUT, Phase.CONNECT),
        (lambda _: aiohttp.ServerDisconnectedError(), Fault.CONNECTION_LOST, Phase.HEADERS),
        (lambda _: aiohttp.ClientPayloadError(), Fault.CONNECTION_LOST, Phase.HEADERS),
        (lambda _: ssl.SSLError("x"), Fault.CONNECTION_LOST, Phase.HEADERS),
        (lambda _: TimeoutError(errno.ETIMEDOUT, "x"), Fault.CONNECT_TIMEOUT, Phase.CONNECT),
    ],
    ids=["refused", "no TLS", "silence", "disconnected", "payload", "OS error", "timeout of the OS"],
)
async def test_another_session_may_be_handed_in(
    error: Callable[[aiohttp.ClientRequest], Exception], fault: Fault, phase: Phase
) -> None:
    """The seam for tests; and the kind of an error alone says which phase it ended."""

    def open_session(*_: Any) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(connector=FailingConnector(error))

    backend = HttpBackend(RouteSettings(name="r", base_url="http://h"), open_session)
    draft = Draft()
    with pytest.raises(BackendError) as caught:
        await backend.invoke(BackendRequest(path="/v1/x", body=b"{}"), draft)
    assert (caught.value.fault, draft.phase) == (fault, phase)
    await backend.aclose()
