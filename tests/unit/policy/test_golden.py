"""Answers of real servers, each with the class and the decision it must lead to and the place it was taken from."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.policy import classify
from worker.policy.model import ErrorEvent, Fault, Phase
from worker.policy.normalise import normalise
from worker.policy.reply import error_reply

"""2027-01-15 08:00:00 UTC; samples with a date are relative to it."""

FOLDER = Path(__file__).parent / "golden"
EVENT_KEYS = {"path", "status", "headers", "body", "phase", "fault", "in_stream", "has_partial", "input_is_empty"}
FACTS = {"type", "code", "param", "inner_code", "shape", "wrapped"}
DECISION = {"class", "do", "status", "breaker", "scope", "max_attempts", "retry_after_s", "message"}


def load() -> dict[str, dict[str, Any]]:
    """Every sample by its name."""
    samples = [sample for file in sorted(FOLDER.glob("*.yaml")) for sample in yaml.safe_load(file.read_text("utf-8"))]
    return {sample["name"]: sample for sample in samples}


SAMPLES = load()


def event_of(sample: dict[str, Any]) -> ErrorEvent:
    """The attempt's end that a sample describes."""
    return ErrorEvent(
        backend="default",
        path=sample.get("path", "/v1/chat/completions"),
        phase=Phase(sample.get("phase", "body")),
        status=sample.get("status"),
        headers=sample.get("headers", {}),
        body=sample.get("body", "").encode(),
        fault=Fault(sample["fault"]) if "fault" in sample else None,
        in_stream=sample.get("in_stream", False),
        has_partial=sample.get("has_partial", False),
        input_is_empty=sample.get("input_is_empty", False),
    )


def test_there_are_enough_samples_and_each_names_its_source():
    """At least sixty, under names of their own, without a key that nothing reads."""
    files = list(FOLDER.glob("*.yaml"))
    assert len(SAMPLES) == sum(len(yaml.safe_load(file.read_text("utf-8"))) for file in files)
    assert len(SAMPLES) >= 60
    for sample in SAMPLES.values():
        assert sample["source"].startswith("https://")
        assert sample.keys() <= EVENT_KEYS | {"name", "source", "expect"}
        assert {"class", "do"} <= sample["expect"].keys() <= FACTS | DECISION


@pytest.mark.parametrize("name", SAMPLES)
def test_sample(name):
    """The class, the decision and the facts that a sample must lead to."""
    sample = SAMPLES[name]
    event, expect = event_of(sample), sample["expect"]
    decision = classify(event)
    facts = normalise(event.status, event.headers, event.body)
    actual = {
        "class": decision.error_class,
        "do": decision.disposition,
        "status": decision.reply_status,
        "breaker": decision.breaker,
        "scope": decision.scope,
        "max_attempts": decision.max_attempts,
        "retry_after_s": decision.retry_after_s,
        "message": decision.message,
        **{key: getattr(facts, key) for key in FACTS - {"wrapped"}},
        "wrapped": list(facts.wrapped),
    }
    assert {key: actual[key] for key in expect} == expect
    if decision.error_class is not None:
        status, body = error_reply(decision, event, attempts=1)
        assert status == decision.reply_status >= 400
        assert body.startswith(b"{")
