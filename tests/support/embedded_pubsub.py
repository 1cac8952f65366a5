"""The embedded Pub/Sub server: over real gRPC on the test's own loop, and its engine on a clock that a test moves."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from google.pubsub_v1 import PublisherAsyncClient, SubscriberAsyncClient, types
from google.pubsub_v1.services.publisher.transports import PublisherGrpcAsyncIOTransport
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcAsyncIOTransport

from worker.emulators.pubsub import LocalPubSub, SubscriptionSnapshot
from worker.emulators.pubsub.broker import Broker
from worker.emulators.pubsub.clock import Clock
from worker.emulators.pubsub.deliveries import DeliveryPolicy, Receiver
from worker.emulators.pubsub.messages import StoredMessage, store
from worker.emulators.pubsub.subscription import Subscription

TOPIC = "projects/any/topics/requests"
SUBSCRIPTION = "projects/any/subscriptions/requests-worker"
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class Google:
    """Both generated clients on one channel, and the server they talk to."""

    def __init__(self, channel: grpc.aio.Channel, server: LocalPubSub) -> None:
        self.server = server
        self.faults = server.faults
        self.publisher = PublisherAsyncClient(transport=PublisherGrpcAsyncIOTransport(channel=channel))
        self.subscriber = SubscriberAsyncClient(transport=SubscriberGrpcAsyncIOTransport(channel=channel))

    @property
    def state(self) -> SubscriptionSnapshot:
        """The state of the subscription now."""
        return self.faults.inspect(SUBSCRIPTION)

    async def set_up(self, **subscription: Any) -> None:
        await self.publisher.create_topic(name=TOPIC)
        await self.subscriber.create_subscription(request={"name": SUBSCRIPTION, "topic": TOPIC, **subscription})

    async def publish(self, *data: bytes, **fields: Any) -> list[str]:
        messages = [{"data": item, **fields} for item in data]
        answer = await self.publisher.publish(request={"topic": TOPIC, "messages": messages}, retry=None, timeout=10)
        return list(answer.message_ids)

    async def pull(self, count: int = 1_000, deadline_s: float = 10.0) -> list[types.ReceivedMessage]:
        request = {"subscription": SUBSCRIPTION, "max_messages": count}
        return list((await self.subscriber.pull(request=request, retry=None, timeout=deadline_s)).received_messages)

    async def nack(self, *ack_ids: str) -> None:
        await self.subscriber.modify_ack_deadline(
            subscription=SUBSCRIPTION, ack_ids=ack_ids, ack_deadline_seconds=0, retry=None
        )

    async def ack(self, *ack_ids: str) -> None:
        await self.subscriber.acknowledge(subscription=SUBSCRIPTION, ack_ids=ack_ids, retry=None)


class Stream:
    """An open stream that remembers the error it was ended with."""

    def __init__(self, google: Google) -> None:
        self._google = google
        self._requests: asyncio.Queue[types.StreamingPullRequest | None] = asyncio.Queue()
        self._call: Any = None

    async def open(self, **first: Any) -> "Stream":
        self.send(**{"subscription": SUBSCRIPTION, "stream_ack_deadline_seconds": 60, **first})
        self._call = await self._google.subscriber.streaming_pull(requests=self._outgoing(), retry=None)
        return self

    async def _outgoing(self) -> AsyncIterator[types.StreamingPullRequest]:
        while (request := await self._requests.get()) is not None:
            yield request

    def send(self, **fields: Any) -> None:
        self._requests.put_nowait(types.StreamingPullRequest(**fields))

    def half_close(self) -> None:
        self._requests.put_nowait(None)

    async def next(self) -> types.StreamingPullResponse | None:
        """The next response, or `None` at the end of the stream."""
        async with asyncio.timeout(10):
            try:
                return await anext(aiter(self._call))
            except StopAsyncIteration:
                return None

    async def receive(self, count: int) -> list[types.ReceivedMessage]:
        received: list[types.ReceivedMessage] = []
        while len(received) < count:
            response = await self.next()
            assert response is not None
            received += response.received_messages
        assert len(received) == count
        return received

    def cancel(self) -> None:
        self._call.cancel()


@asynccontextmanager
async def running() -> AsyncIterator[Google]:
    """A server, and clients whose channel takes messages of any size."""
    async with LocalPubSub() as server, grpc.aio.insecure_channel(server.address, options=UNLIMITED) as channel:
        yield Google(channel, server)


START = 1_000.0
EPOCH_S = 1_700_000_000.0
NO_LIMIT = 1 << 40


class FakeTime:
    """A clock that only tests move."""

    def __init__(self) -> None:
        self.passed_s = 0.0
        self.clock = Clock(lambda: START + self.passed_s, lambda: EPOCH_S + self.passed_s)

    def sleep(self, seconds: float) -> None:
        self.passed_s += seconds


class Bench:
    """One subscription with everything a test needs to drive it."""

    def __init__(self, **policy: Any) -> None:
        self.time = FakeTime()
        self.forwarded: list[tuple[str, int]] = []
        self.has_dead_letter_topic = True
        self.announced: list[float] = []
        self._sequence = 0
        self.subscription = Subscription(
            DeliveryPolicy(**policy),
            self.time.clock,
            ack_id_prefix="ours-1-",
            on_due=self.announced.append,
            forward=self._forward,
        )

    def _forward(self, message: StoredMessage, count: int) -> bool:
        if self.has_dead_letter_topic:
            self.forwarded.append((message.message_id, count))
        return self.has_dead_letter_topic

    def publish(self, count: int = 1, *, key: str = "", size: int = 1, **attributes: str) -> list[str]:
        """Publish messages and return their ids: "1", "2" and so on."""
        messages = []
        for _ in range(count):
            self._sequence += 1
            message = types.PubsubMessage.pb()(data=b"x" * size, ordering_key=key, attributes=attributes)
            messages.append(store(message, self._sequence, self.time.clock.now_ns()))
        self.subscription.enqueue(messages)
        return [message.message_id for message in messages]

    def receiver(self, **options: Any) -> "BenchReceiver":
        return BenchReceiver(self, **options)


class BenchReceiver(Receiver):
    """An attached receiver that remembers its wake-ups and the last ack id of each message."""

    def __init__(self, bench: Bench, **options: Any) -> None:
        self._bench = bench
        self.wakes = 0
        super().__init__(self._count_wake, **options)
        self.ack_ids: dict[str, str] = {}
        self.attempts: dict[str, int] = {}
        bench.subscription.attach(self)

    def _count_wake(self) -> None:
        self.wakes += 1

    def take(self, count: int = 1_000, max_bytes: int = NO_LIMIT) -> list[str]:
        """Lease up to `count` messages and return their ids in the order received."""
        taken = self._bench.subscription.take(self, count, max_bytes)
        for ack_id, message, attempt in taken:
            self.ack_ids[message.message_id] = ack_id
            self.attempts[message.message_id] = attempt
        return [message.message_id for _, message, _ in taken]

    def ack(self, *message_ids: str) -> list[str]:
        return self._bench.subscription.acknowledge([self.ack_ids[message_id] for message_id in message_ids])

    def nack(self, *message_ids: str) -> list[str]:
        return self.modify(0, *message_ids)

    def modify(self, seconds: float, *message_ids: str) -> list[str]:
        ack_ids = [self.ack_ids[message_id] for message_id in message_ids]
        return self._bench.subscription.modify_ack_deadline(ack_ids, seconds)

    def leave(self) -> None:
        self._bench.subscription.detach(self)


class BrokerBench:
    """A broker with a topic `topic-a`, driven through protobuf resources as the API drives it."""

    topic = "projects/p/topics/topic-a"

    def __init__(self) -> None:
        self.time = FakeTime()
        self.due = math.inf
        self.broker = Broker(self.time.clock, self._on_due)
        self.broker.create_topic(types.Topic.pb()(name=self.topic))

    def _on_due(self, at: float) -> None:
        self.due = min(self.due, at)

    def subscribe(self, name: str = "sub-a", **fields: Any) -> str:
        """Create a subscription on the topic and return its path; fields as in the API, durations in seconds."""
        path = f"projects/p/subscriptions/{name}"
        fields = {"topic": self.topic, **fields}
        self.broker.create_subscription(types.Subscription.pb(types.Subscription(name=path, **fields)))
        return path

    def publish(self, *data: bytes, topic: str | None = None, **fields: Any) -> list[str]:
        messages = [types.PubsubMessage.pb()(data=item, **fields) for item in data]
        return self.broker.publish(topic or self.topic, messages)

    def pull(self, path: str, count: int = 1_000) -> list[tuple[str, Any, int]]:
        """Lease messages; returns ack id, the message as a client parses it, and the delivery attempt."""
        taken = self.broker.subscription(path).take(Receiver(lambda: None), count, NO_LIMIT)
        return [
            (ack_id, types.PubsubMessage.pb().FromString(stored.body + stored.stamp), attempt)
            for ack_id, stored, attempt in taken
        ]
