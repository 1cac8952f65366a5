"""`inference-worker policy explain`: options become what the judge is asked, and faults are named."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.cli.conftest import GOOD
from worker.cli.main import run_command

Explained = Callable[..., str]


@pytest.fixture
def explained(capsys: pytest.CaptureFixture[str]) -> Explained:
    """Return what the command prints about an error."""

    def ask(*options: str) -> str:
        assert run_command(["policy", "explain", *options]) == 0
        return capsys.readouterr().out

    return ask


COUNTED = ("--max-delivery-attempts", "5", "--delivery-attempt")


@pytest.mark.parametrize(
    ("options", "decision"),
    [
        (("--status", "429"), "hold  (by builtin:rate_limited)"),
        # Others are served: two refusals may be chance, the third is not, and the last delivery is answered.
        (("--status", "429", "--others-served"), "hold  (by builtin:rate_limited)"),
        (
            ("--status", "429", *COUNTED, "2", "--others-served", "--failures", "2"),
            "hold  (by builtin:rate_limited)",
        ),
        (
            ("--status", "429", *COUNTED, "2", "--others-served", "--failures", "3"),
            "nack  (by builtin:rate_limited+own)",
        ),
        (
            ("--status", "429", *COUNTED, "5", "--others-served", "--failures", "3"),
            "reply  (by builtin:rate_limited+own+budget:last_attempt)",
        ),
        (
            ("--status", "429", *COUNTED, "2", "--others-served", "--failures", "3", "--failing-share", "0.3"),
            "hold  (by builtin:rate_limited)",
        ),
        # `--failures` is `--attempts` unless it is given: earlier deliveries count.
        (("--status", "401", *COUNTED, "1", "--others-served", "--attempts", "2"), "nack  (by builtin:auth+own)"),
        (("--status", "401", "--others-served", "--failures", "5"), "reply  (by builtin:auth+own+budget:max_attempts)"),
        # The same error while the breaker is open: an outage, unless others are served.
        (
            ("--status", "500", "--breaker-open", "server_error", "--others-failing", "4"),
            "hold  (by builtin:server_error+outage)",
        ),
        (
            ("--status", "500", "--breaker-open", "server_error", "--others-served"),
            "hold  (by builtin:server_error+outage)",
        ),
        (
            ("--status", "500", "--breaker-open", "server_error", "--others-served", "--failures", "2"),
            "nack  (by builtin:server_error)",
        ),
    ],
)
def test_mixed_trouble_can_be_asked_for(explained: Explained, options: tuple[str, ...], decision: str) -> None:
    """What others did while a message failed decides what is done with it."""
    assert f"\ndecision: {decision}\n" in explained(*options)


def test_the_reason_is_told(explained: Explained) -> None:
    """Whose trouble it is, and what the breaker learns of it."""
    lines = explained("--fault", "connection_lost", "--others-served", "--failures", "3").splitlines()
    assert "blame     its own: others are served, and chance does not explain 3 failures in a row" in lines
    assert "gate      nothing for the breaker" in lines


@pytest.mark.parametrize(
    ("options", "decision"),
    [
        (["ThrottlingException"], "hold  (by builtin:rate_limited)"),
        (["ModelNotReadyException"], "hold  (by builtin:not_ready)"),
        (["ServiceUnavailable"], "hold  (by builtin:overloaded)"),
        (["InternalFailure"], "nack  (by builtin:server_error)"),
        (["InternalDependencyException"], "nack  (by builtin:server_error)"),
        (["ValidationError"], "reply  (by builtin:invalid_request)"),
        (["ValidationError", "--body", "Endpoint e of account 1 not found."], "reply  (by builtin:model_not_found)"),
        (["AccessDeniedException"], "hold  (by builtin:auth)"),
        (["ExpiredTokenException"], "hold  (by builtin:auth)"),
        (["ModelError"], "nack  (by builtin:server_error)"),
        (["ModelError", "--original-status", "503"], "hold  (by builtin:overloaded)"),
        (
            ["ModelError", "--original-status", "400", "--body", '{"error":{"code":"context_length_exceeded"}}'],
            "reply  (by builtin:context_length)",
        ),
        (["ModelStreamError", "--after-text"], "nack  (by builtin:stream_broken)"),
        (
            ["ModelStreamError", "--error-code", "ModelInvocationTimeExceeded", "--after-text"],
            "reply  (by builtin:model_time_exceeded)",
        ),
        (["InternalStreamFailure"], "nack  (by builtin:stream_broken)"),
    ],
    ids=" ".join,
)
def test_errors_of_sagemaker_can_be_asked_for_by_name(explained: Explained, options: list[str], decision: str) -> None:
    """Without knowing in which header or status they come."""
    assert f"\ndecision: {decision}\n" in explained("--sagemaker", *options)


@pytest.mark.parametrize(
    ("options", "pauses"),
    [
        ((), False),
        (("--others-failing", "4"), True),
        (("--others-failing", "4", "--failing-share", "0.2"), False),
        (("--others-failing", "9", "--failing-share", "0.2"), True),
        (("--others-failing", "9", "--failing-share", "0.2", "--under-way", "20"), False),
    ],
)
def test_a_hint_counts_if_more_heard_it_than_chance_explains(
    explained: Explained, options: tuple[str, ...], pauses: bool
) -> None:
    """What fails anyhow and what is under way decide whether the window pauses."""
    text = explained("--status", "429", "--header", "retry-after: 7", *options)
    assert ("the window pauses for 7 s" in text) is pauses


def test_rules_of_the_file_take_part(config: Path, explained: Explained) -> None:
    """An operator's rule decides, and blame has its word afterwards."""
    config.write_text(GOOD + "policy: {rules: [{name: patient, match: {status: 418}, do: hold, breaker: count}]}\n")
    options = ("--config", str(config), "--status", "418")
    assert "decision: hold  (by patient)" in explained(*options)
    assert "decision: nack  (by patient+own)" in explained(*options, "--others-served", "--failures", "2")


def test_one_question_at_a_time(read_fault: Callable[[], str]) -> None:
    """A status, a fault or an error of SageMaker; and one that exists."""
    for options in ([], ["--status", "500", "--sagemaker", "ModelError"], ["--fault", "connect", "--status", "1"]):
        assert run_command(["policy", "explain", *options]) == 2
        assert "give --status, --fault or --sagemaker, one of them" in read_fault()
    assert run_command(["policy", "explain", "--sagemaker", "ModelErrr"]) == 2
    assert "did you mean ModelError?" in read_fault()


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--failures", "0"], "--failures 0: the failure that is asked about is the first at least"),
        (["--failures", "-3"], "--failures -3: "),
        (["--attempts", "0"], "--failures 0: "),
        (["--others-failing", "-1"], "--others-failing -1: must not be negative"),
        (["--under-way", "-1"], "--under-way -1: must not be negative"),
        (["--failing-share", "1.5"], "--failing-share 1.5: must be between 0 and 1"),
        (["--failing-share", "-0.1"], "--failing-share -0.1: must be between 0 and 1"),
        (["--failing-share", "nan"], "--failing-share nan: must be between 0 and 1"),
        (["--breaker-open", "typo"], "--breaker-open typo: must be one of "),
    ],
)
def test_impossible_circumstances_are_refused(options: list[str], fault: str, read_fault: Callable[[], str]) -> None:
    """Exit code 2 and the option that is wrong."""
    assert run_command(["policy", "explain", "--status", "500", *options]) == 2
    assert fault in read_fault()
