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
from worker.emulators.openai import SimBackendThread, SimOptions

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


def test_ctrl_c_keeps_the_answers_under_way(tmp_path: Path) -> None:
    """The requests at the server are finished and written; the summary counts all lines; the same command goes on."""
    output, requests = tmp_path / "out.jsonl", _requests(tmp_path / "in.jsonl", 300)
    with _local(requests, output, "--latency", "700ms", "--concurrency", "8") as process:
        until(lambda: output.exists() and output.read_bytes().count(b"\n") >= 16)
        children, before = _children(process.pid), output.read_bytes().count(b"\n")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert "interrupted: waiting for the requests at the server, 8 at most" in err
        assert "Ctrl-C again ends at once" in err
        kept = len(_answers(output))
        assert before < kept < 300
        assert f"stopped: {kept} of 300 lines answered" in err
        assert re.search(rf"not answered +│ +{300 - kept} ", err)
        assert "the same command continues this run" in err
        assert children
        until(lambda: not any(_is_alive(child) for child in children))
        assert _run(requests, output)[0] == 0
        assert sorted(_answers(output)) == list(range(1, 301))


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    """Though the server takes a minute for each request; nothing half-written stays, and no process."""
    output, requests = tmp_path / "out.jsonl", _requests(tmp_path / "in.jsonl", 20)
    told = tmp_path / "stderr"
    with told.open("w") as stream, _local(requests, output, "--latency", "60s", stderr=stream) as process:
        until(lambda: "0/20 lines" in told.read_text(), 30)
        children = _children(process.pid)
        process.send_signal(signal.SIGINT)
        until(lambda: "waiting for the requests at the server" in told.read_text())
        process.send_signal(signal.SIGINT)
        assert process.wait(15) == 130
    assert "stopped: 0 of 20 lines answered" in told.read_text()
    assert output.read_bytes() == b""
    until(lambda: not any(_is_alive(child) for child in children))


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


def test_a_simulated_engine_answers(tmp_path: Path) -> None:
    """Each line, at the model's pace."""
    output, requests = tmp_path / "out.jsonl", _requests(tmp_path / "in.jsonl", 20)
    code, _, err = _run(requests, output, "--simulated", "--engine", "qwen-7b-gb200")
    assert code == 0, err
    answers = [json.loads(line) for line in output.read_bytes().splitlines()]
    assert [answer["status_code"] for answer in answers] == [200] * 20
    assert {answer["metadata"]["row"] for answer in answers} == set(range(20))


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


def test_a_backend_that_is_away_is_told_before_anything_starts(tmp_path: Path) -> None:
    """One sentence with the reason, and no output is made."""
    output, requests = tmp_path / "out.jsonl", _requests(tmp_path / "in.jsonl", 5)
    code, _, err = _run(requests, output, "--backend-url", AWAY)
    assert code == 1
    assert f"{AWAY} cannot be reached: Connection refused; --keep-going starts all the same" in err
    assert not output.exists()


def test_a_backend_that_is_away_is_waited_for_on_request(tmp_path: Path) -> None:
    """Nothing is answered with an error; the terminal says what it waits for."""
    output, requests = tmp_path / "out.jsonl", _requests(tmp_path / "in.jsonl", 5)
    told = tmp_path / "stderr"
    command = (requests, output, "--backend-url", AWAY, "--keep-going")
    with told.open("w") as stream, _local(*command, stderr=stream) as process:
        held = re.compile(rf"attempt held: The backend could not be reached\..*\(connect, {AWAY}\)")
        until(lambda: held.search(told.read_text()), what="the reason of the wait is told")
        until(lambda: f"breaker opened (connect, {AWAY})" in told.read_text())
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert not output.read_bytes()


@pytest.fixture
def server() -> Iterator[str]:
    """A server with a key and two models; its address."""
    with SimBackendThread(SimOptions.of(control_port=0, api_key="sk-right", models="qwen,mistral")) as sim:
        yield sim.base_url


def test_a_wrong_key_is_told_before_anything_starts(tmp_path: Path, server: str) -> None:
    """By the list of models, which needs the key."""
    output, requests = tmp_path / "out.jsonl", _requests(tmp_path / "in.jsonl", 5)
    code, _, err = _run(requests, output, "--backend-url", server)
    assert code == 1
    assert "refuses the credentials (401 for GET " in err
    assert not output.exists()


def test_a_wrong_key_is_told_at_once_by_a_server_without_a_list(tmp_path: Path) -> None:
    """The first refused request ends the run, before any line is answered."""
    output, requests = tmp_path / "out.jsonl", _requests(tmp_path / "in.jsonl", 50)
    with SimBackendThread(SimOptions.of(control_port=0)) as sim:
        sim.control({"mode": "unauthorized", "match": {"path": "/v1/chat/completions"}})
        address = sim.base_url
        code, _, err = _run(requests, output, "--backend-url", address)
    assert code == 1
    assert f"{address}: The backend refuses the worker's credentials. (status 401); no line was answered" in err
    assert output.read_bytes() == b""


def test_a_wrong_model_stops_the_run_and_a_corrected_command_answers_everything(tmp_path: Path, server: str) -> None:
    """Told before and at once; no line counts as answered; `--model` is the correction."""
    output, requests, key = tmp_path / "out.jsonl", _requests(tmp_path / "in.jsonl", 300), tmp_path / "key"
    key.write_text("sk-right\n")
    command = (requests, output, "--backend-url", server, "--api-key-file", key)
    code, _, err = _run(*command)
    assert code == 1
    assert f"server: {server}; it has mistral, qwen" in err
    assert "warning: 300 lines ask for the model 'm' (first line 1), which is not among them" in err
    assert re.search(r"the first 20 answers are model_not_found \(line \d+: The model `m` does not exist", err)
    assert f"({server}/v1/chat/completions)" in err
    assert output.read_bytes() == b""
    code, _, err = _run(*command, "--model", "qwen")
    assert code == 0, err
    assert {answer["body"]["model"] for answer in _answers(output).values()} == {"qwen"}
    code, _, err = _run(requests, tmp_path / "errors.jsonl", *command[2:], "--keep-going")
    assert code == 0, err
    assert "all 300 lines answered, 300 with an error" in err
    answers = _answers(tmp_path / "errors.jsonl")
    assert {answer["url"] for answer in answers.values()} == {f"{server}/v1/chat/completions"}
    again = (requests, tmp_path / "errors.jsonl", *command[2:], "--model", "qwen", "--retry-errors")
    code, _, err = _run(*again)
    assert (code, "nothing to answer" in err) == (0, True), "the class is not one that succeeds when repeated"
    code, _, err = _run(*again, "model_not_found,quota")
    assert code == 0, err
    assert "output: 300 answers were taken out of" in err
    assert {answer["status_code"] for answer in _answers(tmp_path / "errors.jsonl").values()} == {200}


def test_the_variables_of_openais_client_name_the_server(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Address and key; the key stands on no command line."""
    output, requests = tmp_path / "out.jsonl", _requests(tmp_path / "in.jsonl", 40)
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-right")
    with _local(requests, output, "--model", "qwen") as process:
        until(lambda: any(b"\0run\0" in _command(child) for child in _children(process.pid)))
        assert not any(b"sk-right" in _command(child) for child in _children(process.pid))
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert "(from OPENAI_BASE_URL, OPENAI_API_KEY)" in err


def test_an_edited_input_is_noticed(tmp_path: Path) -> None:
    """Answers to other lines are not mixed with these; the output stays as it was."""
    output, requests = tmp_path / "out.jsonl", _requests(tmp_path / "in.jsonl", 20)
    assert _run(requests, output)[0] == 0
    before, lines = output.read_bytes(), requests.read_text().splitlines()
    requests.write_text("\n".join([*lines[:4], lines[4].replace("hello", "goodbye"), *lines[5:]]))
    code, _, err = _run(requests, output)
    assert code == 1
    assert "1 of its 20 answers are to lines that" in err
    assert "(line 5 has changed)" in err
    code, _, err = _run(EXAMPLES / "batch.jsonl", output)
    assert code == 1
    assert "is the output of another input; choose another output" in err
    assert output.read_bytes() == before
    code, _, err = _run(requests, output, "--replace-changed")
    assert code == 0, err
    assert "output: 1 answers were taken out of" in err
    after = output.read_bytes()
    assert sorted(_answers(output)) == list(range(1, 21))
    kept = set(before.splitlines()) & set(after.splitlines())
    assert len(kept) == 19


def test_rows_of_a_table_are_answered(tmp_path: Path) -> None:
    """One answer for each row, which says which one it is."""
    table, output = tmp_path / "people.csv", tmp_path / "out.jsonl"
    table.write_text('name,age\nAda,36\n"Bob, the second",7\n')
    template = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Greet {name}, aged {age}."}]})
    code, _, err = _run(table, output, "--template", template)
    assert code == 0, err
    assert {number: answer["metadata"] for number, answer in _answers(output).items()} == {1: {"row": 1}, 2: {"row": 2}}
    code, _, err = _run(table, output)
    assert code == 2
    assert "people.csv is a table; say what request each row becomes" in err


def test_each_error_class_is_shown_with_an_example(tmp_path: Path) -> None:
    """On the screen when it comes, in the summary, and in the report."""
    output = tmp_path / "out.jsonl"
    _, _, err = _run(EXAMPLES / "requests.jsonl", output)
    for shown in (err.partition("one example")[0], err.partition("one example")[2]):
        assert re.search(r"bad_message, line \d+: \S", shown)
        assert re.search(r"invalid_request, line \d+: .*", shown)
    joined = "".join(err.split())  # the screen breaks long lines; which line comes first is chance
    assert re.search(r"\(http://127\.0\.0\.1:\d+/v1/[a-z/]+\)", joined)
    report = [sys.executable, "-m", "worker", "report", str(output)]
    told = subprocess.run(report, capture_output=True, text=True, timeout=60, check=True).stdout
    assert re.search(r"^invalid_request, line \d+: ", told, re.MULTILINE)


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
