"""
`inference-worker local`: answer a file on this machine, in one process tree.

This process reads lines and writes answers.  Below it run, each as a process of its own, the embedded Pub/Sub server,
the worker (`run`, exactly as a container starts it) and, without a server of the user's, the simulated backend.  A
worker that dies is started again, as Kubernetes would; the broker redelivers its messages.  The children end with this
process, also when it is killed.

Before any of them starts, every line and the server are looked at (`worker.client.check`, `preflight`), so that a wrong
file, address, key or model is told at once.  The first Ctrl-C has the worker drain: it finishes the requests that are
at the server, and their answers are written.  The second one ends everything.
"""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from worker.brokers.connection import Broker
from worker.cli.arguments import at_least_one, share
from worker.cli.children import Child, ChildError, WorkerChild
from worker.cli.exit_codes import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE
from worker.cli.inputs import add_input, input_of
from worker.cli.loop import Interrupts, run_interruptible
from worker.cli.parser import describe
from worker.cli.preflight import PreflightError, ask, missing
from worker.cli.preflight import describe as describe_server
from worker.cli.receive import END, ReceivedAnswers
from worker.cli.retryable import ALL, RETRYABLE, error_classes
from worker.cli.target import PROJECT, REQUESTS, RESPONSES, Target, find_target, simulated_backend
from worker.client import (
    BatchRun,
    Display,
    InputCount,
    Summary,
    build_display,
    print_summary,
)
from worker.client.check import CheckedLines, CheckResult, LineCheck, ModelUse, OutputMatch, check_lines
from worker.client.first_answers import FIRST_ANSWERS, SAME_SHARE, FirstAnswers, SameErrorsError
from worker.client.io.blocking import BlockingThread
from worker.client.io.files import STANDARD, check_creatable
from worker.client.ports import LineSource
from worker.client.report.sample import read_sample
from worker.client.resume import AnsweredLines, Resumed, drop_answers, refuse_same_file, resume_output
from worker.client.summary import ErrorExample, say
from worker.errors import SettingsError
from worker.settings.schema import PubSubSettings, refuse_own_headers
from worker.telemetry.logs import configure_logs

ANSWERS_IN_FLIGHT = 1000
CHECK_SHOWN_S = 2.0
"""A check of the input that takes longer than this shows how far it is."""


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise argparse.ArgumentTypeError("must be NAME:VALUE")
    try:
        refuse_own_headers([name.strip()])
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; a key goes into --api-key-file or OPENAI_API_KEY") from None
    return name.strip(), value.strip()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    describe(
        parser,
        "Answer a file of requests on this machine: embedded Pub/Sub, the worker, and a simulated model server or "
        "yours. A run that was interrupted or killed continues with the same command; a line of the input that has an "
        "answer is not asked again.",
        examples=[
            "inference-worker local requests.jsonl answers.jsonl",
            "inference-worker local in.jsonl out.jsonl --backend-url http://localhost:8000",
            "zcat in.jsonl.gz | inference-worker local - - > out.jsonl",
        ],
        exits={
            0: "every line has an answer, which may be an error",
            EXIT_FAILED: "lines without an answer: the input, the output or the server is wrong",
            EXIT_USAGE: "settings or arguments cannot be used; every fault is named",
            EXIT_INTERRUPTED: "interrupted; the same command continues",
        },
    )
    add_input(parser)
    parser.add_argument("output", metavar="OUTPUT", help="answers, one per line; - is standard output")
    server = parser.add_argument_group("the model server")
    place = server.add_mutually_exclusive_group()
    place.add_argument(
        "--backend-url",
        metavar="URL",
        help="an OpenAI-compatible server (default: that of --config, OPENAI_BASE_URL, or else a simulated one)",
    )
    place.add_argument("--simulated", action="store_true", help="the simulated server, whatever else is set")
    server.add_argument("--latency", metavar="T", help="of the simulated server (50ms)")
    server.add_argument("--engine", metavar="NAME", help="of the simulated server: an engine to be as fast as (none)")
    server.add_argument(
        "--api-key-file", metavar="FILE", help="file with the server's key (default: the variable OPENAI_API_KEY)"
    )
    server.add_argument(
        "--header",
        metavar="NAME:VALUE",
        action="append",
        default=[],
        type=_header,
        help="sent with every request; may be repeated",
    )
    server.add_argument("--model", metavar="NAME", help="ask for this model, whatever the lines say")
    parser.add_argument(
        "--concurrency", metavar="N", type=at_least_one, default=64, help="requests at once at most (64)"
    )
    parser.add_argument(
        "--retry-errors",
        metavar="CLASS,...",
        nargs="?",
        const=RETRYABLE,
        type=error_classes,
        help="first take errors out of OUTPUT, so that their lines are asked again: those of these classes, `all`, or "
        "without a value those that may succeed when repeated",
    )
    parser.add_argument(
        "--replace-changed",
        action="store_true",
        help="first take answers to lines out of OUTPUT that INPUT does not have (any more)",
    )
    parser.add_argument("--config", metavar="FILE", help="settings of the worker")
    parser.add_argument("--log", metavar="FILE", help="append the worker's log to this file")
    parser.add_argument(
        "--stop-after",
        metavar="N",
        type=at_least_one,
        default=FIRST_ANSWERS,
        help=f"stop, with nothing written, if the first N answers are the same error ({FIRST_ANSWERS})",
    )
    parser.add_argument(
        "--stop-share",
        metavar="SHARE",
        type=share,
        default=SAME_SHARE,
        help=f"how many of them must be the same, above 0 and up to 1 ({SAME_SHARE:g})",
    )
    parser.add_argument(
        "--keep-going",
        action="store_true",
        help="start although the server refuses or cannot be reached, and write the answers although the first ones "
        "are all the same error",
    )


def run(namespace: argparse.Namespace) -> int:
    """Answer the file; return the exit code."""
    configure_logs("auto", "error")

    return run_interruptible(
        lambda interrupts: run_local(namespace, interrupts),
        lambda: say("interrupted; the same command continues this run"),
    )


async def look_at_server(target: Target, asked_for: Mapping[str, ModelUse], *, is_required: bool) -> None:
    """
    Ask every route's server for its models and say what it has.

    Args:
        target: The servers.
        asked_for: Models that the lines ask for.
        is_required: A server that would answer nothing ends the command.

    Raises:
        PreflightError: A server refuses, redirects or cannot be reached.

    Cancellation: leaves nothing behind.
    """
    if target.is_simulated:
        say("server: simulated; --backend-url names a real one")
        return
    try:
        servers = [await ask(each) for route in target.settings.all_routes() for each in route.targets()]
    except PreflightError as error:
        if is_required:
            raise PreflightError(f"{error}; --keep-going starts all the same") from None
        say(f"warning: {error}")
        return
    for server in servers:
        say(describe_server(server) + (f" (from {target.remark})" if target.remark else ""))
    for warning in missing(servers, asked_for):
        say(warning)


def _asked_for(options: argparse.Namespace, check: CheckResult | None) -> Mapping[str, ModelUse]:
    if check is None:
        return {}
    return {options.model: ModelUse(count=check.lines, first=1)} if options.model else check.models


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """The input of a run, and what the output has of it."""

    reader: LineSource
    answered: Resumed | None
    """The output; `None` while there is none."""
    check: CheckResult | None = None
    """`None` for a pipe."""
    known: InputCount | None = None
    """As above."""


async def open_run(options: argparse.Namespace, stack: AsyncExitStack) -> Input:
    """
    Open the input, read an output that is there, and look at every line of an input that is no pipe.

    Args:
        options: Of the command.
        stack: Closes them.

    Raises:
        InputError: The input cannot be opened or used; permanent.
        OutputError: The output cannot be continued, is the input, or belongs to another one; permanent.

    Cancellation: as after a failure.
    """
    opened = input_of(options)
    reader = opened()
    stack.callback(reader.close)
    refuse_same_file(options.input, options.output)
    has_output = os.path.exists(options.output)  # noqa: ASYNC240, PTH110
    if not has_output and options.output != STANDARD:
        check_creatable(options.output)
    resumed = open_output(options.output, stack) if has_output else None
    answered = resumed.answered if resumed else AnsweredLines()
    check = LineCheck()
    match = OutputMatch(_name(options.input), options.output, answered, keeps_changed=options.replace_changed)
    stack.callback(check.close)
    if reader.bytes_total is None:
        if options.replace_changed or options.retry_errors:
            raise SettingsError(["--retry-errors and --replace-changed need a file as input: it is looked at before"])
        return Input(reader=CheckedLines(reader, check, match), answered=resumed)
    looking = opened()
    stack.callback(looking.close)
    thread = BlockingThread("check")
    stack.callback(thread.close)
    known = await thread.call(check_lines, looking, check, match, _CheckDisplay(options.input))
    if resumed is not None and (options.replace_changed or options.retry_errors):
        resumed.writer.close()
        dropped = await thread.call(drop_answers, options.output, _is_asked_again(options, match.ids))
        resumed = open_output(options.output, stack)
        known = replace(known, answered=len(resumed.answered))
        if dropped:
            say(f"output: {dropped:,} answers were taken out of {options.output}; their lines are asked again")
    return Input(reader=reader, answered=resumed, check=check.result, known=known)


def _is_asked_again(options: argparse.Namespace, ids: AnsweredLines) -> Callable[[str, bytes], bool]:
    """Return whether an answer in the output goes, as `--replace-changed` and `--retry-errors` say."""
    classes: tuple[str, ...] = options.retry_errors or ()

    def is_asked_again(line_id: str, line: bytes) -> bool:
        if options.replace_changed and line_id not in ids:
            return True
        sample = read_sample(line) if classes else None
        return sample is not None and sample.is_error and (classes == ALL or sample.error_class in classes)

    return is_asked_again


def open_output(path: str, stack: AsyncExitStack) -> Resumed:
    """
    Open the output; a missing one is made, so that this comes after everything that may be wrong.

    Raises:
        OutputError: It cannot be opened or continued; permanent.
    """
    resumed = resume_output(path)
    stack.callback(resumed.writer.close)
    return resumed


def _name(path: str) -> str:
    return "standard input" if path == STANDARD else path


class _CheckDisplay:
    """Says how far the check of a large input is."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._due = time.monotonic() + CHECK_SHOWN_S

    def __call__(self, reader: LineSource) -> None:
        if time.monotonic() >= self._due and reader.bytes_total:
            self._due = time.monotonic() + CHECK_SHOWN_S
            share = 100 * reader.bytes_read // reader.bytes_total
            say(f"checking {self._name}: {reader.lines_read:,} lines ({share} %)")


def _tell_input(name: str, check: CheckResult, known: InputCount) -> None:
    text = f"input: {name}; {known.lines:,} lines"
    if known.answered:
        text += f", {known.answered:,} of them answered before"
    if check.bad and known.answered < known.lines:
        text += f"; {check.bad:,} are no requests and get an error ({check.faults[0]})"
    say(text)


async def run_local(options: argparse.Namespace, interrupts: Interrupts) -> int:
    """
    Answer every line of the input; return the exit code.

    Raises:
        SettingsError: The worker could not use its settings; nothing was started or written.
        WorkerError: Input, output, server or a child process failed; the written answers stay, and the same command
            continues.

    Cancellation: Ctrl-C; stops everything and raises CancelledError after the summary.
    """
    target = find_target(options)
    async with AsyncExitStack() as stack:
        log = stack.enter_context(_open_log(options.log)) if options.log else None
        opened = await open_run(options, stack)
        if opened.check is not None and opened.known is not None:
            _tell_input(_name(options.input), opened.check, opened.known)
            if opened.answered is not None and opened.known.answered == opened.known.lines:
                say("nothing to answer")
                return 0
        await look_at_server(target, _asked_for(options, opened.check), is_required=not options.keep_going)
        resumed = opened.answered or open_output(options.output, stack)
        pubsub = Child("the embedded Pub/Sub server", "localpubsub", "--port", "0")
        stack.push_async_callback(pubsub.stop)
        process = await pubsub.start(stderr=asyncio.subprocess.PIPE)
        flags = dict(target.flags)
        if target.is_simulated:
            flags["backend.base_url"] = await _start_simulated_backend(stack, options)
        flags["pubsub.emulator_host"] = await pubsub.read_address(process.stderr, "PUBSUB_EMULATOR_HOST")
        settings = PubSubSettings(
            project_id=PROJECT,
            emulator_host=flags["pubsub.emulator_host"],
            request_subscription=RESPONSES,  # this process reads the topic that the worker writes
            response_topic=REQUESTS,
            max_in_flight=ANSWERS_IN_FLIGHT,
        )
        broker = await Broker.connect(settings)
        stack.push_async_callback(broker.aclose)
        names = await broker.create_local(PROJECT, REQUESTS, RESPONSES)
        publisher, ending = broker.publisher(names.request_topic), broker.publisher(RESPONSES)
        stack.push_async_callback(publisher.aclose)
        stack.push_async_callback(ending.aclose)
        display = stack.enter_context(build_display(sys.stderr))
        answers = ReceivedAnswers(broker)
        urls = {each.name: each.base_url for route in target.settings.all_routes() for each in route.targets()}
        if target.is_simulated:
            urls = {"default": flags["backend.base_url"]}
        run = BatchRun(
            opened.reader,
            resumed.writer,
            publisher.publish,
            answers,
            window=options.concurrency * 12,
            answered=resumed.answered,
            known=opened.known,
            urls=urls,
            model=options.model,
            first_answers=None if options.keep_going else FirstAnswers(options.stop_after, options.stop_share),
            on_progress=display,
            on_error=lambda name, example: display.say(_error_line(name, example)),
        )
        worker = WorkerChild(
            log,
            urls.get("default", ""),
            display.say,
            lambda: not options.keep_going and not run.progress().answered,
            *_worker_arguments(options, flags),
            environ=target.environ,
        )
        stack.push_async_callback(worker.stop)

        def drain() -> None:
            display.say(
                f"interrupted: waiting for the requests at the server, {options.concurrency} at most, to keep their "
                "answers; Ctrl-C again ends at once"
            )
            run.stop_reading()
            worker.drain()

        interrupts.drain = drain

        async def end() -> None:
            await ending.publish(b"{}", {END: "1"})
            await answers.ended.wait()

        summary = await _run_beside(worker, run, display, end)
        if interrupts.has_come and not summary.is_complete:
            raise asyncio.CancelledError
        return 0 if summary.is_complete else EXIT_FAILED


def _error_line(error_class: str, example: ErrorExample) -> str:
    return f"error {error_class}, {example}"


async def _run_beside(
    worker: WorkerChild, run: BatchRun, display: Display, end: Callable[[], Awaitable[None]]
) -> Summary:
    """Run both until every line is answered, or the worker has drained; print the summary in any case."""

    async def supervise() -> None:
        await worker.supervise()
        await end()
        run.stop()

    supervised, answering = asyncio.ensure_future(supervise()), asyncio.ensure_future(run.run())
    try:
        await asyncio.wait({supervised, answering}, return_when=asyncio.FIRST_COMPLETED)
        if supervised.done():
            supervised.result()
        return await answering
    except SameErrorsError as error:
        raise ChildError(
            f"{error}. Correct the command (--backend-url, --model, --api-key-file) and run it again; "
            "--keep-going has the errors written"
        ) from None
    except asyncio.CancelledError:
        worker.hurry()
        raise
    finally:
        for task in (supervised, answering):
            task.cancel()
        await asyncio.gather(supervised, answering, return_exceptions=True)
        display.close()
        print_summary(run.summary(), sys.stderr)


def _open_log(path: str) -> BinaryIO:
    try:
        return Path(path).open("ab")
    except OSError as error:
        raise ChildError(f"{path}: {error.strerror}") from None


async def _start_simulated_backend(stack: AsyncExitStack, options: argparse.Namespace) -> str:
    backend = simulated_backend(options)
    stack.push_async_callback(backend.stop)
    process = await backend.start(stdout=asyncio.subprocess.PIPE)
    return (await backend.read_address(process.stdout, "http://")).removesuffix("/v1")


def _worker_arguments(options: argparse.Namespace, flags: Mapping[str, Any]) -> list[str]:
    arguments = ["run"] + (["--config", options.config] if options.config else [])
    for key, value in flags.items():
        arguments += ["--set", f"{key}={value}"]
    return arguments
