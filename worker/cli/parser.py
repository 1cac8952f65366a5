"""How every command presents itself: its help, and what is said about a mistyped word."""

import argparse
import functools
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from worker.cli.exit_codes import EXIT_USAGE
from worker.errors import did_you_mean

HELP_COLUMNS = 80
_HELP_COLUMN = 28
_UNKNOWN_CHOICE = re.compile(r"argument (?P<name>\S+): invalid choice: '(?P<word>[^']*)'")


class Parser(argparse.ArgumentParser):
    """
    A parser whose faults suggest the nearest word; its subparsers are of the same class.

    Args:
        options: Of `argparse.ArgumentParser`.
    """

    def __init__(self, **options: Any) -> None:
        layout = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=_HELP_COLUMN)
        super().__init__(formatter_class=layout, **options)
        self.set_defaults(parser=self)

    def parse_args(self, arguments: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does; an unknown option is reported by the command that it was given to."""
        namespace, unknown = self.parse_known_args(arguments, namespace)
        if unknown:
            namespace.parser.refuse(unknown)
        return namespace

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """End the process because of arguments that nothing takes."""
        option = next((word for word in unknown if word.startswith("--")), unknown[0]).partition("=")[0]
        self.error(f"unrecognized arguments: {' '.join(unknown)}{did_you_mean(option, self._option_string_actions)}")

    def error(self, message: str) -> NoReturn:
        """Print the usage and the fault, with the nearest word of the right kind; exit 2."""
        if match := _UNKNOWN_CHOICE.match(message):
            actions = (action for action in self._actions if match["name"] in {action.dest, action.metavar})
            known = [str(choice) for action in actions for choice in action.choices or ()]
            message += did_you_mean(match["word"], known)
        super().error(message)


def describe(
    parser: argparse.ArgumentParser,
    description: str,
    *,
    examples: Sequence[str],
    exits: Mapping[int, str] | None = None,
) -> None:
    """
    Give a command's help a description, examples and the exit codes.

    Args:
        parser: Of the command or of one of its actions.
        description: One or more sentences.
        examples: Command lines, the most usual first.
        exits: Meaning of each exit code; the default is that of a command that prints something.
    """
    parser.description = textwrap.fill(description, HELP_COLUMNS)
    codes = exits or {0: "done", EXIT_USAGE: "settings or arguments cannot be used; every fault is named"}
    lines = ["examples:", *(f"  {example}" for example in examples), "", "exit codes:"]
    for code, meaning in codes.items():
        lines += textwrap.wrap(meaning, HELP_COLUMNS, initial_indent=f"  {code:<5}", subsequent_indent=" " * 7)
    parser.epilog = "\n".join(lines).replace("%", "%%")
