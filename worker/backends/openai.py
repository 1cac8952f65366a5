"""
One OpenAI-compatible server over HTTP: httpx's requests and responses on aiohttp's connections.

httpx's own pool rescans every connection at each start and end of a request, which at 64 in flight costs 8 ms of CPU
a request; aiohttp's does not.  The transport is called directly: redirects, cookies, proxies of the environment and
retries are not wanted, so there is no client around it.  A test hands in another `httpx.AsyncBaseTransport`.

One attempt is one call of `invoke`, and one request unless the server refuses a form of streaming before it generates
anything (`negotiation`).  An answer that comes as a stream is assembled by `streaming`.  Which phase it reached is told
by the exceptions of aiohttp itself, which the transport keeps as the cause of its own: it calls a connection that was
reset under a running request a *connect* timeout, and the difference decides whether a GPU may have worked.

Source: httpx-aiohttp 0.2.0, `transport.py`; aiohttp 3.14, `client_exceptions.py`.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from urllib.parse import urlsplit

import aiohttp
import httpx
from httpx_aiohttp import AiohttpTransport

from worker.backends.credentials import ApiKey
from worker.backends.negotiation import Negotiator, Plan
from worker.backends.streaming import AttemptTimer, StreamedAnswer, holds_events, is_event_stream
from worker.backends.watched_response import WatchedResponse, on_connected
from worker.errors import BackendError
from worker.policy.model import Fault, Phase
from worker.ports import BackendRequest, Draft
from worker.settings import RouteSettings, TimeoutSettings

KEEPALIVE_S = 4.0
"""How long an idle connection is kept: below uvicorn's 5 s (vLLM, SGLang), so that a request is not sent into a
connection the server is just closing (https://www.uvicorn.org/settings/#timeouts)."""
PROBE_TIMEOUT_S = 5.0
MAX_CACHED_URLS = 256
SLICE_BYTES = 256 * 1024
"""A longer body is handed over in slices of this, so that ten megabytes are neither copied at once nor written past a
server that does not read; aiohttp warns about whole ones over 1 MiB."""
REQUEST_ID_HEADERS = ("x-request-id", "x-amzn-requestid", "apim-request-id")
HTTP_OK = range(200, 300)

_NOT_SENT = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.InvalidURL, httpx.ConnectError)
_NOT_CONNECTED = (aiohttp.ConnectionTimeoutError, httpx.ConnectTimeout, httpx.PoolTimeout)
"""Also by httpx's own names, for another transport: those of this one always have aiohttp's as their cause."""


class HttpBackend:
    """
    One route's server; see `worker.ports.Backend` for the contract.

    Args:
        route: Its settings.
        transport: Stands for the network in tests.

    Raises:
        SettingsError: The key file cannot be read.
    """

    def __init__(self, route: RouteSettings, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.name = route.name
        self._timeouts: TimeoutSettings = route.timeouts
        self._max_bytes = route.max_response_bytes
        self._base = route.base_url
        self._has_v1 = urlsplit(route.base_url).path.endswith("/v1")
        health = route.breaker.health_path
        self._health_url = httpx.URL(route.base_url.removesuffix("/v1") + health) if health is not None else None
        self._negotiator = Negotiator(route.name, route.stream, route.continuation)
        self._key = ApiKey(route.api_key, route.api_key_file)
        self._key_used = self._key.current()
        self._headers = {
            "content-type": "application/json",
            "accept": "application/json",
            "user-agent": "pubsub-inference-worker",
            **{name.lower(): value.get_secret_value() for name, value in route.headers.items()},
        }
        self._transport = transport or AiohttpTransport(client=_open_session)
        self._urls: dict[str, httpx.URL] = {}

    def url(self, path: str) -> httpx.URL:
        """Return where a path is asked: the base URL and the path, with a doubled `/v1` written once."""
        url = self._urls.get(path)
        if url is None:
            if len(self._urls) >= MAX_CACHED_URLS:
                self._urls.clear()
            tail = path.removeprefix("/v1") if self._has_v1 and path.startswith("/v1/") else path
            url = self._urls[path] = httpx.URL(self._base + tail)
        return url

    def credentials_changed(self) -> bool:
        """See `worker.ports.Backend.credentials_changed`."""
        return self._key.current() != self._key_used

    def _request(self, method: str, url: httpx.URL, headers: Mapping[str, str], body: bytes) -> httpx.Request:
        key = self._key.current()
        merged = {**self._headers, **headers, "content-length": str(len(body))}
        if key is not None:
            merged["authorization"] = f"Bearer {key}"
        connect = min(self._timeouts.connect_s, self._timeouts.total_s)
        return httpx.Request(
            method,
            url,
            headers=merged,
            content=body if len(body) <= SLICE_BYTES else _slices(body),
            extensions={"timeout": {"connect": connect, "pool": connect}},
        )

    def streams(self, path: str, body: bytes, *, stream_requested: bool) -> bool:
        """See `worker.ports.Backend.streams`."""
        return self._negotiator.streams(path, body, stream_requested=stream_requested)

    async def invoke(self, request: BackendRequest, draft: Draft) -> None:
        """Make one attempt and fill the draft; see `worker.ports.Backend.invoke`."""
        draft.started = time.monotonic()
        limit = self._timeouts.total_s if request.timeout_s is None else min(self._timeouts.total_s, request.timeout_s)
        timer = AttemptTimer(self._timeouts, limit)
        try:
            plan = self._negotiator.plan(request)
            async with timer.timeout:
                while True:
                    plan.begin(draft)
                    await self._exchange(request, plan, draft, timer)
                    if not plan.retreat(draft):
                        break
            draft.phase = Phase.PARSE
        except TimeoutError:
            raise _timed_out(draft, timer.fault) from None
        except BackendError:
            raise
        except (httpx.HTTPError, aiohttp.ClientError, OSError, httpx.InvalidURL) as error:
            raise _translate(error, draft) from error
        finally:
            draft.ended = time.monotonic()

    async def _exchange(self, request: BackendRequest, plan: Plan, draft: Draft, timer: AttemptTimer) -> None:
        """Send the plan's call and read the answer to it."""
        draft.phase = Phase.PREPARE
        outgoing = self._request("POST", self.url(request.path), request.headers, plan.call.body)
        self._key_used = self._key.current()
        draft.phase = Phase.CONNECT
        timer.await_first_byte()
        before = on_connected.set(request.on_connected)
        try:
            response = await self._transport.handle_async_request(outgoing)
        finally:
            on_connected.reset(before)
        try:
            _note_headers(draft, response)
            chunks = aiter(response.aiter_bytes() if response.headers.get("content-encoding") else response.stream)  # type: ignore[arg-type]
            answer = self._streamed_answer(plan, draft) if is_event_stream(draft) else None
            if answer is not None:
                draft.phase = Phase.STREAM
                draft.streamed, draft.salvaged_tokens = True, plan.call.salvaged_tokens
                await answer.read(chunks, timer, request.on_first_token)
                return
            draft.body = await self._read(chunks, timer)
        finally:
            await response.stream.aclose()  # type: ignore[union-attr]  # an AsyncByteStream
        if holds_events(draft) and (answer := self._streamed_answer(plan, draft)) is not None:
            answer.assemble(draft.body)

    def _streamed_answer(self, plan: Plan, draft: Draft) -> StreamedAnswer | None:
        """Return what takes a stream, `None` on paths whose answers cannot be assembled."""
        accumulator = plan.call.new_accumulator()
        if accumulator is None:
            return None
        return StreamedAnswer(accumulator, draft, max_bytes=self._max_bytes, salvage=plan.salvage)

    async def _read(self, chunks: AsyncIterator[bytes], timer: AttemptTimer) -> bytes:
        """Read the body; every chunk resets the idle timer."""
        timer.restart_idle()
        pieces: list[bytes] = []
        size = 0
        async for chunk in chunks:
            timer.restart_idle()
            size += len(chunk)
            if size > self._max_bytes:
                raise BackendError(Fault.RESPONSE_TOO_LARGE, f"more than {self._max_bytes} bytes")
            pieces.append(chunk)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def probe(self) -> bool | None:
        """See `worker.ports.Backend.probe`."""
        if self._health_url is None:
            return None
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                response = await self._transport.handle_async_request(self._request("GET", self._health_url, {}, b""))
                await response.stream.aclose()  # type: ignore[union-attr]
        except (TimeoutError, httpx.HTTPError, aiohttp.ClientError, OSError):
            return False
        return response.status_code in HTTP_OK

    async def aclose(self) -> None:
        """Close every connection; idempotent."""
        await self._transport.aclose()


def _open_session() -> aiohttp.ClientSession:
    """Return a session without a limit of its own: the window above is the limit."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S, ttl_dns_cache=10),
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("accept-encoding", "user-agent"),
        timeout=aiohttp.ClientTimeout(total=None),
        response_class=WatchedResponse,
        max_line_size=64 * 1024,
        max_field_size=64 * 1024,
    )


async def _slices(body: bytes) -> AsyncIterator[bytes]:
    view = memoryview(body)
    for start in range(0, len(body), SLICE_BYTES):
        yield bytes(view[start : start + SLICE_BYTES])


def _note_headers(draft: Draft, response: httpx.Response) -> None:
    draft.phase = Phase.BODY
    draft.status = response.status_code
    draft.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers.raw}
    for name in REQUEST_ID_HEADERS:
        if name in draft.headers:
            draft.backend_request_id = draft.headers[name]
            break


_SILENCES: Mapping[Fault, str] = {
    Fault.TOTAL_TIMEOUT: "no complete answer within the limit",
    Fault.FIRST_BYTE_TIMEOUT: "no answer within the limit",
    Fault.IDLE_TIMEOUT: "silence inside the response body",
}


def _timed_out(draft: Draft, fault: Fault) -> BackendError:
    if draft.phase is Phase.CONNECT:
        draft.phase = Phase.HEADERS  # connecting has its own, shorter limit
    return BackendError(fault, _SILENCES[fault])


def _translate(error: Exception, draft: Draft) -> BackendError:
    """Return what the failure means, by its root cause where the transport keeps one."""
    cause = error.__cause__ if isinstance(error.__cause__, aiohttp.ClientError | OSError) else error
    text = f"{type(cause).__name__}: {cause}"
    if isinstance(cause, _NOT_CONNECTED):
        return BackendError(Fault.CONNECT_TIMEOUT, text)
    if isinstance(cause, _NOT_SENT) and draft.phase is Phase.CONNECT:
        return BackendError(Fault.CONNECT, text)
    if isinstance(cause, httpx.DecodingError):
        return BackendError(Fault.DECODING, text)
    if draft.phase is Phase.CONNECT:
        draft.phase = Phase.HEADERS
    return BackendError(Fault.CONNECTION_LOST, text)
