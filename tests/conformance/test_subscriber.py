"""
The exam of the broker port: the worker's own adapters against every broker.

Where brokers differ, the test says what Cloud Pub/Sub documents.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.conformance.conftest import Broker
from tests.support.waiting import eventually
from worker.brokers.connection import async_channel
from worker.brokers.publisher import PubSubPublisher
from worker.brokers.subscriber import PubSubSubscriber
from worker.errors import BrokerResourceError, MessageRejectedError, PublishRefusedError
from worker.ports import Settlement
from worker.settings.schema import PublishSettings, PubSubSettings
from worker.telemetry.metrics import Metrics
from worker.wire.message import MAX_PUBSUB_MESSAGE_BYTES, ReceivedMessage

pytestmark = pytest.mark.slow


class Exam:
    """A subscriber under examination with a record of what its handler saw."""

    def __init__(self, broker: Broker, subscription: str, **settings: Any) -> None:
        self.metrics = Metrics()
        self.settings = PubSubSettings(emulator_host=broker.address, **settings)
        channel = async_channel(self.settings, None)
        self.subscriber = PubSubSubscriber(channel, subscription, self.settings, self.metrics)
        self.seen: list[ReceivedMessage] = []
        self.times: list[float] = []
        self.running = 0
        self.peak = 0
        self._changed = asyncio.Condition()

    async def handle(
        self, verdict: Callable[[ReceivedMessage], Awaitable[Settlement]], message: ReceivedMessage
    ) -> Settlement:
        self.running += 1
        self.peak = max(self.peak, self.running)
        self.seen.append(message)
        self.times.append(time.monotonic())
        async with self._changed:
            self._changed.notify_all()
        try:
            return await verdict(message)
        finally:
            self.running -= 1

    async def until(self, count: int, limit_s: float = 60.0) -> None:
        """Wait until the handler saw so many deliveries."""
        await self.until_true(lambda: len(self.seen) >= count, limit_s)

    async def until_true(self, condition: Callable[[], bool], limit_s: float = 60.0) -> None:
        """Wait for something that is to be asked anew at each delivery."""
        async with asyncio.timeout(limit_s), self._changed:
            await self._changed.wait_for(condition)

    @asynccontextmanager
    async def run(
        self, verdict: Callable[[ReceivedMessage], Awaitable[Settlement]]
    ) -> AsyncIterator["asyncio.Task[None]"]:
        task = asyncio.create_task(self.subscriber.run(lambda message: self.handle(verdict, message)))
        try:
            yield task
        finally:
            await self.subscriber.drain(0)
            await asyncio.gather(task, return_exceptions=True)


async def ack(_: ReceivedMessage) -> Settlement:
    return Settlement.ACK


async def nack(_: ReceivedMessage) -> Settlement:
    return Settlement.NACK


async def forever(_: ReceivedMessage) -> Settlement:
    await asyncio.Event().wait()
    raise AssertionError


@asynccontextmanager
async def a_publisher(broker: Broker, topic: str, **settings: Any) -> AsyncIterator[PubSubPublisher]:
    channel = async_channel(PubSubSettings(emulator_host=broker.address), None)
    publisher = PubSubPublisher(channel, topic, PublishSettings(**settings))
    try:
        yield publisher
    finally:
        await publisher.aclose()


async def test_bytes_and_attributes_arrive_exactly(broker: Broker) -> None:
    """What is published is what is delivered, with the broker's id and a sensible publish time."""
    topic = broker.admin.topic()
    exam = Exam(broker, broker.admin.subscription(topic))
    data, attributes = bytes(range(256)) * 4, {"a": "1", "ü": "€ 😀", "empty": ""}
    async with a_publisher(broker, topic) as publisher, exam.run(ack):
        message_id = await publisher.publish(data, attributes)
        await exam.until(1)
    assert (data, attributes, message_id) == (exam.seen[0].data, dict(exam.seen[0].attributes), exam.seen[0].message_id)
    assert abs(exam.seen[0].publish_time - time.time()) < 60


async def test_an_acked_message_is_not_redelivered(broker: Broker) -> None:
    """After an ack the subscription is empty, past the ack deadline too."""
    topic = broker.admin.topic()
    subscription = broker.admin.subscription(topic)
    exam = Exam(broker, subscription)
    broker.admin.publish(topic, b"x")
    async with exam.run(ack):
        await exam.until(1)
    assert broker.admin.is_empty(subscription, timeout=12)
    assert len(exam.seen) == 1


async def test_a_nacked_message_comes_again_with_a_higher_attempt(broker: Broker) -> None:
    """A nack costs one delivery attempt, counted from 1, where a dead-letter policy counts them."""
    admin = broker.admin
    topic, dead = admin.topic(), admin.topic("dead")
    admin.subscription(dead)
    exam = Exam(broker, admin.subscription(topic, dead_letter=(dead, 10)))
    admin.publish(topic, b"x")
    async with exam.run(nack):
        await exam.until(3)
    assert [message.delivery_attempt for message in exam.seen[:3]] == [1, 2, 3]


async def test_a_message_is_dead_lettered_after_its_last_attempt(broker: Broker) -> None:
    """The fifth nack of five sends it to the dead-letter topic with its original bytes."""
    admin = broker.admin
    topic, dead = admin.topic(), admin.topic("dead")
    graves = admin.subscription(dead)
    exam = Exam(broker, admin.subscription(topic, dead_letter=(dead, 5)))
    admin.publish(topic, b"poison", kind="p")
    async with exam.run(nack):
        await exam.until(5)
        buried = await asyncio.to_thread(admin.take, graves, 1)
    assert [message.delivery_attempt for message in exam.seen] == [1, 2, 3, 4, 5]
    assert buried[0].data == b"poison"
    assert buried[0].attributes["CloudPubSubDeadLetterSourceDeliveryCount"] == "5"


async def test_the_dead_letter_policys_limit_is_read(broker: Broker) -> None:
    """`auto` finds the limit; without a policy there is none."""
    admin = broker.admin
    topic = admin.topic()
    with_policy = Exam(broker, admin.subscription(topic, dead_letter=(admin.topic("dead"), 17)))
    without = Exam(broker, admin.subscription(topic))
    assert await with_policy.subscriber.max_delivery_attempts() == 17
    assert await without.subscriber.max_delivery_attempts() is None
    await with_policy.subscriber.drain(0)
    await without.subscriber.drain(0)


@pytest.mark.needs("first_nack_backs_off")
async def test_the_first_nack_is_redelivered_after_the_minimum_backoff(broker: Broker) -> None:
    """The retry policy holds from the first redelivery on."""
    admin = broker.admin
    topic = admin.topic()
    exam = Exam(broker, admin.subscription(topic, backoff=(1, 10)))
    admin.publish(topic, b"x")
    async with exam.run(nack):
        await exam.until(2)
    assert exam.times[1] - exam.times[0] > 0.9


async def test_later_nacks_back_off(broker: Broker) -> None:
    """From the second nack on every broker waits at least about the minimum."""
    admin = broker.admin
    topic = admin.topic()
    exam = Exam(broker, admin.subscription(topic, backoff=(1, 2)))
    admin.publish(topic, b"x")
    async with exam.run(nack):
        await exam.until(4)
    gaps = [later - earlier for earlier, later in zip(exam.times[1:], exam.times[2:], strict=False)]
    assert all(0.9 < gap < 6 for gap in gaps), gaps


async def test_a_handlers_exception_hands_the_message_back(broker: Broker) -> None:
    """An exception is a nack, counted; the puller lives on."""
    topic = broker.admin.topic()
    exam = Exam(broker, broker.admin.subscription(topic))

    async def fail_once(_: ReceivedMessage) -> Settlement:
        if len(exam.seen) == 1:
            raise ValueError("boom")
        return Settlement.ACK

    broker.admin.publish(topic, b"x")
    async with exam.run(fail_once):
        await exam.until(2)
    assert exam.metrics.internal_errors_total.value == 1


async def test_never_more_than_max_in_flight_handlers_run(broker: Broker) -> None:
    """The limit holds with a backlog behind it."""
    topic = broker.admin.topic()
    exam = Exam(broker, broker.admin.subscription(topic), max_in_flight=7)
    async with a_publisher(broker, topic) as publisher:
        await asyncio.gather(*(publisher.publish(b"%d" % index, {}) for index in range(60)))

    async def when_all_run(_: ReceivedMessage) -> Settlement:
        await exam.until_true(lambda: exam.running >= 7 or len(exam.seen) >= 60)
        return Settlement.ACK

    async with exam.run(when_all_run):
        await exam.until(60)
    assert exam.peak == 7
    assert len({message.data for message in exam.seen}) == 60


@pytest.mark.needs("server_flow_control")
async def test_no_more_is_leased_than_max_in_flight(broker: Broker) -> None:
    """What this worker cannot work on stays with the broker, for other workers."""
    topic = broker.admin.topic()
    subscription = broker.admin.subscription(topic)
    exam = Exam(broker, subscription, max_in_flight=5)
    for index in range(20):
        broker.admin.publish(topic, b"%d" % index)
    async with exam.run(forever):
        await exam.until(5)
        others = await asyncio.to_thread(broker.admin.take, subscription, 15, 3)
    assert len(others) == 15


async def test_extra_messages_are_leased_and_handled_beyond_max_in_flight(broker: Broker) -> None:
    """As many as are allowed, so that others come to their turn; afterwards the limit is the old one."""
    topic = broker.admin.topic()
    subscription = broker.admin.subscription(topic)
    exam = Exam(broker, subscription, max_in_flight=6)
    first, second = asyncio.Event(), asyncio.Event()
    steps = [first] * 17 + [second] * 13

    async def handle(_: ReceivedMessage) -> Settlement:
        await steps[len(exam.seen) - 1].wait()
        return Settlement.ACK

    for index in range(30):
        broker.admin.publish(topic, b"%d" % index)
    async with exam.run(handle):
        await exam.until(6)
        assert exam.running == 6
        for extra, handled in [(5, 11), (11, 17)]:
            exam.subscriber.allow_extra(extra)
            await exam.until(handled)
        assert exam.running == 17
        exam.subscriber.allow_extra(0)
        first.set()
        await exam.until(23)
        assert exam.running == 6
        second.set()
        await exam.until(30)
        await eventually(lambda: exam.running == 0, what="every handler ends")
    assert broker.admin.is_empty(subscription)
    assert exam.peak == 17
    assert len(exam.seen) == 30


async def test_a_lease_outlives_the_ack_deadline(broker: Broker) -> None:
    """A handler that needs longer than the ack deadline is not delivered a second time."""
    topic = broker.admin.topic()
    subscription = broker.admin.subscription(topic)  # deadline 10 s
    exam = Exam(broker, subscription)

    async def slow(_: ReceivedMessage) -> Settlement:
        await asyncio.sleep(11.5)
        return Settlement.ACK

    broker.admin.publish(topic, b"x")
    async with exam.run(slow):
        await exam.until(1)
        await eventually(lambda: exam.running == 0, what="the handler ends")
    assert broker.admin.is_empty(subscription)
    assert len(exam.seen) == 1


async def test_a_drain_waits_for_handlers_and_their_acks_arrive(broker: Broker) -> None:
    """What finishes within the grace is acked for good; nothing is delivered meanwhile."""
    topic = broker.admin.topic()
    subscription = broker.admin.subscription(topic)
    exam = Exam(broker, subscription)
    gate = asyncio.Event()

    async def wait(_: ReceivedMessage) -> Settlement:
        await gate.wait()
        return Settlement.ACK

    for index in range(3):
        broker.admin.publish(topic, b"%d" % index)
    async with exam.run(wait) as task:
        await exam.until(3)
        drain = asyncio.create_task(exam.subscriber.drain(30))
        await eventually(lambda: not exam.subscriber.is_open, what="the pull ends")
        broker.admin.publish(topic, b"late")
        assert [item.data for item in await asyncio.to_thread(broker.admin.take, subscription, 1)] == [b"late"]
        assert not drain.done()
        gate.set()
        await asyncio.wait_for(drain, 10)
        await asyncio.wait_for(task, 5)
    assert len(exam.seen) == 3


async def test_nothing_is_delivered_after_the_drain(broker: Broker) -> None:
    """What is published afterwards stays with the broker."""
    topic = broker.admin.topic()
    subscription = broker.admin.subscription(topic)
    exam = Exam(broker, subscription)
    broker.admin.publish(topic, b"early")
    async with exam.run(ack):
        await exam.until(1)
        await exam.subscriber.drain(5)
        broker.admin.publish(topic, b"late")
        assert [item.data for item in await asyncio.to_thread(broker.admin.take, subscription, 1)] == [b"late"]
    assert len(exam.seen) == 1


async def test_after_the_grace_the_rest_is_cancelled_and_handed_back(broker: Broker) -> None:
    """A drain of no grace cancels handlers; their messages come back at once, not after the lease."""
    topic = broker.admin.topic()
    subscription = broker.admin.subscription(topic)
    exam = Exam(broker, subscription)
    for index in range(4):
        broker.admin.publish(topic, b"%d" % index)
    async with exam.run(forever):
        await exam.until(4)
        started = time.monotonic()
        await exam.subscriber.drain(0.2)
        assert time.monotonic() - started < 5
    again = await asyncio.to_thread(broker.admin.take, subscription, 4, 5)
    assert {b"0", b"1", b"2", b"3"} == {item.data for item in again}


async def test_a_shorter_grace_wins(broker: Broker) -> None:
    """A second drain cuts a long one short."""
    topic = broker.admin.topic()
    exam = Exam(broker, broker.admin.subscription(topic))
    broker.admin.publish(topic, b"x")
    async with exam.run(forever):
        await exam.until(1)
        patient = asyncio.create_task(exam.subscriber.drain(600))
        await asyncio.sleep(0)  # it has begun
        await exam.subscriber.drain(0)
        await asyncio.wait_for(patient, 5)


async def test_drain_is_idempotent_and_safe_before_run(broker: Broker) -> None:
    """A drained subscriber delivers nothing, however often it is drained."""
    topic = broker.admin.topic()
    exam = Exam(broker, broker.admin.subscription(topic))
    broker.admin.publish(topic, b"x")
    await exam.subscriber.drain(0)
    await exam.subscriber.drain(5)
    await asyncio.wait_for(exam.subscriber.run(ack), 5)
    assert exam.seen == []


async def test_a_missing_subscription_is_a_permanent_error(broker: Broker) -> None:
    """`run` ends with an error that names the subscription."""
    exam = Exam(broker, "projects/exam/subscriptions/there-is-none")
    with pytest.raises(BrokerResourceError, match="there-is-none"):
        await asyncio.wait_for(exam.subscriber.run(ack), 30)
    await exam.subscriber.drain(0)


async def test_a_subscription_deleted_under_us_is_a_permanent_error(broker: Broker) -> None:
    """A running pull ends when its subscription is gone."""
    topic = broker.admin.topic()
    subscription = broker.admin.subscription(topic)
    exam = Exam(broker, subscription)
    broker.admin.publish(topic, b"x")
    async with exam.run(ack) as task:
        await exam.until(1)
        broker.admin.subscriber.delete_subscription(request={"subscription": subscription})
        with pytest.raises(BrokerResourceError):
            await asyncio.wait_for(task, 30)


async def test_an_exactly_once_subscription_works(broker: Broker) -> None:
    """Acks are confirmed one by one and none is counted as lost."""
    topic = broker.admin.topic()
    subscription = broker.admin.subscription(topic, enable_exactly_once_delivery=True)
    exam = Exam(broker, subscription)
    for index in range(10):
        broker.admin.publish(topic, b"%d" % index)
    async with exam.run(ack):
        await exam.until(10)
    assert exam.metrics.lost_leases_total.value == 0
    assert broker.admin.is_empty(subscription)


async def test_a_publish_returns_the_brokers_id(broker: Broker) -> None:
    """Ids are distinct, and what was accepted is there."""
    topic = broker.admin.topic()
    subscription = broker.admin.subscription(topic)
    async with a_publisher(broker, topic) as publisher:
        ids = await asyncio.gather(*(publisher.publish(b"%d" % index, {}) for index in range(250)))
    got = await asyncio.to_thread(broker.admin.take, subscription, 250, 5)
    assert Counter(ids) == Counter(item.message_id for item in got)


async def test_a_publish_to_a_missing_topic_is_refused(broker: Broker) -> None:
    """It is permanent until an operator acts."""
    async with a_publisher(broker, "projects/exam/topics/there-is-none") as publisher:
        with pytest.raises(PublishRefusedError, match="NOT_FOUND"):
            await publisher.publish(b"x", {})


async def test_a_message_of_five_megabytes_passes(broker: Broker) -> None:
    """gRPC's own 4 MB limit is lifted in both directions."""
    topic = broker.admin.topic()
    exam = Exam(broker, broker.admin.subscription(topic))
    async with a_publisher(broker, topic) as publisher, exam.run(ack):
        await publisher.publish(b"x" * 5_000_000, {})
        await exam.until(1)
    assert len(exam.seen[0].data) == 5_000_000


async def test_an_oversize_message_never_reaches_the_broker(broker: Broker) -> None:
    """Over 10 MB is found before anything is sent."""
    async with a_publisher(broker, broker.admin.topic()) as publisher:
        with pytest.raises(MessageRejectedError):
            await publisher.publish(b"x" * MAX_PUBSUB_MESSAGE_BYTES, {})


@pytest.mark.needs("filters")
async def test_a_filter_keeps_messages_out(broker: Broker) -> None:
    """Only what the filter lets through is delivered."""
    topic = broker.admin.topic()
    subscription = broker.admin.subscription(topic, filter='attributes.kind = "a"')
    broker.admin.publish(topic, b"1", kind="b")
    broker.admin.publish(topic, b"2", kind="a")
    assert [item.data for item in await asyncio.to_thread(broker.admin.take, subscription, 2, 1)] == [b"2"]
