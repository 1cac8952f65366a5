"""The same message twice: in flight, delivered again, or under a key of the requester."""

import asyncio

from msgspec import structs

from tests.support.fakes import Answer, FakeBackend, status
from tests.support.pipeline import Pipeline, data, message
from tests.support.virtual_time import settle, virtual_time
from worker.ports import Settlement
from worker.settings.schema import DedupeSettings

ACK, NACK = Settlement.ACK, Settlement.NACK


@virtual_time
async def test_the_same_message_twice_in_flight_is_one_backend_call() -> None:
    """Both deliveries are settled by the outcome of the first."""
    pipeline = Pipeline(FakeBackend(Answer(seconds=10.0)))
    received = message()
    first, second = pipeline.start(received), pipeline.start(received)
    assert await asyncio.gather(first, second) == [ACK, ACK]
    assert (len(pipeline.backend.requests), len(pipeline.answers)) == (1, 1)
    assert pipeline.count("duplicates_total", "in_flight") == 1


@virtual_time
async def test_a_second_delivery_that_is_the_last_attempt_counts() -> None:
    """When the broker counts the duplicate as the last attempt, a failure is answered and not lost."""
    pipeline = Pipeline(FakeBackend(then=status(500, seconds=10.0)))
    received = message(attempt=4)
    first = pipeline.start(received)
    await settle()
    second = pipeline.start(structs.replace(received, delivery_attempt=5))
    assert await asyncio.gather(first, second) == [ACK, ACK]
    assert pipeline.answer.json["status_code"] == 500
    assert pipeline.answer.attributes["delivery_attempt"] == "5"


@virtual_time
async def test_both_told_to_stop_share_the_outcome_all_the_same() -> None:
    """The duplicate must not hand back what the first is just publishing."""
    pipeline = Pipeline()
    pipeline.publisher.hold()
    received = message()
    first, second = pipeline.start(received), pipeline.start(received)
    await settle()
    first.cancel()
    second.cancel()
    await settle()
    pipeline.publisher.let_go()
    assert await asyncio.gather(first, second) == [ACK, ACK]


@virtual_time
async def test_a_redelivery_of_an_answered_message_is_acked_without_a_second_answer() -> None:
    """The ack was lost, the answer was not: nothing is done twice."""
    pipeline = Pipeline()
    received = message(attempt=1)
    assert await pipeline.handle(received) is ACK
    assert await pipeline.handle(structs.replace(received, delivery_attempt=2)) is ACK
    assert (len(pipeline.backend.requests), len(pipeline.answers)) == (1, 1)
    assert pipeline.count("duplicates_total", "answered") == 1


@virtual_time
async def test_a_key_used_for_another_request_is_a_conflict_that_changes_nothing() -> None:
    """The second request gets a 409; the first one's answer stays what the key stands for."""
    pipeline = Pipeline(dedupe=DedupeSettings(metadata_key="id"))
    first, other = message(data({"n": 1}), message_id="a"), message(data({"n": 2}), message_id="b")
    assert await pipeline.handle(first) is ACK
    assert await pipeline.handle(other) is ACK
    assert pipeline.answers[1].json["status_code"] == 409
    assert await pipeline.handle(other) is ACK
    assert await pipeline.handle(structs.replace(first, message_id="c")) is ACK
    assert len(pipeline.answers) == 2
    assert len(pipeline.backend.requests) == 1


@virtual_time
async def test_a_request_sent_again_after_a_retryable_error_is_tried_again() -> None:
    """A key whose answer was a 503 is not used up: a publisher that sends it again wants another try."""
    pipeline = Pipeline(FakeBackend(status(500)), dedupe=DedupeSettings(metadata_key="id"))
    assert await pipeline.handle(message(message_id="a", attempt=5)) is ACK
    assert await pipeline.handle(message(message_id="a", attempt=6)) is ACK  # a redelivery: known
    assert await pipeline.handle(message(message_id="b", attempt=1)) is ACK
    assert [answer.json["status_code"] for answer in pipeline.answers] == [500, 200]
