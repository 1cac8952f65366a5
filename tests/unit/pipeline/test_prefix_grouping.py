"""Requests whose prompts begin alike go to the engine one after the other, where a route asks for that."""

import asyncio
import json
from typing import Any

import pytest

from tests.support.fakes import FakeBackend
from tests.support.pipeline import Pipeline, data, message
from tests.support.virtual_time import settle, virtual_time

DOCUMENTS = ("aaaa " * 50, "bbbb " * 50, "cccc " * 50)


def about(document: str, question: int) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": f"{document} {question}"}]}


async def order_of(pipeline: Pipeline, backend: FakeBackend) -> list[str]:
    """Return the first letters of the documents in the order in which questions about them were sent."""
    backend.hold()
    blocker = pipeline.start()
    await settle()
    tasks = [blocker]
    for question in range(3):
        tasks += [pipeline.start(message(data(about(document, question)))) for document in DOCUMENTS]
        await settle()
    backend.let_go()
    await asyncio.gather(*tasks)
    bodies = [json.loads(request.body.data) for request in backend.requests[1:]]
    return [body["messages"][0]["content"][0] for body in bodies]


@pytest.mark.parametrize(
    ("length", "order"), [(0, "abcabcabc"), (150, "aaabbbccc"), (100_000, "abcabcabc")], ids=["off", "on", "too long"]
)
@virtual_time
async def test_questions_about_one_document_follow_each_other(length: int, order: str) -> None:
    """By age without the setting, and where the prompts are shorter than it asks for."""
    backend = FakeBackend(name="r")
    window = {"initial": 1, "min": 1, "max": 1}
    pipeline = Pipeline(backend, routes=[{"name": "r", "window": window, "group_by_prefix_bytes": length}])
    # One in eight goes to the longest wait, which is the first of its group here or of the next one.
    assert "".join(await order_of(pipeline, backend))[:7] == order[:7]


@virtual_time
async def test_a_request_whose_body_is_not_there_yet_is_in_no_group() -> None:
    """The route is asked with what it has."""
    pipeline = Pipeline(FakeBackend(name="r"), routes=[{"name": "r", "group_by_prefix_bytes": 10}])
    (route,) = pipeline.router.routes
    assert route.prefix(pipeline.processor._reader.read(message(data(about("x" * 50, 1))))) is not None
    assert route.prefix(pipeline.processor._reader.read(message(data({"model": "m"})))) is None
