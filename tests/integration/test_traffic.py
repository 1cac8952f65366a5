"""Several real servers behind the pipeline: which one gets what, and what happens when one of them goes away."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tests.support.pipeline import Pipeline, data, message
from tests.support.virtual_time import unix_time
from worker.backends.openai import HttpBackend
from worker.emulators.openai import SimBackend, SimOptions
from worker.ports import Settlement
from worker.settings.schema import Settings

ACK = Settlement.ACK
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
async def sims() -> AsyncIterator[list[SimBackend]]:
    """Two servers; their control ports answer when the servers do not."""
    async with SimBackend(SimOptions.of(control_port=0)) as one, SimBackend(SimOptions.of(control_port=0)) as other:
        yield [one, other]


@pytest.fixture
async def closing() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


def pipeline_of(closing: AsyncExitStack, *routes: dict[str, Any]) -> Pipeline:
    """Return a pipeline to real servers, built as `worker.service` does it."""
    settings = Settings.model_validate({"routes": list(routes)})
    backends = [HttpBackend(target) for route in settings.all_routes() for target in route.targets()]
    for backend in backends:
        closing.push_async_callback(backend.aclose)
    return Pipeline(*backends, routes=list(routes))  # type: ignore[arg-type]


async def run(pipeline: Pipeline, count: int, body: dict[str, Any] | None = None) -> Counter[str]:
    """Send so many messages; return how many answers name each backend."""
    before = len(pipeline.answers)
    settled = await asyncio.gather(*(pipeline.handle(message(data(body or BODY), attempt=1)) for _ in range(count)))
    assert set(settled) == {ACK}
    assert {answer.json["status_code"] for answer in pipeline.answers[before:]} == {200}
    return Counter(answer.attributes["backend"] for answer in pipeline.answers[before:])


async def test_a_server_that_goes_away_costs_nothing(sims: list[SimBackend], closing: AsyncExitStack) -> None:
    """Every message is answered at its first delivery, and the server has its share again when it is back."""
    one, other = sims
    breaker = {"probe_interval_s": 0.05, "max_probe_interval_s": 0.05}
    pipeline = pipeline_of(closing, {"name": "r", "base_urls": [one.base_url, other.base_url], "breaker": breaker})
    assert set(await run(pipeline, 60)) == {"r/1", "r/2"}
    await one.control({"mode": "refuse"})
    assert set(await run(pipeline, 60)) <= {"r/1", "r/2"}
    assert set(await run(pipeline, 60)) == {"r/2"}
    assert pipeline.count("deliveries_total", "nack", "connect") == 0
    await one.control({"mode": "ok"})
    while not (await run(pipeline, 20))["r/1"]:
        assert pipeline.targets[0].is_open()
    assert not pipeline.targets[0].is_open()
    pipeline.assert_nothing_leaks()


async def test_errors_of_one_server_are_not_answered(sims: list[SimBackend], closing: AsyncExitStack) -> None:
    """A 503 of one is a 200 of the other."""
    one, other = sims
    pipeline = pipeline_of(closing, {"name": "r", "base_urls": [one.base_url, other.base_url]})
    await one.control({"mode": "outage_5xx", "status": 503})
    assert await run(pipeline, 80) == {"r/2": 80}
    assert other.stats.by_status["200"] == 80


async def test_weights_and_models_of_their_own(sims: list[SimBackend], closing: AsyncExitStack) -> None:
    """One message in four goes to the new model, whose server hears its own name for it."""
    one, other = sims
    urls = [
        {"url": one.base_url, "name": "old", "weight": 3},
        {"url": other.base_url, "name": "new", "weight": 1, "model": "m-2"},
    ]
    pipeline = pipeline_of(closing, {"name": "r", "base_urls": urls})
    shares = await run(pipeline, 400)
    assert 60 < shares["r/new"] < 140
    models = {answer.attributes["backend"]: answer.json["body"]["model"] for answer in pipeline.answers}
    assert models == {"r/old": "m", "r/new": "m-2"}


async def test_a_route_takes_over_and_gives_back(sims: list[SimBackend], closing: AsyncExitStack) -> None:
    """The second route's own defaults apply there, and the first one is probed all the time."""
    one, other = sims
    breaker = {"probe_interval_s": 0.05, "max_probe_interval_s": 0.05}
    pipeline = pipeline_of(
        closing,
        {"name": "own", "base_url": one.base_url, "fallback": "cloud", "fallback_after_s": 0, "breaker": breaker},
        {"name": "cloud", "base_url": other.base_url, "only_fallback": True, "model": "big"},
    )
    supervisor = pipeline.supervisor()
    await one.control({"mode": "refuse"})
    tasks = asyncio.ensure_future(run(pipeline, 20))
    while not tasks.done():
        await supervisor.check()
        await asyncio.sleep(0)
    assert await tasks == {"cloud": 20}
    assert {answer.json["body"]["model"] for answer in pipeline.answers} == {"big"}
    await one.control({"mode": "ok"})
    while not (await run(pipeline, 5))["own"]:
        assert pipeline.targets[0].is_open()
    assert await run(pipeline, 5) == {"own": 5}
    pipeline.assert_nothing_leaks()


async def test_declared_changes_reach_the_server(sims: list[SimBackend], closing: AsyncExitStack) -> None:
    """And nothing else changes the body: the server's own count of tokens follows the override."""
    one, _ = sims
    pipeline = pipeline_of(
        closing, {"name": "r", "base_url": one.base_url, "body": {"overrides": {"max_tokens": 3}}, "model": "x"}
    )
    await run(pipeline, 1, {**BODY, "max_tokens": 50})
    body = pipeline.answer.json["body"]
    assert (body["model"], body["usage"]["completion_tokens"]) == ("x", 3)


async def test_a_deadline_that_cannot_be_met_costs_no_request(closing: AsyncExitStack) -> None:
    """The server hears nothing of it; a deadline that can be met is met."""
    async with SimBackend(SimOptions.of(latency="100ms")) as sim:
        pipeline = pipeline_of(closing, {"name": "r", "base_url": sim.base_url})
        await run(pipeline, 24)
        asked = sim.stats.requests
        late = message(data(BODY, deadline=unix_time() + 0.05))
        assert await pipeline.handle(late) is ACK
        assert pipeline.answers[-1].attributes["error_class"] == "deadline_exceeded"
        assert sim.stats.requests == asked
        assert await pipeline.handle(message(data(BODY, deadline=unix_time() + 30))) is ACK
        assert pipeline.answers[-1].json["status_code"] == 200
