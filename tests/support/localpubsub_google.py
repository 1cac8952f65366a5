"""The embedded server over real gRPC on the test's own loop, driven through Google's generated asyncio clients."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from google.pubsub_v1 import PublisherAsyncClient, SubscriberAsyncClient, types
from google.pubsub_v1.services.publisher.transports import PublisherGrpcAsyncIOTransport
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcAsyncIOTransport

from worker.emulators.pubsub import LocalPubSub, SubscriptionSnapshot

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
