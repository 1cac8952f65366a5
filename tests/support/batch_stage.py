"""Batches from end to end: broker, simulated backend, workers, and the processes of the API in any number."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai

from tests.support.batch_fork import ForkedProcess
from tests.support.batch_invariants import FINAL, Finished, Watch, check_finished, read_finished
from tests.support.batches import opened_store
from tests.support.rig import Rig, WorkerProcess, rig
from tests.support.waiting import until
from worker.emulators.openai import SimOptions
from worker.emulators.pubsub import LocalPubSubThread

CHAT = "/v1/chat/completions"


def chat_line(custom_id: str, text: str, **body: Any) -> dict[str, Any]:
    """A line of an input file."""
    content = {"model": "m", "messages": [{"role": "user", "content": text}], **body}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": content}


def chat_file(count: int, name: str = "") -> bytes:
    """An input file, each of whose lines has a body of its own."""
    lines = (json.dumps(chat_line(f"{name}-{number}", f"hello {name} {number}")) for number in range(count))
    return "".join(f"{line}\n" for line in lines).encode()


class BatchStage:
    """
    Everything of it.

    Args:
        rig: Broker, backend and workers.
        database_url: Of a new database.
        folder: For files and logs.
        settings: Of every process; keys with `__` for the dot.
    """

    def __init__(self, rig_: Rig, database_url: str, folder: Path, **settings: Any) -> None:
        self.rig = rig_
        self.folder = folder
        self.database_url = database_url
        self.settings = settings
        self.processes: list[WorkerProcess | ForkedProcess] = []
        self._clients: list[openai.OpenAI] = []
        self.responses = rig_.admin.subscription(
            rig_.responses, ack_deadline_seconds=10, filter='hasPrefix(attributes.run_id, "batch_")'
        )

    def start(self, roles: str = "api,coordinator,collector", **overrides: Any) -> WorkerProcess:
        """Start a process with these roles."""
        command = [sys.executable, "-m", "worker", "batches", "serve"]
        command += [part for role in roles.split(",") for part in ("--role", role)]
        process = WorkerProcess(self._log(), self._settings(overrides), command=command)
        self.processes.append(process)
        return process

    def fork(self, roles: str, **overrides: Any) -> ForkedProcess:
        """Do the same without its imports."""
        process = ForkedProcess(roles, self._settings(overrides), self._log())
        self.processes.append(process)
        return process

    def _log(self) -> Path:
        return self.folder / f"batches-{len(self.processes)}.log"

    def _settings(self, overrides: dict[str, Any]) -> dict[str, Any]:
        return {
            "pubsub.project_id": self.rig.admin.project,
            "pubsub.emulator_host": self.rig.address,
            "batches.request_topic": self.rig.requests,
            "batches.response_subscription": self.responses,
            "batches.database_url": self.database_url,
            "batches.files": self.folder / "files",
            "batches.host": "127.0.0.1",
            "batches.port": 0,
            "batches.auth": "none",
            "batches.lease_s": 1,
            "batches.requests_per_minute": 1_000_000,
            "batches.uploads_per_minute": 1_000_000,
            "batches.creates_per_hour": 1_000_000,
            "log.format": "json",
            "http.host": "127.0.0.1",
            "http.port": 0,
            **{key.replace("__", "."): value for key, value in {**self.settings, **overrides}.items()},
        }

    def port(self, process: WorkerProcess) -> int:
        """The port of the API in a process, once it listens."""

        def started() -> dict[str, Any] | None:
            assert process.process.poll() is None, process.log_path.read_text()[-3000:]
            return process.event("batch_server_started")

        return int(until(started, 120, "the API starts")["port"])

    def client(self, process: WorkerProcess, **options: Any) -> openai.OpenAI:
        """The official client of the API in a process."""
        return self.client_at(self.port(process), **options)

    def client_at(self, port: int, **options: Any) -> openai.OpenAI:
        """The official client with strict validation (rule 16); it is closed with the stage."""
        url = f"http://127.0.0.1:{port}/v1"
        client = openai.OpenAI(
            **{"base_url": url, "api_key": "none", "max_retries": 5, "_strict_response_validation": True, **options}
        )
        self._clients.append(client)
        return client

    def close(self) -> None:
        for client in self._clients:
            client.close()
        for process in self.processes:
            process.close()


def upload(client: openai.OpenAI, content: bytes) -> str:
    """Upload an input file; return its id."""
    return client.files.create(file=("in.jsonl", content), purpose="batch").id


def create(client: openai.OpenAI, file_id: str, **fields: Any) -> str:
    """Create a batch; return its id."""
    return client.batches.create(
        **{"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h", **fields}
    ).id


def wait_final(
    client: openai.OpenAI, batch_id: str, *, watch: Watch | None = None, limit_s: float = 300
) -> dict[str, Any]:
    """Read a batch until it has ended, each read checked against the one before; return the last."""
    watch = watch or Watch()

    def ended() -> dict[str, Any] | None:
        watch.add(client.batches.retrieve(batch_id).to_dict())
        return watch.reads[-1] if watch.reads[-1]["status"] in FINAL else None

    return until(ended, limit_s, f"{batch_id} ends")


def finished(
    client: openai.OpenAI, batch_id: str, content: bytes | None, *, limit_s: float = 300, **options: Any
) -> Finished:
    """Wait for a batch's end, check every rule, and return all that belongs to it."""
    wait_final(client, batch_id, limit_s=limit_s)
    found = read_finished(client, batch_id, content, **options)
    check_finished(found)
    assert read_finished(client, batch_id, content, **options) == found  # 15
    return found


@contextmanager
def batch_stage(
    folder: Path, database_url: str, options: SimOptions | None = None, **settings: Any
) -> Iterator[BatchStage]:
    """Run a broker, a backend and nothing else yet."""
    with opened_store(database_url):
        pass  # it has the tables now
    with LocalPubSubThread() as broker, rig(broker.address, folder, options) as built:
        stage = BatchStage(built, database_url, folder, **settings)
        try:
            yield stage
        finally:
            stage.close()
