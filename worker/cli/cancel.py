"""`inference-worker cancel`: tell all workers that no answer is wanted any more for some requests."""

import argparse
import asyncio
import sys

from worker.cli.exit_codes import EXIT_FAILED, EXIT_USAGE
from worker.cli.parser import describe
from worker.errors import SettingsError
from worker.settings.load import load_without_backend
from worker.settings.schema import Settings
from worker.wire.control import encode_cancel
from worker.wire.message import RUN_ID


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    describe(
        parser,
        "Cancel requests: those that have not started are answered at once, those that run are cut off, each with the "
        "error class cancelled. All workers that listen to pubsub.control_topic are told.",
        examples=[
            "inference-worker cancel --config worker.yaml --run 8f14e45fceea",
            "inference-worker cancel --config worker.yaml --message-id 1234",
            "inference-worker cancel --config worker.yaml --attribute team=a",
        ],
        exits={
            0: "published",
            EXIT_FAILED: "Pub/Sub refuses, or cannot be reached",
            EXIT_USAGE: "settings or arguments cannot be used; every fault is named",
        },
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings (also WORKER_CONFIG)")
    parser.add_argument("--run", metavar="RUN", help="all requests of a submitted file, by its run's id")
    parser.add_argument("--message-id", metavar="ID", action="append", default=[], help="one request; can be repeated")
    parser.add_argument(
        "--attribute",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        type=_attribute,
        help="requests with this attribute; repeated: with all of them",
    )


def _attribute(text: str) -> tuple[str, str]:
    name, mark, value = text.partition("=")
    if not name or not mark:
        raise argparse.ArgumentTypeError("must be NAME=VALUE")
    return name, value


def run(namespace: argparse.Namespace) -> int:
    """Publish the control message; return the exit code."""
    attributes = dict(namespace.attribute) | ({RUN_ID: namespace.run} if namespace.run else {})
    faults = [] if attributes or namespace.message_id else ["cancel: needs --run, --message-id or --attribute"]
    settings = load_without_backend(namespace.config)
    if settings.pubsub.control_topic is None:
        faults.append("pubsub.control_topic: is required to cancel requests (WORKER_PUBSUB__CONTROL_TOPIC)")
    if faults:
        raise SettingsError(faults)
    asyncio.run(_publish(settings, encode_cancel(namespace.message_id, attributes)))
    print("told all workers", file=sys.stderr)
    return 0


async def _publish(settings: Settings, data: bytes) -> None:
    from worker.brokers.connection import Broker  # noqa: PLC0415 - needs gRPC

    broker = await Broker.connect(settings.pubsub)
    publisher = broker.publisher(settings.pubsub.control_topic)
    try:
        await publisher.publish(data, {})
    finally:
        await publisher.aclose()
        await broker.aclose()
