"""
What `submit`, `collect`, `watch` and `retry-failed` share: the settings they need, the ledger, and how a run is told.

A person at a terminal sees a line of progress; a file or pipe gets only the last lines; `--json` prints one JSON object
for each event on standard output.
"""

import argparse
import json
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from worker.brokers.connection import Broker
from worker.cli.arguments import settings_from
from worker.client.errors import LedgerError
from worker.client.ledger import Failure, Ledger, Totals
from worker.client.submit import Upload
from worker.client.summary import one_line, say
from worker.errors import SettingsError, WorkerError
from worker.settings.schema import Settings
from worker.wire.object_uri import ObjectUri, parse_object_prefix

LEDGER_SUFFIX = ".run"
"""Of the ledger beside the input."""
RETRYING = "retrying"
"""Note in the ledger: what `retry-failed` is taking out of the outputs."""
ANSWERS_IN_FLIGHT = 1000
SHOW_EVERY_S = 0.25
_TO_END = "\x1b[K"
"""Clears a terminal's line from the cursor on, with what the terminal has put there itself (`^C`)."""
_UNUSED = "unused"
_NAMES = ("pubsub.request_subscription", "pubsub.response_topic", "backend.base_url")


def run_settings(namespace: argparse.Namespace) -> Settings:
    """
    Return the settings, with `unused` for what a run over a file may do without.

    Raises:
        SettingsError: Unusable; names every fault.
    """
    try:
        return settings_from(namespace, needs_backend=False)
    except SettingsError as error:
        missing = [name for name in _NAMES if any(fault.startswith(f"{name}: is required") for fault in error.faults)]
        others = [fault for fault in error.faults if not fault.startswith(tuple(f"{name}: is" for name in missing))]
        if others:
            raise SettingsError(others) from None
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
        self._is_shown = False

    def event(self, name: str, text: str, **fields: Any) -> None:
        """Tell something that happened once: as JSON with its fields, or as text for a person."""
        self.clear()
        if self._is_json:
            sys.stdout.write(json.dumps({"event": name, **fields}, ensure_ascii=False) + "\n")
            sys.stdout.flush()
        else:
            say(text)

    def progress(self, name: str, text: str, **fields: Any) -> None:
        """Show how far it is; not more often than `SHOW_EVERY_S`, and as JSON once a second."""
        now = time.monotonic()
        if now - self._shown_at < (1.0 if self._is_json else SHOW_EVERY_S):
            return
        self._shown_at = now
        if self._is_json:
            self.event(name, text, **fields)
        elif self._is_live:
            sys.stderr.write(f"\r{text[:79]}{_TO_END}")
            sys.stderr.flush()
            self._is_shown = True

    def clear(self) -> None:
        """Remove the line of progress."""
        if self._is_shown:
            sys.stderr.write(f"\r{_TO_END}")
            self._is_shown = False


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


def failure_lines(failure: Failure) -> list[str]:
    """Return one class of errors with its example, for a person: at most three lines of at most 79 characters."""
    text = f"{failure.count:,} x {failure.error_class}, e.g. line {failure.number}: {one_line(failure.message)}"
    return textwrap.wrap(
        text, 79, initial_indent="  ", subsequent_indent="    ", max_lines=3, placeholder=" …", break_on_hyphens=False
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
