"""
`inference-worker retry-failed`: send again the lines of a run whose answers are errors that may not come again.

The error answers are taken out of the output first, and their lines are then published in a new round: an answer of the
earlier round that is delivered late is dropped.  An interrupted retry is finished by the same command: a note in the
ledger (`RETRY`) says that its lines were taken out, until they are published, or with `--wait` answered.

With `--lost` the lines are published again that were published and will never be answered, because the answers were in
a subscription that is gone, or in an output that is.
"""

import argparse
import asyncio
import json
from pathlib import Path

from worker.cli.answers import (
    RETRY,
    add_output_options,
    collect_run,
    interruptible,
    prepare_subscription,
    refuse_mixed_output,
    run_outputs,
)
from worker.cli.arguments import add_settings
from worker.cli.exit_codes import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE
from worker.cli.loop import run_loop
from worker.cli.parser import describe
from worker.cli.retryable import ALL, RETRYABLE, error_classes
from worker.cli.runs import RETRYING, Teller, connected, named, run_settings, upload_to
from worker.cli.submit import publish_run
from worker.client.collect import ORDER, UNSORTED_SUFFIX, keep_order, open_outputs, reconcile
from worker.client.errors import OutputError
from worker.client.io.files import STANDARD
from worker.client.ledger import Ledger
from worker.client.resume import drop_answers, number_of
from worker.errors import SettingsError
from worker.settings.schema import Settings
from worker.telemetry.logs import configure_logs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    describe(
        parser,
        "Take error answers out of the output and publish their lines again. docs/submit.md explains runs.",
        examples=[
            "inference-worker retry-failed out.jsonl --run in.jsonl.run --wait",
            "inference-worker retry-failed out.jsonl --run in.jsonl.run --classes auth",
            "inference-worker retry-failed out.jsonl --run in.jsonl.run --lost",
        ],
        exits={
            0: "the lines are published; with --wait, and answered",
            EXIT_FAILED: "something failed; the command can be repeated",
            EXIT_USAGE: "settings or arguments cannot be used",
            EXIT_INTERRUPTED: "interrupted; the same command continues",
        },
    )
    parser.add_argument("output", metavar="OUTPUT", help="the file that `collect` wrote")
    parser.add_argument("--run", dest="run_file", metavar="FILE", required=True, help="the ledger of the run")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--classes",
        metavar="CLASS,...",
        type=error_classes,
        help="error classes to send again, for example once their cause is mended; `all` for every one "
        "(default: those that may succeed when repeated)",
    )
    chosen.add_argument(
        "--lost",
        action="store_true",
        help="instead, send the lines again that were published and whose answers are gone: with the subscription "
        "that held them, or with the output",
    )
    add_settings(parser)
    parser.add_argument("--response-topic", metavar="TOPIC", help="the response topic (pubsub.response_topic)")
    parser.add_argument(
        "--subscription", metavar="NAME", help="of the response topic, for this run alone (default: as noted before)"
    )
    parser.add_argument("--wait", action="store_true", help="collect the answers into OUTPUT as well")
    parser.add_argument("--json", action="store_true", help="one JSON object an event on standard output")
    add_output_options(parser)


LOST = ("--lost",)
"""Stands for the lines whose answers are gone, where classes stand otherwise."""


def run(namespace: argparse.Namespace) -> int:
    """Send the failed lines again; return the exit code."""
    configure_logs("auto", "error")
    refuse_mixed_output(namespace, namespace.output)
    if namespace.output == STANDARD:
        raise SettingsError(["OUTPUT: must be the file that `collect` wrote"])
    settings, teller = run_settings(namespace), Teller(is_json=namespace.json)

    async def main() -> int:
        with Ledger(namespace.run_file) as ledger:
            return await interruptible(asyncio.ensure_future(_retry(namespace, settings, ledger, teller)), teller)

    return run_loop(main)


async def _retry(namespace: argparse.Namespace, settings: Settings, ledger: Ledger, teller: Teller) -> int:
    if namespace.wait:
        keep_order(ledger, namespace.output, namespace.errors, is_ordered=namespace.ordered)
    chosen = LOST if namespace.lost else namespace.classes or RETRYABLE
    begun = ledger.get(RETRYING)
    if begun is not None:
        chosen = tuple(json.loads(begun))
    is_under_way = begun is None and _is_under_way(namespace, ledger, chosen)
    classes = tuple(each.error_class for each in ledger.failures()) if chosen == ALL else chosen
    if is_under_way:
        teller.event("continuing", "continuing the retry that was interrupted", selected=list(chosen))
    elif begun is None and chosen != LOST and ledger.first_unpublished() is None and not _any(ledger, classes):
        teller.event("nothing", _nothing(ledger, chosen), classes=list(classes))
        return 0
    if not is_under_way or ledger.first_unpublished() is not None:
        code = await _publish(namespace, settings, ledger, teller, None if is_under_way else (chosen, classes))
        if code is not None:
            return code
    if not namespace.wait:
        ledger.note({RETRY: None})
        return 0
    with run_outputs(namespace, ledger, namespace.output) as files:
        collecting = asyncio.ensure_future(collect_run(namespace, settings, ledger, files, teller))
        return await interruptible(collecting, teller)  # the signals are this one's from now on


def _nothing(ledger: Ledger, chosen: tuple[str, ...]) -> str:
    """Say that nothing is sent again, and what might be."""
    failures = ledger.failures()
    if not failures:
        return "nothing to send again: no line has failed"
    which = "that may succeed when repeated" if chosen == RETRYABLE else f"of {', '.join(chosen)}"
    others = ", ".join(f"{each.count:,} x {each.error_class}" for each in failures)
    return f"nothing to send again: no line has failed with an error {which}; there are {others} (--classes)"


def _any(ledger: Ledger, classes: tuple[str, ...]) -> bool:
    return next(ledger.failed_lines(classes), None) is not None


def _is_under_way(namespace: argparse.Namespace, ledger: Ledger, chosen: tuple[str, ...]) -> bool:
    """Whether the same retry was begun before, and has still something to do."""
    noted = ledger.get(RETRY)
    if noted is None or tuple(json.loads(noted)) != chosen:
        return False
    return ledger.first_unpublished() is not None or (namespace.wait and not ledger.totals().is_complete)


async def _publish(
    namespace: argparse.Namespace,
    settings: Settings,
    ledger: Ledger,
    teller: Teller,
    new: tuple[tuple[str, ...], tuple[str, ...]] | None,
) -> int | None:
    """
    Publish what is unpublished; return the exit code if the command ends with it.

    Args:
        namespace: Of the command.
        settings: How Pub/Sub is reached.
        ledger: Of the run.
        teller: Is told how it goes.
        new: What the command was asked for, and the error classes that this means, of a retry that begins; `None`
            continues one.
    """
    responses = namespace.response_topic or named(settings.pubsub.response_topic)
    async with connected(settings) as broker:
        await broker.check_topic(ledger.run.topic)
        await prepare_subscription(
            broker, ledger, teller, name=namespace.subscription, responses=responses, wants_own=True
        )
        if new is not None:
            count = begin_lost(namespace, ledger) if new[0] == LOST else begin_round(namespace, ledger, *new)
            if not count and ledger.first_unpublished() is None:
                ledger.note({RETRY: None})
                teller.event("nothing", "every line that was published has its answer", classes=[])
                return 0
            if count:
                teller.event("retrying", f"sending {count:,} lines again", lines=count, classes=list(new[0]))
        publisher = broker.publisher(ledger.run.topic)
        try:
            upload = upload_to(settings, ledger)
            code = await publish_run(
                ledger,
                ledger.run.input_path,
                publisher.publish,
                teller,
                upload=upload,
                goes_on=namespace.wait,
            )
        finally:
            await publisher.aclose()
    return code or None


def begin_round(
    namespace: argparse.Namespace, ledger: Ledger, chosen: tuple[str, ...], classes: tuple[str, ...]
) -> int:
    """
    Take the answers of the failed lines out of the outputs, and make the lines unpublished; return how many; blocks.

    A kill on the way leaves a note in the ledger, with which the same command goes on.

    Args:
        namespace: Names the outputs.
        ledger: Of the run.
        chosen: What the command was asked for, which is noted.
        classes: Error classes.

    Raises:
        OutputError: An output cannot be read or replaced, another command is writing it, or the answers of the run are
            not all in the outputs.
    """
    files = open_outputs(namespace.output, namespace.errors, is_ordered=ledger.get(ORDER) == "ordered")
    is_whole = False
    try:
        reconcile(ledger, files)
        if ledger.get(RETRYING) is None:  # else some are taken out already
            files.refuse_lacking(ledger)
        is_whole = True
    finally:
        files.close()
        if not is_whole:
            files.remove_new()
    ledger.note({RETRYING: json.dumps(chosen)})
    numbers = frozenset(ledger.failed_lines(classes))
    for path in files.paths:
        drop_answers(path, lambda line_id, _: number_of(line_id) in numbers)
    count = ledger.begin_round(classes)
    ledger.note({RETRYING: None, RETRY: json.dumps(chosen)})
    return count


def begin_lost(namespace: argparse.Namespace, ledger: Ledger) -> int:
    """
    Make the lines unpublished whose answers are neither in the outputs nor to come; return how many; blocks.

    Raises:
        OutputError: An output cannot be read, is missing, or another command is writing it.
    """
    output = Path(namespace.output)
    if ledger.totals().answered and not output.exists() and not Path(f"{output}{UNSORTED_SUFFIX}").exists():
        raise OutputError(f"{output}: does not exist; if it is lost, make an empty one, and every line is sent again")
    files = open_outputs(namespace.output, namespace.errors, is_ordered=ledger.get(ORDER) == "ordered")
    try:
        reconcile(ledger, files)
        count = ledger.begin_again(files.absent(ledger))
    finally:
        files.close()
    ledger.note({RETRY: json.dumps(LOST)})  # last: a command that does not find it begins anew, which changes nothing
    return count
