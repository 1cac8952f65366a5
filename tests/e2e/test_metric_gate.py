"""A worker whose window follows the load that others put on its engine."""

import json
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.rig import chat, rig
from tests.support.waiting import until
from worker.emulators.openai import SimOptions
from worker.emulators.pubsub import LocalPubSubThread

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]
GATE = {
    "backend__metric_gate__type": "vllm",
    "backend__metric_gate__interval_s": 0.1,
    "backend__metric_gate__timeout_s": 1,
    "backend__metric_gate__stale_after_s": 2,
    "backend__metric_gate__rise_s": 0.5,
    "backend__window__initial": 4,
    "backend__window__max": 4,
}


def interactive(url: str, index: int) -> threading.Thread:
    """Let one other client ask; ends when it has its answer, or when the server resets it."""

    def ask() -> None:
        body = json.loads(chat(index, "person"))["body"]
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        try:
            urllib.request.urlopen(request, timeout=120).close()
        except OSError:
            return

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    return thread


@contextmanager
def asking(url: str, body: dict[str, Any]) -> Iterator[None]:
    """Ask inside the block, and leave at its end without the answer."""
    data = json.dumps(body).encode()
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(data)}\r\n\r\n"
        client.sendall(head.encode() + data)
        yield


def test_a_batch_waits_while_others_fill_the_engine(tmp_path: Path) -> None:
    """With clients waiting at the engine nothing starts; once they are served all is answered, no attempt is spent."""
    options = SimOptions.of(control_port=0, max_concurrency=2, overload="queue", latency="30s")
    with LocalPubSubThread() as server, rig(server.address, tmp_path, options) as built:
        people = [interactive(built.sim.base_url, index) for index in range(8)]
        until(lambda: built.stats()["waiting"] == 6, 30, "clients wait at the engine")
        worker = built.worker(**GATE)
        worker.wait_started()
        until(lambda: worker.metric("inference_worker_metric_gate_stale", backend="default") == 0, 30, "it reads")
        built.publish(10)
        until(lambda: worker.metric("inference_worker_leased_messages") == 10, 30, "all are leased")
        status, text = worker.get("/readyz")
        shown = json.loads(text)["backends"]["default"]["metric_gate"]
        assert status == 200
        assert (shown["part"], shown["is_stale"], shown["error"]) == (0.0, False, None)
        assert shown["values"]["vllm:num_requests_waiting"] == 6
        assert built.stats()["by_path"]["/v1/chat/completions"] == 8
        built.sim.control({"settings": {"latency": "10ms", "max_concurrency": 64}})
        built.collect(10, 120)
        built.collect_rest(1)
        assert (built.answers.count, built.answers.duplicates) == (10, 0)
        assert built.answers.statuses == {200: 10}
        assert built.answers.attempts == {1: 10}
        worker.terminate()
        assert worker.wait(30) == 0
        del people


def test_a_batch_waits_for_the_memory_of_an_engine(tmp_path: Path) -> None:
    """Two long prompts fill it, and others wait: nothing starts; once their clients have left, all is answered."""
    options = SimOptions.of(control_port=0, engine="qwen-7b-gb200", context_window=10**6)
    with LocalPubSubThread() as server, rig(server.address, tmp_path, options) as built, ExitStack() as people:
        body = {"model": "m", "prompt": "x" * 4 * 147_000, "max_tokens": 10_000}
        built.sim.control({"mode": "say", "text": "word " * 10_000, "match": {"path": "/v1/completions"}})
        for _ in range(8):
            people.enter_context(asking(built.sim.base_url, body))
        until(lambda: built.stats()["engine"]["kv_usage"] > 0.9, 60, "the memory is full")
        until(lambda: built.stats()["engine"]["waiting"] >= 4, 30, "clients wait")
        worker = built.worker(**GATE)
        worker.wait_started()
        until(lambda: worker.metric("inference_worker_metric_gate_stale", backend="default") == 0, 30, "it reads")
        built.publish(10)
        until(lambda: worker.metric("inference_worker_leased_messages") == 10, 30, "all are leased")
        shown = json.loads(worker.get("/readyz")[1])["backends"]["default"]["metric_gate"]
        assert (shown["part"], shown["values"]["vllm:num_requests_waiting"] >= 4) == (0.0, True)
        assert "/v1/chat/completions" not in built.stats()["by_path"]
        people.close()
        until(lambda: built.stats()["engine"]["running"] == 0, 30, "their places are free")
        built.collect(10, 120)
        built.collect_rest(1)
        assert (built.answers.count, built.answers.duplicates) == (10, 0)
        assert built.answers.statuses == {200: 10}
        assert built.answers.attempts == {1: 10}
        worker.terminate()
        assert worker.wait(30) == 0


def test_a_source_that_is_away_closes_the_gate_until_it_is_back(tmp_path: Path) -> None:
    """From the start: told in log and metrics, nothing is sent, nothing is lost; then all is answered."""
    with LocalPubSubThread() as server, rig(server.address, tmp_path, SimOptions.of(control_port=0)) as built:
        built.sim.control({"mode": "outage_5xx", "match": {"path": "/metrics"}})
        worker = built.worker(**GATE)
        built.publish(10)
        stale = until(lambda: worker.event("metric_gate_stale"), 30, "it tells")
        assert (stale["gate"], "status 50" in stale["error"]) == ("closed", True)
        until(lambda: worker.metric("inference_worker_leased_messages") == 10, 30, "all are leased")
        assert worker.metric("inference_worker_metric_gate_failures_total", reason="refused") >= 1
        assert worker.metric("inference_worker_in_flight") == 0
        assert "/v1/chat/completions" not in built.stats()["by_path"]
        built.sim.control({"mode": "ok"})
        built.collect(10)
        built.collect_rest(1)
        assert built.answers.statuses == {200: 10}
        assert built.answers.attempts == {1: 10}
        assert worker.event("metric_gate_recovered") is not None
        worker.terminate()
        assert worker.wait(30) == 0


def test_an_open_gate_serves_without_its_source(tmp_path: Path) -> None:
    """The other side: a source that is away is told, and requests go on."""
    with LocalPubSubThread() as server, rig(server.address, tmp_path, SimOptions.of(control_port=0)) as built:
        built.sim.control({"mode": "outage_5xx", "match": {"path": "/metrics"}})
        worker = built.worker(**GATE, backend__metric_gate__without_data="open")
        built.publish(10)
        built.collect(10)
        assert built.answers.statuses == {200: 10}
        stale = until(lambda: worker.event("metric_gate_stale"), 30, "it tells")
        assert stale["gate"] == "open"
        worker.terminate()
        assert worker.wait(30) == 0
