"""One trace id from the publisher's attribute to the backend's header, the answer's attribute and a collector."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.rig import Rig, chat, rig
from tests.support.tracing import PARENT, TRACE, TRACEPARENT, Collector, collector
from worker.emulators.openai import SimOptions
from worker.emulators.pubsub import LocalPubSubThread

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

SEEN = {"mode": "raw", "status": 200, "body": json.dumps({"id": "seen", "model": "m-1", "choices": [{}]})}


@pytest.fixture
def traced(tmp_path: Path) -> Iterator[tuple[Rig, Collector]]:
    """A backend that answers in a way of its own what carries the publisher's trace id."""
    options = SimOptions.of(latency="5ms", control_port=0)
    with (
        collector() as there,
        LocalPubSubThread() as server,
        rig(server.address, tmp_path, options) as built,
    ):
        built.sim.control({**SEEN, "match": {"header": {"traceparent": f"00-{TRACE}-"}}})
        yield built, there


def test_one_trace_from_the_publisher_to_the_consumer(traced: tuple[Rig, Collector]) -> None:
    """Process, attempt and publish are one trace below the publisher's span; the worker sends all of them at its end."""
    built, there = traced
    worker = built.worker(tracing__enabled="true", tracing__endpoint=there.url, tracing__service_name="batch")
    built.admin.publish(built.requests, chat(0), traceparent=TRACEPARENT)
    built.admin.publish(built.requests, chat(1))
    built.sent = 2
    answers = built.collect()
    assert answers.by_index[0][0]["body"]["id"] == "seen", "the backend saw the trace id"
    assert answers.by_index[1][0]["body"]["id"] != "seen"
    worker.terminate()
    assert worker.wait(20) == 0

    assert there.services == {"batch"}
    spans = {span.name.split()[0]: span for span in there.spans if span.trace_id.hex() == TRACE}
    assert sorted(spans) == ["chat", "process", "send"]
    process = spans["process"]
    assert process.parent_span_id.hex() == PARENT
    assert {spans[name].parent_span_id for name in ("chat", "send")} == {process.span_id}
    out = answers.attributes[0][0]["traceparent"]
    assert out == f"00-{TRACE}-{spans['send'].span_id.hex()}-01"
    assert process.start_time_unix_nano <= spans["chat"].start_time_unix_nano <= spans["send"].start_time_unix_nano
    assert process.end_time_unix_nano >= spans["send"].end_time_unix_nano
    others = {span.trace_id for span in there.spans} - {process.trace_id}
    assert len(others) == 1, "the other message has a trace of its own"
    assert answers.attributes[1][0]["traceparent"].split("-")[1] == others.pop().hex()


def test_googles_client_as_publisher_is_the_parent(traced: tuple[Rig, Collector]) -> None:
    """What its own tracing writes into the message is understood: `googclient_traceparent`."""
    built, there = traced
    worker = built.worker(tracing__enabled="true", tracing__endpoint=there.url)
    built.admin.publish(built.requests, chat(0), googclient_traceparent=TRACEPARENT)
    built.sent = 1
    assert built.collect().by_index[0][0]["body"]["id"] == "seen"
    worker.terminate()
    assert worker.wait(20) == 0
    assert {span.trace_id.hex() for span in there.spans} == {TRACE}


def test_a_collector_that_is_away_costs_no_answer(traced: tuple[Rig, Collector]) -> None:
    """Spans are lost, the answers are not, and the worker ends as it does without tracing."""
    built, _ = traced
    worker = built.worker(tracing__enabled="true", tracing__endpoint="http://127.0.0.1:9")
    built.publish(20)
    assert built.collect().count == 20
    worker.terminate()
    assert worker.wait(20) == 0
