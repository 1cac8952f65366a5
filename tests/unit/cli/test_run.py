"""`inference-worker run`: exit codes, and the garbage collector's tuning."""

import gc
import json
import os
import socket
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.cli.conftest import GOOD, Run
from worker.cli.run import YOUNG_OBJECTS, flat, tune_collector


@pytest.mark.slow
def test_run_with_a_broker_that_lacks_the_subscription_exits_1(config: Path, run: Run) -> None:
    """One log line that names it, no traceback, and the process really ends."""
    from worker.emulators.pubsub import LocalPubSubThread

    config.write_text(GOOD.replace("store: redis", "store: memory"))
    with LocalPubSubThread() as server:
        ended = run("run", "--config", str(config), PUBSUB_EMULATOR_HOST=server.address)
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert "the subscription projects/p/subscriptions/requests does not exist" in last
    assert "Traceback" not in ended.stderr
    assert "secret" not in ended.stderr


@pytest.mark.slow
def test_run_whose_port_is_taken_exits_2(config: Path, taken_port: int, run: Run) -> None:
    """The fault names the key, and nothing is leased before."""
    ended = run("run", "--config", str(config), "--set", f"http.port={taken_port}", PUBSUB_EMULATOR_HOST="127.0.0.1:1")
    assert ended.returncode == 2
    assert f"http.port: cannot listen on 127.0.0.1:{taken_port}" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_run_with_standard_error_on_a_full_disk_keeps_its_exit_code(config: Path) -> None:
    """Logs that cannot be written change nothing about what happens."""
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full on this system")
    with Path("/dev/full").open("w") as full, socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = subprocess.run(
            [sys.executable, "-m", "worker", "run", "--config", str(config), "--set", f"http.port={port}"],
            stdout=full,
            stderr=full,
            timeout=60,
            check=False,
            env={**os.environ, "PUBSUB_EMULATOR_HOST": "127.0.0.1:1"},
        )
    assert ended.returncode == 2


@pytest.mark.slow
def test_run_ends_after_an_unexpected_exception(config: Path) -> None:
    """With a traceback in the log and exit 1, though a library's thread would keep the interpreter alive."""
    program = f"""
import threading, time
import worker.service
from worker.cli.main import run_command

async def run(self):
    raise ZeroDivisionError("bug")

worker.service.Service.run = run
threading.Thread(target=time.sleep, args=(600,)).start()
run_command(["run", "--config", {str(config)!r}])
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    last = json.loads(ended.stderr.splitlines()[-1])
    assert last["event"] == "worker_failed"
    assert "ZeroDivisionError: bug" in last["exception"]


@pytest.mark.slow
@pytest.mark.parametrize("log_format", ["console", "json"])
def test_the_start_tells_the_settings_in_force(config: Path, taken_port: int, run: Run, log_format: str) -> None:
    """A person gets those that differ from the defaults, on one short line; a machine gets all of them; no secrets."""
    options = (
        "--set",
        f"http.port={taken_port}",
        "--set",
        f"log.format={log_format}",
        "--set",
        "backend.window.max=32",
    )
    ended = run("run", "--config", str(config), *options, PUBSUB_EMULATOR_HOST="127.0.0.1:1")
    (line,) = [line for line in ended.stderr.splitlines() if "settings_loaded" in line]
    assert "secret" not in line
    if log_format == "json":
        told = json.loads(line)
        assert (told["backend"]["window"]["max"], told["drain"]["grace_s"]) == (32, 540.0)
    else:
        assert "backend.window.max=32 " in line
        assert "grace_s" not in line
        assert len(line) < 600


def test_sections_are_told_by_the_full_path_of_their_keys() -> None:
    """As `--set` takes them; an empty mapping is a value."""
    assert dict(flat({"a": {"b": {"c": 1}, "d": {}}, "e": [1]})) == {"a.b.c": 1, "a.d": {}, "e": [1]}


@pytest.fixture
def _collector() -> Iterator[None]:
    """Undo the tuning afterwards."""
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


class _Ring:
    """A cycle of one."""

    def __init__(self) -> None:
        self.me = self


@pytest.mark.usefixtures("_collector")
def test_existing_objects_are_frozen_and_young_ones_scanned_less_often() -> None:
    """All objects are frozen; the first threshold is ours, the others stay."""
    gc.set_threshold(700, 11, 12)
    tune_collector()
    assert gc.get_threshold() == (YOUNG_OBJECTS, 11, 12)
    assert gc.get_freeze_count() > 1000


@pytest.mark.usefixtures("_collector")
def test_a_larger_threshold_stays() -> None:
    """An interpreter's larger default is not lowered."""
    gc.set_threshold(50_000, 10, 10)
    tune_collector()
    assert gc.get_threshold() == (50_000, 10, 10)


@pytest.mark.usefixtures("_collector")
def test_cycles_are_still_collected() -> None:
    """A cycle that is made later is found without an explicit collection."""
    tune_collector()
    ring = weakref.ref(_Ring())
    left = [[] for _ in range(2 * YOUNG_OBJECTS)]
    assert ring() is None
    assert len(left) == 2 * YOUNG_OBJECTS


def test_importing_tunes_nothing() -> None:
    """Only the command itself tunes the collector."""
    code = "import gc, worker.cli.run; print(gc.get_freeze_count())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.strip() == b"0"
