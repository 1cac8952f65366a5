"""
The engine model in real time: requests wait in it for their tokens, and one timer runs its iterations.

An iteration begins where the last one ended, not when the timer came, so a busy event loop does not make the engine
slower: it catches up.  Each iteration costs as much work as there are requests that wait for their next token, which
is those that are streamed; the others wait for their last one.
"""

import asyncio
from collections.abc import Sequence as List

from worker.emulators.openai.engine_model import Engine, EngineModel, Sequence


class LiveEngine:
    """
    One engine; one event loop.

    Args:
        model: Its constants.
    """

    def __init__(self, model: EngineModel) -> None:
        self._engine = Engine(model)
        self._requests: dict[Sequence, EngineRequest] = {}
        self._waiting_for_part: dict[EngineRequest, None] = {}
        self._is_busy = False
        self._ends_at = 0.0
        self.kv_tokens = model.kv_tokens
        """Tokens whose keys and values fit into memory; a sequence of more is never served."""

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return self._engine.running

    @property
    def waiting(self) -> int:
        """Sequences in the queue."""
        return self._engine.waiting

    @property
    def kv_usage(self) -> float:
        """Share of the memory for keys and values that is in use, 0 to 1."""
        return self._engine.kv_usage

    @property
    def preemptions(self) -> int:
        """Since the start, or since `reset_counters`."""
        return self._engine.preemptions

    def reset_counters(self) -> None:
        """Count preemptions from 0 again."""
        self._engine.preemptions = 0

    def add(self, sizes: List[tuple[int, int]]) -> "EngineRequest":
        """
        Put a request at the end of the queue; close it, whatever becomes of it.

        Args:
            sizes: Tokens of the prompt and of the answer of each of its sequences, at least one of them, each number
                at least 1.

        Raises:
            ValueError: a sequence can never fit into memory; nothing was added.
        """
        request = EngineRequest(self, sizes)
        try:
            for sequence in request.sequences:
                self._engine.add(sequence)
                self._requests[sequence] = request
        except ValueError:
            request.close()
            raise
        if not self._is_busy:
            self._is_busy = True
            loop = asyncio.get_running_loop()
            self._ends_at = loop.time()
            loop.call_soon(self._begin)  # what comes in the same turn starts together
        return request

    def generated(self, sequence: Sequence) -> int:
        """Return how many tokens of its answer a sequence has got so far."""
        return self._engine.generated(sequence)

    def watch(self, request: "EngineRequest") -> None:
        """Tell a request of every iteration until it is told otherwise."""
        self._waiting_for_part[request] = None

    def unwatch(self, request: "EngineRequest") -> None:
        """Tell a request of its last token alone."""
        self._waiting_for_part.pop(request, None)

    def remove(self, request: "EngineRequest") -> None:
        """Drop a request, wherever it is; harmless when it has ended."""
        for sequence in request.sequences:
            self._engine.remove(sequence)
            self._requests.pop(sequence, None)

    def _begin(self) -> None:
        iteration = self._engine.begin()
        self._is_busy = iteration is not None
        if iteration is not None:
            self._ends_at += iteration.seconds
            asyncio.get_running_loop().call_at(self._ends_at, self._end)

    def _end(self) -> None:
        for sequence in self._engine.end().finished:
            if sequence in self._requests:
                self._requests.pop(sequence).notice_tokens()
        for request in self._waiting_for_part:
            request.notice_tokens()
        self._begin()


class EngineRequest:
    """One request inside a `LiveEngine`: a sequence for each of its answers."""

    def __init__(self, engine: LiveEngine, sizes: List[tuple[int, int]]) -> None:
        """Made by `LiveEngine.add`."""
        self._engine = engine
        self.sequences = [Sequence(prompt, answer) for prompt, answer in sizes]
        self.tokens = sum(answer for _, answer in sizes)
        """Of all its answers."""
        self._wanted = 0
        self._got_them: asyncio.Future[None] | None = None

    @property
    def generated(self) -> int:
        """Tokens of its answers so far."""
        return sum(map(self._engine.generated, self.sequences))

    def has(self, tokens: int) -> bool:
        """Whether so many tokens are generated; of 0 the first one, of more than there are the last one."""
        return self.generated >= min(max(1, tokens), self.tokens)

    async def until(self, tokens: int) -> None:
        """
        Wait until `has(tokens)`; one call at a time.

        Cancellation: the request stays in the engine until `close`.
        """
        if self.has(tokens):
            return
        self._wanted = tokens
        self._got_them = asyncio.get_running_loop().create_future()
        if tokens < self.tokens:
            self._engine.watch(self)
        try:
            await self._got_them
        finally:
            self._got_them = None
            self._engine.unwatch(self)

    def notice_tokens(self) -> None:
        """Look whether what is waited for is there; called by the engine."""
        if self._got_them is not None and not self._got_them.done() and self.has(self._wanted):
            self._got_them.set_result(None)

    def close(self) -> None:
        """Leave the engine; what it took of the memory is free again."""
        self._engine.remove(self)
