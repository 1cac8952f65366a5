"""`inference-worker completion`: the script that makes a shell complete commands, options and file names."""

import argparse

import shtab

from worker.cli.parser import describe

SHELLS = ("bash", "zsh", "fish", "tcsh")
_FILES = frozenset({"FILE", "INPUT", "OUTPUT"})
"""Metavars of arguments that are files."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's argument."""
    describe(
        parser,
        "Print a script that completes commands, options and file names. It is static: to complete starts no Python.",
        examples=[
            "source <(inference-worker completion bash)      # in ~/.bashrc",
            "source <(inference-worker completion zsh)       # in ~/.zshrc, after compinit",
            "inference-worker completion fish | source      # in ~/.config/fish/config.fish",
        ],
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell that reads the script")


def run(namespace: argparse.Namespace) -> int:
    """Print the script."""
    from worker.cli.main import build_parser  # noqa: PLC0415 - it imports the commands

    parser = build_parser(None)
    _complete_files(parser)
    print(shtab.complete(parser, namespace.shell))
    return 0


def _complete_files(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:  # noqa: SLF001 - argparse has no public way to its arguments
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for subparser in action.choices.values():
                _complete_files(subparser)
        elif action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined] # shtab's way to say so
