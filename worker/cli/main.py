"""
The command line: arguments in, exit codes out.

A command's module is imported only when the command is asked for, so that `--help` is quick and the worker in
production loads nothing of the emulators.
"""

import argparse
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import NamedTuple

from worker.cli.exit_codes import EXIT_FAILED, EXIT_USAGE
from worker.errors import SettingsError, WorkerError


class Command(NamedTuple):
    """One command of the program."""

    help: str
    module: str
    """In this folder."""
    add_arguments: str = "add_arguments"
    """Function of the module: `(parser) -> None`."""
    run: str = "run"
    """Function of the module: `(namespace) -> exit code`."""


COMMANDS: Mapping[str, Command] = {
    "run": Command("the worker; what the container starts", "run"),
    "local": Command("answer a file of requests, everything on this machine", "local"),
    "localpubsub": Command(
        "the embedded Pub/Sub server, for development", "servers", "add_localpubsub", "run_localpubsub"
    ),
    "simbackend": Command(
        "simulated OpenAI-compatible server, for rehearsals", "servers", "add_simbackend", "run_simbackend"
    ),
    "config": Command("what the settings mean", "config"),
    "policy": Command("what the worker does about errors", "policy"),
    "setup": Command("create or update topics, subscriptions, retry and dead-letter policy", "setup"),
    "replay": Command("publish requests that failed permanently to the request topic again", "replay"),
    "report": Command("statistics of a finished run, from the answers it wrote", "report"),
}


def run_command(arguments: Sequence[str]) -> int:
    """Parse the arguments, run the command, return the exit code."""
    namespace = _parser(arguments).parse_args(arguments)
    if namespace.watch_stdin:
        from worker.cli.loop import stop_with_parent  # noqa: PLC0415 - of processes that `local` starts

        threading.Thread(target=stop_with_parent, daemon=True).start()
    command = COMMANDS[namespace.command]
    try:
        code: int = getattr(import_module(f"worker.cli.{command.module}"), command.run)(namespace)
    except SettingsError as error:
        print(f"inference-worker: {error}", file=sys.stderr)
        return EXIT_USAGE
    except WorkerError as error:
        print(f"inference-worker: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:  # before or after the time in which a command listens to it
        return 128 + signal.SIGINT
    return code


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser of all commands, with the options of the one that is asked for."""
    parser = argparse.ArgumentParser(
        prog="inference-worker", description="Pub/Sub batch inference worker: one well-formed answer for every request."
    )
    parser.add_argument("--watch-stdin", action="store_true", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    asked_for = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.help)
        if name == asked_for:
            getattr(import_module(f"worker.cli.{command.module}"), command.add_arguments)(subparser)
    return parser
