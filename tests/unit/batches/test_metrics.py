"""The metrics of `batches serve`."""

import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.batches import opened_store, sqlite_url
from worker.batches.api.app import build_app
from worker.batches.api.storage import Storage
from worker.batches.metrics import BatchMetrics, batch_catalogue
from worker.batches.models import Models
from worker.batches.objects import open_objects
from worker.batches.states import Status
from worker.settings.schema import BatchesSettings, PayloadSettings
from worker.telemetry.metrics import Metrics, catalogue

ENTRIES = list(batch_catalogue())
LABELS = {"outcome", "status", "step", "place", "method", "route", "status_code"}


@pytest.mark.parametrize(("name", "kind", "labels", "meaning"), ENTRIES, ids=[entry[0] for entry in ENTRIES])
def test_an_entry(name: str, kind: str, labels: tuple[str, ...], meaning: str):
    """A name says its unit, a meaning is a sentence, labels are of closed sets."""
    assert name.startswith("inference_worker_batch")
    assert name.endswith("_total") == (kind == "counter")
    assert kind != "histogram" or name.endswith("_seconds")
    assert meaning.endswith(".")
    assert set(labels) <= LABELS


def test_they_stand_beside_the_worker_s():
    """A process of `batches serve` has both on one registry, and the worker shows none of these."""
    registry = BatchMetrics(Metrics().registry).registry
    names = {family.name for family in text_string_to_metric_families(generate_latest(registry).decode())}
    assert {"inference_worker_batch_coordinating", "inference_worker_leased_messages"} <= names
    assert not {name for name, *_ in catalogue()} & {name for name, *_ in ENTRIES}


def test_a_process_that_coordinates_no_more_tells_nothing_of_all_batches():
    metrics = BatchMetrics()
    metrics.coordinating.set(1)
    metrics.set_unfinished(Counter({Status.IN_PROGRESS: 3}))
    metrics.lines_outstanding.set(5)
    read = metrics.registry.get_sample_value
    assert read("inference_worker_batches_unfinished", {"status": "in_progress"}) == 3
    metrics.stop_coordinating()
    assert read("inference_worker_batch_coordinating") == read("inference_worker_batch_lines_outstanding") == 0
    assert read("inference_worker_batches_unfinished", {"status": "in_progress"}) is None


async def test_requests_are_told_with_the_names_of_their_parameters(tmp_path: Path):
    told: list[tuple[str, str, int]] = []
    with opened_store(sqlite_url(tmp_path)) as store:
        storage = Storage(store, open_objects(str(tmp_path / "files"), PayloadSettings()))
        app = build_app(
            storage,
            Models(None, time.monotonic),
            BatchesSettings(auth="none"),
            on_request=lambda method, route, status, _duration_s: told.append((method, route, status)),
        )
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api") as client:
            for path in ("/v1/batches", "/v1/batches/batch_1", "/nowhere"):
                await client.get(path)
        storage.close()
    assert told == [("GET", "/v1/batches", 200), ("GET", "/v1/batches/{batch_id}", 404), ("GET", "other", 404)]
