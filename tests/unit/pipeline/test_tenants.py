"""Tenants: their part of a shared window, their limits, and what is told of them."""

import asyncio
import json
from collections import Counter
from typing import Any

import msgspec

from tests.support.fakes import GOOD_BODY, REFUSED, Answer, FakeBackend
from tests.support.pipeline import Pipeline, data, message
from tests.support.virtual_time import loop_time, settle, unix_time, virtual_time
from worker.ports import Settlement
from worker.settings.schema import RequestSettings

ACK, NACK = Settlement.ACK, Settlement.NACK
BY_ATTRIBUTE = RequestSettings(tenant_attribute="tenant")
TOKENS = 8
"""Of `GOOD_BODY`, input and output."""


def of(tenant: str | None, **more: Any) -> Any:
    attributes = {} if tenant is None else {"tenant": tenant}
    return message(data(**more), attributes=attributes)


def tenants_of(pipeline: Pipeline, backend: FakeBackend) -> list[str]:
    """Return whose requests the backend got, in order."""
    return [json.loads(request.body.data)["user"] for request in backend.requests]


def shared(backend: FakeBackend, window: int = 2, **tenants: Any) -> Pipeline:
    return Pipeline(backend, request=BY_ATTRIBUTE, window=window, tenants={"windows": "shared", **tenants})


def asking(tenant: str) -> Any:
    return message(data({"model": "m", "messages": [], "user": tenant}), attributes={"tenant": tenant})


# A shared window


@virtual_time
async def test_a_window_is_shared_by_weight() -> None:
    """Three to one while both wait, though one of them sent everything before the other."""
    backend = FakeBackend(then=Answer(seconds=1.0))
    pipeline = shared(backend, weights={"gold": 3.0})
    tasks = [pipeline.start(asking("basic")) for _ in range(60)]
    await settle()
    tasks += [pipeline.start(asking("gold")) for _ in range(60)]
    await asyncio.gather(*tasks)
    served = Counter(tenants_of(pipeline, backend)[10:50])
    assert 26 <= served["gold"] <= 33
    assert set(pipeline.gate.lanes) == {"m"}
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_one_tenant_alone_has_the_whole_window() -> None:
    """What the others do not use is not kept free."""
    backend = FakeBackend(then=Answer(seconds=1.0))
    pipeline = shared(backend, window=4, weights={"gold": 100.0})
    await asyncio.gather(*(pipeline.handle(asking("basic")) for _ in range(8)))
    assert loop_time() == 2.0


@virtual_time
async def test_tenants_have_windows_of_their_own_by_default() -> None:
    """As gateways need it that limit each tenant."""
    pipeline = Pipeline(FakeBackend(), request=BY_ATTRIBUTE)
    await pipeline.handle(asking("a"))
    assert set(pipeline.gate.lanes) == {"a/m"}


# Limits


def limited(backend: FakeBackend | None = None, **tenants: Any) -> Pipeline:
    return Pipeline(backend or FakeBackend(), request=BY_ATTRIBUTE, window=32, tenants=tenants)


@virtual_time
async def test_what_is_over_the_limit_waits_and_is_answered() -> None:
    """Sixty a minute, eleven at once; another tenant does not wait for them."""
    pipeline = limited(requests_per_minute=60)
    tasks = [pipeline.start(of("a")) for _ in range(20)]
    assert await pipeline.handle(of("b")) is ACK
    assert loop_time() == 0.0
    assert await asyncio.gather(*tasks) == [ACK] * 20
    assert loop_time() == 9.0
    assert sum(pipeline.metrics.tenant_limited_seconds.counts) == 9
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_tokens_are_settled_when_they_are_known() -> None:
    """The first request reserves nothing, and owes what its answer took; the next ones reserve the mean."""
    pipeline = limited(tokens_per_minute=TOKENS * 6)
    for _ in range(3):
        await pipeline.handle(of("a"))
    assert loop_time() == 10.0
    for _ in range(6):
        await pipeline.handle(of("a"))
    assert loop_time() == 70.0


@virtual_time
async def test_one_tenant_may_have_its_own_limit_or_none() -> None:
    """In place of that of all."""
    own = [{"tenant": "fast", "requests_per_minute": None}, {"tenant": "slow", "requests_per_minute": 6}]
    pipeline = limited(requests_per_minute=60, limits=own)
    await asyncio.gather(*(pipeline.handle(of("fast")) for _ in range(100)))
    assert loop_time() == 0.0
    await asyncio.gather(*(pipeline.handle(of("slow")) for _ in range(4)))
    assert loop_time() == 20.0


@virtual_time
async def test_what_was_never_sent_gives_back_what_it_reserved() -> None:
    """A deadline that passes while it waits: the next request does not pay for it."""
    pipeline = limited(requests_per_minute=6)
    for _ in range(2):
        await pipeline.handle(of("a"))
    late = [pipeline.start(of("a", deadline=unix_time() + 5)) for _ in range(10)]
    await asyncio.gather(*late)
    assert len(pipeline.backend.requests) == 2
    assert loop_time() < 6
    await pipeline.handle(of("a"))
    assert loop_time() <= 10.1
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_a_breaker_that_closes_makes_no_limited_message_ready() -> None:
    """Its wait has another reason."""
    backend = FakeBackend(then=REFUSED)
    pipeline = limited(backend, requests_per_minute=60)
    tasks = [pipeline.start(of("a")) for _ in range(40)]
    await asyncio.sleep(3)
    backend.then = Answer()
    await asyncio.sleep(7)
    assert len([task for task in tasks if task.done()]) <= 22
    await asyncio.gather(*tasks)
    assert loop_time() >= 29.0


@virtual_time
async def test_messages_that_wait_for_a_limit_do_not_use_up_the_leases() -> None:
    """The broker may send others in their place, within the bound that holds for stopped models."""
    pipeline = limited(requests_per_minute=6)
    tasks = [pipeline.start(of("a")) for _ in range(20)]
    await settle()
    assert pipeline.router.routes[0].load().waiting == 18
    pipeline.processor.begin_drain()
    assert (await asyncio.gather(*tasks)).count(NACK) == 18


# What is told


@virtual_time
async def test_tokens_and_cost_of_each_tenant() -> None:
    """In the metrics and in `stats`; requests without a tenant are counted as `none`."""
    prices = [{"model": "m", "input": 1_000_000.0, "output": 2_000_000.0}]
    pipeline = Pipeline(
        FakeBackend(then=Answer(body=GOOD_BODY)), request=BY_ATTRIBUTE, prices=prices, include_stats=True
    )
    for tenant in ("a", "a", None):
        await pipeline.handle(of(tenant))
    assert pipeline.count("tenant_requests_total", "a", "m", "ok") == 2
    assert pipeline.count("tenant_requests_total", "none", "m", "ok") == 1
    assert pipeline.count("tenant_tokens_total", "a", "m", "output") == 10
    assert pipeline.count("tenant_cost_total", "a", "m") == 2 * (3 + 2 * 5)
    stats = msgspec.json.decode(pipeline.answers[0].data)["stats"]
    assert (stats["tenant"], stats["cost"]) == ("a", 13.0)


@virtual_time
async def test_routers_are_told() -> None:
    """Tenant, priority and the time that is left, under the names that the router wants."""
    pipeline = Pipeline(
        FakeBackend(name="r"),
        request=BY_ATTRIBUTE,
        routes=[
            {
                "name": "r",
                "header_rules": {"tenant": "X-Fairness-Id", "priority": "X-Prio", "time_left_ms": "X-Left"},
            }
        ],
    )
    await pipeline.handle(of("a", priority=3, deadline=unix_time() + 2.5))
    headers = pipeline.backend.requests[0].headers
    assert (headers["x-fairness-id"], headers["x-prio"], headers["x-left"]) == ("a", "3", "2500")
    await pipeline.handle(of(None))
    headers = pipeline.backend.requests[1].headers
    assert ("x-fairness-id" in headers, headers["x-prio"], "x-left" in headers) == (False, "0", False)
