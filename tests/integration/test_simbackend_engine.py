"""The simulated server with an engine, over real HTTP: the times, the load it shows, and clients that leave."""

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from tests.support.waiting import eventually
from worker.emulators.openai import SimBackend, SimOptions
from worker.emulators.openai.engine_model import LLAMA_8B_H100, QWEN_7B_GB200

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
LONG = 10_000
"""Tokens of an answer of which these tests do not wait for the end."""
PLACE_TOKENS = 147_000
"""Tokens of a prompt; two of them fit into the memory of the smallest engine, and a little of a third."""


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A client that keeps connections."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        yield session


def an_engine(**settings: Any) -> SimBackend:
    return SimBackend(SimOptions.of(**{"engine": "llama-8b-h100", "control_port": 0, **settings}))


def load(sim: SimBackend) -> tuple[int, int]:
    """Sequences that run and that wait."""
    shown = sim.snapshot()["engine"]
    return shown["running"], shown["waiting"]


def is_idle(sim: SimBackend) -> bool:
    return load(sim) == (0, 0) and sim.snapshot()["engine"]["kv_usage"] == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_takes_the_models_time(http: aiohttp.ClientSession, stream: bool) -> None:
    """Streamed or whole, no less; without an engine it is there at once."""
    body = {**CHAT, "stream": stream, "stream_options": {"include_usage": True}} if stream else CHAT
    async with an_engine(answer_tokens=60) as sim:
        began = time.monotonic()
        async with http.post(f"{sim.base_url}/v1/chat/completions", json=body) as response:
            text = await response.text()
        took_s = time.monotonic() - began
        tokens = sim.snapshot()["tokens"]["generated"]
        assert (response.status, 30 <= tokens <= 90) == (200, True)
        assert ("[DONE]" in text) is stream
        assert took_s >= tokens * LLAMA_8B_H100.iteration_s
        assert is_idle(sim)


async def test_tokens_are_streamed_as_they_are_generated(http: aiohttp.ClientSession) -> None:
    """The first ones come long before the last one, and none before its time."""
    body = {**CHAT, "stream": True, "max_tokens": 200}
    async with an_engine(answer_tokens=LONG) as sim:
        began, times = time.monotonic(), []
        async with http.post(f"{sim.base_url}/v1/chat/completions", json=body) as response:
            async for line in response.content:
                if b'"content":"' in line and b'"content":""' not in line:
                    times.append(time.monotonic() - began)
                    if len(times) == 1:
                        assert load(sim) == (1, 0)
        assert len(times) == 200
        assert all(at >= number * LLAMA_8B_H100.iteration_s for number, at in enumerate(times, 1))


@pytest.mark.parametrize(
    ("path", "body", "tokens"),
    [
        ("chat/completions", {**CHAT, "n": 3}, 36),
        ("chat/completions", {**CHAT, "n": 3, "stream": True}, 36),
        ("completions", {"model": "m", "prompt": ["a", "b"], "stream": True}, 24),
        ("responses", {"model": "m", "input": "x", "stream": True}, 12),
        ("embeddings", {"model": "m", "input": ["a", "b", "c"]}, 0),
    ],
    ids=["choices", "choices streamed", "prompts", "responses", "embeddings"],
)
async def test_every_endpoint_is_answered(
    http: aiohttp.ClientSession, path: str, body: dict[str, Any], tokens: int
) -> None:
    """Whole, by as many sequences as it has answers, of at least half the mean length each."""
    async with an_engine() as sim:
        async with http.post(f"{sim.base_url}/v1/{path}", json=body) as response:
            text = await response.text()
        counted = sim.snapshot()
        assert (response.status, counted["by_status"]) == (200, {"200": 1}), text
        assert counted["tokens"]["generated"] >= tokens
        assert counted["tokens"]["undelivered"] == 0
        assert is_idle(sim)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_frees_its_place(http: aiohttp.ClientSession, stream: bool) -> None:
    """The sequence and its memory; what it had got counts as undelivered."""
    async with an_engine(answer_tokens=LONG) as sim:
        task = asyncio.ensure_future(
            http.post(f"{sim.base_url}/v1/chat/completions", json={**CHAT, "stream": stream}, timeout=None)
        )
        await eventually(lambda: sim.snapshot()["engine"]["kv_usage"] > 0)
        await eventually(lambda: task.done() or not stream)
        if stream:
            response = task.result()
            await response.content.readline()
            response.close()
        else:
            task.cancel()
        await eventually(lambda: is_idle(sim))
        await eventually(lambda: sim.snapshot()["by_status"] == {"disconnected": 1})
        assert 0 < sim.snapshot()["tokens"]["undelivered"] < LONG


async def test_a_stream_that_is_cut_frees_its_place(http: aiohttp.ClientSession) -> None:
    """On purpose, after a few events of a long answer."""
    async with an_engine(answer_tokens=LONG) as sim:
        await sim.control({"mode": "stream", "break": "eof", "after_events": 3})
        async with http.post(f"{sim.base_url}/v1/chat/completions", json={**CHAT, "stream": True}) as response:
            assert b"[DONE]" not in await response.read()
        await eventually(lambda: is_idle(sim))


async def test_a_full_memory_shows_on_the_page_of_metrics(http: aiohttp.ClientSession) -> None:
    """Nothing is refused: what does not fit waits, and runs when a place is free."""
    body = {"model": "m", "prompt": "x" * 4 * PLACE_TOKENS, "max_tokens": LONG}
    async with an_engine(engine="qwen-7b-gb200", answer_tokens=LONG, context_window=10**6) as sim:

        async def page() -> dict[str, float]:
            async with http.get(f"{sim.base_url}/metrics") as response:
                lines = (await response.text()).splitlines()
            named = (line.partition("{") for line in lines if not line.startswith("#"))
            return {name: float(rest.partition("} ")[2]) for name, _, rest in named}

        asking = [
            asyncio.ensure_future(http.post(f"{sim.base_url}/v1/completions", json=body, timeout=None))
            for _ in range(5)
        ]
        await eventually(lambda: sum(load(sim)) == 5 and sim.snapshot()["engine"]["kv_usage"] > 0.9)
        shown, counted = await page(), sim.snapshot()["engine"]
        assert shown["vllm:num_requests_running"] + shown["vllm:num_requests_waiting"] == 5
        assert shown["vllm:num_requests_waiting"] >= 2
        assert 0.45 < shown["vllm:kv_cache_usage_perc"] <= 1.0
        assert counted.keys() == {"running", "waiting", "kv_usage", "preemptions"}
        for task in asking[:4]:
            task.cancel()
        await eventually(lambda: load(sim) == (1, 0))
        asking[4].cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await eventually(lambda: is_idle(sim))


async def test_what_can_never_fit_is_refused(http: aiohttp.ClientSession) -> None:
    """With the error of a prompt that is too long, which names the engine's memory."""
    body = json.dumps({"model": "m", "prompt": "x" * 4 * QWEN_7B_GB200.kv_tokens}).encode()
    async with an_engine(engine="qwen-7b-gb200", context_window=10**6) as sim:
        async with http.post(f"{sim.base_url}/v1/completions", data=io.BytesIO(body)) as response:
            error = (await response.json())["error"]
        assert (response.status, error["code"]) == (400, "context_length_exceeded")
        assert str(QWEN_7B_GB200.kv_tokens) in error["message"]
        assert sim.snapshot()["prompts"]["tokens"] == 0
        assert is_idle(sim)


async def test_the_engine_is_changed_while_it_runs(http: aiohttp.ClientSession) -> None:
    """What runs ends where it began; a reset goes back to the settings of the start, and counts anew."""
    async with SimBackend(SimOptions.of(latency="1ms", control_port=0, answer_tokens=LONG)) as sim:
        assert "engine" not in sim.snapshot()
        await sim.control({"settings": {"engine": "llama-8b-h100", "latency": 0}})
        url = f"{sim.base_url}/v1/chat/completions"
        asking = asyncio.ensure_future(http.post(url, json={**CHAT, "max_tokens": 100}))
        await eventually(lambda: load(sim) == (1, 0))
        await sim.control({"settings": {"engine": "qwen-7b-gb200"}})
        assert load(sim) == (0, 0)
        async with await asking as response:
            assert (await response.json())["usage"]["completion_tokens"] == 100
        await sim.reset()
        assert "engine" not in sim.snapshot()


async def test_slots_stand_before_the_engine(http: aiohttp.ClientSession) -> None:
    """As with a proxy that limits requests: the page counts both queues as waiting."""
    async with an_engine(answer_tokens=LONG, max_concurrency=2, overload="queue") as sim:
        url = f"{sim.base_url}/v1/chat/completions"
        asking = [asyncio.ensure_future(http.post(url, json=CHAT)) for _ in range(5)]
        await eventually(lambda: load(sim)[0] == 2 and sim.snapshot()["waiting"] == 3)
        async with http.get(f"{sim.base_url}/metrics") as response:
            page = await response.text()
        assert 'vllm:num_requests_running{model_name="simulated"} 2\n' in page
        assert 'vllm:num_requests_waiting{model_name="simulated"} 3\n' in page
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await eventually(lambda: is_idle(sim))
