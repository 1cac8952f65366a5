"""Several servers of one route, and a route that takes over from another one."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.support.fakes import GOOD, REFUSED, Answer, FakeBackend, FakePayloads, status
from tests.support.pipeline import METADATA, Pipeline, data, message, referring
from tests.support.virtual_time import loop_time, settle, virtual_time
from worker.policy.model import Fault, Phase
from worker.ports import BackendRequest, Settlement
from worker.settings.schema import RequestSettings

ACK, NACK = Settlement.ACK, Settlement.NACK
UNAVAILABLE = status(503)
CRASHED = Answer(status=None, body=b"", fault=Fault.CONNECTION_LOST, phase=Phase.HEADERS)


def several(*backends: FakeBackend, **route: Any) -> Pipeline:
    """One route to these servers."""
    urls = [{"url": f"http://{each.name[2:]}", "name": each.name[2:]} for each in backends]
    for url, weight in zip(urls, route.pop("weights", ()), strict=False):
        url["weight"] = weight
    more = {name: route.pop(name) for name in ("window", "payloads") if name in route}
    return Pipeline(*backends, routes=[{"name": "r", "base_urls": urls, **route}], **more)


def server(name: str, then: Answer | Callable[[BackendRequest], Answer] = GOOD, *script: Answer) -> FakeBackend:
    return FakeBackend(*script, then=then, name=f"r/{name}")


def by_backend(pipeline: Pipeline) -> Counter[str]:
    """How many answers name each backend."""
    return Counter(answer.attributes["backend"] for answer in pipeline.answers)


async def run(pipeline: Pipeline, count: int, **more: Any) -> None:
    """Send so many messages at once, and wait for their answers."""
    assert set(await asyncio.gather(*(pipeline.handle(message(**more)) for _ in range(count)))) == {ACK}


@virtual_time
async def test_the_answer_names_the_server() -> None:
    """The attribute `backend` and the metrics have the target that was taken."""
    pipeline = several(server("a", Answer(seconds=1)), server("b", Answer(seconds=1)))
    await run(pipeline, 2)
    assert by_backend(pipeline) == {"r/a": 1, "r/b": 1}
    assert pipeline.count("attempts_total", "r/a", "none", "reply") == 1
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_a_slow_server_keeps_no_message() -> None:
    """Ten to one in speed is about ten to one in answers: each message goes where a slot is free."""
    pipeline = several(server("slow", Answer(seconds=10)), server("fast", Answer(seconds=1)), window=4)
    await run(pipeline, 88)
    assert by_backend(pipeline)["r/fast"] > 60
    pipeline.assert_nothing_leaks()


@pytest.mark.parametrize("failure", [REFUSED, UNAVAILABLE, status(500)], ids=["refused", "503", "500"])
@virtual_time
async def test_what_fails_at_one_server_is_tried_at_another_at_once(failure: Answer) -> None:
    """No delivery attempt is spent and no time."""
    pipeline = several(server("a", failure), server("b"))
    for _ in range(6):
        assert await pipeline.handle(message(attempt=1)) is ACK
    assert loop_time() == 0
    assert by_backend(pipeline) == {"r/b": 6}
    assert pipeline.count("rerouted_attempts_total", "r/b", "failover") == len(pipeline.backend.requests)
    assert [answer.json["status_code"] for answer in pipeline.answers] == [200] * 6
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_what_may_have_taken_a_server_down_is_not_sent_to_the_next() -> None:
    """One prompt that kills servers must not kill all of them within a second."""
    first, second = server("a", CRASHED), server("b", CRASHED)
    pipeline = several(first, second)
    assert await pipeline.handle(message(attempt=1)) is NACK
    assert len(first.requests) + len(second.requests) == 1


@virtual_time
async def test_a_failure_at_every_server_ends_as_at_one() -> None:
    """Each is tried once, then the message is held for an outage."""
    first, second = server("a", UNAVAILABLE), server("b", UNAVAILABLE)
    pipeline = several(first, second)
    tasks = [pipeline.start() for _ in range(8)]
    await asyncio.sleep(30)
    assert not any(task.done() for task in tasks)
    first.then = GOOD
    assert await asyncio.gather(*tasks) == [ACK] * 8
    assert loop_time() < 40
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_a_stopped_server_is_found_again() -> None:
    """Its probes go on though the other one has room for all."""
    first, second = server("a", REFUSED), server("b")
    pipeline = several(first, second)
    await run(pipeline, 10)
    assert pipeline.targets[0].is_open()
    first.then = GOOD
    await asyncio.sleep(5)
    await run(pipeline, 1)
    assert not pipeline.targets[0].is_open()


@virtual_time
async def test_weights_share_out_the_messages() -> None:
    """By their ids: a redelivery goes to the same server, and at any load the shares are as wanted."""
    pipeline = several(server("a"), server("b"), weights=[9, 1])
    router, route = pipeline.router, pipeline.router.routes[0]
    chosen = [router.choose(route, str(number), "m").targets for number in range(10_000)]
    share = sum(targets[0].name == "r/b" for targets in chosen) / 10_000
    assert 0.09 < share < 0.11
    assert chosen == [router.choose(route, str(number), "m").targets for number in range(10_000)]


@virtual_time
async def test_a_weighted_server_that_stops_hands_over() -> None:
    """What waited for it is moved, what comes goes to the other one, and its own messages return with its recovery."""
    first, second = server("a", REFUSED), server("b")
    pipeline = several(first, second, weights=[1, 1])
    supervisor = pipeline.supervisor()
    tasks = [pipeline.start() for _ in range(40)]
    await settle()
    await supervisor.check()
    assert await asyncio.gather(*tasks) == [ACK] * 40
    assert by_backend(pipeline) == {"r/b": 40}
    assert loop_time() < 10
    first.then = GOOD
    await asyncio.sleep(5)
    await run(pipeline, 40)
    assert by_backend(pipeline)["r/a"] > 5
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_each_server_may_have_its_own_name_for_the_model() -> None:
    """The body that it gets; lanes and metrics keep the requester's."""
    first, second = server("a"), server("b")
    pipeline = Pipeline(
        first,
        second,
        routes=[
            {
                "name": "r",
                "base_urls": [
                    {"url": "http://a", "name": "a", "weight": 1, "model": "m-1"},
                    {"url": "http://b", "name": "b", "weight": 1},
                ],
            }
        ],
    )
    await run(pipeline, 20)
    assert {request.body.raw("model") for request in first.requests} == {b'"m-1"'}
    assert {request.body.raw("model") for request in second.requests} == {b'"m"'}
    assert set(pipeline.gate.lanes) == {"m"}


# A fallback


@asynccontextmanager
async def watched(pipeline: Pipeline) -> AsyncIterator[None]:
    """Check the pipeline once a second, as its supervisor does."""
    watching = asyncio.ensure_future(pipeline.supervisor().run())
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


def with_fallback(first: FakeBackend, second: FakeBackend, after_s: float = 30.0, **more: Any) -> Pipeline:
    routes = [
        {"name": first.name, "fallback": second.name, "fallback_after_s": after_s},
        {"name": second.name, "only_fallback": True, **more},
    ]
    return Pipeline(first, second, routes=routes)


@virtual_time
async def test_a_route_takes_over_after_the_limit_and_not_before() -> None:
    """What waited moves, what comes goes there at once."""
    first, second = FakeBackend(then=REFUSED, name="own"), FakeBackend(name="cloud")
    pipeline = with_fallback(first, second)
    async with watched(pipeline):
        tasks = [pipeline.start() for _ in range(10)]
        await asyncio.sleep(29)
        assert second.requests == []
        assert await asyncio.gather(*tasks) == [ACK] * 10
        assert 30 <= loop_time() < 36
        assert by_backend(pipeline) == {"cloud": 10}
        before = loop_time()
        await run(pipeline, 10)
        assert loop_time() - before < 3
        assert pipeline.count("rerouted_attempts_total", "cloud", "fallback") == 20
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_the_route_gets_its_messages_back_when_it_recovers() -> None:
    """One message after the other is its probe all the time."""
    first, second = FakeBackend(then=REFUSED, name="own"), FakeBackend(name="cloud")
    pipeline = with_fallback(first, second, after_s=0.0)
    async with watched(pipeline):
        await run(pipeline, 10)
        assert by_backend(pipeline)["cloud"] == 10
        first.then = GOOD
        await asyncio.sleep(5)
        await run(pipeline, 10)
        await run(pipeline, 10)
        assert by_backend(pipeline)["own"] >= 11


@virtual_time
async def test_a_fallback_that_is_stopped_too_takes_nothing() -> None:
    """
    The messages wait for their own route, and for whichever works first.

    Without new messages the fallback's probe is one that has just failed at the own route, at an instant when the
    fallback wants a probe: within four probes of the own route.
    """
    first, second = FakeBackend(then=REFUSED, name="own"), FakeBackend(then=REFUSED, name="cloud")
    pipeline = with_fallback(first, second, after_s=1.0)
    async with watched(pipeline):
        tasks = [pipeline.start() for _ in range(10)]
        await asyncio.sleep(120)
        assert not any(task.done() for task in tasks)
        second.then = GOOD
        assert await asyncio.gather(*tasks) == [ACK] * 10
        assert loop_time() < 120 + 4 * 4.4 + 4.4
        assert by_backend(pipeline)["cloud"] == 10
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_a_fallback_alone_takes_no_request() -> None:
    """It has none of its own."""
    pipeline = Pipeline(
        FakeBackend(name="own"),
        FakeBackend(name="cloud"),
        routes=[
            {"name": "own", "match": {"models": ["x"]}, "fallback": "cloud"},
            {"name": "cloud", "only_fallback": True},
        ],
    )
    await pipeline.handle()
    assert pipeline.answer.attributes["error_class"] == "model_not_found"


# What is changed on the way


@virtual_time
async def test_a_route_changes_what_it_declares_and_the_fallback_its_own() -> None:
    """Defaults, overrides, model and headers, each from the requester's own body."""
    first, second = FakeBackend(then=GOOD, name="own"), FakeBackend(name="cloud")
    routes = [
        {
            "name": "own",
            "fallback": "cloud",
            "fallback_after_s": 0.0,
            "model": "m-own",
            "body": {"defaults": {"temperature": 0.5}, "overrides": {"max_tokens": 7}},
            "header_rules": {"from_attributes": {"X-Team": "team"}, "from_metadata": {"X-Row": "id"}},
        },
        {"name": "cloud", "only_fallback": True, "body": {"defaults": {"store": False}}},
    ]
    pipeline = Pipeline(first, second, routes=routes)
    body = {"model": "m", "max_tokens": 100, "temperature": 1}
    assert await pipeline.handle(message(data(body, metadata={"id": 3}), attributes={"team": "a"})) is ACK
    sent = first.requests[0]
    assert sent.body.data == b'{"model":"m-own","max_tokens":7,"temperature":1}'
    assert (sent.headers["x-team"], sent.headers["x-row"]) == ("a", "3")
    first.then = REFUSED
    async with watched(pipeline):
        await asyncio.gather(*(pipeline.handle(message(data(body))) for _ in range(5)))
        assert {request.body.data for request in second.requests} == {
            b'{"store":false,"model":"m","max_tokens":100,"temperature":1}'
        }
        assert "x-team" not in second.requests[0].headers


@virtual_time
async def test_what_cannot_be_changed_is_a_bad_message() -> None:
    """A requester cannot go round an override, and an attribute cannot smuggle a header."""
    pipeline = Pipeline(
        FakeBackend(name="own"),
        routes=[
            {
                "name": "own",
                "body": {"overrides": {"max_tokens": 7}},
                "header_rules": {"from_attributes": {"X-Team": "team"}},
            }
        ],
        payloads=FakePayloads(odd=b'{"model":"m","user":"\\ud800"}'),
    )
    assert await pipeline.handle(message(referring("gs://b/odd"))) is ACK
    assert await pipeline.handle(message(attributes={"team": "a\r\nx-b: c"})) is ACK
    assert [answer.json["status_code"] for answer in pipeline.answers] == [400, 400]
    assert pipeline.answers[0].error["param"] == "body"
    assert pipeline.answers[0].json["metadata"] == METADATA
    assert "x-team" in pipeline.answers[1].error["message"]
    assert pipeline.backend.requests == []
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_a_route_drops_headers() -> None:
    """Those that a message may set, in any case."""
    pipeline = Pipeline(
        FakeBackend(name="own"),
        routes=[{"name": "own", "header_rules": {"drop": ["X-A"]}}],
        request=RequestSettings(allowed_headers=["x-a", "x-b"]),
    )
    await pipeline.handle(message(data(headers={"x-a": "1", "x-b": "2"})))
    headers = pipeline.backend.requests[0].headers
    assert ("x-a" in headers, headers["x-b"]) == (False, "2")
