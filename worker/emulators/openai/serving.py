"""
A request in service: the slots, the time an answer takes, and sending it, whole or in pieces.

A generation counts as completed when the socket has its last byte; the tokens of one whose client disconnects, or whose
answer is cut on purpose, count as undelivered.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiohttp import web

from worker.emulators.openai.answers import Identity, chat_body, chunk_events, completion_body, embedding_body
from worker.emulators.openai.control import Director
from worker.emulators.openai.dialects import DIALECTS, Answer
from worker.emulators.openai.faults import Behaviour, alter, alter_body, said, stream_fault
from worker.emulators.openai.generation import Generation, generate
from worker.emulators.openai.options import SimOptions
from worker.emulators.openai.responses import response_body, response_events
from worker.emulators.openai.seeded import Dice
from worker.emulators.openai.sse import Act, End, Wait, Write, script
from worker.emulators.openai.stats import Stats
from worker.emulators.openai.transport import Sender, StreamSender
from worker.emulators.openai.validation import Call, Endpoint


class Gate:
    """Slots for requests in service; one event loop."""

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
    def has_room(self) -> bool:
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

    async def enter(self) -> None:
        """
        Wait for a slot and take it; call `leave` once for it.

        Cancellation: no slot is kept, even if it was granted at the same moment.
        """
        if self.has_room:
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
                self.leave()
            raise

    def leave(self) -> None:
        """Give a slot back; the request that has waited longest gets it."""
        self.in_service -= 1
        self._admit()


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds since a request entered service."""

    first_s: float
    total_s: float

    def due_s(self, tokens: int, of: int) -> float:
        """Return when `tokens` of `of` tokens have been generated; the first byte is never before `first_s`."""
        return self.first_s + (self.total_s - self.first_s) * (tokens / of if of else 1.0)


def pace(options: SimOptions, tokens: int, roll: Callable[[], Dice], factor: float) -> Pace:
    """
    Return the pace of one answer.

    Latency is the least time to a whole answer; a generation speed adds its time to the first token.  The same holds
    streamed and not, so that a rehearsal can compare the two.

    Args:
        options: The distributions.
        tokens: Length of the answer.
        roll: Makes what the draws come from: the request's body and how often it was seen. Not asked without latency.
        factor: By what everything takes longer because of the crowd.
    """
    if options.latency.is_zero and options.ttft is None and options.tokens_per_s is None:
        return Pace(0.0, 0.0)
    luck = roll()
    latency_s = options.latency.draw(luck.uniform("latency"))
    first_s = latency_s if options.ttft is None else options.ttft.draw(luck.uniform("ttft"))
    generation_s = tokens / options.tokens_per_s if options.tokens_per_s else 0.0
    return Pace(first_s * factor, max(latency_s, first_s + generation_s) * factor)


_NOBODY = Dice(0)
_BODIES = {
    Endpoint.CHAT: chat_body,
    Endpoint.COMPLETIONS: completion_body,
    Endpoint.RESPONSES: response_body,
}


@dataclass(slots=True)
class Order:
    """Everything known about one request; filled in on its way."""

    sender: Sender
    options: SimOptions
    """As they were when the request arrived."""
    path: str
    identity: str = ""
    """The part of the answer's id after its prefix."""
    body_key: int = 0
    dice: Dice = field(default=_NOBODY)
    """Decides what is said: depends on what the body asks, alone."""
    digest: bytes = b""
    """SHA-256 of the body."""
    seen: int = 0
    """How often the body had been seen before."""
    behaviour: Behaviour | None = None
    streamed: bool = False
    status: str = "200"
    """How the request is counted."""

    def luck(self) -> Dice:
        """Return what decides what happens: it depends on the body and on how often it was seen."""
        return Dice(self.options.seed, self.digest, self.seen)

    def send_json(self, value: Any) -> web.StreamResponse:
        """Send a JSON answer with status 200."""
        return self.sender.answer(Answer(200, msgspec.json.encode(value)))


class Serving:
    """Answers calls that have a slot."""

    def __init__(self, director: Director, stats: Stats, gate: Gate) -> None:
        """Share the director, the counters and the slots with the data plane."""
        self._director = director
        self._stats = stats
        self._gate = gate

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._director.capacity_since_s

    def is_over_capacity(self, options: SimOptions) -> bool:
        """Return whether the hidden capacity's limit leaves no room for one more request."""
        if options.capacity is None:
            return False
        limit = options.capacity.step(self._elapsed_s()).limit
        return limit is not None and self._gate.in_service >= limit

    async def answer(self, order: Order, call: Call) -> web.StreamResponse:
        """
        Send the answer to a call, at the time it is due.

        Cancellation: the client has gone; the tokens generated until then count as undelivered.
        """
        options, behaviour = order.options, order.behaviour
        finish = behaviour.params["finish_reason"] if behaviour and behaviour.mode.name == "abort" else None
        generation = generate(call, order.dice, options, say=said(behaviour), finish_reason=finish)
        if behaviour is not None and behaviour.mode.name == "empty_choices":
            generation = Generation([], generation.prompt_tokens)
        tokens = generation.completion_tokens
        factor = 1.0
        if options.capacity is not None:
            factor = options.capacity.factor(self._gate.in_service, self._elapsed_s())
        due = pace(options, tokens, order.luck, factor)
        if behaviour is not None and behaviour.mode.name == "slow_first_byte":
            delay_s = behaviour.params["delay_s"]
            due = Pace(due.first_s + delay_s, due.total_s + delay_s)
        identity = Identity(order.identity, int(time.time()))
        if call.stream:
            return await self._stream(order, call, generation, due, identity)
        return await self._unary(order, call, generation, due, identity)

    async def _unary(
        self, order: Order, call: Call, generation: Generation, due: Pace, identity: Identity
    ) -> web.StreamResponse:
        tokens = generation.completion_tokens
        begun_s = time.monotonic()
        try:
            if due.total_s:
                await asyncio.sleep(due.total_s)
        except asyncio.CancelledError:
            self._stats.waste(int(tokens * min(1.0, (time.monotonic() - begun_s) / due.total_s)))
            raise
        if call.endpoint is Endpoint.EMBEDDINGS:
            body = embedding_body(call, order.options.seed)
        else:
            body = _BODIES[call.endpoint](call, generation, DIALECTS[order.options.dialect], identity)
        body = alter_body(order.behaviour, body)
        delivery = alter(order.behaviour, Answer(200, msgspec.json.encode(body)))
        if delivery.sent is None and not delivery.body_delay_s:
            response = order.sender.answer(delivery.answer)
            self._stats.complete(order.body_key, tokens)
            return response
        response = await order.sender.answer_slowly(delivery.answer, delivery.body_delay_s, delivery.sent)
        if delivery.sent is None:
            self._stats.complete(order.body_key, tokens)
        else:
            order.status = "cut"
            self._stats.waste(tokens)
        return response

    async def _stream(
        self, order: Order, call: Call, generation: Generation, due: Pace, identity: Identity
    ) -> web.StreamResponse:
        dialect = DIALECTS[order.options.dialect]
        fault = stream_fault(order.behaviour)
        if call.endpoint is Endpoint.RESPONSES:
            events = response_events(call, generation, dialect, identity)
        else:
            events = chunk_events(call, generation, dialect, identity, fault.usage_on)
        acts = script(events, fault, dialect.name, done_after_error=dialect.done_after_error)
        ending = acts[-1]
        assert isinstance(ending, End)
        body = order.sender.begin_stream(ending.how)
        if order.behaviour is not None and order.behaviour.mode.name == "slow_body":
            await body.flush()
            await asyncio.sleep(order.behaviour.params["delay_s"])
        tokens = generation.completion_tokens
        whole = False
        try:
            await _perform(body, acts, due, tokens)
            response = await body.end(ending.how)
            whole = ending.how == "done" and body.tokens >= tokens
        finally:
            if whole:
                self._stats.complete(order.body_key, tokens)
            else:
                self._stats.waste(body.tokens)
        if not whole:
            order.status = "cut"
        return response


async def _perform(body: StreamSender, acts: list[Act], due: Pace, tokens: int) -> None:
    """
    Do what a script says except its end, each write at its time.

    Cancellation: the client has gone; `body.tokens` says how far it came.
    """
    begun_s = time.monotonic()
    for act in acts:
        if isinstance(act, Write):
            wait_s = begun_s + due.due_s(act.tokens, tokens) - time.monotonic() if due.total_s else 0.0
            if wait_s > 0:
                await body.flush()
                await asyncio.sleep(wait_s)
            await body.write(act.data)
            body.tokens = act.tokens
        elif isinstance(act, Wait):
            await body.flush()
            await _wait(body, act)


async def _wait(body: StreamSender, act: Wait) -> None:
    """Send nothing, or only comments, for as long as the act says. Cancellation: the client gave up."""
    try:
        async with asyncio.timeout(act.seconds):
            while True:
                await asyncio.sleep(act.comment_every_s or 3600)
                if act.comment_every_s:
                    await body.write(b": keep-alive\n\n")
                    await body.flush()
    except TimeoutError:
        return
