"""
The pods of the Batches API, started for real: the commands, environment and configuration of the rendered manifest.

Only the addresses are others: a database, a Pub/Sub server, a bucket and a model server of this machine.
"""

import json
import os
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.deploy import manifests
from tests.deploy.tools import call
from tests.support.batch_stage import BatchStage, chat_file, create, finished, upload
from tests.support.batches import sqlite_url
from tests.support.object_storage import ObjectStorage, object_storage
from tests.support.postgresql import running_postgresql
from tests.support.rig import WorkerProcess, rig
from tests.support.waiting import until
from worker.emulators.pubsub import LocalPubSubThread

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(params=["postgresql", "sqlite"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A new database without tables; several pods need the first kind, which not every machine has."""
    if request.param == "sqlite":
        yield sqlite_url(tmp_path)
        return
    with running_postgresql() as server:
        if server is None:
            pytest.skip("PostgreSQL is not installed")
        yield server.create_database()


class Pods:
    """
    The Deployment `inference-worker-batches` on this machine.

    Args:
        folder: For what the pod mounts, and for logs.
        database_url: Content of the Secret; `None`: there is no Secret.
        stage: Its broker.
        bucket: Its object storage.
    """

    def __init__(self, folder: Path, database_url: str | None, stage: BatchStage, bucket: ObjectStorage) -> None:
        self._part = manifests.variant("with-batches").batches
        self._folder = folder
        self._stage = stage
        mounts = {item["name"]: folder / item["name"] for item in self._part.container["volumeMounts"]}
        for path in mounts.values():
            path.mkdir()
        (mounts["config"] / "batches.yaml").write_text(self._part.config)
        (mounts["backend-key"] / "api-key").write_text("a-key")
        if database_url is not None:
            (mounts["secret"] / "database-url").write_text(f"{database_url}\n")
        self._addresses = {
            "PUBSUB_EMULATOR_HOST": stage.rig.address,
            "WORKER_PUBSUB__PROJECT_ID": stage.rig.admin.project,
            "WORKER_BATCHES__REQUEST_TOPIC": stage.rig.requests,
            "WORKER_BATCHES__RESPONSE_SUBSCRIPTION": stage.responses,
            "WORKER_BATCHES__DEAD_LETTER_SUBSCRIPTION": stage.rig.graves,
            "WORKER_BACKEND__BASE_URL": stage.rig.sim.base_url,
            "WORKER_BATCHES__FILES": "s3://bucket/files",
            "WORKER_PAYLOADS__S3_OPTIONS": json.dumps(bucket.s3_options),
        }
        self._mounts = {
            item["mountPath"]: str(mounts[item["name"]])
            for item in self._part.container["volumeMounts"]
            if item["name"] != "tmp"
        }

    def _environ(self, container: dict[str, Any]) -> dict[str, str]:
        environ = {item["name"]: item["value"] for item in container["env"]}
        for name, value in environ.items():
            for inside, here in self._mounts.items():
                if value.startswith(f"{inside}/"):
                    environ[name] = here + value.removeprefix(inside)
        return {**environ, **self._addresses}

    def start(self, container: dict[str, Any], name: str, **settings: Any) -> WorkerProcess:
        """Start a container of the pod."""
        command = [sys.executable, "-m", "worker", *container["args"]]
        process = WorkerProcess(self._folder / f"{name}.log", settings, self._environ(container), command=command)
        self._stage.processes.append(process)
        return process

    def migrate(self, name: str = "migrate") -> WorkerProcess:
        """Start the init container."""
        (container,) = self._part.pod["initContainers"]
        return self.start(container, name)

    def serve(self, name: str) -> WorkerProcess:
        """Start the container, on ports that several of them can have on one machine."""
        loopback = {"batches.host": "127.0.0.1", "batches.port": 0, "http.host": "127.0.0.1", "http.port": 0}
        return self.start(self._part.container, name, **loopback)

    def add_key(self) -> str:
        """Do what docs/batches.md says: `kubectl exec … -- python3 -m worker batches keys add`."""
        command = [sys.executable, "-m", "worker", "batches", "keys", "add", "acme", "ci"]
        done = call(*command, env={**os.environ, **self._environ(self._part.container)})
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


def get(process: WorkerProcess, path: str) -> str:
    """Ask a pod's port of probes and metrics."""
    started = until(lambda: process.event("batch_server_started"), 120, "the pod starts")
    with urllib.request.urlopen(f"http://127.0.0.1:{started['http_port']}{path}", timeout=30) as reply:
        return str(reply.read().decode())


@contextmanager
def staged(folder: Path, database_url: str | None) -> Iterator[tuple[BatchStage, Pods]]:
    """Run all that the pods need, and nothing of themselves."""
    with LocalPubSubThread() as broker, rig(broker.address, folder) as built, object_storage() as bucket:
        bucket.put("bucket")
        stage = BatchStage(built, "", folder)
        try:
            yield stage, Pods(folder, database_url, stage, bucket)
        finally:
            stage.close()


def test_two_pods_answer_a_batch_and_end_when_they_are_told(tmp_path: Path, database_url: str) -> None:
    """Both migrate at once, one coordinates; a client with a key gets its batch from the one that did not create it."""
    with staged(tmp_path, database_url) as (stage, pods):
        migrations = [pods.migrate(f"migrate-{number}") for number in range(2)]
        assert [each.wait(120) for each in migrations] == [0, 0]
        first, second = pods.serve("pod-0"), pods.serve("pod-1")
        key = pods.add_key()
        stage.rig.worker()
        content = chat_file(30)
        batch_id = create(stage.client(first, api_key=key), upload(stage.client(first, api_key=key), content))
        finished(stage.client(second, api_key=key), batch_id, content, limit_s=120)
        elected = [each.event("batch_coordinator_elected") is not None for each in (first, second)]
        assert sorted(elected) == [False, True]
        for each in (first, second):
            shown = get(each, "/metrics")
            assert "inference_worker_batch_coordinating" in shown
            assert "inference_worker_build_info{" not in shown, "InferenceWorkerNoneRuns takes it for a worker"
            each.terminate()
        assert [each.wait(60) for each in (first, second)] == [0, 0]


def test_a_missing_secret_is_named(tmp_path: Path) -> None:
    """By the init container, in the line that `kubectl describe pod` shows; exit code 2."""
    with staged(tmp_path, None) as (_, pods):
        process = pods.migrate()
        assert process.wait(60) == 2
        last = process.log_path.read_text().splitlines()[-1]
        assert "batches.database_url_file: " in last
        assert last.endswith("/secret/database-url: No such file or directory")


def test_tables_of_another_version_are_named(tmp_path: Path) -> None:
    """A pod whose database was not migrated does not start; exit code 1."""
    with running_postgresql() as server:
        if server is None:
            pytest.skip("PostgreSQL is not installed")
        with staged(tmp_path, server.create_database()) as (_, pods):
            process = pods.serve("pod")
            assert process.wait(60) == 1
            failed = until(lambda: process.event("startup_failed"), 10, "the log tells it")
            assert "inference-worker batches migrate" in failed["error"]
