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
from typing import Any, NamedTuple

from worker.cli.exit_codes import EXIT_FAILED, EXIT_USAGE
from worker.cli.parser import Parser, describe
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
    "submit": Command("publish a file of requests to the request topic", "submit"),
    "collect": Command("write the answers of a submitted file", "collect"),
    "cancel": Command("tell all workers that some requests are not wanted any more", "cancel"),
    "watch": Command("a live view of a submitted file", "watch"),
    "retry-failed": Command("send the failed lines of a submitted file again", "retry"),
    "batches": Command("OpenAI's Files and Batches API in front of the topics", "batches"),
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
    "completion": Command("print the completion script of a shell", "completion"),
}


def run_command(arguments: Sequence[str]) -> int:
    """Parse the arguments, run the command, return the exit code."""
    namespace = build_parser(arguments).parse_args(arguments)
    if namespace.command is None:
        namespace.parser.print_help()
        return 0
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


def build_parser(arguments: Sequence[str] | None) -> Parser:
    """
    Return the parser of all commands, with the options of those that are asked for.

    Args:
        arguments: Of the program; `None` asks for every command.
    """
    parser = Parser(prog="inference-worker")
    describe(
        parser,
        "Pub/Sub batch inference worker: publish a request to a topic, and a well-formed answer to it comes back "
        "on the response topic.",
        examples=[
            "inference-worker local requests.jsonl answers.jsonl",
            "inference-worker run --config worker.yaml",
            "inference-worker COMMAND --help",
        ],
        exits={0: "done", 1: "the command failed", 2: "settings or arguments cannot be used", 130: "interrupted"},
    )
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    parser.add_argument("--watch-stdin", action="store_true", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    asked_for = next((argument for argument in arguments or () if not argument.startswith("-")), None)
    first = arguments[0] if arguments else None
    for name, command in COMMANDS.items():
        if first in COMMANDS and name != first:  # cannot be meant, and is not listed
            continue
        subparser = commands.add_parser(name, help=command.help)
        if arguments is None or name == asked_for:
            getattr(import_module(f"worker.cli.{command.module}"), command.add_arguments)(subparser)
    return parser


class _Version(argparse.Action):
    """Print the version; read only then, since the packages' metadata are slow to import."""

    def __init__(self, option_strings: Sequence[str], **options: Any) -> None:
        super().__init__(option_strings, **{**options, "dest": argparse.SUPPRESS, "nargs": 0})

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version  # noqa: PLC0415

        print(f"inference-worker {version('pubsub-inference-worker')}")
        parser.exit()
