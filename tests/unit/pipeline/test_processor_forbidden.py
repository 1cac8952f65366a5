"""403s: the request's own, or our credentials."""

import asyncio
from typing import Any

import pytest

from tests.support.fakes import GOOD, Answer, FakeBackend, status
from tests.support.pipeline import Pipeline, data, message
from tests.support.virtual_time import loop_time, virtual_time
from worker.ports import BackendRequest, Settlement

ACK = Settlement.ACK
FORBIDDEN = status(403, b'{"error":{"message":"no","code":"request_forbidden"}}')
FLAGGED = status(403, b'{"error":{"message":"flagged","code":403,"metadata":{"reasons":["violence"]}}}')
FILTERED = status(403, b'{"error":{"message":"x","code":"content_filter"}}')
PAGE = status(403, b"<html><body>Request blocked</body></html>")


def refusing(answer: Answer, *models: str) -> FakeBackend:
    def reply(request: BackendRequest) -> Answer:
        return answer if any(f'"{model}"'.encode() in request.body.data for model in models) else GOOD

    return FakeBackend(then=reply)


def asks(model: str, **more: Any) -> Any:
    return message(data({"model": model}), attempt=1, **more)


@pytest.mark.parametrize("refusal", [FORBIDDEN, FLAGGED, FILTERED, PAGE])
@virtual_time
async def test_no_number_of_403s_of_one_model_stops_the_route(refusal: Answer) -> None:
    """Forty of one requester are answered as they are, then others are served at once."""
    pipeline = Pipeline(refusing(refusal, "gpt-x"))
    for _ in range(40):
        assert await pipeline.handle(asks("gpt-x")) is ACK
    assert {answer.attributes["status_code"] for answer in pipeline.answers} == {"403"}
    assert not pipeline.target.is_open()
    assert await pipeline.handle(asks("gpt-x-2")) is ACK
    assert pipeline.answers[-1].attributes["status_code"] == "200"
    assert loop_time() < 1


@virtual_time
async def test_403s_of_many_models_are_answered_while_others_are_served() -> None:
    """A success within the last minute shows that the credentials are good."""
    pipeline = Pipeline(refusing(FORBIDDEN, *(f"gpt-{number}" for number in range(9))))
    for number in range(9):
        assert await pipeline.handle(asks("other")) is ACK
        assert await pipeline.handle(asks(f"gpt-{number}")) is ACK
        await asyncio.sleep(30)
    assert [answer.attributes["status_code"] for answer in pipeline.answers] == ["200", "403"] * 9
    assert not pipeline.target.is_open()


@virtual_time
async def test_403s_of_many_models_hold_the_route_where_nothing_is_served() -> None:
    """Refused credentials are refused everywhere: the queue is not answered with them, and goes on with a new key."""
    pipeline = Pipeline(FakeBackend(then=FORBIDDEN))
    for model in ("a", "b"):
        assert await pipeline.handle(asks(model)) is ACK
    held = [pipeline.start(asks(model)) for model in ("c", "d", "e", "a")]
    await asyncio.sleep(300)
    assert not any(task.done() for task in held)
    assert pipeline.circuit.error_class == "auth"
    pipeline.backend.then = GOOD
    assert await asyncio.gather(*held) == [ACK] * 4
    assert [answer.attributes["status_code"] for answer in pipeline.answers] == ["403"] * 2 + ["200"] * 4
