"""What the commands' tests share: a settings file, a taken port, the program as a process."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]

GOOD = """
pubsub: {project_id: p, request_subscription: requests, response_topic: responses}
backend:
  base_url: http://localhost:1
  api_key: sk-secret
  headers: {api-key: header-secret}
dedupe: {store: redis, redis_url: "redis://:redis-secret@r/0"}
http: {port: 0, host: 127.0.0.1}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A settings file that can be used."""
    path = tmp_path / "worker.yaml"
    path.write_text(GOOD)
    return path


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port that another socket listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def read_fault(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Return what a command wrote to standard error: no traceback, and nothing on standard output."""

    def read() -> str:
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "Traceback" not in captured.err
        return captured.err

    return read


@pytest.fixture
def run() -> Run:
    """Run the program as a process; keyword arguments are variables of its environment."""

    def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "worker", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, **environment},
        )

    return run
