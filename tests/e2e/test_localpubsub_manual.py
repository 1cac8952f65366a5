"""What the manual of the embedded Pub/Sub server tells a reader to type works as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.rig import WorkerProcess
from worker.emulators.openai import SimBackendThread, SimOptions
from worker.emulators.pubsub import LocalPubSubThread

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

MANUAL = (Path(__file__).parents[2] / "docs" / "localpubsub.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", MANUAL, re.DOTALL | re.MULTILINE)


def _block(language: str, word: str) -> str:
    """Return the one block of a language that holds a word."""
    [found] = [text for name, text in BLOCKS if name == language and word in text]
    return found


def test_the_whole_thing_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`setup`, `run` and the program, with the file of the manual: the program prints the answer to its request."""
    config = tmp_path / "demo.yaml"
    with LocalPubSubThread() as server, SimBackendThread(SimOptions.of(control_port=0)) as sim:
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", server.address)
        config.write_text(_block("yaml", "demo.yaml").replace("http://127.0.0.1:8000", sim.base_url))
        inference_worker = [sys.executable, "-m", "worker"]
        subprocess.run([*inference_worker, "setup", "--config", str(config)], check=True, timeout=30)
        port = {"http.host": "127.0.0.1", "http.port": 0}
        worker = WorkerProcess(
            tmp_path / "log",
            port,
            {"PUBSUB_EMULATOR_HOST": server.address},
            command=[*inference_worker, "run", "--config", str(config)],
        )
        try:
            worker.wait_started()
            program = [sys.executable, "-c", _block("python", "publisher.publish")]
            printed = subprocess.run(program, capture_output=True, text=True, timeout=60, check=True).stdout
        finally:
            worker.close()
    assert printed.startswith("""b'{"status_code":200,"metadata":{"row": 1},"body":{"id":"chatcmpl-""")


def test_the_test_of_the_manual() -> None:
    """The block for tests runs as it stands."""
    exec(compile(_block("python", "server.faults"), "docs/localpubsub.md", "exec"), {})
