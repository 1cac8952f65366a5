"""
A disk that is full, with the files and the SQLite database of the batches on it.

Clients are told to come again, nothing half written stays or is shown, and once there is space each batch ends with
every line once.
"""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.batch_invariants import Watch
from tests.support.batch_stage import BatchStage, batch_stage, chat_file, create, finished, upload
from tests.support.batches import sqlite_url
from tests.support.disk import Disk, mounted
from tests.support.rig import WorkerProcess
from tests.support.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with mounted(tmp_path / "disk") as opened:
        yield opened


@pytest.fixture
def stage(tmp_path: Path, disk: Disk) -> Iterator[BatchStage]:
    with batch_stage(tmp_path, sqlite_url(disk.folder), batches__files=disk.folder / "files") as opened:
        yield opened


class Source(io.BytesIO):
    """
    A file to upload.

    Args:
        content: Of it.
        at: Byte from which on it was read up to here when `do` is called.
        do: Called once.
    """

    def __init__(self, content: bytes, at: int, do: Callable[[], object]) -> None:
        super().__init__(content)
        self._at = at
        self._do: Callable[[], object] | None = do

    def read(self, size: int | None = -1, /) -> bytes:
        if self._do is not None and self.tell() >= self._at:
            self._do()
            self._do = None
        return super().read(size)


def assert_told_to_come_again(error: openai.APIStatusError) -> None:
    """OpenAI's error object, with all of its keys, and when to come again."""
    assert error.status_code == 503
    assert isinstance(error.body, dict)
    assert error.body["type"] == "server_error"
    assert error.body["code"] == "service_unavailable"
    assert error.body["param"] is None
    assert int(error.response.headers["retry-after"]) > 0


def events(process: WorkerProcess, name: str) -> list[dict[str, Any]]:
    return [line for line in process.lines() if line.get("event") == name]


def no_faults(process: WorkerProcess) -> None:
    """A full disk is nothing that the program did not expect."""
    assert [line for line in process.lines() if line.get("level") in {"error", "critical"}] == []


def test_an_upload_that_fills_the_disk_leaves_nothing(stage: BatchStage, disk: Disk) -> None:
    """The disk is full when half of the file has come; the next upload of the same file is taken."""
    stage.rig.worker()
    process = stage.start()
    content = chat_file(20_000)
    with stage.client(process, max_retries=0) as client:
        before = disk.files()
        source = Source(content, len(content) // 2, disk.fill)
        with pytest.raises(openai.InternalServerError) as refused:
            client.files.create(file=("in.jsonl", source), purpose="batch")
        assert_told_to_come_again(refused.value)
        assert disk.files() == before
        assert client.files.list().data == []
        disk.free()
        small = chat_file(50)
        file_id = upload(client, content)
        assert client.files.content(file_id).content == content
        done = finished(client, create(client, upload(client, small)), small)
        assert done.batch["request_counts"] == {"total": 50, "completed": 50, "failed": 0}
    no_faults(process)


def test_a_full_disk_delays_the_files_of_a_batch(stage: BatchStage, disk: Disk) -> None:
    """Its output does not fit: nothing of it stays, and it is written when there is space."""
    stage.rig.worker()
    process = stage.start()
    content = chat_file(4_000, "long")
    with stage.client(process, max_retries=0) as client:
        stage.rig.sim.control({"mode": "hang", "match": {"body": "hello long 3999"}})
        batch_id = create(client, upload(client, content))
        watch = Watch()

        def one_is_missing() -> bool:
            watch.add(client.batches.retrieve(batch_id).to_dict())
            return watch.reads[-1]["request_counts"]["completed"] == 3_999

        until(one_is_missing, 300, "all lines but one are answered")
        before = disk.files()
        disk.fill(leave_bytes=1_500_000)  # the output has more than two million bytes
        stage.rig.sim.reset()
        failed = until(lambda: events(process, "batch_step_failed"), 120, "the output is refused")
        assert failed[0]["step"] in {"complete", "finalize"}
        assert "No space left" in failed[0]["error"]
        assert disk.files() == before
        watch.add(client.batches.retrieve(batch_id).to_dict())
        assert watch.reads[-1]["status"] == "finalizing"
        assert watch.reads[-1]["output_file_id"] is None
        disk.free()
        done = finished(client, batch_id, content)
        watch.add(done.batch)
        assert done.batch["request_counts"] == {"total": 4_000, "completed": 4_000, "failed": 0}
        assert done.output is not None
        assert len(done.output.content) > 2_000_000
    no_faults(process)


def test_a_full_disk_delays_results_and_loses_none(stage: BatchStage, disk: Disk) -> None:
    """While no result can be stored, batches can be read and none can be created; no line is generated again."""
    stage.rig.sim.control({"settings": {"latency": "50ms"}})
    stage.rig.worker(backend__window__initial=32)
    process = stage.start()
    content = chat_file(4_000, "stored")
    with stage.client(process, max_retries=0) as client:
        file_id = upload(client, chat_file(3))
        batch_id = create(client, upload(client, content))
        watch = Watch()

        def has_begun() -> bool:
            watch.add(client.batches.retrieve(batch_id).to_dict())
            return watch.reads[-1]["request_counts"]["completed"] > 200

        until(has_begun, 300)
        disk.fill()

        def is_away() -> bool:
            return {line.get("role") for line in events(process, "batch_store_away")} >= {"collector", "coordinator"}

        until(is_away, 120, "collector and coordinator have noticed")
        watch.add(client.batches.retrieve(batch_id).to_dict())
        assert watch.reads[-1]["status"] == "in_progress"
        before = disk.files()
        with pytest.raises(openai.InternalServerError) as refused:
            upload(client, chat_file(3))
        assert_told_to_come_again(refused.value)
        with pytest.raises(openai.InternalServerError) as refused:
            create(client, file_id)
        assert_told_to_come_again(refused.value)
        assert disk.files() == before
        assert [batch.id for batch in client.batches.list().data] == [batch_id]
        disk.free()
        done = finished(client, batch_id, content)
        watch.add(done.batch)
        assert done.batch["request_counts"] == {"total": 4_000, "completed": 4_000, "failed": 0}
        assert stage.rig.stats()["bodies"]["repeats"] == 0
        small = finished(client, create(client, file_id), chat_file(3))
        assert small.batch["request_counts"]["completed"] == 3
    no_faults(process)
