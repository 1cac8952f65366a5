"""
The command line: arguments in, exit codes out; thin.

Exit codes: 0 done, 1 a lost subscription, refused credentials or lines without an answer, 2 unusable settings or
arguments, 130 after Ctrl-C.
"""

import argparse
import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from worker.cli.policy import add_policy
from worker.cli.report import add_report
from worker.cli.setup import add_setup
from worker.errors import SettingsError, WorkerError
from worker.settings.load import config_file, load_settings, load_without_backend
from worker.settings.schema import Settings

EXIT_FAILED, EXIT_USAGE = 1, 2
ORPHAN_S = 5.0
"""How long a part of `local` may drain after its parent died: its broker dies at the same time."""


def run_command(arguments: Sequence[str]) -> int:
    """Parse the arguments, run the command, return the exit code."""
    namespace = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = namespace.command
    if namespace.watch_stdin:
        threading.Thread(target=_stop_with_parent, daemon=True).start()
    try:
        return command(namespace)
    except SettingsError as error:
        print(f"inference-worker: {error}", file=sys.stderr)
        return EXIT_USAGE
    except WorkerError as error:
        print(f"inference-worker: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:  # before or after the time in which a command listens to it
        return 128 + signal.SIGINT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="inference-worker", description="Pub/Sub batch inference worker: one well-formed answer for every request."
    )
    parser.add_argument("--watch-stdin", action="store_true", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_run(commands)
    _add_local(commands)
    _add_localpubsub(commands)
    _add_simbackend(commands)
    _add_config(commands)
    add_policy(commands)
    add_setup(commands)
    _add_replay(commands)
    add_report(commands)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings (also WORKER_CONFIG)")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="one setting, e.g. http.port=0; may be repeated"
    )


def _load(namespace: argparse.Namespace, load: Callable[..., Settings] = load_settings) -> Settings:
    flags: dict[str, str] = {}
    for item in namespace.set:
        key, equals, value = item.partition("=")
        if not equals:
            raise SettingsError([f"--set {item}: expected KEY=VALUE"])
        flags[key] = value
    return load(namespace.config, flags=flags)


def _source(namespace: argparse.Namespace) -> str | None:
    """Return the settings file in use."""
    return namespace.config or config_file()


def _add_run(commands: Any) -> None:
    parser = commands.add_parser("run", help="the worker; what the container starts")
    _add_settings(parser)
    parser.set_defaults(command=_run)


def _run(namespace: argparse.Namespace) -> int:
    from worker.telemetry.logs import configure_logs, get_logger  # noqa: PLC0415 - not needed to say that arguments are wrong

    try:
        settings = _load(namespace)
    except SettingsError as error:
        if sys.stderr.isatty():
            raise
        configure_logs("json", "info")  # a pod's log, where a line is a record
        get_logger("service").error("startup_failed", error=error.one_line)
        return EXIT_USAGE
    configure_logs(settings.log.format, settings.log.level)
    from worker.cli.memory import tune_collector  # noqa: PLC0415
    from worker.service import Service  # noqa: PLC0415 - half a second of imports

    service: Service | None = None

    async def serve() -> int:
        nonlocal service
        service = Service(settings)
        tune_collector()
        _on_signals(service.stop)
        return await service.run()

    get_logger("service").info("settings_loaded", **settings.model_dump(mode="json"))
    try:
        code = run_loop(serve)
    except WorkerError as error:
        has_started = service is not None and service.has_started
        get_logger("service").error("worker_failed" if has_started else "startup_failed", error=error.one_line)
        code = EXIT_USAGE if isinstance(error, SettingsError) else EXIT_FAILED
    except Exception:  # noqa: BLE001 - whatever it is, the process must end: see below
        get_logger("service").exception("worker_failed")
        code = EXIT_FAILED
    # Threads of the client library may still wait for a broker that is gone; everything of ours is closed by now.
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a full disk or a closed pipe changes no exit code
            stream.flush()
    os._exit(code)


def run_loop(main: Callable[[], Awaitable[int]]) -> int:
    """Run a coroutine on uvloop where it is installed, on asyncio's own loop elsewhere."""
    try:
        import uvloop  # noqa: PLC0415
    except ImportError:
        factory = None
    else:
        factory = uvloop.new_event_loop

    async def call() -> int:
        return await main()

    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(call())


def _on_signals(stop: Callable[[], object]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)


def _until_stopped(serve: Callable[[], Awaitable[None]], where: str) -> int:
    """Run a server at an address until SIGTERM or Ctrl-C."""

    async def main() -> int:
        task = asyncio.ensure_future(serve())
        _on_signals(task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            return 0
        except OSError as error:  # the address is taken or not ours
            reason = f"cannot listen on {where}: {error.strerror}" if error.strerror else str(error)
            raise SettingsError([reason]) from None
        return 0

    return run_loop(main)


def _announce(text: str) -> Callable[[str], None]:
    def announce(address: str) -> None:
        print(text.format(address), file=sys.stderr, flush=True)

    return announce


def _stop_with_parent() -> None:
    """Wait until the process that started this one has ended, then stop as for SIGTERM, and soon at any price."""
    while os.read(0, 4096):
        continue
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_S)
    os._exit(EXIT_FAILED)


def _add_local(commands: Any) -> None:
    parser = commands.add_parser("local", help="answer a file of requests, everything on this machine")
    parser.add_argument("input", metavar="INPUT", help="requests, one a line; - for standard input; .gz and .zst work")
    parser.add_argument("output", metavar="OUTPUT", help="answers, one a line; run again it goes on where it stopped")
    parser.add_argument("--backend-url", metavar="URL", help="your OpenAI-compatible server; default: a simulated one")
    parser.add_argument("--concurrency", metavar="N", type=_positive, default=64, help="requests at once at most (64)")
    parser.add_argument("--latency", default="50ms", help="of the simulated backend (50ms)")
    parser.add_argument("--config", metavar="FILE", help="settings of the worker")
    parser.add_argument("--log", metavar="FILE", help="append the worker's log to this file")
    parser.set_defaults(command=_local)


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 (got {text!r})")
    return int(text)


def _local(namespace: argparse.Namespace) -> int:
    from worker.cli.local import EXIT_INTERRUPTED, run_local  # noqa: PLC0415 - half a second of imports
    from worker.telemetry.logs import configure_logs  # noqa: PLC0415

    configure_logs("auto", "error")

    async def main() -> int:
        task = asyncio.ensure_future(run_local(namespace))
        _on_signals(task.cancel)
        try:
            return await task
        except asyncio.CancelledError:
            print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
            return EXIT_INTERRUPTED

    return run_loop(main)


def _add_localpubsub(commands: Any) -> None:
    parser = commands.add_parser("localpubsub", help="the embedded Pub/Sub server, for development")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8085)
    parser.set_defaults(command=_localpubsub)


def _localpubsub(namespace: argparse.Namespace) -> int:
    from worker.emulators.pubsub import serve  # noqa: PLC0415 - needs gRPC

    ready = _announce("embedded Pub/Sub on {0}; export PUBSUB_EMULATOR_HOST={0} to use it")
    where = f"{namespace.host}:{namespace.port}"
    return _until_stopped(lambda: serve(namespace.host, namespace.port, on_ready=ready), where)


def _add_simbackend(commands: Any) -> None:
    from worker.emulators.openai import add_arguments  # noqa: PLC0415

    parser = commands.add_parser("simbackend", help="simulated OpenAI-compatible server, for rehearsals")
    add_arguments(parser)
    parser.set_defaults(command=_simbackend)


def _simbackend(namespace: argparse.Namespace) -> int:
    from worker.emulators.openai import announce, options_from, serve  # noqa: PLC0415

    try:
        options = options_from(namespace)
    except ValueError as error:
        raise SettingsError([str(error)]) from None
    where = f"{namespace.host}:{namespace.port}"
    return _until_stopped(lambda: serve(options, namespace.host, namespace.port, on_ready=announce), where)


def _add_config(commands: Any) -> None:
    parser = commands.add_parser("config", help="what the settings mean")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    check = actions.add_parser("check", help="validate a file; exit 2 with every fault named")
    check.add_argument("config", metavar="FILE")
    check.set_defaults(command=_config_check, set=[])
    show = actions.add_parser("show", help="print the settings in force, secrets masked")
    _add_settings(show)
    show.set_defaults(command=_config_show)


def _config_check(namespace: argparse.Namespace) -> int:
    from worker.policy.engine import load_policy  # noqa: PLC0415

    load_policy(_load(namespace).policy.rules)
    print(f"{namespace.config}: good")
    return 0


def _config_show(namespace: argparse.Namespace) -> int:
    import yaml  # noqa: PLC0415

    print(yaml.safe_dump(_load(namespace).model_dump(mode="json"), sort_keys=False), end="")
    return 0


def _add_replay(commands: Any) -> None:
    parser = commands.add_parser("replay", help="send requests that failed for good back to the request topic")
    _add_settings(parser)
    parser.add_argument("subscription", metavar="SUBSCRIPTION", help="where the copies or dead letters are")
    parser.add_argument("topic", metavar="TOPIC", help="the request topic")
    parser.add_argument("--limit", type=_positive, metavar="N", help="messages at most")
    parser.add_argument("--quiet", type=float, default=10.0, metavar="S", help="end after this long without any (10)")
    parser.set_defaults(command=_replay)


def _replay(namespace: argparse.Namespace) -> int:
    namespace.set += [
        f"pubsub.request_subscription={namespace.subscription}",
        f"pubsub.response_topic={namespace.topic}",
    ]
    settings = _load(namespace, load_without_backend)
    from worker.cli.replay import replay  # noqa: PLC0415
    from worker.telemetry.logs import configure_logs  # noqa: PLC0415

    configure_logs(settings.log.format, settings.log.level)

    async def main() -> int:
        return await replay(settings.pubsub, namespace.topic, limit=namespace.limit, quiet_s=namespace.quiet)

    return run_loop(main)
