"""
`inference-worker collect`: write the answers of a submitted run, each once.

The output is its own journal, so the same command continues after Ctrl-C, a crash or a kill.
"""

import argparse
import asyncio

from worker.cli.answers import (
    add_output_options,
    collect_run,
    interruptible,
    name_subscription,
    refuse_mixed_output,
    run_outputs,
)
from worker.cli.arguments import add_settings
from worker.cli.exit_codes import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE
from worker.cli.loop import run_loop
from worker.cli.parser import describe
from worker.cli.runs import Teller, connected, open_ledger, run_settings
from worker.client.ledger import Ledger
from worker.settings.schema import Settings
from worker.telemetry.logs import configure_logs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    describe(
        parser,
        "Write the answers of a submitted file, each once. "
        "The same command continues after Ctrl-C or a kill. docs/submit.md explains runs.",
        examples=[
            "inference-worker collect out.jsonl --run in.jsonl.run --config w.yaml",
            "inference-worker collect out.gz --run in.jsonl.run --errors errors.jsonl",
            "inference-worker collect out.jsonl --run in.jsonl.run --ordered --fsync",
        ],
        exits={
            0: "every line has an answer; errors are answers",
            EXIT_FAILED: "answers are missing, or something failed; the command can be repeated",
            EXIT_USAGE: "settings or arguments cannot be used",
            EXIT_INTERRUPTED: "interrupted; the same command continues",
        },
    )
    parser.add_argument(
        "output", metavar="OUTPUT", help="answers, one per line; .gz and .zst work, - is standard output"
    )
    parser.add_argument("--run", dest="run_file", metavar="FILE", required=True, help="the ledger that `submit` made")
    add_settings(parser)
    parser.add_argument(
        "--subscription",
        metavar="NAME",
        help="a subscription of the response topic, for this run's answers alone (default: as `submit` noted)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object an event on standard output")
    add_output_options(parser)


def run(namespace: argparse.Namespace) -> int:
    """Collect; return the exit code."""
    configure_logs("auto", "error")
    refuse_mixed_output(namespace, namespace.output)
    settings, teller = run_settings(namespace), Teller(is_json=namespace.json)

    async def main() -> int:
        with open_ledger(namespace.run_file) as ledger:
            return await interruptible(asyncio.ensure_future(_collect(namespace, settings, ledger, teller)), teller)

    return run_loop(main)


async def _collect(namespace: argparse.Namespace, settings: Settings, ledger: Ledger, teller: Teller) -> int:
    if namespace.subscription:
        async with connected(settings) as broker:
            await name_subscription(broker, ledger, namespace.subscription)
    with run_outputs(namespace, ledger, namespace.output) as files:
        return await collect_run(namespace, settings, ledger, files, teller)
