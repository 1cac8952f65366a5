"""
What `submit`, `collect`, `watch` and `retry-failed` share: the settings they need, the ledger, and how a run is told.

A person at a terminal sees a line of progress; a file or pipe gets only the last lines; `--json` prints one JSON object
for each event on standard output.
"""

import argparse
import asyncio
import json
import secrets
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from worker.brokers.admin.run_subscription import create_run_subscription, delete_run_subscription
from worker.brokers.connection import Broker
from worker.cli.arguments import settings_from
from worker.cli.exit_codes import EXIT_FAILED, EXIT_INTERRUPTED
from worker.cli.loop import on_signals
from worker.client.collect import (
    Collection,
    CollectProgress,
    Files,
    open_outputs,
    reconcile,
    sort_outputs,
)
from worker.client.errors import ClientError, LedgerError
from worker.client.ledger import Failure, Ledger, Totals
from worker.client.ports import AnswerHandler
from worker.client.submit import Upload
from worker.errors import SettingsError, WorkerError
from worker.ports import Settlement
from worker.settings.schema import Settings
from worker.telemetry.metrics import Metrics
from worker.wire.message import RUN_ID, ReceivedMessage
from worker.wire.object_uri import ObjectUri, parse_object_prefix

LEDGER_SUFFIX = ".run"
"""Of the ledger beside the input."""
SUBSCRIPTION, OWNS_SUBSCRIPTION, RETRYING = "subscription", "owns_subscription", "retrying"
"""Notes in the ledger: where the answers come from, whether the run made it, and the classes of an unfinished retry."""
ANSWERS_IN_FLIGHT = 1000
SHOW_EVERY_S = 0.25
_UNUSED = "unused"
_NAMES = ("pubsub.request_subscription", "pubsub.response_topic", "backend.base_url")


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how answers are written, and when to give up."""
    parser.add_argument("--errors", metavar="FILE", help="write the answers that are errors into this file instead")
    parser.add_argument("--ordered", action="store_true", help="in the order of the input, when all are there")
    parser.add_argument("--fsync", action="store_true", help="bring each answer to the disk before it is acked")
    parser.add_argument("--timeout", type=_seconds, metavar="S", help="give up after S seconds")
    parser.add_argument(
        "--idle-timeout", type=_seconds, metavar="S", help="give up when no answer has come for S seconds"
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be seconds above 0 (got {text!r})")
    return value


def run_settings(namespace: argparse.Namespace) -> Settings:
    """
    Return the settings, with `unused` for what a run over a file may do without.

    Raises:
        SettingsError: Unusable; names every fault.
    """
    try:
        return settings_from(namespace, needs_backend=False)
    except SettingsError as error:
        missing = [fault.partition(":")[0] for fault in error.faults if ": is required" in fault]
        if len(missing) != len(error.faults) or not set(missing) <= set(_NAMES):
            raise
    values = {name: "http://unused" if name == "backend.base_url" else _UNUSED for name in missing}
    filled = argparse.Namespace(
        config=namespace.config, set=[*namespace.set, *(f"{name}={value}" for name, value in values.items())]
    )
    return settings_from(filled, needs_backend=False)


def named(value: str) -> str | None:
    """Return a name of the settings; `None` for one that is not set."""
    return None if value in {"", _UNUSED} else value


def ledger_path(namespace: argparse.Namespace, input_path: str) -> str:
    """Return where the ledger of an input is."""
    return str(namespace.run_file or f"{input_path}{LEDGER_SUFFIX}")


def open_ledger(path: str) -> Ledger:
    """
    Open the ledger of a run that may be collected.

    Raises:
        LedgerError: It cannot be used, or a retry of the run was interrupted; permanent.
    """
    ledger = Ledger(path)
    if ledger.get(RETRYING) is not None:
        ledger.close()
        raise LedgerError(f"{path}: `retry-failed` was interrupted; run it again first")
    return ledger


def upload_to(settings: Settings, ledger: Ledger) -> Upload | None:
    """
    Return what takes the bodies that are too large for a message; `None` where the settings name no place.

    They go below the first of `payloads.request_prefixes`, which the workers must allow too.

    Raises:
        SettingsError: The place cannot be used; permanent.
    """
    if not settings.payloads.request_prefixes:
        return None
    from worker.payloads.stores import build_store  # noqa: PLC0415 - where bodies stand in object storage

    prefix = parse_object_prefix(settings.payloads.request_prefixes[0])
    store, run_id = build_store(prefix, settings.payloads), ledger.run.run_id

    async def upload(line_id: str, body: bytes) -> str:
        key = f"{run_id}/{line_id}.json"
        await store.write(key, body)
        folder = f"{prefix.key}/" if prefix.key else ""
        return str(ObjectUri(prefix.scheme, prefix.bucket, folder + key))

    return upload


class Teller:
    """
    Tells how a run goes.

    Args:
        is_json: One JSON object an event on standard output.
        is_quiet: No line of progress; a stream that is no terminal never gets one.
    """

    def __init__(self, *, is_json: bool, is_quiet: bool = False) -> None:
        self._is_json = is_json
        self._is_live = not is_json and not is_quiet and sys.stderr.isatty()
        self._shown_at = -SHOW_EVERY_S
        self._width = 0

    def event(self, name: str, text: str, **fields: Any) -> None:
        """Tell something that happened once: as JSON with its fields, or as text for a person."""
        self.clear()
        if self._is_json:
            sys.stdout.write(json.dumps({"event": name, **fields}, ensure_ascii=False) + "\n")
            sys.stdout.flush()
        else:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def progress(self, name: str, text: str, **fields: Any) -> None:
        """Show how far it is; not more often than `SHOW_EVERY_S`, and as JSON once a second."""
        now = time.monotonic()
        if now - self._shown_at < (1.0 if self._is_json else SHOW_EVERY_S):
            return
        self._shown_at = now
        if self._is_json:
            self.event(name, text, **fields)
        elif self._is_live:
            text = text[:79]
            sys.stderr.write("\r" + text.ljust(self._width))
            sys.stderr.flush()
            self._width = len(text)

    def clear(self) -> None:
        """Remove the line of progress."""
        if self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            self._width = 0


def duration(seconds: float | None) -> str:
    """Return a time as `h:mm:ss`; `-` for an unknown one."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def describe(totals: Totals, per_s: float | None = None) -> str:
    """Return the counts of a run in one line of at most 79 characters."""
    share = f" ({100 * totals.answered // totals.lines} %)" if totals.lines else ""
    text = f"{totals.answered:,}/{totals.lines:,} answered{share}"
    if totals.failed:
        text += f", {totals.failed:,} failed"
    if waiting := totals.published - totals.answered:
        text += f", {waiting:,} in flight"
    if per_s:
        text += f", {per_s:,.1f}/s, {duration((totals.lines - totals.answered) / per_s)} left"
    return text


def failure_line(failure: Failure) -> str:
    """Return one class of errors with its example, for a person."""
    example = " ".join(failure.message.split())
    return f"  {failure.count:,} x {failure.error_class}, e.g. line {failure.number}: {example}"


def tell_result(teller: Teller, ledger: Ledger, output: str, progress: CollectProgress | None) -> None:
    """Tell how a collection ended: counts, and an example of each class of errors."""
    totals, failures = ledger.totals() if progress is None else progress.totals, ledger.failures()
    state = "complete" if totals.is_complete else "incomplete"
    lines = [f"{state}: {describe(totals)}"]
    if not totals.is_input_read:
        lines.append("  the input is not submitted to its end: run `submit` again")
    elif totals.published < totals.lines:
        lines.append(f"  {totals.lines - totals.published:,} lines are not published: run `submit` again")
    lines += [failure_line(failure) for failure in failures]
    if progress is not None and (progress.duplicates or progress.foreign):
        lines.append(f"  dropped: {progress.duplicates:,} duplicates, {progress.foreign:,} of other runs")
    if failures:
        lines.append("  `inference-worker retry-failed` sends those again that may succeed")
    teller.event(
        state,
        "\n".join(lines),
        run=ledger.path,
        output=output,
        lines=totals.lines,
        published=totals.published,
        answered=totals.answered,
        failed=totals.failed,
        input_tokens=totals.input_tokens,
        output_tokens=totals.output_tokens,
        duplicates=progress.duplicates if progress else 0,
        foreign=progress.foreign if progress else 0,
        failures=[
            {"error_class": each.error_class, "count": each.count, "line": each.number, "message": each.message}
            for each in failures
        ],
    )


@asynccontextmanager
async def connected(settings: Settings, *, subscription: str | None = None) -> AsyncIterator[Broker]:
    """
    Connect to Pub/Sub; with a subscription, as its subscriber.

    Raises:
        SettingsError: No credentials or no project; permanent.
        WorkerError: Pub/Sub cannot be reached.

    Cancellation: the connection is closed.
    """
    pubsub = settings.pubsub.model_copy(
        update={
            "request_subscription": subscription or settings.pubsub.request_subscription,
            "max_in_flight": ANSWERS_IN_FLIGHT,
        }
    )
    broker = await Broker.connect(pubsub)
    try:
        yield broker
    except ConnectionError as error:
        raise WorkerError(f"Pub/Sub cannot be reached: {error}") from error
    finally:
        await broker.aclose()


async def make_subscription(broker: Broker, ledger: Ledger, response_topic: str) -> str:
    """
    Create a subscription of the run's own, filtered by its id, and note it in the ledger; return its name.

    Raises:
        BrokerResourceError: Refused, or the topic is missing; permanent.
        BrokerError: Pub/Sub cannot be reached; retryable.

    Cancellation: it may exist; the ledger has its name.
    """
    run_id = ledger.run.run_id
    project = ledger.run.topic.split("/")[1]
    name = f"projects/{project}/subscriptions/run-{run_id}-{secrets.token_hex(3)}"
    ledger.note({SUBSCRIPTION: name, OWNS_SUBSCRIPTION: "yes"})  # first: so that it is removed whatever happens next
    async with _administration(broker) as channel:
        await create_run_subscription(channel, name, response_topic, attribute=RUN_ID, value=run_id)
    return name


@asynccontextmanager
async def _administration(broker: Broker) -> AsyncIterator[grpc.aio.Channel]:
    channel = broker.channel()
    try:
        yield channel
    finally:
        await channel.close(None)


class _Answers:
    """The messages of the run's subscription; see `worker.client.ports.Answers`."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    async def __call__(self, handler: AnswerHandler) -> None:
        async def take(message: ReceivedMessage) -> Settlement:
            try:
                await handler(message.data, message.attributes, message.message_id)
            except ClientError:  # the collection is ending and reports the reason itself
                return Settlement.NACK
            return Settlement.ACK

        await self._broker.subscriber(Metrics()).run(take)


async def collect_run(
    namespace: argparse.Namespace, settings: Settings, ledger: Ledger, output: str, teller: Teller
) -> int:
    """
    Collect the answers of a run; return the exit code.

    Args:
        namespace: With the options of `add_output_options`.
        settings: How Pub/Sub is reached.
        ledger: Of the run; its notes name the subscription.
        output: Path of the answers.
        teller: Is told how it goes.

    Raises:
        WorkerError: An output, the ledger or the broker failed; what was written stays.

    Cancellation: what has arrived is written; the same command continues.
    """
    files = open_outputs(output, namespace.errors, is_ordered=namespace.ordered)
    progress: CollectProgress | None = None
    try:
        reconcile(ledger, files)
        if not ledger.totals().is_complete:
            subscription = ledger.get(SUBSCRIPTION)
            if subscription is None:
                raise SettingsError(
                    ["--subscription: name a subscription of the response topic that is for this run alone"]
                )
            async with connected(settings, subscription=subscription) as broker:
                progress = await _collect(namespace, ledger, files, broker, teller)
    finally:
        files.close()
    is_complete = ledger.totals().is_complete if progress is None else progress.totals.is_complete
    if is_complete:
        sort_outputs(files)
        await _remove_subscription(settings, ledger, teller)
    tell_result(teller, ledger, output, progress)
    return 0 if is_complete else EXIT_FAILED


async def _collect(
    namespace: argparse.Namespace, ledger: Ledger, files: Files, broker: Broker, teller: Teller
) -> CollectProgress:
    began, before = time.monotonic(), ledger.totals().answered

    def show(progress: CollectProgress) -> None:
        totals = progress.totals
        span = time.monotonic() - began
        per_s = (totals.answered - before) / span if span > 1 else None
        teller.progress(
            "collecting", describe(totals, per_s), answered=totals.answered, failed=totals.failed, lines=totals.lines
        )

    collection = Collection(ledger, files, _Answers(broker), fsync=namespace.fsync, on_progress=show)
    try:
        await collection.run(timeout_s=namespace.timeout, idle_timeout_s=namespace.idle_timeout)
    finally:
        teller.clear()
    return collection.progress()


async def _remove_subscription(settings: Settings, ledger: Ledger, teller: Teller) -> None:
    """Remove the subscription that the run made; what cannot be removed is told and does not fail the run."""
    if ledger.get(OWNS_SUBSCRIPTION) is None:
        return
    name = ledger.take_when_complete(SUBSCRIPTION)  # lines that are submitted from now on get another one
    if name is None:
        return
    try:
        async with connected(settings) as broker, _administration(broker) as channel:
            await delete_run_subscription(channel, name)
    except WorkerError as error:
        teller.event("subscription_left", f"the subscription {name} is left: {error}", subscription=name)


async def interruptible(task: "asyncio.Future[int]", teller: Teller) -> int:
    """
    Wait for a command's task, which Ctrl-C and SIGTERM cancel; return the exit code.

    Cancellation: cancels the task.
    """
    on_signals(task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        teller.event("interrupted", "interrupted; the same command continues this run")
        return EXIT_INTERRUPTED
