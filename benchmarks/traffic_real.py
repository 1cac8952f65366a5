"""
People beside a batch against the clock: `inference-worker run`, the embedded Pub/Sub server, the simulated backend.

The backend serves 16 requests at once and lets the others wait; the first token of an answer comes after 100 ms, then
50 a second.  People come at random, eight a second for 10 s of each 15 s, and read streams.
"""

import asyncio
import random
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.traffic_engine import Latency, quantile
from tests.support.rig import Rig, rig
from tests.support.waiting import until
from worker.emulators.openai import SimOptions
from worker.emulators.pubsub import LocalPubSubThread

SLOTS = 16
SECONDS, BUSY_S, CYCLE_S = 45.0, 10.0, 15.0
PEOPLE_PER_S = 8.0
MESSAGES = 2_000
"""More than the backend answers in that time."""
OPTIONS = SimOptions.of(
    dialect="vllm",
    max_concurrency=SLOTS,
    overload="queue",
    ttft="100ms",
    latency="100ms",
    tokens_per_s=50,
    control_port=0,
)
LARGE = {"backend__window__initial": 64, "backend__window__min": 64, "backend__window__max": 64}
OTHERS = f'[{{"metric": "vllm:num_requests_running", "whole_at": 0, "closed_at": {SLOTS}, "without_own": true}}]'
PROTECTIONS: Mapping[str, Mapping[str, Any] | None] = {
    "no batch": None,
    "window of 64": LARGE,
    "adaptive window": {"backend__window__max": 64},
    "window of 64, gate `vllm`": {**LARGE, "backend__metric_gate__type": "vllm"},
    "window of 16, gate by the load of others": {
        **dict.fromkeys(LARGE, SLOTS),
        "backend__metric_gate__type": "metrics",
        "backend__metric_gate__signals": OTHERS,
    },
}


def interactive_real(seed: int, protection: Mapping[str, Any] | None) -> Latency:
    """Let people ask the backend while a worker drains a subscription there; `None`: no worker."""
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalPubSubThread() as server,
        rig(server.address, Path(folder), OPTIONS) as built,
    ):
        if protection is not None:
            built.publish(MESSAGES)
            worker = built.worker(**protection)
            until(lambda: worker.metric("inference_worker_requests_total") > 0, 60, "it answers")
        before = built.stats()["tokens"]["generated"]
        first, whole, own_tokens = asyncio.run(_people(seed, built))
        tokens = built.stats()["tokens"]["generated"] - before - own_tokens
    return Latency(
        quantile(first, 0.5), quantile(first, 0.99), quantile(whole, 0.5), quantile(whole, 0.99), tokens / SECONDS
    )


async def _people(seed: int, built: Rig) -> tuple[list[float], list[float], int]:
    """Return their seconds to the first token and to the end, and the tokens they got."""
    dice = random.Random(seed)
    first, whole, tokens = list[float](), list[float](), 0

    async def person(session: aiohttp.ClientSession, number: int) -> None:
        nonlocal tokens
        body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": f"person {number}"}]}
        began, is_first = time.monotonic(), True
        async with session.post(f"{built.sim.base_url}/v1/chat/completions", json=body) as response:
            async for line in response.content:
                if b'"content":"' in line and b'"content":""' not in line:
                    tokens += 1
                    if is_first:
                        first.append(time.monotonic() - began)
                        is_first = False
        whole.append(time.monotonic() - began)

    timeout = aiohttp.ClientTimeout(total=300)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session, asyncio.TaskGroup() as people:
        began, number = time.monotonic(), 0
        while (now := time.monotonic() - began) < SECONDS:
            number += 1
            people.create_task(person(session, number))
            rate = PEOPLE_PER_S if now % CYCLE_S < BUSY_S else PEOPLE_PER_S / 10.0
            await asyncio.sleep(dice.expovariate(rate))
    return first, whole, tokens
