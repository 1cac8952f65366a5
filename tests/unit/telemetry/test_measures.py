"""Times and tokens of an attempt: one computation for stats, metrics and log."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fakes import Answer, FakeBackend, status
from tests.support.pipeline import Pipeline, message
from tests.support.virtual_time import virtual_time
from worker.policy.model import Fault, Phase
from worker.ports import AttemptResult
from worker.telemetry.measures import Measures, measure
from worker.telemetry.usage import Usage

UNARY = b'{"usage":{"prompt_tokens":3,"completion_tokens":5}}'
COUNTS = {
    "prompt_tokens": 30,
    "completion_tokens": 11,
    "prompt_tokens_details": {"cached_tokens": 20},
    "completion_tokens_details": {"reasoning_tokens": 4},
}


def a_result(first: float | None = None, ended: float | None = None, **more: Any) -> AttemptResult:
    return AttemptResult(started=10.0, first_token_at=first, ended=ended, **more)


def test_a_streamed_answer_has_everything() -> None:
    """First token, last token, time per token after the first, and what the stream counted."""
    measures = measure(a_result(12.0, 17.0, streamed=True, usage=COUNTS), b'{"choices":[]}')
    assert (measures.ttft_s, measures.ttlt_s, measures.tpot_s) == (2.0, 7.0, 0.5)
    assert measures.usage == Usage(input=30, output=11, input_cached=20, output_reasoning=4)
    assert measures.streamed


def test_a_whole_answer_has_no_first_token() -> None:
    """Null and not 0; its tokens are in its body."""
    measures = measure(a_result(None, 17.0), UNARY)
    assert (measures.ttft_s, measures.ttlt_s, measures.tpot_s) == (None, 7.0, None)
    assert measures.usage == Usage(input=3, output=5)


def test_the_tokens_of_a_stream_are_known_although_its_answer_does_without() -> None:
    """A request that streams without asking for usage gets none, and is counted all the same."""
    assert measure(a_result(usage={"prompt_tokens": 7}), UNARY).usage == Usage(input=7)


@pytest.mark.parametrize(
    "usage", [None, {}, {"completion_tokens": 0}, {"completion_tokens": 1}, {"completion_tokens": "x"}]
)
def test_a_time_per_token_needs_more_than_one(usage: dict[str, Any] | None) -> None:
    """One token has no pace, and neither has an unknown number of them."""
    assert measure(a_result(12.0, 17.0, usage=usage), b"{}").tpot_s is None


def test_a_failure_has_the_time_it_took() -> None:
    """How long until it failed is told; an attempt that never ended has none."""
    assert measure(a_result(None, 11.0), b"{}").ttlt_s == 1.0
    assert measure(a_result(12.0), b"{}") == Measures(ttft_s=2.0)


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.none() | st.integers(-3, 10**6), st.none() | st.floats(0, 1e5))
def test_the_definitions_hold(until_first: float, rest: float, output: int | None, started: float | None) -> None:
    """TTFT <= TTLT, and TPOT times the tokens after the first is the time after it."""
    start = started or 0.0
    result = AttemptResult(started=start, first_token_at=start + until_first, ended=start + until_first + rest)
    result.usage = None if output is None else {"output_tokens": output}
    measures = measure(result, b"{}")
    assert measures.ttft_s is not None
    assert measures.ttlt_s is not None
    assert measures.ttft_s <= measures.ttlt_s
    if measures.tpot_s is None:
        assert output is None or output <= 1
    else:
        assert output is not None
        assert measures.tpot_s * (output - 1) == pytest.approx(measures.ttlt_s - measures.ttft_s)


# In the answer and in the metrics

STREAMED = Answer(first_token_s=2.0, seconds=7.0, result={"usage": COUNTS, "content_events": 11})
PARTIAL = b'{"choices":[{"index":0,"message":{"role":"assistant","content":"Hel"},"finish_reason":null}]}'
BROKEN = Answer(
    status=200,
    body=b"",
    fault=Fault.STREAM_BROKEN,
    phase=Phase.STREAM,
    first_token_s=1.0,
    seconds=4.0,
    result={"partial": PARTIAL, "content_events": 1},
)


@virtual_time
async def test_stats_of_a_streamed_answer() -> None:
    """All that was measured stands in the answer."""
    pipeline = Pipeline(FakeBackend(STREAMED), include_stats=True)
    await pipeline.handle()
    stats = pipeline.answer.json["stats"]
    assert (stats["ttft_s"], stats["ttlt_s"], stats["tpot_s"], stats["streamed"]) == (2.0, 7.0, 0.5, True)
    assert stats["tokens"] == {"input": 30, "output": 11, "input_cached": 20, "output_reasoning": 4}
    assert stats["salvaged_tokens"] is None


@virtual_time
async def test_stats_of_a_broken_stream() -> None:
    """When its first token came and when it broke; no tokens, since nobody counted them."""
    pipeline = Pipeline(FakeBackend(then=BROKEN), include_stats=True)
    await pipeline.handle(message(attempt=5))
    stats = pipeline.answer.json["stats"]
    assert (stats["ttft_s"], stats["ttlt_s"], stats["tpot_s"]) == (1.0, 4.0, None)
    assert set(stats["tokens"].values()) == {None}


def observed(pipeline: Pipeline, metric: str) -> tuple[float, float]:
    """Number and sum of a histogram's observations."""
    family = next(f for f in pipeline.metrics.registry.collect() if f.name == f"inference_worker_{metric}")
    values = {kind: sum(s.value for s in family.samples if s.name.endswith(kind)) for kind in ("_count", "_sum")}
    return values["_count"], values["_sum"]


@virtual_time
async def test_metrics_say_what_the_answers_say() -> None:
    """Over any mixture of ends, counts and sums are those of the answers' stats."""
    whole = Answer(seconds=1.0)
    salvaged = Answer(first_token_s=1.0, seconds=3.0, result={"usage": COUNTS, "salvaged_tokens": 40})
    undone = Answer(first_token_s=0.5, seconds=1.0, result={"missing_done": True})
    busy = status(429)
    pipeline = Pipeline(FakeBackend(STREAMED, whole, BROKEN, salvaged, undone, busy, busy, whole), include_stats=True)
    for _ in range(6):
        await pipeline.handle(message(attempt=5))
    stats = [answer.json["stats"] for answer in pipeline.answers]
    for metric, key in [("time_to_first_token_seconds", "ttft_s"), ("time_per_output_token_seconds", "tpot_s")]:
        known = [each[key] for each in stats if each[key] is not None]
        assert observed(pipeline, metric) == (len(known), pytest.approx(sum(known)))
    (held_s,) = [each["held_s"] for each in stats if each["held_s"]]
    assert observed(pipeline, "held_seconds") == (1, pytest.approx(held_s))
    labels = ("fake", "other", "m")
    for kind in ("input", "output", "input_cached", "output_reasoning"):
        assert pipeline.count("tokens_total", *labels, kind) == sum(each["tokens"][kind] or 0 for each in stats)
    assert pipeline.count("salvaged_tokens_total", *labels) == 40
    assert pipeline.count("missing_done_total", "fake") == 1
    assert pipeline.count("partial_responses_total", "stream_broken") == 1


@virtual_time
async def test_the_log_line_tells_the_first_token(logs: list[Any]) -> None:
    """Beside the attempt's time; nothing where nothing was streamed."""
    pipeline = Pipeline(FakeBackend(STREAMED, Answer()))
    await pipeline.handle()
    await pipeline.handle()
    lines = [line for line in logs if line["event"] == "delivery_answered"]
    assert [line.get("ttft_s") for line in lines] == [2.0, None]
    assert lines[0]["output_tokens"] == 11
