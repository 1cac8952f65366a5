"""
`inference-worker retry-failed`: send again the lines of a run whose answers are errors that may not come again.

The error answers are taken out of the output first, and their lines are then published in a new round: an answer of the
earlier round that is delivered late is dropped.  An interrupted retry is finished by the same command.
"""

import argparse
import asyncio
import json
from pathlib import Path

from worker.cli.arguments import add_settings
from worker.cli.exit_codes import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE
from worker.cli.loop import run_loop
from worker.cli.parser import describe
from worker.cli.retryable import ALL, RETRYABLE, error_classes
from worker.cli.runs import (
    RETRYING,
    SUBSCRIPTION,
    Teller,
    add_output_options,
    collect_run,
    connected,
    interruptible,
    make_subscription,
    named,
    run_settings,
    upload_to,
)
from worker.cli.submit import publish_run
from worker.client.collect import open_outputs, reconcile
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
    parser.add_argument(
        "--classes",
        metavar="CLASS,...",
        type=error_classes,
        help="error classes to send again, for example once their cause is mended; `all` for every one "
        "(default: those that may succeed when repeated)",
    )
    add_settings(parser)
    parser.add_argument("--response-topic", metavar="TOPIC", help="the response topic (pubsub.response_topic)")
    parser.add_argument("--wait", action="store_true", help="collect the answers into OUTPUT as well")
    parser.add_argument("--json", action="store_true", help="one JSON object an event on standard output")
    add_output_options(parser)


def run(namespace: argparse.Namespace) -> int:
    """Send the failed lines again; return the exit code."""
    configure_logs("auto", "error")
    settings, teller = run_settings(namespace), Teller(is_json=namespace.json)

    async def main() -> int:
        with Ledger(namespace.run_file) as ledger:
            return await interruptible(asyncio.ensure_future(_retry(namespace, settings, ledger, teller)), teller)

    return run_loop(main)


async def _retry(namespace: argparse.Namespace, settings: Settings, ledger: Ledger, teller: Teller) -> int:
    begun = ledger.get(RETRYING)
    classes = tuple(json.loads(begun)) if begun is not None else _chosen(namespace, ledger)
    count = sum(1 for _ in ledger.failed_lines(classes))
    if not count and begun is None and ledger.first_unpublished() is None:
        teller.event("nothing", f"no line has failed with {', '.join(classes)}", classes=list(classes))
        return 0
    responses = namespace.response_topic or named(settings.pubsub.response_topic)
    if ledger.get(SUBSCRIPTION) is None and responses is None:
        raise SettingsError(["--response-topic: is required to collect the answers (or pubsub.response_topic)"])
    if count or begun is not None:
        begin_round(namespace, ledger, classes)
        teller.event("retrying", f"sending {count:,} lines again", lines=count, classes=list(classes))
    async with connected(settings) as broker:
        if ledger.get(SUBSCRIPTION) is None:
            assert responses is not None  # looked at above
            name = await make_subscription(broker, ledger, broker.full_topic(responses))
            teller.event("subscribed", f"made the subscription {name}", subscription=name)
        publisher = broker.publisher(ledger.run.topic)
        try:
            upload = upload_to(settings, ledger)
            code = await publish_run(ledger, ledger.run.input_path, publisher.publish, teller, upload)
        finally:
            await publisher.aclose()
    if code == EXIT_INTERRUPTED or not namespace.wait:
        return code
    return await collect_run(namespace, settings, ledger, namespace.output, teller)


def _chosen(namespace: argparse.Namespace, ledger: Ledger) -> tuple[str, ...]:
    """Return the classes to send again."""
    if namespace.classes == ALL:
        return tuple(each.error_class for each in ledger.failures())
    return namespace.classes or RETRYABLE


def begin_round(namespace: argparse.Namespace, ledger: Ledger, classes: tuple[str, ...]) -> None:
    """
    Take the answers of the failed lines out of the outputs, and make the lines unpublished; blocks.

    A kill on the way leaves a note in the ledger, with which the same command goes on.

    Raises:
        OutputError: An output cannot be read or replaced, or another command is writing it.
    """
    files = open_outputs(namespace.output, namespace.errors, is_ordered=False)
    try:
        reconcile(ledger, files)
    finally:
        files.close()
    ledger.note({RETRYING: json.dumps(classes)})
    numbers = frozenset(ledger.failed_lines(classes))
    for path in filter(None, (namespace.output, namespace.errors)):
        if Path(path).is_file():
            drop_answers(path, lambda line_id, _: number_of(line_id) in numbers)
    ledger.begin_round(classes)
    ledger.note({RETRYING: None, "round": str(int(ledger.get("round") or "1") + 1)})
