"""
Google's official Pub/Sub emulator, wherever this machine has it.

Preferred as a local process (the jar of the Cloud SDK, with Java), else in a container by testcontainers where a
Docker-compatible engine answers, else not at all: `find_emulator` then says why, and the tests skip with that reason.
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

START_S = 30.0


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


def _free_port() -> int:
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
    address = f"127.0.0.1:{_free_port()}"
    command = ["java", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xmx256m", "-jar", str(jar)]
    command += ["--host=127.0.0.1", f"--port={address.rpartition(':')[2]}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until_up(address, process)
        yield address
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def _container() -> Iterator[str]:
    if not os.environ.get("DOCKER_HOST") and not Path("/var/run/docker.sock").is_socket():
        raise NoEmulatorError("no jar with Java here, and no container engine")
    from testcontainers.core.container import DockerContainer  # its Pub/Sub module wants google-cloud-datastore

    image = os.environ.get("PUBSUB_EMULATOR_IMAGE", "gcr.io/google.com/cloudsdktool/cloud-sdk:emulators")
    try:
        container = DockerContainer(image).with_command("gcloud beta emulators pubsub start --host-port=0.0.0.0:8085")
        container.ports = {"8085/tcp": ("127.0.0.1", None)}
        container.start()
    except Exception as error:
        raise NoEmulatorError(f"no jar with Java here, and no container engine: {type(error).__name__}") from error
    try:
        address = f"127.0.0.1:{container.get_exposed_port(8085)}"
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
