"""`inference-worker setup`: arguments and exit codes, faults told in a line."""

import socket
from pathlib import Path

import pytest

from worker.cli.main import run_command
from worker.emulators.pubsub import LocalPubSubThread

PUBSUB = "pubsub: {project_id: p, request_subscription: worker, response_topic: responses}\n"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Settings without a backend: none is called here."""
    path = tmp_path / "worker.yaml"
    path.write_text(PUBSUB + "setup: {request_topic: requests}\n")
    return path


def faults(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what stands on standard error: sentences, no traceback, and nothing on standard output."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


def test_no_backend_is_needed(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Topics can be made before the model server is known; a route that is named changes nothing."""
    with LocalPubSubThread() as server:
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", server.address)
        assert run_command(["setup", "--config", str(config), "--dry-run"]) == 0
        config.write_text(config.read_text() + "routes: [{name: default, base_url: 'http://vllm:8000'}]\n")
        assert run_command(["setup", "--config", str(config)]) == 0


def test_faults_of_the_settings_exit_2(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each with its key, whether any command or only this one minds."""
    config.write_text(PUBSUB + "setup: {ack_deadline_s: 5, requests: r}\n")
    assert run_command(["setup", "--config", str(config)]) == 2
    told = faults(capsys)
    assert "  - setup.ack_deadline_s: " in told
    assert "  - setup.requests: unknown key\n" in told


def test_a_topic_that_only_setup_needs_is_asked_for(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run` does without `setup.request_topic`, so only `setup` calls it missing."""
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", "127.0.0.1:1")
    config.write_text(PUBSUB + "backend: {base_url: 'http://vllm:8000'}\n")
    assert run_command(["config", "check", str(config)]) == 0
    capsys.readouterr()
    assert run_command(["setup", "--config", str(config)]) == 2
    assert "setup.request_topic: is required by setup (WORKER_SETUP__REQUEST_TOPIC)" in faults(capsys)


def test_no_credentials_exit_2(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The sentence says which are missing."""
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    assert run_command(["setup", "--config", str(config)]) == 2
    assert "no Google Cloud credentials" in faults(capsys)


def test_a_server_that_is_away_exits_1(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says that trying again may help."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", f"127.0.0.1:{taken.getsockname()[1]}")
        assert run_command(["setup", "--config", str(config)]) == 1
    assert faults(capsys).startswith("inference-worker: Pub/Sub cannot be reached, run setup again later: ")
