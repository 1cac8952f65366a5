"""Batches from end to end: the official client, the API's processes, the embedded broker, the worker, a backend."""

from pathlib import Path

import pytest

from tests.support.batch_stage import BatchStage, batch_stage, chat_file, create, finished, upload
from tests.support.batches import sqlite_url

pytestmark = pytest.mark.slow


@pytest.fixture
def stage(tmp_path: Path):
    with batch_stage(tmp_path, sqlite_url(tmp_path)) as opened:
        yield opened


def test_a_batch_of_200_lines_completes(stage: BatchStage):
    stage.rig.worker()
    client = stage.client(stage.start())
    content = chat_file(200)
    done = finished(client, create(client, upload(client, content), metadata={"k": "v"}), content)
    assert done.batch["status"] == "completed"
    assert done.batch["request_counts"] == {"total": 200, "completed": 200, "failed": 0}
    assert done.batch["model"] == "m"
    assert done.batch["metadata"] == {"k": "v"}
    assert done.batch["usage"]["total_tokens"] > 0
    assert stage.rig.stats()["bodies"]["repeats"] == 0
