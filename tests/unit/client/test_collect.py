"""Collecting the answers of a run: each once, whatever the broker delivers and wherever the process ends."""

import asyncio
import json
import random
import threading

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.client import collect
from worker.client.collect import Collection, open_outputs, reconcile, sort_outputs
from worker.client.errors import OutputError
from worker.client.io.files import open_input
from worker.client.ledger import Ledger, new_run
from worker.client.submit import check
from worker.wire.message import encode_response


def a_line(number):
    return b'{"path":"/v1/x","metadata":{"n":%d},"body":{}}' % number


class Topic:
    """The response topic of a run: gives out what was put into it, in any order, and again what was not acked."""

    def __init__(self, messages):
        self.messages = list(messages)
        self.acked = 0

    async def answers(self, handler):
        for message in list(self.messages):
            await handler(*message, "message")
            self.acked += 1
            self.messages.remove(message)
        await asyncio.Event().wait()


class Run:
    """A file of lines, all of them published."""

    def __init__(self, folder, count=6, batch=()):
        self.folder = folder
        self.lines = [
            b'{"custom_id":"c%d","method":"POST","url":"/v1/x","body":{}}' % number
            if number in batch
            else a_line(number)
            for number in range(1, count + 1)
        ]
        path = folder / "in.jsonl"
        path.write_bytes(b"\n".join(self.lines) + b"\n")
        self.ledger = Ledger.create(str(folder / "in.jsonl.run"), new_run(str(path), "projects/p/topics/t"))
        reader = open_input(str(path))
        raw = []
        while found := reader.read_lines():
            raw += found
        reader.close()
        reader = open_input(str(path))
        assert check(reader, self.ledger).fault_count == 0
        reader.close()
        self.ledger.note({"is_input_read": "yes"})
        self.ids = {line.number: line.line_id for line in raw}
        self.batch = set(batch)
        self.publish()

    def publish(self):
        self.ledger.record_published([(number, f"m{number}") for number in self.ids])

    def answer(self, number, status=200, error_class=None, at_round=1, text="fine"):
        metadata = b'{"custom_id":"c%d"}' % number if number in self.batch else b'{"n":%d}' % number
        if status == 200:
            body = {"text": text, "usage": {"prompt_tokens": 2, "completion_tokens": 3}}
        else:
            body = {"error": {"message": text, "code": error_class, "type": "backend_error"}}
        attributes = {"run_id": self.ledger.run.run_id, "line_id": self.ids[number]}
        if number in self.batch:
            attributes["line_shape"] = "batch"
        if error_class:
            attributes["error_class"] = error_class
        if at_round != 1:
            attributes["run_round"] = str(at_round)
        return encode_response(status, metadata, msgspec.json.encode(body)), attributes

    async def collect(self, topic, output="out.jsonl", errors=None, *, is_ordered=False, **options):
        files = open_outputs(
            str(self.folder / output), str(self.folder / errors) if errors else None, is_ordered=is_ordered
        )
        try:
            reconcile(self.ledger, files)
            collection = Collection(self.ledger, files, topic.answers)
            done = await collection.run(**{"timeout_s": 30, **options})
        finally:
            files.close()
        if done:
            await sort_outputs(files)
        return done, collection.progress()

    def numbers(self, output="out.jsonl"):
        lines = [json.loads(line) for line in (self.folder / output).read_bytes().splitlines()]
        return [int(line["id"].removeprefix("batch_req_").split("-")[1]) for line in lines]


@pytest.fixture
def run(tmp_path):
    made = Run(tmp_path)
    yield made
    made.ledger.close()


async def test_every_answer_is_written_once_and_the_collection_ends_by_itself(run):
    """Duplicates and messages of others are acked and dropped; the ledger has counts and tokens."""
    messages = [run.answer(number) for number in (3, 1, 2, 3, 6, 5, 4)]
    foreign = [(b"{}", {}), (b"{}", {"run_id": "other", "line_id": run.ids[1]}), (b"x", {"run_id": "other"})]
    topic = Topic([messages[0], *foreign, *messages[1:]])
    done, progress = await run.collect(topic)
    assert done
    assert sorted(run.numbers()) == [1, 2, 3, 4, 5, 6]
    assert (progress.duplicates, progress.foreign, progress.written) == (1, 3, 6)
    totals = run.ledger.totals()
    assert (totals.answered, totals.failed, totals.input_tokens, totals.output_tokens) == (6, 0, 12, 18)


async def test_the_ledger_decides_which_lines_are_the_runs(run):
    """A message with the run's id and a line that the ledger does not have is not written."""
    data, attributes = run.answer(2)
    changed = f"line-2-{int(run.ids[2][-8:], 16) ^ 1:08x}"
    foreign = [(data, {**attributes, "line_id": line_id}) for line_id in ("line-7-00000000", changed)]
    done, progress = await run.collect(Topic([*foreign, *(run.answer(number) for number in range(1, 7))]))
    assert (done, progress.foreign, progress.written) == (True, 2, 6)
    assert sorted(run.numbers()) == [1, 2, 3, 4, 5, 6]


async def test_a_batch_line_is_answered_in_openais_shape(tmp_path):
    """With the custom_id that the metadata brought back."""
    run = Run(tmp_path, count=2, batch=(2,))
    done, _ = await run.collect(Topic([run.answer(1), run.answer(2)]))
    lines = {line["id"]: line for line in map(json.loads, (tmp_path / "out.jsonl").read_bytes().splitlines())}
    assert done
    assert lines["batch_req_" + run.ids[2]]["custom_id"] == "c2"
    assert lines[run.ids[1]]["metadata"] == {"n": 1}
    run.ledger.close()


async def test_errors_go_into_their_own_file(run):
    """And each class is told with an example."""
    answers = [run.answer(n, 504, "timeout", text=f"late {n}") if n in {2, 4} else run.answer(n) for n in range(1, 7)]
    done, _ = await run.collect(Topic(answers), errors="errors.jsonl")
    assert done
    assert (sorted(run.numbers()), sorted(run.numbers("errors.jsonl"))) == ([1, 3, 5, 6], [2, 4])
    assert [(each.error_class, each.count, each.message) for each in run.ledger.failures()] == [
        ("timeout", 2, "late 2")
    ]


async def test_what_is_missing_ends_at_the_time_and_is_collected_later(run):
    """An incomplete collection says so; the same command goes on."""
    done, progress = await run.collect(Topic([run.answer(1), run.answer(5)]), idle_timeout_s=0.2)
    assert (done, progress.totals.answered) == (False, 2)
    done, progress = await run.collect(Topic([run.answer(number) for number in range(1, 7)]))
    assert (done, progress.written, progress.duplicates) == (True, 4, 2)
    assert sorted(run.numbers()) == [1, 2, 3, 4, 5, 6]


async def test_a_ledger_that_a_kill_left_behind_is_told_from_the_output(run):
    """The lines of the output are not asked for again, errors keep their class."""
    good = json.dumps({"id": run.ids[1], "status_code": 200, "metadata": {}, "body": {"usage": {"prompt_tokens": 1}}})
    stats = {"error_class": "timeout"}
    bad = json.dumps({"id": run.ids[2], "status_code": 504, "metadata": {}, "body": {}, "stats": stats})
    batch = {"id": "batch_req_" + run.ids[3], "custom_id": "c", "response": None}
    batch = json.dumps({**batch, "error": {"code": "quota", "message": "empty"}})
    torn = b'{"id":"line-4-'
    (run.folder / "out.jsonl").write_bytes(f"{good}\n{bad}\n{batch}\n".encode() + torn)
    done, progress = await run.collect(Topic([run.answer(number) for number in (4, 5, 6)]))
    assert (done, progress.written) == (True, 3)
    assert [(each.error_class, each.number) for each in run.ledger.failures()] == [("quota", 3), ("timeout", 2)]
    assert sorted(run.numbers()) == [1, 2, 3, 4, 5, 6]


async def test_the_output_of_another_input_is_refused_and_stays(run):
    """Answers of two files are not mixed."""
    other = b'{"id":"line-1-00000000","status_code":200,"metadata":{},"body":{}}\n'
    (run.folder / "out.jsonl").write_bytes(other)
    with pytest.raises(OutputError, match="line 1 of another input"):
        await run.collect(Topic([]))
    assert (run.folder / "out.jsonl").read_bytes() == other


async def test_a_late_answer_of_the_round_before_is_dropped(run):
    """A line that is sent again gets the answer to what was sent again."""
    await run.collect(Topic([run.answer(number, 504, "timeout") for number in range(1, 7)]), errors="errors.jsonl")
    run.ledger.begin_round(["timeout"])
    (run.folder / "errors.jsonl").unlink()
    run.publish()
    late = [run.answer(number, 504, "timeout", text="late") for number in (1, 2)]
    fresh = [run.answer(number, at_round=2) for number in range(1, 7)]
    done, progress = await run.collect(Topic([*late, *fresh]))
    assert (done, progress.duplicates, progress.totals.failed) == (True, 2, 0)


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.jsonl.zst"])
async def test_an_ordered_output_is_in_the_order_of_the_input(tmp_path, monkeypatch, name):
    """Sorted with little memory, also when it is added to a sorted file; the unsorted file is gone."""
    monkeypatch.setattr(collect, "SORT_BYTES", 300)
    run = Run(tmp_path, count=40)
    order = list(range(1, 41))
    random.Random(3).shuffle(order)
    done, _ = await run.collect(Topic([run.answer(n) for n in order[:25]]), name, is_ordered=True, idle_timeout_s=1)
    assert not done
    assert not (tmp_path / name).exists()
    done, _ = await run.collect(Topic([run.answer(n) for n in order[25:]]), name, is_ordered=True)
    assert done
    reader = open_input(str(tmp_path / name))
    lines = []
    while found := reader.read_lines():
        lines += [json.loads(line.data) for line in found]
    reader.close()
    assert [line["metadata"]["n"] for line in lines] == list(range(1, 41))
    assert not (tmp_path / (name + ".unsorted")).exists()
    run.ledger.close()


async def test_a_kill_during_or_after_the_sort_repeats_no_line(tmp_path):
    """Whether it came before the sorted file was in its place, or before the unsorted one was removed."""
    run = Run(tmp_path, count=10)
    await run.collect(Topic([run.answer(n) for n in (3, 1, 2)]), is_ordered=True, idle_timeout_s=1)
    (tmp_path / ".out.jsonl.sorting").mkdir()
    (tmp_path / ".out.jsonl.sorting" / "out.jsonl").write_bytes(b"half")
    unsorted = tmp_path / "out.jsonl.unsorted"
    left = unsorted.read_bytes()
    done, _ = await run.collect(Topic([run.answer(n) for n in range(10, 3, -1)]), is_ordered=True)
    assert (done, run.numbers()) == (True, list(range(1, 11)))
    unsorted.write_bytes(left)
    done, _ = await run.collect(Topic([]), is_ordered=True)
    assert (done, run.numbers()) == (True, list(range(1, 11)))
    assert sorted(path.name for path in tmp_path.glob("*out*")) == ["out.jsonl"]
    run.ledger.close()


async def test_the_sort_of_a_large_output_can_be_interrupted(tmp_path, monkeypatch):
    """Ctrl-C ends the command while a thread still sorts."""
    run, begun, may_end = Run(tmp_path), asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def sort(_: str) -> None:
        loop.call_soon_threadsafe(begun.set)
        may_end.wait()

    monkeypatch.setattr(collect, "_sort", sort)
    collecting = asyncio.create_task(run.collect(Topic([run.answer(n) for n in range(1, 7)]), is_ordered=True))
    try:
        await begun.wait()
        collecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await collecting
    finally:
        may_end.set()
        run.ledger.close()


def test_an_ordered_output_must_be_a_file_and_errors_another_one(tmp_path):
    """What cannot work is said before anything is written."""
    with pytest.raises(OutputError, match="must be a file"):
        open_outputs("-", None, is_ordered=True)
    with pytest.raises(OutputError, match="cannot be the file of the errors"):
        open_outputs(str(tmp_path / "a"), str(tmp_path / "." / "a"), is_ordered=False)


async def test_a_full_disk_ends_the_collection_and_its_answer_is_not_acked(run):
    """What is not written comes again."""
    topic = Topic([run.answer(1)])
    with pytest.raises(OutputError, match="No space left"):
        await run.collect(topic, "/dev/full")
    assert topic.acked == 0


@given(st.lists(st.integers(1, 6), max_size=25), st.lists(st.integers(1, 6), max_size=25))
@settings(max_examples=25, deadline=None)
async def test_two_collections_write_each_line_once_whatever_comes(tmp_path_factory, first, second):
    """The law: after all answers came at least once, every line stands once in the output."""
    run = Run(tmp_path_factory.mktemp("run"))
    try:
        await run.collect(Topic([run.answer(number) for number in first]), timeout_s=0.05)
        done, _ = await run.collect(Topic([run.answer(number) for number in [*second, 6, 5, 4, 3, 2, 1]]))
        assert done
        assert sorted(run.numbers()) == [1, 2, 3, 4, 5, 6]
        assert run.ledger.totals().answered == 6
    finally:
        run.ledger.close()
