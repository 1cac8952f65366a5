"""The coordinator and the collector together, on a store and a folder, with a topic that the test answers."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.batch_invariants import Finished, broken_rules, read_stored
from tests.support.batches import TENANT, add_file, again, new_batch, opened_store, sqlite_url
from tests.support.fakes import FakePayloads
from tests.support.waiting import eventually
from worker.batches import coordinator as module
from worker.batches.collector import Collector
from worker.batches.coordinator import Coordinator
from worker.batches.events import EventTeller
from worker.batches.lines import dead_letter_of, outcome_of
from worker.batches.states import FINAL, Status
from worker.batches.store import Batch, Store, StoreUnavailableError
from worker.errors import (
    BackendError,
    MessageTooLargeError,
    PayloadError,
    PublishRefusedError,
    PublishRetryableError,
)
from worker.payloads.files import FileStore
from worker.policy.model import Fault
from worker.ports import Settlement
from worker.settings.schema import BatchesSettings
from worker.wire.control import decode_control
from worker.wire.message import ReceivedMessage

GOOD = {"id": "x", "usage": {"prompt_tokens": 2, "completion_tokens": 3}}


class Topic:
    """Takes lines, and refuses some."""

    def __init__(self) -> None:
        self.messages: list[tuple[bytes, dict[str, str]]] = []
        self.refuse: Callable[[dict[str, str]], Exception | None] = lambda _attributes: None

    async def publish(self, data: bytes, attributes: Any) -> str:
        if (error := self.refuse(attributes)) is not None:
            raise error
        self.messages.append((data, dict(attributes)))
        return str(len(self.messages))

    async def aclose(self) -> None:
        pass

    @property
    def records(self) -> list[int]:
        return [int(attributes["line_id"]) for _, attributes in self.messages]

    def of(self, batch: Batch) -> list[int]:
        return [int(each["line_id"]) for _, each in self.messages if each["run_id"] == batch.id]


class Fleet:
    """A store, files, a topic, and coordinators."""

    def __init__(self, store: Store, folder: Path, time: Any, **settings: Any) -> None:
        self.store = store
        self.folder = folder
        self.objects = FileStore(folder)
        self.topic = Topic()
        self.time = time
        self.settings = BatchesSettings(**{"lease_s": 0.5, "drain_s": 60, **settings})
        self.collector = Collector(store, None)  # type: ignore[arg-type]  # its messages come from the test
        self.answered = 0

    def create(self, lines: int | bytes, **fields: Any) -> Batch:
        content = lines if isinstance(lines, bytes) else chats(lines)
        file = add_file(self.store, size=len(content))
        path = self.folder / file.object_key
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        batch, _ = self.store.create_batch(new_batch(file, **fields))
        return batch

    @asynccontextmanager
    async def coordinating(
        self, name: str = "one", *, models: Any = None, control: Any = None
    ) -> AsyncIterator[Coordinator]:
        async def none() -> None:
            return None

        coordinator = Coordinator(
            self.store,
            self.objects,
            self.topic,
            self.settings,
            owner=name,
            events=EventTeller(self.store),
            models=models or none,
            control=control,
        )
        task = asyncio.create_task(coordinator.run())
        try:
            yield coordinator
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def answer(self, count: int | None = None, status: int = 200, body: Any = GOOD, **attributes: str) -> int:
        """Answer the next published lines; return how many that were."""
        until = len(self.topic.messages) if count is None else self.answered + count
        some = self.topic.messages[self.answered : until]
        self.answered += len(some)
        answer = {"status_code": status, "body": body}
        found = [
            outcome_of(
                json.dumps({**answer, "metadata": json.loads(request)["metadata"]}).encode(), {**each, **attributes}
            )
            for request, each in some
        ]
        if found:
            self.store.record([outcome for outcome in found if outcome is not None])
        return len(found)

    async def until(self, batch: Batch, *statuses: Status) -> Batch:
        wanted = statuses or tuple(FINAL)
        return await eventually(
            lambda: now if (now := again(self.store, batch)).status in wanted else None, what=str(wanted)
        )

    async def run(self, *batches: Batch, **answers: Any) -> list[Batch]:
        """Answer whatever is published until these have ended."""

        def ended() -> bool:
            self.answer(**answers)
            return all(again(self.store, batch).status in FINAL for batch in batches)

        await eventually(ended, what="all have ended")
        return [again(self.store, batch) for batch in batches]

    async def finished(self, batch: Batch, content: bytes | None = None) -> Finished:
        content = content or (self.folder / again(self.store, batch).input_key).read_bytes()
        found = await asyncio.to_thread(read_stored, self.store, self.objects, TENANT, batch.id, content)
        assert broken_rules(found) == []
        return found


def chats(count: int, name: str = "c") -> bytes:
    return b"".join(
        b'{"custom_id":"%s-%d","method":"POST","url":"/v1/chat/completions","body":{"model":"m","messages":[]}}\n'
        % (name.encode(), number)
        for number in range(count)
    )


@pytest.fixture
def fleet(tmp_path: Path, time_: Any):
    (tmp_path / "files").mkdir()
    with opened_store(sqlite_url(tmp_path), clock=time_) as store:
        yield Fleet(store, tmp_path, time_)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds and repetitions follow each other at once."""
    monkeypatch.setattr(module, "ROUND_S", 0.01)
    monkeypatch.setattr(module, "IDLE_S", 0.01)
    monkeypatch.setattr(module, "JOB_BACKOFF", module.Backoff(base_s=0.01, max_s=0.05))


async def test_a_batch_completes(fleet: Fleet):
    batch = fleet.create(1_200, metadata={"a": "b"})
    async with fleet.coordinating():
        (done,) = await fleet.run(batch)
    assert (done.status, done.completed, done.failed) == (Status.COMPLETED, 1_200, 0)
    assert done.usage["total_tokens"] == 6_000
    assert fleet.topic.records == list(range(1, 1_201))
    found = await fleet.finished(batch)
    assert found.error is None


async def test_a_batch_all_of_whose_lines_fail_completes(fleet: Fleet):
    batch = fleet.create(3)
    error = {"error": {"message": "bad", "code": "context_length_exceeded"}}
    async with fleet.coordinating():
        (done,) = await fleet.run(batch, status=400, body=error, error_class="context_length")
    assert (done.status, done.completed, done.failed) == (Status.COMPLETED, 0, 3)
    assert done.usage is None
    assert done.failures == [
        {"code": "context_length_exceeded", "count": 3, "example_line": 1, "example_message": "bad"}
    ]
    assert (await fleet.finished(batch)).output is None


async def test_a_failure_is_told_by_its_line_while_the_batch_runs_and_after(fleet: Fleet):
    """Blank lines are lines, and no records."""
    batch = fleet.create(b"\n \n" + chats(1) + b"\n" + chats(2, "d"))
    async with fleet.coordinating():
        await eventually(lambda: len(fleet.topic.messages) == 3)
        fleet.answer(1)
        fleet.answer(1, status=400, body={"error": {"message": "bad", "code": "wrong"}}, error_class="x")
        failure = {"code": "wrong", "count": 1, "example_line": 5, "example_message": "bad"}
        assert fleet.store.failures_of(batch.id) == [failure]
        (done,) = await fleet.run(batch)
    assert done.failures == [failure]


async def test_a_refused_file_fails_with_every_fault_and_sends_nothing(fleet: Fleet):
    batch = fleet.create(chats(2) + b"{\n" + chats(2) + b"[]\n")
    async with fleet.coordinating():
        await fleet.until(batch, Status.FAILED)
    codes = [(fault.line, fault.code) for fault in fleet.store.errors_of(batch.id)]
    assert codes == [
        (3, "invalid_json_line"),
        (4, "duplicate_custom_id"),
        (5, "duplicate_custom_id"),
        (6, "invalid_request"),
    ]
    assert fleet.topic.messages == []
    assert broken_rules(await asyncio.to_thread(read_stored, fleet.store, fleet.objects, TENANT, batch.id, None)) == []


async def test_an_unknown_file_fails(fleet: Fleet):
    batch, _ = fleet.store.create_batch(new_batch("file-nothing"))
    async with fleet.coordinating():
        await fleet.until(batch, Status.FAILED)
    (fault,) = fleet.store.errors_of(batch.id)
    assert (fault.code, fault.param, fault.line) == ("invalid_request", "input_file_id", None)
    assert "cannot find file" in fault.message


async def test_the_topic_holds_a_bounded_number_of_lines(fleet: Fleet):
    fleet.settings = fleet.settings.model_copy(update={"outstanding_lines": 60})
    batch = fleet.create(200)
    async with fleet.coordinating():
        await eventually(lambda: len(fleet.topic.messages) == 60)
        fleet.answer(25)
        await eventually(lambda: len(fleet.topic.messages) == 85)
        small = fleet.create(10)
        await eventually(lambda: len(fleet.topic.of(small)) == 10)
        await fleet.run(batch, small)
    assert sorted(fleet.topic.of(batch)) == list(range(1, 201))


async def test_a_cancelled_batch_keeps_what_was_finished(fleet: Fleet):
    fleet.settings = fleet.settings.model_copy(update={"outstanding_lines": 50})
    batch = fleet.create(200)
    async with fleet.coordinating():
        await eventually(lambda: len(fleet.topic.messages) == 50)
        fleet.answer(20)
        await eventually(lambda: len(fleet.topic.messages) == 70)
        fleet.store.request_cancel(TENANT, batch.id)
        fleet.answer(30)
        assert again(fleet.store, batch).status is Status.CANCELLING
        fleet.answer()
        done = await fleet.until(batch)
    assert (done.status, done.completed, done.failed) == (Status.CANCELLED, 70, 130)
    found = await fleet.finished(batch)
    assert {line["error"]["code"] for line in found.error.lines} == {"batch_cancelled"}


async def test_workers_are_told_once_of_a_cancelled_batch(fleet: Fleet):
    """What they withdraw stands in the error file as cancelled; what they finish is kept."""
    control = Topic()
    batch = fleet.create(20)
    async with fleet.coordinating(control=control):
        await eventually(lambda: len(fleet.topic.messages) == 20)
        fleet.store.request_cancel(TENANT, batch.id)
        await eventually(lambda: control.messages)
        fleet.answer(5)
        gone = {"error": {"message": "cancelled", "backend": None, "attempts": 0}}
        fleet.answer(status=499, body=gone, error_class="cancelled")
        done = await fleet.until(batch)
    assert (done.status, done.completed, done.failed) == (Status.CANCELLED, 5, 15)
    found = await fleet.finished(batch)
    assert {line["error"]["code"] for line in found.error.lines} == {"batch_cancelled"}
    assert done.failures[0]["code"] == "batch_cancelled"
    ((data, attributes),) = control.messages
    request = decode_control(data, 0.0)
    assert (dict(request.attributes), request.let_running_finish, attributes) == ({"run_id": batch.id}, True, {})


async def test_a_line_that_was_cancelled_alone_says_so(fleet: Fleet):
    """Its batch was not: the code of a cancelled batch would be wrong."""
    batch = fleet.create(2)
    gone = {"error": {"message": "cancelled", "backend": None, "attempts": 0}}
    async with fleet.coordinating():
        (done,) = await fleet.run(batch, status=499, body=gone, error_class="cancelled")
    assert done.status is Status.COMPLETED
    assert [failure["code"] for failure in done.failures] == ["cancelled"]
    await fleet.finished(batch)


async def test_a_control_topic_that_is_away_delays_nothing_for_ever(fleet: Fleet):
    """It is tried again; the batch ends with its results all the same."""
    control = Topic()
    control.refuse = lambda _: PublishRetryableError("away")
    batch = fleet.create(3)
    async with fleet.coordinating(control=control):
        await eventually(lambda: len(fleet.topic.messages) == 3)
        fleet.store.request_cancel(TENANT, batch.id)
        fleet.answer()
        done = await fleet.until(batch)
    assert (done.status, done.completed) == (Status.CANCELLED, 3)


async def test_a_cancelled_batch_waits_for_a_bounded_time(fleet: Fleet, time_):
    batch = fleet.create(20)
    async with fleet.coordinating():
        await eventually(lambda: len(fleet.topic.messages) == 20)
        fleet.answer(5)
        fleet.store.request_cancel(TENANT, batch.id)
        time_.now += 61
        done = await fleet.until(batch)
    assert (done.completed, done.failed) == (5, 15)
    await fleet.finished(batch)
    fleet.answer()  # too late
    assert again(fleet.store, batch) == done


@pytest.mark.parametrize("is_published", [False, True])
async def test_lines_whose_coordinator_died_hold_a_cancelled_batch_for_a_minute(
    fleet: Fleet, time_, is_published: bool
):
    """It is not known whether the topic has them; those that are known to be there are waited for longer."""
    fleet.settings = fleet.settings.model_copy(update={"drain_s": 600})
    batch = fleet.create(10)
    hang = asyncio.Event()
    real = fleet.topic.publish

    async def dying(data: bytes, attributes: Any) -> str:
        if int(attributes["line_id"]) > 6:
            await hang.wait()
        return await real(data, attributes)

    if not is_published:
        fleet.topic.publish = dying  # type: ignore[method-assign]
    async with fleet.coordinating("first"):
        await eventually(lambda: len(fleet.topic.messages) == (10 if is_published else 6))
        if is_published:
            await eventually(lambda: again(fleet.store, batch).published_records == 10)
    assert again(fleet.store, batch).announced_records == 10
    fleet.store.request_cancel(TENANT, batch.id)
    fleet.answer(5)
    looks, unfinished = 0, fleet.store.unfinished_batches

    def looked() -> list[Batch]:
        nonlocal looks
        looks += 1
        return unfinished()

    async def still_waits() -> None:
        seen = looks
        await eventually(lambda: looks >= seen + 3, what="rounds of the coordinator")
        assert again(fleet.store, batch).status is Status.CANCELLING

    fleet.store.unfinished_batches = looked  # type: ignore[method-assign]
    async with fleet.coordinating("second"):
        time_.now += 59
        await still_waits()
        time_.now += 2
        if is_published:
            await still_waits()
            time_.now += 540
        done = await fleet.until(batch)
    assert (done.completed, done.failed) == (5, 5)
    await fleet.finished(batch)


async def test_cancel_before_the_validation_ended(fleet: Fleet):
    batch = fleet.create(20)
    fleet.store.request_cancel(TENANT, batch.id)
    async with fleet.coordinating():
        done = await fleet.until(batch)
    assert (done.status, done.total) == (Status.CANCELLED, 0)
    await fleet.finished(batch)


async def test_cancel_while_finalizing_keeps_every_result(fleet: Fleet):
    batch = fleet.create(5)
    async with fleet.coordinating():
        await eventually(lambda: len(fleet.topic.messages) == 5)
    fleet.answer()
    assert fleet.store.begin_finalizing(batch.id)
    fleet.store.request_cancel(TENANT, batch.id)
    async with fleet.coordinating():
        done = await fleet.until(batch)
    assert (done.status, done.completed, done.failed) == (Status.CANCELLED, 5, 0)
    await fleet.finished(batch)


async def test_a_batch_expires_with_partial_results(fleet: Fleet, time_):
    fleet.settings = fleet.settings.model_copy(update={"outstanding_lines": 50})
    batch = fleet.create(100, window_s=10)
    async with fleet.coordinating():
        await eventually(lambda: len(fleet.topic.messages) == 50)
        time_.now += 10
        fleet.answer(20)
        late = {"error": {"message": "late", "backend": None, "attempts": 0}}
        fleet.answer(status=504, body=late, error_class="deadline_exceeded")
        done = await fleet.until(batch)
    assert (done.status, done.completed, done.failed) == (Status.EXPIRED, 20, 80)
    found = await fleet.finished(batch)
    assert {line["error"]["code"] for line in found.error.lines} == {"batch_expired"}
    assert len(fleet.topic.messages) == 50


async def test_a_batch_expires_while_it_is_validated(fleet: Fleet, time_):
    batch = fleet.create(5, window_s=10)
    time_.now += 10
    async with fleet.coordinating():
        done = await fleet.until(batch)
    assert (done.status, done.total) == (Status.EXPIRED, 0)
    await fleet.finished(batch)


async def test_a_worker_whose_clock_is_ahead_completes_no_batch_with_expired_lines(fleet: Fleet, time_):
    batch = fleet.create(3, window_s=100)
    late = {"error": {"message": "late", "backend": None, "attempts": 0}}
    async with fleet.coordinating() as coordinator:
        await eventually(lambda: len(fleet.topic.messages) == 3)
        fleet.answer(status=504, body=late, error_class="deadline_exceeded")
        await eventually(lambda: coordinator._jobs)
        assert again(fleet.store, batch).status is Status.IN_PROGRESS
        time_.now += 100
        done = await fleet.until(batch)
    assert done.status is Status.EXPIRED
    await fleet.finished(batch)


async def test_a_topic_that_is_away_delays_and_repeats_nothing(fleet: Fleet):
    batch = fleet.create(300)
    failures = iter([PublishRetryableError("away"), None] * 30 + [PublishRefusedError("gone")] * 5)
    fleet.topic.refuse = lambda _attributes: next(failures, None)
    async with fleet.coordinating():
        (done,) = await fleet.run(batch)
    assert done.status is Status.COMPLETED
    assert sorted(fleet.topic.records) == list(range(1, 301))


async def test_a_line_that_no_message_carries_fails_alone(fleet: Fleet):
    batch = fleet.create(4)
    fleet.topic.refuse = lambda attributes: MessageTooLargeError("10 MB") if attributes["line_id"] == "2" else None
    async with fleet.coordinating():
        (done,) = await fleet.run(batch)
    assert (done.completed, done.failed) == (3, 1)
    found = await fleet.finished(batch)
    assert found.error.lines[0]["error"]["code"] == "request_too_large"


async def test_a_coordinator_that_is_killed_repeats_only_what_was_in_flight(fleet: Fleet):
    batch = fleet.create(1_000)
    blocked = asyncio.Event()
    publish = fleet.topic.publish

    async def some(data: bytes, attributes: Any) -> str:
        if len(fleet.topic.messages) == 700:
            await blocked.wait()
        return await publish(data, attributes)

    fleet.topic.publish = some  # type: ignore[method-assign]
    async with fleet.coordinating("one"):
        await eventually(lambda: len(fleet.topic.messages) == 700)
        fleet.answer(650)
    assert again(fleet.store, batch).published_records == 500
    assert again(fleet.store, batch).outstanding == 350
    blocked.set()
    async with fleet.coordinating("two"):
        await eventually(lambda: len(fleet.topic.records) == 1_050)
        (done,) = await fleet.run(batch)
    assert done.completed == 1_000
    assert len(fleet.topic.records) == 1_050  # the 50 that were in flight came twice
    assert len(set(fleet.topic.records)) == 1_000


async def test_one_of_several_coordinates_and_another_takes_over(fleet: Fleet):
    async with fleet.coordinating("one") as one, fleet.coordinating("two") as two:
        await eventually(lambda: one.leads or two.leads)
        assert one.leads is not two.leads
        batch = fleet.create(50)
        await fleet.run(batch)
    assert len(fleet.topic.records) == 50
    async with fleet.coordinating("three") as three:  # the lease was given up
        await eventually(lambda: three.leads)


async def test_a_lease_that_is_lost_stops_the_work(fleet: Fleet, time_):
    async with fleet.coordinating("one") as one:
        await eventually(lambda: one.leads)
        time_.now += 10
        assert fleet.store.hold_lease("coordinator", "other", 1_000)
        await eventually(lambda: not one.leads)
        fleet.create(5)
    assert fleet.topic.messages == []


async def test_a_lease_that_is_lost_with_the_store_repeats_nothing(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, logs):
    """
    Lines were published, and the store was full before that was noted, for longer than the lease.

    It can be read all the time; that it is back is told when it can be written.
    """
    batch = fleet.create(900)
    real = {name: getattr(fleet.store, name) for name in ("advance", "hold_lease")}
    is_full = False

    def unless_full(name: str) -> Callable[..., Any]:
        def call(*args: Any, **fields: Any) -> Any:
            nonlocal is_full
            is_full = is_full or name == "advance"
            if is_full:
                raise StoreUnavailableError("full")
            return real[name](*args, **fields)

        return call

    for name in real:
        monkeypatch.setattr(fleet.store, name, unless_full(name))
    async with fleet.coordinating() as coordinator:
        await eventually(lambda: is_full and not coordinator.leads and not coordinator._lines, what="a round stood by")
        assert sorted(fleet.topic.records) == list(range(1, 501))
        for name, function in real.items():
            monkeypatch.setattr(fleet.store, name, function)
        await eventually(lambda: again(fleet.store, batch).published_records == 900)
        assert sorted(fleet.topic.records) == list(range(1, 901))
        (done,) = await fleet.run(batch)
    assert done.completed == 900
    told = [entry["event"] for entry in logs if entry["event"].startswith("batch_store_")]
    assert told == ["batch_store_away", "batch_store_back"]


async def test_a_fault_ends_the_process_instead_of_standing_by_for_ever(fleet: Fleet, monkeypatch: pytest.MonkeyPatch):
    def broken(*_args: Any) -> bool:
        raise RuntimeError("no such table")

    monkeypatch.setattr(fleet.store, "hold_lease", broken)
    async with fleet.coordinating() as coordinator:
        with pytest.raises(RuntimeError, match="no such table"):
            await coordinator.run()


async def test_a_store_that_is_away_delays(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, logs):
    batch = fleet.create(20)
    is_away = True
    for name in (
        "unfinished_batches",
        "announce",
        "advance",
        "start_batch",
        "begin_finalizing",
        "finish_batch",
        "hold_lease",
    ):
        real = getattr(fleet.store, name)

        def flaky(*args: Any, _real: Any = real, **kwargs: Any) -> Any:
            nonlocal is_away
            is_away = not is_away
            if is_away:
                raise StoreUnavailableError("away")
            return _real(*args, **kwargs)

        monkeypatch.setattr(fleet.store, name, flaky)
    async with fleet.coordinating():
        (done,) = await fleet.run(batch)
    assert done.status is Status.COMPLETED
    assert sorted(set(fleet.topic.records)) == list(range(1, 21))
    assert {"batch_store_away", "batch_store_back"} <= {entry["event"] for entry in logs}


async def test_an_input_that_cannot_be_read_fails_no_batch(fleet: Fleet):
    batch = fleet.create(5)
    path = fleet.folder / batch.input_key
    content = path.read_bytes()
    path.unlink()
    async with fleet.coordinating() as coordinator:
        await eventually(lambda: any(job.failures for job in coordinator._jobs.values()))
        assert again(fleet.store, batch).status is Status.VALIDATING
        path.write_bytes(content)
        (done,) = await fleet.run(batch)
    assert done.status is Status.COMPLETED


async def test_a_full_disk_delays_the_end(fleet: Fleet, monkeypatch: pytest.MonkeyPatch):
    batch = fleet.create(5)
    real, failures = fleet.objects.write_stream, 3

    async def full(key: str, chunks: Any) -> int:
        nonlocal failures
        if failures:
            failures -= 1
            raise PayloadError("payload_unavailable", "No space left on device")
        return await real(key, chunks)

    monkeypatch.setattr(fleet.objects, "write_stream", full)
    async with fleet.coordinating():
        (done,) = await fleet.run(batch)
    assert (done.status, done.completed) == (Status.COMPLETED, 5)
    await fleet.finished(batch)


async def test_models_are_waited_for_and_then_taken_on_trust(fleet: Fleet, time_):
    batch = fleet.create(5)
    asked = 0

    async def away() -> None:
        nonlocal asked
        asked += 1
        raise BackendError("connect")

    async with fleet.coordinating(models=away):
        await eventually(lambda: asked > 1)
        assert again(fleet.store, batch).status is Status.VALIDATING
        time_.now += 31
        (done,) = await fleet.run(batch)
    assert done.status is Status.COMPLETED


async def test_a_model_that_is_not_served_fails_the_batch(fleet: Fleet):
    async def served() -> Callable[[str], bool]:
        return lambda name: name == "other"

    batch = fleet.create(2)
    async with fleet.coordinating(models=served):
        await fleet.until(batch, Status.FAILED)
    assert [fault.code for fault in fleet.store.errors_of(batch.id)] == ["model_not_found"] * 2


async def test_housekeeping_removes_what_nobody_needs(fleet: Fleet, time_):
    batch = fleet.create(5)
    path = fleet.folder / batch.input_key
    async with fleet.coordinating() as coordinator:
        fleet.store.delete_file(TENANT, batch.input_file_id)
        await eventually(lambda: len(fleet.topic.messages) == 5)
        await coordinator.keep_house()
        assert path.exists()
        (done,) = await fleet.run(batch)
        await eventually(lambda: coordinator.leads)
        await coordinator.keep_house()
        assert not path.exists()
        assert fleet.store.outcomes_of(batch.id, after=0) == []
        assert (fleet.folder / f"results/{done.output_file_id}").exists()
        time_.now += 31 * 86_400
        await eventually(lambda: coordinator.leads)
        await coordinator.keep_house()
        assert not (fleet.folder / f"results/{done.output_file_id}").exists()


async def test_files_are_written_again_byte_for_byte(fleet: Fleet):
    from worker.batches.assemble import assemble

    batch = fleet.create(1_500)
    async with fleet.coordinating():

        def is_settled() -> bool:
            fleet.answer(7)
            fleet.answer(1, status=400, body={"error": {"message": "m", "code": "c"}})
            return again(fleet.store, batch).settled > 1_000

        await eventually(is_settled)
        fleet.store.request_cancel(TENANT, batch.id)
    fleet.store.close_batch(batch.id, Status.CANCELLING)
    first = asyncio.create_task(assemble(fleet.store, fleet.objects, again(fleet.store, batch), Status.CANCELLED))
    await asyncio.wait({first}, timeout=0.02)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    results, contents = [], []
    for _ in range(2):
        results.append(await assemble(fleet.store, fleet.objects, again(fleet.store, batch), Status.CANCELLED))
        contents.append([(fleet.folder / f"results/{name}").read_bytes() for name in (batch.output_id, batch.error_id)])
    assert results[0] == results[1]
    assert contents[0] == contents[1]
    assert not list((fleet.folder / "results").glob(".*"))


# The collector.


def message(batch: Batch, record: int, data: bytes = b'{"status_code":200,"metadata":{},"body":{}}') -> ReceivedMessage:
    return ReceivedMessage(message_id="1", data=data, attributes={"run_id": batch.id, "line_id": str(record)})


@asynccontextmanager
async def collecting(collector: Collector) -> AsyncIterator[None]:
    task = asyncio.create_task(collector._write())
    try:
        yield
    finally:
        collector._is_stopping.set()
        collector._has_waiting.set()
        await task


async def running_batch(fleet: Fleet, lines: int) -> Batch:
    batch = fleet.create(lines)
    async with fleet.coordinating():
        await eventually(lambda: len(fleet.topic.messages) == lines)
    return batch


async def test_answers_are_acked_when_they_are_stored(fleet: Fleet):
    batch = await running_batch(fleet, 30)
    async with collecting(fleet.collector):
        settled = await asyncio.gather(*(fleet.collector.handle(message(batch, n)) for n in [*range(1, 31), 5]))
    assert set(settled) == {Settlement.ACK}
    assert again(fleet.store, batch).completed == 30
    assert (fleet.collector.counts.stored, fleet.collector.counts.repeated) == (30, 1)


async def test_strange_answers_are_acked_and_counted(fleet: Fleet):
    batch = await running_batch(fleet, 1)
    stranger = Batch(**{name: getattr(batch, name) for name in batch.__struct_fields__} | {"id": "batch_" + "0" * 32})
    foreign = ReceivedMessage(message_id="1", data=b"{}", attributes={})
    async with collecting(fleet.collector):
        settled = [await fleet.collector.handle(each) for each in (message(stranger, 1), message(batch, 2), foreign)]
    assert settled == [Settlement.ACK] * 3
    assert (fleet.collector.counts.unknown, fleet.collector.counts.foreign) == (2, 1)


async def test_answers_wait_for_a_store_that_is_away(fleet: Fleet, monkeypatch: pytest.MonkeyPatch):
    from worker.batches import collector as collecting_module

    monkeypatch.setattr(collecting_module, "STORE_BACKOFF", module.Backoff(base_s=0.01, max_s=0.01))
    batch = await running_batch(fleet, 3)
    real, calls = fleet.store.record, 0

    def flaky(outcomes: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < 5:
            raise StoreUnavailableError("away")
        return real(outcomes)

    monkeypatch.setattr(fleet.store, "record", flaky)
    async with collecting(fleet.collector):
        settled = await asyncio.gather(*(fleet.collector.handle(message(batch, n)) for n in (1, 2, 3)))
    assert set(settled) == {Settlement.ACK}
    assert again(fleet.store, batch).completed == 3


async def test_answers_are_nacked_when_it_stops_without_a_store(fleet: Fleet, monkeypatch: pytest.MonkeyPatch):
    batch = await running_batch(fleet, 1)

    def away(_outcomes: Any) -> Any:
        fleet.collector._is_stopping.set()
        raise StoreUnavailableError("away")

    monkeypatch.setattr(fleet.store, "record", away)
    async with collecting(fleet.collector):
        assert await fleet.collector.handle(message(batch, 1)) is Settlement.NACK
    assert fleet.collector.counts.nacked == 1


async def test_an_answer_that_the_database_refuses_is_nacked_alone(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, logs):
    batch = await running_batch(fleet, 40)
    real = fleet.store.record

    def refusing(outcomes: Any) -> Any:
        if any(outcome.record == 7 for outcome in outcomes):
            raise ValueError("integer out of range")
        return real(outcomes)

    monkeypatch.setattr(fleet.store, "record", refusing)
    async with collecting(fleet.collector):
        settled = await asyncio.gather(*(fleet.collector.handle(message(batch, n)) for n in range(1, 41)))
    assert [number for number, each in enumerate(settled, 1) if each is Settlement.NACK] == [7]
    assert again(fleet.store, batch).completed == 39
    assert [each["record"] for each in logs if each["event"] == "batch_result_not_stored"] == [7]


STORED = b'{"status_code":200,"metadata":{"line":1},"body_uri":"gs://b/large"}'


def fetching(fleet: Fleet, payloads: FakePayloads) -> Collector:
    return Collector(fleet.store, None, payloads=payloads)  # type: ignore[arg-type]


async def test_the_body_of_a_large_answer_is_fetched_from_storage(fleet: Fleet):
    """And stands in the output file like any other, in one line."""
    batch = fleet.create(1)
    async with fleet.coordinating():
        await eventually(lambda: len(fleet.topic.messages) == 1)
        body = json.dumps(GOOD, indent=1).encode()
        collector = fetching(fleet, FakePayloads(large=body))
        async with collecting(collector):
            assert await collector.handle(message(batch, 1, STORED)) is Settlement.ACK
        ended = await fleet.until(batch)
    assert (ended.completed, ended.failed) == (1, 0)
    assert ended.usage["total_tokens"] == 5
    found = await fleet.finished(batch)
    assert found.output.lines[0]["response"]["body"] == GOOD


@pytest.mark.parametrize(
    ("content", "fault", "code", "words"),
    [
        (b"[]", None, "malformed", "not a JSON object"),
        (b'{"a":"\xff"}', None, "malformed", "not a JSON object"),
        (None, None, "reply_in_storage", "stands in gs://b/large. It cannot be read: payload_not_found"),
        (b"{}", Fault.PAYLOAD_REFUSED, "reply_in_storage", "It cannot be read: payload_refused"),
        (b"{}", Fault.PAYLOAD_TOO_LARGE, "reply_in_storage", "It cannot be read: payload_too_large"),
    ],
)
async def test_a_large_answer_that_cannot_be_had_fails_its_line(
    fleet: Fleet, content: bytes | None, fault: Fault | None, code: str, words: str
):
    batch = await running_batch(fleet, 1)
    payloads = FakePayloads(**({} if content is None else {"large": content}))
    payloads.always = None if fault is None else PayloadError(fault)
    collector = fetching(fleet, payloads)
    async with collecting(collector):
        assert await collector.handle(message(batch, 1, STORED)) is Settlement.ACK
    (failure,) = fleet.store.failures_of(batch.id)
    assert failure["code"] == code
    assert words in failure["example_message"]


async def test_a_storage_that_is_away_is_waited_for(fleet: Fleet, monkeypatch: pytest.MonkeyPatch):
    """Each attempt asks again; when the process stops, the message goes back."""
    from worker.batches import collector as collecting_module

    monkeypatch.setattr(collecting_module, "STORE_BACKOFF", module.Backoff(base_s=0.01, max_s=0.01))
    batch = await running_batch(fleet, 2)
    payloads = FakePayloads(large=b"{}")
    payloads.failures.extend([PayloadError(Fault.PAYLOAD_UNAVAILABLE, "away")] * 3)
    collector = fetching(fleet, payloads)
    async with collecting(collector):
        assert await collector.handle(message(batch, 1, STORED)) is Settlement.ACK
        assert len(payloads.opened) == 4
        payloads.always = PayloadError(Fault.PAYLOAD_UNAVAILABLE, "away")
        waiting = asyncio.create_task(collector.handle(message(batch, 2, STORED)))
        await eventually(lambda: len(payloads.opened) > 6)
        collector._is_draining.set()
        assert await waiting is Settlement.NACK
    assert (collector.counts.stored, collector.counts.nacked) == (1, 1)


async def test_few_large_answers_are_in_memory_at_once(fleet: Fleet):
    """The others wait with their messages."""
    batch = await running_batch(fleet, 12)
    payloads, at_once = FakePayloads(large=b"{}"), []
    payloads.seconds = 0.01
    real = payloads.open

    @asynccontextmanager
    async def counted(uri: str) -> AsyncIterator[Any]:
        at_once.append(at_once[-1] + 1 if at_once else 1)
        async with real(uri) as payload:
            yield payload
        at_once.append(at_once[-1] - 1)

    payloads.open = counted  # type: ignore[method-assign]
    collector = fetching(fleet, payloads)
    async with collecting(collector):
        await asyncio.gather(*(collector.handle(message(batch, n, STORED)) for n in range(1, 13)))
    assert max(at_once) == 2
    assert collector.counts.stored == 12


async def test_without_a_place_to_fetch_from_a_large_answer_is_told_with_its_place(fleet: Fleet):
    batch = await running_batch(fleet, 1)
    async with collecting(fleet.collector):
        assert await fleet.collector.handle(message(batch, 1, STORED)) is Settlement.ACK
    (failure,) = fleet.store.failures_of(batch.id)
    assert failure["code"] == "reply_in_storage"
    assert failure["example_message"].endswith("stands in gs://b/large.")


def dead_letters(fleet: Fleet, **options: Any) -> Collector:
    return Collector(fleet.store, None, read=dead_letter_of, **options)  # type: ignore[arg-type]


async def test_a_dead_lettered_line_fails_and_its_batch_ends(fleet: Fleet):
    """Long before it expires; the message on the dead-letter topic is the request with Pub/Sub's attributes."""
    batch = fleet.create(3)
    async with fleet.coordinating():
        await eventually(lambda: len(fleet.topic.messages) == 3)
        fleet.answer(2)
        data, attributes = fleet.topic.messages[2]
        dead = ReceivedMessage(
            message_id="9",
            data=data,
            attributes={**attributes, "CloudPubSubDeadLetterSourceDeliveryCount": "20"},
        )
        collector = dead_letters(fleet)
        async with collecting(collector):
            assert await collector.handle(dead) is Settlement.ACK
            assert await collector.handle(dead) is Settlement.ACK
        ended = await fleet.until(batch)
    assert (ended.status, ended.completed, ended.failed) == (Status.COMPLETED, 2, 1)
    found = await fleet.finished(batch)
    assert found.error.lines[0]["error"] == {
        "code": "dead_lettered",
        "message": "The request was delivered 20 times and no worker answered it.",
    }
    assert found.error.lines[0]["response"] is None
    assert collector.counts.stored == collector.counts.repeated == 1


async def test_an_answer_that_was_published_before_wins_over_a_dead_letter(fleet: Fleet):
    """The dead letter waits for it; one that waits when the process stops comes again."""
    batch = await running_batch(fleet, 1)
    _, attributes = fleet.topic.messages[0]
    dead = ReceivedMessage(message_id="9", data=b"", attributes=attributes, publish_time=1_000.0)
    now = 1_000.0
    collector = dead_letters(fleet, wait_s=30.0, clock=lambda: now)
    async with collecting(collector):
        waiting = asyncio.create_task(collector.handle(dead))
        await asyncio.sleep(0)
        fleet.answer()
        assert not waiting.done()
        collector._is_draining.set()
        assert await waiting is Settlement.NACK
    now = 1_031.0
    collector = dead_letters(fleet, wait_s=30.0, clock=lambda: now)
    async with collecting(collector):
        assert await collector.handle(dead) is Settlement.ACK
    assert collector.counts.repeated == 1
    assert (again(fleet.store, batch).completed, again(fleet.store, batch).failed) == (1, 0)


async def test_what_is_done_is_counted(fleet: Fleet):
    batch = await running_batch(fleet, 3)
    metrics = fleet.collector._metrics
    async with collecting(fleet.collector):
        await asyncio.gather(*(fleet.collector.handle(message(batch, n)) for n in (1, 2, 2, 9)))
    read = metrics.registry.get_sample_value
    answers = {
        name: read("inference_worker_batch_answers_total", {"outcome": name})
        for name in ("stored", "repeated", "unknown")
    }
    assert answers == {"stored": 2, "repeated": 1, "unknown": 1}
    assert read("inference_worker_batch_store_duration_seconds_count") == 1


async def test_all_batches_are_told_by_the_one_that_coordinates(fleet: Fleet, time_):
    async with fleet.coordinating() as coordinator:
        batch = fleet.create(30)
        await eventually(lambda: len(fleet.topic.messages) == 30)
        time_.now += 90
        read = coordinator._metrics.registry.get_sample_value
        await eventually(lambda: read("inference_worker_batch_silence_seconds") == 90)
        assert read("inference_worker_batch_coordinating") == 1
        assert read("inference_worker_batches_unfinished", {"status": "in_progress"}) == 1
        assert (
            read("inference_worker_batch_lines_outstanding")
            == read("inference_worker_batch_lines_published_total")
            == 30
        )
        await fleet.run(batch)
        await eventually(lambda: read("inference_worker_batch_lines_outstanding") == 0)
        assert read("inference_worker_batches_ended_total", {"status": "completed"}) == 1
    assert read("inference_worker_batch_coordinating") == 0
