"""
One OpenAI-compatible server over HTTP: httpx's requests and responses, on aiohttp's connections by `transport`.

The transport is called directly: redirects, cookies, proxies of the environment and retries are not wanted, so there is
no client around it.  Any other `httpx.AsyncBaseTransport` may take its place.  What is the same for every request of a
route is prepared once.

One attempt is one call of `invoke`, and one request unless the server refuses a form of streaming before it generates
anything (`negotiation`).  An answer that comes as a stream is assembled by `streams.reading`.  The kind of an exception
tells which phase an attempt reached, and so whether a GPU may have worked.

Source: https://www.python-httpx.org/exceptions/.  ADR 0001 has the reasons for httpx's API without its client.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from urllib.parse import urlsplit

import httpx

from worker.backends.http.attempt_timer import AttemptTimer
from worker.backends.http.connections import on_connected
from worker.backends.http.credentials import ApiKey, Redactor
from worker.backends.http.transport import AiohttpTransport, PreparedRequest
from worker.backends.request.negotiation import Negotiator, Plan
from worker.backends.request.stream import Form
from worker.backends.streams.reading import BOM, StreamedAnswer, holds_events, is_labelled_stream
from worker.errors import BackendError, SettingsError
from worker.policy.model import Fault, Phase
from worker.policy.normalise import MAX_BODY_BYTES
from worker.ports import AttemptResult, BackendRequest
from worker.settings.schema import RouteSettings, TimeoutSettings
from worker.wire.body import RequestBody
from worker.wire.endpoints import endpoint_of
from worker.wire.http import is_success, request_id_of

PROBE_TIMEOUT_S = 5.0
MAX_CACHED_URLS = 256
MAX_BLANK_BYTES = 4096
"""Blanks at the head of a body after which nothing more is awaited that says what it is."""
SLICE_BYTES = 256 * 1024
"""A longer body is handed over in slices of this, so that ten megabytes are neither copied at once nor written past a
server that does not read; aiohttp warns about whole ones over 1 MiB."""

_NOT_SENT = (httpx.ConnectError, httpx.UnsupportedProtocol)
_NOT_CONNECTED = (httpx.ConnectTimeout, httpx.PoolTimeout)


class HttpBackend:
    """
    One route's server; see `worker.ports.Backend` for the contract.

    Args:
        route: Its settings.
        transport: Sends the requests; by default one on aiohttp's connections.

    Raises:
        SettingsError: The key file cannot be read, or the base URL's host is no name.
    """

    def __init__(self, route: RouteSettings, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.name = route.name
        self._timeouts: TimeoutSettings = route.timeouts
        self._max_bytes = route.max_response_bytes
        self._base = route.base_url
        self._has_v1 = urlsplit(route.base_url).path.endswith("/v1")
        self._negotiator = Negotiator(route.name, route.stream, route.continuation)
        self._key = ApiKey(route.api_key, route.api_key_file)
        self._key_used = self._key.current()
        self._key_sent: str | None = None
        self._redactor = Redactor(value.get_secret_value() for value in route.headers.values())
        self._headers = {
            "host": _host(route.base_url),
            "content-type": "application/json",
            "accept": "application/json",
            "accept-encoding": "identity",
            "user-agent": "pubsub-inference-worker",
            **{name.lower(): value.get_secret_value() for name, value in route.headers.items()},
        }
        health = route.breaker.health_path
        self._health_url = httpx.URL(route.base_url.removesuffix("/v1") + health) if health is not None else None
        connect_s = min(self._timeouts.connect_s, self._timeouts.total_s)
        self._extensions = {"timeout": {"connect": connect_s, "pool": connect_s}}
        self._transport = AiohttpTransport() if transport is None else transport
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

    def _request(
        self, method: str, url: httpx.URL, headers: Mapping[str, str], body: bytes, result: AttemptResult
    ) -> httpx.Request:
        """Return one request; the result's phase will follow the sending of a long body."""
        key = self._key.current()
        if key != self._key_sent:  # not in place: requests on their way share the headers
            self._headers = {**self._headers, "authorization": f"Bearer {key}"}
            self._key_sent = key
            if key is not None:
                self._redactor.add_key(key)
        own = {**headers, "content-length": str(len(body))} if method == "POST" else headers
        stream = httpx.ByteStream(body) if len(body) <= SLICE_BYTES else _Slices(body, result)
        return PreparedRequest(method, url, fixed=self._headers, own=own, stream=stream, extensions=self._extensions)

    def streams(self, path: str, body: RequestBody) -> bool:
        """See `worker.ports.Backend.streams`."""
        return self._negotiator.form(endpoint_of(path), body) is not Form.UNARY

    async def invoke(self, request: BackendRequest, result: AttemptResult) -> None:
        """
        Make one attempt and fill the result; see `worker.ports.Backend.invoke`.

        Cancellation: closes the connection; what came is in the result.
        """
        result.started = time.monotonic()
        limit = self._timeouts.total_s if request.timeout_s is None else min(self._timeouts.total_s, request.timeout_s)
        timer = AttemptTimer(self._timeouts, limit)
        plan = None
        try:
            plan = self._negotiator.plan(request)
            async with timer:
                while True:
                    plan.reset(result)
                    broken = await self._exchange(request, plan, result, timer)
                    if plan.call.form is not Form.UNARY:
                        self._redact(result)  # the reason for another form is logged
                    if not plan.fall_back(result, broken):
                        break
            if broken is not None:
                raise broken
            result.phase = Phase.PARSE
        except (BackendError, httpx.HTTPError, httpx.InvalidURL, OSError) as error:  # a TimeoutError is an OSError
            if plan is None or not (result.is_whole or plan.restore(result)):
                fault, words = _failure(error, result, plan, timer)
                if plan is not None:
                    plan.note_failure(result, fault)
                raise BackendError(fault, self._redactor.text(words)) from error
            result.phase = Phase.PARSE  # what failed came after a whole answer
        finally:
            result.ended = time.monotonic()
            self._redact(result)

    def _redact(self, result: AttemptResult) -> None:
        """Take the credentials that were sent out of what came; whatever it is judged to be."""
        redactor = self._redactor
        headers = redactor.headers(result.headers)
        if headers is not result.headers:
            result.headers, result.backend_request_id = headers, request_id_of(headers)
        is_answer = is_success(result.status) and not result.in_stream and result.body.startswith(b"{")
        result.body = redactor.body(result.body, is_answer=is_answer)
        if result.partial is not None:
            result.partial = redactor.body(result.partial, is_answer=True)

    async def _exchange(
        self, request: BackendRequest, plan: Plan, result: AttemptResult, timer: AttemptTimer
    ) -> BackendError | None:
        """Send the plan's call and read the answer to it; returns how a stream broke that came to its end."""
        result.phase = Phase.PREPARE
        outgoing = self._request("POST", self.url(request.path), request.headers, plan.call.body, result)
        self._key_used = self._key.current()
        result.phase = Phase.CONNECT
        timer.await_first_byte()

        def connected() -> None:
            if result.phase is Phase.CONNECT and len(plan.call.body) <= SLICE_BYTES:
                result.phase = Phase.HEADERS  # all of the request is on its way
            if request.on_connected is not None:
                request.on_connected()

        before = on_connected.set(connected)
        try:
            response = await self._transport.handle_async_request(outgoing)
        finally:
            on_connected.reset(before)
        body = response.stream
        assert isinstance(body, httpx.AsyncByteStream)  # what an asynchronous transport returns
        try:
            _note_headers(result, response)
            chunks = aiter(response.aiter_bytes() if "content-encoding" in result.headers else body)
            await self._read_answer(request, plan, result, chunks, timer)
        except BackendError as error:
            if error.fault != Fault.STREAM_BROKEN:
                raise
            return error
        finally:
            await body.aclose()
        return None

    async def _read_answer(
        self,
        request: BackendRequest,
        plan: Plan,
        result: AttemptResult,
        chunks: AsyncIterator[bytes],
        timer: AttemptTimer,
    ) -> None:
        """Read the body as what its first bytes say it is, whatever its label."""
        head, is_labelled, is_stream = b"", False, False
        if is_success(result.status):
            is_labelled = is_labelled_stream(result)
            if is_labelled:
                result.phase, result.streamed = Phase.STREAM, True
            else:
                timer.restart_idle()
            known = None
            while known is None and len(head) < MAX_BLANK_BYTES and (chunk := await anext(chunks, None)) is not None:
                head += chunk
                if not is_labelled:
                    timer.restart_idle()
                known = holds_events(head, is_labelled=is_labelled)
            is_stream = is_labelled if known is None else known
        accumulator = plan.call.new_accumulator() if is_stream else None
        if accumulator is None:
            result.phase, result.streamed = Phase.BODY, False
            is_error = (result.status or 0) >= 400  # noqa: PLR2004
            result.body = await self._read(head, chunks, timer, is_error=is_error)
            return
        result.phase = Phase.STREAM
        result.streamed, result.salvaged_tokens = True, plan.call.salvaged_tokens
        answer = StreamedAnswer(accumulator, result, max_bytes=self._max_bytes, resume_point=plan.resume_point)
        if not is_labelled:
            timer.await_first_byte()
        await answer.read(head, chunks, timer, request.on_first_token)

    async def _read(self, head: bytes, chunks: AsyncIterator[bytes], timer: AttemptTimer, *, is_error: bool) -> bytes:
        """
        Read the rest of a body; every chunk resets the idle timer.

        Of an error's, no more is read than anything looks at.
        """
        timer.restart_idle()
        pieces: list[bytes] = [head] if head else []
        size = len(head)
        if size > self._max_bytes:
            raise BackendError(Fault.RESPONSE_TOO_LARGE, f"more than {self._max_bytes} bytes")
        async for chunk in chunks:
            timer.restart_idle()
            size += len(chunk)
            if size > self._max_bytes:
                raise BackendError(Fault.RESPONSE_TOO_LARGE, f"more than {self._max_bytes} bytes")
            pieces.append(chunk)
            if is_error and size > MAX_BODY_BYTES:
                break
        return (pieces[0] if len(pieces) == 1 else b"".join(pieces)).removeprefix(BOM)

    async def probe(self) -> bool | None:
        """
        Ask the health path; see `worker.ports.Backend.probe`.

        Cancellation: leaves nothing behind.
        """
        if self._health_url is None:
            return None
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                request = self._request("GET", self._health_url, {}, b"", AttemptResult())
                response = await self._transport.handle_async_request(request)
                await response.aclose()
        except (httpx.HTTPError, OSError):  # a TimeoutError is an OSError
            return False
        return is_success(response.status_code)

    async def aclose(self) -> None:
        """
        Close every connection; idempotent.

        Cancellation: connections may stay open until the process ends; call it again.
        """
        await self._transport.aclose()


def _host(base_url: str) -> str:
    try:
        return httpx.URL(base_url).netloc.decode()
    except httpx.InvalidURL as error:
        raise SettingsError([f"base_url: {error}"]) from None


class _Slices(httpx.AsyncByteStream):
    """A long body; the phase is that of sending until the last slice was taken."""

    def __init__(self, body: bytes, result: AttemptResult) -> None:
        self._body = body
        self._result = result

    async def __aiter__(self) -> AsyncIterator[bytes]:
        result = self._result
        result.phase = Phase.SEND
        view = memoryview(self._body)
        for start in range(0, len(view), SLICE_BYTES):
            yield bytes(view[start : start + SLICE_BYTES])
        if result.phase is Phase.SEND:  # a server may answer before it has read everything
            result.phase = Phase.HEADERS


def _note_headers(result: AttemptResult, response: httpx.Response) -> None:
    result.phase = Phase.BODY
    result.status = response.status_code
    result.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers.raw}
    result.backend_request_id = request_id_of(result.headers)


_SILENCES: Mapping[Fault, str] = {
    Fault.TOTAL_TIMEOUT: "no complete answer within the limit",
    Fault.FIRST_BYTE_TIMEOUT: "no answer within the limit",
    Fault.IDLE_TIMEOUT: "silence inside the response body",
}


def _failure(error: Exception, result: AttemptResult, plan: Plan | None, timer: AttemptTimer) -> tuple[str, str]:
    """Return the fault of an attempt and its words; of a server that is gone since its stream broke, how it broke."""
    if isinstance(error, BackendError):
        return error.fault, error.detail
    if isinstance(error, TimeoutError):
        return _timed_out(result, timer.fault)
    fault, words = _translate(error, result)
    if fault in {Fault.CONNECT, Fault.CONNECT_TIMEOUT} and plan is not None and plan.broken is not None:
        result.phase = Phase.STREAM
        return plan.broken.fault, plan.broken.detail
    return fault, words


def _timed_out(result: AttemptResult, fault: Fault) -> tuple[Fault, str]:
    if result.phase is Phase.CONNECT:
        result.phase = Phase.HEADERS  # connecting has its own, shorter limit
    return fault, _SILENCES[fault]


def _translate(error: Exception, result: AttemptResult) -> tuple[Fault, str]:
    """Return what the failure means, and its words; they are those of its cause, which know more."""
    cause = error.__cause__ or error
    text = f"{type(cause).__name__}: {cause}"
    if isinstance(error, _NOT_CONNECTED):
        return (Fault.CONNECT_TIMEOUT, text)
    if isinstance(error, _NOT_SENT) and result.phase is Phase.CONNECT:
        return (Fault.CONNECT, text)
    if result.phase is Phase.CONNECT:
        result.phase = Phase.HEADERS
    if isinstance(error, httpx.DecodingError):
        return (Fault.DECODING, text)
    return (Fault.CONNECTION_LOST, text)
