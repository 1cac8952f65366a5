"""The operators' page says what the program does: its table, its examples, its lists of words."""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

from tests.support.policy import rules_of
from worker.policy.hook import GROUP, Hook, chain
from worker.policy.model import Decision, Disposition, ErrorClass, ErrorEvent, Fault, Phase
from worker.policy.rules.model import Match, Rule
from worker.policy.table import ROWS

PAGE = (Path(__file__).parents[3] / "docs" / "error-policy.md").read_text("utf-8")


def block(language: str, containing: str = "") -> str:
    """The one code block of a language that holds a text."""
    found = [text for text in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if containing in text]
    assert len(found) == 1
    return found[0]


def rows_after(heading: str) -> list[list[str]]:
    """The cells of the table under a header row that begins so."""
    lines = PAGE.split(f"\n| {heading} |", 1)[1].splitlines()[2:]
    table = [line for line in lines[: lines.index("")] if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_the_table_is_the_programs():
    """Class by class, the page shows what is done."""
    shown = {cells[0].strip("`"): cells[2:] for cells in rows_after("class")}
    actual = {
        str(name): [
            row.do.value,
            "-" if row.max_attempts is None else str(row.max_attempts),
            row.breaker.value,
            "its own" if row.reply_status is None else str(row.reply_status),
            "yes" if row.retryable else "no",
        ]
        for name, row in ROWS.items()
    }
    assert shown == actual


def test_the_rules_of_the_example_can_be_loaded():
    """An operator may copy the example as it stands."""
    names = [rule.name for rule in rules_of(block("yaml", "corp-waf"))]
    assert names == ["corp-waf", "wait-for-adapters", "gateway-500", "hidden-error", "patient"]


@pytest.mark.parametrize(("heading", "model"), [("`match` key", Match), ("action", Rule)])
def test_every_key_is_listed(heading, model):
    """The lists of keys are complete and hold nothing else."""
    listed = {key for cells in rows_after(heading) for key in re.findall(r"`([a-z_]+)`", cells[0])}
    known = {field.alias or name for name, field in model.model_fields.items()} - {"name", "match"}
    assert listed == known


def test_the_words_of_closed_sets_are_complete():
    """Phases and exceptions are listed as they are named."""
    assert f"`{', '.join(Phase)}`" in PAGE
    assert f"`{', '.join(Fault)}`" in PAGE


def test_the_envelope_of_the_example_is_json():
    """The example has the keys of the real thing."""
    assert json.loads(block("json"))["error"].keys() == {
        "message",
        "type",
        "param",
        "code",
        "backend",
        "attempts",
        "retryable",
    }


def test_the_hook_of_the_example_works():
    """The function may be copied, and the entry point is the one that is read."""
    source = block("python", "def decide")
    ast.parse(source)
    namespace: dict = {}
    exec(compile(source, "acme_policy.py", "exec"), namespace)
    default = Decision(disposition=Disposition.NACK, error_class=ErrorClass.SERVER_ERROR, reply_status=500)
    hook = Hook("acme", namespace["decide"])
    for backend, expected in (("nightly", Disposition.REPLY), ("other", Disposition.NACK)):
        event = ErrorEvent(backend=backend, path="/v1/chat/completions", phase=Phase.BODY, status=500)
        assert chain([hook], event, default, timeout_s=1.0).decision.disposition is expected
    assert f'[project.entry-points."{GROUP}"]' in block("toml")


def test_the_fault_of_the_example_reads_like_that():
    """A fault has the form the page shows."""
    rules = yaml.safe_dump([{"match": {"status": 500}, "do": "hold"}, {"match": {"mesage_regex": "x"}, "do": "hold"}])
    with pytest.raises(Exception, match="unknown key") as caught:
        rules_of(rules)
    assert block("text", "unknown key").strip() in caught.value.faults
