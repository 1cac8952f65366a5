"""
`inference-worker replay`: publish requests that failed permanently to the request topic again.

Reads the worker's copies (`dead_letter.topic`) and the messages that Pub/Sub dead-lettered.  A message is acked only
after the broker has confirmed the new one, so an interrupted replay loses no message; it may publish one twice.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from worker.brokers.connection import Broker
from worker.cli.arguments import add_settings, at_least_one, settings_from
from worker.cli.exit_codes import EXIT_FAILED, EXIT_USAGE
from worker.cli.loop import run_loop
from worker.cli.parser import describe
from worker.errors import MessageRejectedError, PublishError
from worker.ports import Publisher, Settlement
from worker.settings.schema import PubSubSettings
from worker.telemetry.logs import configure_logs, get_logger
from worker.telemetry.metrics import Metrics
from worker.wire.message import ReceivedMessage

ORIGINAL = "original."
"""Prefix under which a copy carries the attributes of the request."""
BROKERS_OWN = "CloudPubSubDeadLetterSource"
"""Prefix of the attributes that Pub/Sub adds to a message that it dead-letters
(https://cloud.google.com/pubsub/docs/handling-failures#dead-letter_topic)."""
OURS = frozenset({"request_message_id", "error_class", "status_code"})

_log = get_logger("replay")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    describe(
        parser,
        "Publish requests that failed for good to the request topic again: the worker's copies of them "
        "(dead_letter.topic), or what Pub/Sub has dead-lettered.",
        examples=[
            "inference-worker replay dead-letters-hold requests --config worker.yaml",
            "inference-worker replay dead-letters-hold requests --limit 10",
        ],
        exits={
            0: "everything that came was published",
            EXIT_FAILED: "some could not be published and stay in the subscription, or it is gone or refused",
            EXIT_USAGE: "settings or arguments cannot be used; every fault is named",
        },
    )
    add_settings(parser)
    parser.add_argument("subscription", metavar="SUBSCRIPTION", help="where the copies or dead letters are")
    parser.add_argument("topic", metavar="TOPIC", help="the request topic")
    parser.add_argument("--limit", type=at_least_one, metavar="N", help="messages at most")
    parser.add_argument(
        "--quiet", type=float, default=10.0, metavar="S", help="end after S seconds without a message (10)"
    )


def run(namespace: argparse.Namespace) -> int:
    """Publish the messages again; return the exit code."""
    namespace.set += [
        f"pubsub.request_subscription={namespace.subscription}",
        f"pubsub.response_topic={namespace.topic}",
    ]
    settings = settings_from(namespace, needs_backend=False)
    configure_logs(settings.log.format, settings.log.level)

    async def main() -> int:
        return await replay(settings.pubsub, namespace.topic, limit=namespace.limit, quiet_s=namespace.quiet)

    return run_loop(main)


def original_attributes(attributes: Mapping[str, str]) -> dict[str, str]:
    """Return the attributes the request had, of a worker's copy or of a message that Pub/Sub dead-lettered."""
    if set(attributes) >= OURS:
        return {key.removeprefix(ORIGINAL): value for key, value in attributes.items() if key.startswith(ORIGINAL)}
    return {key: value for key, value in attributes.items() if not key.startswith(BROKERS_OWN)}


@dataclass(slots=True)
class _Replay:
    publisher: Publisher
    limit: int | None
    sent: int = 0
    failed: int = 0
    under_way: int = 0
    last_at: float = 0.0

    async def take(self, message: ReceivedMessage) -> Settlement:
        """
        Publish one request again; beyond the limit, keep its lease until the drain.

        Cancellation: of the drain; the message stays in the subscription.
        """
        if self.limit is not None and self.sent + self.under_way >= self.limit:
            await asyncio.Event().wait()  # not nacked: the broker would deliver it again at once
        self.under_way += 1
        self.last_at = time.monotonic()
        try:
            await self.publisher.publish(message.data, original_attributes(message.attributes))
        except PublishError as error:
            self.failed += 1
            _log.error("replay_failed", message_id=message.message_id, error=str(error))
            if isinstance(error, MessageRejectedError):
                await asyncio.Event().wait()  # permanent: another attempt would fail like this one
            return Settlement.NACK
        finally:
            self.under_way -= 1
        self.sent += 1
        return Settlement.ACK


async def replay(settings: PubSubSettings, topic: str, *, limit: int | None, quiet_s: float) -> int:
    """
    Publish every message again until none has come for `quiet_s` seconds; return the exit code.

    Args:
        settings: `request_subscription` has the messages.
        topic: The request topic, short or full name.
        limit: Messages at most; `None` for all.
        quiet_s: Seconds without a message after which the subscription counts as empty.

    Raises:
        BrokerResourceError: The subscription does not exist or is refused; permanent.

    Cancellation: messages whose new message is not confirmed stay in the subscription.
    """
    broker = await Broker.connect(settings)
    publisher = broker.publisher(topic)
    subscriber = broker.subscriber(Metrics())
    state = _Replay(publisher, limit, last_at=time.monotonic())
    pulling = asyncio.ensure_future(subscriber.run(state.take))
    try:
        while not pulling.done() and (limit is None or state.sent < limit):
            await asyncio.wait({pulling}, timeout=0.2)
            if not state.under_way and time.monotonic() - state.last_at >= quiet_s:
                break
        if pulling.done():
            pulling.result()
    finally:
        await subscriber.drain(0)
        await asyncio.gather(pulling, return_exceptions=True)
        await publisher.aclose()
        await broker.aclose()
        sys.stderr.write(f"{state.sent} published to {topic}, {state.failed} failed\n")
    return 1 if state.failed else 0
