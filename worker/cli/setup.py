"""`inference-worker setup`: creates or updates topics, subscriptions, retry and dead-letter policy."""

import argparse
import asyncio
import sys

from worker.cli.exit_codes import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE
from worker.cli.parser import describe
from worker.settings.load import load_without_backend


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    describe(
        parser,
        "Create or update the topics and subscriptions that the settings name, with retry and dead-letter policy. It "
        "can be repeated. The running worker creates nothing.",
        examples=[
            "inference-worker setup --config worker.yaml --dry-run",
            "inference-worker setup --config worker.yaml",
        ],
        exits={
            0: "everything is as the settings say; --dry-run: printed",
            EXIT_FAILED: "would weaken a policy (see --force), something is in the way, or Pub/Sub refuses",
            EXIT_USAGE: "settings or arguments cannot be used; every fault is named",
            EXIT_INTERRUPTED: "interrupted; run it again to finish",
        },
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings (also WORKER_CONFIG)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and exit 0")
    parser.add_argument("--force", action="store_true", help="also do what weakens an existing policy")


def run(namespace: argparse.Namespace) -> int:
    """Bring Pub/Sub to the desired state; return the exit code."""
    settings = load_without_backend(namespace.config)
    from worker.brokers.admin import run_setup  # noqa: PLC0415 - needs gRPC
    from worker.telemetry.logs import configure_logs  # noqa: PLC0415

    configure_logs(settings.log.format, settings.log.level)
    try:
        return asyncio.run(run_setup(settings, dry_run=namespace.dry_run, force=namespace.force, say=sys.stdout.write))
    except KeyboardInterrupt:
        print("interrupted; run it again to finish", file=sys.stderr)
        return EXIT_INTERRUPTED
