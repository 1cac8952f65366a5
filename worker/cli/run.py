"""`inference-worker run`: the worker; what the container starts."""

import argparse
import gc
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from worker.cli.arguments import add_settings, settings_from
from worker.cli.exit_codes import EXIT_FAILED, EXIT_USAGE
from worker.cli.parser import describe
from worker.errors import SettingsError, WorkerError

YOUNG_OBJECTS = 10_000
"""Objects made and not freed after which the garbage collector looks through the youngest.  A burst of deliveries alone
reaches the 700 of CPython 3.11 and the 2,000 of 3.13: at 2,000 the collector took one in thirty instructions of a
message with 64 in flight and one in twenty with 256, at 10,000 next to none.  What it would have freed is little: a
closed connection leaves a dozen small objects, and no failure leaves a request."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    describe(
        parser,
        "Run the worker until SIGTERM: it takes requests from a subscription, has a model server answer them and "
        "publishes the answers. On SIGTERM it finishes what is under way.",
        examples=[
            "inference-worker run --config worker.yaml",
            "inference-worker run --config worker.yaml --set backend.window.max=128",
            "WORKER_BACKEND__BASE_URL=http://vllm:8000 inference-worker run",
        ],
        exits={
            0: "stopped and drained",
            EXIT_FAILED: "the subscription or topic is gone or refused",
            EXIT_USAGE: "settings or arguments cannot be used; every fault is named",
        },
    )
    add_settings(parser)


def run(namespace: argparse.Namespace) -> int:
    """Run the worker until it is stopped; end the process with its exit code."""
    gc.disable()  # until `tune_collector`: what is imported stays, and to look through it again and again takes long
    try:
        return _run(namespace)
    finally:
        gc.enable()


def _run(namespace: argparse.Namespace) -> int:
    from worker.cli.loop import on_signals, run_loop  # noqa: PLC0415 - on demand, as all below

    with without("rich"):
        from worker.telemetry.logs import configure_logs, get_logger, is_for_machines  # noqa: PLC0415
    try:
        settings = settings_from(namespace)
    except SettingsError as error:
        if sys.stderr.isatty():
            raise
        configure_logs("json", "info")  # a pod's log, where a line is a record
        get_logger("service").error("startup_failed", error=error.one_line)
        return EXIT_USAGE
    lines = configure_logs(settings.log.format, settings.log.level)
    from worker.service import Service  # noqa: PLC0415 - most of the imports; unusable settings are told before

    service: Service | None = None

    async def serve() -> int:
        nonlocal service
        service = Service(settings)
        tune_collector()
        on_signals(service.stop)
        return await service.run()

    if is_for_machines(settings.log.format, lines):
        in_force = settings.model_dump(mode="json")
    else:  # a person knows the defaults, or asks `config show`
        in_force = dict(flat(settings.model_dump(mode="json", exclude_defaults=True)))
    get_logger("service").info("settings_loaded", **in_force)
    try:
        code = run_loop(serve)
    except WorkerError as error:
        has_started = service is not None and service.has_started
        get_logger("service").error("worker_failed" if has_started else "startup_failed", error=error.one_line)
        code = EXIT_USAGE if isinstance(error, SettingsError) else EXIT_FAILED
    except Exception:  # noqa: BLE001 - whatever it is, the process must end: see below
        get_logger("service").exception("worker_failed")
        code = EXIT_FAILED
    # Threads may still wait, for a name server or a metadata server; everything of the worker is closed by now.
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a full disk or a closed pipe changes no exit code
            stream.flush()
    os._exit(code)


def flat(sections: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each key of nested sections with its full path, `backend.window.max`, and its value."""
    for key, value in sections.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{path}{key}.")
        else:
            yield path + key, value


@contextmanager
def without(library: str) -> Iterator[None]:
    """
    Have what is imported here take a library for missing that it can do without.

    structlog imports rich for tracebacks in colours, which the worker does not write; that is 0.05 s of CPU.
    """
    is_loaded = library in sys.modules
    if not is_loaded:
        sys.modules[library] = None  # type: ignore[assignment]  # as the import system documents it
    try:
        yield
    finally:
        if not is_loaded:
            del sys.modules[library]


def tune_collector() -> None:
    """
    Collect garbage less often, and never again what exists already: modules, settings, the parts of the worker.

    An answered message leaves no cycles behind: its objects are freed at once by their counts of references, and a
    search for cycles among them was a twelfth of all CPU.  Cycles are left by failures, whose tracebacks hold
    the request.  To be called once, when everything is imported.  It does not collect: that would take 0.06 s to find
    two thousand small objects that the imports have left.
    """
    gc.freeze()
    young, *older = gc.get_threshold()
    gc.set_threshold(max(young, YOUNG_OBJECTS), *older)
    gc.enable()
