"""
One OpenAI-compatible server over HTTP, by aiohttp's client.

Redirects, cookies, proxies of the environment and retries are not wanted and are off: the session comes from `session`,
and a test hands in another.  What is the same for every request, headers and limits of connecting, is the session's.

One attempt is one call of `invoke`, and one request unless the server refuses a form of streaming before it generates
anything (`negotiation`).  An answer that comes as a stream is assembled by `streaming`.  Which phase an attempt reached
is told by the kind of exception; the difference decides whether a GPU may have worked.

Source: aiohttp 3.14, `client_exceptions.py`.  ADR 0006 has the reason for aiohttp and nothing above it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from urllib.parse import urlsplit

import aiohttp
from aiohttp.http_exceptions import ContentEncodingError
from yarl import URL

from worker.backends.attempt_timer import AttemptTimer
from worker.backends.credentials import ApiKey
from worker.backends.negotiation import Negotiator, Plan
from worker.backends.session import OpenSession, open_session
from worker.backends.streaming import StreamedAnswer, holds_events, is_event_stream
from worker.backends.watched_response import on_connected
from worker.errors import BackendError
from worker.policy.model import Fault, Phase
from worker.ports import BackendRequest, Draft
from worker.settings import RouteSettings, TimeoutSettings

PROBE_TIMEOUT_S = 5.0
MAX_CACHED_URLS = 256
SLICE_BYTES = 256 * 1024
"""A longer body is handed over in slices of this, so that ten megabytes are neither copied at once nor written past a
server that does not read; aiohttp warns about whole ones over 1 MiB."""
REQUEST_ID_HEADERS = ("x-request-id", "x-amzn-requestid", "apim-request-id")
HTTP_OK = range(200, 300)

_NOT_SENT = (aiohttp.ClientConnectorError, aiohttp.InvalidURL)


class HttpBackend:
    """
    One route's server; see `worker.ports.Backend` for the contract.

    Args:
        route: Its settings.
        open_session: Makes the session, on the event loop, when the first request is sent.

    Raises:
        SettingsError: The key file cannot be read.
    """

    def __init__(self, route: RouteSettings, open_session: OpenSession = open_session) -> None:
        self.name = route.name
        self._timeouts: TimeoutSettings = route.timeouts
        self._max_bytes = route.max_response_bytes
        self._base = route.base_url
        self._has_v1 = urlsplit(route.base_url).path.endswith("/v1")
        health = route.breaker.health_path
        self._health_url = URL(route.base_url.removesuffix("/v1") + health) if health is not None else None
        self._negotiator = Negotiator(route.name, route.stream, route.continuation)
        self._key = ApiKey(route.api_key, route.api_key_file)
        self._key_used = self._key.current()
        self._headers = {
            "content-type": "application/json",
            "accept": "application/json",
            "accept-encoding": "identity",
            "user-agent": "pubsub-inference-worker",
            **{name.lower(): value.get_secret_value() for name, value in route.headers.items()},
        }
        self._open_session = open_session
        self._session: aiohttp.ClientSession | None = None
        self._urls: dict[str, URL] = {}

    def url(self, path: str) -> URL:
        """Return where a path is asked: the base URL and the path, with a doubled `/v1` written once."""
        url = self._urls.get(path)
        if url is None:
            if len(self._urls) >= MAX_CACHED_URLS:
                self._urls.clear()
            tail = path.removeprefix("/v1") if self._has_v1 and path.startswith("/v1/") else path
            url = self._urls[path] = URL(self._base + tail)
        return url

    def credentials_changed(self) -> bool:
        """See `worker.ports.Backend.credentials_changed`."""
        return self._key.current() != self._key_used

    async def _send(
        self, method: str, url: URL, headers: Mapping[str, str], body: bytes, draft: Draft
    ) -> aiohttp.ClientResponse:
        """Send one request; return when the response's headers are there.  The draft's phase follows it until then."""
        session = self._session
        if session is None:
            connect_s = min(self._timeouts.connect_s, self._timeouts.total_s)
            session = self._session = self._open_session(self._headers, connect_s)
        key = self._key.current()
        if key is not None:
            headers = {**headers, "authorization": f"Bearer {key}"}
        data: bytes | AsyncIterator[bytes] | None = body or None
        if len(body) > SLICE_BYTES:
            headers = {**headers, "content-length": str(len(body))}
            data = _slices(body, draft)
        return await session.request(method, url, headers=headers, data=data, allow_redirects=False)

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
            async with timer:
                while True:
                    plan.begin(draft)
                    await self._exchange(request, plan, draft, timer)
                    if not plan.retreat(draft):
                        break
            draft.phase = Phase.PARSE
        except BackendError:
            raise
        except aiohttp.ClientError as error:  # before TimeoutError, which some of them are
            raise _translate(error, draft) from error
        except TimeoutError:
            raise _timed_out(draft, timer.fault) from None
        except OSError as error:
            raise _translate(error, draft) from error
        finally:
            draft.ended = time.monotonic()

    async def _exchange(self, request: BackendRequest, plan: Plan, draft: Draft, timer: AttemptTimer) -> None:
        """Send the plan's call and read the answer to it."""
        draft.phase = Phase.PREPARE
        url = self.url(request.path)
        self._key_used = self._key.current()
        draft.phase = Phase.CONNECT
        timer.await_first_byte()

        def connected() -> None:
            if draft.phase is Phase.CONNECT and len(plan.call.body) <= SLICE_BYTES:
                draft.phase = Phase.HEADERS  # all of the request is on its way
            if request.on_connected is not None:
                request.on_connected()

        before = on_connected.set(connected)
        try:
            response = await self._send("POST", url, request.headers, plan.call.body, draft)
        finally:
            on_connected.reset(before)
        try:
            _note_headers(draft, response)
            chunks = response.content.iter_any()
            answer = self._streamed_answer(plan, draft) if is_event_stream(draft) else None
            if answer is not None:
                draft.phase = Phase.STREAM
                draft.streamed, draft.salvaged_tokens = True, plan.call.salvaged_tokens
                await answer.read(chunks, timer, request.on_first_token)
                return
            draft.body = await self._read(chunks, timer)
        finally:
            response.release()
            await response.wait_for_close()
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
                response = await self._send("GET", self._health_url, {}, b"", Draft())
                response.release()
        except (TimeoutError, aiohttp.ClientError, OSError):
            return False
        return response.status in HTTP_OK

    async def aclose(self) -> None:
        """Close every connection; idempotent."""
        if self._session is not None:
            await self._session.close()


async def _slices(body: bytes, draft: Draft) -> AsyncIterator[bytes]:
    """Yield the body in slices; the phase is that of sending until the last of them was taken."""
    draft.phase = Phase.SEND
    view = memoryview(body)
    for start in range(0, len(body), SLICE_BYTES):
        yield bytes(view[start : start + SLICE_BYTES])
    if draft.phase is Phase.SEND:  # a server may answer before it has read everything
        draft.phase = Phase.HEADERS


def _note_headers(draft: Draft, response: aiohttp.ClientResponse) -> None:
    draft.phase = Phase.BODY
    draft.status = response.status
    draft.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.raw_headers}
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
    """Return what the failure means."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return BackendError(Fault.CONNECT_TIMEOUT, text)
    if isinstance(error, _NOT_SENT) and draft.phase is Phase.CONNECT:
        return BackendError(Fault.CONNECT, text)
    if isinstance(error.__cause__, ContentEncodingError):
        return BackendError(Fault.DECODING, text)
    if draft.phase is Phase.CONNECT:
        draft.phase = Phase.HEADERS
    return BackendError(Fault.CONNECTION_LOST, text)
