"""Deadlines: what comes too late is answered with that, and says nothing about the backend."""

import asyncio
from typing import Any

import pytest

from tests.support.fakes import REFUSED, Answer, FakeBackend, status
from tests.support.pipeline import METADATA, Pipeline, data, message
from tests.support.virtual_time import loop_time, settle, unix_time, virtual_time
from worker.flow.circuit import CircuitState
from worker.policy.model import Fault
from worker.ports import Settlement

ACK, NACK = Settlement.ACK, Settlement.NACK
BUSY = status(429)
UNAUTHORIZED = status(401, b'{"error":"Unauthorized, key sk-1234"}')


@virtual_time
async def test_a_passed_deadline_is_answered_without_an_attempt() -> None:
    """Nobody wants the answer any more: a 504 says so and no GPU second is spent."""
    pipeline = Pipeline()
    assert await pipeline.handle(message(data(deadline=unix_time() - 1))) is ACK
    assert pipeline.answer.json["status_code"] == 504
    assert pipeline.answer.json["metadata"] == METADATA
    assert pipeline.answer.attributes["error_class"] == pipeline.answer.error["code"] == "deadline_exceeded"
    assert pipeline.backend.requests == []


@virtual_time
async def test_a_deadline_that_passes_while_waiting_for_a_slot_is_answered_then() -> None:
    """The answer comes at the deadline, not when a slot becomes free, and blames nobody."""
    pipeline = Pipeline(window=1)
    pipeline.backend.hold()
    first = pipeline.start()
    await settle()
    assert await pipeline.handle(message(data(deadline=unix_time() + 30))) is ACK
    assert loop_time() == pytest.approx(30, abs=0.1)
    assert pipeline.answer.attributes["error_class"] == "deadline_exceeded"
    assert "overloaded" not in pipeline.answer.error["message"]
    pipeline.backend.let_go()
    await first


@virtual_time
async def test_a_slot_that_becomes_free_at_the_deadline_comes_too_late() -> None:
    """No attempt is begun that can only be cut; the slot goes to the next."""
    pipeline = Pipeline(FakeBackend(Answer(seconds=30.0)), window=1)
    first = pipeline.start()
    await settle()
    late, next_one = pipeline.start(message(data(deadline=unix_time() + 30))), pipeline.start()
    await asyncio.gather(first, late, next_one)
    assert loop_time() == 30
    assert len(pipeline.backend.requests) == 2
    assert sorted(each.json["status_code"] for each in pipeline.answers) == [200, 200, 504]


@virtual_time
async def test_a_deadline_that_passes_while_held_is_answered_with_the_last_error() -> None:
    """It was tried: the answer also says what the backend's last word was."""
    pipeline = Pipeline(FakeBackend(then=REFUSED))
    assert await pipeline.handle(message(data(deadline=unix_time() + 30), attempt=1)) is ACK
    assert loop_time() <= 30.1
    assert pipeline.answer.attributes["error_class"] == "deadline_exceeded"
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_a_deadline_that_passes_during_an_attempt_cuts_it() -> None:
    """The backend gets what is left until the deadline; the answer is a 504 of the deadline on any delivery attempt."""
    for attempt in (1, 3, 5):
        pipeline = Pipeline()
        pipeline.backend.hold()
        began = loop_time()
        assert await pipeline.handle(message(data(deadline=unix_time() + 30), attempt=attempt)) is ACK
        assert loop_time() - began == pytest.approx(30, abs=0.1)
        assert pipeline.backend.requests[0].timeout_s == pytest.approx(30)
        assert pipeline.answer.json["status_code"] == 504
        assert pipeline.answer.attributes["error_class"] == "deadline_exceeded"


@virtual_time
async def test_short_deadlines_do_not_open_the_breaker() -> None:
    """Requesters who give a second each say nothing about the backend; others go on."""
    pipeline = Pipeline(FakeBackend(then=Answer(seconds=5.0)))
    hasty = [pipeline.start(message(data(deadline=unix_time() + 1))) for _ in range(10)]
    patient = pipeline.start()
    await asyncio.gather(*hasty)
    assert pipeline.circuit.state is CircuitState.CLOSED
    assert await patient is ACK
    assert pipeline.answers[-1].json["status_code"] == 200


@virtual_time
async def test_a_backends_own_timeout_still_counts_against_it() -> None:
    """Where the deadline is far away a timeout is the backend's."""
    pipeline = Pipeline(FakeBackend(then=Answer(status=None, fault=Fault.TOTAL_TIMEOUT)), max_delivery_attempts=20)
    handling = [pipeline.start(message(data(deadline=unix_time() + 3600), attempt=1)) for _ in range(5)]
    await settle()
    assert pipeline.target.is_open()
    pipeline.processor.begin_drain()
    assert await asyncio.gather(*handling) == [NACK] * 5


# Deadlines that cannot be met


async def measured(seconds: float, **more: Any) -> Pipeline:
    """A pipeline that has seen enough answers of this length."""
    pipeline = Pipeline(FakeBackend(then=Answer(seconds=seconds)), **more)
    await asyncio.gather(*(pipeline.handle() for _ in range(20)))
    pipeline.publisher.published.clear()
    pipeline.backend.requests.clear()
    return pipeline


@virtual_time
async def test_a_deadline_nearer_than_all_answers_is_answered_at_once() -> None:
    """Not at the deadline, and no GPU second is spent; what the requester reads names the time."""
    pipeline = await measured(10.0, window=32)
    began = loop_time()
    assert await pipeline.handle(message(data(deadline=unix_time() + 9))) is ACK
    assert loop_time() == began
    assert pipeline.backend.requests == []
    assert pipeline.answer.json["status_code"] == 504
    assert pipeline.answer.attributes["error_class"] == "deadline_exceeded"
    assert "recent answers of this model took 10 s and more" in pipeline.answer.error["message"]
    assert pipeline.count("unreachable_deadlines_total", "fake", "refused") == 1
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_a_deadline_that_can_be_met_is_met() -> None:
    """Also where nothing is known, for another model, and where the setting sends everything."""
    pipeline = await measured(10.0, window=32)
    assert await pipeline.handle(message(data(deadline=unix_time() + 10.5))) is ACK
    assert pipeline.answer.json["status_code"] == 200
    assert await pipeline.handle(message(data({"model": "other"}, deadline=unix_time() + 9))) is ACK
    assert len(pipeline.backend.requests) == 2
    everything = await measured(10.0, window=32, deadline_chance=0.0)
    assert await everything.handle(message(data(deadline=unix_time() + 9))) is ACK
    assert len(everything.backend.requests) == 1


@virtual_time
async def test_a_deadline_that_becomes_unreachable_while_waiting_is_answered_then() -> None:
    """As soon as too little time is left, long before the deadline itself."""
    pipeline = await measured(10.0, window=32)
    pipeline.backend.hold()
    running = [pipeline.start() for _ in range(32)]
    await settle()
    began = loop_time()
    waiting = pipeline.start(message(data(deadline=unix_time() + 60)))
    assert await waiting is ACK
    assert loop_time() - began == pytest.approx(50, abs=0.1)
    assert pipeline.answer.attributes["error_class"] == "deadline_exceeded"
    pipeline.backend.let_go()
    await asyncio.gather(*running)
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_a_backend_that_has_become_faster_is_noticed() -> None:
    """One in sixteen is sent all the same, and its time counts as any other."""
    pipeline = await measured(10.0, window=32)
    pipeline.backend.then = Answer(seconds=1.0)
    for _ in range(16 * 20):
        await pipeline.handle(message(data(deadline=unix_time() + 5)))
    assert pipeline.count("unreachable_deadlines_total", "fake", "tried") > 0
    before = len(pipeline.backend.requests)
    await asyncio.gather(*(pipeline.handle(message(data(deadline=unix_time() + 5))) for _ in range(10)))
    assert len(pipeline.backend.requests) == before + 10


@virtual_time
async def test_more_deadlines_are_met_than_in_order_of_age() -> None:
    """Forty requests with deadlines in the reverse order of their age, one at a time: all of them are met."""
    pipeline = Pipeline(FakeBackend(then=Answer(seconds=1.0)), window=1)
    late_first = [pipeline.start(message(data(deadline=unix_time() + 45 - number))) for number in range(40)]
    await asyncio.gather(*late_first)
    met = sum(answer.json["status_code"] == 200 for answer in pipeline.answers)
    assert met >= 38
