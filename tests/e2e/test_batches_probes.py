"""What a process of `batches serve` shows of itself: probes, metrics, and its end."""

import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.batch_stage import batch_stage, chat_file, create, finished, upload
from tests.support.batches import sqlite_url
from tests.support.rig import WorkerProcess
from tests.support.waiting import until

pytestmark = pytest.mark.slow


def get(process: WorkerProcess, path: str) -> str:
    started = until(lambda: process.event("batch_server_started"), 120, "the process starts")
    with urllib.request.urlopen(f"http://127.0.0.1:{started['http_port']}{path}", timeout=30) as reply:
        return str(reply.read().decode())


def samples(process: WorkerProcess) -> dict[tuple[str, str], float]:
    """Every sample by its name and its first label that is no method, path or status of HTTP."""
    found = {}
    for family in text_string_to_metric_families(get(process, "/metrics")):
        for sample in family.samples:
            label = next((sample.labels[name] for name in ("outcome", "status", "route") if name in sample.labels), "")
            found[sample.name.removeprefix("inference_worker_"), label] = sample.value
    return found


def test_metrics_follow_a_batch_and_sigterm_ends_every_role(tmp_path: Path):
    with batch_stage(tmp_path, sqlite_url(tmp_path)) as stage:
        stage.rig.worker()
        api, coordinator, collector = (stage.start(role) for role in ("api", "coordinator", "collector"))
        client = stage.client(api)
        content = chat_file(50)
        finished(client, create(client, upload(client, content)), content, limit_s=120)
        for process in (api, coordinator, collector):
            assert '"ok"' in get(process, "/readyz")
        assert samples(collector)["batch_answers_total", "stored"] == 50
        until(
            lambda: samples(coordinator)["batches_unfinished", "in_progress"] == 0, 30, "its next look at the batches"
        )
        leading = samples(coordinator)
        assert leading["batch_coordinating", ""] == 1
        assert leading["batch_lines_published_total", ""] == 50
        assert leading["batches_ended_total", "completed"] == 1
        assert leading["batch_lines_outstanding", ""] == 0
        shown = samples(api)
        assert shown["batch_api_request_duration_seconds_count", "/v1/batches/{batch_id}"] >= 1
        assert shown["batch_coordinating", ""] == 0
        for process in (api, coordinator, collector):
            process.terminate()
        assert [process.wait(60) for process in (api, coordinator, collector)] == [0, 0, 0]
