"""
The start of a worker: from the start of the process to its first answer, in seconds and in seconds of its CPU.

Embedded Pub/Sub server and simulated backend run in processes of their own; the messages are published before.  A pull
waits for the first answers, and the kernel's count of the worker's CPU is read when it returns.  The floor is what
the interpreter takes to import the libraries that no start does without, and nothing of this program.  All of them find
byte code, as in the image and after an installation, whatever PYTHONDONTWRITEBYTECODE says.
`python -m benchmarks.start [--rounds N] [--against FOLDER]`.
"""

import argparse
import asyncio
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.pipeline import server
from tests.support.admin import Admin
from tests.support.rig import WorkerProcess
from worker.brokers.connection import Broker
from worker.settings.schema import PubSubSettings
from worker.wire.message import encode_request

MESSAGES = 64
BODY = b'{"model":"m","messages":[{"role":"user","content":"Hello"}]}'
FLOOR = {
    "interpreter": "pass",
    "asyncio": "import asyncio",
    "asyncio, gRPC, protobuf": "import grpc.aio, google.protobuf.message",
    "asyncio, gRPC, protobuf, a pydantic model": "import grpc.aio, google.protobuf.message, pydantic\n"
    "class Model(pydantic.BaseModel):\n    field: int = 0",
}
FIRST_ANSWER = "start to first answer"
HELP = "import sys, worker.__main__\nsys.argv[1:] = ['--help']\nworker.__main__.main()"


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process's threads so far, to the microsecond, unlike `/proc/PID/stat`."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def start_once(address: str, url: str, checkout: Path) -> tuple[float, float]:
    """Publish, start the worker of a checkout, and return the seconds and CPU seconds until its first answer."""
    admin = Admin(address)
    requests, responses = admin.topic("requests"), admin.topic("responses")
    pulled, answered = admin.subscription(requests), admin.subscription(responses)
    asyncio.run(_publish(address, requests))
    settings = {
        "pubsub.project_id": "bench",
        "pubsub.emulator_host": address,
        "pubsub.request_subscription": pulled,
        "pubsub.response_topic": responses,
        "backend.base_url": url,
        "http.host": "127.0.0.1",
        "http.port": 0,
    }
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        worker = WorkerProcess(
            Path(folder) / "worker.log",
            settings,
            {"PYTHONPATH": str(checkout)},
            command=[sys.executable, "-P", "-m", "worker", "run"],
        )
        try:
            answers = admin.pull(answered, MESSAGES, 30.0)
            seconds, cpu = time.perf_counter() - began, cpu_s(worker.process.pid)
            assert answers, worker.log_path.read_text()[-2000:]
            return seconds, cpu
        finally:
            worker.terminate()
            worker.wait(20)
            admin.close()


async def _publish(address: str, topic: str) -> None:
    broker = await Broker.connect(PubSubSettings(emulator_host=address, project_id="bench"))
    publisher = broker.publisher(topic)
    message = encode_request(path="/v1/chat/completions", body=BODY)
    await asyncio.gather(*(publisher.publish(message, {}) for _ in range(MESSAGES)))
    await publisher.aclose()
    await broker.aclose()


def floor_once(program: str) -> tuple[float, float]:
    """Return the seconds and CPU seconds of an interpreter that runs a program."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime


def main() -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout, in alternating rounds")
    options = parser.parse_args()
    checkouts = {FIRST_ANSWER: Path(__file__).parents[1]}
    if options.against is not None:
        checkouts[f"{FIRST_ANSWER}, {options.against.name}"] = options.against.resolve()
    with (
        tempfile.TemporaryDirectory() as byte_code,
        byte_code_in(byte_code),
        server("127.0.0.1", "localpubsub", "--port", "0") as address,
        server("http://", "simbackend", "--port", "0", "--zero-cost", "--latency", "0") as url,
    ):
        runs = {name: functools.partial(floor_once, program) for name, program in {**FLOOR, "--help": HELP}.items()}
        runs |= {name: functools.partial(start_once, address, url, folder) for name, folder in checkouts.items()}
        for run in runs.values():  # writes byte code, fills the system's caches
            run()
        rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for number in range(options.rounds):
            for name in runs if number % 2 == 0 else reversed(runs):
                rounds[name].append(runs[name]())
    print("| what | s | CPU s |")
    print("|---|---|---|")
    for name, figures in rounds.items():
        seconds, cpu = (statistics.median(column) for column in zip(*figures, strict=True))
        print(f"| {name} | {seconds:.2f} | {cpu:.2f} |")


@contextmanager
def byte_code_in(folder: str) -> Iterator[None]:
    """Have the interpreters that are started inside write byte code into a folder, and read it from there."""
    before = dict(os.environ)
    os.environ |= {"PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


if __name__ == "__main__":
    main()
