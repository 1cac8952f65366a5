"""Batches from end to end: the official client, the API's processes, the embedded broker, the worker, a backend."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.support.batch_stage import BatchStage, batch_stage, chat_file, chat_line, create, finished, upload
from tests.support.batches import opened_store, sqlite_url
from tests.support.waiting import until
from worker.batches import tables

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # processes that share the cores with others start slowly


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


def test_an_odd_file_completes(stage: BatchStage):
    """Byte order mark, CRLF, separators that end no line, blank lines, no newline at the end, and a line that fails."""
    stage.rig.worker()
    client = stage.client(stage.start())
    odd = ["a\u2028b", "\u0085", "tab\t", "\U0001f600", "x" * 10_000]
    lines = [chat_line(custom_id, f"{custom_id} \u2028 \x7f") for custom_id in odd]
    lines.append(chat_line("wrong", "no", max_tokens=-1))
    texts = [json.dumps(line, ensure_ascii=False).encode() for line in lines]
    content = b"\xef\xbb\xbf\r\n" + b"\r\n \r\n".join(texts)
    done = finished(client, create(client, upload(client, content)), content)
    assert done.batch["request_counts"] == {"total": 6, "completed": 5, "failed": 1}
    assert [line["custom_id"] for line in done.output.lines] == odd
    assert done.error.lines[0]["response"]["status_code"] == 400
    assert done.batch["failures"][0]["count"] == 1


def test_a_file_of_too_many_lines_fails(stage: BatchStage):
    client = stage.client(stage.start())
    content = chat_file(50_001)
    done = finished(client, create(client, upload(client, content)), content)
    assert done.batch["status"] == "failed"
    assert [error["code"] for error in done.batch["errors"]["data"]] == ["too_many_tasks"]
    assert stage.rig.stats()["requests"] == 0


def test_a_process_that_is_stopped_leaves_its_work_to_the_next(stage: BatchStage):
    """SIGTERM loses nothing, and nothing is asked twice."""
    stage.rig.worker()
    process = stage.start()
    client = stage.client(process)
    content = chat_file(1_500)
    batch_id = create(client, upload(client, content))
    until(lambda: client.batches.retrieve(batch_id).request_counts.completed > 50, 300)
    process.terminate()
    assert process.wait(120) == 0
    client = stage.client(stage.start())
    assert finished(client, batch_id, content).batch["request_counts"]["completed"] == 1_500
    assert stage.rig.stats()["bodies"]["repeats"] == 0


@pytest.mark.parametrize("is_told", [True, False])
def test_lines_that_a_take_over_publishes_twice_have_one_result(stage: BatchStage, is_told: bool):
    """Workers that are told the key of a line do not generate the second one; without it they do."""
    process = stage.start()
    client = stage.client(process)
    content = chat_file(100)
    batch_id = create(client, upload(client, content))
    until(lambda: client.batches.retrieve(batch_id).to_dict()["progress"]["published"] == 100, 120)
    process.kill()
    with opened_store(stage.database_url) as store, store._writing() as connection:
        # As if it had died a moment earlier: every line is on the topic, and that is not noted.
        connection.execute(sa.update(tables.batches).values(published_records=0, published_bytes=0, published_lines=0))
    client = stage.client(stage.start())
    until(lambda: client.batches.retrieve(batch_id).to_dict()["progress"]["published"] == 100, 120)
    # One at a time, so that the second copy comes when the first is answered, as the lease makes it likely.
    told = {"dedupe__metadata_key": "idempotency_key"} if is_told else {}
    worker = stage.rig.worker(pubsub__max_in_flight=1, backend__window__initial=1, backend__window__max=1, **told)
    done = finished(client, batch_id, content)
    assert done.batch["request_counts"] == {"total": 100, "completed": 100, "failed": 0}
    settled = "inference_worker_deliveries_total"
    until(lambda: worker.metric(settled, settlement="ack") == 200, 120, "the second copies are settled as well")
    assert stage.rig.stats()["bodies"]["repeats"] == (0 if is_told else 100)


def test_an_answer_that_no_message_carries_is_fetched(stage: BatchStage, tmp_path: Path):
    """150 vectors of 8,192 dimensions: 12 MB, which the worker writes into a folder that the collector reads."""
    place = f"file://{tmp_path / 'replies'}"
    (tmp_path / "replies").mkdir()
    stage.rig.worker(payloads__reply_prefix=place)
    client = stage.client(stage.start(payloads__reply_prefix=place))
    body = {"model": "m", "input": [f"text {number}" for number in range(150)], "dimensions": 8192}
    line = {"custom_id": "large", "method": "POST", "url": "/v1/embeddings", "body": body}
    content = json.dumps(line).encode()
    done = finished(client, create(client, upload(client, content), endpoint="/v1/embeddings"), content)
    assert done.batch["request_counts"] == {"total": 1, "completed": 1, "failed": 0}
    (answer,) = done.output.lines
    assert [len(each["embedding"]) for each in answer["response"]["body"]["data"]] == [8192] * 150
    assert list((tmp_path / "replies").rglob("*.json")), "no message carried it"


def test_a_cancelled_batch_costs_no_more_generation(stage: BatchStage):
    """Over the control topic workers answer what waits at once; what runs is finished, and kept."""
    control = stage.rig.admin.topic("control")
    stage.rig.sim.control({"settings": {"latency": "2s"}})
    worker = stage.rig.worker(
        pubsub__control_topic=control, pubsub__max_in_flight=20, backend__window__initial=2, backend__window__max=2
    )
    worker.wait_started()
    client = stage.client(stage.start(pubsub__control_topic=control))
    content = chat_file(200)
    batch_id = create(client, upload(client, content))
    until(lambda: stage.rig.stats()["in_flight"] == 2, 120, "two lines run")
    client.batches.cancel(batch_id)
    done = finished(client, batch_id, content, limit_s=120)
    counts = done.batch["request_counts"]
    assert done.batch["status"] == "cancelled"
    assert {line["error"]["code"] for line in done.error.lines} == {"batch_cancelled"}
    assert 2 <= counts["completed"] == stage.rig.stats()["requests"] < 100, "nothing was cut, and most never ran"


def test_dead_lettered_lines_end_their_batch_and_can_be_retried(stage: BatchStage):
    """The broker moves the requests itself, after five deliveries that no worker answers."""
    admin = stage.rig.admin
    broken = admin.subscription(stage.rig.requests, backoff=(0.1, 0.1), dead_letter=(stage.rig.dead, 5))
    filter_ = 'hasPrefix(attributes.run_id, "batch_")'
    dead = admin.subscription(stage.rig.dead, filter=filter_)
    client = stage.client(stage.start(batches__dead_letter_subscription=dead))
    content = chat_file(3)
    batch_id = create(client, upload(client, content))

    def nacked() -> bool:
        """As workers that die again and again."""
        got = admin.pull(broken, timeout=1)
        if got:
            admin.subscriber.modify_ack_deadline(
                request={"subscription": broken, "ack_ids": [each.ack_id for each in got], "ack_deadline_seconds": 0}
            )
        return client.batches.retrieve(batch_id).status == "completed"

    until(nacked, 300, "the lines are dead-lettered")
    done = finished(client, batch_id, content)
    assert done.batch["request_counts"] == {"total": 3, "completed": 0, "failed": 3}
    assert {line["error"]["code"] for line in done.error.lines} == {"dead_lettered"}
    stage.rig.worker()
    again = client.post(f"/batches/{batch_id}/retry", cast_to=object)
    assert finished(client, again["id"], content).batch["request_counts"]["completed"] == 3  # type: ignore[index]


def test_what_is_missing_is_told(tmp_path: Path):
    """Exit 2 with every fault, before anything is opened."""
    command = [sys.executable, "-m", "worker", "batches", "serve", "--set", f"batches.files={tmp_path / 'files'}"]
    command += ["--set", f"batches.database_url={sqlite_url(tmp_path)}", "--set", "pubsub.emulator_host=127.0.0.1:1"]
    command += ["--set", "http.port=0", "--set", "http.host=127.0.0.1", "--set", "batches.port=0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 2
    assert "batches.request_topic: is required" in ended.stderr
    assert "batches.response_subscription: is required" in ended.stderr
    assert "Traceback" not in ended.stderr
