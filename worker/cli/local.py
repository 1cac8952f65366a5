"""
`inference-worker local`: answer a file on this machine, in one process tree.

This process reads lines and writes answers.  Below it run, each as a process of its own, the embedded Pub/Sub server,
the worker (`run`, exactly as a container starts it) and, without `--backend-url`, the simulated backend.  A worker
that dies is started again, as Kubernetes would; the broker redelivers its messages.  The children end with this
process, also when it is killed.
"""

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, BinaryIO

from worker.brokers.connection import Broker
from worker.cli.arguments import at_least_one
from worker.cli.exit_codes import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE
from worker.cli.loop import on_signals, run_loop
from worker.cli.parser import describe
from worker.client import (
    COPY_ATTRIBUTES,
    AnswerHandler,
    BatchRun,
    ClientError,
    Display,
    Summary,
    build_display,
    open_run,
    print_summary,
)
from worker.emulators.openai import SimOptions
from worker.errors import SettingsError, WorkerError
from worker.policy.engine import load_policy
from worker.ports import Settlement
from worker.settings.load import load_settings
from worker.settings.schema import PubSubSettings
from worker.telemetry.logs import configure_logs
from worker.telemetry.metrics import Metrics
from worker.wire.message import ReceivedMessage

PROJECT, REQUESTS, RESPONSES = "local", "requests", "responses"
ANSWERS_IN_FLIGHT = 1000
MAX_RESTARTS = 5
"""A worker that dies more often than this will not recover by a restart."""
STOP_S = 10.0


class ChildError(WorkerError):
    """A process of the tree ended unexpectedly; permanent for this run."""


class Child:
    """
    A child process, which ends when this process ends.

    Args:
        name: Name in messages.
        arguments: Arguments of `inference-worker`.
    """

    def __init__(self, name: str, *arguments: str) -> None:
        self.name = name
        self._arguments = arguments
        self.process: asyncio.subprocess.Process | None = None

    async def start(self, stdout: int | None = None, stderr: int | None = None) -> asyncio.subprocess.Process:
        """
        Start the process in its own session, so that Ctrl-C reaches this process alone.

        Cancellation: the process may have been started; it ends with this one.
        """
        command = [sys.executable, "-m", "worker", "--watch-stdin", *self._arguments]
        self.process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            limit=1 << 22,
        )
        return self.process

    async def read_address(self, stream: asyncio.StreamReader | None, mark: str) -> str:
        """
        Return the address in the first line of the process that contains `mark`.

        Raises:
            ChildError: The process ended before.

        Cancellation: lines may be lost.
        """
        assert stream is not None
        lines: list[str] = []
        while line := (await stream.readline()).decode("utf-8", "replace"):
            lines.append(line.rstrip())
            if mark in line:
                return next(word for word in line.replace(";", " ").split() if ":" in word and word[-1].isalnum())
        raise ChildError(f"{self.name} did not start: {' '.join(lines[-3:])}")

    async def stop(self) -> None:
        """Send SIGTERM, and SIGKILL after `STOP_S` seconds.  Cancellation: the process may still run."""
        if self.process is None or self.process.returncode is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_S):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


class WorkerChild(Child):
    """The worker: restarted when it dies; its log is kept on request, and each of its warnings is shown once."""

    def __init__(self, log: BinaryIO | None, backend_url: str, *arguments: str) -> None:
        super().__init__("the worker", *arguments)
        self._log = log
        self._backend_url = backend_url
        self._shown: set[tuple[str, str]] = set()

    async def supervise(self) -> None:
        """
        Run the worker until cancelled.

        Raises:
            ChildError: The worker cannot use its settings, or died too often.

        Cancellation: the process still runs; `stop` ends it.
        """
        for _ in range(MAX_RESTARTS):
            process = await self.start(stderr=asyncio.subprocess.PIPE)
            last = await self._follow(process.stderr)
            code = await process.wait()
            if code == EXIT_USAGE:
                raise ChildError(f"the worker cannot start: {last}")
            _say(f"the worker ended with {code}; restarting it")
        raise ChildError(f"the worker died {MAX_RESTARTS} times; its last message: {last}")

    async def _follow(self, stream: asyncio.StreamReader | None) -> str:
        """Read the log to its end; return the last line with a reason for the end."""
        assert stream is not None
        last = ""
        while line := await stream.readline():
            if self._log is not None:
                self._log.write(line)
            try:
                entry = json.loads(line)
            except ValueError:
                last = (last + " " if last.startswith("inference-worker:") else "") + line.decode(
                    "utf-8", "replace"
                ).strip()
                continue
            if entry.get("level") in {"warning", "error"}:
                last = entry.get("error") or entry["event"]
                self._show(entry)
        return last

    def _show(self, entry: Mapping[str, Any]) -> None:
        key = (entry["event"], str(entry.get("error_class")))
        if key not in self._shown and len(self._shown) < 20:  # noqa: PLR2004 - a hint, not a log
            self._shown.add(key)
            error = entry.get("error") or entry.get("reason") or ""
            where = self._backend_url if entry.get("backend") == "default" else entry.get("backend")
            details = ", ".join(filter(None, (entry.get("error_class"), where)))
            event = entry["event"].replace("_", " ")  # docs/operations.md has a sentence for each
            text = f"{entry['level']}: {event}{f': {error}' if error else ''}"
            _say(" ".join(f"{text}{f' ({details})' if details else ''}".split()))


def _say(text: str) -> None:
    sys.stderr.write(f"worker: {text}\n")
    sys.stderr.flush()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    describe(
        parser,
        "Answer a file of requests on this machine: embedded Pub/Sub, the worker, and a simulated model server or "
        "yours. A run that was interrupted or killed continues with the same command.",
        examples=[
            "inference-worker local requests.jsonl answers.jsonl",
            "inference-worker local in.jsonl out.jsonl --backend-url http://localhost:8000",
            "zcat in.jsonl.gz | inference-worker local - - > out.jsonl",
        ],
        exits={
            0: "every line has an answer",
            EXIT_FAILED: "lines without an answer; the same command continues",
            EXIT_USAGE: "settings or arguments cannot be used; every fault is named",
            EXIT_INTERRUPTED: "interrupted; the same command continues",
        },
    )
    parser.add_argument("input", metavar="INPUT", help="requests, one per line; - is standard input; .gz and .zst work")
    parser.add_argument("output", metavar="OUTPUT", help="answers, one per line; the same command continues a run")
    parser.add_argument("--backend-url", metavar="URL", help="your OpenAI-compatible server; default: a simulated one")
    parser.add_argument(
        "--concurrency", metavar="N", type=at_least_one, default=64, help="requests at once at most (64)"
    )
    parser.add_argument("--latency", default="50ms", help="of the simulated backend (50ms)")
    parser.add_argument("--config", metavar="FILE", help="settings of the worker")
    parser.add_argument("--log", metavar="FILE", help="append the worker's log to this file")


def run(namespace: argparse.Namespace) -> int:
    """Answer the file; return the exit code."""
    configure_logs("auto", "error")

    async def main() -> int:
        task = asyncio.ensure_future(run_local(namespace))
        on_signals(task.cancel)
        try:
            return await task
        except asyncio.CancelledError:
            print("interrupted; the same command continues this run", file=sys.stderr)
            return EXIT_INTERRUPTED

    return run_loop(main)


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
        WorkerError: Input, output or a child process failed; the written answers stay, and the same command continues.

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
            request_subscription=RESPONSES,  # this process reads the topic that the worker writes
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
        run = BatchRun(
            reader,
            resumed.writer,
            publisher.publish,
            _Answers(broker),
            window=options.concurrency * 12,
            answered=resumed.answered,
            on_progress=display,
        )
        return await _run_beside(worker, run, display)


async def _run_beside(worker: WorkerChild, run: BatchRun, display: Display) -> int:
    supervised = asyncio.ensure_future(worker.supervise())
    answering = asyncio.ensure_future(run.run())
    summary: Summary | None = None
    try:
        await asyncio.wait({supervised, answering}, return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            summary = answering.result()
        else:
            supervised.result()  # raises: `supervise` never returns
    finally:
        for task in (supervised, answering):
            task.cancel()
        await asyncio.gather(supervised, answering, return_exceptions=True)
        display.close()
        print_summary(summary or run.summary(), sys.stderr)
    return 0 if summary is not None and summary.is_complete else 1


class _Answers:
    """The messages of the response topic; see `worker.client.ports.Answers`."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def __call__(self, handler: AnswerHandler) -> None:
        async def take(message: ReceivedMessage) -> Settlement:
            try:
                await handler(message.data, message.attributes, message.message_id)
            except ClientError:  # the run is ending and reports the reason itself
                return Settlement.NACK
            return Settlement.ACK

        await self._broker.subscriber(Metrics()).run(take)


async def _start_simulated_backend(stack: AsyncExitStack, options: argparse.Namespace) -> str:
    backend = Child("the simulated backend", "simbackend", "--port", "0", "--latency", options.latency)
    stack.push_async_callback(backend.stop)
    process = await backend.start(stdout=asyncio.subprocess.PIPE)
    return (await backend.read_address(process.stdout, "http://")).removesuffix("/v1")


def _check(options: argparse.Namespace) -> None:
    """Find every fault of the options and settings before a process is started."""
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
