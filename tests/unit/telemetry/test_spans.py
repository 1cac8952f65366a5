"""One trace per message: who is whose child, what stands in a span, and what goes out."""

import json
import re
from pathlib import Path

import pytest
from opentelemetry.trace import SpanKind, StatusCode

from tests.support.fakes import REFUSED, Answer, FakeBackend, FakePayloads, FakePublisher, status
from tests.support.pipeline import Pipeline, data, message, referring
from tests.support.tracing import PARENT, TRACE, TRACEPARENT, KeptSpans, parent_id, span_id, trace_id
from tests.support.virtual_time import EPOCH, settle, unix_time, virtual_time
from worker.errors import PayloadError, PublishRefusedError, PublishRetryableError
from worker.policy.model import Fault
from worker.telemetry.spans import find_parent

SECRET = "the prompt of a requester"
OTHER = "00-11111111111111111111111111111111-2222222222222222-01"
USAGE = {
    "prompt_tokens": 812, "completion_tokens": 156,
    "prompt_tokens_details": {"cached_tokens": 512}, "completion_tokens_details": {"reasoning_tokens": 40},
}  # fmt: skip


def body(**more):
    choices = [{"index": 0, "message": {"content": SECRET}, "finish_reason": "stop"}]
    return json.dumps({"id": "c-1", "model": "m-2026", "choices": choices, "usage": USAGE, **more}).encode()


def carried(headers):
    """Return trace id and span id of a `traceparent`."""
    return tuple(headers["traceparent"].split("-")[1:3])


@virtual_time
async def test_one_trace_from_the_publisher_to_the_answer():
    """Process is the publisher's child, attempt and publish are its children; each passes its own context on."""
    kept, backend = KeptSpans(), FakeBackend()
    pipeline = Pipeline(backend, tracer=kept.tracer)
    await pipeline.handle(message(attributes={"traceparent": TRACEPARENT, "tracestate": "vendor=1"}))
    process, attempt, send = kept.one("process requests-worker"), kept.one("chat m"), kept.one("send responses")
    assert [span.kind for span in (process, attempt, send)] == [SpanKind.CONSUMER, SpanKind.CLIENT, SpanKind.PRODUCER]
    assert {trace_id(span) for span in kept.all} == {TRACE}
    assert parent_id(process) == PARENT
    assert parent_id(attempt) == parent_id(send) == span_id(process)
    assert carried(backend.requests[0].headers) == (TRACE, span_id(attempt))
    assert backend.requests[0].headers["tracestate"] == "vendor=1"
    assert carried(pipeline.answer.attributes) == (TRACE, span_id(send))
    assert {span.status.status_code for span in kept.all} == {StatusCode.UNSET}


@pytest.mark.parametrize(
    ("attributes", "metadata", "parent"),
    [
        ({"traceparent": TRACEPARENT, "googclient_traceparent": OTHER}, {"traceparent": OTHER}, TRACE),
        ({"googclient_traceparent": TRACEPARENT}, {"traceparent": OTHER}, TRACE),
        ({}, {"traceparent": TRACEPARENT}, TRACE),
        ({"traceparent": "nonsense"}, {"traceparent": TRACEPARENT}, TRACE),
        ({"traceparent": f"00-{'0' * 32}-{PARENT}-01"}, {}, None),
        ({}, {"traceparent": 7}, None),
        ({}, {"nested": {"traceparent": TRACEPARENT}}, None),
        ({}, {}, None),
    ],
)
def test_where_the_publishers_context_is_looked_for(attributes, metadata, parent):
    """W3C's attribute, Google's client's, the metadata; what is invalid is passed over."""
    context = find_parent(attributes, json.dumps(metadata).encode())
    found = [span.get_span_context().trace_id for span in context.values()]
    assert found == ([int(parent, 16)] if parent else [])


@pytest.mark.parametrize("metadata", [b"", b'{"traceparent"', b'{"traceparent":"\xff"}', b'["traceparent"]'])
def test_metadata_that_cannot_be_read_has_no_context(metadata):
    """It is the requester's; nothing breaks."""
    assert find_parent({}, metadata) == {}


@virtual_time
async def test_without_a_publishers_span_a_trace_begins_here():
    """The process span is its root."""
    kept = KeptSpans()
    await Pipeline(tracer=kept.tracer).handle()
    assert parent_id(kept.one("process")) is None
    assert len({trace_id(span) for span in kept.all}) == 1


@virtual_time
async def test_an_attempt_says_what_it_cost():
    """OpenTelemetry's names for generative AI, and no word of prompt or answer."""
    kept = KeptSpans()
    answer = Answer(body=body(), seconds=3.0, first_token_s=1.0, headers={"x-request-id": "b-1"})
    pipeline = Pipeline(FakeBackend(answer), tracer=kept.tracer)
    await pipeline.handle(message(data({"model": "m", "messages": [{"role": "user", "content": SECRET}]})))
    assert dict(kept.one("chat m").attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "m",
        "gen_ai.request.stream": True,
        "gen_ai.response.id": "c-1",
        "gen_ai.response.model": "m-2026",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.response.time_to_first_chunk": 1.0,
        "gen_ai.usage.input_tokens": 812,
        "gen_ai.usage.output_tokens": 156,
        "gen_ai.usage.cache_read.input_tokens": 512,
        "gen_ai.usage.reasoning.output_tokens": 40,
        "http.response.status_code": 200,
        "server.address": "gpu.example",
        "server.port": 8443,
        "inference_worker.backend": "fake",
        "inference_worker.attempt": 1,
        "inference_worker.backend_request_id": "b-1",
    }
    assert SECRET not in "".join(span.to_json() for span in kept.all)


@virtual_time
async def test_a_delivery_says_how_long_it_waited_and_how_it_was_settled():
    """Pub/Sub's names, queue wait and time held; the span begins with the receipt and lasts until the settlement."""
    kept = KeptSpans()
    pipeline = Pipeline(FakeBackend(status(429), Answer(seconds=2.0)), tracer=kept.tracer)
    await pipeline.handle(message(message_id="id", attempt=3, ordering_key="k", publish_time=unix_time() - 30))
    span = kept.one("process")
    held = span.attributes["inference_worker.held_s"]
    assert held > 0
    assert dict(span.attributes) == {
        "messaging.system": "gcp_pubsub",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "requests-worker",
        "messaging.destination.subscription.name": "requests-worker",
        "messaging.message.id": "id",
        "messaging.message.body.size": len(data()),
        "messaging.gcp_pubsub.message.delivery_attempt": 3,
        "messaging.gcp_pubsub.message.ordering_key": "k",
        "inference_worker.settlement": "ack",
        "inference_worker.attempts": 2,
        "inference_worker.queue_s": 30.0,
        "inference_worker.held_s": held,
        "inference_worker.status_code": 200,
        "inference_worker.backend": "fake",
    }
    assert span.start_time == EPOCH * 1e9
    assert span.end_time - span.start_time == pytest.approx((held + 2.0) * 1e9, abs=1e4)


@virtual_time
async def test_every_try_is_a_span_and_failures_say_why():
    """Refused, overloaded, then good: three attempts, numbered, of which two have failed; the delivery has not."""
    kept = KeptSpans()
    await Pipeline(FakeBackend(REFUSED, status(503)), tracer=kept.tracer).handle()
    attempts = kept.of("chat m")
    assert [span.attributes["inference_worker.attempt"] for span in attempts] == [1, 2, 3]
    assert [span.attributes.get("error.type") for span in attempts] == ["connect", "overloaded", None]
    assert [span.attributes.get("inference_worker.phase") for span in attempts] == ["connect", "parse", None]
    assert [span.status.status_code for span in attempts] == [StatusCode.ERROR, StatusCode.ERROR, StatusCode.UNSET]
    assert attempts[1].status.description == "no"
    assert attempts[0].end_time <= attempts[1].start_time
    assert kept.one("process").status.status_code is StatusCode.UNSET


@pytest.mark.parametrize(
    ("build", "error", "settlement"),
    [
        (lambda: {"backend": status(400)}, "invalid_request", "ack"),
        (lambda: {"payload": data(path="/v1/nope")}, "bad_message", "ack"),
        (lambda: {"payload": b"nonsense"}, "bad_message", "ack"),
        (lambda: {"payload": data(deadline=1)}, "deadline_exceeded", "ack"),
        (lambda: {"backend": status(500)}, "server_error", "nack"),
        (lambda: {"backend": Answer(error=RuntimeError("bug"))}, "internal_error", "nack"),
    ],
    ids=["refused", "path", "no request", "late", "nacked", "bug"],
)
def test_what_went_wrong_with_a_delivery_is_its_error_type(build, error, settlement):
    """The same word as in metrics, logs and attributes, whether it is answered or nacked."""

    @virtual_time
    async def run():
        kept, case = KeptSpans(), build()
        pipeline = Pipeline(FakeBackend(then=case.get("backend", Answer())), tracer=kept.tracer)
        await pipeline.handle(message(case.get("payload"), attempt=1, attributes={"traceparent": TRACEPARENT}))
        span = kept.one("process")
        assert (span.attributes["error.type"], span.status.status_code) == (error, StatusCode.ERROR)
        assert span.attributes["inference_worker.settlement"] == settlement
        assert trace_id(span) == TRACE
        for published in pipeline.answers:
            assert carried(published.attributes) == (TRACE, span_id(kept.one("send")))
            assert kept.one("send").attributes["inference_worker.error_class"] == error

    run()


@virtual_time
async def test_a_refused_request_keeps_the_context_of_its_metadata():
    """What was wrong with it does not cost the trace."""
    kept = KeptSpans()
    await Pipeline(tracer=kept.tracer).handle(message(data(metadata={"traceparent": TRACEPARENT}, unknown_key=1)))
    assert parent_id(kept.one("process")) == PARENT


@virtual_time
async def test_an_answer_that_needs_several_tries_is_one_publish():
    """It says how many; one that the broker never takes is an error, and so is its delivery."""
    kept = KeptSpans()
    publisher = FakePublisher(PublishRetryableError("away"), PublishRetryableError("away"))
    await Pipeline(publisher=publisher, tracer=kept.tracer).handle()
    assert kept.one("send").attributes["inference_worker.publish_attempts"] == 3
    publisher.always = PublishRefusedError("gone")
    kept = KeptSpans()
    await Pipeline(publisher=publisher, tracer=kept.tracer, lease_s=60.0).handle()
    for span in (kept.one("send"), kept.one("process")):
        assert (span.attributes["error.type"], span.status.status_code) == ("publish_failed", StatusCode.ERROR)
    assert kept.one("process").attributes["inference_worker.settlement"] == "nack"


@virtual_time
async def test_each_try_to_read_or_write_a_body_is_a_span():
    """Beside the attempt and inside the publish; what failed says why, and no URI stands in it."""
    kept, payloads = KeptSpans(), FakePayloads(a=b'{"model":"m"}')
    payloads.failures.append(PayloadError(Fault.PAYLOAD_UNAVAILABLE, "503"))
    large = Answer(body=body() + b" " * 2_000)
    pipeline = Pipeline(FakeBackend(large), publisher=FakePublisher(limit=1_500), tracer=kept.tracer, payloads=payloads)
    await pipeline.handle(message(referring("gs://b/a")))
    away, read = kept.of("read body")
    assert dict(away.attributes) == {"inference_worker.body_bytes": 0, "error.type": "payload_unavailable"}
    assert dict(read.attributes) == {"inference_worker.body_bytes": 13}
    assert dict(kept.one("write body").attributes) == {"inference_worker.body_bytes": len(large.body)}
    process = span_id(kept.one("process"))
    assert {parent_id(span) for span in (away, read, kept.one("write body"))} == {process}
    assert kept.one("send").attributes["inference_worker.status_code"] == 200


@virtual_time
async def test_an_attempt_that_is_given_up_ends_as_cancelled():
    """A shutdown cuts it; every span that was begun has ended."""
    kept, backend = KeptSpans(), FakeBackend()
    backend.hold()
    pipeline = Pipeline(backend, tracer=kept.tracer)
    handling = pipeline.start(message(attempt=1))
    await settle()
    handling.cancel()
    await handling
    assert kept.one("chat m").attributes["error.type"] == "cancelled"
    assert kept.one("process").attributes["inference_worker.settlement"] == "nack"
    assert kept.of("send") == []


@virtual_time
async def test_a_redelivery_of_what_was_answered_says_so():
    """It is settled without an attempt and is no error."""
    kept = KeptSpans()
    pipeline, received = Pipeline(tracer=kept.tracer), message()
    await pipeline.handle(received)
    await pipeline.handle(received)
    first, second = kept.of("process")
    assert "inference_worker.duplicate" not in first.attributes
    assert second.attributes["inference_worker.duplicate"] is True
    assert second.status.status_code is StatusCode.UNSET
    assert len(kept.of("chat")) == len(kept.of("send")) == 1


@virtual_time
async def test_what_a_publisher_does_not_record_is_passed_on_unrecorded():
    """No span is kept, and backend and consumer learn of both trace and decision."""
    kept, backend = KeptSpans(), FakeBackend()
    pipeline = Pipeline(backend, tracer=kept.tracer)
    await pipeline.handle(message(attributes={"traceparent": TRACEPARENT[:-1] + "0"}))
    assert kept.all == []
    for carrier in (backend.requests[0].headers, pipeline.answer.attributes):
        assert carrier["traceparent"].startswith(f"00-{TRACE}-")
        assert carrier["traceparent"].endswith("-00")


@pytest.mark.parametrize(("ratio", "count"), [(0.0, 0), (1.0, 3)])
def test_the_ratio_is_about_traces_that_begin_here(ratio, count):
    """A publisher's decision stands above it."""

    @virtual_time
    async def run():
        kept = KeptSpans(sample_ratio=ratio)
        pipeline = Pipeline(tracer=kept.tracer)
        await pipeline.handle()
        assert len(kept.all) == count
        await pipeline.handle(message(attributes={"traceparent": TRACEPARENT}))
        assert len(kept.all) == count + 3

    run()


@virtual_time
async def test_the_answers_own_context_is_not_overwritten_by_a_copied_one():
    """`copy_attributes: ["*"]` copies everything of the request but this."""
    kept = KeptSpans()
    pipeline = Pipeline(tracer=kept.tracer, copy_attributes=("*",))
    await pipeline.handle(message(attributes={"traceparent": TRACEPARENT, "mine": "1"}))
    assert pipeline.answer.attributes["mine"] == "1"
    assert carried(pipeline.answer.attributes) == (TRACE, span_id(kept.one("send")))


def test_documented_attributes_are_exactly_the_real_ones():
    """What dashboards are built on stands in docs/tracing.md, nothing less and nothing that is gone."""
    name = r"(?:inference_worker|gen_ai|messaging|server|http|error)\.[a-z_.]+"
    root = Path(__file__).parents[3]
    source = (root / "worker" / "telemetry" / "spans.py").read_text("utf-8")
    documented = (root / "docs" / "tracing.md").read_text("utf-8")
    assert set(re.findall(f"`({name})`", documented)) == set(re.findall(f'"({name})"', source))


@virtual_time
async def test_log_lines_name_the_trace(logs):
    """From a line to its trace, and back."""
    await Pipeline(tracer=KeptSpans().tracer).handle(message(attributes={"traceparent": TRACEPARENT}))
    (line,) = [line for line in logs if line["event"] == "delivery_answered"]
    assert line["trace_id"] == TRACE


@virtual_time
async def test_off_nothing_is_read_and_nothing_goes_out(logs):
    """The default: a request's context is as foreign as any other attribute."""
    backend = FakeBackend()
    pipeline = Pipeline(backend)
    await pipeline.handle(message(attributes={"traceparent": TRACEPARENT}))
    assert "traceparent" not in backend.requests[0].headers
    assert "traceparent" not in pipeline.answer.attributes
    assert not any("trace_id" in line for line in logs)
