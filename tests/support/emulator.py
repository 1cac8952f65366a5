"""
Google's official Pub/Sub emulator, wherever this machine has it.

Preferred as a local process (the jar of the Cloud SDK, with Java), else in a container by testcontainers where a
Docker-compatible engine answers, else not at all: `emulator` then says why, and the tests skip with that reason.
"""

import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

if TYPE_CHECKING:
    from testcontainers.core.container import DockerContainer

START_S = 30.0
PULL_S = 900.0
"""What a test may take that has to pull the image first: it is larger than a gigabyte."""
IMAGE = os.environ.get("EMULATOR_IMAGE", "gcr.io/google.com/cloudsdktool/google-cloud-cli:emulators")
SOCKET = Path("/var/run/docker.sock")
NO_JAR = "no gcloud with its component pubsub-emulator and Java"


class NoEmulatorError(Exception):
    """This machine has no emulator; the text says what was looked for."""


def find_jar() -> Path | None:
    """Return the emulator's jar in the Cloud SDK that `gcloud` belongs to."""
    gcloud = shutil.which("gcloud")
    if gcloud is None or shutil.which("java") is None:
        return None
    for root in (Path(gcloud).resolve().parents[1], Path("/usr/lib/google-cloud-sdk")):
        jars = sorted((root / "platform" / "pubsub-emulator" / "lib").glob("cloud-pubsub-emulator-*-all.jar"))
        if jars:
            return jars[-1]
    return None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_up(address: str, process: "subprocess.Popen[bytes] | None") -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if process is not None and process.poll() is not None:
            raise NoEmulatorError(f"the emulator ended with {process.returncode} at start")
        try:
            with urllib.request.urlopen(f"http://{address}/", timeout=1) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise NoEmulatorError(f"the emulator did not answer within {START_S:g} s")


@contextmanager
def _local_process(jar: Path) -> Iterator[str]:
    address = f"127.0.0.1:{free_port()}"
    command = ["java", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xmx1g", "-jar", str(jar)]
    command += ["--host=127.0.0.1", f"--port={address.rpartition(':')[2]}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until_up(address, process)
        yield address
    finally:
        process.terminate()
        process.wait(10)


def _engine_host(engine: SplitResult) -> str:
    """Return where the engine publishes ports: this machine, or the one that DOCKER_HOST names (CI with its own)."""
    return os.environ.get("TESTCONTAINERS_HOST_OVERRIDE") or engine.hostname or "127.0.0.1"


def _probe(engine: SplitResult) -> None:
    # Docker's library leaves the socket of a connection that fails to the garbage collector, which is a warning, and
    # warnings are errors here.  So it is asked only when a container engine listens.
    try:
        if engine.scheme in {"", "unix"}:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(engine.path)
        elif engine.hostname is not None and engine.port is not None:
            socket.create_connection((engine.hostname, engine.port), timeout=5).close()
    except OSError as error:
        reason = f"the container engine at {engine.geturl()} does not answer: {error.strerror or error}"
        raise NoEmulatorError(f"{NO_JAR}, and {reason}") from error


def _start_container(image: str, host: str) -> "DockerContainer":
    # Testcontainers' reaper is a second image from another registry, and not every engine lets it have the socket; the
    # one container is removed by `_container`.  Its module for Pub/Sub wants google-cloud-datastore.
    os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")
    from testcontainers.core.container import DockerContainer

    try:
        container = DockerContainer(image).with_command("gcloud beta emulators pubsub start --host-port=0.0.0.0:8085")
    except Exception as error:
        raise NoEmulatorError(f"{NO_JAR}, and no use of the container engine: {_first_line(error)}") from error
    container.ports = {"8085/tcp": ("127.0.0.1", None) if host == "127.0.0.1" else None}
    try:
        container.start()  # pulls the image where the engine does not have it
    except Exception as error:
        container.stop()
        raise NoEmulatorError(f"{NO_JAR}, and no container of {image}: {_first_line(error)}") from error
    return container


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]


@contextmanager
def _container() -> Iterator[str]:
    if not os.environ.get("DOCKER_HOST") and not SOCKET.is_socket():
        raise NoEmulatorError(f"{NO_JAR}, and no container engine (DOCKER_HOST is not set, {SOCKET} is not there)")
    engine = urlsplit(os.environ.get("DOCKER_HOST") or f"unix://{SOCKET}")
    _probe(engine)
    host = _engine_host(engine)
    container = _start_container(IMAGE, host)
    try:
        address = f"{host}:{container.get_exposed_port(8085)}"
        _wait_until_up(address, None)
        yield address
    finally:
        container.stop()


@contextmanager
def emulator() -> Iterator[str]:
    """
    Run the emulator and yield its `host:port`.

    Raises:
        NoEmulatorError: There is none on this machine; the text is the reason of the skip.
    """
    jar = find_jar()
    with _local_process(jar) if jar is not None else _container() as address:
        yield address
