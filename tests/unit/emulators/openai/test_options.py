"""Settings of the simulated server: one name, one grammar, wherever they come from."""

import argparse
from dataclasses import fields

import pytest

from worker.emulators.openai.options import SETTINGS, SimOptions, add_arguments, as_json, options_from, with_changes


def parsed(*arguments: str) -> SimOptions:
    """Return the options that a command line describes."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return options_from(parser.parse_args(arguments))


def test_every_option_has_a_reader_and_an_argument() -> None:
    """No option can be set in one place and not in another."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    names = {item.name for item in fields(SimOptions)}
    assert names == set(SETTINGS)
    assert names <= vars(parser.parse_args([])).keys()


def test_the_command_line_reads_every_option() -> None:
    """Each argument arrives in its option."""
    options = parsed(
        "--latency", "lognormal:2s,0.8", "--ttft", "100ms", "--tokens-per-s", "50", "--answer-tokens", "10",
        "--reasoning-tokens", "3", "--max-concurrency", "4", "--overload", "queue", "--overload-status", "503",
        "--max-queue", "0", "--rate", "600/min", "--retry-after", "date:2s", "--error-rate", "0.1", "--capacity", "8",
        "--api-key", "k", "--models", "a, b", "--context-window", "100", "--dialect", "vllm", "--seed", "-7",
        "--control-port", "0", "--zero-cost",
    )  # fmt: skip
    assert str(options.latency) == "lognormal:2s,0.8"
    assert (options.overload, options.overload_status, options.max_queue) == ("queue", 503, 0)
    assert (options.rate, options.error_rate, options.seed, options.control_port) == (10.0, 0.1, -7, 0)
    assert (options.models, options.api_key, options.dialect) == (("a", "b"), "k", "vllm")
    assert (str(options.retry_after), options.zero_cost) == ("date:2s", True)


def test_a_command_line_without_latency_takes_50_ms() -> None:
    """A rehearsal from the command line has a latency unless it says otherwise or asks for zero cost."""
    assert str(parsed().latency) == "50ms"
    assert parsed("--latency", "0").latency.is_zero
    assert parsed("--zero-cost").latency.is_zero
    assert parsed("--engine", "llama-8b-h100").latency.is_zero
    assert str(parsed("--engine", "none").latency) == "50ms"


def test_an_engine_stands_alone() -> None:
    """Its model says how long an answer takes, so no other setting may; a running server changes both at once."""
    assert parsed("--engine", "qwen-7b-gb200", "--answer-tokens", "300").engine == "qwen-7b-gb200"
    with pytest.raises(ValueError, match=r"engine: its model .* it goes without latency, tokens_per_s$"):
        parsed("--engine", "qwen-7b-gb200", "--latency", "1s", "--tokens-per-s", "50")
    with pytest.raises(ValueError, match="it goes without ttft, prompt_tokens_per_s, capacity, zero_cost"):
        SimOptions.of(engine="llama-8b-h100", ttft=1, prompt_tokens_per_s=9, capacity=4, zero_cost=True)
    changed = with_changes(parsed(), {"engine": "llama-8b-h100", "latency": 0}, running=True)
    assert (changed.engine, as_json(changed)["engine"]) == ("llama-8b-h100", "llama-8b-h100")
    assert with_changes(changed, {"engine": None, "latency": "1s"}, running=True).engine is None


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("engine", "llama-8b-h10", "llama-8b-h100, llama-70b-2-h100, qwen-7b-gb200.*; did you mean llama-8b-h100"),
        ("dialect", "vlm", "openai, azure, vllm.*; did you mean vllm"),
        ("overload", "que", "reject, queue.*; did you mean queue"),
    ],
)
def test_an_unknown_name_says_which_there_are(name: str, value: str, words: str) -> None:
    """And the nearest."""
    with pytest.raises(ValueError, match=rf"{name}: must be one of {words}"):
        SimOptions.of(**{name: value})


def test_every_fault_is_in_one_message() -> None:
    """The error names all four mistakes."""
    with pytest.raises(ValueError, match="max_concurrency") as raised:
        with_changes(SimOptions(), {"max_concurrency": 0, "dialect": "klingon", "latencyy": 1, "rate": "no"})
    assert all(name in str(raised.value) for name in ("max_concurrency:", "dialect:", "latencyy", "rate:"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 1.5),
        ("error_rate", 1.1),
        ("error_rate", True),
        ("overload_status", 500),
        ("overload_status", True),
        ("models", [1]),
        ("api_key", "a\nb"),
        ("zero_cost", "yes"),
        ("control_port", 70_000),
        ("context_window", "many"),
    ],
)
def test_bad_values_are_refused(name: str, value: object) -> None:
    """Values of the wrong type or out of range are refused with the name of the setting."""
    with pytest.raises(ValueError, match=name):
        SimOptions.of(**{name: value})


def test_a_running_server_keeps_what_cannot_change() -> None:
    """Ports and the prepared answers are fixed at the start."""
    with pytest.raises(ValueError, match="unknown settings: control_port"):
        with_changes(SimOptions(), {"control_port": 1}, running=True)


def test_the_key_is_never_shown() -> None:
    """Neither repr nor JSON shows the API key, nor does the error about a bad one."""
    options = SimOptions.of(api_key="sk-secret")
    assert "sk-secret" not in repr(options) + str(as_json(options))
    with pytest.raises(ValueError, match="api_key") as raised:
        SimOptions.of(api_key="sk-secret\n")
    assert "sk-secret" not in str(raised.value)


def test_shown_settings_read_back() -> None:
    """What the server shows as its settings can be sent to it again."""
    options = SimOptions.of(latency="uniform:1s,2s", capacity="0:4/8,9:2", retry_after="ms:auto", models=["m"])
    assert with_changes(SimOptions(), as_json(options)) == options
