"""From a message to its answer over streams that break: partial answers, clean retries, continuation."""

import json
import random
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest

from tests.support.pipeline import METADATA, Pipeline, data, message
from tests.support.random_bodies import canon
from tests.support.raw_http import Open
from worker.emulators.openai import SimBackend, SimOptions
from worker.ports import Settlement
from worker.settings.schema import BreakerSettings

ACK, NACK = Settlement.ACK, Settlement.NACK
BODY = {"model": "m", "messages": [{"role": "user", "content": "Tell me something long."}]}
BREAKS = ["rst", "eof", "close_eof", "chunk_cut", "mid_chunk", "bad_chunk"]
PATIENT = BreakerSettings(failures=1000)


class NoJitter(random.Random):
    """Waits between attempts are as short as they may be."""

    def random(self) -> float:
        return 0.0


@pytest.fixture
async def sim() -> AsyncIterator[SimBackend]:
    async with SimBackend(SimOptions.of(dialect="vllm", answer_tokens=40)) as backend:
        yield backend


@pytest.fixture
def open_backend(open_backend: Open) -> Open:
    """Backends that are asked for streams wherever that is possible, unless a test says otherwise."""
    return partial(open_backend, stream="auto")


def pipeline_of(open_backend: Open, sim: SimBackend, **route: Any) -> Pipeline:
    backend: Any = open_backend(sim.base_url, name="fake", timeouts={"idle_s": 0.2, "total_s": 10}, **route)
    pipeline = Pipeline(backend, include_stats=True, breaker=PATIENT, outage_detection_s=0.01)
    pipeline.processor._random = NoJitter()
    return pipeline


def text_of(body: dict[str, Any]) -> str:
    return str(body["choices"][0]["message"]["content"])


async def whole(open_backend: Open, sim: SimBackend, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The unstreamed answer."""
    pipeline = pipeline_of(open_backend, sim, stream="never")
    await pipeline.handle(message(data(body or BODY)))
    answer: dict[str, Any] = pipeline.answer.json["body"]
    return answer


@pytest.mark.parametrize("kind", [*BREAKS, "idle", "comments"])
async def test_out_of_tries_the_partial_goes_out(sim: SimBackend, open_backend: Open, kind: str) -> None:
    """However a stream breaks: an error, what had come, the metadata, the attribute, and stats of the failure."""
    expected = text_of(await whole(open_backend, sim))
    await sim.control({"mode": "stream", "break": kind, "after_events": 8, "comment_every_s": 0.02})
    pipeline = pipeline_of(open_backend, sim)
    assert await pipeline.handle(message(data(BODY), attempt=5)) is ACK
    answer = pipeline.answer.json
    is_idle = kind in {"idle", "comments"}
    assert (answer["status_code"], answer["metadata"]) == (504 if is_idle else 502, METADATA)
    assert answer["body"]["error"]["code"] == ("stream_idle" if is_idle else "stream_broken")
    partial = text_of(answer["body"]["partial"])
    assert partial
    assert expected.startswith(partial)
    assert answer["body"]["truncated"] is True
    assert pipeline.answer.attributes["truncated"] == "true"
    assert answer["stats"]["streamed"] is True
    assert 0 <= answer["stats"]["ttft_s"] <= answer["stats"]["ttlt_s"]
    assert set(answer["stats"]["tokens"].values()) == {None}


@pytest.mark.parametrize("kind", BREAKS)
async def test_a_retry_says_nothing_twice(sim: SimBackend, open_backend: Open, kind: str) -> None:
    """After a redelivery the answer is the whole one and its tokens are those of the last attempt."""
    expected = await whole(open_backend, sim)
    await sim.control({"mode": "stream", "break": kind, "after_events": 8, "count": 1})
    pipeline = pipeline_of(open_backend, sim)
    assert await pipeline.handle(message(data(BODY), attempt=1, message_id="m")) is NACK
    assert await pipeline.handle(message(data(BODY), attempt=2, message_id="m")) is ACK
    answer = pipeline.answer.json
    assert text_of(answer["body"]) == text_of(expected)
    assert answer["body"]["usage"] == expected["usage"]
    assert answer["stats"]["tokens"]["output"] == expected["usage"]["completion_tokens"]
    assert answer["stats"]["salvaged_tokens"] is None


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
@pytest.mark.parametrize("kind", [*BREAKS, "idle", "error_event"])
@pytest.mark.parametrize("more", [{}, {"max_tokens": 30}])
async def test_a_broken_stream_is_continued(
    sim: SimBackend, open_backend: Open, dialect: str, kind: str, more: dict[str, Any]
) -> None:
    """The answer is the one that a stream without the break would have given, and nothing was generated twice."""
    await sim.control({"settings": {"dialect": dialect}})
    body = {**BODY, **more}
    expected = await whole(open_backend, sim, body)
    await sim.reset(["stats"])
    await sim.control({"mode": "stream", "break": kind, "after_events": 8, "count": 1})
    pipeline = pipeline_of(open_backend, sim, continuation=dialect)
    assert await pipeline.handle(message(data(body), attempt=1)) is ACK
    answer = pipeline.answer.json
    assert text_of(answer["body"]) == text_of(expected)
    assert answer["body"]["choices"][0]["finish_reason"] == expected["choices"][0]["finish_reason"]
    stats = answer["stats"]
    assert (stats["attempts"], stats["salvaged_tokens"]) == (2, 7)
    assert stats["salvaged_tokens"] + stats["tokens"]["output"] == expected["usage"]["completion_tokens"]
    assert sim.stats.tokens_generated <= expected["usage"]["completion_tokens"] + 1
    assert pipeline.count("salvaged_tokens_total", "fake", "other", "m") == 7


async def test_it_is_continued_more_than_once(sim: SimBackend, open_backend: Open) -> None:
    """Each attempt adds its part."""
    expected = await whole(open_backend, sim)
    await sim.control({"mode": "stream", "break": "rst", "after_events": 8, "count": 2})
    pipeline = pipeline_of(open_backend, sim, continuation="vllm")
    assert await pipeline.handle(message(data(BODY), attempt=1)) is ACK
    answer = pipeline.answer.json
    assert text_of(answer["body"]) == text_of(expected)
    assert (answer["stats"]["attempts"], answer["stats"]["salvaged_tokens"]) == (3, 14)


async def test_out_of_tries_all_parts_go_out(sim: SimBackend, open_backend: Open) -> None:
    """The partial of a continuation begins where the answer began."""
    expected = text_of(await whole(open_backend, sim))
    await sim.control({"mode": "stream", "break": "rst", "after_events": 8})
    pipeline = pipeline_of(open_backend, sim, continuation="vllm")
    assert await pipeline.handle(message(data(BODY), attempt=1)) is ACK
    answer = pipeline.answer.json
    assert answer["body"]["error"]["code"] == "stream_broken"
    partial = text_of(answer["body"]["partial"])
    assert expected.startswith(partial)
    assert len(partial.split()) == 21


@pytest.mark.parametrize("dialect", ["openai", "azure"])
async def test_a_server_that_refuses_starts_anew(sim: SimBackend, open_backend: Open, dialect: str) -> None:
    """The same attempt then asks for the whole answer, and gets it."""
    await sim.control({"settings": {"dialect": dialect}})
    expected = await whole(open_backend, sim)
    await sim.control({"mode": "stream", "break": "rst", "after_events": 8, "count": 1})
    pipeline = pipeline_of(open_backend, sim, continuation="vllm")
    assert await pipeline.handle(message(data(BODY), attempt=1)) is ACK
    answer = pipeline.answer.json
    assert canon(answer["body"]) == canon(expected)
    assert (answer["stats"]["attempts"], answer["stats"]["salvaged_tokens"]) == (2, None)


async def test_what_is_not_text_starts_anew(sim: SimBackend, open_backend: Open) -> None:
    """Thoughts cannot be put into a message: the delivery is nacked."""
    await sim.control({"settings": {"reasoning_tokens": 4}})
    await sim.control({"mode": "stream", "break": "rst", "after_events": 8, "count": 1})
    pipeline = pipeline_of(open_backend, sim, continuation="vllm")
    assert await pipeline.handle(message(data(BODY), attempt=1)) is NACK


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_what_was_salvaged_outlives_other_failures(sim: SimBackend, open_backend: Open, status: int) -> None:
    """The attempt that was to go on was answered with an error: the one after it goes on."""
    expected = await whole(open_backend, sim)
    broken = {"mode": "stream", "break": "rst", "after_events": 8, "count": 1}
    error = {"error": {"message": "no", "type": "t", "param": None, "code": None}}
    fails = {"mode": "raw", "status": status, "body": json.dumps(error), "count": 1}
    await sim.control({"behaviours": [broken, fails]})
    pipeline = pipeline_of(open_backend, sim, continuation="vllm")
    assert await pipeline.handle(message(data(BODY), attempt=1)) is ACK
    answer = pipeline.answer.json
    assert text_of(answer["body"]) == text_of(expected)
    assert answer["stats"]["salvaged_tokens"] == 7
