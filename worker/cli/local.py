"""
`inference-worker local`: everything on this machine in one process tree.

This process reads lines and writes answers.  Below it run, each as a process of its own, the embedded Pub/Sub server,
the worker (`run`, exactly as a container starts it) and, without `--backend-url`, the simulated backend.  A worker
that dies is started again, as Kubernetes would; what it had leased comes back by itself.  The children end with this
process, however it ends.
"""

import argparse
import asyncio
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, BinaryIO

from worker.brokers.broker import Broker
from worker.cli.children import Child, ChildError, WorkerChild
from worker.client import (
    COPY_ATTRIBUTES,
    AnswerHandler,
    ClientError,
    Drive,
    Summary,
    build_display,
    open_run,
    print_summary,
)
from worker.emulators.openai import SimOptions
from worker.errors import SettingsError
from worker.policy.engine import load_policy
from worker.ports import Settlement
from worker.settings.load import load_settings
from worker.settings.schema import PubSubSettings
from worker.telemetry.metrics import Metrics
from worker.wire.message import ReceivedMessage

PROJECT, REQUESTS, RESPONSES = "local", "requests", "responses"
ANSWERS_IN_FLIGHT = 1000
EXIT_INTERRUPTED = 130


def _open_log(path: str) -> BinaryIO:
    try:
        return Path(path).open("ab")
    except OSError as error:
        raise ChildError(f"{path}: {error.strerror}") from None


async def run_local(options: argparse.Namespace) -> int:
    """
    Answer every line of the input; return the exit code.

    Raises:
        SettingsError: The worker could not use its settings; nothing was started or written.
        WorkerError: Input, output or a child process failed; what was written stays and a further run goes on.

    Cancellation: Ctrl-C; stops everything and raises CancelledError after the summary.
    """
    _check(options)
    reader, resumed = open_run(options.input, options.output)
    async with AsyncExitStack() as stack:
        stack.callback(reader.close)
        stack.callback(resumed.writer.close)
        pubsub = Child("the embedded Pub/Sub server", "localpubsub", "--port", "0")
        stack.push_async_callback(pubsub.stop)
        process = await pubsub.start(stderr=asyncio.subprocess.PIPE)
        backend_url = options.backend_url
        if backend_url is None:
            backend_url = await _start_simulated_backend(stack, options)
        settings = PubSubSettings(
            project_id=PROJECT,
            emulator_host=await pubsub.read_address(process.stderr, "PUBSUB_EMULATOR_HOST"),
            request_subscription=RESPONSES,  # this side reads what the worker writes
            response_topic=REQUESTS,
            max_in_flight=ANSWERS_IN_FLIGHT,
        )
        broker = await Broker.connect(settings)
        stack.push_async_callback(broker.aclose)
        names = await broker.create_local(PROJECT, REQUESTS, RESPONSES)
        log = stack.enter_context(_open_log(options.log)) if options.log else None
        worker = WorkerChild(log, backend_url, *_worker_arguments(options, settings.emulator_host, backend_url))
        stack.push_async_callback(worker.stop)
        publisher = broker.publisher(names.request_topic)
        stack.push_async_callback(publisher.aclose)
        display = stack.enter_context(build_display(sys.stderr))
        run = Drive(
            reader,
            resumed.writer,
            publisher.publish,
            _Answers(broker),
            window=options.concurrency * 12,
            answered=resumed.answered,
            on_progress=display,
        )
        return await _drive(run, worker, display)


async def _drive(run: Drive, worker: WorkerChild, display: Any) -> int:
    supervised = asyncio.ensure_future(worker.supervise())
    driving = asyncio.ensure_future(run.run())
    summary: Summary | None = None
    try:
        await asyncio.wait({supervised, driving}, return_when=asyncio.FIRST_COMPLETED)
        if driving.done():
            summary = driving.result()
        else:
            supervised.result()  # raises: it ends only by failing
    finally:
        for task in (supervised, driving):
            task.cancel()
        await asyncio.gather(supervised, driving, return_exceptions=True)
        display.close()
        print_summary(summary or run.summary(), sys.stderr)
    return 0 if summary is not None and summary.is_complete else 1


class _Answers:
    """What arrives on the response topic; see `worker.client.ports.Answers`."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def __call__(self, handler: AnswerHandler) -> None:
        async def take(message: ReceivedMessage) -> Settlement:
            try:
                await handler(message.data, message.attributes, message.message_id)
            except ClientError:  # the run is ending and says why itself
                return Settlement.NACK
            return Settlement.ACK

        await self._broker.subscriber(Metrics()).run(take)


async def _start_simulated_backend(stack: AsyncExitStack, options: argparse.Namespace) -> str:
    backend = Child("the simulated backend", "simbackend", "--port", "0", "--latency", options.latency)
    stack.push_async_callback(backend.stop)
    process = await backend.start(stdout=asyncio.subprocess.PIPE)
    return (await backend.read_address(process.stdout, "http://")).removesuffix("/v1")


def _check(options: argparse.Namespace) -> None:
    """Find every fault here and now, instead of in a worker or a backend that does not start."""
    try:
        SimOptions.of(latency=options.latency)
    except ValueError as error:
        raise SettingsError([f"--{error}"]) from None
    anywhere = "127.0.0.1:1"
    flags = _worker_settings(options, anywhere, options.backend_url or f"http://{anywhere}")
    load_policy(load_settings(options.config, flags=flags).policy.rules)


def _worker_settings(options: argparse.Namespace, emulator_host: str | None, backend_url: str) -> dict[str, Any]:
    concurrency = options.concurrency
    return {
        "pubsub.project_id": PROJECT,
        "pubsub.emulator_host": emulator_host,
        "pubsub.request_subscription": REQUESTS,
        "pubsub.response_topic": RESPONSES,
        "pubsub.max_in_flight": concurrency * 3,
        "backend.base_url": backend_url,
        "backend.window.max": concurrency,
        "backend.window.initial": min(concurrency, 16),
        "reply.copy_attributes": f"[{', '.join(COPY_ATTRIBUTES)}]",
        "reply.include_stats": True,  # for `inference-worker report`
        "http.host": "127.0.0.1",
        "http.port": 0,
        "log.format": "json",
    }


def _worker_arguments(options: argparse.Namespace, emulator_host: str | None, backend_url: str) -> list[str]:
    arguments = ["run"] + (["--config", options.config] if options.config else [])
    for key, value in _worker_settings(options, emulator_host, backend_url).items():
        arguments += ["--set", f"{key}={value}"]
    return arguments
