"""What the client library does when the broker misbehaves, and that the adapter lives through it."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.pubsub_v1 import types

from tests.chaos.server import ChaosServer
from tests.support.admin import Admin
from tests.support.waiting import eventually
from worker.brokers.connection import sync_channel
from worker.brokers.stream import LEASE_EXTENSION_S
from worker.brokers.subscriber import PubSubSubscriber
from worker.emulators.pubsub import LocalPubSubThread
from worker.ports import Settlement
from worker.settings.schema import PubSubSettings
from worker.telemetry.metrics import Metrics
from worker.wire.message import ReceivedMessage

pytestmark = pytest.mark.slow


class Bench:
    """One subscriber on an embedded server whose faults are at hand."""

    def __init__(self, server: LocalPubSubThread, *, is_ordered: bool = False, **settings: Any) -> None:
        self.faults = server.faults
        self.admin = Admin(server.address)
        self.topic = self.admin.topic()
        self.subscription = self.admin.subscription(self.topic, enable_message_ordering=is_ordered)
        self.metrics = Metrics()
        sizes = PubSubSettings(emulator_host=server.address, **settings)
        self.subscriber = PubSubSubscriber(sync_channel(sizes, None), self.subscription, sizes, self.metrics)
        self.seen: list[bytes] = []
        self.changed = asyncio.Event()
        self.release = asyncio.Event()

    async def handle(self, message: ReceivedMessage) -> Settlement:
        """Hold on to `slow`, ack everything else at once."""
        self.seen.append(message.data)
        self.changed.set()
        if message.data == b"slow":
            await self.release.wait()
        if message.data == b"blocking":
            time.sleep(11.5)  # noqa: ASYNC251 - the point: the loop does not turn for longer than the ack deadline
        return Settlement.ACK

    async def until_seen(self, count: int) -> None:
        async with asyncio.timeout(30):
            while len(self.seen) < count:
                self.changed.clear()
                await self.changed.wait()

    def inspect(self) -> Any:
        return self.faults.inspect(self.subscription)


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A bench; its server ends with the test."""
    with LocalPubSubThread() as server:
        made = Bench(server)
        yield made
        made.admin.close()


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


async def test_a_lease_outlives_a_blocked_event_loop(bench: Bench) -> None:
    """Eleven seconds without a turn of the loop, over an ack deadline of ten: no second delivery."""
    task = asyncio.create_task(bench.subscriber.run(bench.handle))
    bench.admin.publish(bench.topic, b"blocking")
    await bench.until_seen(1)
    await bench.subscriber.drain(20)
    await task
    assert bench.seen == [b"blocking"]
    assert bench.inspect().acked_count == 1
    assert bench.inspect().expired_count == 0


async def test_a_broken_stream_is_reopened_silently(bench: Bench) -> None:
    """UNAVAILABLE and refused reopenings are the library's affair; nothing is lost or delivered twice."""
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
    assert bench.metrics.subscription_reopens_total.value == 0


async def test_a_lease_is_extended_by_a_minute_whatever_the_past(bench: Bench) -> None:
    """After slow acks the library would extend by up to ten minutes, for which a killed pod's messages stay away."""
    task = asyncio.create_task(bench.subscriber.run(bench.handle))
    bench.admin.publish(bench.topic, b"1")
    await bench.until_seen(1)
    (stream,) = bench.subscriber._streams
    manager = stream.future._StreamingPullFuture__manager
    for _ in range(200):
        manager.ack_histogram.add(300)
    assert manager.ack_deadline == LEASE_EXTENSION_S
    await bench.subscriber.drain(0)
    await task


@pytest.fixture
def narrow() -> Iterator[Bench]:
    """A bench whose subscriber takes ten deliveries at once."""
    with LocalPubSubThread() as server:
        made = Bench(server, max_in_flight=10)
        yield made
        made.admin.close()


async def until_leased(bench: Bench, count: int) -> None:
    """Wait until the server has leased out so many and none of them is on its way: the worker has all of them."""
    outstanding = bench.subscriber._outstanding
    await eventually(lambda: len(bench.inspect().leased) == count, what=f"{count} leased")
    await eventually(lambda: outstanding.messages + outstanding.on_hold()[0] == count, what=f"{count} received")


async def break_a_stream(bench: Bench) -> None:
    """Break the stream that is open, or the next: the library takes a moment to open another."""
    await eventually(lambda: bench.faults.break_streams(grpc.StatusCode.UNAVAILABLE) > 0, what="an open stream")


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


async def test_streams_that_break_in_a_long_outage_do_not_pile_up_deliveries(narrow: Bench) -> None:
    """Two streams' worth is held, ten handlers at once; the third stream waits, and afterwards everything goes on."""
    task = asyncio.create_task(narrow.subscriber.run(narrow.handle))
    for _ in range(40):
        narrow.admin.publish(narrow.topic, b"slow")
    await until_leased(narrow, 10)
    for _ in range(3):
        await break_a_stream(narrow)
        await until_leased(narrow, 20)
    assert len(narrow.seen) == 10
    assert narrow.metrics.registry.get_sample_value("inference_worker_leased_messages") == 20
    narrow.release.set()
    await narrow.until_seen(40)
    await narrow.subscriber.drain(5)
    await task
    found = narrow.inspect()
    assert (found.acked_count, found.delivered_count, found.expired_count) == (40, 40, 0)


async def test_a_stream_refused_while_it_is_kept_back_is_opened_again(narrow: Bench) -> None:
    """Whatever a server thinks of a stream that says nothing for hours, it does not end the worker."""
    task = asyncio.create_task(narrow.subscriber.run(narrow.handle))
    for _ in range(30):
        narrow.admin.publish(narrow.topic, b"slow")
    await until_leased(narrow, 10)
    narrow.faults.break_streams(grpc.StatusCode.DATA_LOSS)  # ends the library's stream: ours is the next
    await until_leased(narrow, 20)
    narrow.faults.fail("StreamingPull", grpc.StatusCode.INVALID_ARGUMENT, times=3)
    narrow.faults.break_streams(grpc.StatusCode.DATA_LOSS)
    await eventually(lambda: narrow.metrics.subscription_reopens_total.value >= 5)
    assert not task.done()
    narrow.release.set()
    await narrow.until_seen(30)
    await narrow.subscriber.drain(5)
    await task
    assert (narrow.inspect().acked_count, narrow.inspect().expired_count) == (30, 0)


async def test_what_waits_for_its_turn_is_handed_back_by_a_drain(narrow: Bench) -> None:
    """Deliveries of a second stream that no handler has begun come back at once, not after the grace."""
    task = asyncio.create_task(narrow.subscriber.run(narrow.handle))
    for _ in range(15):
        narrow.admin.publish(narrow.topic, b"slow")
    await until_leased(narrow, 10)
    narrow.faults.break_streams(grpc.StatusCode.UNAVAILABLE)
    await until_leased(narrow, 15)
    drain = asyncio.create_task(narrow.subscriber.drain(30))
    await until_leased(narrow, 10)
    narrow.release.set()
    await drain
    await task
    assert len(narrow.seen) == 10
    assert (narrow.inspect().acked_count, len(narrow.inspect().ready)) == (10, 5)


async def test_a_stream_that_is_kept_back_does_not_begin_at_its_end(narrow: Bench) -> None:
    """What a drain settles makes room, but nothing is delivered any more only to be nacked at the cost of an attempt."""
    task = asyncio.create_task(narrow.subscriber.run(narrow.handle))
    for _ in range(30):
        narrow.admin.publish(narrow.topic, b"slow")
    for leased in (10, 20):
        await until_leased(narrow, leased)
        narrow.faults.break_streams(grpc.StatusCode.UNAVAILABLE)
    await eventually(lambda: narrow.faults.calls("StreamingPull") == 3, what="the third stream, which is deferred")
    drain = asyncio.create_task(narrow.subscriber.drain(5))
    narrow.release.set()
    await drain
    await task
    assert (narrow.inspect().acked_count, narrow.inspect().delivered_count) == (10, 20)


async def test_what_waits_behind_its_ordering_key_counts_as_held() -> None:
    """Handlers run one a key, while the library keeps the rest of a stream's worth; the third stream waits for it."""
    with LocalPubSubThread() as server:
        bench = Bench(server, is_ordered=True, max_in_flight=10)
        task = asyncio.create_task(bench.subscriber.run(bench.handle))
        for key in "abcd":
            ten = [types.PubsubMessage(data=b"slow", ordering_key=key)] * 10
            bench.admin.publisher.transport.publish(types.PublishRequest(topic=bench.topic, messages=ten))
        await until_leased(bench, 10)
        for _ in range(3):
            await break_a_stream(bench)
            await until_leased(bench, 20)
        assert len(bench.seen) == 2
        bench.release.set()
        await bench.until_seen(40)
        await bench.subscriber.drain(5)
        await task
        bench.admin.close()
        assert (bench.inspect().acked_count, bench.inspect().delivered_count) == (40, 40)


@asynccontextmanager
async def a_broker_that_goes_away(**options: Any) -> AsyncIterator[PubSubSubscriber]:
    """Yield a subscriber with one delivery in its handler, whose broker has just gone."""
    with ChaosServer() as server:
        settings = PubSubSettings(emulator_host=server.address)
        admin = Admin(server.address)
        topic = admin.topic()
        subscription = admin.subscription(topic)
        subscriber = PubSubSubscriber(sync_channel(settings, None), subscription, settings, Metrics(), **options)
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
    """The nack cannot be sent, so the drain ends with its time for that and not with the client library's minute."""
    async with a_broker_that_goes_away(settle_s=1) as subscriber, asyncio.timeout(30):
        await subscriber.drain(0.1)


async def test_a_hurry_cuts_the_wait_for_the_last_acks() -> None:
    """A second SIGTERM while the broker is away ends what the first left a minute for."""
    async with a_broker_that_goes_away() as subscriber, asyncio.timeout(30):
        drain = asyncio.create_task(subscriber.drain(0.1))
        await eventually(lambda: subscriber._closing is not None)
        await subscriber.drain(0)
        await drain
