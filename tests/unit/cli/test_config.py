"""`inference-worker config`: faults by their key, secrets masked."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.cli.conftest import GOOD
from worker.cli.main import run_command


def test_a_good_file_is_called_good(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`config check` exits 0 and prints that the file is good."""
    assert run_command(["config", "check", str(config)]) == 0
    assert capsys.readouterr().out == f"{config}: good\n"


def test_every_fault_of_a_file_is_named(config: Path, read_fault: Callable[[], str]) -> None:
    """`config check` exits 2 with one line for each: unknown keys, wrong values, combinations that cannot work."""
    config.write_text(GOOD + "drain: {grace_s: 1}\nlog: {levle: info}\nreply: {include_stats: perhaps}\n")
    assert run_command(["config", "check", str(config)]) == 2
    faults = read_fault()
    assert faults.startswith("inference-worker: unusable settings:\n")
    for fault in ("  - log.levle: unknown key", "  - reply.include_stats: ", "drain.grace_s (1 s)"):
        assert fault in faults


def test_rules_are_checked_with_the_file(config: Path, read_fault: Callable[[], str]) -> None:
    """A rule that cannot be used fails `config check`, not the first error in production."""
    config.write_text(GOOD + "policy: {rules: [{name: r, match: {statsu: [403]}, do: reply}]}\n")
    assert run_command(["config", "check", str(config)]) == 2
    assert "statsu" in read_fault()


@pytest.mark.parametrize("content", ["", " \n", "schl\u00fcssel", "two words", "line\nbreak"])
def test_a_key_file_that_the_worker_would_refuse_is_refused(
    tmp_path: Path, config: Path, read_fault: Callable[[], str], content: str
) -> None:
    """`config check` says what `run` would."""
    key = tmp_path / "key"
    key.write_text(content)
    config.write_text(GOOD.replace("api_key: sk-secret", f"api_key_file: {key}"))
    assert run_command(["config", "check", str(config)]) == 2
    assert f"backend.api_key_file: {key}: is empty, or no text" in read_fault()
    gate = f"{{type: vllm, url: 'http://m/metrics', api_key_file: {key}}}"
    config.write_text(GOOD.replace("api_key: sk-secret", f"metric_gate: {gate}"))
    assert run_command(["config", "check", str(config)]) == 2
    assert f"backend.metric_gate.api_key_file: {key}: is empty, or no text" in read_fault()


def test_a_key_file_that_is_elsewhere_is_no_fault(config: Path) -> None:
    """The file is checked where it was written, which need not be where the Secret is mounted."""
    config.write_text(GOOD.replace("api_key: sk-secret", "api_key_file: /nonexistent/key"))
    assert run_command(["config", "check", str(config)]) == 0


@pytest.mark.parametrize(
    ("section", "fault"),
    [
        ("{request_prefixes: [http://bucket/a]}", "payloads.request_prefixes: must be like gs://bucket/key"),
        ("{reply_prefix: 'file:///'}", "payloads.reply_prefix: must "),
        ("{reply_prefix: 's3://b-1', s3_options: {regin: x}}", "payloads.s3_options: "),
        ("{reply_prefix: 'az://container'}", "payloads.az_options: "),
    ],
)
def test_object_storage_is_checked_without_asking_it(
    config: Path, read_fault: Callable[[], str], section: str, fault: str
) -> None:
    """Prefixes, and options of the library by name."""
    config.write_text(GOOD + f"payloads: {section}\n")
    assert run_command(["config", "check", str(config)]) == 2
    assert fault in read_fault()


def test_usable_object_storage_is_no_fault(config: Path) -> None:
    """A folder need not be there: the file is checked where it was written."""
    section = "{request_prefixes: ['gs://bucket/a', 'file:///nonexistent/a'], reply_prefix: 's3://b-1'}"
    config.write_text(GOOD + f"payloads: {section}\n")
    assert run_command(["config", "check", str(config)]) == 0


@pytest.mark.parametrize("host", ["m\u00fcnchen..example", f"{'a' * 70}.example", "a..b"])
def test_a_host_that_cannot_be_looked_up_is_refused(config: Path, read_fault: Callable[[], str], host: str) -> None:
    """As `run` would refuse it, or never reach it."""
    config.write_text(GOOD.replace("http://localhost:1", f"http://{host}"))
    assert run_command(["config", "check", str(config)]) == 2
    assert "base_url: must name a host that can be looked up" in read_fault()


@pytest.mark.parametrize("command", [["config", "check"], ["config", "show", "--config"]])
def test_a_file_that_is_not_there_is_named(command: list[str], read_fault: Callable[[], str]) -> None:
    """Exit 2 and the reason, for each command."""
    assert run_command([*command, "/nonexistent.yaml"]) == 2
    assert "  - /nonexistent.yaml: cannot be read (No such file or directory)\n" in read_fault()


def test_a_file_that_is_no_yaml_is_named(config: Path, read_fault: Callable[[], str]) -> None:
    """The fault has the place of the mistake."""
    config.write_text("pubsub: {project_id: [}\n")
    assert run_command(["config", "check", str(config)]) == 2
    assert f"  - {config}: is not YAML: " in read_fault()


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
    """A variable wins over the file that `WORKER_CONFIG` names."""
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
def test_a_flag_that_means_nothing_is_named(config: Path, read_fault: Callable[[], str], flag: str, fault: str) -> None:
    """Exit 2, with the flag as it was given."""
    assert run_command(["config", "show", "--config", str(config), "--set", flag]) == 2
    assert fault in read_fault()
