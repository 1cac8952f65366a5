"""`inference-worker local`, the way a newcomer runs it."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from examples.make_requests import build
from tests.support.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

EXAMPLES = Path(__file__).parents[2] / "examples"
AWAY = "http://127.0.0.1:9"
"""Nothing listens there."""


@contextmanager
def _local(*arguments: object, stderr: Any = subprocess.PIPE) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "worker", "local", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _run(*arguments: object, limit_s: float = 120) -> tuple[int, str, str]:
    with _local(*arguments) as process:
        out, err = process.communicate(timeout=limit_s)
        return process.returncode, out, err


def _answers(path: Path) -> dict[int, dict[str, Any]]:
    """Return the answers by the number of their line."""
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    return {int(line["id"].removeprefix("batch_req_").split("-")[1]): line for line in lines}


def _requests(path: Path, count: int, text: str = "hello") -> Path:
    body = {"model": "m", "messages": [{"role": "user", "content": text}]}
    lines = (
        json.dumps({"path": "/v1/chat/completions", "metadata": {"row": row}, "body": body}) for row in range(count)
    )
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_examples_are_answered_one_by_one(tmp_path: Path) -> None:
    """As many answers as inputs, every metadata matched, every status as the example expects; exit 0."""
    output = tmp_path / "out.jsonl"
    code, _, err = _run(EXAMPLES / "requests.jsonl", output)
    assert code == 0, err
    examples, answers = build(), _answers(output)
    assert len(examples) == len(answers) == len(output.read_bytes().splitlines())
    for number, example in enumerate(examples, 1):
        answer = answers[number]
        assert (number, answer["status_code"]) == (number, example.expect)
        assert answer["metadata"] == example.metadata
    assert f"all {len(examples)} lines answered" in err


def test_a_second_run_answers_only_what_is_missing(tmp_path: Path) -> None:
    """What was answered stays as it is; a torn last line is answered again."""
    output = tmp_path / "out.jsonl"
    requests = _requests(tmp_path / "in.jsonl", 40)
    assert _run(requests, output)[0] == 0
    before = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(before[:25]) + before[25][:30])
    code, _, err = _run(requests, output)
    assert code == 0, err
    assert output.read_bytes().splitlines(keepends=True)[:25] == before[:25]
    assert sorted(_answers(output)) == list(range(1, 41))


def test_ctrl_c_keeps_what_was_answered(tmp_path: Path) -> None:
    """Exit 130, the answers so far are there, no process stays behind, and the same command goes on."""
    output, requests = tmp_path / "out.jsonl", _requests(tmp_path / "in.jsonl", 300)
    with _local(requests, output, "--latency", "300ms", "--concurrency", "8") as process:
        until(lambda: output.exists() and output.read_bytes().count(b"\n") >= 10)
        children = _children(process.pid)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert "interrupted" in err
        assert 10 <= len(_answers(output)) < 300
        assert children
        until(lambda: not any(_is_alive(child) for child in children))
        assert _run(requests, output)[0] == 0
        assert sorted(_answers(output)) == list(range(1, 301))


def test_kill_9_leaves_no_process_behind_and_loses_nothing(tmp_path: Path) -> None:
    """The children end by themselves; every line is answered exactly once after the next run."""
    output, requests = tmp_path / "out.jsonl", _requests(tmp_path / "in.jsonl", 200)
    with _local(requests, output, "--latency", "200ms", "--concurrency", "8") as process:
        until(lambda: output.exists() and output.read_bytes().count(b"\n") >= 10)
        children = _children(process.pid)
        process.kill()
        process.communicate(timeout=10)
        until(lambda: not any(_is_alive(child) for child in children), 20)
        assert _run(requests, output)[0] == 0
        assert len(output.read_bytes().splitlines()) == 200
        assert sorted(_answers(output)) == list(range(1, 201))


def test_a_worker_that_is_killed_is_started_again(tmp_path: Path) -> None:
    """Its leases run out at the embedded server, and every line is answered once."""
    output, requests = tmp_path / "out.jsonl", _requests(tmp_path / "in.jsonl", 200)
    with _local(requests, output, "--latency", "200ms", "--concurrency", "8") as process:
        until(lambda: output.exists() and output.read_bytes().count(b"\n") >= 10)
        worker = next(child for child in _children(process.pid) if b"\0run\0" in _command(child))
        os.kill(worker, signal.SIGKILL)
        _, err = process.communicate(timeout=150)
        assert process.returncode == 0, err
        assert "restarting it" in err
        assert sorted(_answers(output)) == list(range(1, 201))
        assert len(output.read_bytes().splitlines()) == 200


def test_batch_lines_become_batch_output_lines(tmp_path: Path) -> None:
    """OpenAI's batch input gives OpenAI's batch output, through a pipe as well."""
    lines = (EXAMPLES / "batch.jsonl").read_bytes()
    process = subprocess.run(
        [sys.executable, "-m", "worker", "local", "-", "-"], input=lines, capture_output=True, timeout=60, check=False
    )
    assert process.returncode == 0, process.stderr
    answers = [json.loads(line) for line in process.stdout.splitlines()]
    wanted = sorted(json.loads(line)["custom_id"] for line in lines.splitlines())
    assert sorted(answer["custom_id"] for answer in answers) == wanted
    assert all(answer["response"]["body"] for answer in answers)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("there-is-none.jsonl", "out.jsonl"), 1, "there-is-none.jsonl: does not exist"),
        (("in.jsonl", "nowhere/out.jsonl"), 1, "nowhere/out.jsonl: its directory does not exist"),
        (("in.jsonl", "in.jsonl"), 1, "in.jsonl: is the input"),
        (
            ("in.jsonl", "out.jsonl", "--config", "none.yaml"),
            2,
            "none.yaml: cannot be read (No such file or directory)",
        ),
        (
            ("in.jsonl", "out.jsonl", "--backend-url", "my-server:8000"),
            2,
            "backend.base_url: must be http://host[:port] ",
        ),
        (("in.jsonl", "out.jsonl", "--latency", "soon"), 2, "--latency: 'soon' is not a duration"),
    ],
    ids=["no input", "no folder", "same file", "no settings", "no url", "no duration"],
)
def test_mistakes_are_told_before_anything_starts(
    arguments: tuple[str, ...], code: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence that names what is wrong, 2 for settings and 1 for files, no summary, and no output is made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    _requests(tmp_path / "in.jsonl", 3)
    ended, _, err = _run(*arguments)
    assert ended == code
    assert told in err
    assert err.startswith("inference-worker: ")
    assert err.count("\n") == code, "settings have a heading"
    assert not (tmp_path / "out.jsonl").exists()


def test_a_backend_that_is_away_is_waited_for_and_told(tmp_path: Path) -> None:
    """Nothing is answered with an error; the terminal says what it waits for."""
    output, requests = tmp_path / "out.jsonl", _requests(tmp_path / "in.jsonl", 5)
    told = tmp_path / "stderr"
    with told.open("w") as stream, _local(requests, output, "--backend-url", AWAY, stderr=stream) as process:
        held = re.compile(rf"attempt held: The backend could not be reached\..*\(connect, {AWAY}\)")
        until(lambda: held.search(told.read_text()), what="the reason of the wait is told")
        until(lambda: f"breaker opened (connect, {AWAY})" in told.read_text())
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert not output.read_bytes()


def _children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed]


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
