"""
A request in service: the slots, the time an answer takes, and sending it, whole or in pieces.

A generation counts as completed when the socket has its last byte; the tokens of one whose client disconnects, or whose
answer is cut on purpose, count as undelivered.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import msgspec
from aiohttp import web

from worker.emulators.openai.answers import (
    Identity,
    chat_body,
    chunk_events,
    completion_body,
    embedding_body,
    moderation_body,
)
from worker.emulators.openai.control import Controls
from worker.emulators.openai.dialects import DIALECTS, Answer, Kind, SimError
from worker.emulators.openai.engine import LiveEngine
from worker.emulators.openai.engine_model import ENGINES
from worker.emulators.openai.faults import Behaviour, altered_body, forced_text, send_plan, stream_fault
from worker.emulators.openai.generation import Generation, generate
from worker.emulators.openai.images import image_body
from worker.emulators.openai.options import SimOptions
from worker.emulators.openai.prefix_cache import PrefixCache
from worker.emulators.openai.responses import response_body, response_events
from worker.emulators.openai.seeded import Draws
from worker.emulators.openai.sse import End, StreamStep, Wait, Write, stream_steps
from worker.emulators.openai.stats import Stats
from worker.emulators.openai.transport import Sender, StreamSender
from worker.emulators.openai.validation import Call, Endpoint


class Slots:
    """
    Slots for requests in service; one event loop.

    First come, first served.  The limit may change while requests wait; a lower one ends no request in service.
    """

    def __init__(self, limit: int | None = None) -> None:
        """Allow `limit` requests at once; None is no limit."""
        self._limit = limit
        self._queue: deque[asyncio.Future[None]] = deque()
        self.in_service = 0

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._queue)

    @property
    def has_free_slot(self) -> bool:
        """Whether a request could enter at once without overtaking one that waits."""
        return self._limit is None or (self.in_service < self._limit and not self._queue)

    def set_limit(self, limit: int | None) -> None:
        """Change the limit; a higher one lets waiting requests in."""
        self._limit = limit
        self._admit()

    def _admit(self) -> None:
        while self._queue and (self._limit is None or self.in_service < self._limit):
            future = self._queue.popleft()
            if not future.done():
                self.in_service += 1
                future.set_result(None)

    async def acquire(self) -> None:
        """
        Wait for a slot and take it; call `leave` once for it.

        Cancellation: no slot is kept, even if it was granted at the same moment.
        """
        if self.has_free_slot:
            self.in_service += 1
            return
        future = asyncio.get_running_loop().create_future()
        self._queue.append(future)
        try:
            await future
        except asyncio.CancelledError:
            if future in self._queue:
                self._queue.remove(future)
            if future.done() and not future.cancelled():
                self.release()
            raise

    def release(self) -> None:
        """Give a slot back; the request that has waited longest gets it."""
        self.in_service -= 1
        self._admit()


class Pace(Protocol):
    """When the tokens of one answer are generated."""

    @property
    def tokens(self) -> int:
        """Of the whole answer."""

    @property
    def generated(self) -> int:
        """Tokens so far."""

    def has(self, tokens: int) -> bool:
        """Whether what is sent with so many tokens may be sent; with 0 the first byte."""

    async def until(self, tokens: int) -> None:
        """Wait until `has(tokens)`. Cancellation: leaves nothing behind."""

    def close(self) -> None:
        """Generate no more."""


@dataclass(frozen=True, slots=True)
class DueTimes:
    """Seconds since a request entered service."""

    first_s: float
    total_s: float

    def due_s(self, tokens: int, of: int) -> float:
        """Return when `tokens` of `of` tokens have been generated; the first byte is never before `first_s`."""
        return self.first_s + (self.total_s - self.first_s) * (tokens / of if of else 1.0)


def due_times(options: SimOptions, tokens: int, make_draws: Callable[[], Draws], factor: float) -> DueTimes:
    """
    Return the pace of one answer.

    Latency is the least time to a whole answer; a generation speed adds its time to the first token.  The same holds
    streamed and not, so that a rehearsal can compare the two.

    Args:
        options: The distributions.
        tokens: Length of the answer.
        make_draws: Makes the draws, which depend on the body and on how often it was seen; not called without latency.
        factor: By what every time is multiplied because of the load.
    """
    if options.latency.is_zero and options.ttft is None and options.tokens_per_s is None:
        return DueTimes(0.0, 0.0)
    draws = make_draws()
    latency_s = options.latency.draw(draws.uniform("latency"))
    first_s = latency_s if options.ttft is None else options.ttft.draw(draws.uniform("ttft"))
    generation_s = tokens / options.tokens_per_s if options.tokens_per_s else 0.0
    return DueTimes(first_s * factor, max(latency_s, first_s + generation_s) * factor)


class ClockPace:
    """The pace of `DueTimes`, whatever else is in service."""

    def __init__(self, due: DueTimes, tokens: int) -> None:
        """Begin now to generate so many tokens."""
        self._due = due
        self._begun_s = time.monotonic()
        self.tokens = tokens

    def _wait_s(self, tokens: int) -> float:
        if not self._due.total_s:
            return 0.0
        return self._begun_s + self._due.due_s(tokens, self.tokens) - time.monotonic()

    @property
    def generated(self) -> int:
        """See `Pace`: the same part of the tokens as of the time."""
        if not self._due.total_s:
            return self.tokens
        return int(self.tokens * min(1.0, (time.monotonic() - self._begun_s) / self._due.total_s))

    def has(self, tokens: int) -> bool:
        """See `Pace`."""
        return self._wait_s(tokens) <= 0

    async def until(self, tokens: int) -> None:
        """See `Pace`."""
        if (wait_s := self._wait_s(tokens)) > 0:
            await asyncio.sleep(wait_s)

    def close(self) -> None:
        """See `Pace`."""


def sequence_sizes(call: Call, generation: Generation, cached: int) -> list[tuple[int, int]]:
    """
    Return the tokens of the prompt and of the answer of each sequence that an engine makes of a request.

    A sequence is one of its answers, or one of the texts to embed, which counts as an answer of one token.  A call has
    one number for all its prompts, so each sequence gets an even part of what is not cached.
    """
    answers = [max(1, choice.token_count) for choice in generation.choices] or [1] * max(1, len(call.inputs))
    part, rest = divmod(max(len(answers), call.prompt_tokens - cached), len(answers))
    return [(part + (place < rest), tokens) for place, tokens in enumerate(answers)]


_NO_DRAWS = Draws(0)
_BODIES = {
    Endpoint.CHAT: chat_body,
    Endpoint.COMPLETIONS: completion_body,
    Endpoint.RESPONSES: response_body,
}


@dataclass(slots=True)
class Exchange:
    """Everything known about one request; filled in on its way."""

    sender: Sender
    options: SimOptions
    """As they were when the request arrived."""
    path: str
    identity: str = ""
    """The part of the answer's id after its prefix."""
    body_key: int = 0
    draws: Draws = field(default=_NO_DRAWS)
    """Decides the text of the answer; keyed with what the body asks, alone."""
    digest: bytes = b""
    """SHA-256 of the body."""
    seen: int = 0
    """How often the body had been seen before."""
    behaviour: Behaviour | None = None
    streamed: bool = False
    status: str = "200"
    """How the request is counted."""

    def event_draws(self) -> Draws:
        """Return the draws for delays and errors, keyed with the body and with how often it was seen."""
        return Draws(self.options.seed, self.digest, self.seen)

    def send_json(self, value: Any) -> web.StreamResponse:
        """Send a JSON answer with status 200."""
        return self.sender.answer(Answer(200, msgspec.json.encode(value)))


def unary_body(call: Call, generation: Generation, options: SimOptions, identity: Identity) -> dict[str, Any]:
    """Return the whole answer to a call as JSON."""
    match call.endpoint:
        case Endpoint.EMBEDDINGS:
            return embedding_body(call, options.seed)
        case Endpoint.MODERATIONS:
            return moderation_body(call, options.seed, identity)
        case Endpoint.IMAGES | Endpoint.EDITS:
            return image_body(call, options.seed, identity)
    return _BODIES[call.endpoint](call, generation, DIALECTS[options.dialect], identity)


class Serving:
    """Answers calls that have a slot."""

    def __init__(self, controls: Controls, stats: Stats, slots: Slots) -> None:
        """Share the controls, the counters and the slots with the data plane."""
        self._controls = controls
        self._stats = stats
        self._slots = slots
        self._prefixes: tuple[int, PrefixCache] | None = None
        """With its size, which the controls may change."""
        self._engines = {name: LiveEngine(model) for name, model in ENGINES.items()}

    def reset_counters(self) -> None:
        """Count what the engines count from 0 again."""
        for engine in self._engines.values():
            engine.reset_counters()

    def engine(self, options: SimOptions) -> LiveEngine | None:
        """Return the engine that answers with these options; None without one."""
        return None if options.engine is None else self._engines[options.engine]

    def _cached_tokens(self, call: Call, size: int | None) -> int:
        """Return how much of a prompt need not be computed, and keep it for the next ones."""
        if size is None:
            self._prefixes = None
            return 0
        if self._prefixes is None or self._prefixes[0] != size:
            self._prefixes = (size, PrefixCache(size))
        given = call.body.get("messages") or call.body.get("prompt") or call.body.get("input")
        return min(self._prefixes[1].take(msgspec.json.encode(given)), call.prompt_tokens)

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._controls.capacity_since_s

    def is_over_capacity(self, options: SimOptions) -> bool:
        """Return whether the hidden capacity's limit leaves no room for one more request."""
        if options.capacity is None:
            return False
        limit = options.capacity.step(self._elapsed_s()).limit
        return limit is not None and self._slots.in_service >= limit

    async def answer(self, exchange: Exchange, call: Call) -> web.StreamResponse:
        """
        Send the answer to a call, at the time it is due.

        Raises:
            SimError: the engine's memory can never hold the request.

        Cancellation: the client has disconnected; the tokens generated until then count as undelivered.
        """
        options, behaviour = exchange.options, exchange.behaviour
        finish = behaviour.params["finish_reason"] if behaviour and behaviour.mode.name == "abort" else None
        generation = generate(call, exchange.draws, options, say=forced_text(behaviour), finish_reason=finish)
        if behaviour is not None and behaviour.mode.name == "empty_choices":
            generation = Generation([], generation.prompt_tokens)
        cached = self._cached_tokens(call, options.prefix_cache)
        if options.prefix_cache is not None:
            generation = replace(generation, cached_tokens=cached)
        if behaviour is not None and behaviour.mode.name == "slow_first_byte":
            await asyncio.sleep(behaviour.params["delay_s"])
        identity = Identity(exchange.identity, int(time.time()))
        with closing(self._pace(exchange, call, generation, cached)) as pace:
            self._stats.add_prompt(call.prompt_tokens, cached)
            if call.stream:
                return await self._stream(exchange, call, generation, pace, identity)
            return await self._unary(exchange, call, generation, pace, identity)

    def _pace(self, exchange: Exchange, call: Call, generation: Generation, cached: int) -> Pace:
        """Begin to generate; raises SimError when the engine cannot hold the request."""
        options = exchange.options
        if (engine := self.engine(options)) is not None:
            sizes = sequence_sizes(call, generation, cached)
            try:
                return engine.add(sizes)
            except ValueError:
                tokens = max(map(sum, sizes))
                raise SimError(Kind.CONTEXT_LENGTH, window=engine.kv_tokens, tokens=tokens) from None
        tokens = generation.completion_tokens
        factor = 1.0
        if options.capacity is not None:
            factor = options.capacity.factor(self._slots.in_service, self._elapsed_s())
        due = due_times(options, tokens, exchange.event_draws, factor)
        if options.prompt_tokens_per_s is not None:
            prompt_s = (call.prompt_tokens - cached) / options.prompt_tokens_per_s
            due = DueTimes(due.first_s + prompt_s, due.total_s + prompt_s)
        return ClockPace(due, tokens)

    async def _unary(
        self, exchange: Exchange, call: Call, generation: Generation, pace: Pace, identity: Identity
    ) -> web.StreamResponse:
        tokens = generation.completion_tokens
        try:
            await pace.until(pace.tokens)
        except asyncio.CancelledError:
            self._stats.add_undelivered(min(tokens, pace.generated))
            raise
        body = altered_body(exchange.behaviour, unary_body(call, generation, exchange.options, identity))
        plan = send_plan(exchange.behaviour, Answer(200, msgspec.json.encode(body)))
        if plan.sent is None and not plan.body_delay_s:
            response = exchange.sender.answer(plan.answer)
            self._stats.complete(exchange.body_key, tokens)
            return response
        response = await exchange.sender.answer_slowly(plan.answer, plan.body_delay_s, plan.sent)
        if plan.sent is None:
            self._stats.complete(exchange.body_key, tokens)
        else:
            exchange.status = "cut"
            self._stats.add_undelivered(tokens)
        return response

    async def _stream(
        self, exchange: Exchange, call: Call, generation: Generation, pace: Pace, identity: Identity
    ) -> web.StreamResponse:
        dialect = DIALECTS[exchange.options.dialect]
        fault = stream_fault(exchange.behaviour)
        if call.endpoint is Endpoint.RESPONSES:
            events = response_events(call, generation, dialect, identity)
        else:
            events = chunk_events(call, generation, dialect, identity, fault.usage_on)
        steps = stream_steps(events, fault, dialect.name, done_after_error=dialect.done_after_error)
        ending = steps[-1]
        assert isinstance(ending, End)
        body = exchange.sender.begin_stream(ending.how)
        if exchange.behaviour is not None and exchange.behaviour.mode.name == "slow_body":
            await body.flush()
            await asyncio.sleep(exchange.behaviour.params["delay_s"])
        tokens = generation.completion_tokens
        whole = False
        try:
            await _send_steps(body, steps, pace)
            response = await body.end(ending.how)
            whole = ending.how == "done" and body.tokens >= tokens and not body.is_cut
        finally:
            if whole:
                self._stats.complete(exchange.body_key, tokens)
            else:
                self._stats.add_undelivered(body.tokens)
        if not whole:
            exchange.status = "cut"
        return response


async def _send_steps(body: StreamSender, steps: list[StreamStep], pace: Pace) -> None:
    """
    Do every step but the last, each write at its time.

    Cancellation: the client has disconnected; `body.tokens` says how much was sent.
    """
    for step in steps:
        if isinstance(step, Write):
            if not pace.has(step.tokens):
                await body.flush()
                await pace.until(step.tokens)
            await body.write(step.data)
            body.tokens = step.tokens
        elif isinstance(step, Wait):
            await body.flush()
            await _wait(body, step)


async def _wait(body: StreamSender, step: Wait) -> None:
    """Send nothing, or only comments, for as long as the step says. Cancellation: the client disconnected."""
    try:
        async with asyncio.timeout(step.seconds):
            while True:
                await asyncio.sleep(step.comment_every_s or 3600)
                if step.comment_every_s:
                    await body.write(b": keep-alive\n\n")
                    await body.flush()
    except TimeoutError:
        return
