"""
One OpenAI-compatible server over HTTP, on connections of our own (`http`).

Redirects, cookies, proxies of the environment and retries are not wanted, so there is no client around the connections.
Any `httpx.AsyncBaseTransport` may take their place.  What is the same for every request of a route is prepared once, as
bytes.

One attempt is one call of `invoke`, and one request unless the server refuses a form of streaming before it generates
anything (`negotiation`).  The answer is pushed into an `Answer` as it arrives; one that comes as a stream is assembled
by `streams.reading`.  The fault of a failure and the phase that was reached tell whether a GPU may have worked.

`backends.sagemaker` is the same with other requests and with frames around its streams: what differs are the methods
`_plan`, `_outgoing` and `_new_answer`.

ADR 0001 has the reasons for doing without httpx's client, ADR 0018 for our own connections.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from worker.backends.http.attempt_timer import AttemptTimer
from worker.backends.http.connection import Headers, Request, Sink
from worker.backends.http.credentials import ApiKey, Redactor
from worker.backends.http.pool import Pool
from worker.backends.http.tls import Tls
from worker.backends.request.negotiation import Negotiator, Plan
from worker.backends.request.stream import Form
from worker.backends.streams.reading import BOM, StreamedAnswer, holds_events, is_labelled_stream
from worker.errors import BackendError
from worker.policy.model import Fault, Phase
from worker.policy.normalise import MAX_BODY_BYTES
from worker.ports import AttemptResult, BackendRequest
from worker.settings.schema import RouteSettings, TimeoutSettings
from worker.wire.body import RequestBody
from worker.wire.endpoints import endpoint_of
from worker.wire.http import address_of, is_success, request_id_of

if TYPE_CHECKING:
    import httpx  # 80 ms of CPU, for what only another transport needs

PROBE_TIMEOUT_S = 5.0
MAX_CACHED_PATHS = 256
MAX_BLANK_BYTES = 4096
"""Blanks at the head of a body after which nothing more is awaited that says what it is."""

_NOT_SENT = frozenset({Fault.CONNECT, Fault.CONNECT_TIMEOUT})
_VISIBLE = frozenset(map(chr, range(0x21, 0x7F)))
_PATH_SAFE = "".join(_VISIBLE - set('"<>`{}'))
_QUERY_SAFE = "".join(_VISIBLE - set('"<>'))
"""What stays as it is in a request line, as browsers do it (https://url.spec.whatwg.org/#path-percent-encode-set)."""


class HttpBackend:
    """
    One route's server; see `worker.ports.Backend` for the contract.

    Args:
        route: Its settings.
        transport: Sends the requests instead of our own connections.

    Raises:
        SettingsError: A file of a key or a certificate cannot be read, or the base URL's host is no name.
    """

    def __init__(self, route: RouteSettings, transport: "httpx.AsyncBaseTransport | None" = None) -> None:
        self.name = route.name
        self._timeouts: TimeoutSettings = route.timeouts
        self._max_bytes = route.max_response_bytes
        self._prefix = urlsplit(route.base_url).path
        self._negotiator = Negotiator(route.name, route.stream, route.continuation)
        self._key = ApiKey(route.api_key, route.api_key_file)
        self._key_used = self._key.current()
        self._key_sent: str | None = None
        tls = Tls(route.tls).context if route.base_url.startswith("https:") else None
        proxy = None if route.proxy is None else route.proxy.get_secret_value()
        self._pool = Pool(route.base_url, tls=tls, proxy=proxy)
        secrets = [value.get_secret_value() for value in route.headers.values()]
        self._redactor = Redactor([*secrets, self._pool.proxy_credentials])
        self._headers = {
            "host": self._pool.authority,
            "content-type": "application/json",
            "accept": "application/json",
            "accept-encoding": "identity",
            "user-agent": "pubsub-inference-worker",
            **{name.lower(): value.get_secret_value() for name, value in route.headers.items()},
        }
        self._fixed = lines(self._headers)
        health = route.breaker.health_path
        self._health = None if health is None else self._prefix.removesuffix("/v1") + health
        self._connect_s = min(self._timeouts.connect_s, self._timeouts.total_s)
        self._exchange: Callable[[Request, Sink, float], Awaitable[None]] = self._pool.exchange
        self._aclose = self._pool.aclose
        if transport is not None:
            from worker.backends.http.transport import ForeignTransport  # noqa: PLC0415 - httpx is slow to import

            foreign = ForeignTransport(transport, route.base_url)
            self._exchange, self._aclose = foreign.exchange, transport.aclose
        self._request_lines: dict[str, bytes] = {}

    def target(self, path: str) -> str:
        """Return what is asked for a path: the base URL's prefix and the path, with a doubled `/v1` written once."""
        return address_of(self._prefix, path)

    def credentials_changed(self) -> bool:
        """See `worker.ports.Backend.credentials_changed`."""
        return self._key.current() != self._key_used

    def _request(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Request:
        """Return one request; what repeats was joined before."""
        key = self._key.current()
        if key != self._key_sent:
            self._headers["authorization"] = f"Bearer {key}"
            self._fixed = lines(self._headers)
            self._key_sent = key
            if key is not None:
                self._redactor.add_key(key)
        first = self._request_lines.get(target)
        if first is None:
            if len(self._request_lines) >= MAX_CACHED_PATHS:
                self._request_lines.clear()
            first = b" %b%b HTTP/1.1\r\n%b" % (self._pool.line_prefix, escaped(target), self._pool.line_headers)
            self._request_lines[target] = first
        fixed = self._fixed
        if not self._headers.keys().isdisjoint(headers):  # one request's own come before those of all
            fixed = lines({name: value for name, value in self._headers.items() if name not in headers})
        length = b"content-length: %d\r\n" % len(body) if method == "POST" else b""
        return Request(b"".join((method.encode(), first, fixed, lines(headers), length, b"\r\n")), body)

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
        plan, broken = None, None
        try:
            plan = self._plan(request)
            async with timer:
                while True:
                    plan.reset(result)
                    broken = await self._ask(request, plan, result, timer)
                    if plan.call.form is not Form.UNARY:
                        self._redact(result)  # the reason for another form is logged
                    if not plan.fall_back(result, broken):
                        break
            if broken is not None:
                raise broken
            result.phase = Phase.PARSE
        except (BackendError, TimeoutError) as error:
            if plan is None or not (result.is_whole or plan.restore(result)):
                fault, words = _failure(error, result, plan, timer)
                if plan is not None:
                    plan.note_failure(result, fault)
                raise BackendError(fault, self._redactor.text(words)) from error
            result.phase = Phase.PARSE  # what failed came after a whole answer
        finally:
            broken = None  # see `Connection.exchange`
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

    async def _ask(
        self, request: BackendRequest, plan: Plan, result: AttemptResult, timer: AttemptTimer
    ) -> BackendError | None:
        """Send the plan's call and read the answer to it; returns how a stream broke that came to its end."""
        result.phase = Phase.PREPARE
        outgoing = self._outgoing(request, plan)
        result.phase = Phase.CONNECT
        timer.await_first_byte()
        answer = self._new_answer(request, plan, result, timer)
        try:
            await self._exchange(outgoing, answer, self._connect_s)
            answer.end()
        except BackendError as error:
            if answer.is_whole():
                return None
            if error.fault != Fault.STREAM_BROKEN:
                raise
            return error
        finally:
            answer.close()
        return None

    def _plan(self, request: BackendRequest) -> Plan:
        return self._negotiator.plan(request)

    def _outgoing(self, request: BackendRequest, plan: Plan) -> Request:
        """
        Return the plan's call as it goes over the wire.

        Raises:
            BackendError: The service would refuse it; nothing is sent.
        """
        outgoing = self._request("POST", self.target(request.path), request.headers, plan.call.body)
        self._key_used = self._key.current()
        return outgoing

    def _new_answer(self, request: BackendRequest, plan: Plan, result: AttemptResult, timer: AttemptTimer) -> "Answer":
        return Answer(request, plan, result, timer, self._max_bytes)

    async def probe(self) -> bool | None:
        """
        Ask the health path; see `worker.ports.Backend.probe`.

        Cancellation: leaves nothing behind.
        """
        if self._health is None:
            return None
        health = Reply()
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await self._exchange(self._request("GET", self._health, {}, b""), health, self._connect_s)
        except (BackendError, TimeoutError):
            return False
        return is_success(health.status)

    async def get(self, path: str, *, timeout_s: float, max_bytes: int) -> "Reply":
        """
        Ask one path with GET, as requests are sent: with key, headers, certificates and proxy of the route.

        Args:
            path: As requests name it.
            timeout_s: For all of it, seconds.
            max_bytes: Of the body, after which no more is read.

        Raises:
            BackendError: It could not be asked, or the answer broke; its detail has no credentials.
            TimeoutError: Not answered in time.

        Cancellation: closes the connection.
        """
        reply = Reply(max_bytes)
        try:
            async with asyncio.timeout(timeout_s):
                await self._exchange(self._request("GET", self.target(path), {}, b""), reply, self._connect_s)
        except BackendError as error:
            raise BackendError(error.fault, self._redactor.text(error.detail)) from error
        return reply

    async def aclose(self) -> None:
        """
        Close every connection; idempotent.

        Cancellation: connections may stay open until the process ends; call it again.
        """
        await self._aclose()


def lines(headers: Mapping[str, str]) -> bytes:
    """
    Return headers as they are sent.

    Raises:
        ValueError: One of them would be more than one line.
    """
    text = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if text.count("\n") != len(headers) or text.count("\r") != len(headers):
        raise ValueError("a header holds a line break")
    return text.encode("latin-1")


def escaped(target: str) -> bytes:
    """Return a path with its query as it is sent."""
    path, mark, query = target.partition("?")
    return (quote(path, safe=_PATH_SAFE) + mark + quote(query, safe=_QUERY_SAFE)).encode()


class Answer:
    """Receives one answer, and reads it as what its first bytes say it is, whatever its label; see `Sink`."""

    def __init__(
        self, request: BackendRequest, plan: Plan, result: AttemptResult, timer: AttemptTimer, max_bytes: int
    ) -> None:
        self._request = request
        self._plan = plan
        self._result = result
        self._timer = timer
        self._max_bytes = max_bytes
        self._pieces: list[bytes] = []
        self._size = 0
        self._is_labelled = False
        self._is_undecided = False
        self._stream: StreamedAnswer | None = None

    def connected(self) -> None:
        """The request is about to be written."""
        self._result.phase = Phase.SEND
        if self._request.on_connected is not None:
            self._request.on_connected()

    def sent(self) -> None:
        """All of it is on its way."""
        if self._result.phase is Phase.SEND:  # a server may answer before it has read everything
            self._result.phase = Phase.HEADERS

    def head(self, status: int, headers: Headers) -> None:
        """Note status and headers; a success may be a stream."""
        result = self._result
        result.phase = Phase.BODY
        result.status = status
        result.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in headers}
        result.backend_request_id = request_id_of(result.headers)
        self._is_undecided = is_success(status)
        self._is_labelled = self._is_announced()
        if self._is_labelled:
            result.phase, result.streamed = Phase.STREAM, True
        else:
            self._timer.restart_idle()

    def _is_announced(self) -> bool:
        """Whether the headers announce a stream of events."""
        return is_labelled_stream(self._result)

    def feed(self, data: bytes) -> float | None:
        """Take a part of the body; of an error's, no more than anything looks at."""
        if self._stream is not None:
            return self._stream.feed(data)
        self._pieces.append(data)
        self._size += len(data)
        if self._is_undecided:
            head = data if len(self._pieces) == 1 else b"".join(self._pieces)
            is_stream = holds_events(head, is_labelled=self._is_labelled)
            if is_stream is None and self._size < MAX_BLANK_BYTES:
                self._pieces = [head]
                if not self._is_labelled:
                    self._timer.restart_idle()
                return None
            return self._decide(is_stream, head)
        self._timer.restart_idle()
        if self._size > self._max_bytes:
            raise BackendError(Fault.RESPONSE_TOO_LARGE, f"more than {self._max_bytes} bytes")
        is_error = (self._result.status or 0) >= 400  # noqa: PLR2004
        return 0.0 if is_error and self._size > MAX_BODY_BYTES else None

    def end(self) -> None:
        """Take note that the response has ended, or that no more of it was wanted."""
        if self._is_undecided:
            self._decide(None, b"".join(self._pieces))
        if self._stream is not None:
            self._stream.end()
            return
        pieces = self._pieces
        self._result.body = (pieces[0] if len(pieces) == 1 else b"".join(pieces)).removeprefix(BOM)

    def close(self) -> None:
        """Put what is known of a stream into the result, however it ended."""
        if self._stream is not None:
            self._stream.close()

    def is_whole(self) -> bool:
        """Whether all of a streamed answer is there."""
        return self._stream is not None and self._stream.is_whole()

    def _decide(self, is_stream: bool | None, head: bytes) -> float | None:
        self._is_undecided = False
        call, result, timer = self._plan.call, self._result, self._timer
        accumulator = None
        if self._is_labelled if is_stream is None else is_stream:
            accumulator = call.new_accumulator()
        if accumulator is None:
            result.phase, result.streamed = Phase.BODY, False
            timer.restart_idle()
            if self._size > self._max_bytes:
                raise BackendError(Fault.RESPONSE_TOO_LARGE, f"more than {self._max_bytes} bytes")
            return None
        result.phase = Phase.STREAM
        result.streamed, result.salvaged_tokens = True, call.salvaged_tokens
        self._stream = StreamedAnswer(
            accumulator,
            result,
            timer,
            max_bytes=self._max_bytes,
            on_first_token=self._request.on_first_token,
            resume_point=self._plan.resume_point,
        )
        if not self._is_labelled:
            timer.await_first_byte()
        return self._stream.feed(head)


class Reply:
    """
    The answer to a GET.

    Args:
        max_bytes: Of the body that is kept; 0 for the status alone.
    """

    def __init__(self, max_bytes: int = 0) -> None:
        self._max_bytes = max_bytes
        self.status: int | None = None
        self.headers: Headers = ()
        self.body = bytearray()

    def connected(self) -> None:
        """See `Sink`."""

    def sent(self) -> None:
        """See `Sink`."""

    def head(self, status: int, headers: Headers) -> None:
        """Keep status and headers."""
        self.status, self.headers = status, headers

    def feed(self, data: bytes) -> float | None:
        """Keep the body up to its limit, and want no more."""
        self.body += data[: self._max_bytes - len(self.body)]
        return None if len(self.body) < self._max_bytes else 0.0


_SILENCES: Mapping[Fault, str] = {
    Fault.TOTAL_TIMEOUT: "no complete answer within the limit",
    Fault.FIRST_BYTE_TIMEOUT: "no answer within the limit",
    Fault.IDLE_TIMEOUT: "silence inside the response body",
}


def _failure(error: Exception, result: AttemptResult, plan: Plan | None, timer: AttemptTimer) -> tuple[str, str]:
    """Return the fault of an attempt and its words; of a server that is gone since its stream broke, how it broke."""
    if not isinstance(error, BackendError):
        if result.phase is Phase.CONNECT:
            result.phase = Phase.HEADERS  # connecting has its own, shorter limit
        return timer.fault, _SILENCES[timer.fault]
    if error.fault in _NOT_SENT:
        if plan is not None and plan.broken is not None:
            result.phase = Phase.STREAM
            return plan.broken.fault, plan.broken.detail
    elif result.phase is Phase.CONNECT:
        result.phase = Phase.HEADERS
    return error.fault, error.detail
