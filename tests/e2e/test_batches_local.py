"""`inference-worker batches local` and `batches serve`, the way a new user meets them: processes, signals, mistakes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support.batch_invariants import FINAL, Watch
from tests.support.batch_stage import chat_file, chat_line, create, finished, upload
from tests.support.disk import mounted
from tests.support.waiting import until
from worker.emulators.openai import SimBackendThread, SimOptions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


class Local:
    """
    One `batches local`.

    Args:
        folder: For its data and what it says.
        arguments: Further ones.
    """

    def __init__(self, folder: Path, *arguments: str, action: str = "local") -> None:
        self.said = folder / "said"
        command = [sys.executable, "-m", "worker", "batches", action, *arguments]
        if action == "local":
            command += ["--port", "0", "--data", str(folder / "data")]
        with self.said.open("ab") as stream:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, text=True)

    @property
    def base_url(self) -> str:
        """What it prints once it serves."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("base_url: "), self.said.read_text()
        return line.removeprefix("base_url: ").strip()

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.base_url, api_key="none", max_retries=5, _strict_response_validation=True)

    def interrupt(self) -> int:
        """Press Ctrl-C once; return the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)

    def children(self) -> list[int]:
        """Processes below it."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]


@contextmanager
def local(folder: Path, *arguments: str) -> Iterator[Local]:
    started = Local(folder, *arguments)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.communicate()


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def progressed(client: openai.OpenAI, batch_id: str, watch: Watch, beyond: int) -> dict[str, Any]:
    """Wait until more lines than so many are completed, or the batch has ended."""

    def read() -> dict[str, Any] | None:
        watch.add(client.batches.retrieve(batch_id).to_dict())
        now = watch.reads[-1]
        return now if now["status"] in FINAL or now["request_counts"]["completed"] > beyond else None

    return until(read, 60)


def test_a_batch_outlasts_ctrl_c_and_kill(tmp_path: Path) -> None:
    """Stopped twice, in both ways, the same command goes on; no line with a result is sent again, none is lost."""
    content = chat_file(1_500, "local")
    watch = Watch()
    with SimBackendThread(SimOptions.of(control_port=0, latency="100ms", models="m")) as sim:
        arguments = ("--backend-url", sim.base_url, "--concurrency", "16")
        with local(tmp_path, *arguments) as first, first.client() as client:
            batch_id = create(client, upload(client, content))
            seen = progressed(client, batch_id, watch, 50)
            assert first.interrupt() == 0
        sent = sim.snapshot()["generations"]["distinct_bodies"]
        with local(tmp_path, *arguments) as second, second.client() as client:
            watch.add(client.batches.retrieve(batch_id).to_dict())
            assert watch.reads[-1]["request_counts"]["completed"] >= seen["request_counts"]["completed"]
            # Everything that was answered before Ctrl-C has been stored.
            assert sim.snapshot()["generations"]["bodies_generated_again"] == 0
            assert watch.reads[-1]["request_counts"]["completed"] >= sent
            progressed(client, batch_id, watch, watch.reads[-1]["request_counts"]["completed"] + 50)
            children = second.children()
            assert len(children) == 2
            second.process.kill()
            second.process.wait()
            until(lambda: not any(is_running(pid) for pid in children), what="the children end with it")
        with local(tmp_path, *arguments) as third, third.client() as client:
            done = finished(client, batch_id, content)
            assert done.batch["request_counts"] == {"total": 1_500, "completed": 1_500, "failed": 0}
            assert third.interrupt() == 0
        again = sim.snapshot()["generations"]["bodies_generated_again"]
        assert again <= 16 * 12, f"{again} lines were answered again after one kill"


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    """With 130, while requests are at a server that does not answer."""
    with (
        SimBackendThread(SimOptions.of(control_port=0, latency="60s", models="m")) as sim,
        local(tmp_path, "--backend-url", sim.base_url) as running,
        running.client() as client,
    ):
        batch_id = create(client, upload(client, chat_file(5)))
        until(lambda: sim.snapshot()["in_flight"] == 5)
        running.process.send_signal(signal.SIGINT)
        until(lambda: "Ctrl-C again" in running.said.read_text())
        assert client.batches.retrieve(batch_id).status == "in_progress"
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(20) == 130
        assert "go on at the next start" in running.said.read_text()


def test_a_backend_that_is_away_is_waited_for(tmp_path: Path) -> None:
    """No line fails for it, and the API serves all the time."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with local(tmp_path, "--backend-url", url) as running, running.client() as client:
        assert url in running.said.read_text()
        batch_id = create(client, upload(client, chat_file(5)))
        assert client.batches.retrieve(batch_id).status == "validating"
        with pytest.raises(openai.InternalServerError):
            client.with_options(max_retries=0).models.list()
        with SimBackendThread(SimOptions.of(control_port=0, models="m"), port=port):
            done = finished(client, batch_id, chat_file(5))
    assert done.batch["request_counts"] == {"total": 5, "completed": 5, "failed": 0}


def test_a_key_of_the_backend_is_used_and_told_nowhere(tmp_path: Path) -> None:
    """From a file; a model that the server does not have fails the batch by name."""
    key = tmp_path / "key"
    key.write_text("backend-secret")
    with (
        SimBackendThread(SimOptions.of(control_port=0, models="served", api_key="backend-secret")) as sim,
        local(
            tmp_path,
            *("--backend-url", sim.base_url, "--api-key-file", str(key), "--log", str(tmp_path / "log")),
        ) as running,
        running.client() as client,
    ):
        assert [model.id for model in client.models.list()] == ["served"]
        good = json.dumps(chat_line("a", "hi", model="served")).encode() + b"\n"
        finished(client, create(client, upload(client, good)), good)
        done = finished(client, create(client, upload(client, chat_file(1))), None)
        assert done.batch["errors"]["data"][0]["code"] == "model_not_found"
        assert running.interrupt() == 0
    assert "backend-secret" not in running.said.read_text() + (tmp_path / "log").read_text()


def test_a_disk_that_is_full_is_told_and_waited_for(tmp_path: Path) -> None:
    """On standard error; the batch goes on when there is space."""
    content = chat_file(3_000, "full")
    with (
        mounted(tmp_path / "data") as disk,
        local(tmp_path, "--latency", "100ms") as running,
        running.client() as client,
    ):
        batch_id = create(client, upload(client, content))
        watch = Watch()
        progressed(client, batch_id, watch, 50)
        disk.fill()
        until(lambda: {"collector", "coordinator"} <= set(told_away(running)), what="both have told it")
        disk.free()
        done = finished(client, batch_id, content)
        assert done.batch["request_counts"] == {"total": 3_000, "completed": 3_000, "failed": 0}
        assert running.interrupt() == 0


def told_away(running: Local) -> list[str]:
    """The parts that said that the disk is full."""
    said = running.said.read_text()
    return re.findall(r'"role":"(\w+)","error":"[^"]*","event":"batch_store_away"', said)


def test_a_start_on_a_full_disk_is_refused_at_once(tmp_path: Path) -> None:
    """With the reason, instead of after the half minute that a database in use is waited for."""
    with mounted(tmp_path / "data") as disk:
        disk.fill()
        with local(tmp_path) as running:
            assert running.process.wait(25) == 2
            assert "--data: " in running.said.read_text()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--port", "{taken}"], "cannot listen on 127.0.0.1:{taken}: Address already in use"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
        (["--port", "99999"], "cannot listen on"),
        (["--data", "/dev/null/x"], "--data: /dev/null/x"),
        (["--backend-url", "localhost:8000"], "backend.base_url"),
        (["--latency", "soon"], "latency"),
        (["--api-key-file", "/nowhere/key"], "key"),
        (["--concurrency", "0"], "whole number from 1"),
    ],
)
def test_mistakes_are_told_before_anything_starts(tmp_path: Path, arguments: list[str], reason: str) -> None:
    """Exit code 2 and a line that names the cause, within seconds."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        given = [argument.replace("{taken}", port) for argument in arguments]
        if "--backend-url" not in given and "--api-key-file" in given:
            given += ["--backend-url", "http://127.0.0.1:1"]
        command = [sys.executable, "-m", "worker", "batches", "local", "--data", str(tmp_path / "data"), *given]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert reason.replace("{taken}", port) in done.stderr
    assert "Traceback" not in done.stderr


def test_one_process_has_the_data(tmp_path: Path) -> None:
    """A second one is told so."""
    with local(tmp_path) as first:
        assert first.base_url
        with local(tmp_path) as second:
            assert second.process.wait(60) == 2
            assert "in use" in second.said.read_text()


def test_own_address_in_the_environment_is_no_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`OPENAI_BASE_URL` is where clients of this API find it, so it does not make the API its own model server."""
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    with local(tmp_path) as running, running.client() as client:
        finished(client, create(client, upload(client, chat_file(3))), chat_file(3))


def test_serve_tells_what_is_missing(tmp_path: Path) -> None:
    """Topics that are not named: exit code 2, one line in the log."""
    environ = {**os.environ, "WORKER_BATCHES__DATABASE_URL": f"sqlite:///{tmp_path / 'b.db'}"}
    command = [sys.executable, "-m", "worker", "batches", "serve", "--set", "http.port=0", "--set", "batches.port=0"]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert "batches.request_topic: is required" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_api_alone_serves_with_keys(tmp_path: Path) -> None:
    """`keys add`, then `serve --role api`: the key works, another one does not, SIGTERM ends it with 0."""
    settings = [
        *("--set", f"batches.database_url=sqlite:///{tmp_path / 'b.db'}"),
        *("--set", f"batches.files={tmp_path / 'files'}", "--set", "batches.host=127.0.0.1"),
        *(
            "--set",
            "batches.port=0",
            "--set",
            "http.port=0",
            "--set",
            "http.host=127.0.0.1",
            "--set",
            "log.format=json",
        ),
    ]
    program = [sys.executable, "-m", "worker", "batches"]
    added = subprocess.run(
        [*program, "keys", "add", "acme", "ci", *settings], capture_output=True, text=True, timeout=60, check=True
    )
    key = added.stdout.strip()
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen([*program, "serve", "--role", "api", *settings], stderr=stream)
    try:

        def port() -> int | None:
            assert process.poll() is None, log.read_text()
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            return next((line["port"] for line in lines if line["event"] == "batch_server_started"), None)

        url = f"http://127.0.0.1:{until(port)}/v1"
        with openai.OpenAI(base_url=url, api_key=key, _strict_response_validation=True) as client:
            batch_id = create(client, upload(client, chat_file(3)))
            assert client.batches.retrieve(batch_id).status == "validating"
        assert httpx.get(f"{url}/batches", headers={"authorization": "Bearer wrong"}).status_code == 401
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    assert key not in log.read_text()
