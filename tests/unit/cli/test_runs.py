"""`submit`, `collect` and `retry-failed` against the embedded server: what a run keeps whatever happens between them."""

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.admin import Admin
from tests.support.waiting import until
from tests.unit.client.fake_broker import echo
from worker.cli import answers
from worker.cli.main import run_command
from worker.cli.runs import Teller
from worker.cli.submit import publish_run
from worker.client.io.files import open_input
from worker.client.ledger import Ledger, new_run
from worker.client.submit import check
from worker.emulators.pubsub import LocalPubSubThread, resources
from worker.wire.message import RUN_ATTRIBUTES

EXPIRED_S = 40 * 86_400


class Rig:
    """Topics on the embedded server, commands, and what stands for a worker: it answers when it is told to."""

    def __init__(self, address, folder, capsys):
        self.address, self.folder, self.capsys = address, folder, capsys
        self.admin = Admin(address)
        self.requests = self.admin.topic("requests")
        self.responses = self.admin.topic("responses")
        self.queue = self.admin.subscription(self.requests)
        self.input = folder / "in.jsonl"
        self.output = folder / "out.jsonl"
        self.ledger = f"{self.input}.run"
        self.published = Counter()
        self.input.write_text("".join(self.line(number) for number in range(1, 6)))

    @staticmethod
    def line(number):
        return json.dumps({"path": "/v1/x", "metadata": {"n": number}, "body": {}}) + "\n"

    def settings(self, **overrides):
        values = {
            "pubsub.emulator_host": self.address,
            "pubsub.project_id": self.admin.project,
            "pubsub.response_topic": self.responses,
            "setup.request_topic": self.requests,
            **overrides,
        }
        return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]

    def run(self, *arguments, **overrides):
        """Run a command; return its exit code and what it said."""
        code = run_command([*map(str, arguments), *self.settings(**overrides)])
        said = self.capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.err + said.out

    def submit(self, *more, **overrides):
        return self.run("submit", self.input, *more, **overrides)

    def collect(self, *more):
        return self.run("collect", self.output, "--run", self.ledger, "--timeout", 20, *more)

    def retry(self, *more):
        return self.run("retry-failed", self.output, "--run", self.ledger, "--timeout", 20, *more)

    def answer(self, fails=()):
        """Answer every request that is on the topic; those to some lines with a timeout."""
        while messages := self.admin.take_once(self.queue, 0.3):
            for message in messages:
                number = int(message.attributes["line_id"].split("-")[1])
                self.published[number] += 1
                data, attributes = echo(message.data, message.attributes)
                if number in fails:
                    body = {"error": {"message": "late", "code": "timeout"}}
                    data = json.dumps({"status_code": 504, "metadata": {}, "body": body}).encode()
                    attributes = {
                        name: message.attributes[name] for name in RUN_ATTRIBUTES if name in message.attributes
                    }
                    attributes["error_class"] = "timeout"
                self.admin.publisher.publish(self.responses, data, **attributes).result(10)

    def subscriptions(self):
        """Of the response topic."""
        return list(self.admin.publisher.list_topic_subscriptions(request={"topic": self.responses}))

    def numbers(self):
        return [json.loads(line)["metadata"]["n"] for line in self.output.read_bytes().splitlines()]


@pytest.fixture
def rig(tmp_path, capsys):
    with LocalPubSubThread() as server:
        made = Rig(server.address, tmp_path, capsys)
        yield made
        made.admin.close()


def test_a_subscription_that_could_not_be_made_is_made_by_the_next_command(rig):
    """The lines are published when there is a place for their answers, and not before."""
    missing = rig.responses + "-missing"
    code, said = rig.submit("--create-subscription", **{"pubsub.response_topic": missing})
    assert (code, missing in said) == (1, True), said
    assert rig.admin.take_once(rig.queue, 0.2) == []
    code, said = rig.submit()
    assert (code, len(rig.subscriptions())) == (0, 1), said
    rig.answer()
    code, said = rig.collect()
    assert (code, sorted(rig.numbers())) == (0, [1, 2, 3, 4, 5]), said
    assert rig.subscriptions() == []


@pytest.mark.parametrize("is_made", [False, True])
def test_a_kill_while_the_subscription_is_made_leaves_no_second_one(rig, monkeypatch, is_made):
    """Before or after Pub/Sub has made it: the ledger has its name by then."""
    create = answers.create_run_subscription

    async def killed(*arguments, **options):
        if is_made:
            await create(*arguments, **options)
        raise SystemExit(137)

    with monkeypatch.context() as patched:
        patched.setattr(answers, "create_run_subscription", killed)
        with pytest.raises(SystemExit):
            rig.submit("--create-subscription")
    assert len(rig.subscriptions()) == is_made
    assert rig.admin.take_once(rig.queue, 0.2) == []
    code, said = rig.submit("--create-subscription")
    assert (code, len(rig.subscriptions())) == (0, 1), said


def test_a_kill_while_the_subscription_is_removed_leaves_none(rig, monkeypatch):
    """The next command removes it."""
    rig.submit("--create-subscription")
    rig.answer()

    async def killed(*_):
        raise SystemExit(137)

    with monkeypatch.context() as patched:
        patched.setattr(answers, "delete_run_subscription", killed)
        with pytest.raises(SystemExit):
            rig.collect()
    assert len(rig.subscriptions()) == 1
    assert rig.collect()[0] == 0
    assert rig.subscriptions() == []


def test_nothing_is_published_without_the_subscription_that_is_named(rig):
    """It does not exist, or is one of another topic."""
    code, said = rig.submit("--subscription", "none")
    assert (code, "subscriptions/none does not exist: nothing is published" in said) == (1, True), said
    other = rig.admin.subscription(rig.requests)
    code, said = rig.submit("--subscription", other)
    assert (code, f"is of {rig.requests}" in said) == (2, True), said
    assert rig.admin.take_once(rig.queue, 0.2) == []


def test_a_mistyped_subscription_is_not_noted(rig):
    """By neither command; the run's own one stays, and is not replaced by another."""
    own = rig.admin.subscription(rig.responses)
    assert rig.submit("--subscription", own)[0] == 0
    rig.answer()
    code, said = rig.collect("--subscription", "typo")
    assert (code, "subscriptions/typo does not exist" in said, "--lost" in said) == (1, True, False), said
    assert rig.collect()[0] == 0
    with rig.input.open("a") as file:
        file.write(rig.line(6))
    assert rig.submit("--subscription", "typo")[0] == 1
    code, said = rig.submit()
    assert code == 0, said
    rig.answer()
    assert rig.collect()[0] == 0
    assert rig.subscriptions() == [own]


@pytest.mark.parametrize("most_s", [31 * 86_400, 7 * 86_400])
def test_answers_are_kept_as_long_as_the_server_permits(rig, monkeypatch, most_s):
    """31 days, and 7 on servers that refuse more; the subscription never expires."""
    monkeypatch.setattr(resources, "_RETENTION_S", (600, most_s))
    assert rig.submit("--create-subscription")[0] == 0
    [name] = rig.subscriptions()
    found = rig.admin.subscriber.get_subscription(request={"subscription": name})
    assert found.message_retention_duration == timedelta(seconds=most_s)
    assert "ttl" not in found.expiration_policy


@pytest.mark.parametrize("what", ["subscription", "topic"])
def test_answers_that_are_gone_are_told_and_their_lines_can_be_sent_again(rig, what):
    """With the subscription, or with its topic; only the lines without an answer are published twice."""
    rig.submit("--create-subscription", "--limit", 2)
    rig.answer()
    if what == "subscription":  # that of a deleted topic still has them
        rig.collect()
        assert sorted(rig.numbers()) == [1, 2]
    rig.submit("--create-subscription")
    [name] = rig.subscriptions()
    if what == "topic":
        rig.admin.publisher.delete_topic(request={"topic": rig.responses})
        rig.admin.publisher.create_topic(request={"name": rig.responses})
    else:
        rig.admin.subscriber.delete_subscription(request={"subscription": name})
    rig.answer()
    if what == "topic":
        code, said = rig.retry("--lost")
        assert (code, "`collect` takes those that it has: run it first" in said) == (1, True), said
    code, said = rig.collect("--idle-timeout", 3)
    assert (code, "`inference-worker retry-failed --lost` publishes the 3 lines again" in said) == (1, True), said
    assert sorted(rig.numbers()) == [1, 2]
    code, said = rig.retry("--lost")
    assert code == 0, said
    rig.answer()
    code, said = rig.collect()
    assert (code, sorted(rig.numbers())) == (0, [1, 2, 3, 4, 5]), said
    assert rig.published == {1: 1, 2: 1, 3: 2, 4: 2, 5: 2}


def test_answers_whose_time_is_over_are_told(rig):
    """Lines that were published longer ago than the subscription keeps an answer."""
    rig.submit("--create-subscription")
    code, said = rig.collect("--timeout", 0.2)
    assert (code, "their answers may be gone" in said) == (1, False), said
    with Ledger(rig.ledger) as ledger:
        ledger.note({answers.WAITING_SINCE: str(time.time() - EXPIRED_S)})
    code, said = rig.collect("--timeout", 0.2)
    assert (code, "keeps answers for 31 days, and lines without one were published 40 days ago" in said) == (1, True)


def test_an_output_that_lost_answers_is_refused_and_mended(rig):
    """A disk that lost its last lines, and another output than before."""
    rig.submit("--create-subscription")
    rig.answer()
    assert rig.collect()[0] == 0
    kept = rig.output.read_bytes().splitlines(keepends=True)[:3]
    rig.output.write_bytes(b"".join(kept))
    code, said = rig.collect()
    assert (code, "lacks 2 of the 5 answers" in said) == (1, True), said
    code, said = rig.retry("--lost")
    assert (code, "sending 2 lines again" in said) == (0, True), said
    rig.answer()
    code, said = rig.collect()
    assert (code, sorted(rig.numbers())) == (0, [1, 2, 3, 4, 5]), said
    assert sum(rig.published.values()) == 7


@pytest.mark.parametrize("is_ordered", [True, False])
def test_the_order_of_an_output_cannot_be_changed_on_the_way(rig, is_ordered):
    """Neither way; nothing is written, and the command with the right option goes on."""
    first, second = (["--ordered"], []) if is_ordered else ([], ["--ordered"])
    rig.submit("--create-subscription", "--limit", 2)
    rig.answer()
    rig.submit()
    rig.collect("--idle-timeout", 3, *first)
    before = {path.name: path.read_bytes() for path in rig.folder.glob("out*")}
    code, said = rig.collect(*second)
    assert (code, f"was begun {'with' if is_ordered else 'without'} --ordered" in said) == (1, True), said
    assert {path.name: path.read_bytes() for path in rig.folder.glob("out*")} == before
    rig.answer()
    code, said = rig.collect(*first)
    assert (code, sorted(rig.numbers())) == (0, [1, 2, 3, 4, 5]), said


def test_failed_lines_of_an_ordered_run_that_is_not_complete_can_be_sent_again(rig):
    """Their answers stand in the unsorted file."""
    rig.submit("--create-subscription", "--limit", 2)
    rig.answer(fails={2})
    rig.submit()
    rig.collect("--idle-timeout", 3, "--ordered")
    code, said = rig.retry("--ordered")
    assert (code, "sending 1 lines again" in said) == (0, True), said
    rig.answer()
    code, said = rig.collect("--ordered")
    assert (code, rig.numbers()) == (0, [1, 2, 3, 4, 5]), said


def test_an_output_that_cannot_be_used_is_told_before_anything_is_published(rig):
    """Of `submit --wait`; and a collection that is refused leaves no empty file."""
    for output, words in ((rig.folder / "none" / "o", "its directory does not exist"), (rig.folder, "is a directory")):
        code, said = rig.submit("--wait", output)
        assert (code, words in said) == (1, True), said
    assert (rig.admin.take_once(rig.queue, 0.2), rig.subscriptions()) == ([], [])
    rig.submit("--create-subscription")
    rig.answer()
    assert rig.collect()[0] == 0
    other = rig.folder / "other.jsonl"
    code, said = rig.run("collect", other, "--run", rig.ledger)
    assert (code, "lacks 5 of the 5 answers" in said, other.exists()) == (1, True, False), said


def test_a_mistyped_topic_or_input_leaves_no_ledger(rig):
    """The next command can have the right ones."""
    code, said = rig.submit("--topic", "none")
    assert (code, "the topic projects/exam/topics/none does not exist" in said) == (1, True), said
    code, said = rig.run("submit", rig.folder / "in.json")
    assert (code, "in.json: does not exist; did you mean in.jsonl?" in said) == (1, True), said
    code, said = rig.run("submit", rig.folder)
    assert (code, "is no file" in said) == (1, True), said
    assert not Path(rig.ledger).exists()
    code, said = rig.submit("--run", rig.folder / "none" / "x.run")
    assert (code, "its directory does not exist" in said) == (1, True), said
    code, said = rig.submit("--run", rig.input)
    assert (code, "in.jsonl: is no ledger of a run" in said) == (1, True), said
    rig.submit()
    rig.input.rename(rig.folder / "moved")
    code, said = rig.submit()
    assert (code, "in.jsonl: does not exist" in said) == (1, True), said


def test_a_server_that_is_away_is_told_at_once(rig, monkeypatch):
    """Nothing is left behind."""
    monkeypatch.setattr("worker.brokers.connection.TIMEOUT_S", 0.2)
    code, said = rig.submit("--create-subscription", **{"pubsub.emulator_host": "127.0.0.1:1"})
    assert (code, "Pub/Sub cannot be reached" in said, Path(rig.ledger).exists()) == (1, True, False), said


def test_what_a_retry_finds_nothing_of_is_told_with_what_there_is(rig):
    """And the end of a collection says which way leads on."""
    rig.submit("--create-subscription")
    rig.answer(fails={2, 4})
    code, said = rig.collect()
    assert (code, "`inference-worker retry-failed` sends 2 of them again" in said) == (0, True), said
    code, said = rig.retry("--classes", "auth")
    assert (code, "no line has failed with an error of auth; there are 2 x timeout" in said) == (0, True), said


@pytest.mark.parametrize(
    ("arguments", "words"), [((), "lacks 5 of the 5 answers"), (("--lost",), "does not exist; if it is lost")]
)
def test_a_retry_with_another_output_sends_nothing(rig, arguments, words):
    """A mistyped name: the error answers would stay in the right file, and the new ones be dropped as duplicates."""
    rig.submit("--create-subscription")
    rig.answer(fails={2})
    assert rig.collect()[0] == 0
    typo = rig.folder / "typo.jsonl"
    code, said = rig.run("retry-failed", typo, "--run", rig.ledger, *arguments)
    assert (code, words in said, typo.exists()) == (1, True, False), said
    assert rig.admin.take_once(rig.queue, 0.2) == []
    assert rig.retry()[0] == 0
    rig.answer()
    code, said = rig.collect()
    assert (code, sorted(rig.numbers())) == (0, [1, 2, 3, 4, 5]), said


def test_only_faults_of_settings_that_a_run_needs_are_told(rig):
    """A backend and a subscription of requests are not needed."""
    code = run_command(["submit", str(rig.input), "--check-only", "--set", "pubsub.projct_id=3"])
    said = rig.capsys.readouterr().err
    assert (code, "did you mean project_id?" in said, "is required" in said) == (2, True, False), said


def test_a_file_that_was_moved_with_its_ledger_is_continued(rig):
    """Its lines are compared; another file in its place is refused, and so is one while the first is still there."""
    rig.submit("--limit", 2)
    moved, ledger = rig.folder / "moved.jsonl", ("--run", rig.ledger)
    moved.write_text(rig.line(1) + rig.line(9))
    code, said = rig.run("submit", moved, *ledger)
    assert (code, "is the ledger of" in said) == (1, True), said
    lines = rig.input.read_text()
    rig.input.unlink()
    code, said = rig.run("submit", moved, *ledger)
    assert (code, "line 2 has changed" in said) == (1, True), said
    moved.write_text(lines)
    code, said = rig.run("submit", moved, *ledger)
    assert code == 0, said
    rig.answer()
    assert rig.published == dict.fromkeys(range(1, 6), 1)


def feed(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))


def test_another_standard_input_is_not_mixed_with_the_one_before(rig, monkeypatch):
    """The same one continues, also with more lines behind; while nothing is published it may be any other."""
    path = rig.folder / "s.run"
    command = ("submit", "-", "--run", path)
    feed(monkeypatch, "broken\n")
    assert rig.run(*command)[0] == 1
    feed(monkeypatch, rig.line(1) + rig.line(2))
    assert rig.run(*command)[0] == 0
    for other in (rig.line(1) + rig.line(3), rig.line(1), ""):
        feed(monkeypatch, other)
        code, said = rig.run(*command)
        assert (code, "standard input: line" in said, "--run" in said) == (1, True, True), said
    feed(monkeypatch, rig.line(1) + rig.line(2) + rig.line(3))
    assert rig.run(*command)[0] == 0
    rig.answer()
    assert rig.published == {1: 1, 2: 1, 3: 1}


@pytest.mark.parametrize(
    "arguments",
    [
        ("collect", "-", "--run", "x.run", "--json"),
        ("collect", "out.jsonl", "--errors", "-", "--run", "x.run", "--json"),
        ("submit", "in.jsonl", "--wait", "-", "--json"),
        ("retry-failed", "-", "--run", "x.run", "--json"),
        ("retry-failed", "-", "--run", "x.run"),
    ],
)
def test_events_and_answers_do_not_share_standard_output(rig, arguments):
    """Nothing could tell them apart; and a retry needs the file."""
    code, said = rig.run(*arguments)
    assert (code, "unusable settings" in said) == (2, True), said


def test_an_answer_that_is_quicker_than_the_note_of_its_publish_counts_as_published(rig):
    """A kill of `submit` leaves such lines; the run is complete all the same."""
    rig.submit("--create-subscription")
    rig.answer()
    with Ledger(rig.ledger) as ledger:
        database = ledger._database
        database.execute("UPDATE lines SET message_id = NULL WHERE number = 3")
        database.execute("UPDATE totals SET value = value - 1 WHERE name = 'published'")
    assert rig.collect()[0] == 0
    code, said = rig.submit()
    assert (code, "published 5 of 5 lines" in said) == (0, True), said
    rig.answer()
    assert rig.published[3] == 1


def test_a_retry_that_waits_is_interrupted_and_goes_on_where_it_was(rig):
    """Ctrl-C ends it with 130; the same command publishes nothing twice, and waits for the rest."""
    rig.submit("--create-subscription")
    rig.answer(fails={2, 4})
    assert rig.collect()[0] == 0
    command = ["retry-failed", str(rig.output), "--run", rig.ledger, "--wait", "--timeout", "60", *rig.settings()]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(
        [sys.executable, "-m", "worker", *command], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            until(lambda: process.poll() is not None or (b"504" not in rig.output.read_bytes() and is_pulled(rig)), 30)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()
    assert (process.returncode, "the same command continues" in said) == (130, True), said
    rig.answer(fails={4})
    code, said = rig.run(*command)
    assert (code, "continuing the retry" in said, "1 failed" in said) == (0, True, True), said
    assert rig.published == {1: 1, 2: 2, 3: 1, 4: 2, 5: 1}
    code, said = rig.retry()
    assert (code, "sending 1 lines again" in said) == (0, True), said


def test_an_interrupted_check_ends_at_once_and_publishes_nothing(rig):
    """Also of a file that takes minutes; the next command checks it anew."""
    with rig.input.open("w") as file:
        for number in range(1, 60_001):
            file.write(rig.line(number))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-m", "worker", "submit", str(rig.input), "--json", *rig.settings()]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            first = process.stdout.readline()
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, json.loads(first)["event"]) == (130, "checking"), said
    assert json.loads(said.splitlines()[-1])["event"] == "interrupted"
    with Ledger(rig.ledger) as ledger:
        assert (ledger.totals().published, ledger.totals().is_input_read) == (0, False)
        assert ledger.totals().lines < 60_000
    rig.input.write_text(rig.line(1))
    assert rig.submit()[0] == 0


@pytest.mark.parametrize(("goes_on", "code"), [(True, 130), (False, 0)])
async def test_an_interrupt_while_the_last_line_is_confirmed_ends_a_command_that_would_wait(tmp_path, goes_on, code):
    """It does not go on to collect; a command that has only to publish is done."""
    path = tmp_path / "in.jsonl"
    path.write_text(Rig.line(1))
    told = asyncio.Event()

    class Told(Teller):
        def event(self, name, text, **fields):
            if name == "stopping":
                told.set()

    async def publish(data, attributes, /):
        signal.raise_signal(signal.SIGTERM)
        await told.wait()
        return "m"

    with Ledger.create(f"{path}.run", new_run(str(path), "projects/p/topics/t")) as ledger:
        reader = open_input(str(path))
        check(reader, ledger)
        reader.close()
        assert await publish_run(ledger, str(path), publish, Told(is_json=False), goes_on=goes_on) == code
        assert ledger.totals().published == 1


def is_pulled(rig):
    """Whether the run's subscription has a stream: then `collect` waits."""
    with Ledger(rig.ledger) as ledger:
        totals = ledger.totals()
    return totals.published == totals.lines == 5 and totals.answered == 3
