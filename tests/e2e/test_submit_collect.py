"""`submit`, `collect`, `watch` and `retry-failed` against a worker with default settings, killed and resumed."""

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.rig import Rig, rig
from tests.support.waiting import until
from worker.client.ledger import Ledger
from worker.emulators.pubsub import LocalPubSubThread

KILLS = int(os.environ.get("KILLS", "6"))
"""Of each of the two commands; `KILLS=60` is the long form."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300 if KILLS <= 6 else 3600)]


@pytest.fixture
def built(tmp_path: Path) -> Iterator[Rig]:
    with LocalPubSubThread() as server, rig(server.address, tmp_path) as made:
        yield made


def _start(built: Rig, *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "worker", *map(str, arguments)]
    for key, value in {
        "pubsub.emulator_host": built.address,
        "pubsub.project_id": built.admin.project,
        "pubsub.response_topic": built.responses,
        "setup.request_topic": built.requests,
    }.items():
        command += ["--set", f"{key}={value}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _run(built: Rig, *arguments: object) -> tuple[int, str, str]:
    with _start(built, *arguments) as process:
        out, err = process.communicate(timeout=120)
    assert "Traceback" not in err
    return process.returncode, out, err


def _file(folder: Path, count: int, text: str = "hello") -> Path:
    path = folder / "in.jsonl"
    with path.open("w") as file:
        for row in range(count):
            content = f"{'bad' if text == 'mixed' and row % 10 == 0 else text} {row}"
            body = {"model": "m", "messages": [{"role": "user", "content": content}]}
            line = {"custom_id": f"c{row}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    return path


def _custom_ids(path: Path) -> Counter[str]:
    return Counter(json.loads(line)["custom_id"] for line in path.read_bytes().splitlines())


def _killed_after(process: "subprocess.Popen[Any]", seconds: float) -> bool:
    """Kill a process after a time; return whether it still ran."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return True
    process.communicate()
    return False


def test_a_file_is_submitted_and_its_answers_are_collected(built: Rig, tmp_path: Path) -> None:
    """One command for both; the subscription that it made is gone afterwards."""
    built.worker()
    path, output = _file(tmp_path, 200), tmp_path / "out.jsonl"
    code, _, err = _run(built, "submit", path, "--wait", output, "--timeout", 60)
    assert code == 0, err
    assert "complete: 200/200 answered (100 %)" in err
    assert _custom_ids(output) == {f"c{row}": 1 for row in range(200)}
    subscriptions = built.admin.publisher.list_topic_subscriptions(request={"topic": built.responses})
    assert [name for name in subscriptions if "/run-" in name] == []
    code, _, err = _run(built, "collect", output, "--run", f"{path}.run")
    assert code == 0
    assert "complete" in err


def test_submit_and_collect_may_run_at_once_and_watch_shows_both(built: Rig, tmp_path: Path) -> None:
    """`collect` waits for a submission that is still going on."""
    path, output = _file(tmp_path, 300), tmp_path / "out.jsonl.gz"
    code, _, err = _run(built, "submit", path, "--limit", 100, "--create-subscription")
    assert code == 0, err
    with _start(built, "collect", output, "--run", f"{path}.run", "--timeout", 60, "--json") as collecting:
        built.worker()
        code, _, err = _run(built, "submit", path)
        assert code == 0, err
        out, err = collecting.communicate(timeout=90)
    assert collecting.returncode == 0, err
    done = json.loads(out.splitlines()[-1])
    assert (done["event"], done["lines"], done["answered"]) in {("complete", 100, 100), ("complete", 300, 300)}
    code, out, err = _run(built, "collect", output, "--run", f"{path}.run", "--timeout", 60)
    assert code == 0, err
    watch = subprocess.run(
        [sys.executable, "-m", "worker", "watch", f"{path}.run", "--json"], capture_output=True, text=True, check=False
    )
    state = json.loads(watch.stdout)
    assert (watch.returncode, state["lines"], state["answered"], state["failed"]) == (0, 300, 300, 0)


def test_failed_lines_are_sent_again_once_their_cause_is_mended(built: Rig, tmp_path: Path) -> None:
    """Only the classes that are named; the others' answers stay as they are."""
    built.sim.control({"behaviours": [{"mode": "content_filter", "match": {"body": "bad"}}]})
    built.worker()
    path, output, errors = _file(tmp_path, 100, "mixed"), tmp_path / "out.jsonl", tmp_path / "errors.jsonl"
    code, _, err = _run(built, "submit", path, "--wait", output, "--errors", errors, "--timeout", 60)
    assert code == 0, err
    assert "10 x content_filter, e.g. line 1: " in err
    assert (len(_custom_ids(output)), len(_custom_ids(errors))) == (90, 10)
    before = output.read_bytes()
    retry = ("retry-failed", output, "--errors", errors, "--run", f"{path}.run")
    code, _, err = _run(built, *retry)
    assert (code, output.read_bytes()) == (0, before)
    assert "no line has failed with an error that may succeed when repeated; there are 10 x content_filter" in err
    built.sim.control({"behaviours": []})
    code, _, err = _run(built, *retry, "--classes", "content_filter", "--wait", "--timeout", 60)
    assert code == 0, err
    assert (len(_custom_ids(output)), len(_custom_ids(errors))) == (100, 0)
    assert built.stats()["requests"] == 110


def test_a_submission_that_is_killed_again_and_again_publishes_no_recorded_line_twice(
    built: Rig, tmp_path: Path
) -> None:
    """What the ledger has as confirmed is on the topic once, and at the end every line is."""
    dice = random.Random(4)
    path, count = _file(tmp_path, 4000), 4000
    ledger_file = Path(f"{path}.run")
    copies = built.admin.subscription(built.requests)
    published: dict[int, set[str]] = defaultdict(set)  # the ids of the messages, by line
    may_come_twice: set[int] = set()
    survived = 0

    def take_all() -> None:
        while messages := built.admin.take_once(copies, 0.5):
            for message in messages:
                published[int(message.attributes["line_id"].split("-")[1])].add(message.message_id)

    for _ in range(KILLS):
        before = _published(ledger_file) if ledger_file.exists() else 0
        process, wanted = _start(built, "submit", path), before + dice.randrange(300)
        until(
            lambda running=process, at=wanted: (
                running.poll() is not None or (ledger_file.exists() and _published(ledger_file) > at)
            ),
            60,
        )
        survived += not _killed_after(process, 0.0)
        take_all()
        may_come_twice |= published.keys() - _recorded(ledger_file, count)
    code, _, err = _run(built, "submit", path)
    assert code == 0, err
    take_all()
    assert published.keys() == set(range(1, count + 1))
    assert {line for line, ids in published.items() if len(ids) > 1} <= may_come_twice
    assert survived < KILLS


def _published(path: Path) -> int:
    with Ledger(str(path)) as ledger:
        return ledger.totals().published


def _recorded(path: Path, count: int) -> set[int]:
    with Ledger(str(path)) as ledger:
        return {row.number for row in ledger.lines(1, count).values() if row.is_published}


def test_a_collection_that_is_killed_again_and_again_loses_nothing_and_repeats_nothing(
    built: Rig, tmp_path: Path
) -> None:
    """Killed at any moment: before, during and after writes and acks."""
    dice = random.Random(5)
    is_long = KILLS > 6  # then more slowly, so that the answers do not end before the kills
    count, window = (220 * KILLS, 3) if is_long else (3000, 16)
    path, output = _file(tmp_path, count), tmp_path / "out.jsonl"
    built.sim.control({"settings": {"latency": "100ms"}})
    built.worker(backend__window__initial=window, backend__window__max=window)
    code, _, err = _run(built, "submit", path, "--create-subscription")
    assert code == 0, err
    survived = 0
    for _ in range(KILLS):
        before = output.stat().st_size if output.exists() else 0
        process = _start(built, "collect", output, "--run", f"{path}.run")
        until(
            lambda at=before, running=process: (
                running.poll() is not None or (output.exists() and output.stat().st_size > at)
            ),
            60,
        )
        survived += not _killed_after(process, dice.random() * 0.4)
    with _start(built, "collect", output, "--run", f"{path}.run", "--idle-timeout", 60) as process:
        _, err = process.communicate(timeout=60 + count / 15)
    assert process.returncode == 0, err
    assert _custom_ids(output) == {f"c{row}": 1 for row in range(count)}
    assert survived < KILLS
    print(f"killed {KILLS - survived} times")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("submit", "missing.jsonl"), 1, "missing.jsonl"),
        (("submit", "missing.jsonl", "--check-only"), 1, "does not exist"),
        (("collect", "out.jsonl", "--run", "none.run"), 1, "none.run: is no ledger"),
        (("watch", "none.run"), 1, "none.run: is no ledger"),
        (("retry-failed", "out.jsonl", "--run", "none.run", "--classes", "wrong"), 2, "wrong is no error class"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    """No traceback, nothing written."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "worker",
            *arguments,
            *(["--set", "setup.request_topic=t"] if arguments[0] != "watch" else []),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PUBSUB_EMULATOR_HOST": "127.0.0.1:9"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, words in done.stderr, "Traceback" in done.stderr) == (code, True, False), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_topic_that_does_not_exist_ends_the_submission_with_its_name(built: Rig, tmp_path: Path) -> None:
    """And the ledger stays for the next try."""
    path = _file(tmp_path, 3)
    code, _, err = _run(built, "submit", path, "--topic", "there-is-none")
    assert code == 1
    assert "there-is-none" in err


def test_rows_of_a_table_are_submitted(built: Rig, tmp_path: Path) -> None:
    """A row that cannot be rendered is told before anything is published; a resumed run makes the same lines again."""
    table, output, ledger = tmp_path / "people.csv", tmp_path / "out.jsonl", tmp_path / "r.run"
    table.write_text("id,name\n1,Ada\n2\n")
    body = {"model": "m", "messages": [{"role": "user", "content": "Greet {name}."}]}
    template = {"custom_id": "{id}", "method": "POST", "url": "/v1/chat/completions", "body": body}
    command = ("submit", table, "--template", json.dumps(template), "--run", ledger, "--wait", output)
    code, _, err = _run(built, *command)
    assert (code, "row 2: has 1 fields, the header has 2" in err) == (1, True)
    table.write_text("id,name\n1,Ada\n2,Bob\n")
    built.worker()
    code, _, err = _run(built, *command)
    assert code == 0, err
    assert _custom_ids(output) == Counter("12")
    table.write_text("id,name\n1,Eve\n2,Bob\n")
    code, _, err = _run(built, *command)
    assert (code, "line 1" in err) == (1, True), "an edited row is noticed"
