"""What the worker counted while it ran, and what the report says about its answers afterwards, are the same."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.rig import Rig, WorkerProcess, rig
from tests.support.waiting import until
from worker.client.io.outputs import decode_answer, message_line
from worker.client.report import RunReport, read_report
from worker.client.report.results import Spread
from worker.emulators.openai import SimOptions
from worker.emulators.pubsub import LocalPubSubThread

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

Observed = tuple[float, float]
"""Number and sum of some durations, seconds."""
LONG = "word " * 1500
"""Over 1,024 tokens, so that part of the prompts comes from a cache."""


def chat(model: str, text: str = "hello", **more: Any) -> dict[str, Any]:
    return {"path": "/v1/chat/completions", "body": {"model": model, "messages": _says(text), **more}}


def _says(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


REQUESTS = [
    *(chat("large", f"{LONG} {n}", stream=True) for n in range(40)),
    *(chat("small", f"hello {n}") for n in range(30)),
    *({"path": "/v1/embeddings", "body": {"model": "vectors", "input": f"text {n}"}} for n in range(12)),
    *({"path": "/v1/nope", "body": {"model": "small", "n": n}} for n in range(5)),
    *(chat("small", f"bad {n}", messages=f"no list {n}") for n in range(7)),
    *(chat("filtered", f"hello {n}") for n in range(3)),
    *(chat("breaks", f"hello {n}", stream=True) for n in range(4)),
]
BEHAVIOURS = [
    {"mode": "content_filter", "match": {"model": "filtered"}},
    {"mode": "stream", "break": "rst", "after_events": 4, "match": {"model": "breaks"}},
]


DURATIONS = {
    "ttft_s": "time_to_first_token_seconds",
    "tpot_s": "time_per_output_token_seconds",
    "ttlt_s": "request_duration_seconds",
    "queue_s": "queue_wait_seconds",
}
"""In the report, and as a histogram; the run makes one attempt for each request."""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[tuple[Rig, WorkerProcess]]:
    """A worker that measures, in front of a backend that reasons, caches, refuses and breaks streams."""
    options = SimOptions.of(latency="5ms", reasoning_tokens=5, control_port=0)
    with LocalPubSubThread() as server, rig(server.address, tmp_path, options) as built:
        built.sim.control({"behaviours": BEHAVIOURS})
        yield (
            built,
            built.worker(
                reply__include_stats="true",
                pubsub__max_delivery_attempts=1,  # the first failure of any kind is answered
                backend__breaker__failures=50,
            ),
        )


def _collect(built: Rig, path: Path) -> None:
    """Write the answers as `local` and `collect` do."""
    lines: dict[str, bytes] = {}
    while len(lines) < built.sent:
        messages = built.admin.take_once(built.response_subscription, 20)
        assert messages, f"{len(lines)} of {built.sent} answered"
        for message in messages:
            attributes = dict(message.attributes)
            answer = decode_answer(message.data, attributes)
            lines[attributes["request_message_id"]] = message_line("line-1-00000000", answer)
    path.write_bytes(b"".join(lines.values()))


def _counted(worker: WorkerProcess, name: str, *labels: str, without: str = "nack") -> Counter[tuple[str, ...]]:
    """Return a metric by the values of some labels, zeros left out."""
    counts: Counter[tuple[str, ...]] = Counter()
    for family in text_string_to_metric_families(worker.get("/metrics")[1]):
        for sample in family.samples:
            if sample.name == f"inference_worker_{name}" and without not in sample.labels.values() and sample.value:
                counts[tuple(sample.labels[label] for label in labels)] += sample.value
    return counts


def _observed(worker: WorkerProcess, name: str) -> dict[str, Observed]:
    """Return a histogram by model."""
    counts, sums = (_counted(worker, f"{name}_{part}", "model") for part in ("count", "sum"))
    return {model: (count, sums[(model,)]) for (model,), count in counts.items()}


def _added(observed: Iterable[Observed]) -> Observed:
    counts, sums = zip(*observed, strict=True)
    return sum(counts), sum(sums)


def _summed(spread: Spread) -> Observed:
    return spread.count, (spread.mean or 0.0) * spread.count


def _same(observed: Observed) -> Any:
    """Equal in number, and in sum but for what six decimals take from each."""
    count, seconds = observed
    return count, pytest.approx(seconds, abs=1e-6 * max(1.0, count))


def _tokens(report: RunReport) -> Counter[tuple[str, ...]]:
    pairs = [(group.name, kind, tokens.total) for group in report.models for kind, tokens in group.tokens.items()]
    return Counter({(model, kind): total for model, kind, total in pairs if total})


def test_report_and_live_metrics_agree(run: tuple[Rig, WorkerProcess], tmp_path: Path) -> None:
    """By status, error class and model, for all four kinds of tokens, partial answers, and number and sum of every duration."""
    built, worker = run
    built.publish(len(REQUESTS), lambda n: json.dumps({"metadata": {"index": n}, **REQUESTS[n]}).encode())
    output = tmp_path / "out.jsonl"
    _collect(built, output)
    until(
        lambda: sum(_counted(worker, "deliveries_total", "reason").values()) == len(REQUESTS)
    )  # an answer is seen first
    report, failure = read_report(str(output))
    assert failure is None
    assert report.total.answers == len(REQUESTS)

    statuses = Counter({(status,): number for status, number in report.total.statuses.items()})
    assert _counted(worker, "requests_total", "status_code") == statuses
    classes = {group.name: group.answers for group in report.error_classes}
    live = _counted(worker, "deliveries_total", "reason")
    assert live.pop(("ok",)) == report.total.answers - report.total.errors == 82
    assert live == Counter({(name,): number for name, number in classes.items()})
    assert {"bad_message": 5, "invalid_request": 7, "content_filter": 3}.items() <= classes.items()
    assert sum(classes.values()) == 19

    models = {group.name: group.answers for group in report.models}
    requests = _counted(worker, "requests_total", "model")
    assert requests.pop(("none",)) == models.pop("(unknown)") == 5, "what was no request has no model"
    assert requests == Counter({(name,): number for name, number in models.items()})

    assert _tokens(report) == _counted(worker, "tokens_total", "model", "kind")
    assert {kind for _, kind in _tokens(report)} == {"input", "output", "input_cached", "output_reasoning"}

    partial = sum(_counted(worker, "partial_responses_total", "reason").values())
    assert report.total.truncated == partial == 4
    for name, metric in DURATIONS.items():
        live = _observed(worker, metric)
        reported = [group.durations[name] for group in (report.total, *report.error_classes)]
        assert _added(map(_summed, reported)) == _same(_added(live.values())), name
        for group in report.models:
            if not group.errors and group.durations[name].count:
                assert _summed(group.durations[name]) == _same(live[group.name]), (name, group.name)
    large = next(group for group in report.models if group.name == "large")
    assert all(large.durations[name].count == large.answers == 40 for name in DURATIONS)


def test_a_local_run_can_be_reported(tmp_path: Path) -> None:
    """`local` measures without being asked, in both shapes of lines; the report has times of every good answer."""
    requests, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl.gz"
    lines = [json.dumps({"metadata": {"n": n}, **chat("m", f"hello {n}", stream=True)}) for n in range(20)]
    for n in range(20):
        body = {"model": "b", "input": f"text {n}"}
        lines.append(json.dumps({"custom_id": f"c{n}", "method": "POST", "url": "/v1/embeddings", "body": body}))
    requests.write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "worker"]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([*command, "local", requests, output], check=True, capture_output=True, timeout=90, env=environ)
    told = subprocess.run(
        [*command, "report", "--json", output], check=True, capture_output=True, timeout=60, env=environ
    )
    report = json.loads(told.stdout)
    assert (report["total"]["answers"], report["total"]["errors"], report["timed"]) == (40, 0, 40)
    assert {name: group["answers"] for name, group in report["models"].items()} == {"b": 20, "m": 20}
    assert report["models"]["m"]["durations"]["ttft_s"]["count"] == 20
    assert report["models"]["b"]["durations"]["ttft_s"]["missing"] == 20, "what is not streamed has no first token"
    assert report["total"]["tokens"]["output"]["missing"] == 20, "nor has an embedding output"
    assert report["answers_per_s"] > 0
