"""
Small working things in place of the network: a backend, a broker's two sides, a clock.

They keep the contracts of `worker.ports` and `worker.flow.Clock`, record what was asked of them, and fail when told
to.  No waiting by time: an attempt or a publish can be held open until the test lets it go on.
"""

import asyncio
import itertools
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import msgspec
from msgspec import structs

from tests.support.fakeclock import FakeClock as FlowClock
from tests.support.virtual_time import EPOCH, loop_time, unix_time
from worker.errors import BackendError, MessageTooLargeError, PayloadError
from worker.policy.backoff import Backoff
from worker.policy.model import Fault, Phase
from worker.ports import AttemptResult, BackendRequest, Handler, OpenPayload, Settlement, StoredPayload
from worker.wire.body import RequestBody
from worker.wire.message import MAX_PUBSUB_MESSAGE_BYTES, ReceivedMessage, message_bytes

GOOD_BODY = (
    b'{"id":"c-1","choices":[{"index":0,"message":{"role":"assistant","content":"hi"},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":3,"completion_tokens":5}}'
)


class FakeClock(FlowClock):
    """Monotonic seconds and Unix seconds under the test's control; `jump` moves only the latter, as an operator can."""

    def __init__(self, start: float = 1000.0) -> None:
        super().__init__(start)
        self._offset = EPOCH - start

    def unix(self) -> float:
        return self.now() + self._offset

    def jump(self, seconds: float) -> None:
        self._offset += seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How one attempt ends."""

    status: int | None = 200
    body: bytes = GOOD_BODY
    headers: Mapping[str, str] = field(default_factory=dict)
    fault: Fault | None = None
    phase: Phase = Phase.PARSE
    seconds: float = 0.0
    """How long it takes, in the loop's time."""
    error: Exception | None = None
    """Raised as it is: a fault of the adapter itself."""
    result: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the result, as a stream fills them."""
    first_token_s: float | None = None
    """When the first token of a stream comes, in the loop's time; before `seconds`."""


GOOD = Answer()
REFUSED = Answer(status=None, body=b"", fault=Fault.CONNECT, phase=Phase.CONNECT)


def status(
    code: int, body: bytes = b'{"error":{"message":"no","type":"t","param":null,"code":null}}', **more: Any
) -> Answer:
    """Return an answer with an error status."""
    return Answer(status=code, body=body, **more)


class FakeBackend:
    """
    An inference server that answers from a script; see `worker.ports.Backend`.

    Args:
        script: One entry an attempt, an `Answer` or a function of the request; after the last one it repeats `then`.
        then: What every further attempt gets.
    """

    def __init__(
        self,
        *script: "Answer | Callable[[BackendRequest], Answer]",
        then: "Answer | Callable[[BackendRequest], Answer]" = GOOD,
        name: str = "fake",
    ) -> None:
        self.name = name
        self.script = deque(script)
        self.then = then
        self.requests: list[BackendRequest] = []
        self.running = self.peak = self.cancelled = 0
        self.healthy: bool | None = None
        self.probes = 0
        self.has_new_key = False
        self.is_streaming = False
        self.is_closed = False
        self._gate = asyncio.Event()
        self._gate.set()

    def hold(self) -> None:
        """Keep every attempt open, from now on, until `let_go`."""
        self._gate.clear()

    def let_go(self) -> None:
        self._gate.set()

    async def invoke(self, request: BackendRequest, result: AttemptResult) -> None:
        self.requests.append(request)
        wanted = self.script.popleft() if self.script else self.then
        answer = wanted if isinstance(wanted, Answer) else wanted(request)
        result.started = loop_time()
        result.phase = Phase.CONNECT
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            async with asyncio.timeout(request.timeout_s):
                await self._gate.wait()
                if request.on_connected is not None and answer.phase is not Phase.CONNECT:
                    request.on_connected()
                await self._generate(answer, request, result)
        except TimeoutError:
            result.phase = Phase.HEADERS
            raise BackendError(Fault.TOTAL_TIMEOUT, "no answer within the limit") from None
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
            result.ended = loop_time()
        result.phase, result.status, result.headers, result.body = (
            answer.phase,
            answer.status,
            dict(answer.headers),
            answer.body,
        )
        result.backend_request_id = result.headers.get("x-request-id")
        if answer.error is not None:
            raise answer.error
        if answer.fault is not None:
            raise BackendError(answer.fault, "scripted")

    def streams(self, path: str, body: RequestBody) -> bool:
        return self.is_streaming

    @staticmethod
    async def _generate(answer: Answer, request: BackendRequest, result: AttemptResult) -> None:
        began = loop_time()
        if answer.first_token_s is not None:
            await asyncio.sleep(answer.first_token_s)
            result.streamed, result.first_token_at = True, loop_time()
            if request.on_first_token is not None:
                request.on_first_token()
        for name, value in answer.result.items():
            setattr(result, name, value)
        await asyncio.sleep(answer.seconds - (loop_time() - began))

    async def probe(self) -> bool | None:
        self.probes += 1
        return self.healthy

    def credentials_changed(self) -> bool:
        return self.has_new_key

    async def aclose(self) -> None:
        self.is_closed = True


@dataclass(frozen=True, slots=True)
class Published:
    """One message on the fake topic."""

    data: bytes
    attributes: Mapping[str, str]

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.data)

    @property
    def error(self) -> Any:
        """The `error` object of the answer's body."""
        return self.json["body"]["error"]


class FakePayloads:
    """
    Object storage that holds what the test puts into it; see `worker.ports.Payloads`.

    Attributes:
        objects: Content by URI.
        failures: Raised by the next calls, one each.
        opened: URIs, once for each call.
        written: Names of messages whose answers were written, once for each call.
        chunk_bytes: Of what is read at once.
        seconds: How long opening takes, in the loop's time.
    """

    can_write = True

    def __init__(self, **objects: bytes) -> None:
        self.objects = {f"gs://b/{name}": body for name, body in objects.items()}
        self.failures = deque[Exception]()
        self.always: Exception | None = None
        self.opened: list[str] = []
        self.written: list[str] = []
        self.chunk_bytes = 1 << 16
        self.seconds = 0.0

    def check(self, uri: str) -> None:
        if not uri.startswith("gs://b/"):
            raise ValueError("is not below a prefix that this worker may read")

    @asynccontextmanager
    async def open(self, uri: str) -> AsyncIterator[OpenPayload]:
        self.opened.append(uri)
        await asyncio.sleep(self.seconds)
        self._fail()
        body = self.objects.get(uri)
        if body is None:
            raise PayloadError(Fault.PAYLOAD_NOT_FOUND)
        yield OpenPayload(size=len(body), chunks=self._chunks(body))

    async def write(self, message_id: str, body: bytes) -> StoredPayload:
        self.written.append(message_id)
        await asyncio.sleep(self.seconds)
        self._fail()
        uri = f"gs://b/answers/{message_id}.json"
        self.objects[uri] = body
        return StoredPayload(uri=uri, sha256=sha256(body).hexdigest())

    def _fail(self) -> None:
        if self.always is not None or self.failures:
            raise self.always or self.failures.popleft()

    async def _chunks(self, body: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(body), self.chunk_bytes):
            await asyncio.sleep(0)
            yield body[start : start + self.chunk_bytes]


class FakePublisher:
    """
    A topic; see `worker.ports.Publisher`.

    Args:
        failures: Raised by the first publishes, one each; `None` lets one pass.
        limit: Size above which a message is rejected, as the broker counts it.
    """

    def __init__(self, *failures: Exception | None, limit: int = MAX_PUBSUB_MESSAGE_BYTES) -> None:
        self.failures = deque(failures)
        self.always: Exception | None = None
        """Raised by every publish that has no entry in `failures`."""
        self.limit = limit
        self.published: list[Published] = []
        self.attempts = 0
        self.is_closed = False
        self._gate = asyncio.Event()
        self._gate.set()

    def hold(self) -> None:
        """Keep every publish unconfirmed, from now on, until `let_go`."""
        self._gate.clear()

    def let_go(self) -> None:
        self._gate.set()

    async def publish(self, data: bytes, attributes: Mapping[str, str]) -> str:
        self.attempts += 1
        size = message_bytes(data, attributes)
        if size > self.limit:
            raise MessageTooLargeError(f"{size} bytes; the limit is {self.limit}")
        await self._gate.wait()
        await asyncio.sleep(0)
        failure = self.failures.popleft() if self.failures else self.always
        if failure is not None:
            raise failure
        self.published.append(Published(data, dict(attributes)))
        return str(len(self.published))

    def of(self, message_id: str) -> list[Published]:
        """Return the answers to one request, in order."""
        return [each for each in self.published if each.attributes.get("request_message_id") == message_id]

    async def aclose(self) -> None:
        self.is_closed = True


class FakeSubscriber:
    """
    A subscription with a dead-letter policy; see `worker.ports.Subscriber`.

    Args:
        max_in_flight: Handlers at once.
        max_attempts: Deliveries of one message; what is nacked once more goes to `dead`.  `None`: no policy.
        backoff_s: Wait before the first redelivery, in the loop's time; doubles with each.
        max_backoff_s: Longest wait before a redelivery; `None`: every wait is `backoff_s`.
    """

    def __init__(
        self,
        *,
        max_in_flight: int = 100,
        max_attempts: int | None = None,
        backoff_s: float = 1.0,
        max_backoff_s: float | None = None,
    ) -> None:
        self.max_attempts = max_attempts
        self.settlements: list[tuple[str, int, Settlement]] = []
        """Message id, delivery attempt from 1, verdict; in the order of settling."""
        self.dead: list[str] = []
        self.in_flight = self.peak = 0
        self.is_open = False
        self._backoff = Backoff(base_s=backoff_s, max_s=max_backoff_s or backoff_s, jitter=0.0)
        self.max_in_flight = max_in_flight
        self.extra = 0
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._inbox: asyncio.Queue[tuple[ReceivedMessage, int]] = asyncio.Queue()
        self._ids = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._timers: set[asyncio.TimerHandle] = set()
        self._stopping = asyncio.Event()
        self._over = asyncio.Event()
        self._drained = asyncio.Event()

    def publish(self, data: bytes, attributes: Mapping[str, str] | None = None) -> str:
        """Put a message on the subscription; return its id."""
        message_id = f"m{next(self._ids)}"
        message = ReceivedMessage(
            message_id=message_id, data=data, attributes=dict(attributes or {}), publish_time=unix_time()
        )
        self.deliver(message, 1)
        return message_id

    def deliver(self, message: ReceivedMessage, attempt: int) -> None:
        """Deliver a message, again if it is on its way already: brokers deliver at least once."""
        self._inbox.put_nowait((message, attempt))

    async def run(self, handler: Handler, on_stopped: Callable[[], None] | None = None) -> None:
        pulling = asyncio.ensure_future(self._pull(handler))
        stopping = asyncio.ensure_future(self._stopping.wait())
        self.is_open = True
        try:
            await stopping
            if on_stopped is not None:
                on_stopped()
        finally:
            self.is_open = False
            for task in (pulling, stopping):
                task.cancel()
            await asyncio.gather(pulling, stopping, return_exceptions=True)
            if not self._stopping.is_set():  # cancelled
                await self.drain(0)
        await self._drained.wait()

    async def _pull(self, handler: Handler) -> None:
        while True:
            await self._has_room.wait()
            message, attempt = await self._inbox.get()
            task = asyncio.ensure_future(self._deliver(handler, message, attempt))
            self._tasks.add(task)
            task.add_done_callback(self._ended)
            self._count_room()

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        self._count_room()

    def allow_extra(self, messages: int) -> None:
        self.extra = messages
        self._count_room()

    def _count_room(self) -> None:
        if len(self._tasks) < self.max_in_flight + self.extra:
            self._has_room.set()
        else:
            self._has_room.clear()

    async def _deliver(self, handler: Handler, message: ReceivedMessage, attempt: int) -> None:
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        counted = attempt if self.max_attempts is not None else None
        try:
            verdict = await handler(structs.replace(message, delivery_attempt=counted))
        except asyncio.CancelledError:
            verdict = Settlement.NACK
        self.in_flight -= 1
        self.settlements.append((message.message_id, attempt, verdict))
        if verdict is Settlement.NACK and not self._stopping.is_set():
            self._redeliver(message, attempt + 1)

    def _redeliver(self, message: ReceivedMessage, attempt: int) -> None:
        if self.max_attempts is not None and attempt > self.max_attempts:
            self.dead.append(message.message_id)
            return
        delay_s = self._backoff.ceiling_s(attempt - 1)
        timer = asyncio.get_running_loop().call_later(delay_s, self.deliver, message, attempt)
        self._timers.add(timer)

    async def drain(self, grace_s: float) -> None:
        self._stopping.set()
        for timer in self._timers:
            timer.cancel()
        asyncio.get_running_loop().call_later(grace_s, self._over.set)
        settled = asyncio.ensure_future(self._settled())
        over = asyncio.ensure_future(self._over.wait())
        await asyncio.wait({settled, over}, return_when=asyncio.FIRST_COMPLETED)
        over.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(settled, over, return_exceptions=True)
        self._drained.set()

    async def _settled(self) -> None:
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    async def max_delivery_attempts(self) -> int | None:
        return self.max_attempts

    def count(self, settlement: Settlement) -> Counter[str]:
        """Return how often each message was settled so."""
        return Counter(message_id for message_id, _, verdict in self.settlements if verdict is settlement)
