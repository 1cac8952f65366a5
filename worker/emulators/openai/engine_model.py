"""
An inference engine that batches continuously (vLLM, SGLang, TGI), as far as its clients notice.

The engine works in iterations.  In each, every sequence that decodes gets one token, and prompts are computed with what
is left of a budget of tokens.  An iteration takes longer the more sequences decode in it and the more prompt tokens it
computes, so each request becomes slower with every other one while the total throughput still grows.  What finds no
room, for lack of sequences or of memory for keys and values, waits in a queue without end, first come, first served.
When the sequences that decode outgrow the memory, the youngest is *preempted*: its keys and values are dropped, and it
waits at the front of the queue until they are computed again.  Nothing is ever refused.

Pure: `begin` says how long the next iteration takes, `end` what it produced; time passes elsewhere.  An iteration costs
as much work here however many sequences decode, apart from those that begin or end.

The constants are fitted to published measurements; `tests/unit/emulators/openai/test_engine_model.py` has them, and how
far the model is from each.  Not modelled: prefix caches, the slower reading of long contexts, speculative decoding.
"""

import heapq
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineModel:
    """The constants of one model on one machine."""

    iteration_s: float
    """Seconds of an iteration in which next to nothing is computed: the weights are read once."""
    sequence_s: float
    """Seconds that each decoding sequence adds to an iteration."""
    prompt_token_s: float
    """Seconds that each prompt token adds to an iteration."""
    kv_tokens: int
    """Tokens whose keys and values fit into memory."""
    max_sequences: int = 1024
    """Sequences that run at once (vLLM's `max_num_seqs`)."""
    max_batched_tokens: int = 8192
    """Tokens of one iteration (vLLM's `max_num_batched_tokens`)."""


LLAMA_8B_H100 = EngineModel(iteration_s=0.0064, sequence_s=31e-6, prompt_token_s=35e-6, kv_tokens=440_000)
"""
Llama 3.1 8B in 16 bits in vLLM on one H100, behind a gateway.

Source: latency and use of the memory at 8 to 512 requests at once (https://github.com/llm-d/llm-d/pull/1865).  The time
of a prompt token is not in it: it is that of the 70B model below, by the number of weights, their bits, and the GPUs.
"""

LLAMA_70B_2_H100 = EngineModel(iteration_s=0.0186, sequence_s=55e-6, prompt_token_s=79e-6, kv_tokens=470_000)
"""
Llama 3.3 70B in 8 bits in NVIDIA NIM on two H100, 5,000 tokens in and 500 out.

Source: https://docs.nvidia.com/nim/benchmarking/llm/1.0.0/performance.md, version 1.8.0.  From 100 requests at once on,
no more than 86 run, and the others wait in the queue; that many contexts are the memory.
"""

QWEN_7B_GB200 = EngineModel(
    iteration_s=0.0030, sequence_s=39e-6, prompt_token_s=8e-6, kv_tokens=299_584, max_sequences=256
)
"""
Qwen 2.5 7B in vLLM on one GB200, with so little memory for keys and values that requests are preempted.

Source: https://github.com/vllm-project/vllm/pull/44594, the row without a watermark.
"""

ENGINES: Mapping[str, EngineModel] = {
    "llama-8b-h100": LLAMA_8B_H100,
    "llama-70b-2-h100": LLAMA_70B_2_H100,
    "qwen-7b-gb200": QWEN_7B_GB200,
}
"""By the names that `--engine` takes."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One request inside the engine."""

    prompt_tokens: int
    answer_tokens: int
    """At least 1; an embedding counts as an answer of one token."""
    generated: int = 0
    """Tokens of the answer generated so far; while it decodes, up to its last change of state."""
    computed: int = 0
    """Tokens whose keys and values are in memory, while it does not decode."""
    preemptions: int = 0
    state: str = field(default="new", repr=False)
    since: int = field(default=0, repr=False)


@dataclass(frozen=True, slots=True)
class Iteration:
    """An iteration that begins."""

    seconds: float
    """How long it takes."""
    started: list[Sequence]
    """Those that leave the queue for the first time."""


@dataclass(slots=True)
class Produced:
    """What an iteration produced."""

    first: list[Sequence]
    """Those that got their first token."""
    finished: list[Sequence]
    """Those that got their last one."""
    tokens: int
    """Tokens of answers."""


class Engine:
    """
    The queue and the batch of one engine.

    `begin` and `end` are called in turn; requests are added and removed at any time.

    Args:
        model: Its constants.
    """

    def __init__(self, model: EngineModel) -> None:
        self._model = model
        self._waiting: deque[Sequence] = deque()
        self._prefilling: deque[Sequence] = deque()
        self._decoding: dict[Sequence, None] = {}
        self._finishing: list[tuple[int, int, Sequence, int]] = []
        self._chunks: list[tuple[Sequence, int]] = []
        self._iteration = 0
        self._used = 0
        self._orders = count()
        self.preemptions = 0
        """Since the start."""

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return len(self._prefilling) + len(self._decoding)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def kv_usage(self) -> float:
        """Share of the memory for keys and values that is in use."""
        return self._used / self._model.kv_tokens

    def generated(self, sequence: Sequence) -> int:
        """Return how many tokens of its answer a request has got so far."""
        decoded = self._iteration - sequence.since if sequence.state == "decoding" else 0
        return sequence.generated + decoded

    def add(self, sequence: Sequence) -> None:
        """
        Put a request at the end of the queue.

        Raises:
            ValueError: it can never fit into memory.
        """
        if sequence.prompt_tokens + sequence.answer_tokens > self._model.kv_tokens:
            raise ValueError("the request is larger than the memory for keys and values")
        sequence.state = "waiting"
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Drop a request, wherever it is; harmless when it has ended."""
        match sequence.state:
            case "waiting":
                self._waiting.remove(sequence)
            case "prefilling":
                self._prefilling.remove(sequence)
                self._used -= sequence.computed
                self._chunks = [each for each in self._chunks if each[0] is not sequence]
            case "decoding":
                self._stop_decoding(sequence)
                self._used -= sequence.computed
        sequence.state = "ended"

    def begin(self) -> Iteration | None:
        """Decide what the next iteration computes; `None` when there is nothing to do."""
        model = self._model
        has_preempted = False
        while self._used + len(self._decoding) > model.kv_tokens:
            self._preempt()
            has_preempted = True
        budget = max(0, model.max_batched_tokens - len(self._decoding))
        free = model.kv_tokens - self._used - len(self._decoding)
        self._chunks = []
        started: list[Sequence] = []
        prompt_tokens = 0
        for sequence in self._prefilling:
            chunk = min(_to_compute(sequence), budget - prompt_tokens, free - prompt_tokens)
            if chunk <= 0:
                break
            self._chunks.append((sequence, chunk))
            prompt_tokens += chunk
        while self._waiting and not has_preempted and self.running < model.max_sequences:
            chunk = min(_to_compute(self._waiting[0]), budget - prompt_tokens)
            if chunk <= 0 or chunk > free - prompt_tokens:
                break
            sequence = self._waiting.popleft()
            sequence.state = "prefilling"
            if sequence.preemptions == 0:
                started.append(sequence)
            self._prefilling.append(sequence)
            self._chunks.append((sequence, chunk))
            prompt_tokens += chunk
        if not self._decoding and not self._chunks:
            return None
        seconds = model.iteration_s + model.sequence_s * len(self._decoding) + model.prompt_token_s * prompt_tokens
        return Iteration(seconds, started)

    def end(self) -> Produced:
        """Return what the iteration that began last has produced."""
        self._iteration += 1
        self._used += len(self._decoding)
        produced = Produced([], [], len(self._decoding))
        while self._finishing and self._finishing[0][0] <= self._iteration:
            _, _, sequence, since = heapq.heappop(self._finishing)
            if sequence.state == "decoding" and sequence.since == since:
                self._stop_decoding(sequence)
                self._finish(sequence, produced)
        for sequence, chunk in self._chunks:
            sequence.computed += chunk
            self._used += chunk
            if _to_compute(sequence) == 0:
                self._prefilling.remove(sequence)
                self._generate(sequence, produced)
        self._chunks = []
        return produced

    def _generate(self, sequence: Sequence, produced: Produced) -> None:
        """Take the token that the end of a prompt yields, and decode the rest."""
        if sequence.generated == 0:
            produced.first.append(sequence)
        sequence.generated += 1
        produced.tokens += 1
        if sequence.generated == sequence.answer_tokens:
            self._finish(sequence, produced)
            return
        sequence.state, sequence.since = "decoding", self._iteration
        self._decoding[sequence] = None
        ends_at = self._iteration + sequence.answer_tokens - sequence.generated
        heapq.heappush(self._finishing, (ends_at, next(self._orders), sequence, self._iteration))

    def _stop_decoding(self, sequence: Sequence) -> None:
        del self._decoding[sequence]
        decoded = self._iteration - sequence.since
        sequence.generated += decoded
        sequence.computed += decoded

    def _finish(self, sequence: Sequence, produced: Produced) -> None:
        self._used -= sequence.computed
        sequence.state = "ended"
        produced.finished.append(sequence)

    def _preempt(self) -> None:
        """Take the memory of the youngest sequence; it waits at the front of the queue."""
        if self._prefilling:
            sequence = self._prefilling.pop()
        else:
            sequence = next(reversed(self._decoding))
            self._stop_decoding(sequence)
        self._used -= sequence.computed
        sequence.computed = 0
        sequence.preemptions += 1
        self.preemptions += 1
        sequence.state = "waiting"
        self._waiting.appendleft(sequence)


def _to_compute(sequence: Sequence) -> int:
    """Return how many tokens are left to compute before its next token: the prompt, and what it had generated."""
    return sequence.prompt_tokens + sequence.generated - sequence.computed
