"""What is recorded: one line and one count per settlement, times and tokens, and never what a requester wrote."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest

from tests.support.fakes import GOOD, GOOD_BODY, REFUSED, Answer, FakeBackend, FakePublisher, status
from tests.support.pipeline import Pipeline, a_delivery, data, message
from tests.support.virtual_time import unix_time, virtual_time
from worker.delivery import Reply
from worker.errors import PublishRefusedError
from worker.flow.lane import BreakerChange
from worker.policy.model import Decision, Disposition, ErrorClass, Fault, Phase
from worker.ports import AttemptResult
from worker.telemetry.error_share import ErrorShare
from worker.telemetry.metrics import Metrics
from worker.telemetry.record import MAX_LOGGED_MODEL_BYTES, Measures, Recorder, measure
from worker.wire.message import ReceivedMessage
from worker.wire.usage import Usage

SECRET = "the prompt of a requester"
FAILED = Decision(disposition=Disposition.NACK, error_class=ErrorClass.SERVER_ERROR)


def _settlements(logs) -> list[dict]:
    events = ("delivery_answered", "duplicate_acked", "delivery_nacked")
    return [line for line in logs if line["event"] in events]


@virtual_time
async def test_a_good_answer_is_one_info_line_with_everything(logs) -> None:
    """Who, where, how long, how much; nothing of the request or of the answer."""
    backend = FakeBackend(Answer(seconds=2.0, headers={"x-request-id": "b-1"}))
    pipeline = Pipeline(backend)
    body = {"model": "m", "messages": [{"role": "user", "content": SECRET}]}
    await pipeline.handle(message(data(body, metadata={"k": SECRET}), message_id="id", attempt=2))
    (line,) = _settlements(logs)
    assert (line["event"], line["log_level"]) == ("delivery_answered", "info")
    expected = {
        "message_id": "id",
        "delivery_attempt": 2,
        "backend": "fake",
        "path": "/v1/chat/completions",
        "model": "m",
        "attempts": 1,
        "total_s": 2.0,
        "attempt_s": 2.0,
        "backend_request_id": "b-1",
        "disposition": "reply",
        "status_code": 200,
        "bytes": len(GOOD_BODY),
        "output_tokens": 5,
    }
    assert expected.items() <= line.items()
    assert SECRET not in repr(line)


@virtual_time
async def test_an_error_answer_says_class_rule_and_the_backends_words(logs) -> None:
    """The line alone tells why; so does the answer of a deadline that passed after a hold."""
    pipeline = Pipeline(FakeBackend(status(400)))
    await pipeline.handle(message(attempt=1))
    (line,) = _settlements(logs)
    assert (line["error_class"], line["rule"], line["error"]) == ("invalid_request", "builtin:invalid_request", "no")
    assert (line["backend_status"], line["status_code"], line["disposition"]) == (400, 400, "reply")


@pytest.mark.parametrize(
    ("payload", "words"),
    [(b"{", "truncated"), (b'{"path":"/v1/x"}', "body is missing"), (b'{"body":{}}', "path is missing")],
)
@virtual_time
async def test_what_is_no_request_is_told_with_class_and_reason(logs, payload: bytes, words: str) -> None:
    """The line alone says what is wrong with the producer's messages."""
    await Pipeline().handle(message(payload))
    (line,) = _settlements(logs)
    assert (line["status_code"], line["error_class"]) == (400, "bad_message")
    assert words in line["error"]


@virtual_time
async def test_an_answer_that_takes_anothers_place_is_told_with_its_class(logs) -> None:
    """The attempt was good; the answer was too large for the broker."""
    pipeline = Pipeline(FakeBackend(Answer(body=b'{"choices":[{"a":"%s"}]}' % (b"x" * 10_000_000))))
    await pipeline.handle()
    (line,) = _settlements(logs)
    assert (line["status_code"], line["error_class"]) == (502, "reply_too_large")
    assert line["error"].startswith("the answer has 10000")


@pytest.mark.parametrize(("ratio", "lines"), [(1.0, 100), (0.5, 50), (0.25, 25), (0.01, 1), (0.0, 0)])
@virtual_time
async def test_of_good_answers_a_share_has_a_line(logs, ratio: float, lines: int) -> None:
    """Evenly spread, beginning with the first; metrics count them all."""
    pipeline = Pipeline(FakeBackend(), answer_ratio=ratio)
    for number in range(100):
        await pipeline.handle(message(message_id=str(number)))
    written = [int(line["message_id"]) for line in _settlements(logs)]
    assert written == [number * round(1 / ratio) for number in range(lines)] if ratio else not written
    assert pipeline.count("deliveries_total", "ack", "ok") == 100


@virtual_time
async def test_errors_nacks_and_duplicates_always_have_a_line(logs) -> None:
    """However few of the good ones do."""
    pipeline = Pipeline(FakeBackend(status(400), status(503), GOOD, status(500)), answer_ratio=0)
    received = message(attempt=1)
    await pipeline.handle(message(attempt=1))
    await pipeline.handle(received)
    await pipeline.handle(received)
    await pipeline.handle(message(attempt=1))
    await pipeline.handle(message(b"{"))
    assert [(line["event"], line.get("status_code")) for line in logs] == [
        ("delivery_answered", 400),
        ("attempt_held", None),
        ("duplicate_acked", None),
        ("delivery_nacked", None),
        ("delivery_answered", 400),
    ]


@virtual_time
async def test_a_late_answer_is_told_as_what_it_is(logs) -> None:
    """Not as the hold that came before it."""
    pipeline = Pipeline(FakeBackend(then=REFUSED))
    await pipeline.handle(message(data(deadline=unix_time() + 20), attempt=1))
    line = _settlements(logs)[-1]
    assert (line["error_class"], line["disposition"]) == ("deadline_exceeded", "reply")


@virtual_time
async def test_a_nack_is_a_warning_with_its_reason(logs) -> None:
    """One line and one count, by class; a drain is a reason of its own."""
    pipeline = Pipeline(FakeBackend(status(500)))
    await pipeline.handle(message(attempt=1))
    pipeline.processor.begin_drain()
    await pipeline.handle(message(attempt=1))
    assert [(line["log_level"], line["reason"]) for line in _settlements(logs)] == [
        ("warning", "server_error"),
        ("warning", "drain"),
    ]
    assert pipeline.count("deliveries_total", "nack", "server_error") == 1
    assert pipeline.count("deliveries_total", "nack", "drain") == 1


@virtual_time
async def test_what_is_held_is_a_warning_and_no_settlement(logs) -> None:
    """A hold is told each time it begins, and the time of it stands in the line of the settlement."""
    pipeline = Pipeline(FakeBackend(status(503), REFUSED))
    await pipeline.handle(message(attempt=1))
    assert [line["error_class"] for line in logs if line["event"] == "attempt_held"] == ["overloaded", "connect"]
    (line,) = _settlements(logs)
    assert line["attempts"] == 3
    assert line["held_s"] > 0


@virtual_time
async def test_an_answer_that_cannot_be_published_needs_a_person(logs) -> None:
    """An error line, a nack of that reason, and a count of the request as nacked."""
    pipeline = Pipeline(publisher=FakePublisher(), lease_s=60.0)
    pipeline.publisher.always = PublishRefusedError("gone")
    await pipeline.handle()
    (line,) = _settlements(logs)
    assert line["log_level"] == "error"
    assert pipeline.count("deliveries_total", "nack", "publish_failed") == 1
    assert pipeline.count("requests_total", "fake", "other", "m", "nack", "none") == 1


@virtual_time
async def test_a_redelivery_is_told_apart_from_an_answer(logs) -> None:
    """It is acked as a duplicate and counts as no answer."""
    pipeline, received = Pipeline(), message()
    await pipeline.handle(received)
    await pipeline.handle(received)
    assert [line["event"] for line in _settlements(logs)] == ["delivery_answered", "duplicate_acked"]
    assert pipeline.count("deliveries_total", "ack", "ok") == 1
    assert pipeline.count("deliveries_total", "ack", "duplicate") == 1
    assert pipeline.error_share.answers == 1


@virtual_time
async def test_counts_times_and_tokens_of_answers() -> None:
    """Every metric of an answer, with labels from closed sets only."""
    pipeline = Pipeline(FakeBackend(Answer(seconds=3.0), status(400)))
    await pipeline.handle(message(publish_time=unix_time() - 30))
    await pipeline.handle()
    text = generate_latest(pipeline.metrics.registry).decode()
    for line in (
        'requests_total{backend="fake",model="m",outcome="ok",path="other",status_code="200"} 1.0',
        'requests_total{backend="fake",model="m",outcome="error_reply",path="other",status_code="400"} 1.0',
        'tokens_total{backend="fake",kind="output",model="m",path="other"} 5.0',
        'request_duration_seconds_sum{backend="fake",model="m",outcome="ok",path="other"} 3.0',
        'queue_wait_seconds_sum{backend="fake",model="m",path="other"} 30.0',
        'attempts_total{backend="fake",disposition="reply",error_class="none"} 1.0',
        'attempts_total{backend="fake",disposition="reply",error_class="invalid_request"} 1.0',
        "in_flight 0.0",
        "publish_duration_seconds_count 2.0",
    ):
        assert f"inference_worker_{line}\n" in text
    assert pipeline.error_share.answers == 2


def _recorder(pipeline: Pipeline, **more: object) -> Recorder:
    return Recorder(Metrics(), pipeline.error_share, wall_clock=unix_time, **more)


@virtual_time
async def test_labels_stay_few_whatever_requesters_send() -> None:
    """Paths only from the settings, models up to a few, then `other`."""
    pipeline = Pipeline()
    for n in range(40):
        await pipeline.handle(message(data({"model": f"model-{n}"})))
    text = generate_latest(pipeline.metrics.registry).decode()
    models = {line.split('model="')[1].split('"')[0] for line in text.splitlines() if "requests_total{" in line}
    assert len(models) == 21
    assert "other" in models


@virtual_time
async def test_stats_only_when_wanted_and_never_of_an_untried_message() -> None:
    """Without an attempt there is nothing to tell."""
    pipeline = Pipeline()
    delivery = a_delivery()
    assert _recorder(pipeline, include_stats=True).stats(delivery) is None
    await pipeline.handle()
    assert "stats" not in pipeline.answer.json


@virtual_time
async def test_stats_say_null_for_what_is_not_known() -> None:
    """Absent is null and never zero; a held message says how long."""
    pipeline = Pipeline(FakeBackend(status(429), Answer(body=b'{"choices":[{}]}')), include_stats=True)
    await pipeline.handle(message(attempt=1))
    stats = pipeline.answer.json["stats"]
    assert stats["tokens"] == {"input": None, "output": None, "input_cached": None, "output_reasoning": None}
    assert (stats["ttft_s"], stats["tpot_s"], stats["streamed"]) == (None, None, False)
    assert (stats["attempts"], stats["delivery_attempt"]) == (2, 1)
    assert stats["request_time"].startswith("2023-11-14T22:13:2")
    assert stats["request_time"].endswith("Z")


@pytest.mark.parametrize("count", [10**30, -1, 2**63])
def test_a_count_that_is_nonsense_costs_no_answer(count: int) -> None:
    """Neither metrics nor `stats` choke on what a backend claims."""

    @virtual_time
    async def run() -> None:
        body = b'{"choices":[{}],"usage":{"prompt_tokens":%d,"completion_tokens":4}}' % count
        pipeline = Pipeline(FakeBackend(Answer(body=body)), include_stats=True)
        await pipeline.handle()
        assert pipeline.answer.json["status_code"] == 200
        assert pipeline.answer.json["stats"]["tokens"]["input"] is None
        assert pipeline.count("internal_errors_total") == 0

    run()


@virtual_time
async def test_a_breaker_is_logged_when_it_opens_and_when_it_closes(logs) -> None:
    """Once each, whatever runs at the time; the second line says how long the backend got probes only."""
    pipeline = Pipeline(FakeBackend(then=REFUSED))
    handling = [pipeline.start(message(attempt=1)) for _ in range(8)]
    await asyncio.sleep(20)
    pipeline.backend.then = GOOD
    await asyncio.gather(*handling)
    opened, closed = [line for line in logs if line["event"].startswith("breaker_")]
    assert (opened["event"], opened["log_level"]) == ("breaker_opened", "warning")
    assert (closed["event"], closed["log_level"]) == ("breaker_closed", "info")
    assert opened["backend"] == closed["backend"] == "fake"
    assert opened["error_class"] == closed["error_class"] == "connect"
    assert 20 < closed["open_s"] < 25
    assert "model" not in opened


# Times and tokens of an attempt: one computation for stats, metrics, log and spans.

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
    measures = measure(a_result(12.0, 17.0, streamed=True, stream_usage=COUNTS, body=b'{"choices":[]}'), is_good=True)
    assert (measures.ttft_s, measures.ttlt_s, measures.tpot_s) == (2.0, 7.0, 0.5)
    assert measures.usage == Usage(input=30, output=11, input_cached=20, output_reasoning=4)
    assert measures.streamed


def test_a_whole_answer_has_no_first_token() -> None:
    """Null and not 0; its tokens are in its body."""
    measures = measure(a_result(None, 17.0, body=UNARY), is_good=True)
    assert (measures.ttft_s, measures.ttlt_s, measures.tpot_s) == (None, 7.0, None)
    assert measures.usage == Usage(input=3, output=5)


def test_the_tokens_of_a_stream_are_known_although_its_answer_does_without() -> None:
    """A request that streams without asking for usage gets none, and is counted all the same."""
    result = a_result(stream_usage={"prompt_tokens": 7}, body=UNARY)
    assert measure(result, is_good=True).usage == measure(result, is_good=False).usage == Usage(input=7)


def test_the_body_of_an_error_has_no_usage() -> None:
    """Whatever it says: nothing was answered."""
    assert measure(a_result(body=UNARY), is_good=False).usage == Usage()


@pytest.mark.parametrize(
    "usage", [None, {}, {"completion_tokens": 0}, {"completion_tokens": 1}, {"completion_tokens": "x"}]
)
def test_a_time_per_token_needs_more_than_one(usage: dict[str, Any] | None) -> None:
    """One token has no pace, and neither has an unknown number of them."""
    assert measure(a_result(12.0, 17.0, stream_usage=usage), is_good=True).tpot_s is None


def test_a_failure_has_the_time_it_took() -> None:
    """How long until it failed is told; an attempt that never ended has none."""
    assert measure(a_result(None, 11.0), is_good=False).ttlt_s == 1.0
    assert measure(a_result(12.0), is_good=False) == Measures(ttft_s=2.0)


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.none() | st.integers(-3, 10**6), st.none() | st.floats(0, 1e5))
def test_the_definitions_hold(until_first: float, rest: float, output: int | None, started: float | None) -> None:
    """TTFT <= TTLT, and TPOT times the tokens after the first is the time after it."""
    start = started or 0.0
    result = AttemptResult(started=start, first_token_at=start + until_first, ended=start + until_first + rest)
    result.stream_usage = None if output is None else {"output_tokens": output}
    measures = measure(result, is_good=True)
    assert measures.ttft_s is not None
    assert measures.ttlt_s is not None
    assert measures.ttft_s <= measures.ttlt_s
    if measures.tpot_s is None:
        assert output is None or output <= 1
    else:
        assert output is not None
        assert measures.tpot_s * (output - 1) == pytest.approx(measures.ttlt_s - measures.ttft_s)


# In the answer and in the metrics

STREAMED = Answer(first_token_s=2.0, seconds=7.0, result={"stream_usage": COUNTS, "content_events": 11})
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
    """When its first token came and when it broke; no tokens, since none were counted."""
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
    salvaged = Answer(first_token_s=1.0, seconds=3.0, result={"stream_usage": COUNTS, "salvaged_tokens": 40})
    undone = Answer(first_token_s=0.5, seconds=1.0, result={"missing_done": True})
    busy = status(429)
    pipeline = Pipeline(FakeBackend(STREAMED, whole, BROKEN, salvaged, undone, busy, busy, whole), include_stats=True)
    for _ in range(6):
        await pipeline.handle(message(attempt=5))
    stats = [answer.json["stats"] for answer in pipeline.answers]
    for metric, key in [("time_to_first_token_seconds", "ttft_s"), ("time_per_output_token_seconds", "tpot_s")]:
        known = [each[key] for each in stats if each[key] is not None]
        assert observed(pipeline, metric) == (len(known), pytest.approx(sum(known), abs=1e-6 * len(known)))
    (held_s,) = [each["held_s"] for each in stats if each["held_s"]]
    assert observed(pipeline, "held_seconds") == (1, pytest.approx(held_s, abs=1e-6))  # rounded to a microsecond
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


@pytest.mark.parametrize("model", ["m" * 300, "é" * 300, "m" * 1_000_000])
def test_a_breaker_line_is_short_whatever_the_model_is_called(logs, model: str) -> None:
    """The name comes from a requester; its beginning is enough to know it."""
    recorder = Recorder(Metrics(), ErrorShare(now=lambda: 0.0))
    recorder.breaker_changed("default", BreakerChange(lane=model, error_class="timeout", open_s=None))
    (line,) = logs
    assert model.startswith(line["model"].rstrip("…"))
    assert 100 < len(line["model"].encode()) <= MAX_LOGGED_MODEL_BYTES


def _of_variant(variant: str | None, *, first_token_at: float | None = 1.5) -> AttemptResult:
    result = AttemptResult(started=1.0, ended=3.0, first_token_at=first_token_at, variant=variant, body=GOOD_BODY)
    result.status = 200
    return result


@virtual_time
async def test_variants_are_compared_in_metrics_stats_and_log(logs) -> None:
    """How many attempts, how long, how soon, how many tokens; by route and variant."""
    metrics = Metrics()
    recorder = Recorder(metrics, ErrorShare(60, now=lambda: 0.0), include_stats=True)
    for variant, decision in (("blue", Decision(disposition=Disposition.REPLY)), ("green", FAILED)):
        delivery = a_delivery(received=ReceivedMessage(message_id="m", data=b"{}"))
        delivery.backend, delivery.result, delivery.decision = "aws", _of_variant(variant), decision
        recorder.attempt_judged(delivery, decision)
        if decision.error_class is None:
            recorder.answered(delivery, Reply(status_code=200, body=GOOD_BODY))
        stats = recorder.stats(delivery)
        assert stats is not None
        assert json.loads(stats)["variant"] == variant
    scraped = generate_latest(metrics.registry).decode()
    for line in (
        'variant_attempts_total{backend="aws",error_class="none",variant="blue"} 1.0',
        'variant_attempts_total{backend="aws",error_class="server_error",variant="green"} 1.0',
        'variant_duration_seconds_sum{backend="aws",outcome="ok",variant="blue"} 2.0',
        'variant_duration_seconds_sum{backend="aws",outcome="error",variant="green"} 2.0',
        'variant_time_to_first_token_seconds_sum{backend="aws",variant="blue"} 0.5',
        'variant_tokens_total{backend="aws",kind="output",variant="blue"} 5.0',
    ):
        assert f"inference_worker_{line}" in scraped
    assert [line["variant"] for line in _settlements(logs)] == ["blue"]


@virtual_time
async def test_a_backend_without_variants_says_nothing_of_them(logs) -> None:
    """No series, no key, no field."""
    metrics = Metrics()
    recorder = Recorder(metrics, ErrorShare(60, now=lambda: 0.0), include_stats=True)
    delivery = a_delivery(received=ReceivedMessage(message_id="m", data=b"{}"))
    delivery.backend, delivery.result = "aws", _of_variant(None)
    delivery.decision = decision = Decision(disposition=Disposition.REPLY)
    recorder.attempt_judged(delivery, decision)
    recorder.answered(delivery, Reply(status_code=200, body=GOOD_BODY))
    assert "variant=" not in generate_latest(metrics.registry).decode()
    assert "variant" not in json.loads(recorder.stats(delivery) or b"{}")
    assert "variant" not in _settlements(logs)[0]


@virtual_time
async def test_the_number_of_variants_in_labels_is_bounded(logs) -> None:
    """A service that names a new one each time does not fill the memory."""
    metrics = Metrics()
    recorder = Recorder(metrics, ErrorShare(60, now=lambda: 0.0))
    for number in range(100):
        delivery = a_delivery(received=ReceivedMessage(message_id="m", data=b"{}"))
        delivery.backend, delivery.result = "aws", _of_variant(f"v{number}")
        recorder.attempt_judged(delivery, Decision(disposition=Disposition.REPLY))
    series = [
        line for line in generate_latest(metrics.registry).decode().splitlines() if "variant_attempts_total{" in line
    ]
    assert len(series) <= 21
    assert any('variant="other"' in line for line in series)
