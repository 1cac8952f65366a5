"""
The whole pipeline: 20,000 messages through `inference-worker run`, every part in a process of its own.

Embedded Pub/Sub server, simulated backend without latency (`--zero-cost`), one worker, and this process, which
publishes beforehand and counts answers.  Measured between the first and the last answer: messages/s; CPU of the worker
process by the kernel's count; its resident memory at the end.
`python -m benchmarks.pipeline [--messages N] [--window N] [--body-bytes N]`.
"""

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from google.pubsub_v1 import types

from tests.support.admin import Admin
from tests.support.rig import WorkerProcess
from worker.brokers.connection import Broker
from worker.settings.schema import PubSubSettings
from worker.wire.message import encode_request

DEFAULT_BODY_BYTES = 950


def body_of(size: int) -> bytes:
    """Return the body of a request of about this many bytes."""
    frame = b'{"model":"m","messages":[{"role":"user","content":"%s"}]}'
    return frame % (b"a" * max(0, size - len(frame)))


_Pull, _Pulled = types.PullRequest.pb(), types.PullResponse.pb()
_Ack = types.AcknowledgeRequest.pb()


@dataclass(frozen=True)
class Figures:
    """One round."""

    messages_per_s: float
    cpu_ms: float
    """Of the worker, per message."""
    rss_mb: float
    start_s: float
    """From the start of the process to the first answer."""


@contextmanager
def server(mark: str, *arguments: str) -> Iterator[str]:
    """Run a server of ours; yield the word of its first line that holds the mark."""
    command = [sys.executable, "-m", "worker", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        words = [word for word in line.replace(";", " ").split() if mark in word]
        assert words, line
        yield words[0].removesuffix("/v1")
    finally:
        process.terminate()
        process.wait(10)


def cpu_s(pid: int) -> float:
    """Return the CPU seconds a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def rss_mb(pid: int) -> float:
    """Return a process's resident memory."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


async def _publish(broker: Broker, topic: str, count: int, body: bytes) -> None:
    publisher = broker.publisher(topic)
    at_once = max(20, min(2000, 20_000_000 // len(body)))
    for start in range(0, count, at_once):
        await asyncio.gather(
            *(
                publisher.publish(
                    encode_request(path="/v1/chat/completions", body=body, metadata=b'{"i":%d}' % index), {}
                )
                for index in range(start, min(start + at_once, count))
            )
        )
    await publisher.aclose()


async def _count(admin: Admin, subscription: str, wanted: int, worker: WorkerProcess, window: int) -> Figures:
    """Count answers by raw pulls, which cost this process next to nothing."""
    started = time.monotonic()
    seen: set[str] = set()
    first_at, first_cpu, first_count = None, 0.0, 0
    while len(seen) < wanted:
        assert worker.process.poll() is None, worker.log_path.read_text()[-1000:]
        batch = await asyncio.to_thread(admin.pull, subscription, 1000, 10.0)
        seen.update(item.message.attributes["request_message_id"] for item in batch)
        if batch:
            ids = [item.ack_id for item in batch]
            await asyncio.to_thread(
                admin.subscriber.acknowledge, request={"subscription": subscription, "ack_ids": ids}
            )
        if first_at is None and len(seen) >= window:
            first_at, first_cpu, first_count = time.monotonic(), cpu_s(worker.process.pid), len(seen)
        await asyncio.sleep(0.05)
    assert first_at is not None
    elapsed, done = time.monotonic() - first_at, wanted - first_count
    pid = worker.process.pid
    return Figures(done / elapsed, (cpu_s(pid) - first_cpu) / done * 1000, rss_mb(pid), first_at - started)


async def measure(messages: int, window: int, body_bytes: int = DEFAULT_BODY_BYTES) -> Figures:
    """Run one round."""
    with (
        server("127.0.0.1", "localpubsub", "--port", "0") as address,
        server("http://", "simbackend", "--port", "0", "--zero-cost", "--latency", "0") as url,
        tempfile.TemporaryDirectory() as folder,
    ):
        admin = Admin(address)
        requests, responses = admin.topic("requests"), admin.topic("responses")
        pulled, answered = admin.subscription(requests, ack_deadline_seconds=60), admin.subscription(responses)
        broker = await Broker.connect(PubSubSettings(emulator_host=address, project_id="bench"))
        await _publish(broker, requests, messages, body_of(body_bytes))
        settings = {
            "pubsub.project_id": "bench",
            "pubsub.emulator_host": address,
            "pubsub.request_subscription": pulled,
            "pubsub.response_topic": responses,
            "pubsub.max_in_flight": window * 3,
            "backend.base_url": url,
            "backend.window.initial": window,
            "backend.window.max": window,
            "http.host": "127.0.0.1",
            "http.port": 0,
        }
        worker = WorkerProcess(Path(folder) / "worker.log", settings)
        try:
            return await _count(admin, answered, messages, worker, window)
        finally:
            worker.terminate()
            worker.wait(20)
            await broker.aclose()
            admin.close()


def main() -> None:
    """Print the median of the rounds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline")
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--body-bytes", type=int, default=DEFAULT_BODY_BYTES, help="of each request")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rounds = [asyncio.run(measure(options.messages, options.window, options.body_bytes)) for _ in range(options.rounds)]
    print("| messages | bytes | in flight | messages/s | CPU s per 1,000 | RSS MB | start to first answers s |")
    print("|---|---|---|---|---|---|---|")
    median = [statistics.median(getattr(each, name) for each in rounds) for name in Figures.__dataclass_fields__]
    rate, cpu, memory, start = median
    run = f"{options.messages} | {options.body_bytes} | {options.window}"
    print(f"| {run} | {rate:,.0f} | {cpu:.3f} | {memory:.0f} | {start:.1f} |")


if __name__ == "__main__":
    main()
