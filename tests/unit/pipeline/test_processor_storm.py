"""Anything may happen at any time, and still: every message is answered, none is settled twice, nothing leaks."""

import asyncio

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.fakes import GOOD, REFUSED, Answer, FakeBackend, FakePublisher, FakeSubscriber, status
from tests.support.pipeline import Pipeline, data
from tests.support.virtual_time import virtual_time
from worker.errors import PublishRefusedError, PublishRetryableError
from worker.policy.model import Fault, Phase
from worker.ports import Settlement

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
