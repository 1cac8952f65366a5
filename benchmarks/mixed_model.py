"""
The world of `benchmarks.mixed`: a subscription, the worker's pipeline and a backend, on virtual time.

Some messages always fail, each in one of the ways of `KINDS`; the others are healthy and take a time that depends on
nothing but their number.  The worker's part is the real one (processor, gate, policy); what is around it are the fakes
of the tests: a subscription with a retry policy (10 s to 600 s) and a dead-letter policy, and a scripted backend.
"""

import asyncio
import functools
import math
import random
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from tests.support.fakes import GOOD, GOOD_BODY, REFUSED, Answer, FakeBackend, FakePublisher, FakeSubscriber
from tests.support.pipeline import Pipeline, data
from tests.support.virtual_time import VirtualLoop, loop_time
from worker.policy.model import BreakerAction, ErrorClass, Fault, Phase
from worker.policy.table import ROWS
from worker.ports import BackendRequest, Settlement
from worker.settings.schema import RouteMatch

RETRY_MIN_S, RETRY_MAX_S = 10.0, 600.0
"""The subscription's retry policy."""
CALLS_PER_ATTEMPT = 3
"""Bound of the backend calls for one failing message, per delivery attempt that it may have."""
MEDIAN_S, SIGMA = 0.33, 0.753
"""Of the healthy messages' time: p50 0.33 s, p99 1.9 s."""
MEAN_S = MEDIAN_S * math.exp(SIGMA**2 / 2.0)
WINDOW = 16
"""At the start: above what the fresh traffic needs, so that no message waits while they are alone."""
WINDOW_MAX = 64
HEALTHY_MODEL, OTHER_MODEL = "m", "other"
TOKENS_PER_S = 50.0
FIRST_TOKEN_S = 0.1
"""Of a stream, whatever its length."""
FAILURE_S = 0.02
"""How long a backend takes to fail."""


def _error(message: str, kind: str | None = None, code: Any = None, param: str | None = None) -> bytes:
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


def _refusal(status: int, body: bytes, retry_after: str | None = None) -> Answer:
    headers = {} if retry_after is None else {"retry-after": retry_after}
    return Answer(status=status, body=body, headers=headers, seconds=FAILURE_S)


def _hang(seconds: float) -> Answer:
    return Answer(status=None, body=b"", fault=Fault.TOTAL_TIMEOUT, phase=Phase.HEADERS, seconds=seconds)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A way to fail, and the answer that a message which always fails so must get in the end."""

    answer: Answer
    status: int
    error_class: str
    model: str = HEALTHY_MODEL
    """Of the failing messages: what concerns one model is said of another one than the healthy messages name."""
    streamed: bool = False
    """It exists in streams only."""
    is_held: bool = False
    """When every message fails so, nothing tells it from an outage: they wait for the backend's return."""
    hint_s: float = 0.0
    """The backend's Retry-After: one of it may be added to the time within which the answer must come."""

    @property
    def row(self) -> int:
        """Messages in a row that fail so until the worker takes it for an outage, or obeys the hint; 0: never."""
        if ROWS[ErrorClass(self.error_class)].breaker is BreakerAction.NONE:
            return 0
        is_enough = self.hint_s > 0.0 or ROWS[ErrorClass(self.error_class)].breaker is BreakerAction.TRIP
        return 2 if is_enough else 5


_LIMIT = _error("Rate limit reached for gpt-4o in organization org-1 on tokens per min (TPM)", "tokens", "slow_down")
_BUSY = _error("The engine is currently busy, please retry later.", "ServiceUnavailableError", 503)
_BAD_GATEWAY = (
    b"<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body>\r\n<center><h1>502 Bad Gateway</h1></center>\r\n"
    b"<hr><center>nginx/1.25.3</center>\r\n</body>\r\n</html>\r\n"
)
_BROKEN: Mapping[str, Any] = {"content_events": 4, "partial": GOOD_BODY}
_500 = _error("The server had an error while processing your request. Sorry about that!", "server_error")

KINDS: Mapping[str, Kind] = {
    "400": Kind(
        answer=_refusal(400, _error("temperature must be non-negative, got -1.0.", "BadRequestError", 400)),
        status=400,
        error_class="invalid_request",
    ),
    "401": Kind(
        answer=_refusal(
            401, _error("Incorrect API key provided: sk-abc***xyz.", "invalid_request_error", "invalid_api_key")
        ),
        status=502,
        error_class="auth",
        is_held=True,
    ),
    "402": Kind(
        answer=_refusal(402, _error("litellm.PaymentRequiredError: insufficient balance", code="402")),
        status=402,
        error_class="quota",
        is_held=True,
    ),
    "429 quota": Kind(
        answer=_refusal(429, _error("You exceeded your current quota.", "insufficient_quota", "insufficient_quota")),
        status=429,
        error_class="quota",
        is_held=True,
    ),
    "403": Kind(
        answer=_refusal(403, _error("Your chosen model requires moderation and your input was flagged", code=403)),
        status=403,
        error_class="forbidden",
    ),
    "404 model": Kind(
        answer=_refusal(404, _error("The model `other` does not exist.", "NotFoundError", 404, "model")),
        status=404,
        error_class="model_not_found",
        model=OTHER_MODEL,
    ),
    "429": Kind(answer=_refusal(429, _LIMIT), status=429, error_class="rate_limited", is_held=True),
    "429 after 3 s": Kind(
        answer=_refusal(429, _LIMIT, "3"), status=429, error_class="rate_limited", is_held=True, hint_s=3.0
    ),
    "429 after 1 h": Kind(
        answer=_refusal(429, _LIMIT, "3600"), status=429, error_class="rate_limited", is_held=True, hint_s=3600.0
    ),
    "500": Kind(answer=_refusal(500, _500), status=500, error_class="server_error"),
    "502 HTML": Kind(answer=_refusal(502, _BAD_GATEWAY), status=502, error_class="server_error"),
    "503": Kind(answer=_refusal(503, _BUSY), status=503, error_class="overloaded", is_held=True),
    "503 after 1 h": Kind(
        answer=_refusal(503, _BUSY, "3600"), status=503, error_class="overloaded", is_held=True, hint_s=3600.0
    ),
    "loading": Kind(
        answer=_refusal(503, _error("Loading model", "unavailable_error", 503)),
        status=503,
        error_class="not_ready",
        is_held=True,
        model=OTHER_MODEL,
    ),
    "503 gateway": Kind(
        answer=_refusal(503, b"no healthy upstream"),
        status=503,
        error_class="not_ready",
        is_held=True,
        model=OTHER_MODEL,
    ),
    "504 gateway": Kind(
        answer=_refusal(504, b'{"error": "Gateway Timeout"}'),
        status=503,
        error_class="not_ready",
        is_held=True,
        model=OTHER_MODEL,
    ),
    "empty 200": Kind(
        answer=_refusal(200, b'{"id":"c-1","object":"chat.completion","choices":[]}'),
        status=502,
        error_class="empty_answer",
    ),
    "cut JSON": Kind(answer=_refusal(200, GOOD_BODY[:60]), status=502, error_class="malformed"),
    "broken stream": Kind(
        answer=Answer(
            body=b"", fault=Fault.STREAM_BROKEN, phase=Phase.STREAM, first_token_s=0.1, seconds=0.3, result=_BROKEN
        ),
        status=502,
        error_class="stream_broken",
        streamed=True,
    ),
    "500 in stream": Kind(
        answer=Answer(body=_500, phase=Phase.STREAM, seconds=FAILURE_S, result={"in_stream": True, "streamed": True}),
        status=502,
        error_class="stream_broken",
        streamed=True,
    ),
    "reset": Kind(
        answer=Answer(status=None, body=b"", fault=Fault.CONNECTION_LOST, phase=Phase.HEADERS, seconds=FAILURE_S),
        status=502,
        error_class="connection_lost",
    ),
    "hang 5 s": Kind(answer=_hang(5.0), status=504, error_class="timeout"),
    "hang 30 s": Kind(answer=_hang(30.0), status=504, error_class="timeout"),
}

OUTAGES: Mapping[str, Answer] = {
    "connect": replace(REFUSED, seconds=FAILURE_S),
    "500": KINDS["500"].answer,
    "503": KINDS["503"].answer,
    "loading": KINDS["loading"].answer,
    "502 HTML": KINDS["502 HTML"].answer,
}
"""What a backend that is away as a whole gives to every request."""


@dataclass(frozen=True, slots=True)
class Send:
    """One message."""

    at_s: float
    name: str
    """Begins with `h` for a healthy one, `f` for one that fails."""

    @property
    def fails(self) -> bool:
        return self.name.startswith("f")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is sent, and what becomes of the backend."""

    name: str
    sends: tuple[Send, ...]
    max_in_flight: int = 128
    routes: int = 1
    """2: the failing messages' model has a route of its own."""
    fails_until_s: float = math.inf
    """From then on the failing messages are healthy."""
    outage: tuple[float, float] | None = None
    """From when until when the whole backend is away."""

    @property
    def sent_s(self) -> float:
        """When the last message is sent."""
        return max((send.at_s for send in self.sends), default=0.0)

    def healthy(self) -> "Plan":
        """Return the plan without the messages that fail."""
        return replace(self, sends=tuple(send for send in self.sends if not send.fails), outage=None)


@dataclass(slots=True)
class Message:
    """What is known of one message in the end."""

    send: Send
    calls: int = 0
    nacks: int = 0
    answered_at: float | None = None
    status: int | None = None
    error_class: str | None = None
    answers: int = 0

    @property
    def waited_s(self) -> float:
        return math.inf if self.answered_at is None else self.answered_at - self.send.at_s


@dataclass(slots=True)
class Run:
    """How a plan went."""

    plan: Plan
    messages: list[Message]
    open_s: float = 0.0
    """How long a breaker was not closed while messages were sent, and half a minute longer."""
    windows: list[int] = field(default_factory=list)
    """The first route's window at each of these seconds."""
    dead: int = 0
    """Messages that the broker gave up."""
    ended_s: float = 0.0

    @property
    def healthy(self) -> list[Message]:
        return [message for message in self.messages if not message.send.fails]

    @property
    def failing(self) -> list[Message]:
        return [message for message in self.messages if message.send.fails]

    def healthy_done_s(self, share: float = 0.95) -> float:
        """Return when this share of the healthy messages had their answer."""
        return quantile([math.inf if m.answered_at is None else m.answered_at for m in self.healthy], share)

    def healthy_wait_s(self, share: float) -> float:
        """Return the time from sending to answer that this share of the healthy messages kept to."""
        return quantile([message.waited_s for message in self.healthy], share)

    @property
    def window(self) -> float:
        return statistics.median(self.windows) if self.windows else math.nan


def quantile(values: Iterable[float], share: float) -> float:
    """Return the smallest value that this share of the values does not exceed; NaN of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


@functools.cache
def healthy_s(name: str) -> float:
    """Return how long a message takes; the same in every run."""
    return random.Random(name).lognormvariate(math.log(MEDIAN_S), SIGMA)


@functools.cache
def healthy_answer(name: str, *, is_streamed: bool) -> Answer:
    """Return a message's answer, as many tokens long as it takes time."""
    seconds = healthy_s(name)
    tokens = b'"completion_tokens":%d' % round(1 + TOKENS_PER_S * seconds)
    good = replace(GOOD, seconds=seconds, body=GOOD_BODY.replace(b'"completion_tokens":5', tokens))
    return replace(good, first_token_s=seconds / 5, result={"content_events": 5}) if is_streamed else good


def answer_by_s(kind: Kind, attempts: int) -> float:
    """Return the time within which a message that always fails must have its answer."""
    waits_s = sum(min(RETRY_MAX_S, RETRY_MIN_S * 2.0**n) for n in range(attempts - 1))
    return 1.5 * waits_s + 600.0 + kind.hint_s


class _Answers(FakePublisher):
    """The response topic; notes the time of each answer."""

    def __init__(self, messages: Mapping[str, Message]) -> None:
        super().__init__()
        self._messages = messages
        self.left = 0
        self.is_over = False
        """What is published from now on is no part of the run."""

    async def publish(self, data: bytes, attributes: Mapping[str, str]) -> str:
        published = await super().publish(data, attributes)
        if self.is_over:
            return published
        message = self._messages[attributes["request_message_id"]]
        message.answers += 1
        if message.answered_at is None:
            message.answered_at, self.left = loop_time(), self.left - 1
            message.status = msgspec.json.decode(data)["status_code"]
            message.error_class = attributes.get("error_class")
        return published


class _World:
    """One run of a plan."""

    def __init__(self, plan: Plan, kind: Kind, attempts: int, *, is_streamed: bool, outage: Answer) -> None:
        self._plan, self._kind, self._outage = plan, kind, outage
        self._is_streamed = is_streamed or kind.streamed
        self._by_name = {send.name: Message(send) for send in plan.sends}
        self._by_id: dict[str, Message] = {}
        self._subscriber = FakeSubscriber(
            max_in_flight=plan.max_in_flight,
            max_attempts=attempts,
            backoff_s=RETRY_MIN_S,
            max_backoff_s=RETRY_MAX_S,
        )
        self._answers = _Answers(self._by_id)
        backends = [FakeBackend(then=self._answer, name=f"route{number}") for number in range(plan.routes)]
        for backend in backends:
            backend.is_streaming = self._is_streamed
        matches = [RouteMatch(models=[OTHER_MODEL]), RouteMatch()][-plan.routes :]
        self._pipeline = Pipeline(
            *backends,
            publisher=self._answers,
            matches=matches,
            window=WINDOW,
            max_delivery_attempts=attempts,
            rng=random.Random(plan.name),
        )
        self._run = Run(plan, list(self._by_name.values()))

    async def play(self, until_s: float) -> Run:
        """Run until every message has its answer, or `until_s`."""
        serving = self._pipeline.serve(self._subscriber)
        sending = asyncio.ensure_future(self._send())
        while loop_time() < until_s and not (sending.done() and self._answers.left == 0):
            await asyncio.sleep(1.0)
            if loop_time() <= self._plan.sent_s + 30.0:
                self._look()
        self._run.ended_s = loop_time()
        self._count()
        self._answers.is_over = True
        for task in (sending, serving):
            task.cancel()
        await asyncio.gather(sending, serving, return_exceptions=True)
        return self._run

    async def _send(self) -> None:
        for send in sorted(self._plan.sends, key=lambda send: send.at_s):
            await asyncio.sleep(send.at_s - loop_time())
            model = self._kind.model if send.fails else HEALTHY_MODEL
            body = {"model": model, "user": send.name, "messages": [{"role": "user", "content": "hello"}]}
            if self._is_streamed:
                body["stream"] = True
            message = self._by_name[send.name]
            self._by_id[self._subscriber.publish(data(body))] = message
            self._answers.left += 1

    def _answer(self, request: BackendRequest) -> Answer:
        name, now = msgspec.json.decode(request.body.data)["user"], loop_time()
        message = self._by_name[name]
        message.calls += 1
        if self._plan.outage is not None and self._plan.outage[0] <= now < self._plan.outage[1]:
            return self._outage
        if message.send.fails and now < self._plan.fails_until_s:
            return self._kind.answer
        return healthy_answer(name, is_streamed=self._is_streamed)

    def _look(self) -> None:
        """Note the state of breaker and window, for the table alone."""
        self._run.open_s += any(route.is_open() for route in self._pipeline.targets)
        self._run.windows.append(self._pipeline.targets[-1].gate.statistics().limit)

    def _count(self) -> None:
        nacks = Counter(i for i, _, verdict in self._subscriber.settlements if verdict is Settlement.NACK)
        for message_id, count in nacks.items():
            self._by_id[message_id].nacks = count
        self._run.dead = len(self._subscriber.dead)


def play(
    plan: Plan,
    kind: Kind,
    attempts: int,
    *,
    is_streamed: bool = False,
    outage: Answer = REFUSED,
    until_s: float | None = None,
) -> Run:
    """
    Run a plan on virtual time.

    Args:
        plan: What is sent when.
        kind: How the messages fail that fail.
        attempts: Of the subscription's dead-letter policy.
        is_streamed: Every request asks for a stream.
        outage: What every request gets while the backend is away.
        until_s: When to stop although messages are without an answer; `None`: when each should have one.
    """
    end_s = plan.sent_s + answer_by_s(kind, attempts) if until_s is None else until_s

    async def main() -> Run:
        return await _World(plan, kind, attempts, is_streamed=is_streamed, outage=outage).play(end_s)

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main())
