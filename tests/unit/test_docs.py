"""The pages are current, and name exactly the settings, metrics and log events there are."""

import ast
import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel

from tools.cli_page import cli_page
from tools.generate_docs import (
    DOCS,
    ROOT,
    architecture_page,
    decisions_page,
    layers,
    main,
    metrics_page,
    purposes,
    settings_page,
)
from worker.batches.metrics import BatchMetrics
from worker.cli.main import COMMANDS, build_parser
from worker.errors import SettingsError
from worker.settings.load import load_settings
from worker.settings.schema import BackendSettings, RouteSettings, Settings
from worker.telemetry.metrics import Metrics

SETTINGS = (DOCS / "settings.md").read_text("utf-8")
METRICS = (DOCS / "metrics.md").read_text("utf-8")
CLI = (DOCS / "cli.md").read_text("utf-8")
ARCHITECTURE = (DOCS / "architecture.md").read_text("utf-8")
GOOD = {
    "WORKER_PUBSUB__REQUEST_SUBSCRIPTION": "s",
    "WORKER_PUBSUB__RESPONSE_TOPIC": "t",
    "WORKER_BACKEND__BASE_URL": "http://h",
}

LEVELS = {"debug": "debug", "info": "info", "warning": "warning", "error": "error", "exception": "error"}
"""Methods of a logger and the level of their lines."""


def real_keys(model: type[BaseModel], path: str = "") -> Iterator[str]:
    """Every key that holds a value, by the models alone; a route's inherited ones are documented at `backend`."""
    for name, field in model.model_fields.items():
        if model is RouteSettings and name in BackendSettings.model_fields:
            continue
        inner = [part for part in (field.annotation, *get_args(field.annotation)) if isinstance(part, type)]
        sections = [part for part in inner if issubclass(part, BaseModel)]
        suffix = "[]" if "list[" in str(field.annotation) else ""
        for section in sections:
            yield from real_keys(section, f"{path}{name}{suffix}.")
        if not sections:
            yield path + name


def faults(environ: dict[str, str]) -> list[str]:
    try:
        load_settings(environ={**GOOD, **environ})
    except SettingsError as error:
        return error.faults
    return []


def test_the_pages_are_current() -> None:
    """What is committed is what the code says now; `make docs` writes it."""
    assert settings_page() == SETTINGS
    assert metrics_page() == METRICS
    assert architecture_page(ARCHITECTURE) == ARCHITECTURE
    assert cli_page() == CLI
    assert decisions_page() == (DOCS / "decisions" / "README.md").read_text("utf-8")


def test_documented_commands_are_exactly_the_real_ones() -> None:
    """Each command has a section with a table row for each option of its help."""
    sections = dict(re.findall(r"^## `([a-z-]+)`\n(.*?)(?=^## |\Z)", CLI, re.MULTILINE | re.DOTALL))
    assert list(sections) == list(COMMANDS)
    for name, text in sections.items():
        help_text = io.StringIO()
        with contextlib.redirect_stdout(help_text), contextlib.suppress(SystemExit):
            build_parser([name]).parse_args([name, "--help"])
        options = set(re.findall(r"^  (--[a-z-]+)", help_text.getvalue(), re.MULTILINE))
        assert options <= set(re.findall(r"`(--[a-z-]+)", text)), name


@pytest.mark.parametrize(
    "page", [page for page in sorted(DOCS.glob("**/*.md")) if "::test_" in page.read_text("utf-8")], ids=str
)
def test_named_tests_exist(page: Path) -> None:
    """A page that says which test proves a sentence names one that is there."""
    named = re.findall(r"`?(tests/[\w/]+\.py)::(test_\w+)", page.read_text("utf-8"))
    missing = [f"{path}::{name}" for path, name in named if f"def {name}(" not in (ROOT / path).read_text("utf-8")]
    assert named
    assert missing == []


def test_the_architecture_names_every_module_once() -> None:
    """Every module with code in it stands in one row; what the contract orders exists, and what exists is ordered."""
    rows = re.findall(r"^\| `([^`]+\.py)` \| .+ \|$", ARCHITECTURE, re.MULTILINE)
    package = ROOT / "worker"
    modules = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if path.stat().st_size}
    assert sorted(rows) == sorted(modules)
    ordered = {name.removeprefix("worker.") for layer in layers() for name in layer}
    assert {row.partition("/")[0].removesuffix(".py") for row in rows} - {"__init__"} == ordered


def test_the_architecture_names_only_what_exists() -> None:
    """Every file of the worker that the part written by hand points at is there."""
    written = ARCHITECTURE.partition("<!-- From here on generated")[0]
    named = set(re.findall(r"`((?:[a-z]+/)*[a-z_]+(?:/|\.py))`", written))
    assert len(named) > 20
    at = [ROOT / "worker", ROOT / "worker" / "pipeline"]  # a step's own room is named once
    assert [name for name in sorted(named) if not any((folder / name).exists() for folder in at)] == []


def test_decisions_are_numbered_once() -> None:
    """A file's number is that of its title, and no two have the same."""
    names = [path.name for path in (DOCS / "decisions").glob("0*.md")]
    titles = re.findall(r"^\* \[(\d+)\. .+\]\((\d{4})-.+\.md\)$", decisions_page(), re.MULTILINE)
    assert len(titles) == len(names) == len({number for number, _ in titles})
    assert [int(number) for number, _ in titles] == [int(name) for _, name in titles]


def test_a_module_without_a_purpose_is_noticed(tmp_path: Path) -> None:
    """A file with code and no docstring cannot be put into the table; an empty `__init__.py` need not be."""
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "a.py").write_text('"""\nFirst line.\n\nMore.\n"""\n')
    assert purposes(tmp_path) == {"a.py": "First line."}
    (tmp_path / "b.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"b\.py does not say"):
        purposes(tmp_path)


def test_documented_settings_are_exactly_the_real_ones() -> None:
    """Each key once, none that is gone."""
    documented = re.findall(r"^### `(.+)`$", SETTINGS, re.MULTILINE)
    assert sorted(documented) == sorted(real_keys(Settings))


def test_every_setting_says_what_it_is() -> None:
    """Type, default and variable in one line, then a sentence; sections have one as well."""
    for block in re.split(r"^##+ ", SETTINGS, flags=re.MULTILINE)[1:]:
        lines = [line for line in block.splitlines() if line]
        is_key = block in re.split(r"^##+ ", SETTINGS, flags=re.MULTILINE) and " · " in lines[1]
        text = lines[2] if is_key else lines[1]
        assert text.strip().endswith((".", ")")), block
        assert not is_key or re.fullmatch(r".+ · .*default.* · (in )?`WORKER_[A-Z0-9_]+`|.+ · required · .+", lines[1])


@pytest.mark.parametrize("name", sorted(set(re.findall(r" · `(WORKER_[A-Z0-9_]+)`$", SETTINGS, re.MULTILINE))))
def test_every_documented_variable_is_known(name: str) -> None:
    """A variable on the page reaches a key, whatever that says to the value; one letter more reaches none."""
    assert not any("unknown key" in fault for fault in faults({name: "1"}))
    assert [fault for fault in faults({name + "X": "1"}) if f"(from {name}X): unknown key" in fault]


def test_documented_metrics_are_exactly_the_scraped_ones() -> None:
    """Each family once, with its kind and its help text."""
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.+) \| (.+) \|$", METRICS, re.MULTILINE)
    registry = BatchMetrics(Metrics().registry).registry
    families = text_string_to_metric_families(generate_latest(registry).decode())
    real = [
        (family.name + ("_total" if family.type == "counter" else ""), family.type, family.documentation)
        for family in families
    ]
    assert sorted((name, kind, text) for name, kind, _, text in rows) == sorted(real)


def test_a_stale_page_is_noticed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--check` changes nothing and says which; without it the pages are written, once."""
    assert main(["--check"], tmp_path) == 1
    assert list(tmp_path.iterdir()) == []
    assert main([], tmp_path) == 0
    assert main(["--check"], tmp_path) == 0
    (tmp_path / "metrics.md").write_text("old")
    capsys.readouterr()
    assert main(["--check"], tmp_path) == 1
    assert capsys.readouterr().err == "docs/metrics.md is stale; run `make docs`\n"
    assert (tmp_path / "metrics.md").read_text() == "old"


def logged(node: ast.Call) -> Iterator[tuple[str, str]]:
    """`(event, level)` of a call of a logger: `_log.info("...")` or `get_logger("...").info("...")`."""
    method = node.func
    if not isinstance(method, ast.Attribute) or method.attr not in LEVELS:
        return
    owner = ast.unparse(method.value)
    if owner not in {"_log", "_frequent_log", "_state_log"} and not owner.startswith("get_logger("):
        return
    first = node.args[0]
    for event in (first.body, first.orelse) if isinstance(first, ast.IfExp) else (first,):
        assert isinstance(event, ast.Constant), f"an event is a literal: {ast.unparse(node)}"
        yield event.value, LEVELS[method.attr]


def test_documented_log_events_are_exactly_the_written_ones() -> None:
    """Each event once, in snake_case, with its levels."""
    written = {
        found
        for path in (DOCS.parent / "worker").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        for found in logged(node)
    }
    table = (DOCS / "log.md").read_text("utf-8").split("## Log events\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([a-z]+(?:_[a-z]+)+)` \| ([a-z, ]+) \| (.+\.) \|$", table, re.MULTILINE)
    documented = {(event, level) for event, levels, _ in rows for level in levels.split(", ")}
    assert documented == written
    assert len(rows) == len({event for event, _, _ in rows}) == table.count("\n| `")
