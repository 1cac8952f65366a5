"""
`inference-worker submit`: publish the lines of a file as requests, each once.

All lines are checked before the first is published.  The ledger beside the input remembers what the broker has
confirmed, so that the same command continues after Ctrl-C, a crash or a kill.
"""

import argparse
import asyncio
import shutil
import sys
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NamedTuple

from worker.cli.answers import (
    OWNS_SUBSCRIPTION,
    SUBSCRIPTION,
    add_output_options,
    collect_run,
    interruptible,
    note_waiting,
    prepare_subscription,
    refuse_mixed_output,
    run_outputs,
)
from worker.cli.arguments import add_settings, at_least_one
from worker.cli.exit_codes import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE
from worker.cli.inputs import add_input, input_of
from worker.cli.loop import on_signals, run_loop
from worker.cli.parser import describe
from worker.cli.runs import RETRYING, Teller, connected, ledger_path, named, run_settings, upload_to
from worker.client.check import CheckResult
from worker.client.errors import ClientError, InputError, LedgerError, OutputError, describe_os_error
from worker.client.io.files import STANDARD, open_input
from worker.client.io.tables import Source
from worker.client.ledger import Ledger, new_run
from worker.client.ports import Publish
from worker.client.submit import Submission, Upload, check
from worker.errors import SettingsError
from worker.settings.schema import Settings
from worker.telemetry.logs import configure_logs

WORKER_SUFFIX = "-worker"
"""Of the request subscription, where it is named after its topic, as `setup` does."""
COPY_SUFFIX = ".input"
"""Of the copy that is made of standard input and of tables: it is read twice, and again for a resumed run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    describe(
        parser,
        "Check every line of a file, then publish each as one request. "
        "The same command continues after Ctrl-C or a kill. docs/submit.md explains runs.",
        examples=[
            "inference-worker submit in.jsonl --check-only",
            "inference-worker submit in.jsonl --config w.yaml --create-subscription",
            "inference-worker submit in.jsonl --config w.yaml --wait out.jsonl",
        ],
        exits={
            0: "every line is published; with --wait, and answered",
            EXIT_FAILED: "a line has a fault, or something failed; the command can be repeated",
            EXIT_USAGE: "settings or arguments cannot be used",
            EXIT_INTERRUPTED: "interrupted; the same command continues",
        },
    )
    add_input(parser)
    add_settings(parser)
    parser.add_argument("--topic", metavar="TOPIC", help="the request topic (default: setup.request_topic)")
    parser.add_argument("--run", dest="run_file", metavar="FILE", help="the ledger of the run (INPUT.run)")
    parser.add_argument("--limit", type=at_least_one, metavar="N", help="only the first N lines")
    parser.add_argument("--check-only", action="store_true", help="check the lines, and do nothing else")
    parser.add_argument("--dry-run", action="store_true", help="say what would be published, and do not publish")
    parser.add_argument("--json", action="store_true", help="one JSON object an event on standard output")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--create-subscription",
        action="store_true",
        help="make a subscription for the answers of this run alone; `collect` removes it at the end",
    )
    source.add_argument("--subscription", metavar="NAME", help="an existing one, for this run's answers alone")
    parser.add_argument("--response-topic", metavar="TOPIC", help="the response topic (pubsub.response_topic)")
    parser.add_argument("--wait", metavar="OUTPUT", help="collect the answers into this file (see `collect`)")
    add_output_options(parser)


def run(namespace: argparse.Namespace) -> int:
    """Check and publish; return the exit code."""
    configure_logs("auto", "error")
    refuse_mixed_output(namespace, namespace.wait)
    teller = Teller(is_json=namespace.json)
    settings = run_settings(namespace)
    namespace.is_by_reference = bool(settings.payloads.request_prefixes)
    if namespace.check_only:
        return _check_only(namespace, teller)
    topic = request_topic(namespace.topic, settings)
    needs_subscription = namespace.create_subscription or (namespace.wait and not namespace.subscription)
    responses = namespace.response_topic or named(settings.pubsub.response_topic)
    if needs_subscription and responses is None:
        raise SettingsError(["--response-topic: is required to collect the answers (or pubsub.response_topic)"])
    if namespace.dry_run:
        return _dry_run(namespace, topic, teller)
    path = ledger_path(namespace, "stdin" if namespace.input == STANDARD else namespace.input)
    plan = _Plan(path, _lines_of(namespace, path), topic, responses)

    async def main() -> int:
        return await interruptible(asyncio.ensure_future(_submit(namespace, settings, plan, teller)), teller)

    return run_loop(main)


def request_topic(name: str | None, settings: Settings) -> str:
    """
    Return the request topic, short or full.

    Raises:
        SettingsError: Nothing names one.
    """
    subscription = named(settings.pubsub.request_subscription)
    found = name or settings.setup.request_topic
    if not found and subscription is not None and subscription.endswith(WORKER_SUFFIX):
        found = subscription.removesuffix(WORKER_SUFFIX).replace("/subscriptions/", "/topics/")
    if not found:
        raise SettingsError(["--topic: name the request topic (or setup.request_topic)"])
    return found


def _lines_of(namespace: argparse.Namespace, path: str) -> str:
    """
    Return the file of the request lines: the input, or a copy beside the ledger.

    A copy that a run has published lines of may only grow: what is read now must begin with it.

    Raises:
        InputError: The input cannot be read, or another one was submitted under this ledger.
        OutputError: The copy cannot be written.
    """
    opened, copy = input_of(namespace), Path(path + COPY_SUFFIX)
    if namespace.template is None and namespace.input != STANDARD:
        if Path(namespace.input).exists() and not Path(namespace.input).is_file():
            raise InputError(f"{namespace.input}: is no file; it is read twice (- reads standard input into a copy)")
        open_input(namespace.input).close()
        return str(namespace.input)

    def write(file: BinaryIO) -> None:
        if namespace.template is not None:
            _write_rows(opened(), file)
        else:
            shutil.copyfileobj(sys.stdin.buffer, file)

    half = copy.with_name(copy.name + ".new")
    try:
        with half.open("wb") as file:
            write(file)
        if not copy.exists():
            half.replace(copy)
            return str(copy)
        changed, is_longer = _compare(copy, half)
        if changed is not None and _has_published(path):
            raise InputError(
                f"{_name(namespace.input)}: line {changed} is not the one that was submitted before; "
                f"name another ledger with --run (to continue without this input, submit {copy})"
            )
        if changed is not None or is_longer:
            half.replace(copy)
    except OSError as error:
        raise OutputError(f"{copy}: {describe_os_error(error)}") from None
    finally:
        half.unlink(missing_ok=True)
    return str(copy)


def _compare(old: Path, new: Path) -> tuple[int | None, bool]:
    """Return the number of the first line of a file that is not in the new one, and whether that one is longer."""
    with old.open("rb") as before, new.open("rb") as after:
        for number, line in enumerate(before, 1):
            if line.removesuffix(b"\n") != after.readline().removesuffix(b"\n"):
                return number, False
        return None, old.stat().st_size < new.stat().st_size


def _has_published(path: str) -> bool:
    if not Path(path).exists():
        return False
    with Ledger(path) as ledger:
        return ledger.totals().published > 0


def _name(path: str) -> str:
    return "standard input" if path == STANDARD else path


def _write_rows(source: Source, file: BinaryIO) -> None:
    """Write the line of each row at the place that its number says."""
    written = 0
    try:
        while lines := source.read_lines():
            for line in lines:
                file.write(b"\n" * (line.number - written - 1) + line.data + b"\n")
                written = line.number
    finally:
        source.close()


def _checked(
    namespace: argparse.Namespace,
    input_path: str,
    ledger: Ledger,
    teller: Teller,
    stopped: threading.Event | None = None,
) -> CheckResult:
    """
    Check the input into the ledger; tell its faults.

    Raises:
        ClientError: It was stopped, or as `check`.
    """

    def show(lines: int) -> None:
        if stopped is not None and stopped.is_set():
            raise ClientError("the check was interrupted")
        teller.progress("checking", f"checking: {lines:,} lines", lines=lines)

    reader = open_input(input_path)
    try:
        result = check(
            reader,
            ledger,
            limit=namespace.limit,
            is_by_reference=namespace.is_by_reference,
            on_progress=show,
        )
    finally:
        reader.close()
        teller.clear()
    for fault in sorted(result.faults, key=lambda each: each.number):
        teller.event(
            "fault",
            f"{input_path}: {fault}",
            line=fault.number,
            field=fault.field,
            message=fault.message,
        )
    if result.fault_count > len(result.faults):
        teller.event(
            "more_faults", f"... and {result.fault_count - len(result.faults):,} more", faults=result.fault_count
        )
    return result


def _check_only(namespace: argparse.Namespace, teller: Teller) -> int:
    return _tell_check(namespace.input, _checked_aside(namespace, teller), teller)


def _checked_aside(namespace: argparse.Namespace, teller: Teller) -> CheckResult:
    """Check the input, and leave nothing behind."""
    with tempfile.TemporaryDirectory() as folder:
        input_path = _lines_of(namespace, str(Path(folder) / "stdin"))
        with Ledger.create(str(Path(folder) / "check.run"), new_run(input_path, "")) as ledger:
            return _checked(namespace, input_path, ledger, teller)


def _tell_check(input_path: str, result: CheckResult, teller: Teller) -> int:
    good = result.lines - result.fault_count
    text = f"{input_path}: {good:,} of {result.lines:,} lines can be published"
    teller.event("checked", text, lines=result.lines, faults=result.fault_count, bytes=result.bytes)
    return EXIT_FAILED if result.fault_count else 0


def _dry_run(namespace: argparse.Namespace, topic: str, teller: Teller) -> int:
    result = _checked_aside(namespace, teller)
    if result.fault_count:
        return _tell_check(namespace.input, result, teller)
    text = f"would publish {result.lines:,} requests ({result.bytes:,} bytes) to {topic}"
    teller.event("dry_run", text, lines=result.lines, bytes=result.bytes, topic=topic)
    return 0


class _Plan(NamedTuple):
    ledger: str
    """Path."""
    input: str
    """Path; of the copy of standard input or of a table's lines."""
    topic: str
    """The request topic, short or full."""
    responses: str | None
    """The response topic, short or full, where it is known."""


async def _submit(namespace: argparse.Namespace, settings: Settings, plan: _Plan, teller: Teller) -> int:
    async with connected(settings) as broker:
        await broker.check_topic(plan.topic)
        publisher = broker.publisher(plan.topic)
        try:
            with ExitStack() as stack:
                ledger = stack.enter_context(_ledger_of(plan.ledger, plan.input, publisher.topic))
                if await _checked_into(namespace, plan.input, ledger, teller):
                    return EXIT_FAILED
                files = stack.enter_context(run_outputs(namespace, ledger, namespace.wait)) if namespace.wait else None
                wants_own = ledger.get(SUBSCRIPTION) is None and _wants_own(namespace, ledger)
                if wants_own or namespace.subscription or ledger.first_unpublished() is not None:
                    await prepare_subscription(
                        broker,
                        ledger,
                        teller,
                        name=namespace.subscription,
                        responses=plan.responses,
                        wants_own=wants_own,
                    )
                if ledger.get(SUBSCRIPTION) is None:
                    teller.event(
                        "no_subscription",
                        "no subscription is named: make one before workers answer (docs/submit.md)",
                    )
                code = await publish_run(
                    ledger,
                    plan.input,
                    publisher.publish,
                    teller,
                    upload=upload_to(settings, ledger),
                    goes_on=files is not None,
                )
                if code or files is None:
                    return code
                return await interruptible(
                    asyncio.ensure_future(collect_run(namespace, settings, ledger, files, teller)), teller
                )
        finally:
            await publisher.aclose()


def _wants_own(namespace: argparse.Namespace, ledger: Ledger) -> bool:
    """
    Whether the run is to have a subscription of its own: it is asked for, or was, before `collect` removed it.

    Raises:
        SettingsError: The run has begun without one.
    """
    if ledger.get(OWNS_SUBSCRIPTION) is not None:
        return ledger.first_unpublished() is not None or not ledger.totals().is_complete
    if namespace.subscription or not (namespace.create_subscription or namespace.wait):
        return False
    if ledger.totals().published:
        raise SettingsError(["--create-subscription: the run has begun without one, and would miss the answers so far"])
    return True


def _ledger_of(path: str, input_path: str, topic: str) -> Ledger:
    """Open the ledger of this input and topic, or make it."""
    if not Path(path).exists():
        return Ledger.create(path, new_run(input_path, topic))
    ledger = Ledger(path)
    fault = None
    if ledger.run.input_path != str(Path(input_path).resolve()) and not Path(ledger.run.input_path).exists():
        ledger.move_input(input_path)  # every line is compared with the one that was published
    if ledger.run.input_path != str(Path(input_path).resolve()):
        fault = f"is the ledger of {ledger.run.input_path}"
    elif ledger.run.topic != topic:
        fault = f"is the ledger of a run on {ledger.run.topic}"
    elif ledger.get(RETRYING) is not None:
        fault = "`retry-failed` was interrupted; run it again first"
    if fault is not None:
        ledger.close()
        raise LedgerError(f"{path}: {fault}; name another with --run")
    return ledger


async def _checked_into(namespace: argparse.Namespace, input_path: str, ledger: Ledger, teller: Teller) -> bool:
    """
    Check the input, unless the ledger knows this very file; return whether it has faults.

    Cancellation: the check has ended; the next one begins anew.
    """
    status = await asyncio.to_thread(Path(input_path).stat)
    stamp = f"{status.st_size}-{status.st_mtime_ns}-{namespace.limit or ''}-{namespace.is_by_reference}"
    if ledger.get("is_input_read") == stamp:
        return False
    ledger.note({"is_input_read": None})
    stopped = threading.Event()
    checking = asyncio.ensure_future(asyncio.to_thread(_checked, namespace, input_path, ledger, teller, stopped))
    try:
        result = await asyncio.shield(checking)
    except asyncio.CancelledError:
        stopped.set()
        await asyncio.gather(checking, return_exceptions=True)  # the ledger is not closed before
        raise
    if result.fault_count:
        _tell_check(input_path, result, teller)
        return True
    ledger.note({"is_input_read": stamp})
    return False


async def publish_run(
    ledger: Ledger,
    input_path: str,
    publish: Publish,
    teller: Teller,
    *,
    upload: Upload | None = None,
    goes_on: bool = False,
) -> int:
    """
    Publish what is unpublished; return the exit code.

    Args:
        ledger: Of the run.
        input_path: Of its lines.
        publish: Publishes one message to the request topic.
        teller: Is told how it goes.
        upload: Takes the bodies that are too large for a message.
        goes_on: The command has more to do: Ctrl-C ends it, although the last lines were confirmed meanwhile.

    Raises:
        WorkerError: The input, the ledger or the broker failed; what was confirmed is recorded.

    Cancellation: what the broker has confirmed is recorded.
    """
    if ledger.first_unpublished() is not None:
        note_waiting(ledger)
    reader = open_input(input_path)
    submission = Submission(reader, ledger, publish, upload=upload)
    task = asyncio.ensure_future(submission.run())
    presses, is_outage_told = 0, False

    def interrupt() -> None:
        nonlocal presses
        presses += 1
        if presses == 1:
            teller.event("stopping", "waiting until what is on its way is confirmed; Ctrl-C again does not wait")
            submission.stop()
        else:
            task.cancel()

    on_signals(interrupt)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=0.25)
            is_outage_told = _show(submission, teller, is_outage_told=is_outage_told)
        task.result()
    except asyncio.CancelledError:
        if not presses:
            raise
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        reader.close()
        teller.clear()
    progress, totals = submission.progress(), ledger.totals()
    rate = progress.published / progress.duration_s if progress.duration_s else 0.0
    text = f"published {totals.published:,} of {totals.lines:,} lines to {ledger.run.topic}"
    if progress.published:
        text += f" ({rate:,.0f} lines/s)"
    if progress.skipped:
        text += f", {progress.skipped:,} of them before" if progress.published else ", all of them before"
    teller.event(
        "published" if totals.published == totals.lines else "interrupted",
        text,
        run=ledger.path,
        run_id=ledger.run.run_id,
        published=totals.published,
        lines=totals.lines,
    )
    if totals.published == totals.lines and not (presses and goes_on):
        return 0
    teller.event("continue", "the same command continues this run")
    return EXIT_INTERRUPTED if presses else EXIT_FAILED


def _show(submission: Submission, teller: Teller, *, is_outage_told: bool) -> bool:
    """Show how far it is; return whether a failed publish was told."""
    progress = submission.progress()
    if progress.retries and not is_outage_told:
        teller.event("repeating", f"a publish failed and is repeated: {progress.reason}", reason=progress.reason)
    rate = progress.published / progress.duration_s if progress.duration_s > 1 else 0.0
    done = progress.skipped + progress.published
    text = f"{done:,}/{progress.total:,} published"
    if rate:
        left = round((progress.total - done) / rate)
        text += f", {rate:,.0f} lines/s, {left // 60}:{left % 60:02d} left"
    if progress.retries:
        text += f", {progress.retries:,} repeated"
    teller.progress("publishing", text, published=done, lines=progress.total)
    return bool(progress.retries)
