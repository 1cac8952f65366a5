"""The HTTP backend: cancellation, probes, and another transport below it."""

import asyncio
import gzip
import ssl

import httpx
import pytest

from tests.support.raw_http import Connection, Open, always, answer, invoke, raw_server, until
from worker.backends.http.connection import SLICE_BYTES
from worker.backends.openai import HttpBackend
from worker.errors import BackendError, SettingsError
from worker.policy.model import Fault, Phase
from worker.ports import AttemptResult, BackendRequest
from worker.settings.schema import RouteSettings
from worker.wire.body import RequestBody


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
    """Also when the answer has begun; what is known stays in the result."""
    result = AttemptResult()

    async def hang(connection: Connection) -> None:
        await connection.read_request()
        await connection.send(answer(b"{", length=10))
        await connection.wait_closed_by_peer()

    async with raw_server(hang) as server:
        backend = open_backend(server.url)
        task = asyncio.ensure_future(backend.invoke(BackendRequest(path="/v1/x", body=RequestBody(b"{}")), result))
        await until(lambda: result.status)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: server.closed_by_peer)
    assert (result.status, result.phase) == (200, Phase.BODY)
    assert result.ended is not None


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
    """No server, garbage or a reset are `False`; no health path is `None`."""

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


class OtherTransport(httpx.AsyncBaseTransport):
    """Raises httpx's errors with nothing below them, or answers."""

    def __init__(self, outcome: Exception | httpx.Response) -> None:
        self._outcome = outcome
        self.requests: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


@pytest.mark.parametrize(
    ("error", "fault", "phase"),
    [
        (httpx.ConnectError("x"), Fault.CONNECT, Phase.CONNECT),
        (httpx.ConnectTimeout("x"), Fault.CONNECT_TIMEOUT, Phase.CONNECT),
        (httpx.PoolTimeout("x"), Fault.CONNECT_TIMEOUT, Phase.CONNECT),
        (httpx.UnsupportedProtocol("x"), Fault.CONNECT, Phase.CONNECT),
        (httpx.ReadError("x"), Fault.CONNECTION_LOST, Phase.HEADERS),
        (httpx.ReadTimeout("x"), Fault.CONNECTION_LOST, Phase.HEADERS),
        (httpx.RemoteProtocolError("x"), Fault.CONNECTION_LOST, Phase.HEADERS),
        (ssl.SSLError("x"), Fault.CONNECTION_LOST, Phase.HEADERS),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
async def test_another_transport_may_be_handed_in(error: Exception, fault: Fault, phase: Phase) -> None:
    """httpx's names alone say which phase an error ended."""
    backend = HttpBackend(RouteSettings(name="r", base_url="http://h"), OtherTransport(error))
    result = AttemptResult()
    with pytest.raises(BackendError) as caught:
        await backend.invoke(BackendRequest(path="/v1/x", body=RequestBody(b"{}")), result)
    assert (caught.value.fault, result.phase) == (fault, phase)


@pytest.mark.parametrize("size", [2, SLICE_BYTES + 1])
async def test_another_transport_gets_a_request_that_lacks_nothing(size: int) -> None:
    """Every header that stands on the wire, the whole body, the limits of connecting; nothing is added later."""
    transport = OtherTransport(httpx.Response(200, content=b"{}"))
    settings = {"name": "r", "base_url": "http://h:8000/v1", "api_key": "sk-1", "timeouts": {"connect_s": 3}}
    backend = HttpBackend(RouteSettings.model_validate(settings), transport)
    result = await invoke(backend, body=b"x" * size, headers={"x-tenant": "t"})
    assert (result.status, result.body) == (200, b"{}")
    (request,) = transport.requests
    assert (request.method, str(request.url)) == ("POST", "http://h:8000/v1/x")
    assert dict(request.headers) == {
        "host": "h:8000",
        "content-type": "application/json",
        "accept": "application/json",
        "accept-encoding": "identity",
        "user-agent": "pubsub-inference-worker",
        "authorization": "Bearer sk-1",
        "x-tenant": "t",
        "content-length": str(size),
    }
    assert await request.aread() == b"x" * size
    assert request.extensions == {"timeout": {"connect": 3, "pool": 3}}


@pytest.mark.parametrize("body", [gzip.compress(b"{}"), b"no gzip"], ids=["good", "broken"])
async def test_what_another_transport_leaves_packed_is_unpacked(body: bytes) -> None:
    """As httpx's own transports do; what cannot be unpacked is told apart."""
    response = httpx.Response(200, headers={"content-encoding": "gzip"}, stream=httpx.ByteStream(body))
    backend = HttpBackend(RouteSettings(name="r", base_url="http://h"), OtherTransport(response))
    if body == b"no gzip":
        with pytest.raises(BackendError) as caught:
            await invoke(backend)
        assert caught.value.fault is Fault.DECODING
    else:
        assert (await invoke(backend)).body == b"{}"


def test_a_host_that_is_no_name_is_a_fault_of_the_settings() -> None:
    """Found before anything starts, not at the first request."""
    with pytest.raises(SettingsError, match="base_url: Invalid IDNA hostname"):
        HttpBackend(RouteSettings(name="r", base_url="http://\N{SNOWMAN}.example"))
