"""
The ports: everything the core knows of the outside, on one screen.

Each method's docstring is the whole agreement; implementations say only how they differ.  The processor is tested
against small working fakes of these (`tests/support/fakes.py`), and every broker sits the same exam
(`tests/conformance/`).
"""

from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from enum import StrEnum
from typing import Any, Protocol

import msgspec

from worker.policy.model import Phase
from worker.wire.body import RequestBody
from worker.wire.message import ReceivedMessage
from worker.wire.usage import NO_USAGE, Usage, read_usage, usage_of


class Settlement(StrEnum):
    """What the broker is told about a delivery."""

    ACK = "ack"
    NACK = "nack"


class ResumePoint(msgspec.Struct, frozen=True, kw_only=True):
    """What a broken stream had generated, and from where another attempt can go on."""

    text: str
    """Without white space at its end: chat templates strip it, so it is generated again."""
    tokens: int
    """As the server counted them, or else events with text, of which servers send about one a token."""


class BackendRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt's input."""

    path: str
    body: RequestBody
    message_id: str = ""
    """The same in every attempt at a message; empty where it has no other."""
    headers: Mapping[str, str] = {}
    """Beside those of the route; names in lower case."""
    metadata: bytes = b"{}"
    """Of the message, a JSON object: for settings that take a text out of it."""
    timeout_s: float | None = None
    """What is left until the request's deadline; `None` for the route's own limit alone."""
    resume_point: ResumePoint | None = None
    """What an earlier attempt had generated; the backend goes on from it if it can, and starts anew otherwise."""
    on_connected: Callable[[], None] | None = None
    """Called when a connection stands and the request is on its way, for each request that is sent; must not raise."""
    on_first_token: Callable[[], None] | None = None
    """Called once, when the first generated text of a streamed answer has come; must not raise."""


class AttemptResult(msgspec.Struct, kw_only=True):
    """
    What is known about an attempt so far; filled in place, so that it survives an exception.

    Source: a stream that breaks after 30 s still has a phase, a request id, times and a partial answer.
    """

    phase: Phase = Phase.PREPARE
    status: int | None = None
    headers: dict[str, str] = msgspec.field(default_factory=dict)
    """Names in lower case."""
    body: bytes = b""
    """Of a stream: the assembled answer, or the data of the error event that came instead."""
    started: float = 0.0
    """Monotonic seconds."""
    ended: float | None = None
    request_id: str | None = None
    """The `x-request-id` that was sent, a UUID."""
    backend_request_id: str | None = None
    streamed: bool = False
    """The answer came as a stream of events."""
    is_whole: bool = False
    """The stream's answer is all in `body`, though the call may be waiting for what follows it."""
    in_stream: bool = False
    """An error event came; `body` is its data."""
    first_token_at: float | None = None
    """Monotonic seconds of the first generated text: content, reasoning, refusal or a part of a tool call."""
    content_events: int = 0
    """Events of the stream with generated text."""
    stream_usage: Mapping[str, Any] | None = None
    """The token counts of a stream in the server's own shape; also where the answer itself is to have none."""
    missing_done: bool = False
    """A whole stream ended without the `[DONE]` that its API promises."""
    partial: bytes | None = None
    """What came of an answer that is not whole, as a JSON object of the answer's shape; `None` when nothing did."""
    resume_point: ResumePoint | None = None
    """What another attempt can go on from; `None` when it would have to start anew."""
    salvaged_tokens: int | None = None
    """Tokens of an earlier attempt that this answer begins with; `None` when it was generated in one go."""
    attributes: Mapping[str, str] = {}
    """What a service says beside the answer, as attributes of the reply."""
    variant: str | None = None
    """Which of a service's variants of the model answered; `None` where it has none."""
    _usage: Usage | None = None

    @property
    def usage(self) -> Usage:
        """The tokens of the answer, as counted in its stream or told in its body; read when first asked for."""
        if self._usage is None:
            counts = self.stream_usage
            self._usage = (read_usage(self.body) if counts is None else usage_of(counts)) or NO_USAGE
        return self._usage


class Backend(Protocol):
    """One inference server."""

    name: str

    async def invoke(self, request: BackendRequest, result: AttemptResult) -> None:
        """
        Make one attempt and fill the result; the answer is `result.status`, `result.headers` and `result.body`.

        An error status is an answer, not an exception: `policy` judges it.  No retries, no redirects.

        Raises:
            BackendError: No complete response; `result.phase` says how far it came.

        Cancellation: closes the connection; a server may go on generating.
        """

    def streams(self, path: str, body: RequestBody) -> bool:
        """Whether an attempt with this request would be streamed, so that `on_first_token` will be called for it."""

    async def probe(self) -> bool | None:
        """
        Ask the backend's health path; `None` when the route has none.

        Never raises for a backend that is down: that is `False`.

        Cancellation: leaves nothing behind.
        """

    def credentials_changed(self) -> bool:
        """Whether the key file holds another key than at the last attempt; cheap, called while a breaker is open."""

    async def aclose(self) -> None:
        """
        Close every connection; idempotent.

        Cancellation: connections may stay open until the process ends.
        """


class MetricSource(Protocol):
    """Where the numbers of a metric gate come from."""

    async def read(self) -> Sequence[float]:
        """
        Return one number for each signal, in the order of the settings; none is NaN.  One try, bounded in time.

        Raises:
            MetricSourceError: It cannot be reached or refuses, or there is no such number; retryable.

        Cancellation: closes the connection.
        """

    async def aclose(self) -> None:
        """
        Close every connection; idempotent.

        Cancellation: connections may stay open until the process ends.
        """


class OpenPayload(msgspec.Struct, frozen=True, kw_only=True):
    """An object that is being read."""

    size: int
    """Bytes, as object storage says before it sends them."""
    chunks: AsyncIterator[bytes]
    """Its content, in order; raises `PayloadError` where it breaks.  Read once, before the object is closed."""


class StoredPayload(msgspec.Struct, frozen=True, kw_only=True):
    """A body that was written."""

    uri: str
    sha256: str
    """64 hex digits."""


class Payloads(Protocol):
    """Object storage, as far as the settings allow it."""

    can_write: bool
    """Whether answers may be written."""

    def check(self, uri: str) -> None:
        """
        Return when a request may name this object.

        Raises:
            ValueError: It is no URI of an object, or not below an allowed prefix; the text is for the requester.
        """

    def open(self, uri: str) -> AbstractAsyncContextManager[OpenPayload]:
        """
        Open an object that `check` allows; one try.

        Raises:
            PayloadError: It cannot be read, or is larger than any body may be; `policy` decides whether to try again.

        Cancellation: closes the object.
        """

    async def write(self, message_id: str, body: bytes) -> StoredPayload:
        """
        Write the body of the answer to a message and return where it is; one try, all or nothing.

        The same message's next answer takes the same place.

        Raises:
            PayloadError: `payload_unavailable`; retryable, or permanent until an operator acts.

        Cancellation: the object may or may not be written.
        """


Handler = Callable[[ReceivedMessage], Coroutine[Any, Any, Settlement]]
"""Called once per delivery, on the event loop; raises nothing but CancelledError."""


class Subscriber(Protocol):
    """A subscription; hands out deliveries, extends their leases and settles them as the handler says."""

    @property
    def is_open(self) -> bool:
        """Whether messages are being pulled; what readiness asks."""

    async def run(self, handler: Handler, on_stopped: Callable[[], None] | None = None) -> None:
        """
        Deliver until `drain` has finished.

        Never more than `max_in_flight` handlers at once, and what `allow_extra` allows.  The lease of a delivery is
        extended until its handler returns, for `max_lease_duration_s` at most.  A pull that ends by itself is reopened.

        Where the subscription keeps order, deliveries of one ordering key are handled one at a time, each after the
        one before it was acked.  A nack also nacks what waits behind it, and all of that comes again in the same order.
        A delivery whose lease ends while it is handled comes again, and what followed it as well, after it: so messages
        may be repeated, but one is never handled for the first time before those that were published before it.

        Where the subscription delivers exactly once, nothing is handed out before the broker has confirmed its lease.

        Args:
            handler: Called for each delivery.
            on_stopped: Called once in a drain, when nothing is pulled any more: a nack does not come straight back.

        Raises:
            BrokerResourceError: Gone or refused; permanent.

        Cancellation: like `drain(0)`.
        """

    async def drain(self, grace_s: float) -> None:
        """
        Stop delivering, let handlers finish for `grace_s` seconds, cancel and nack the rest.

        What has not started is nacked at once.  Returns when every ack is with the broker, or when the time for the
        last acks is over.  Before `run` it prevents any delivery.  A second call with a shorter grace, or with
        none, hurries the first: the shorter grace holds, and two seconds are left for the last acks.

        Cancellation: the drain goes on; only this wait for its end is given up.
        """

    def allow_extra(self, messages: int) -> None:
        """
        Let so many messages more than `max_in_flight` be leased and handled at once, instead of as many as before.

        What is leased already stays leased.
        """

    async def max_delivery_attempts(self, source: str = "") -> int | None:
        """
        Return the dead-letter policy's limit; `None` without one, or when reading it is not permitted.

        Args:
            source: Which subscription of several (`ReceivedMessage.source`).

        Raises:
            BrokerResourceError: Gone; permanent.
            ConnectionError: The broker cannot be reached; retryable.

        Cancellation: leaves nothing behind.
        """


class Publisher(Protocol):
    """A topic."""

    async def publish(self, data: bytes, attributes: Mapping[str, str]) -> str:
        """
        Publish one message and return the broker's id once it has accepted it.

        One try, bounded in time; the caller owns retries.  A try that timed out may still be confirmed: then it
        confirms a later publish of the same message.

        Raises:
            PublishRetryableError: Unavailable or timed out; the message may be there all the same.
            PublishRefusedError: Topic gone or permission refused; permanent until an operator acts.
            MessageTooLargeError: Over the broker's limit, found before anything is sent; permanent for the message.
            MessageRejectedError: The broker calls it invalid: the message, or all that does not fit the topic's schema.

        Cancellation: the message may or may not be published.
        """

    async def aclose(self) -> None:
        """
        Flush and close; idempotent.

        Cancellation: what was not sent is lost, and its callers get an error; a second call closes.
        """
