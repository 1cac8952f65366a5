"""The command line: commands, their help, and exit codes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from worker.cli.main import COMMANDS, run_command


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["run", "--nonsense"], ["config"], ["config", "nonsense"]])
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
