"""Bodies in object storage, from outside: 20 MB in, 12 MB out, and a kill in between."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.support.object_storage import ObjectStorage, object_storage
from tests.support.rig import Rig, rig
from tests.support.waiting import until
from worker.emulators.openai import SimOptions
from worker.emulators.pubsub import LocalPubSubThread

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


INPUTS = 150


@pytest.fixture
def storage() -> Iterator[ObjectStorage]:
    with object_storage() as running:
        running.put("bucket")
        yield running


@pytest.fixture
def server() -> Iterator[LocalPubSubThread]:
    with LocalPubSubThread() as running:
        yield running


@pytest.fixture
def large_rig(server: LocalPubSubThread, tmp_path: Path) -> Iterator[Rig]:
    """Leases of ten seconds, so that a killed worker's message is soon back."""
    options = SimOptions.of(context_window=100_000_000, control_port=0)
    with rig(server.address, tmp_path, options, ack_deadline_seconds=10) as built:
        yield built


def start(built: Rig, storage: ObjectStorage) -> None:
    """Start a worker that may read and write the bucket."""
    built.worker(
        payloads__request_prefixes="[s3://bucket/requests]",
        payloads__reply_prefix="s3://bucket/answers",
        payloads__s3_options=json.dumps(storage.s3_options),
    )


def ask(storage: ObjectStorage, index: int) -> bytes:
    """Put 20 MB of text into the bucket; return the message that asks for so large vectors that 12 MB come back."""
    body = {"model": "m", "input": [f"{n} " + "a" * (20_000_000 // INPUTS) for n in range(INPUTS)], "dimensions": 8192}
    storage.put(f"bucket/requests/{index}.json", json.dumps(body).encode())
    uri = f"s3://bucket/requests/{index}.json"
    return json.dumps({"path": "/v1/embeddings", "metadata": {"index": index}, "body_uri": uri}).encode()


def name_of(storage: ObjectStorage, built: Rig, message_id: str) -> str:
    return f"answers/{built.request_subscription.rpartition('/')[2]}/{message_id}.json"


def test_a_request_and_an_answer_that_no_message_can_carry(large_rig: Rig, storage: ObjectStorage) -> None:
    """Both go by reference; small ones and those that name what is not there are answered beside them."""
    start(large_rig, storage)

    def make(index: int) -> bytes:
        if index == 0:
            return ask(storage, index)
        uri = ["s3://bucket/requests/absent", "s3://bucket/secrets/1", "file:///etc/passwd"][index - 1]
        return json.dumps({"path": "/v1/embeddings", "metadata": {"index": index}, "body_uri": uri}).encode()

    large_rig.publish(4, make)
    answers = large_rig.collect(limit_s=90)
    assert (answers.count, answers.duplicates, answers.malformed) == (4, 0, 0)
    (large,), (attributes,) = answers.by_index[0], answers.attributes[0]
    assert (large["status_code"], "body" in large) == (200, False)
    key = name_of(storage, large_rig, attributes["request_message_id"])
    assert large["body_uri"] == f"s3://bucket/{key}"
    body = storage.get(f"bucket/{key}")
    assert body is not None
    assert len(body) > 12_000_000
    assert attributes["body_sha256"] == hashlib.sha256(body).hexdigest()
    assert [len(item["embedding"]) for item in json.loads(body)["data"]] == [8192] * INPUTS
    codes = [answers.by_index[index][0]["body"]["error"]["code"] for index in (1, 2, 3)]
    assert codes == ["payload_not_found", "bad_message", "bad_message"]
    assert large_rig.stats()["requests"] == 1


def test_a_kill_between_the_object_and_the_answer_gives_one_answer(
    server: LocalPubSubThread, large_rig: Rig, storage: ObjectStorage
) -> None:
    """The object of the killed worker is overwritten by the next one's, which the one answer names."""
    start(large_rig, storage)
    large_rig.publish(1, lambda index: ask(storage, index))
    server.faults.fail("Publish", grpc.StatusCode.UNAVAILABLE)
    worker = large_rig.workers[0]
    written = "inference_worker_payload_duration_seconds_count"
    until(lambda: worker.metric(written, kind="write", outcome="ok") == 1, 90, "the body of the answer is stored")
    worker.kill()
    server.faults.clear()
    start(large_rig, storage)
    answers = large_rig.collect(limit_s=90)
    large_rig.collect_rest(2)
    assert (answers.count, answers.duplicates, answers.malformed) == (1, 0, 0)
    (answer,), (attributes,) = answers.by_index[0], answers.attributes[0]
    key = name_of(storage, large_rig, attributes["request_message_id"])
    assert answer["body_uri"] == f"s3://bucket/{key}"
    body = storage.get(f"bucket/{key}")
    assert body is not None
    assert attributes["body_sha256"] == hashlib.sha256(body).hexdigest()
    assert large_rig.stats()["requests"] == 2
    assert large_rig.is_drained()
