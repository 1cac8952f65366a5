"""Cancelled requests: what is under way, what waits, and what comes later."""

import asyncio

import msgspec
import pytest

from tests.support.fakes import Answer, FakeBackend, FakePayloads, status
from tests.support.pipeline import METADATA, Pipeline, data, message, referring
from tests.support.virtual_time import loop_time, settle, unix_time, virtual_time
from worker.pipeline.cancels import MAX_IDS, MAX_SETS, Cancels
from worker.ports import Settlement
from worker.settings.schema import DedupeSettings
from worker.wire.control import CancelRequest
from worker.wire.message import ReceivedMessage

ACK, NACK = Settlement.ACK, Settlement.NACK


def of(message_id: str = "", **attributes: str) -> CancelRequest:
    ids = frozenset([message_id]) if message_id else frozenset[str]()
    return CancelRequest(message_ids=ids, attributes=attributes, published_at=unix_time())


# What is under way


@virtual_time
async def test_a_running_attempt_is_cut_and_answered_as_cancelled() -> None:
    """The connection is closed, the answer says so with the metadata, and the slot is free."""
    pipeline = Pipeline(can_cancel=True)
    pipeline.backend.hold()
    task = pipeline.start(message(message_id="1", attempt=1))
    await settle()
    pipeline.processor.cancel(of("1"))
    assert await task is ACK
    assert pipeline.backend.cancelled == 1
    answer = pipeline.answer
    assert (answer.json["status_code"], answer.json["metadata"]) == (499, METADATA)
    assert (answer.attributes["error_class"], answer.error["code"]) == ("cancelled", "cancelled")
    assert pipeline.count("cancelled_requests_total", "fake", "started") == 1
    pipeline.assert_nothing_leaks()


def sparing(**attributes: str) -> CancelRequest:
    return CancelRequest(attributes=attributes, let_running_finish=True, published_at=unix_time())


@virtual_time
async def test_what_runs_may_finish_while_the_rest_is_cancelled() -> None:
    """The answer of the running attempt goes out; what waits never starts."""
    pipeline = Pipeline(can_cancel=True, window=1)
    pipeline.backend.hold()
    running, waiting = (pipeline.start(message(attributes={"run_id": "a"})) for _ in range(2))
    await settle()
    pipeline.processor.cancel(sparing(run_id="a"))
    assert await waiting is ACK
    assert not running.done()
    pipeline.backend.let_go()
    assert await running is ACK
    assert [each.json["status_code"] for each in pipeline.answers] == [499, 200]
    assert len(pipeline.backend.requests) == 1
    pipeline.assert_nothing_leaks()


@pytest.mark.parametrize(("code", "settlement"), [(429, ACK), (500, NACK)], ids=["held", "nacked"])
@virtual_time
async def test_what_finishes_badly_is_not_tried_again(code: int, settlement: Settlement) -> None:
    """A cancelled request whose running attempt fails gets no further one, here or when it is delivered again."""
    pipeline = Pipeline(FakeBackend(status(code), Answer()), can_cancel=True)
    pipeline.backend.hold()
    sent = message(message_id="1", attributes={"run_id": "a"}, attempt=1)
    running = pipeline.start(sent)
    await settle()
    pipeline.processor.cancel(sparing(run_id="a"))
    pipeline.backend.let_go()
    assert await running is settlement
    if settlement is NACK:
        assert await pipeline.start(msgspec.structs.replace(sent, delivery_attempt=2)) is ACK
    assert pipeline.answer.json["status_code"] == 499
    assert len(pipeline.backend.requests) == 1
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_what_waits_never_starts() -> None:
    """All of a run, and nothing else; the breaker learns nothing."""
    pipeline = Pipeline(can_cancel=True, window=1)
    pipeline.backend.hold()
    running = pipeline.start(message(attributes={"run_id": "b"}))
    await settle()
    waiting = [pipeline.start(message(attributes={"run_id": run})) for run in ("a", "a", "b")]
    await settle()
    pipeline.processor.cancel(of(run_id="a"))
    assert await asyncio.gather(*waiting[:2]) == [ACK, ACK]
    pipeline.backend.let_go()
    assert await asyncio.gather(running, waiting[2]) == [ACK, ACK]
    assert [each.json["status_code"] for each in pipeline.answers] == [499, 499, 200, 200]
    assert len(pipeline.backend.requests) == 2
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_a_body_that_is_fetched_is_given_up() -> None:
    """Its memory is free."""
    payloads = FakePayloads(body=b"{}")
    payloads.seconds = 60.0
    pipeline = Pipeline(can_cancel=True, payloads=payloads)
    task = pipeline.start(message(referring("gs://b/body"), message_id="1"))
    await settle()
    pipeline.processor.cancel(of("1"))
    assert await task is ACK
    assert loop_time() == 0.0
    assert pipeline.answer.attributes["error_class"] == "cancelled"
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_an_answer_that_exists_goes_out() -> None:
    """It is on its way to the topic: nothing is thrown away, and nobody gets two answers."""
    pipeline = Pipeline(can_cancel=True)
    pipeline.publisher.hold()
    task = pipeline.start(message(message_id="1"))
    await settle()
    pipeline.processor.cancel(of("1"))
    pipeline.publisher.let_go()
    assert await task is ACK
    assert pipeline.answer.json["status_code"] == 200


@virtual_time
async def test_a_shutdown_at_the_same_moment_is_a_shutdown() -> None:
    """The task was told to stop as well: the message is nacked, and cancelled where it comes again."""
    pipeline = Pipeline(can_cancel=True)
    pipeline.backend.hold()
    task = pipeline.start(message(message_id="1", attempt=1))
    await settle()
    pipeline.processor.cancel(of("1"))
    task.cancel()
    assert await task is NACK
    assert await pipeline.handle(message(message_id="1", attempt=2)) is ACK
    assert pipeline.answer.attributes["error_class"] == "cancelled"


@virtual_time
async def test_a_cancelled_request_may_be_sent_again_under_its_key() -> None:
    """Its key is not remembered: that was no answer."""
    pipeline = Pipeline(can_cancel=True, dedupe=DedupeSettings(metadata_key="id"))
    pipeline.processor.cancel(of("1"))
    await pipeline.handle(message(message_id="1"))
    await pipeline.handle(message(message_id="2"))
    assert [each.json["status_code"] for each in pipeline.answers] == [499, 200]


@virtual_time
async def test_without_a_control_topic_nothing_is_remembered() -> None:
    """And nothing is asked for each message."""
    pipeline = Pipeline(FakeBackend(then=Answer(seconds=1.0)))
    task = pipeline.start(message(message_id="1"))
    await settle()
    pipeline.processor.cancel(of("1"))
    assert await task is ACK
    assert pipeline.answer.json["status_code"] == 200


# What comes later


@virtual_time
async def test_what_comes_later_is_answered_at_once() -> None:
    """A redelivery, or what stood in the queue; what was published after the cancellation is another run."""
    pipeline = Pipeline(can_cancel=True)
    await asyncio.sleep(10)
    pipeline.processor.cancel(of(run_id="a"))
    await pipeline.handle(message(data(), attributes={"run_id": "a"}, publish_time=unix_time() - 5))
    await pipeline.handle(message(data(), attributes={"run_id": "a"}, publish_time=unix_time() + 5))
    assert [each.json["status_code"] for each in pipeline.answers] == [499, 200]
    assert pipeline.count("cancelled_requests_total", "none", "waiting") == 1


def received(message_id: str = "m", **attributes: str) -> ReceivedMessage:
    return ReceivedMessage(message_id=message_id, data=b"", attributes=attributes, publish_time=1.0)


def test_cancellations_are_forgotten() -> None:
    """After their time, and the first ones when there are too many."""
    now = [0.0]
    cancels = Cancels(60.0, lambda: now[0])
    cancels.add(CancelRequest(message_ids=frozenset(["m"]), attributes={"a": "1"}, published_at=1.0))
    assert cancels.covers(received())
    assert cancels.covers(received("other", a="1"))
    now[0] = 61.0
    assert not cancels.covers(received())
    assert not cancels.covers(received("other", a="1"))
    for number in range(MAX_IDS + 10):
        cancels.add(CancelRequest(message_ids=frozenset([str(number)])))
    assert (cancels.covers(received("9")), cancels.covers(received("10"))) == (False, True)
    for number in range(MAX_SETS + 1):
        cancels.add(CancelRequest(attributes={"n": str(number)}, published_at=1.0))
    assert (cancels.covers(received(n="0")), cancels.covers(received(n="1"))) == (False, True)


@pytest.mark.parametrize("attributes", [{"a": "1"}, {"b": "2"}, {}])
def test_every_attribute_must_match(attributes: dict[str, str]) -> None:
    """A cancellation that is too wide costs answers."""
    cancels = Cancels(60.0, lambda: 0.0)
    cancels.add(CancelRequest(attributes={"a": "1", "b": "2"}, published_at=1.0))
    assert not cancels.covers(received(**attributes))
    assert cancels.covers(received(a="1", b="2", c="3"))
