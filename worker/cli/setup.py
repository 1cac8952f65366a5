"""`inference-worker setup`: arguments in, exit code out."""

import argparse
import asyncio
import sys
from typing import Any

from worker.settings.load import load_without_backend

EXIT_INTERRUPTED = 130
"""As a shell reports Ctrl-C: 128 and the signal's number."""


def add_setup(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("setup", help="create or update topics, subscriptions, retry and dead-letter policy")
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings (also WORKER_CONFIG)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and exit 0")
    parser.add_argument("--force", action="store_true", help="also do what weakens an existing policy")
    parser.set_defaults(command=_setup)


def _setup(namespace: argparse.Namespace) -> int:
    settings = load_without_backend(namespace.config)
    from worker.brokers.admin import run_setup  # noqa: PLC0415 - needs gRPC
    from worker.telemetry.logs import configure_logs  # noqa: PLC0415

    configure_logs(settings.log.format, settings.log.level)
    try:
        return asyncio.run(run_setup(settings, dry_run=namespace.dry_run, force=namespace.force, say=sys.stdout.write))
    except KeyboardInterrupt:
        print("interrupted; run it again to finish", file=sys.stderr)
        return EXIT_INTERRUPTED
