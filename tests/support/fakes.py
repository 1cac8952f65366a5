"""
Small working things in place of the network: a backend, a broker's two sides, a clock.

They keep the contracts of `worker.ports` and `worker.flow.Clock`, record what was asked of them, and fail when told
to.  No waiting by time: an attempt or a publish can be held open until the test lets it go on.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tests.support.fake_subscriber import FakeSubscriber
from tests.support.fakeclock import FakeClock as FlowClock
from tests.support.virtual_time import EPOCH, loop_time
from worker.errors import BackendError, ReplyRejectedError
from worker.policy.model import Fault, Phase
from worker.ports import AttemptResult, BackendRequest
from worker.wire.body import RequestBody
from worker.wire.message import MAX_PUBSUB_MESSAGE_BYTES, message_bytes

__all__ = [
    "GOOD",
    "GOOD_BODY",
    "REFUSED",
    "Answer",
    "FakeBackend",
    "FakeClock",
    "FakePublisher",
    "FakeSubscriber",
    "Published",
    "status",
]

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
            raise ReplyRejectedError(f"{size} bytes; the limit is {self.limit}")
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
