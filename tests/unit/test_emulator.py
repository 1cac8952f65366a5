"""Where there is no emulator, the tests of it are skipped, and the reason says what was looked for."""

import http.server
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support import emulator as module
from tests.support.emulator import NoEmulatorError, emulator


class _Engine(http.server.BaseHTTPRequestHandler):
    """A Docker-compatible engine that answers, and has neither images nor a way to a registry."""

    def do_GET(self) -> None:
        if self.path.endswith(("/_ping", "/version")):
            self._answer(200, b'{"ApiVersion": "1.41"}')
        else:
            self._answer(404, b'{"message": "no such image"}')

    def do_POST(self) -> None:
        self._answer(404 if "/containers/create" in self.path else 500, b'{"message": "no way to the registry"}')

    def _answer(self, status: int, text: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def address_string(self) -> str:
        return "socket"

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(autouse=True)
def _bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither gcloud nor Java nor a container engine; `tmp_path` instead of this machine."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(module, "SOCKET", tmp_path / "docker.sock")
    monkeypatch.setattr(module, "IMAGE", "registry.test/emulators:latest")
    for name in ("DOCKER_HOST", "DOCKER_CONFIG", "TESTCONTAINERS_HOST_OVERRIDE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TESTCONTAINERS_RYUK_DISABLED", "true")


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An engine behind a socket."""
    path = tmp_path / "engine.sock"
    with socketserver.ThreadingUnixStreamServer(str(path), _Engine) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
        yield
        server.shutdown()
        thread.join()


def _reason() -> str:
    with pytest.raises(NoEmulatorError) as caught, emulator():
        pass
    return str(caught.value)


def test_neither_jar_nor_engine() -> None:
    """Both things that were looked for are named."""
    reason = _reason()
    assert "no gcloud with its component pubsub-emulator and Java" in reason
    assert "DOCKER_HOST is not set" in reason


def test_engine_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A socket that nobody listens on is no engine, and asking it leaves no open socket behind."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nobody.sock")
    assert _reason().endswith("/nobody.sock does not answer: No such file or directory")


@pytest.mark.usefixtures("engine")
def test_engine_without_the_image() -> None:
    """An engine that cannot pull is told from one that is not there: the image and the engine's words are named."""
    reason = _reason()
    assert "no container of registry.test/emulators:latest" in reason
    assert "no way to the registry" in reason
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("docker_host", "host"),
    [("", "127.0.0.1"), ("unix:///run/docker.sock", "127.0.0.1"), ("tcp://docker:2375", "docker")],
)
def test_where_ports_are_published(docker_host: str, host: str) -> None:
    """On this machine, unless the engine is another one."""
    assert module._engine_host(urlsplit(docker_host)) == host
