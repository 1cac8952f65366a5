"""The command line: exit codes, and faults told in a line instead of a traceback."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.cli.main import run_command

GOOD = """
pubsub: {project_id: p, request_subscription: requests, response_topic: responses}
backend:
  base_url: http://localhost:1
  api_key: sk-secret
  headers: {api-key: header-secret}
dedupe: {store: redis, redis_url: "redis://:redis-secret@r/0"}
http: {port: 0, host: 127.0.0.1}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A settings file that can be used."""
    path = tmp_path / "worker.yaml"
    path.write_text(GOOD)
    return path


def _told(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what was said on standard error: a person's sentence, no traceback."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


def test_a_good_file_is_called_good(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`config check` exits 0 and says so."""
    assert run_command(["config", "check", str(config)]) == 0
    assert capsys.readouterr().out == f"{config}: good\n"


def test_every_fault_of_a_file_is_named(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`config check` exits 2 with one line for each: unknown keys, wrong values, combinations that cannot work."""
    config.write_text(GOOD + "drain: {grace_s: 1}\nlog: {levle: info}\nreply: {include_stats: perhaps}\n")
    assert run_command(["config", "check", str(config)]) == 2
    told = _told(capsys)
    assert told.startswith("inference-worker: unusable settings:\n")
    for fault in ("  - log.levle: unknown key", "  - reply.include_stats: ", "drain.grace_s (1 s)"):
        assert fault in told


def test_rules_are_checked_with_the_file(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rule that cannot be used fails `config check`, not the first error in production."""
    config.write_text(GOOD + "policy: {rules: [{name: r, match: {statsu: [403]}, do: reply}]}\n")
    assert run_command(["config", "check", str(config)]) == 2
    assert "statsu" in _told(capsys)


@pytest.mark.parametrize("command", [["config", "check"], ["config", "show", "--config"]])
def test_a_file_that_is_not_there_is_named(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 2 and the reason, whatever command asked for it."""
    assert run_command([*command, "/nonexistent.yaml"]) == 2
    assert "  - /nonexistent.yaml: cannot be read (No such file or directory)\n" in _told(capsys)


def test_a_file_that_is_no_yaml_is_named(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the place of the mistake."""
    config.write_text("pubsub: {project_id: [}\n")
    assert run_command(["config", "check", str(config)]) == 2
    assert f"  - {config}: is not YAML: " in _told(capsys)


def test_show_prints_the_settings_in_force_without_secrets(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Flags win over the file; keys, headers and the password of Redis are masked."""
    assert run_command(["config", "show", "--config", str(config), "--set", "log.level=debug"]) == 0
    shown = capsys.readouterr().out
    assert "level: debug" in shown
    assert "request_subscription: requests" in shown
    assert "secret" not in shown
    assert "api_key: '**********'" in shown


def test_the_environment_wins_over_the_file(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And `WORKER_CONFIG` names the file."""
    monkeypatch.setenv("WORKER_CONFIG", str(config))
    monkeypatch.setenv("WORKER_LOG__LEVEL", "error")
    assert run_command(["config", "show"]) == 0
    assert "level: error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "fault"),
    [
        ("http.port", "--set http.port: expected KEY=VALUE"),
        ("http.prot=1", "http.prot: unknown key"),
        ("http.port=many", "http.port: input should be a valid integer"),
    ],
)
def test_a_flag_that_means_nothing_is_named(
    config: Path, capsys: pytest.CaptureFixture[str], flag: str, fault: str
) -> None:
    """Exit 2, with the flag as it was given."""
    assert run_command(["config", "show", "--config", str(config), "--set", flag]) == 2
    assert fault in _told(capsys)


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["run", "--nonsense"], ["config"], ["config", "nonsense"]])
def test_unknown_arguments_exit_2_with_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Commands and options that do not exist are told with what does."""
    with pytest.raises(SystemExit) as raised:
        run_command(arguments)
    assert raised.value.code == 2
    assert _told(capsys).startswith("usage: inference-worker")


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("command", ["localpubsub", "simbackend"])
def test_a_server_whose_port_is_taken_exits_2(command: str, taken_port: int, capfd: pytest.CaptureFixture[str]) -> None:
    """The address is named, with the system's reason and without a word of a library."""
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


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5", ""])
def test_a_count_that_is_none_is_named(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--concurrency` takes whole numbers from 1."""
    with pytest.raises(SystemExit) as raised:
        run_command(["local", "in.jsonl", "out.jsonl", "--concurrency", value])
    assert raised.value.code == 2
    assert f"--concurrency: must be a whole number from 1 (got {value!r})" in _told(capsys)


def test_an_interrupt_is_no_traceback(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C before a command listens to it exits 130, as a shell expects."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", interrupt)  # wherever the command happens to be
    assert run_command(["config", "check", str(config)]) == 130
    assert _told(capsys) == ""


# The program as a process.


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "worker", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.mark.slow
def test_run_with_a_broker_that_lacks_the_subscription_exits_1(config: Path) -> None:
    """One log line that names it, no traceback, and the process really ends."""
    from worker.emulators.pubsub import LocalPubSubThread

    config.write_text(GOOD.replace("store: redis", "store: memory"))
    with LocalPubSubThread() as server:
        ended = _run("run", "--config", str(config), PUBSUB_EMULATOR_HOST=server.address)
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert "the subscription projects/p/subscriptions/requests does not exist" in last
    assert "Traceback" not in ended.stderr
    assert "secret" not in ended.stderr


@pytest.mark.slow
def test_run_whose_port_is_taken_exits_2(config: Path, taken_port: int) -> None:
    """Found before anything is leased, and told with the key."""
    ended = _run("run", "--config", str(config), "--set", f"http.port={taken_port}", PUBSUB_EMULATOR_HOST="127.0.0.1:1")
    assert ended.returncode == 2
    assert f"http.port: cannot listen on 127.0.0.1:{taken_port}" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_run_with_standard_error_on_a_full_disk_keeps_its_exit_code(config: Path) -> None:
    """Logs that cannot be written change nothing about what happens."""
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full on this system")
    with Path("/dev/full").open("w") as full, socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = subprocess.run(
            [sys.executable, "-m", "worker", "run", "--config", str(config), "--set", f"http.port={port}"],
            stdout=full,
            stderr=full,
            timeout=60,
            check=False,
            env={**os.environ, "PUBSUB_EMULATOR_HOST": "127.0.0.1:1"},
        )
    assert ended.returncode == 2


@pytest.mark.slow
def test_a_server_stops_on_sigterm_with_0() -> None:
    """`localpubsub` says where it listens and leaves when told to."""
    with subprocess.Popen(
        [sys.executable, "-m", "worker", "localpubsub", "--port", "0"], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert "PUBSUB_EMULATOR_HOST=127.0.0.1:" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert "Traceback" not in process.stderr.read()


@pytest.mark.slow
def test_run_ends_after_an_exception_nobody_foresaw(config: Path) -> None:
    """With a traceback in the log and exit 1, though a library's thread would keep the interpreter alive."""
    program = f"""
import threading, time
import worker.service
from worker.cli.main import run_command

async def run(self):
    raise ZeroDivisionError("bug")

worker.service.Service.run = run
threading.Thread(target=time.sleep, args=(600,)).start()
run_command(["run", "--config", {str(config)!r}])
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    last = json.loads(ended.stderr.splitlines()[-1])
    assert last["event"] == "worker_failed"
    assert "ZeroDivisionError: bug" in last["exception"]
