"""Every command that a document shows is one that the program understands."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.cli.main import build_parser

ROOT = Path(__file__).parents[3]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/*.md"), *ROOT.glob("examples/**/*.md")]
)


def shown(page: Path) -> Iterator[str]:
    """Yield the commands of a page: of blocks, continued lines joined, and of code within sentences."""
    text = page.read_text("utf-8")
    for block, span in re.findall(r"^```\w*\n(.*?)^```|`(inference-worker [^`]+)`", text, re.MULTILINE | re.DOTALL):
        whole = re.sub(r"\\\n\s*", " ", block or span.replace("\n", " "))
        whole = re.sub(r"'[^']*'", lambda quoted: quoted[0].replace("\n", " "), whole)
        for line in whole.splitlines():
            for command in re.findall(r"(?:^|[$&|(] )\s*(?:\.venv/bin/)?(inference-worker (?![a-z]+://).*)", line):
                yield re.split(r"\s+(?:#|&&|\||&$|>|2>|<)(?:\s|$)", command)[0].rstrip(" &)")


COMMANDS = sorted({(page.relative_to(ROOT).as_posix(), command) for page in PAGES for command in shown(page)})


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}: {command}" for page, command in COMMANDS])
def test_a_shown_command_is_understood(page: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Command and options exist, and what is required is there; `…` and capitals stand for the reader's own."""
    arguments = [argument.replace("…", "500") for argument in shlex.split(command)[1:] if argument != "COMMAND"]
    if all(re.fullmatch(r"[a-z-]+", argument) for argument in arguments):
        arguments.append("--help")  # a command that is only named
    code: object = 0
    try:
        build_parser(arguments).parse_args(arguments)
    except SystemExit as end:
        code = end.code
    assert code == 0, f"{page}: {command}\n{capsys.readouterr().err}"


def test_the_documents_show_commands() -> None:
    """The pattern above finds them."""
    assert len(COMMANDS) > 40
