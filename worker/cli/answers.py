"""
How the answers of a run arrive and are written: the run's subscription, and collecting from it.

Nothing is published before the subscription is there.  Its name is noted in the ledger before it is made (`PLANNED`),
so that a command that is killed in between makes the same one when it is repeated; it counts as made (`SUBSCRIPTION`)
when Pub/Sub has confirmed it.
"""

import argparse
import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import grpc

from worker.brokers.admin.run_subscription import (
    create_run_subscription,
    delete_run_subscription,
    look_at_subscription,
)
from worker.brokers.connection import Broker
from worker.cli.exit_codes import EXIT_FAILED, EXIT_INTERRUPTED
from worker.cli.loop import on_signals
from worker.cli.receive import ReceivedAnswers
from worker.cli.retryable import RETRYABLE
from worker.cli.runs import Teller, connected, describe, failure_lines
from worker.client.collect import (
    Collection,
    CollectProgress,
    Files,
    keep_order,
    open_outputs,
    reconcile,
    sort_outputs,
)
from worker.client.io.files import STANDARD
from worker.client.ledger import Ledger
from worker.errors import BrokerResourceError, SettingsError, WorkerError
from worker.settings.schema import Settings
from worker.wire.message import RUN_ID

SUBSCRIPTION, OWNS_SUBSCRIPTION, PLANNED = "subscription", "owns_subscription", "planned_subscription"
"""Notes in the ledger: where the answers come from, whether the run made that, and the name of what it is making."""
WAITING_SINCE = "waiting_since"
"""Note in the ledger, Unix seconds: no line that was published before has no answer."""
LEFT = "left_subscription"
"""Note in the ledger: a subscription that the run made, does not need any more, and has still to remove."""
RETRY = "retry"
"""Note in the ledger: what `retry-failed` has published again and what is not answered to the end."""
LAST_S = 10.0
"""How long `collect` waits for one more answer of a subscription that gets no new ones."""
_DAY_S = 86_400


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


def refuse_mixed_output(namespace: argparse.Namespace, output: str | None) -> None:
    """
    Refuse `--json` together with answers on standard output.

    Raises:
        SettingsError: Both would be written there.
    """
    if namespace.json and STANDARD in (output, namespace.errors):
        raise SettingsError(["--json: its events and the answers cannot both go to standard output (-)"])


async def prepare_subscription(
    broker: Broker, ledger: Ledger, teller: Teller, *, name: str | None, responses: str | None, wants_own: bool
) -> None:
    """
    See to it that the answers to what is published next have a place to go.

    Args:
        broker: Connected.
        ledger: Of the run; gets the notes.
        teller: Is told what was made, and what is lost.
        name: An existing subscription, short or full; `None` where the command names none.
        responses: The response topic, short or full; `None` where nothing names it.
        wants_own: Without a name, a run that has no subscription gets one of its own.

    Raises:
        SettingsError: The run has another subscription, or the response topic is not known; permanent.
        BrokerResourceError: The subscription cannot be used or made; permanent.
        BrokerError: Pub/Sub cannot be reached; retryable.

    Cancellation: the subscription may exist; the ledger has its name.
    """
    topic = broker.full_topic(responses) if responses is not None else None
    async with _administration(broker) as channel:
        await _remove_left(channel, ledger, teller)
        if name is not None:
            await _use(channel, ledger, broker.full_subscription(name), topic)
            return
        noted = ledger.get(SUBSCRIPTION)
        if noted is not None:
            state = await look_at_subscription(channel, noted)
            if state.fault is None:
                return
            if ledger.get(OWNS_SUBSCRIPTION) is None:
                raise _useless(noted, state.fault)
            totals = ledger.totals()
            waiting = totals.published - totals.answered
            if waiting and state.holds_messages:
                raise BrokerResourceError(f"{noted} {state.fault}; `collect` takes those that it has: run it first")
            if waiting:
                teller.event("answers_lost", _gone(noted, state.fault, waiting), subscription=noted, lines=waiting)
            ledger.note({SUBSCRIPTION: None, LEFT: noted})
            await _remove_left(channel, ledger, teller)
        elif not (wants_own or ledger.get(PLANNED) is not None):
            return
        if topic is None:
            raise SettingsError(["--response-topic: is required to collect the answers (or pubsub.response_topic)"])
        made = await _make(channel, ledger, topic)
        teller.event("subscribed", f"made the subscription {made}", subscription=made)


async def _use(channel: grpc.aio.Channel, ledger: Ledger, name: str, topic: str | None) -> None:
    """Note a subscription that an operator made, if answers can come over it."""
    state = await look_at_subscription(channel, name)
    if state.fault is not None:
        raise _useless(name, state.fault)
    if topic is not None and state.topic not in {"", topic}:
        raise SettingsError([f"--subscription: {name} is of {state.topic}, the answers go to {topic}"])
    _note_subscription(ledger, name)
    if (planned := ledger.get(PLANNED)) is not None:
        await delete_run_subscription(channel, planned)
        ledger.note({PLANNED: None})


def _useless(name: str, fault: str) -> BrokerResourceError:
    return BrokerResourceError(
        f"{name} {fault}: nothing is published, since its answer would be lost; name another with --subscription"
    )


async def name_subscription(broker: Broker, ledger: Ledger, name: str) -> None:
    """
    Note the subscription, short or full, from which the answers of a run are to be collected.

    Raises:
        SettingsError: The run has made one; permanent.
        BrokerResourceError: It does not exist, or has nothing; the one that was noted before stays.
        BrokerError: Pub/Sub cannot be reached; retryable.

    Cancellation: leaves nothing behind.
    """
    full = broker.full_subscription(name)
    if ledger.get(SUBSCRIPTION) != full:
        async with _administration(broker) as channel:
            state = await look_at_subscription(channel, full)
        if not state.holds_messages:
            raise BrokerResourceError(f"{full} {state.fault}")
    _note_subscription(ledger, full)


def _note_subscription(ledger: Ledger, name: str) -> None:
    """Note the full name; raises SettingsError if the run has made another one."""
    noted = ledger.get(SUBSCRIPTION)
    if noted not in {None, name} and ledger.get(OWNS_SUBSCRIPTION) is not None:
        raise SettingsError([f"--subscription: leave it out; the run has made {noted} for its answers"])
    if noted != name:
        ledger.note({SUBSCRIPTION: name, OWNS_SUBSCRIPTION: None})


async def _make(channel: grpc.aio.Channel, ledger: Ledger, topic: str) -> str:
    """Create a subscription of the run's own, filtered by its id, and note it; return its name."""
    run_id, project = ledger.run.run_id, ledger.run.topic.split("/")[1]
    name = ledger.get(PLANNED)
    if name is None:
        name = f"projects/{project}/subscriptions/run-{run_id}-{secrets.token_hex(3)}"
        ledger.note({PLANNED: name})
    await create_run_subscription(channel, name, topic, attribute=RUN_ID, value=run_id)
    ledger.note({SUBSCRIPTION: name, OWNS_SUBSCRIPTION: "yes", PLANNED: None})
    return name


@asynccontextmanager
async def _administration(broker: Broker) -> AsyncIterator[grpc.aio.Channel]:
    channel = broker.channel()
    try:
        yield channel
    finally:
        await channel.close(None)


async def _remove_left(channel: grpc.aio.Channel, ledger: Ledger, teller: Teller) -> None:
    """Remove the subscription that the run does not need any more; what cannot be removed is told, and stays noted."""
    if (name := ledger.get(LEFT)) is None:
        return
    try:
        await delete_run_subscription(channel, name)
    except WorkerError as error:
        teller.event("subscription_left", f"the subscription {name} is left: {error}", subscription=name)
    else:
        ledger.note({LEFT: None})


def _gone(name: str, fault: str, waiting: int, *, is_taken: bool = False) -> str:
    """Say that answers are gone, and what helps."""
    what = "what it held is collected" if is_taken else "the answers that it held are gone"
    return (
        f"{name} {fault}: {what}; "
        f"`inference-worker retry-failed --lost` publishes the {waiting:,} lines again that have none"
    )


def note_waiting(ledger: Ledger) -> None:
    """Note since when lines wait for answers, before some are published."""
    totals = ledger.totals()
    if totals.published == totals.answered or ledger.get(WAITING_SINCE) is None:
        ledger.note({WAITING_SINCE: repr(time.time())})


async def _look_for_gone(broker: Broker, ledger: Ledger, name: str, teller: Teller) -> str | None:
    """
    Look whether answers are gone that the run waits for, and tell it; return why none come any more but those held.

    Raises:
        BrokerResourceError: No answer can come any more; permanent.
    """
    totals = ledger.totals()
    waiting = totals.published - totals.answered
    async with _administration(broker) as channel:
        state = await look_at_subscription(channel, name)
    if state.fault is not None and not state.holds_messages:
        raise BrokerResourceError(_gone(name, state.fault, waiting))
    age_s = time.time() - float(ledger.get(WAITING_SINCE) or time.time())
    if waiting and state.retention_s is not None and age_s > state.retention_s:
        text = (
            f"{name} keeps answers for {state.retention_s / _DAY_S:,.3g} days, and lines without one were published "
            f"{age_s / _DAY_S:,.3g} days ago: their answers may be gone; "
            "`inference-worker retry-failed --lost` publishes them again"
        )
        teller.event("answers_expired", text, subscription=name, retention_s=state.retention_s, age_s=round(age_s))
    return state.fault


@contextmanager
def run_outputs(namespace: argparse.Namespace, ledger: Ledger, output: str) -> Iterator[Files]:
    """
    Open the outputs of a run, and tell the ledger what stands in them; a failure leaves no new and empty file.

    Args:
        namespace: With the options of `add_output_options`.
        ledger: Of the run.
        output: Path of the answers.

    Raises:
        OutputError: One cannot be opened or continued.
        LedgerError: The ledger cannot be read or written.
    """
    keep_order(ledger, output, namespace.errors, is_ordered=namespace.ordered)
    files = open_outputs(output, namespace.errors, is_ordered=namespace.ordered)
    try:
        reconcile(ledger, files)
        files.refuse_lacking(ledger)
        yield files
    except BaseException:
        files.close()
        files.remove_new()
        raise
    files.close()


async def collect_run(
    namespace: argparse.Namespace, settings: Settings, ledger: Ledger, files: Files, teller: Teller
) -> int:
    """
    Collect the answers of a run; return the exit code.

    Args:
        namespace: With the options of `add_output_options`.
        settings: How Pub/Sub is reached.
        ledger: Of the run; its notes name the subscription.
        files: The outputs; are closed.
        teller: Is told how it goes.

    Raises:
        WorkerError: An output, the ledger or the broker failed; what was written stays.

    Cancellation: what has arrived is written; the same command continues.
    """
    progress: CollectProgress | None = None
    subscription = fault = None
    try:
        if not ledger.totals().is_complete:
            subscription = ledger.get(SUBSCRIPTION)
            if subscription is None and ledger.get(PLANNED) is not None:
                raise SettingsError(["`submit` was interrupted before it made the subscription: run it again first"])
            if subscription is None:
                raise SettingsError(
                    ["--subscription: name a subscription of the response topic that is for this run alone"]
                )
            async with connected(settings, subscription=subscription) as broker:
                fault = await _look_for_gone(broker, ledger, subscription, teller)
                idle_s = namespace.idle_timeout if fault is None else min(namespace.idle_timeout or LAST_S, LAST_S)
                try:
                    progress = await _collect(namespace, ledger, files, broker, teller, idle_timeout_s=idle_s)
                except BrokerResourceError:
                    await _look_for_gone(broker, ledger, subscription, teller)
                    raise
    finally:
        files.close()
    is_complete = ledger.totals().is_complete if progress is None else progress.totals.is_complete
    if is_complete:
        ledger.note({RETRY: None})
        await sort_outputs(files)
        await _remove_subscription(settings, ledger, teller)
    elif fault is not None:
        assert subscription is not None  # it has the fault
        await _give_up(settings, ledger, subscription, fault, teller)
    tell_result(teller, ledger, files.name, progress)
    return 0 if is_complete else EXIT_FAILED


async def _collect(
    namespace: argparse.Namespace,
    ledger: Ledger,
    files: Files,
    broker: Broker,
    teller: Teller,
    *,
    idle_timeout_s: float | None,
) -> CollectProgress:
    began, before = time.monotonic(), ledger.totals().answered

    def show(progress: CollectProgress) -> None:
        totals = progress.totals
        span = time.monotonic() - began
        per_s = (totals.answered - before) / span if span > 1 else None
        teller.progress(
            "collecting", describe(totals, per_s), answered=totals.answered, failed=totals.failed, lines=totals.lines
        )

    collection = Collection(ledger, files, ReceivedAnswers(broker), fsync=namespace.fsync, on_progress=show)
    try:
        await collection.run(timeout_s=namespace.timeout, idle_timeout_s=idle_timeout_s)
    finally:
        teller.clear()
    return collection.progress()


async def _remove_subscription(settings: Settings, ledger: Ledger, teller: Teller) -> None:
    """Remove the subscription that the run made; what cannot be removed is told and does not fail the run."""
    if ledger.get(OWNS_SUBSCRIPTION) is not None:
        ledger.rename_when_complete(SUBSCRIPTION, LEFT)  # lines that are submitted from now on get another one
    if ledger.get(LEFT) is not None:
        async with connected(settings) as broker, _administration(broker) as channel:
            await _remove_left(channel, ledger, teller)


async def _give_up(settings: Settings, ledger: Ledger, name: str, fault: str, teller: Teller) -> None:
    """Tell that a subscription has nothing more, and remove one that the run made: the next lines get another one."""
    totals = ledger.totals()
    waiting = totals.published - totals.answered
    teller.event("answers_lost", _gone(name, fault, waiting, is_taken=True), subscription=name, lines=waiting)
    if ledger.get(OWNS_SUBSCRIPTION) is not None:
        ledger.note({SUBSCRIPTION: None, LEFT: name})
        async with connected(settings) as broker, _administration(broker) as channel:
            await _remove_left(channel, ledger, teller)


def tell_result(teller: Teller, ledger: Ledger, output: str, progress: CollectProgress | None) -> None:
    """Tell how a collection ended: counts, and an example of each class of errors."""
    totals, failures = ledger.totals() if progress is None else progress.totals, ledger.failures()
    state = "complete" if totals.is_complete else "incomplete"
    lines = [f"{state}: {describe(totals)}"]
    if not totals.is_input_read:
        lines.append("  the input is not submitted to its end: run `submit` again")
    elif totals.published < totals.lines:
        lines.append(f"  {totals.lines - totals.published:,} lines are not published: run `submit` again")
    for failure in failures:
        lines += failure_lines(failure)
    if progress is not None and (progress.duplicates or progress.foreign):
        lines.append(f"  dropped: {progress.duplicates:,} duplicates, {progress.foreign:,} of other runs")
    if failures:
        count = sum(failure.count for failure in failures if failure.error_class in RETRYABLE)
        lines.append(
            f"  `inference-worker retry-failed` sends {count:,} of them again"
            if count
            else "  to send them again when the cause is mended: `retry-failed --classes`"
        )
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
