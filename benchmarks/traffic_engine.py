"""
People and a batch at one engine, and a batch about long documents, on virtual time.

The engine and its cache of prefixes are the models of the simulated backend (`worker/emulators/openai`); the worker's
part is the real pipeline.
"""

import asyncio
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, NamedTuple

from tests.support.fakes import Answer, FakeBackend
from tests.support.pipeline import Pipeline, data, message
from tests.support.virtual_time import loop_time, virtual_time
from worker.emulators.openai.engine import LiveEngine
from worker.emulators.openai.engine_model import LLAMA_8B_H100
from worker.emulators.openai.prefix_cache import BYTES_PER_TOKEN, PrefixCache
from worker.pipeline.metric_gates import build_metric_gates
from worker.ports import AttemptResult, BackendRequest
from worker.settings.schema import Settings

MODEL = replace(LLAMA_8B_H100, max_sequences=256)
"""One H100 with Llama 3.1 8B; 256 sequences are vLLM's default on it."""
SECONDS = 180.0
BUSY_S, CYCLE_S = 40.0, 60.0
"""People come for the first part of each minute and are few in the rest."""
PEOPLE_PER_S = 20.0


async def generate(live: LiveEngine, prompt: int, tokens: int, on_first: Callable[[], None] = lambda: None) -> None:
    """Generate one answer; `on_first` is called with its first token.  Cancellation: the engine drops it."""
    with closing(live.add([(prompt, tokens)])) as request:
        await request.until(1)
        on_first()
        await request.until(tokens)


class EngineBackend(FakeBackend):
    """
    The engine as the backend of a route.

    Args:
        live: The engine.
        size: Tokens of a request's prompt that are to be computed, and of its answer.
    """

    def __init__(self, live: LiveEngine, size: Callable[[BackendRequest], tuple[int, int]]) -> None:
        super().__init__(name="r")
        self._live = live
        self._size = size
        self.tokens = 0
        """Of whole answers."""

    async def _generate(self, _: Answer, request: BackendRequest, result: AttemptResult) -> None:  # type: ignore[override]
        prompt, tokens = self._size(request)
        await generate(self._live, prompt, tokens)
        self.tokens += tokens
        result.stream_usage = {"prompt_tokens": prompt, "completion_tokens": tokens}


class EngineMetrics:
    """Numbers of the engine as its page shows them; see `worker.ports.MetricSource`."""

    def __init__(self, *numbers: Callable[[], float]) -> None:
        self._numbers = numbers

    async def read(self) -> Sequence[float]:
        """Return what the engine says now.  Cancellation: leaves nothing behind."""
        return [number() for number in self._numbers]

    async def aclose(self) -> None:
        """Hold nothing."""


class Latency(NamedTuple):
    """What people get beside a batch, and what the batch gets."""

    first_median_s: float
    first_p99_s: float
    whole_median_s: float
    whole_p99_s: float
    batch_tokens_per_s: float


OTHERS = {"metric": "load", "whole_at": 0, "closed_at": MODEL.max_sequences, "without_own": True}
ADAPTIVE = {"initial": 8, "min": 1, "max": 512}
PROTECTIONS: Mapping[str, Mapping[str, Any] | None] = {
    "no batch": None,
    "window of 512": {"window": {"initial": 512, "min": 512, "max": 512}},
    "window of 64": {"window": {"initial": 64, "min": 64, "max": 64}},
    "adaptive window": {"window": ADAPTIVE},
    "window of 512, gate `vllm`": {
        "window": {"initial": 512, "min": 512, "max": 512},
        "metric_gate": {"type": "vllm"},
    },
    "the same without `rise_s`": {
        "window": {"initial": 512, "min": 512, "max": 512},
        "metric_gate": {"type": "vllm", "rise_s": 0},
    },
    "adaptive window, gate `vllm`": {"window": ADAPTIVE, "metric_gate": {"type": "vllm"}},
    "window of 256, gate by the load of others": {
        "window": {"initial": 256, "min": 256, "max": 256},
        "metric_gate": {"type": "metrics", "signals": [OTHERS]},
    },
}


def interactive(seed: int, protection: Mapping[str, Any] | None) -> Latency:
    """Let people ask an engine by themselves while a batch without end drains through a route; `None`: no batch."""
    dice = random.Random(seed)
    first: list[float] = []
    whole: list[float] = []
    tokens = 0.0

    def size(request: BackendRequest) -> tuple[int, int]:
        own = random.Random(f"{seed}/{request.message_id}")
        return int(own.lognormvariate(6.2, 0.6)), max(8, min(1000, int(own.lognormvariate(5.3, 0.6))))

    @virtual_time
    async def run() -> None:
        nonlocal tokens
        live = LiveEngine(MODEL)
        backend = EngineBackend(live, size)
        route = {"name": "r", "base_url": "http://b", **(protection or {})}
        pipeline = Pipeline(backend, routes=[route], rng=random.Random(seed))
        numbers: dict[str, list[Callable[[], float]]] = {
            "vllm": [lambda: live.waiting, lambda: live.kv_usage],
            "metrics": [lambda: live.running + live.waiting],
        }
        settings = Settings.model_validate({"routes": [route]})
        gate_type = settings.routes[0].metric_gate.type
        sources = {"r": EngineMetrics(*numbers.get(gate_type, []))}
        loops = build_metric_gates(settings, sources, pipeline.targets, pipeline.metrics, now=loop_time)
        gates = [asyncio.ensure_future(loop.run()) for loop in loops]
        numbers = itertools.count()
        people: set[asyncio.Task[None]] = set()
        batch: set[asyncio.Task[Any]] = set()

        async def person() -> None:
            began = loop_time()
            prompt, length = int(dice.lognormvariate(5.5, 0.6)), max(8, int(dice.lognormvariate(4.6, 0.5)))
            await generate(live, prompt, length, lambda: first.append(loop_time() - began))
            whole.append(loop_time() - began)

        async def come() -> None:
            while loop_time() < SECONDS:
                is_busy = loop_time() % CYCLE_S < BUSY_S
                await asyncio.sleep(dice.expovariate(PEOPLE_PER_S if is_busy else PEOPLE_PER_S / 10.0))
                people.add(asyncio.ensure_future(person()))

        async def lease() -> None:
            while loop_time() < SECONDS and protection is not None:
                while len(batch) < 1024:
                    batch.add(pipeline.start(message(message_id=f"m{next(numbers)}")))
                done, _ = await asyncio.wait(batch, return_when=asyncio.FIRST_COMPLETED, timeout=1.0)
                batch.difference_update(done)

        await asyncio.gather(come(), lease())
        tokens = backend.tokens / SECONDS
        for task in (*gates, *batch):
            task.cancel()
        await asyncio.gather(*gates, *batch, return_exceptions=True)
        await asyncio.gather(*people)
        await asyncio.sleep(60.0)  # the engine ends the rest

    run()
    return Latency(quantile(first, 0.5), quantile(first, 0.99), quantile(whole, 0.5), quantile(whole, 0.99), tokens)


def quantile(values: list[float], share: float) -> float:
    """Return the value below which a share of the others are."""
    return sorted(values)[int(share * (len(values) - 1))]


class Documents(NamedTuple):
    """A batch of questions about documents."""

    count: int
    questions: int
    tokens: int
    """Of each document."""
    order: str
    """How the requests were published: `mixed`, `by question` (all documents for each), or `by document` roughly."""
    leased: int
    """Messages leased at once."""


BATCHES = (
    *(Documents(300, 10, 8000, order, leased) for leased in (128, 512) for order in ("mixed", "by question")),
    Documents(300, 10, 8000, "by document", 512),
    Documents(300, 10, 2000, "mixed", 512),
    Documents(20, 150, 2000, "mixed", 512),
)


class Reuse(NamedTuple):
    """What an engine's cache of prefixes gave."""

    found: float
    """Share of the tokens of prompts."""
    saved_s: float
    """Seconds of the engine that these tokens would have taken."""
    seconds: float
    """Of the whole batch."""


CACHE_TOKENS = 250_000
"""What is left of the engine's memory beside 64 sequences."""


def documents(seed: int, batch: Documents, *, group_by: int) -> Reuse:
    """Serve a batch of questions about documents, with a window of 64; `group_by`: bytes, 0 for by age."""
    dice = random.Random(seed)
    asked = [(number, question) for question in range(batch.questions) for number in range(batch.count)]
    if batch.order == "mixed":
        dice.shuffle(asked)
    elif batch.order == "by document":
        asked.sort(key=lambda each: each[0] * batch.questions + each[1] + dice.uniform(0.0, 400.0))
    cache = PrefixCache(CACHE_TOKENS)
    seconds = 0.0

    def size(request: BackendRequest) -> tuple[int, int]:
        prompt = request.body.raw("prompt")
        own = random.Random(prompt[-20:])
        return len(prompt) // BYTES_PER_TOKEN - cache.take(prompt), max(8, int(own.lognormvariate(4.6, 0.6)))

    @virtual_time
    async def run() -> None:
        nonlocal seconds
        window = {"initial": 64, "min": 64, "max": 64}
        backend = EngineBackend(LiveEngine(MODEL), size)
        pipeline = Pipeline(backend, routes=[{"name": "r", "window": window, "group_by_prefix_bytes": group_by}])
        texts = [f"document {number} ".ljust(batch.tokens * BYTES_PER_TOKEN, "x") for number in range(batch.count)]
        leased: set[asyncio.Task[Any]] = set()
        for number, question in asked:
            if len(leased) >= batch.leased:
                _, leased = await asyncio.wait(leased, return_when=asyncio.FIRST_COMPLETED)
            body = {"model": "m", "prompt": f"{texts[number]} question {question:08} of {number:08}"}
            payload = data(body, path="/v1/completions")
            leased.add(pipeline.start(message(payload)))
        await asyncio.gather(*leased)
        assert len(pipeline.answers) == len(asked)
        seconds = loop_time()

    run()
    return Reuse(cache.found_tokens / cache.asked_tokens, cache.found_tokens * MODEL.prompt_token_s, seconds)
