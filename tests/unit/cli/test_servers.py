"""`inference-worker localpubsub` and `simbackend`: addresses and signals."""

import signal
import subprocess
import sys

import pytest

from worker.cli.main import run_command


@pytest.mark.parametrize("command", ["localpubsub", "simbackend"])
def test_a_server_whose_port_is_taken_exits_2(command: str, taken_port: int, capfd: pytest.CaptureFixture[str]) -> None:
    """The address is named, with the system's reason and without the message of a library."""
    assert run_command([command, "--port", str(taken_port)]) == 2
    told = capfd.readouterr().err
    fault = f"cannot listen on 127.0.0.1:{taken_port}: Address already in use"
    assert told == f"inference-worker: unusable settings:\n  - {fault}\n"


@pytest.mark.parametrize("command", ["localpubsub", "simbackend"])
@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("--port", "99999"), "127.0.0.1:99999: a port is a number from 0 to 65535"),
        (("--port", "-1"), "127.0.0.1:-1: a port is a number from 0 to 65535"),
    ],
    ids=["too high", "negative"],
)
def test_a_server_with_a_port_that_is_none_exits_2(
    command: str, arguments: tuple[str, ...], fault: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """No other port is taken instead."""
    assert run_command([command, *arguments]) == 2
    assert f"  - cannot listen on {fault}\n" in capfd.readouterr().err


@pytest.mark.slow
def test_a_server_stops_on_sigterm_with_0() -> None:
    """`localpubsub` announces its address and stops on SIGTERM."""
    with subprocess.Popen(
        [sys.executable, "-m", "worker", "localpubsub", "--port", "0"], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert "PUBSUB_EMULATOR_HOST=127.0.0.1:" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert "Traceback" not in process.stderr.read()
