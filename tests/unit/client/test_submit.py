"""Checking a file, and publishing what the ledger has as unpublished."""

import asyncio
import hashlib
import json
from collections import Counter

import pytest

from tests.support.waiting import eventually
from worker.client.errors import InputError, LedgerError
from worker.client.io.files import open_input
from worker.client.ledger import Ledger, Outcome, new_run
from worker.client.submit import Submission, check
from worker.errors import MessageRejectedError, PayloadError, PublishRefusedError, PublishRetryableError
from worker.policy.model import Fault


def a_line(number, text="hello"):
    return b'{"path":"/v1/x","metadata":{"n":%d},"body":{"text":"%s"}}' % (number, text.encode())


def a_batch_line(custom_id):
    return b'{"custom_id":"%s","method":"POST","url":"/v1/x","body":{}}' % custom_id.encode()


class Topic:
    """Confirms publishes, after the failures that it is given."""

    def __init__(self, failures=(), hold=None, at_most=None):
        self.published = []
        self.at_most = at_most
        self.failures = list(failures)
        self.hold = hold
        self.under_way = 0

    async def publish(self, data, attributes):
        if self.failures and (failure := self.failures.pop(0)) is not None:
            raise failure
        self.under_way += 1
        if self.hold is not None:
            await self.hold.wait()
        if self.at_most is not None and len(self.published) + self.under_way > self.at_most:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        self.under_way -= 1
        self.published.append((data, dict(attributes)))
        return f"m{len(self.published)}"

    @property
    def ids(self):
        return Counter(attributes["line_id"].split("-")[1] for _, attributes in self.published)


@pytest.fixture
def run_of(tmp_path):
    """Return the input and a ledger of it: checked, and with nothing published."""
    made = []

    def make(lines):
        path = tmp_path / "in.jsonl"
        path.write_bytes(b"\n".join(lines) + b"\n")
        ledger = Ledger.create(str(tmp_path / "in.jsonl.run"), new_run(str(path), "projects/p/topics/t"))
        made.append(ledger)
        assert check_file(path, ledger).faults == []
        return path, ledger

    yield make
    for ledger in made:
        ledger.close()


def check_file(path, ledger, **options):
    reader = open_input(str(path))
    try:
        return check(reader, ledger, **options)
    finally:
        reader.close()


async def submit(path, ledger, topic, **options):
    reader = open_input(str(path))
    try:
        submission = Submission(reader, ledger, topic.publish, **options)
        await submission.run()
        return submission.progress()
    finally:
        reader.close()


def test_every_fault_is_named_with_line_and_field(tmp_path):
    """And nothing of the file is published by a check; the lines keep their numbers across blank ones."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(
        b"\n".join(
            [
                a_batch_line("a"),
                b"not json",
                b"",
                a_batch_line("a"),
                b'{"path":"/v1/x","body":[]}',
                b'{"custom_id":"b","method":"GET","url":"/v1/x","body":{}}',
                b'{"custom_id":"c","method":"POST","url":"ftp://x","body":{}}',
                b'{"custom_id":"d","method":"POST","url":"/v1/x"}',
                b'{"path":"/v1/x","body":{},"deadline":1e12}',
                a_line(10),
            ]
        )
    )
    with Ledger.create(str(tmp_path / "l.run"), new_run(str(path), "t")) as ledger:
        result = check_file(path, ledger)
        assert ledger.totals().published == 0
    assert {(each.number, each.field) for each in result.faults} == {
        (2, None),
        (4, "custom_id"),
        (5, "body"),
        (6, "method"),
        (7, "url"),
        (8, "body"),
        (9, "deadline"),
    }
    assert (result.lines, result.fault_count) == (9, 7)


def test_a_file_of_faults_names_the_first_and_counts_all(tmp_path):
    """A million broken lines do not fill the screen."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"x\n" * 1000)
    with Ledger.create(str(tmp_path / "l.run"), new_run(str(path), "t")) as ledger:
        result = check_file(path, ledger)
    assert (len(result.faults), result.fault_count) == (20, 1000)


def test_only_the_first_lines_are_looked_at_with_a_limit(tmp_path):
    """A fault behind them is no matter."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(a_line(1) + b"\n" + a_line(2) + b"\nbroken\n")
    with Ledger.create(str(tmp_path / "l.run"), new_run(str(path), "t")) as ledger:
        assert check_file(path, ledger, limit=2).fault_count == 0
        assert ledger.totals().lines == 2


async def test_every_line_is_published_once_with_the_attributes_of_the_run(run_of):
    """Byte for byte, under line id and run id; the ledger has the broker's ids."""
    path, ledger = run_of([a_line(1), a_line(2), a_batch_line("c")])
    topic = Topic()
    progress = await submit(path, ledger, topic)
    assert (progress.published, ledger.totals().published) == (3, 3)
    assert topic.ids == {"1": 1, "2": 1, "3": 1}
    data, attributes = topic.published[0]
    assert data == a_line(1)
    assert attributes["run_id"] == ledger.run.run_id
    assert "run_round" not in attributes


async def test_a_second_submission_publishes_nothing(run_of):
    """What is confirmed is not published again."""
    path, ledger = run_of([a_line(number) for number in range(50)])
    topic = Topic()
    await submit(path, ledger, topic)
    await submit(path, ledger, topic)
    assert len(topic.published) == 50


async def test_a_failed_publish_is_repeated(run_of):
    """Until the broker confirms it."""
    path, ledger = run_of([a_line(number) for number in range(5)])
    topic = Topic(failures=[PublishRetryableError("away")] * 7)

    async def no_sleep(_):
        await asyncio.sleep(0)

    progress = await submit(path, ledger, topic, sleep=no_sleep)
    assert (progress.retries, progress.published) == (7, 5)


@pytest.mark.parametrize(
    ("failure", "kind"),
    [(PublishRefusedError("no topic"), PublishRefusedError), (MessageRejectedError("bad"), InputError)],
)
async def test_a_refusal_ends_the_submission_and_what_was_confirmed_is_recorded(run_of, failure, kind):
    """The next command goes on."""
    path, ledger = run_of([a_line(number) for number in range(20)])
    topic = Topic(failures=[None] * 10 + [failure])
    with pytest.raises(kind):
        await submit(path, ledger, topic, window=1)
    assert ledger.totals().published == len(topic.published) == 10
    await submit(path, ledger, topic)
    assert topic.ids == {str(number): 1 for number in range(1, 21)}


async def test_a_stop_waits_for_what_is_on_its_way(run_of):
    """And begins nothing else."""
    path, ledger = run_of([a_line(number) for number in range(100)])
    topic = Topic(hold=asyncio.Event())
    reader = open_input(str(path))
    submission = Submission(reader, ledger, topic.publish, window=8)
    running = asyncio.ensure_future(submission.run())
    await eventually(lambda: topic.under_way == 8)
    submission.stop()
    topic.hold.set()
    await running
    reader.close()
    assert ledger.totals().published == len(topic.published) == 8


async def test_a_stop_does_not_wait_for_the_end_of_an_outage(run_of):
    """What has failed is not repeated any more; what was confirmed is recorded."""
    path, ledger = run_of([a_line(number) for number in range(20)])
    tried = 0

    async def publish(data, attributes, /):
        nonlocal tried
        tried += 1
        if tried > 5:
            raise PublishRetryableError("away")
        return f"m{tried}"

    async def no_sleep(_):
        await asyncio.sleep(0)

    reader = open_input(str(path))
    submission = Submission(reader, ledger, publish, window=8, sleep=no_sleep)
    running = asyncio.ensure_future(submission.run())
    await eventually(lambda: submission.progress().retries > 3)
    submission.stop()
    await running
    reader.close()
    assert submission.progress().reason == "away"
    assert ledger.totals().published == 5


async def test_a_cancellation_records_what_was_confirmed(run_of):
    """Nothing that the broker has confirmed is published again."""
    path, ledger = run_of([a_line(number) for number in range(100)])
    topic = Topic(at_most=30)
    reader = open_input(str(path))
    running = asyncio.ensure_future(Submission(reader, ledger, topic.publish, window=4).run())
    await eventually(lambda: len(topic.published) == 30)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    reader.close()
    assert ledger.totals().published == len(topic.published)
    topic.at_most = None
    await submit(path, ledger, topic)
    assert set(topic.ids.values()) == {1}


async def test_an_edited_line_is_noticed_and_not_published(run_of):
    """Between the check and the publish, and in a published file."""
    path, ledger = run_of([a_line(1), a_line(2)])
    path.write_bytes(a_line(1, "other") + b"\n" + a_line(2) + b"\n")
    topic = Topic()
    with pytest.raises(InputError, match="line 1 has changed"):
        await submit(path, ledger, topic)
    path.write_bytes(a_line(1) + b"\n" + a_line(2) + b"\n")
    await submit(path, ledger, topic)
    path.write_bytes(a_line(1) + b"\n" + a_line(2, "other") + b"\n")
    with pytest.raises(LedgerError, match="line 2 has changed"):
        check_file(path, ledger)
    path.write_bytes(a_line(1) + b"\n")
    with pytest.raises(LedgerError, match="ends at line 1, but line 2 was published"):
        check_file(path, ledger)


async def test_a_line_of_a_new_round_says_so(run_of):
    """Its answer can be told from a late one of the round before."""
    path, ledger = run_of([a_line(1), a_line(2)])
    topic = Topic()
    await submit(path, ledger, topic)
    ledger.record_answers([Outcome(number=2, round=1, status=504, error_class="timeout")])
    ledger.begin_round(["timeout"])
    await submit(path, ledger, topic)
    assert [(attributes["line_id"].split("-")[1], attributes.get("run_round")) for _, attributes in topic.published][
        2:
    ] == [("2", "2")]


async def test_a_body_over_the_limit_goes_into_object_storage_and_the_message_names_it(run_of, tmp_path):
    """With its hash; a place that is away is asked again, and without a place the line is a fault."""
    text = "x" * 10_100_000
    path = tmp_path / "large.jsonl"
    path.write_bytes(b'{"path":"/v1/x","priority":3,"metadata":{"n":1},"body":{"t":"%s"}}\n' % text.encode())
    uploaded = {}
    failures = [PayloadError(Fault.PAYLOAD_UNAVAILABLE, "away")]

    async def upload(line_id, body):
        if failures:
            raise failures.pop()
        uploaded[line_id] = body
        return f"gs://bucket/run/{line_id}.json"

    async def no_sleep(_):
        await asyncio.sleep(0)

    topic = Topic()
    with Ledger.create(str(tmp_path / "large.run"), new_run(str(path), "t")) as ledger:
        assert [each.field for each in check_file(path, ledger).faults] == [None]
        assert check_file(path, ledger, is_by_reference=True).faults == []
        await submit(path, ledger, topic, upload=upload, sleep=no_sleep)
    [(data, attributes)] = topic.published
    [(line_id, body)] = uploaded.items()
    assert body == b'{"t":"%s"}' % text.encode()
    assert attributes["body_sha256"] == hashlib.sha256(body).hexdigest()
    assert json.loads(data) == {
        "path": "/v1/x", "priority": 3, "metadata": {"n": 1}, "body_uri": f"gs://bucket/run/{line_id}.json"
    }  # fmt: skip


async def test_a_bucket_that_refuses_ends_the_submission_with_the_line(tmp_path):
    """At once, and nothing is published."""
    path = tmp_path / "large.jsonl"
    path.write_bytes(b'{"path":"/v1/x","body":{"t":"%s"}}\n' % (b"x" * 10_100_000))

    async def upload(line_id, body):
        raise PayloadError(Fault.PAYLOAD_REFUSED, "no permission")

    topic = Topic()
    with Ledger.create(str(tmp_path / "large.run"), new_run(str(path), "t")) as ledger:
        assert check_file(path, ledger, is_by_reference=True).faults == []
        with pytest.raises(InputError, match=r"line 1: object storage does not take the body: .*no permission"):
            await submit(path, ledger, topic, upload=upload)
    assert topic.published == []
