"""A model that is away behind a backend that works: what the breaker of the one model does, and which parts learn of it."""

import asyncio
from typing import Any

from tests.support.fakes import GOOD, REFUSED, Answer, FakeBackend, status
from tests.support.pipeline import Pipeline, data, message
from tests.support.virtual_time import loop_time, settle, unix_time, virtual_time
from worker.flow.circuit import CircuitState
from worker.policy.engine import ErrorPolicy
from worker.policy.rules.load import parse_rules
from worker.ports import BackendRequest, Settlement

ACK, NACK = Settlement.ACK, Settlement.NACK
WAIT_FOR_MODEL = {"match": {"class": "model_not_found"}, "do": "hold", "breaker": "trip", "scope": "model"}
FAILING_MODEL = {"match": {"status": 500}, "do": "nack", "breaker": "count", "scope": "model"}


NO_MODEL = status(404, b'{"error":{"message":"none","type":"NotFoundError","param":"model","code":404}}')


def _one_model_fails(failure: Answer) -> Pipeline:
    def answer(request: BackendRequest) -> Answer:
        return failure if b"lora" in request.body.data else GOOD

    rules = parse_rules([WAIT_FOR_MODEL, FAILING_MODEL])
    return Pipeline(FakeBackend(then=answer), policy=ErrorPolicy(rules, now_unix=unix_time))


@virtual_time
async def test_one_models_breaker_is_told_and_stops_that_model_only(logs: list[Any]) -> None:
    """A rule that trips for a model: counted, written down with its name once, and the other models are served."""
    pipeline = _one_model_fails(NO_MODEL)
    lora = [pipeline.start(message(data({"model": "lora"}), attempt=1)) for _ in range(3)]
    await settle()
    assert await pipeline.handle() is ACK
    assert not any(task.done() for task in lora)
    assert pipeline.circuit.state is CircuitState.CLOSED
    assert pipeline.count("breaker_trips_total", "fake", "model_not_found") == 1
    told = [line for line in logs if line["event"] == "breaker_opened"]
    assert [(line["model"], line["error_class"]) for line in told] == [("lora", "model_not_found")]
    await asyncio.sleep(60)
    assert pipeline.count("breaker_trips_total", "fake", "model_not_found") == 1
    pipeline.processor.begin_drain()
    await asyncio.gather(*lora)


@virtual_time
async def test_one_models_outage_burns_no_attempt_of_its_messages() -> None:
    """A failure that counts against a model waits a second too, and is held when the model's breaker has opened."""
    pipeline = _one_model_fails(status(500))
    lora = [pipeline.start(message(data({"model": "lora"}), attempt=1)) for _ in range(8)]
    await asyncio.sleep(60)
    assert not any(task.done() for task in lora)
    pipeline.backend.then = GOOD
    assert await asyncio.gather(*lora) == [ACK] * 8
    assert loop_time() < 66


@virtual_time
async def test_who_waited_for_one_model_is_told_why() -> None:
    """A message that was never tried is answered, on its last attempt, with what stopped its model."""
    pipeline = _one_model_fails(NO_MODEL)
    first = pipeline.start(message(data({"model": "lora"}), attempt=1))
    await settle()
    handling = pipeline.start(message(data({"model": "lora"}), attempt=5))
    await settle()
    pipeline.processor.begin_drain()
    assert await handling is ACK
    assert pipeline.answer.attributes["error_class"] == "model_not_found"
    assert await first is NACK


@virtual_time
async def test_the_backends_own_trip_is_told_while_a_models_breaker_is_open(logs: list[Any]) -> None:
    """It is a model's probe that finds the whole backend gone: one more breaker that opened, and nobody else to see it."""
    pipeline = _one_model_fails(NO_MODEL)
    lora = [pipeline.start(message(data({"model": "lora"}), attempt=1)) for _ in range(2)]
    await settle()
    pipeline.backend.then = REFUSED
    await asyncio.sleep(60)
    assert pipeline.target.is_open()
    assert pipeline.count("breaker_trips_total", "fake", "model_not_found") == 1
    assert pipeline.count("breaker_trips_total", "fake", "connect") == 1
    told = [line for line in logs if line["event"] == "breaker_opened"]
    assert [line.get("model") for line in told] == ["lora", None]
    pipeline.processor.begin_drain()
    await asyncio.gather(*lora)
