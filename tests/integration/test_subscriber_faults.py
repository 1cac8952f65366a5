"""What the subscriber does when the broker, or its own event loop, misbehaves."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc
import pytest
from google.pubsub_v1 import types

from tests.chaos.server import ChaosServer
from tests.support.admin import Admin
from tests.support.waiting import eventually
from worker.brokers import subscriber as module
from worker.brokers.connection import async_channel
from worker.brokers.subscriber import PubSubSubscriber
from worker.emulators.pubsub import LocalPubSubThread
from worker.ports import Settlement
from worker.settings.schema import PubSubSettings
from worker.telemetry.metrics import Metrics
from worker.wire.message import ReceivedMessage

pytestmark = pytest.mark.slow


class Bench:
    """One subscriber on an embedded server whose faults are at hand."""

    def __init__(self, server: LocalPubSubThread, subscription: dict[str, Any] | None = None, **settings: Any) -> None:
        self.server = server
        self.faults = server.faults
        self.admin = Admin(server.address)
        self.topic = self.admin.topic()
        self.subscription = self.admin.subscription(self.topic, **(subscription or {}))
        self.metrics = Metrics()
        sizes = PubSubSettings(emulator_host=server.address, **settings)
        self.subscriber = PubSubSubscriber(async_channel(sizes, None), self.subscription, sizes, self.metrics)
        self.seen: list[bytes] = []
        self.changed = asyncio.Event()
        self.release = asyncio.Event()

    async def handle(self, message: ReceivedMessage) -> Settlement:
        """Hold on to `slow`, nack `bad` once, ack everything else at once."""
        self.seen.append(message.data)
        self.changed.set()
        if message.data == b"slow":
            await self.release.wait()
        if message.data == b"blocking":
            time.sleep(11.5)  # noqa: ASYNC251 - the point: the loop does not turn for longer than the ack deadline
        if message.data == b"bad" and self.seen.count(b"bad") == 1:
            return Settlement.NACK
        return Settlement.ACK

    async def until_seen(self, count: int) -> None:
        async with asyncio.timeout(30):
            while len(self.seen) < count:
                self.changed.clear()
                await self.changed.wait()

    def held(self) -> float | None:
        return self.metrics.registry.get_sample_value("inference_worker_leased_messages")

    def inspect(self) -> Any:
        return self.faults.inspect(self.subscription)


def publish_keys(bench: Bench, keys: Iterable[str], *data: bytes) -> None:
    """Publish the same messages with each ordering key, in few requests."""
    for key in keys:
        for first in range(0, len(data), 500):
            messages = [types.PubsubMessage(data=each, ordering_key=key) for each in data[first : first + 500]]
            bench.admin.publisher.transport.publish(types.PublishRequest(topic=bench.topic, messages=messages))


@contextmanager
def a_bench(subscription: dict[str, Any] | None = None, **settings: Any) -> Iterator[Bench]:
    """Make a bench on a server of its own."""
    with LocalPubSubThread() as server:
        made = Bench(server, subscription, **settings)
        yield made
        made.admin.close()


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    """A bench; its server ends with the test."""
    with a_bench() as made:
        yield made


async def test_a_stream_that_ends_by_itself_is_replaced_before_its_work_ends(bench: Bench) -> None:
    """New messages come over the next stream while the old one's handler runs on, and its ack still counts."""
    task = asyncio.create_task(bench.subscriber.run(bench.handle))
    bench.admin.publish(bench.topic, b"slow")
    await bench.until_seen(1)
    assert bench.faults.break_streams(grpc.StatusCode.DATA_LOSS) == 1
    bench.admin.publish(bench.topic, b"next")
    await bench.until_seen(2)
    assert not bench.release.is_set()
    bench.release.set()
    await bench.subscriber.drain(5)
    await task
    assert bench.seen == [b"slow", b"next"]
    assert bench.inspect().acked_count == 2
    assert bench.metrics.subscription_reopens_total.value == 1


async def test_a_lease_outlives_a_blocked_event_loop() -> None:
    """Eleven seconds without a turn of the loop: afterwards what is due is extended at once, to a minute."""
    with a_bench({"ack_deadline_seconds": 20}) as bench:
        task = asyncio.create_task(bench.subscriber.run(bench.handle))
        bench.admin.publish(bench.topic, b"slow")
        await bench.until_seen(1)
        assert bench.inspect().leased[0].expires_in_s < 21
        bench.admin.publish(bench.topic, b"blocking")
        await bench.until_seen(2)
        await eventually(lambda: bench.inspect().leased[0].expires_in_s > 50, 5)
        bench.release.set()
        await bench.subscriber.drain(20)
        await task
        assert bench.seen == [b"slow", b"blocking"]
        assert (bench.inspect().acked_count, bench.inspect().expired_count) == (2, 0)


async def test_a_broken_stream_is_reopened(bench: Bench) -> None:
    """Also when that is refused at first; nothing is lost or delivered twice."""
    task = asyncio.create_task(bench.subscriber.run(bench.handle))
    bench.admin.publish(bench.topic, b"1")
    await bench.until_seen(1)
    bench.faults.fail("StreamingPull", grpc.StatusCode.UNAVAILABLE, times=2)
    bench.faults.break_streams(grpc.StatusCode.UNAVAILABLE)
    bench.admin.publish(bench.topic, b"2")
    await bench.until_seen(2)
    await bench.subscriber.drain(5)
    await task
    assert bench.seen == [b"1", b"2"]
    assert bench.metrics.subscription_reopens_total.value == 3


@pytest.mark.parametrize("seen", [1, 300, 700])
async def test_nothing_is_left_on_the_wire_by_a_drain(seen: int) -> None:
    """Whenever it comes into a burst: what the server had sent is nacked and is back at once, not after a lease."""
    with a_bench(max_in_flight=1_000) as bench:
        publish_keys(bench, [""], *[b"x" * 10_000] * 1_000)
        task = asyncio.create_task(bench.subscriber.run(bench.handle))
        await bench.until_seen(seen)
        await bench.subscriber.drain(5)
        await task
        state = bench.inspect()
        assert (state.leased, state.acked_count + len(state.ready)) == ((), 1_000)
        assert state.acked_count == len(bench.seen)


@pytest.mark.parametrize("method", ["Acknowledge", "ModifyAckDeadline"])
async def test_what_cannot_be_told_the_broker_is_told_later(bench: Bench, method: str) -> None:
    """Acks and nacks that fail are sent again: each message is settled once, as its handler said."""
    bench.faults.fail(method, grpc.StatusCode.UNAVAILABLE, times=3)
    task = asyncio.create_task(bench.subscriber.run(bench.handle))
    for data in (b"1", b"bad", b"2"):
        bench.admin.publish(bench.topic, data)
    await bench.until_seen(4)
    await eventually(lambda: bench.inspect().acked_count == 3)
    await bench.subscriber.drain(5)
    await task
    assert sorted(bench.seen) == [b"1", b"2", b"bad", b"bad"]
    assert (bench.inspect().delivered_count, bench.inspect().expired_count) == (4, 0)


async def test_an_ack_the_broker_is_slow_to_take_is_not_lost_in_a_drain(bench: Bench) -> None:
    """The drain waits for it."""
    bench.faults.delay("Acknowledge", 0.5)
    task = asyncio.create_task(bench.subscriber.run(bench.handle))
    bench.admin.publish(bench.topic, b"1")
    await bench.until_seen(1)
    await bench.subscriber.drain(0)
    await task
    assert bench.inspect().acked_count == 1


async def test_a_server_that_stops_answering_pings_is_left(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection stands, and nothing comes over it any more; one that never answered any is not judged by it."""
    monkeypatch.setattr(module, "PING_S", 0.05)
    task = asyncio.create_task(bench.subscriber.run(bench.handle))
    await eventually(lambda: bench.subscriber._answers_pings)
    monkeypatch.setattr(module, "PONG_S", 0.5)
    bench.faults.mute_streams()
    bench.admin.publish(bench.topic, b"1")
    await bench.until_seen(1)
    await bench.subscriber.drain(5)
    await task
    assert bench.metrics.subscription_reopens_total.value == 1


@pytest.fixture
async def narrow() -> AsyncIterator[Bench]:
    """A bench whose subscriber takes ten deliveries at once."""
    with a_bench(max_in_flight=10) as made:
        yield made


async def until_leased(bench: Bench, count: int) -> None:
    """Wait until the server has leased out so many and none of them is on its way: the worker has all of them."""
    await eventually(lambda: len(bench.inspect().leased) == count, what=f"{count} leased")
    await eventually(lambda: bench.held() == count, what=f"{count} received")


async def test_one_settled_delivery_makes_room_for_one(narrow: Bench) -> None:
    """Nine long requests of ten keep nothing waiting in a buffer where its lease would run out."""
    task = asyncio.create_task(narrow.subscriber.run(narrow.handle))
    for _ in range(9):
        narrow.admin.publish(narrow.topic, b"slow")
    await narrow.until_seen(9)
    for index in range(20):
        narrow.admin.publish(narrow.topic, str(index).encode())
    await narrow.until_seen(29)
    narrow.release.set()
    await narrow.subscriber.drain(5)
    await task
    assert narrow.inspect().delivered_count == narrow.inspect().acked_count == 29


async def test_no_stream_is_opened_while_there_is_no_room(narrow: Bench) -> None:
    """A stream breaks under ten long requests of ten: what each makes room for is pulled, and no more."""
    task = asyncio.create_task(narrow.subscriber.run(narrow.handle))
    for _ in range(40):
        narrow.admin.publish(narrow.topic, b"slow")
    await until_leased(narrow, 10)
    narrow.faults.break_streams(grpc.StatusCode.UNAVAILABLE)
    await eventually(lambda: not narrow.subscriber.is_open)
    narrow.release.set()
    await narrow.until_seen(40)
    await narrow.subscriber.drain(5)
    await task
    found = narrow.inspect()
    assert (found.acked_count, found.delivered_count, found.expired_count) == (40, 40, 0)


async def test_a_drain_opens_no_stream(narrow: Bench) -> None:
    """What it settles makes room, but nothing is delivered any more only to be nacked at the cost of an attempt."""
    task = asyncio.create_task(narrow.subscriber.run(narrow.handle))
    for _ in range(30):
        narrow.admin.publish(narrow.topic, b"slow")
    await until_leased(narrow, 10)
    narrow.faults.break_streams(grpc.StatusCode.UNAVAILABLE)
    await eventually(lambda: not narrow.subscriber.is_open)
    drain = asyncio.create_task(narrow.subscriber.drain(5))
    narrow.release.set()
    await drain
    await task
    assert (narrow.inspect().acked_count, narrow.inspect().delivered_count) == (10, 10)
    assert narrow.faults.calls("StreamingPull") == 1


ORDERED = {"enable_message_ordering": True}


async def test_what_waits_behind_its_ordering_key_is_held_and_handed_back_by_a_drain() -> None:
    """Handlers run one a key; what no handler has begun comes back at once, not after the grace."""
    with a_bench(ORDERED, max_in_flight=10) as bench:
        task = asyncio.create_task(bench.subscriber.run(bench.handle))
        publish_keys(bench, "abcd", *[b"slow"] * 5)
        await until_leased(bench, 10)
        await eventually(lambda: len(bench.seen) == 2)
        drain = asyncio.create_task(bench.subscriber.drain(30))
        await until_leased(bench, 2)
        bench.release.set()
        await drain
        await task
        assert (bench.inspect().acked_count, len(bench.inspect().ready), len(bench.seen)) == (2, 18, 2)


async def test_a_nack_keeps_the_order_of_its_key() -> None:
    """What waits behind it goes back with it, and all of that comes again in order."""
    with a_bench(ORDERED) as bench:
        task = asyncio.create_task(bench.subscriber.run(bench.handle))
        publish_keys(bench, "k", b"1", b"bad", b"3", b"4")
        await bench.until_seen(5)
        await bench.subscriber.drain(5)
        await task
        assert bench.seen == [b"1", b"bad", b"bad", b"3", b"4"]
        assert bench.inspect().acked_count == 4


async def test_each_key_keeps_its_order_whatever_is_nacked() -> None:
    """Each message is handled for the first time after those before it, though one in ten handlings ends in a nack."""
    with a_bench(ORDERED, max_in_flight=20) as bench:
        firsts: dict[str, list[bytes]] = {key: [] for key in "abcdef"}
        chance = random.Random(7)

        async def handle(message: ReceivedMessage) -> Settlement:
            if message.data not in firsts[message.ordering_key]:
                firsts[message.ordering_key].append(message.data)
            for _ in range(chance.randrange(5)):
                await asyncio.sleep(0)
            return Settlement.NACK if chance.random() < 0.1 else Settlement.ACK

        task = asyncio.create_task(bench.subscriber.run(handle))
        numbers = [b"%03d" % number for number in range(40)]
        publish_keys(bench, "abcdef", *numbers)
        await eventually(lambda: bench.inspect().acked_count == 240 and not bench.inspect().leased)
        await bench.subscriber.drain(5)
        await task
        assert all(order == numbers for order in firsts.values())


ONCE = {"enable_exactly_once_delivery": True, "ack_deadline_seconds": 20}


async def test_exactly_once_nothing_starts_before_its_receipt_is_confirmed() -> None:
    """Also when the broker cannot be told at once."""
    with a_bench(ONCE) as bench:
        bench.faults.fail("ModifyAckDeadline", grpc.StatusCode.UNAVAILABLE, times=2)
        task = asyncio.create_task(bench.subscriber.run(bench.handle))
        bench.admin.publish(bench.topic, b"slow")
        await eventually(lambda: bench.faults.calls("ModifyAckDeadline") == 2)
        assert bench.seen == []
        await bench.until_seen(1)
        assert bench.inspect().leased[0].expires_in_s > 50
        bench.release.set()
        await bench.subscriber.drain(5)
        await task
        assert (bench.inspect().acked_count, bench.metrics.lost_leases_total.value) == (1, 0)


async def test_exactly_once_an_ack_after_the_lease_is_refused_and_counted() -> None:
    """The message has come again; the second delivery's ack counts."""
    with a_bench(ONCE) as bench:
        task = asyncio.create_task(bench.subscriber.run(bench.handle))
        bench.admin.publish(bench.topic, b"slow")
        await bench.until_seen(1)
        bench.server.advance(70)
        await bench.until_seen(2)
        bench.release.set()
        await bench.subscriber.drain(5)
        await task
        count = bench.metrics.registry.get_sample_value
        labels = {"settlement": "lost", "reason": "ack_refused"}
        assert count("inference_worker_deliveries_total", labels) == count("inference_worker_lost_leases_total") == 1
        assert bench.inspect().acked_count == 1


@asynccontextmanager
async def a_broker_that_goes_away(**options: Any) -> AsyncIterator[PubSubSubscriber]:
    """Yield a subscriber with one delivery in its handler, whose broker has just gone."""
    with ChaosServer() as server:
        settings = PubSubSettings(emulator_host=server.address)
        admin = Admin(server.address)
        topic = admin.topic()
        subscription = admin.subscription(topic)
        subscriber = PubSubSubscriber(async_channel(settings, None), subscription, settings, Metrics(), **options)
        has_begun = asyncio.Event()

        async def handle(_: ReceivedMessage) -> Settlement:
            has_begun.set()
            await asyncio.Event().wait()
            raise AssertionError

        task = asyncio.create_task(subscriber.run(handle))
        admin.publish(topic, b"x")
        await has_begun.wait()
        server.go_away()
        try:
            yield subscriber
            await task
        finally:
            server.come_back()
            admin.close()


async def test_a_broker_that_is_away_does_not_keep_a_drain() -> None:
    """The nack cannot be sent, so the drain ends with its time for that."""
    async with a_broker_that_goes_away(settle_s=1) as subscriber, asyncio.timeout(30):
        await subscriber.drain(0.1)


async def test_a_hurry_cuts_the_wait_for_the_last_acks() -> None:
    """A second SIGTERM while the broker is away ends what the first left a minute for."""
    async with a_broker_that_goes_away() as subscriber, asyncio.timeout(30):
        drain = asyncio.create_task(subscriber.drain(0.1))
        await eventually(lambda: subscriber._closing is not None)
        await subscriber.drain(0)
        await drain
