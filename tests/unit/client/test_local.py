"""The loop of a run, against a broker that reorders, duplicates and delays."""

import asyncio
import json
import threading
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.client.fake_broker import FakeBroker, echo
from worker.client.errors import ClientError, InputError, OutputError
from worker.client.first_answers import FirstAnswers, SameErrorsError
from worker.client.io.lines import RawLine
from worker.client.io.outputs import Answer
from worker.client.local import BatchRun, RunTuning
from worker.client.publishing import LineWindow
from worker.client.resume import AnsweredLines
from worker.client.summary import InputCount
from worker.errors import MessageRejectedError, PublishRefusedError, PublishRetryableError
from worker.wire.message import MAX_PUBSUB_MESSAGE_BYTES, encode_response


class Source:
    """Gives lines out in small bunches, and a failure at the end if there is one."""

    def __init__(self, lines, bunch=3, failure=None):
        self._lines = [RawLine.of(number, line) for number, line in enumerate(lines, 1)]
        self.ids = [line.line_id for line in self._lines]
        self._bunch = bunch
        self._failure = failure
        self.lines_read = 0
        self.bytes_read = 0
        self.bytes_total = len(self._lines)

    def read_lines(self):
        bunch = self._lines[self.lines_read : self.lines_read + self._bunch]
        self.lines_read = self.bytes_read = self.lines_read + len(bunch)
        if not bunch and self._failure is not None:
            raise self._failure
        return bunch


class Sink:
    """Keeps the lines; fails once it holds `limit` of them."""

    def __init__(self, limit=None):
        self.data = b""
        self._limit = limit

    def write(self, data):
        if self._limit is not None and self.data.count(b"\n") + data.count(b"\n") > self._limit:
            raise OutputError("out.jsonl: No space left on device")
        self.data += data

    @property
    def lines(self):
        return [json.loads(line) for line in self.data.splitlines()]

    @property
    def ids(self):
        return [line["id"].removeprefix("batch_req_") for line in self.lines]


def a_message(number):
    return b'{"path":"/v1/x","metadata":{"n":%d},"body":{"n":%d}}' % (number, number)


def a_batch_line(number):
    return b'{"custom_id":"c%d","method":"POST","url":"/v1/x","body":{"n":%d}}' % (number, number)


def some_lines(count):
    kinds = (a_message, a_batch_line, lambda number: b"bad %d" % number)
    return [kinds[number % 3](number) for number in range(count)]


def a_run(source, sink, broker, **options):
    return BatchRun(source, sink, broker.publish, broker.answers, **{"window": 8, **options})


async def until(condition):
    """Let everything else run until the condition holds; the test's own timeout bounds it."""
    while not condition():  # noqa: ASYNC110 - there is no event for the end of a thread's write
        await asyncio.sleep(0)


@settings(max_examples=40)
@given(
    count=st.integers(0, 60),
    seed=st.integers(0, 1000),
    window=st.integers(1, 70),
    max_turns=st.integers(0, 30),
    duplicates=st.sampled_from([0.0, 0.3, 1.0]),
    bunch=st.integers(1, 20),
)
async def test_exactly_one_answer_a_line(*, count, seed, window, max_turns, duplicates, bunch):
    """However answers are reordered, delayed and repeated, each line gets one, and is published once."""
    source, sink = Source(some_lines(count), bunch), Sink()
    broker = FakeBroker(seed=seed, duplicates=duplicates, max_turns=max_turns)
    summary = await a_run(source, sink, broker, window=window).run()
    assert sorted(sink.ids) == sorted(source.ids)
    assert len(broker.published) == count
    assert (summary.lines, summary.answered, summary.unanswered, summary.is_complete) == (count, count, 0, True)
    assert summary.status_classes == {
        kind: number for kind, number in (("2xx", count - count // 3), ("4xx", count // 3)) if number
    }
    assert broker.is_settled


async def test_answers_have_the_shape_of_their_lines():
    """A message gets a message's line, a batch line OpenAI's, what is neither a 400 in a message's line."""
    sink = Sink()
    await a_run(Source(some_lines(3)), sink, FakeBroker()).run()
    message, batch, bad = sorted(sink.lines, key=lambda line: line["id"].removeprefix("batch_req_"))
    usage = {"prompt_tokens": 3, "completion_tokens": 5}
    assert (message["status_code"], message["metadata"]) == (200, {"n": 0})
    assert message["body"] == {"echo": {"n": 0}, "usage": usage}
    assert (batch["custom_id"], batch["error"]) == ("c1", None)
    assert batch["response"] == {
        "status_code": 200,
        "request_id": "req-1",
        "body": {"echo": {"n": 1}, "usage": usage},
    }
    assert (bad["status_code"], bad["body"]["error"]["code"]) == (400, "bad_message")


@pytest.mark.parametrize("window", [1, 4, 17])
async def test_no_more_than_the_window_is_unanswered(window):
    """The input is read on only when answers make room."""
    broker = FakeBroker(max_turns=20, seed=window)
    source, sink = Source([a_message(number) for number in range(60)]), Sink()
    peak = 0
    original = broker.publish

    async def publish(data, attributes, /):
        nonlocal peak
        peak = max(peak, len(broker.published) + 1 - sink.data.count(b"\n"))
        return await original(data, attributes)

    await BatchRun(source, sink, publish, broker.answers, window=window).run()
    assert min(window, 2) <= peak <= window  # how much of it is used depends on who is quicker


async def test_bytes_bound_the_window_as_well():
    """Large lines wait for one another although the window has room for their number."""
    broker, sink = FakeBroker(max_turns=5), Sink()
    lines = [b'{"path":"/v1/x","body":{"a":"%s"}}' % (b"x" * 1000) for _ in range(10)]
    peak = 0

    async def publish(data, attributes, /):
        nonlocal peak
        peak = max(peak, len(broker.published) + 1 - sink.data.count(b"\n"))
        return await broker.publish(data, attributes)

    tuning = RunTuning(window_bytes=2500)
    await BatchRun(Source(lines), sink, publish, broker.answers, window=10, tuning=tuning).run()
    assert peak == 2


async def test_answered_lines_are_not_asked_again():
    """Lines that an earlier run answered are skipped; an edited one is not."""
    lines = [a_message(number) for number in range(10)]
    source, sink, broker = Source(lines), Sink(), FakeBroker()
    answered = AnsweredLines()
    for line_id in source.ids[:6]:
        answered.add(line_id)
    answered.add("line-7-00000000")
    summary = await a_run(source, sink, broker, answered=answered).run()
    assert sorted(sink.ids) == sorted(source.ids[6:])
    assert len(broker.published) == 4
    assert (summary.lines, summary.skipped, summary.answered, summary.is_complete) == (10, 6, 4, True)


async def test_duplicate_and_unmatched_answers_are_dropped():
    """A second answer to a line and answers to other inputs are counted, acked and not written."""
    source, sink, broker = Source([a_message(0), a_message(1)], bunch=1), Sink(), FakeBroker(duplicates=1.0)
    broker.inject(b'{"status_code":200,"metadata":{},"body":{}}', {"line_id": "line-99-00000000"})
    broker.inject(b'{"status_code":200,"metadata":{},"body":{}}', {})
    summary = await a_run(source, sink, broker, window=1).run()
    assert sorted(sink.ids) == sorted(source.ids)
    assert summary.unmatched_answers == 4
    assert summary.duplicates >= 1


async def test_an_answer_is_acked_only_when_it_is_written():
    """The handler of an answer returns after its line is with the sink, never before."""
    sink, broker = Sink(), FakeBroker()
    seen = []

    async def answers(handler, /):
        async def checked(data, attributes, message_id):
            await handler(data, attributes, message_id)
            seen.append(attributes["line_id"] in sink.ids)

        await broker.answers(checked)

    await BatchRun(Source([a_message(n) for n in range(20)]), sink, broker.publish, answers, window=20).run()
    assert seen
    assert all(seen)


async def test_publish_is_tried_again():
    """A publish that the broker did not confirm is repeated after a wait, the line is answered."""
    broker, sink = FakeBroker(failures=[PublishRetryableError("down")] * 5), Sink()
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    source = Source([a_message(0)])
    summary = await a_run(source, sink, broker, sleep=sleep).run()
    assert sink.ids == source.ids
    assert summary.publish_retries == len(waits) == 5
    assert all(0 <= wait <= 0.1 * 2**turn for turn, wait in enumerate(waits))


async def test_answered_line_is_not_published_again():
    """When an unconfirmed publish turns out to have been one, its answer ends the tries."""
    broker, sink = FakeBroker(), Sink()
    tries = Counter()

    async def publish(data, attributes, /):
        tries[attributes["line_id"]] += 1
        broker.inject(*echo(data, attributes))
        raise PublishRetryableError("timed out")

    async def sleep(seconds):
        await until(lambda: sink.data)

    source = Source([a_message(0)])
    await BatchRun(source, sink, publish, broker.answers, window=1, sleep=sleep).run()
    assert sink.ids == source.ids
    assert list(tries.values()) == [1]


async def test_patience_with_the_broker_ends():
    """A broker that stays away for longer than the patience ends the run with its own error."""
    now = [0.0]

    async def sleep(seconds):
        now[0] += 1

    async def publish(data, attributes, /):
        raise PublishRetryableError("unavailable")

    run = BatchRun(
        Source([a_message(0)]),
        Sink(),
        publish,
        FakeBroker().answers,
        window=1,
        sleep=sleep,
        clock=lambda: now[0],
        tuning=RunTuning(publish_patience_s=50),
    )
    with pytest.raises(PublishRetryableError, match="unavailable"):
        await run.run()
    assert now[0] == 50
    assert run.summary().unanswered == 1
    assert not run.summary().is_complete


async def test_refused_publish_ends_the_run():
    """A topic that is gone ends the run with that error; what was answered is kept."""
    broker, sink = FakeBroker(), Sink()

    async def publish(data, attributes, /):
        if len(broker.published) == 5:
            await until(lambda: broker.acked == 5)
            raise PublishRefusedError("the topic is gone")
        return await broker.publish(data, attributes)

    source = Source([a_message(number) for number in range(10)])
    with pytest.raises(PublishRefusedError, match="gone"):
        await BatchRun(source, sink, publish, broker.answers, window=1).run()
    assert sink.ids == source.ids[:5]
    assert broker.is_settled


async def test_rejected_message_is_answered_here():
    """A message the broker does not take gets an error answer instead of being lost or ending the run."""
    broker, sink = FakeBroker(failures=[MessageRejectedError("invalid")]), Sink()
    summary = await a_run(Source([a_message(0), a_message(1)]), sink, broker).run()
    first = next(line for line in sink.lines if line["status_code"] == 400)
    assert first["metadata"] == {"n": 0}
    assert first["body"]["error"]["code"] == "request_rejected"
    assert summary.error_classes == {"request_rejected": 1}
    assert summary.is_complete


async def test_line_over_the_limit_is_answered_here():
    """A line that no message can carry is answered with a 413 and never published."""
    broker, sink = FakeBroker(), Sink()
    large = b'{"path":"/v1/x","metadata":{"n":7},"body":{"a":"%s"}}' % (b"x" * MAX_PUBSUB_MESSAGE_BYTES)
    summary = await a_run(Source([large, a_message(1)]), sink, broker).run()
    assert len(broker.published) == 1
    answer = next(line for line in sink.lines if line["status_code"] == 413)
    assert (answer["metadata"], answer["body"]["error"]["code"]) == ({"n": 7}, "request_too_large")
    assert (summary.status_classes, summary.error_classes) == ({"2xx": 1, "4xx": 1}, {"request_too_large": 1})


async def test_damaged_input_is_answered_up_to_the_damage():
    """What was read before the damage is answered, then the error is raised."""
    source, sink = Source(some_lines(20), failure=InputError("in.gz: is damaged")), Sink()
    run = a_run(source, sink, FakeBroker(max_turns=10))
    with pytest.raises(InputError, match="damaged"):
        await run.run()
    assert sorted(sink.ids) == sorted(source.ids)
    assert (run.summary().answered, run.summary().is_complete) == (20, False)


async def test_failed_output_ends_the_run():
    """A full disk ends the run with that error; nothing that was not written is acked."""
    source, sink, broker = Source([a_message(n) for n in range(50)]), Sink(limit=10), FakeBroker(max_turns=5)
    with pytest.raises(OutputError, match="No space left"):
        await a_run(source, sink, broker, window=3).run()
    assert broker.acked <= len(sink.ids) <= 10
    assert broker.is_settled


async def test_answers_that_end_early_are_an_error():
    """A receiving end that returns while lines wait is an error, not a silent end."""

    async def answers(handler, /):
        await asyncio.sleep(0)

    with pytest.raises(ClientError, match="the answers ended"):
        await BatchRun(Source([a_message(0)]), Sink(), FakeBroker().publish, answers, window=1).run()


async def test_failure_of_the_receiving_end_is_raised():
    """What the receiving end raises comes out of the run as it is."""

    async def answers(handler, /):
        raise PublishRefusedError("the subscription is gone")

    with pytest.raises(PublishRefusedError, match="subscription is gone"):
        await BatchRun(Source([a_message(0)]), Sink(), FakeBroker().publish, answers, window=1).run()


async def test_cancelling_keeps_what_was_answered():
    """Ctrl-C in the middle settles the receiving end, keeps every answer that came, and a resumed run does the rest."""
    lines = [a_message(number) for number in range(60)]
    source, sink, broker = Source(lines), Sink(), FakeBroker(max_turns=3)
    run = a_run(source, sink, broker, window=4)
    running = asyncio.ensure_future(run.run())
    await until(lambda: sink.data.count(b"\n") >= 20)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert broker.is_settled
    assert broker.acked <= len(sink.ids) == run.summary().answered < 60
    assert not run.summary().is_complete
    assert len(asyncio.all_tasks()) == 1
    answered = AnsweredLines()
    for line_id in sink.ids:
        answered.add(line_id)
    await a_run(Source(lines), sink, FakeBroker(), answered=answered).run()
    assert sorted(sink.ids) == sorted(source.ids)


async def test_cancelling_waits_for_a_slow_output():
    """Answers that wait behind a slow write when Ctrl-C comes are written before the run ends."""
    sink, broker = Sink(), FakeBroker()
    gate, entered = threading.Event(), threading.Event()

    class SlowSink:
        def write(self, data):
            entered.set()
            gate.wait()
            sink.write(data)

    run = a_run(Source([a_message(n) for n in range(5)]), SlowSink(), broker)
    running = asyncio.ensure_future(run.run())
    await until(lambda: entered.is_set() and not run._waiting and len(broker.published) == 5)
    running.cancel()
    await until(lambda: broker.is_settled)
    assert not running.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert len(sink.ids) == run.summary().answered == 5


async def test_progress_is_reported_and_ends_complete():
    """Progress is reported while the run goes on and once at its end, with counts that only grow."""
    seen = []
    source = Source([a_message(n) for n in range(30)])
    tuning = RunTuning(progress_interval_s=0)
    run = a_run(source, Sink(), FakeBroker(), on_progress=seen.append, tuning=tuning)
    await run.run()
    assert len(seen) > 2
    assert [state.answered for state in seen] == sorted(state.answered for state in seen)
    last = seen[-1]
    assert (last.expected_lines, last.answered, last.waiting) == (30, 30, 0)
    assert last.output_tokens == 150


async def test_summary_counts_tokens_and_time():
    """The summary adds up usage, and the rate is over the duration of the run."""
    now = [0.0]
    broker = FakeBroker()

    async def publish(data, attributes, /):
        now[0] += 2.0
        return await broker.publish(data, attributes)

    run = BatchRun(
        Source([a_message(n) for n in range(10)]), Sink(), publish, broker.answers, window=1, clock=lambda: now[0]
    )
    summary = await run.run()
    assert (summary.input_tokens, summary.output_tokens) == (30, 50)
    assert (summary.duration_s, summary.lines_per_s, summary.output_tokens_per_s) == (20.0, 0.5, 2.5)


async def test_memory_does_not_grow_with_the_input():
    """Nothing is kept of a line that was answered."""
    broker = FakeBroker()
    run = a_run(Source([a_message(n) for n in range(300)]), Sink(), broker, window=5)
    await run.run()
    assert run._waiting == {}
    assert (run._window.count, run._window.bytes) == (0, 0)
    assert run._publishing == set()


async def test_empty_input_ends_at_once():
    """An input without lines is complete."""
    summary = await a_run(Source([]), Sink(), FakeBroker()).run()
    assert (summary.lines, summary.is_complete, summary.backend_p50_s, summary.input_tokens) == (0, True, None, None)


async def test_line_window_bounds_number_and_bytes():
    """Entering waits while there are too many lines or too many bytes inside."""
    lines = LineWindow(2, 100)
    await lines.enter(60)
    third = asyncio.ensure_future(lines.enter(60))
    await asyncio.sleep(0)
    assert not third.done()
    lines.leave(60)
    await third
    await lines.enter(10)
    fourth = asyncio.ensure_future(lines.enter(1))
    await asyncio.sleep(0)
    assert not fourth.done()
    lines.leave(10)
    await fourth
    assert (lines.count, lines.bytes) == (2, 61)


async def test_line_window_lets_one_large_line_in():
    """A line larger than the bound enters when it is alone."""
    lines = LineWindow(5, 100)
    await lines.enter(1000)
    other = asyncio.ensure_future(lines.enter(0))
    await asyncio.sleep(0)
    assert not other.done()
    lines.leave(1000)
    await other


async def test_line_window_waits_until_it_is_empty():
    """`wait_until_empty` returns when the last line has left, at once when none is inside."""
    lines = LineWindow(2, 100)
    await lines.wait_until_empty()
    await lines.enter(1)
    waiting = asyncio.ensure_future(lines.wait_until_empty())
    await asyncio.sleep(0)
    assert not waiting.done()
    lines.leave(1)
    await waiting


def test_window_of_nothing_is_refused():
    """A window below one could never answer anything."""
    with pytest.raises(ValueError, match="at least 1"):
        LineWindow(0, 100)


def failing(error_class, status, *, good=frozenset()):
    """Answer with an error, except to the lines of these numbers."""

    def respond(data, attributes):
        number = int(attributes["line_id"].split("-")[1])
        if number in good:
            answer, copied = echo(data, attributes)
            return answer, {**copied, "backend": "default"}
        body = json.dumps({"error": {"message": f"the server says {error_class}"}}).encode()
        answer = encode_response(status, b"{}", body)
        return answer, {"line_id": attributes["line_id"], "error_class": error_class, "backend": "default"}

    return respond


async def run_first(count, respond, *, window=100, lines=None, **options):
    """Run with `FirstAnswers`; return run, sink and what was raised."""
    source, sink, broker = Source(lines or [a_message(n) for n in range(count)]), Sink(), FakeBroker(respond=respond)
    run = a_run(
        source, sink, broker, window=window, first_answers=FirstAnswers(), urls={"default": "http://h/v1"}, **options
    )
    try:
        await run.run()
    except SameErrorsError as error:
        return run, sink, error
    return run, sink, None


async def test_the_same_error_for_all_first_answers_stops_the_run():
    """Twenty answers are enough; none is written, and the error names class, line, message and address."""
    run, sink, error = await run_first(3000, failing("model_not_found", 404))
    assert sink.data == b""
    assert error.error_class == "model_not_found"
    assert "the first 20 answers are model_not_found (line " in str(error)
    assert "the server says model_not_found (http://h/v1/x)" in str(error)
    assert (run.summary().answered, run.summary().is_complete) == (0, False)


async def test_a_few_other_answers_do_not_hide_a_wrong_command():
    """Two good answers among the first twenty are written, the errors are not."""
    _, sink, error = await run_first(300, failing("invalid_request", 400, good={3, 5}), window=20)
    assert error is not None
    assert {line["status_code"] for line in sink.lines} <= {200}


@pytest.mark.parametrize(
    ("number", "needed", "good", "is_stopped"),
    [(50, 0.9, 6, False), (50, 0.9, 5, True), (4, 1.0, 1, False), (4, 1.0, 0, True), (10, 0.5, 5, True)],
)
async def test_number_and_share_of_the_first_answers_are_the_users(number, needed, good, is_stopped):
    """As `--stop-after` and `--stop-share` say; the run goes on with fewer equal errors, and not with as many."""
    first = FirstAnswers(number, needed)
    fine = Answer(status_code=200, body=b"{}")
    bad = Answer(status_code=400, body=b"{}", error_class="invalid_request")
    answers = [fine] * good + [bad] * (number - good)
    admitted = await asyncio.gather(*map(first.admit, answers, range(number)), return_exceptions=True)
    failures = [each for each in admitted if each is not None]
    assert len(failures) == (number - good if is_stopped else 0)
    assert all(isinstance(each, SameErrorsError) for each in failures)


async def test_errors_among_good_answers_are_written():
    """The first three answers of another kind release what was held."""
    _, sink, error = await run_first(300, failing("invalid_request", 400, good=set(range(0, 300, 2))))
    assert error is None
    assert Counter(line["status_code"] for line in sink.lines) == {200: 149, 400: 151}
    errors = [line for line in sink.lines if line["status_code"] == 400]
    assert {line["url"] for line in errors} == {"http://h/v1/x"}
    assert not any("url" in line for line in sink.lines if line["status_code"] == 200)


@pytest.mark.parametrize(
    ("error_class", "status", "is_stopped"),
    [
        ("model_not_found", 404, True),
        ("forbidden", 403, True),
        ("invalid_request", 404, True),
        ("invalid_request", 400, False),
        ("content_filter", 400, False),
    ],
)
async def test_fewer_lines_are_stopped_by_what_only_the_command_can_cause(error_class, status, is_stopped):
    """Five lines with a wrong model are no answers for good; five refused prompts are."""
    _, sink, error = await run_first(5, failing(error_class, status))
    assert (error is not None, len(sink.lines)) == (is_stopped, 0 if is_stopped else 5)


async def test_bad_lines_say_nothing_about_the_command():
    """What the worker refuses by itself is written at once, however many there are."""
    _, sink, error = await run_first(0, echo, lines=[b"bad %d" % n for n in range(100)])
    assert error is None
    assert len(sink.lines) == 100


@pytest.mark.parametrize("window", [1, 3])
async def test_a_small_window_does_not_block(window):
    """When every line that may be under way is held, it is decided with what there is."""
    _, sink, error = await run_first(10, failing("invalid_request", 400), window=window)
    assert error is None
    assert len(sink.lines) == 10
    _, sink, error = await run_first(10, failing("model_not_found", 404), window=window)
    assert error is not None
    assert sink.data == b""


async def test_a_held_error_is_written_when_the_others_are_answered():
    """An error that came first, before the last good answers, does not wait for ever."""
    broker, sink = FakeBroker(), Sink()
    arrived = asyncio.Event()

    async def publish(data, attributes, /):
        if attributes["line_id"].startswith("line-2-"):
            broker.inject(*failing("invalid_request", 400)(data, attributes))
            arrived.set()
        else:
            await arrived.wait()
            for _ in range(20):
                await asyncio.sleep(0)
            broker.inject(*echo(data, attributes))
        return "id"

    lines = [a_message(n) for n in range(3)]
    run = BatchRun(Source(lines), sink, publish, broker.answers, window=8, first_answers=FirstAnswers())
    async with asyncio.timeout(10):
        await run.run()
    assert len(sink.lines) == 3


async def test_going_on_writes_what_comes():
    """Without `first_answers` every error is an answer."""
    sink = Sink()
    broker = FakeBroker(respond=failing("model_not_found", 404))
    summary = await a_run(Source([a_message(n) for n in range(50)]), sink, broker).run()
    assert (len(sink.lines), summary.is_complete) == (50, True)


async def test_stopping_keeps_the_answers_that_come_meanwhile():
    """After `stop_reading` nothing is published, the answers under way are written, and `stop` ends the run."""
    source, sink, broker = Source([a_message(n) for n in range(60)], bunch=1), Sink(), FakeBroker()
    gate, told = asyncio.Event(), []

    async def publish(data, attributes, /):
        broker.published.append((data, dict(attributes)))
        if len(broker.published) == 8:
            gate.set()
        return "id"

    run = a_run(source, sink, broker, known=InputCount(lines=60, answered=0), on_error=lambda *each: told.append(each))
    run._publish = publish
    running = asyncio.ensure_future(run.run())
    await gate.wait()
    run.stop_reading()
    for data, attributes in broker.published[:3]:
        broker.inject(*echo(data, attributes))
    await until(lambda: sink.data.count(b"\n") == 3)
    assert not running.done()
    run.stop()
    summary = await running
    assert len(broker.published) == 8
    assert (summary.answered, summary.unanswered, summary.lines, summary.is_complete) == (3, 57, 60, False)
    assert len(asyncio.all_tasks()) == 1


async def test_the_first_error_of_each_class_is_told():
    """Once, with its line."""
    told = []
    lines = [b"bad 1", a_message(2), b"bad 3"]
    await a_run(Source(lines), Sink(), FakeBroker(), on_error=lambda *each: told.append(each)).run()
    [(error_class, example)] = told
    assert error_class == "bad_message"
    assert example.number in {1, 3}
    assert "not JSON" in example.message


async def test_another_model_is_asked_for():
    """`model` takes the place of what the lines say; a line that is no request stays as it is."""
    broker = FakeBroker()
    lines = [b'{"path":"/v1/x","body":{"model":"a","n":1}}', a_batch_line(2), b"bad 3"]
    await a_run(Source(lines), Sink(), broker, model="b").run()
    sent = sorted(data for data, _ in broker.published)
    assert sent == [
        b"bad 3",
        b'{"custom_id":"c2","method":"POST","url":"/v1/x","body":{"model":"b","n":2}}',
        b'{"path":"/v1/x","body":{"model":"b","n":1}}',
    ]
