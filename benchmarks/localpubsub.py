"""
How many messages a second pass through the embedded Pub/Sub server, and what one costs it in CPU.

The server runs in a process of its own; this process publishes batches over unary calls, receives over one
StreamingPull, and acks in batches.  Both sides use raw protobuf over grpc.aio, so that the client costs little.  Three
figures for each round: publishing alone, receiving and acking that backlog, and everything at once.

    python benchmarks/localpubsub.py [--messages 50000] [--size 1024] [--rounds 3]

A server CPU of 100 µs a message for publish + receive + ack is 10,000 messages/s on one core.
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
from google.pubsub_v1 import types

from worker.emulators.pubsub import LocalPubSub

TOPIC = "projects/bench/topics/bench"
SUBSCRIPTION = "projects/bench/subscriptions/bench"
BATCH = 100
PUBLISHES_IN_FLIGHT = 8
ACKS_PER_CALL = 500


async def serve() -> None:
    """Be the server: print the address, then answer every line on standard input with CPU seconds and RSS."""
    async with LocalPubSub() as server:
        print(server.address, flush=True)
        loop = asyncio.get_running_loop()
        while await loop.run_in_executor(None, sys.stdin.readline):
            print(f"{time.process_time()} {rss_mb()}", flush=True)


def rss_mb() -> float:
    """Return this process's resident memory in MB; 0 where there is no /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
    except FileNotFoundError:
        return 0.0


class Client:
    """The raw calls this benchmark needs."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    async def call(self, service: str, method: str, request: Any, response: Any = None) -> Any:
        data = await self._channel.unary_unary(f"/google.pubsub.v1.{service}/{method}", None, None)(
            request if isinstance(request, bytes) else request.SerializeToString()
        )
        return None if response is None else response.FromString(data)

    async def set_up(self) -> None:
        await self.call("Publisher", "CreateTopic", types.Topic.pb()(name=TOPIC))
        await self.call("Subscriber", "CreateSubscription", types.Subscription.pb()(name=SUBSCRIPTION, topic=TOPIC))

    async def tear_down(self) -> None:
        delete = types.DeleteSubscriptionRequest.pb()(subscription=SUBSCRIPTION)
        await self.call("Subscriber", "DeleteSubscription", delete)
        await self.call("Publisher", "DeleteTopic", types.DeleteTopicRequest.pb()(topic=TOPIC))

    async def publish(self, count: int, size: int) -> None:
        message = {"data": b"x" * size}
        batch = types.PublishRequest.pb(types.PublishRequest(topic=TOPIC, messages=[message] * BATCH))
        request = batch.SerializeToString()
        left = iter(range(count // BATCH))

        async def publisher() -> None:
            for _ in left:
                await self.call("Publisher", "Publish", request)

        await asyncio.gather(*(publisher() for _ in range(PUBLISHES_IN_FLIGHT)))

    async def receive(self, count: int) -> None:
        done = asyncio.Event()

        async def requests() -> AsyncIterator[bytes]:
            first = types.StreamingPullRequest.pb()(subscription=SUBSCRIPTION, stream_ack_deadline_seconds=60)
            yield first.SerializeToString()
            await done.wait()

        acks: list[asyncio.Task[Any]] = []
        pending: list[str] = []
        received = 0
        response_type = types.StreamingPullResponse.pb()
        stream = self._channel.stream_stream("/google.pubsub.v1.Subscriber/StreamingPull", None, None)(requests())
        async for data in stream:
            ack_ids = [item.ack_id for item in response_type.FromString(data).received_messages]
            received += len(ack_ids)
            pending += ack_ids
            while len(pending) >= ACKS_PER_CALL or (pending and received >= count):
                request = types.AcknowledgeRequest.pb()(subscription=SUBSCRIPTION, ack_ids=pending[:ACKS_PER_CALL])
                acks.append(asyncio.create_task(self.call("Subscriber", "Acknowledge", request)))
                del pending[:ACKS_PER_CALL]
            if received >= count:
                done.set()
        await asyncio.gather(*acks)


async def measure(arguments: argparse.Namespace) -> None:
    server = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--serve", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert server.stdin is not None
    assert server.stdout is not None
    stdin, stdout = server.stdin, server.stdout
    address = (await stdout.readline()).decode().strip()

    async def usage() -> tuple[float, float]:
        stdin.write(b"\n")
        cpu_s, megabytes = (await stdout.readline()).split()
        return float(cpu_s), float(megabytes)

    figures: dict[str, list[tuple[float, float]]] = {}

    async def timed(name: str, work: Any) -> None:
        cpu_before, _ = await usage()
        started = time.perf_counter()
        await work
        elapsed = time.perf_counter() - started
        cpu_after, megabytes = await usage()
        rate, cpu_us = arguments.messages / elapsed, (cpu_after - cpu_before) / arguments.messages * 1e6
        figures.setdefault(name, []).append((rate, cpu_us))
        print(f"  {name:24} {rate:9,.0f} messages/s   server {cpu_us:6.1f} µs CPU/message   RSS {megabytes:4.0f} MB")

    options = [("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        client = Client(channel)
        for number in range(1, arguments.rounds + 1):
            print(f"round {number}")
            await client.set_up()
            await timed("publish", client.publish(arguments.messages, arguments.size))
            await timed("receive + ack, backlog", client.receive(arguments.messages))
            both = asyncio.gather(
                client.publish(arguments.messages, arguments.size), client.receive(arguments.messages)
            )
            await timed("publish + receive + ack", both)
            await client.tear_down()
    print("medians")
    for name, rounds in figures.items():
        rate, cpu_us = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"  {name:24} {rate:9,.0f} messages/s   server {cpu_us:6.1f} µs CPU/message")
    stdin.close()
    await server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=50_000, help="in each phase; a multiple of 100")
    parser.add_argument("--size", type=int, default=1_024, help="bytes of data in each message")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    asyncio.run(serve() if arguments.serve else measure(arguments))


if __name__ == "__main__":
    main()
