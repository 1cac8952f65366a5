"""The signs that docs/operations.md names for each sort of trouble are those that the worker shows."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.fakes import REFUSED, Answer, FakeBackend, status
from tests.support.pipeline import Pipeline, data, message
from tests.support.virtual_time import virtual_time
from worker.ports import BackendRequest, Settlement

ATTEMPTS = 5
QUOTA = status(429, b'{"error":{"message":"m","type":"insufficient_quota","code":"insufficient_quota"}}')
NOT_READY = status(503, b'{"error":{"message":"Loading model","type":"unavailable_error","code":503}}')


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """What fails how, and the signs of it after twenty seconds."""

    error: Answer
    fails: Callable[[int, str], bool]
    """By the message's number and its model."""
    breaker: str = "closed"
    """Of the backend."""
    stopped_models: frozenset[str] = frozenset()
    opened: frozenset[tuple[str, str]] = frozenset()
    """Model, or nothing for the backend, and error class of the lines `breaker_opened` without a later `breaker_closed`."""
    rules: frozenset[str] = frozenset()
    """Of the lines of failed attempts; these must be among them."""


TROUBLES = {
    "a few messages, 500": Trouble(
        error=status(500), fails=lambda number, _: number in (20, 21), rules=frozenset({"builtin:server_error"})
    ),
    "a few messages, 429": Trouble(
        error=status(429), fails=lambda number, _: number in (20, 21), rules=frozenset({"builtin:rate_limited+own"})
    ),
    "one tenant's key": Trouble(
        error=status(401), fails=lambda number, _: number % 10 == 3, rules=frozenset({"builtin:auth+own"})
    ),
    "one tenant's quota": Trouble(
        error=QUOTA, fails=lambda number, _: number % 10 == 3, rules=frozenset({"builtin:quota+own"})
    ),
    "one model, loading": Trouble(
        error=NOT_READY,
        fails=lambda _, model: model == "b",
        stopped_models=frozenset({"b"}),
        opened=frozenset({("b", "not_ready")}),
        rules=frozenset({"builtin:not_ready"}),
    ),
    "one model, 500": Trouble(
        error=status(500),
        fails=lambda _, model: model == "b",
        stopped_models=frozenset({"b"}),
        opened=frozenset({("b", "server_error")}),
        rules=frozenset({"builtin:server_error+outage"}),
    ),
    "everything, refused": Trouble(
        error=REFUSED,
        fails=lambda *_: True,
        breaker="open",
        opened=frozenset({("", "connect")}),
        rules=frozenset({"builtin:connect"}),
    ),
    "everything, 500": Trouble(
        error=status(500),
        fails=lambda *_: True,
        stopped_models=frozenset({"a", "b"}),
        opened=frozenset({("a", "server_error"), ("b", "server_error")}),
        rules=frozenset({"builtin:server_error+outage"}),
    ),
    "the worker's key": Trouble(
        error=status(401),
        fails=lambda *_: True,
        breaker="open",
        opened=frozenset({("", "auth")}),
        rules=frozenset({"builtin:auth"}),
    ),
    "the worker's quota": Trouble(
        error=QUOTA,
        fails=lambda *_: True,
        breaker="open",
        opened=frozenset({("", "quota")}),
        rules=frozenset({"builtin:quota"}),
    ),
}


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES.keys())
def test_each_sort_of_trouble_has_the_signs_of_the_runbook(trouble: Trouble, logs: list[Any]) -> None:
    """Twenty seconds of traffic for two models: breakers, log lines, and who is served."""

    lines: list[Any] = []

    @virtual_time
    async def run() -> None:
        stopping = asyncio.Event()
        pipeline = Pipeline(FakeBackend(then=lambda request: _answer(trouble, request)))
        supervisor = pipeline.supervisor()
        tasks = [asyncio.ensure_future(supervisor.run())]
        for number in range(200):
            tasks.append(asyncio.ensure_future(_deliver(pipeline, number, stopping)))
            await asyncio.sleep(0.1)
        shown = supervisor.details()["backends"]["fake"]
        lines.extend(logs)
        stopping.set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert shown["breaker"] == trouble.breaker
        models = shown["models"].items()
        assert {name for name, state in models if state["breaker"] != "closed"} == trouble.stopped_models

    run()
    opened: set[tuple[str, str]] = set()
    for line in lines:
        if line["event"] in {"breaker_opened", "breaker_closed"}:
            which = (line.get("model", ""), str(line["error_class"]))
            opened = opened | {which} if line["event"] == "breaker_opened" else opened - {which}
    assert opened == trouble.opened
    answered = [line for line in lines if line["event"] == "delivery_answered"]
    failed = [line for line in lines if line["event"] in {"attempt_held", "delivery_nacked"}]
    assert trouble.rules <= {line["rule"] for line in failed}
    assert {line["model"] for line in answered if line["status_code"] == 200} == {
        model for model in ("a", "b") if not all(trouble.fails(number, model) for number in range(200))
    }
    if trouble.opened:
        assert all(line["status_code"] == 200 for line in answered), "an outage answers nothing with an error"
        assert sum(line["event"] == "delivery_nacked" for line in failed) <= 4, "nor does it spend many attempts"
    else:
        repeated = {line["message_id"] for line in failed if line["event"] == "delivery_nacked"}
        assert {line["message_id"] for line in answered if line["status_code"] != 200} <= repeated


def _model(number: int) -> str:
    return "ab"[number % 2]


def _answer(trouble: Trouble, request: BackendRequest) -> Answer:
    number = json.loads(request.body.data)["n"]
    return trouble.error if trouble.fails(number, _model(number)) else Answer(seconds=0.5)


async def _deliver(pipeline: Pipeline, number: int, stopping: asyncio.Event) -> None:
    """Deliver a message until it is acked, as a subscription does."""
    body = {"model": _model(number), "messages": [], "n": number}
    for attempt in range(1, ATTEMPTS + 1):
        settled = await pipeline.handle(message(data(body), message_id=f"m{number}", attempt=attempt))
        if settled is Settlement.ACK or stopping.is_set():
            return
        await asyncio.sleep(2)
