"""The command line: commands, their help, and exit codes."""

import argparse
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from worker.cli.main import COMMANDS, build_parser, run_command
from worker.cli.parser import HELP_COLUMNS
from worker.errors import did_you_mean, did_you_mean_file


@pytest.mark.parametrize("arguments", [["nonsense"], ["run", "--nonsense"], ["config"], ["config", "nonsense"]])
def test_unknown_arguments_exit_2_with_the_usage(arguments: list[str], read_fault: Callable[[], str]) -> None:
    """A command or an option that does not exist is answered with the usage."""
    with pytest.raises(SystemExit) as raised:
        run_command(arguments)
    assert raised.value.code == 2
    assert read_fault().startswith("usage: inference-worker")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` of a command exits 0 with its usage; the program's own help has a line for each command."""
    with pytest.raises(SystemExit) as raised:
        run_command([command, "--help"])
    assert raised.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: inference-worker {command}")
    with pytest.raises(SystemExit):
        run_command(["--help"])
    assert COMMANDS[command].help in " ".join(capsys.readouterr().out.split())


ACTIONS = [
    *((name,) for name in COMMANDS),
    *(("config", "check"), ("config", "show"), ("policy", "explain")),
    *(("batches", "local"), ("batches", "serve"), ("batches", "migrate"), ("batches", "keys")),
    *(("batches", "keys", "add"), ("batches", "keys", "list"), ("batches", "keys", "revoke")),
]


@pytest.mark.parametrize("command", ACTIONS, ids=" ".join)
def test_help_has_examples_and_exit_codes_and_fits_a_terminal(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command and action: a description, examples of itself, its exit codes, a line for each argument."""
    monkeypatch.setenv("COLUMNS", str(HELP_COLUMNS))
    with pytest.raises(SystemExit):
        run_command([*command, "--help"])
    told = capsys.readouterr().out
    examples = told.partition("\nexamples:\n")[2].partition("\n\n")[0]
    assert f"inference-worker {' '.join(command)}" in examples
    assert "\n  0    " in told.partition("\nexit codes:")[2]
    assert max(map(len, told.splitlines())) <= HELP_COLUMNS
    parser: argparse.ArgumentParser = build_parser(command)
    for name in command:
        (choices,) = [each.choices for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
        parser = choices[name]
    assert parser.description
    assert [action.dest for action in parser._actions if not action.help] == []


def test_a_command_that_comes_first_has_the_only_parser(capsys: pytest.CaptureFixture[str]) -> None:
    """The others cannot be meant, and take time to make; behind an option, all are there to be listed."""
    for arguments, expected in ((["run"], ["run"]), (["--help", "run"], [*COMMANDS]), (["rnu"], [*COMMANDS])):
        (commands,) = (
            each for each in build_parser(arguments)._actions if isinstance(each, argparse._SubParsersAction)
        )
        assert list(commands.choices) == expected
    with pytest.raises(SystemExit):
        run_command(["--help", "run"])
    assert set(COMMANDS) <= set(capsys.readouterr().out.split())


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    """On standard output, with 0: it is what was asked for."""
    assert run_command([]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("usage: inference-worker")
    assert set(COMMANDS) <= set(told.out.split())
    assert told.err == ""


def test_the_version_is_that_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    """`--version` prints name and version."""
    with pytest.raises(SystemExit) as raised:
        run_command(["--version"])
    assert raised.value.code == 0
    assert capsys.readouterr().out == f"inference-worker {version('pubsub-inference-worker')}\n"


@pytest.mark.parametrize(
    ("arguments", "suggested"),
    [
        (["lcoal"], "local"),
        (["config", "chekc", "x"], "check"),
        (["report", "x", "--josn"], "--json"),
        (["local", "a", "b", "--backend-ulr=http://x"], "--backend-url"),
        (["policy", "explain", "--stauts", "4"], "--status"),
        (["completion", "bsah"], "bash"),
    ],
)
def test_the_nearest_word_is_suggested(arguments: list[str], suggested: str, read_fault: Callable[[], str]) -> None:
    """Of commands, actions, options and choices; the usage is that of the command."""
    with pytest.raises(SystemExit) as raised:
        run_command(arguments)
    assert raised.value.code == 2
    told = read_fault()
    assert told.endswith(f"; did you mean {suggested}?\n")
    assert told.startswith("usage: inference-worker")


def test_nothing_is_suggested_for_a_word_that_is_near_to_none(tmp_path: Path) -> None:
    """A wrong suggestion is worse than none; a folder that cannot be listed is no fault."""
    assert did_you_mean("xyz", ["run", "local"]) == ""
    assert did_you_mean_file(str(tmp_path / "none" / "x")) == ""
    (tmp_path / "requests.jsonl").touch()
    assert did_you_mean_file(str(tmp_path / "reqests.jsonl")) == "; did you mean requests.jsonl?"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "tcsh"])
def test_completion_names_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The script of each shell has every command and option, and is one that the shell can read."""
    assert run_command(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in [*COMMANDS, "backend-url", "min-tail"])
    if (found := shutil.which(shell)) is not None and shell != "tcsh":  # tcsh has no way to read without running
        subprocess.run([found, "-n"], input=script, text=True, check=True, timeout=30)


def test_completion_in_bash_offers_commands_and_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a person sees them after pressing Tab."""
    if (bash := shutil.which("bash")) is None:
        pytest.skip("there is no bash on this system")
    run_command(["completion", "bash"])
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out)

    def offered(*words: str) -> set[str]:
        line = " ".join(f"'{word}'" for word in words)
        program = f"""
            . {script}
            COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}
            $(complete -p inference-worker | sed 's/.*-F \\([^ ]*\\).*/\\1/')
            printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        told = subprocess.run([bash, "-c", program], capture_output=True, text=True, timeout=30, check=True)
        return set(told.stdout.split())

    assert offered("inference-worker", "re") == {"replay", "report", "retry-failed"}
    assert "--min-tail" in offered("inference-worker", "report", "--m")


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5", ""])
def test_a_count_that_is_none_is_named(value: str, read_fault: Callable[[], str]) -> None:
    """`--concurrency` takes whole numbers from 1."""
    with pytest.raises(SystemExit) as raised:
        run_command(["local", "in.jsonl", "out.jsonl", "--concurrency", value])
    assert raised.value.code == 2
    assert f"--concurrency: must be a whole number from 1 (got {value!r})" in read_fault()


def test_an_interrupt_is_no_traceback(
    config: Path, read_fault: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C before a command handles signals exits 130, as a shell expects."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", interrupt)  # at some point of the command
    assert run_command(["config", "check", str(config)]) == 130
    assert read_fault() == ""
