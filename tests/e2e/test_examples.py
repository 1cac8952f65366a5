"""The example programs against the embedded server and a real worker: nothing lost, nothing twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.rig import rig
from tests.support.waiting import until
from worker.emulators.pubsub import LocalPubSubThread

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS = 60


def _program(name: str, *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, str(EXAMPLES / name), "exam", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _run(name: str, *arguments: object) -> str:
    with _program(name, *arguments) as process:
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0, said
        return said


def _rows(file: Path) -> list[int]:
    return [json.loads(line)["metadata"]["row"] for line in file.read_bytes().splitlines()]


def test_every_row_is_written_once_whatever_is_published_twice_or_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The publisher runs twice and the consumer is killed in the middle: one line for each row in the end."""
    prompts, output = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("".join(f"Question {row}?\n" for row in range(ROWS)), encoding="utf-8")
    with LocalPubSubThread() as server, rig(server.address, tmp_path) as built:
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", server.address)
        built.worker()
        requests, answers = built.requests.split("/")[-1], built.response_subscription.split("/")[-1]
        assert _run("publish.py", requests, prompts) == f"{ROWS} requests published\n"
        with _program("consume.py", answers, output, ROWS + 1) as killed:
            until(lambda: output.exists() and output.read_bytes().count(b"\n") >= 20)
            killed.kill()
        before = _rows(output)
        _run("publish.py", requests, prompts)
        server.advance(60)  # leases of the consumer that was killed
        _run("consume.py", answers, output, ROWS)
        assert server.faults.inspect(built.response_subscription).leased == (), "what was written is acked"
    assert _rows(output)[: len(before)] == before
    assert sorted(_rows(output)) == list(range(ROWS))


def test_a_subscription_that_does_not_exist_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The consumer ends and does not wait for ever."""
    with LocalPubSubThread() as server:
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", server.address)
        with _program("consume.py", "none", tmp_path / "answers.jsonl", 1) as process:
            said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "NotFound" in said
