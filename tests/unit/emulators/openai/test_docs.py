"""The manual of the simulated server says everything there is to say, and nothing that is not true."""

import argparse
import json
import re
from pathlib import Path

import pytest

from worker.emulators.openai.control import Controls
from worker.emulators.openai.dialects import DIALECTS
from worker.emulators.openai.faults import MATCH_READERS, MODES, Mode
from worker.emulators.openai.options import SimOptions, add_arguments
from worker.emulators.openai.stats import Stats

MANUAL = (Path(__file__).parents[4] / "docs" / "simbackend.md").read_text(encoding="utf-8")
PROSE = re.sub(r"```.*?```", "", MANUAL, flags=re.DOTALL)
NAMES = set(re.findall(r"`([^`]+)`", PROSE))
EXAMPLES = re.findall(r"-d '([^']+)'", MANUAL)


def row(name: str) -> str:
    """Return the row of a table whose first cell begins with a name."""
    found = re.search(rf"^\| `{re.escape(name)}`.*$", MANUAL, re.MULTILINE)
    assert found, f"{name} has no row"
    return found[0]


def test_every_option_is_in_the_manual() -> None:
    """Each argument of the command line stands in the table of options."""
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    for action in parser._actions:
        assert any(name.split()[0] == action.option_strings[0] for name in NAMES), action.option_strings[0]


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_every_mode_is_in_the_manual(mode: Mode) -> None:
    """Each mode has a row with its parameters and the right mark for what it hits."""
    text = row(mode.name)
    where = NAMES if mode.name == "stream" else set(re.findall(r"`([^`]+)`", text))
    assert set(mode.params) <= where
    assert ("` *" in text) is mode.whole_server
    assert ("` °" in text) is mode.unary_only


def test_every_dialect_filter_and_counter_is_in_the_manual() -> None:
    """So are the dialects, the filters and the keys of the statistics."""
    for dialect in DIALECTS:
        row(dialect)
    counted = Stats().snapshot(series=True)
    inner = [key for value in counted.values() if isinstance(value, dict) for key in value]
    assert set(MATCH_READERS) | set(counted) | set(inner) <= NAMES


@pytest.mark.parametrize("document", [text for text in EXAMPLES if '"only"' not in text])
def test_every_example_is_understood(document: str) -> None:
    """Each control document of the manual is accepted; what it removes was added before."""
    controls = Controls(SimOptions(), lambda: 0.0)
    if "remove" in document:
        controls.apply({"add": {"mode": "stream", "name": "cuts"}})
    controls.apply(json.loads(document))
