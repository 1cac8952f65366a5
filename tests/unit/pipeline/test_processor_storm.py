"""Anything may happen at any time, and still: every message is answered, none is settled twice, nothing leaks."""

import asyncio

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.fakes import GOOD, REFUSED, Answer, FakeBackend, FakePublisher, FakeSubscriber, status
from tests.support.pipeline import Pipeline, data
from tests.support.virtual_time import unix_time, until, virtual_time
from worker.errors import PublishRefusedError, PublishRetryableError
from worker.policy.model import Fault, Phase
from worker.ports import Settlement
from worker.settings.schema import RequestSettings
from worker.wire.control import CancelRequest

OUTCOMES = st.sampled_from(
    [
        GOOD,
        GOOD,
        Answer(seconds=30.0),
        REFUSED,
        status(500),
        status(429),
        status(429, headers={"retry-after": "7"}),
        status(503, seconds=3.0),
        status(401),
        status(403),
        status(400),
        status(502, b"<html>"),
        Answer(body=b""),
        Answer(status=None, fault=Fault.CONNECTION_LOST, phase=Phase.HEADERS, seconds=1.0),
        Answer(status=None, fault=Fault.TOTAL_TIMEOUT, phase=Phase.HEADERS, seconds=60.0),
        Answer(error=RuntimeError("bug")),
    ]
)
PUBLISHES = st.sampled_from([None, None, PublishRetryableError("away"), PublishRefusedError("gone")])


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    outcomes=st.lists(OUTCOMES, max_size=60),
    publishes=st.lists(PUBLISHES, max_size=40),
    messages=st.integers(1, 25),
    drain_after=st.floats(0.0, 200.0),
    grace=st.sampled_from([0.0, 5.0, 100.0]),
)
def test_no_message_is_lost_whatever_happens(
    outcomes: list[Answer], publishes: list[Exception | None], messages: int, drain_after: float, grace: float
) -> None:
    """
    A worker is drained in the middle of faults: each delivery is settled once, and what is acked has exactly one answer.

    What is not answered yet was handed back, and none of it to a dead-letter topic.
    """

    @virtual_time
    async def run() -> None:
        publisher = FakePublisher(*publishes)
        pipeline = Pipeline(FakeBackend(*outcomes), publisher=publisher, window=4, max_delivery_attempts=4)
        subscriber = FakeSubscriber(max_in_flight=10, max_attempts=4)
        ids = [subscriber.publish(data({"n": n})) for n in range(messages)]
        serving = pipeline.serve(subscriber)
        await asyncio.sleep(drain_after)
        pipeline.processor.begin_drain()
        await subscriber.drain(grace)
        await serving
        pipeline.assert_nothing_leaks()
        assert pipeline.intake.reasons == ()
        assert subscriber.dead == []
        assert subscriber.in_flight == 0
        acked = subscriber.count(Settlement.ACK)
        assert set(acked.values()) <= {1}
        answered = [answer.attributes["request_message_id"] for answer in publisher.published]
        assert sorted(answered) == sorted(acked)
        assert set(ids) >= set(acked)
        deliveries = [(message_id, attempt) for message_id, attempt, _ in subscriber.settlements]
        assert len(deliveries) == len(set(deliveries))

    run()


REQUESTS = st.tuples(
    st.sampled_from(["m1", "m2", "other"]),
    st.sampled_from([None, "a", "b"]),
    st.integers(-1, 1),
    st.sampled_from([None, None, 1.0, 40.0, 3000.0]),
)
"""Model, tenant, priority, seconds until its deadline."""
LONGEST_S = 1200.0
"""Virtual seconds.  The longest of 6,000 examples took some 200."""
SERVERS = ["own/a", "own/b", "cloud", "rest"]
ROUTES = [
    {
        "name": "own",
        "match": {"models": ["m*"]},
        "base_urls": [{"url": "http://a", "name": "a"}, {"url": "http://b", "name": "b"}],
        "fallback": "cloud",
        "fallback_after_s": 20.0,
    },
    {"name": "cloud", "only_fallback": True},
    {"name": "rest"},
]


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    scripts=st.tuples(*(st.lists(OUTCOMES, min_size=3, max_size=40) for _ in SERVERS)),
    publishes=st.lists(PUBLISHES, max_size=20),
    requests=st.lists(REQUESTS, min_size=8, max_size=40),
    cancels=st.lists(st.tuples(st.floats(0.0, 60.0), st.integers(1, 25)), max_size=4),
    parts=st.lists(st.tuples(st.floats(0.0, 20.0), st.integers(0, 3), st.sampled_from([0.0, 0.4, 1.0])), max_size=4),
)
def test_every_message_is_answered_once_the_faults_are_over(
    scripts: tuple[list[Answer], ...],
    publishes: list[Exception | None],
    requests: list[tuple[str, str | None, int, float | None]],
    cancels: list[tuple[float, int]],
    parts: list[tuple[float, int, float]],
) -> None:
    """
    Several servers, a fallback, tenants, deadlines, cancellations and metric gates: nothing waits for ever.

    Each server works after its script; how long the faults last is bounded by the script, so the wait is as well.
    """

    @virtual_time
    async def run() -> None:
        backends = [FakeBackend(*script, name=name) for name, script in zip(SERVERS, scripts, strict=True)]
        publisher = FakePublisher(*publishes)
        pipeline = Pipeline(
            *backends,
            routes=ROUTES,
            publisher=publisher,
            request=RequestSettings(tenant_attribute="tenant"),
            tenants={"windows": "shared"},
            window=3,
            can_cancel=True,
            max_delivery_attempts=6,
        )
        subscriber = FakeSubscriber(max_in_flight=12, max_attempts=6)
        ids = []
        for index, (model, tenant, priority, seconds) in enumerate(requests):
            more = {} if seconds is None else {"deadline": unix_time() + seconds}
            body = data({"model": model, "n": index}, priority=priority, **more)
            ids.append(subscriber.publish(body, {} if tenant is None else {"tenant": tenant}))
        serving = pipeline.serve(subscriber)
        started = asyncio.get_running_loop().time()
        cancelled = [(after, CancelRequest(message_ids=frozenset({f"m{number}"})), None) for after, number in cancels]
        gated = [(after, None, (pipeline.targets[number].gate, part)) for after, number, part in parts]
        for after, cancel, gate in sorted([*cancelled, *gated], key=lambda each: each[0]):
            await asyncio.sleep(max(0.0, started + after - asyncio.get_running_loop().time()))
            if cancel is not None:
                pipeline.processor.cancel(cancel)
            if gate is not None:
                gate[0].set_part(gate[1])
        for target in pipeline.targets:
            target.gate.set_part(1.0)

        def all_answered() -> bool:
            return {each.attributes["request_message_id"] for each in publisher.published} >= set(ids)

        async with asyncio.timeout(LONGEST_S):
            await until(all_answered)
            await until(lambda: subscriber.in_flight == 0)
        answered = [each.attributes["request_message_id"] for each in publisher.published]
        assert sorted(answered) == sorted(ids)
        assert subscriber.count(Settlement.ACK) == dict.fromkeys(ids, 1)
        assert subscriber.dead == []
        pipeline.processor.begin_drain()
        await subscriber.drain(0.0)
        await serving
        pipeline.assert_nothing_leaks()
        assert pipeline.intake.reasons == ()

    run()
