"""A drain in every state: what waits goes back, what runs ends, and the last attempt is answered."""

import asyncio

from tests.support.fakes import REFUSED, Answer, FakeBackend, FakeSubscriber, status
from tests.support.pipeline import Pipeline, data, message
from tests.support.virtual_time import loop_time, settle, virtual_time
from worker.ports import Settlement

ACK, NACK = Settlement.ACK, Settlement.NACK


@virtual_time
async def test_a_drain_hands_back_who_waits_and_lets_finish_who_runs() -> None:
    """Waiting ones are handed back at once, running ones end as if nothing were."""
    pipeline = Pipeline(FakeBackend(then=Answer(seconds=30.0)), window=2)
    running = [pipeline.start(message(attempt=1)) for _ in range(2)]
    await settle()
    waiting = [pipeline.start(message(attempt=1)) for _ in range(3)]
    await settle()
    pipeline.processor.begin_drain()
    assert await asyncio.gather(*waiting) == [NACK] * 3
    assert loop_time() == 0
    assert await asyncio.gather(*running) == [ACK] * 2
    assert pipeline.count("deliveries_total", "nack", "drain") == 3
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_a_drain_hands_back_who_is_held() -> None:
    """A message held for a backend that is down goes back at once, and costs its attempt."""
    pipeline = Pipeline(FakeBackend(then=REFUSED))
    handling = pipeline.start(message(attempt=1))
    await asyncio.sleep(60)
    assert pipeline.gate.held == 1
    pipeline.processor.begin_drain()
    assert await handling is NACK
    assert loop_time() == 60


@virtual_time
async def test_a_drain_answers_who_is_held_on_the_last_attempt() -> None:
    """The last attempt is never given back silently."""
    pipeline = Pipeline(FakeBackend(then=REFUSED))
    handling = pipeline.start(message(attempt=5))
    await asyncio.sleep(60)
    pipeline.processor.begin_drain()
    assert await handling is ACK
    assert pipeline.answer.attributes["error_class"] == "connect"


@virtual_time
async def test_a_drain_answers_an_untried_message_on_its_last_attempt_truthfully() -> None:
    """It waited for a slot: nobody says that the backend was overloaded."""
    pipeline = Pipeline(window=1)
    pipeline.backend.hold()
    pipeline.start(message(attempt=1))
    handling = pipeline.start(message(attempt=5))
    await settle()
    pipeline.processor.begin_drain()
    assert await handling is ACK
    assert pipeline.answer.error["message"] == "The worker was stopped before the backend had answered."
    pipeline.backend.let_go()
    await settle()


@virtual_time
async def test_a_drain_ends_the_wait_for_other_failures() -> None:
    """A failure under suspicion is handed back at once."""
    pipeline = Pipeline(FakeBackend(then=status(500)))
    handling = pipeline.start(message(attempt=1))
    await settle()
    assert not handling.done()
    pipeline.processor.begin_drain()
    assert await handling is NACK
    assert loop_time() == 0


@virtual_time
async def test_what_comes_during_a_drain_goes_back_untried() -> None:
    """A delivery that was on its way when the drain began is not started."""
    pipeline = Pipeline()
    pipeline.processor.begin_drain()
    assert await pipeline.handle(message(attempt=1)) is NACK
    assert pipeline.backend.requests == []


@virtual_time
async def test_a_drain_through_the_subscriber_loses_nothing() -> None:
    """Every message of a drained worker is answered and acked, or handed back; none is both or neither."""
    pipeline = Pipeline(FakeBackend(then=Answer(seconds=20.0)), window=8)
    subscriber = FakeSubscriber(max_in_flight=50, max_attempts=20)
    ids = [subscriber.publish(data({"n": n})) for n in range(50)]
    serving = pipeline.serve(subscriber)
    await asyncio.sleep(25)
    pipeline.processor.begin_drain()
    await subscriber.drain(10)
    await serving
    acked, nacked = subscriber.count(ACK), subscriber.count(NACK)
    assert sorted([*acked, *nacked]) == sorted(ids)
    assert set(acked.values()) | set(nacked.values()) == {1}
    assert {answer.attributes["request_message_id"] for answer in pipeline.answers} == set(acked)
    pipeline.assert_nothing_leaks()
