"""The dashboard: every metric has a panel, no panel asks for anything else, and the file is what the generator makes."""

import importlib.util
import json
import re
from types import ModuleType
from typing import Any

import pytest

from tests.deploy.promql import asked, faults
from tests.deploy.tools import DEPLOY, ROOT
from worker.telemetry.metrics import PREFIX, catalogue


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("grafana_generate", DEPLOY / "grafana" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATE = _generator()
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def test_the_file_is_what_the_generator_makes() -> None:
    """A metric that was added or renamed is on the dashboard."""
    text = (DEPLOY / "grafana" / "dashboard.json").read_text()
    assert text == GENERATE.render(), "stale: python deploy/grafana/generate.py"


def test_every_metric_has_one_panel() -> None:
    """All of the catalogue, each once; a histogram stands for its three series."""
    shown = [
        {re.sub(r"_bucket$", "", name) for target in panel["targets"] for name in asked(target["expr"]).metrics}
        for panel in PANELS
    ]
    assert all(len(names) == 1 for names in shown), "one panel, one metric"
    assert sorted(name for names in shown for name in names) == sorted(name for name, *_ in catalogue())


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panels_ask_for_what_exists(panel: dict[str, Any]) -> None:
    """Metrics and labels are the catalogue's, and a legend names only labels that are left after the grouping."""
    for target in panel["targets"]:
        assert faults(target["expr"]) == []
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) == asked(target["expr"]).grouped - {"le"}


def test_a_metric_nobody_placed_is_shown_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands in the last row; a place for one that is gone is no error."""
    monkeypatch.setattr(GENERATE, "ROWS", {"Answers": ("requests_total", "gone_total")})
    rows = GENERATE.rows()
    assert [metric.name for metric in rows["Answers"]] == ["requests_total"]
    assert len(rows["More"]) == len(list(catalogue())) - 1


def test_every_metric_has_its_place() -> None:
    """The rows name the whole catalogue and nothing else: a new metric is put where it belongs."""
    placed = [PREFIX + name for names in GENERATE.ROWS.values() for name in names]
    assert sorted(placed) == sorted(name for name, *_ in catalogue())


def test_panels_do_not_overlap() -> None:
    """Each has its own place on the grid of 24 columns, and an id of its own."""
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        pos = panel["gridPos"]
        assert pos["x"] + pos["w"] <= 24
        cells = {(x, y) for x in range(pos["x"], pos["x"] + pos["w"]) for y in range(pos["y"], pos["y"] + pos["h"])}
        assert not cells & taken
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_it_works_in_any_grafana() -> None:
    """The data source is chosen on the dashboard, and without a namespace everything is shown."""
    assert {panel["datasource"]["uid"] for panel in PANELS} == {"$datasource"}
    variables = {item["name"]: item for item in DASHBOARD["templating"]["list"]}
    assert variables["namespace"]["allValue"] == ".*"
    assert set(variables) == {"datasource", "namespace"}


def test_the_picture_is_in_the_docs() -> None:
    """The runbook shows it and says what it is."""
    runbook = (ROOT / "docs" / "operations.md").read_text()
    assert "](img/dashboard.png)" in runbook
    assert "not a screenshot of Grafana" in " ".join(runbook.split())
    assert (ROOT / "docs" / "img" / "dashboard.png").read_bytes().startswith(b"\x89PNG")
