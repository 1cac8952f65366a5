"""The dashboard: every metric has a panel, no panel asks for anything else, and the file is what the generator makes."""

import importlib.util
import json
import math
import re
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from http import HTTPStatus
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.deploy.promql import asked, faults
from tests.deploy.tools import DEPLOY, ROOT, need_tool
from tests.support.rig import rig
from tests.support.waiting import until
from worker.batches.metrics import batch_catalogue
from worker.emulators.pubsub import LocalPubSubThread
from worker.telemetry.metrics import catalogue
from worker.telemetry.series import PREFIX

CATALOGUE = (*catalogue(), *batch_catalogue())
"""Of the worker and of `batches serve`."""


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("grafana_generate", DEPLOY / "grafana" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATE = _generator()
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
SHOWN = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
CLOSED = [panel for row in DASHBOARD["panels"] if row["type"] == "row" for panel in row["panels"]]
PANELS = [*SHOWN, *CLOSED]
NUMBERS = [panel for panel in SHOWN if panel["type"] == "stat"]
GRAPHS = [panel for panel in PANELS if panel["type"] == "timeseries"]


def test_the_file_is_what_the_generator_makes() -> None:
    """A metric that was added or renamed is on the dashboard."""
    text = (DEPLOY / "grafana" / "dashboard.json").read_text()
    assert text == GENERATE.render(), "stale: python deploy/grafana/generate.py"


def test_every_metric_has_one_panel() -> None:
    """All of the catalogues, each once; a histogram stands for its three series."""
    shown = [
        {re.sub(r"_bucket$", "", name) for target in panel["targets"] for name in asked(target["expr"]).metrics}
        for panel in GRAPHS
    ]
    assert all(len(names) == 1 for names in shown), "one panel, one metric"
    assert sorted(name for names in shown for name in names) == sorted(name for name, *_ in CATALOGUE)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panels_ask_for_what_exists(panel: dict[str, Any]) -> None:
    """Metrics and labels are the catalogue's, and a legend names only labels that are left after the grouping."""
    for target in panel["targets"]:
        assert faults(target["expr"]) == []
        if panel["type"] == "timeseries":
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert named == asked(target["expr"]).grouped - {"le"}


def test_big_numbers_come_first() -> None:
    """One row of them over the whole width, and nothing above."""
    assert len(NUMBERS) == 8
    assert [panel["gridPos"]["y"] for panel in NUMBERS] == [0] * 8
    assert sum(panel["gridPos"]["w"] for panel in NUMBERS) == 24
    assert DASHBOARD["panels"][:8] == NUMBERS


def test_a_metric_nobody_placed_is_shown_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands in the last row; a place for one that is gone is no error."""
    monkeypatch.setattr(GENERATE, "ROWS", {"Answers": ("requests_total", "gone_total")})
    rows = GENERATE.rows()
    assert [metric.name for metric in rows["Answers"]] == ["requests_total"]
    assert len(rows["More"]) == len(CATALOGUE) - 1


def test_every_metric_has_its_place() -> None:
    """The rows name the whole of both catalogues and nothing else: a new metric is put where it belongs."""
    placed = [PREFIX + name for names in GENERATE.ROWS.values() for name in names]
    assert sorted(placed) == sorted(name for name, *_ in CATALOGUE)


def test_panels_do_not_overlap() -> None:
    """Each has its own place on the grid of 24 columns, and an id of its own."""
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:  # those of closed rows have the room of what follows until they are opened
        pos = panel["gridPos"]
        assert pos["x"] + pos["w"] <= 24
        cells = {(x, y) for x in range(pos["x"], pos["x"] + pos["w"]) for y in range(pos["y"], pos["y"] + pos["h"])}
        assert not cells & taken
        taken |= cells
    every = [*DASHBOARD["panels"], *CLOSED]
    assert len({panel["id"] for panel in every}) == len(every)
    last = [row["collapsed"] for row in DASHBOARD["panels"] if row["type"] == "row"]
    assert last == sorted(last), "what is closed stands last"


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


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_no_panel_that_is_shown_is_empty(tmp_path: Path) -> None:
    """A real Prometheus scrapes a worker that has answered a few requests: every query has an answer that is a number."""
    prometheus = need_tool("prometheus")
    with (
        LocalPubSubThread() as server,
        rig(server.address, tmp_path) as built,
        socket.create_server(("127.0.0.1", 0)) as probe,
    ):
        worker = built.worker()
        port, ours = probe.getsockname()[1], worker.wait_started()
        probe.close()
        target = {"targets": [f"127.0.0.1:{ours}"], "labels": {"namespace": "inference", "pod": "worker-0"}}
        scrape = {"job_name": "worker", "static_configs": [target]}
        config = {"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]}
        (tmp_path / "prometheus.yml").write_text(json.dumps(config))
        command = [
            prometheus,
            f"--config.file={tmp_path / 'prometheus.yml'}",
            f"--storage.tsdb.path={tmp_path / 'tsdb'}",
        ]
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"])
        try:
            until(lambda: _ask(port, "inference_worker_build_info"), 60, "Prometheus scrapes the worker")
            built.publish(20)
            built.collect(20)
            seen = 'sum(rate(inference_worker_requests_total{outcome="ok"}[30s]))'

            def is_counted() -> bool:
                built.publish(2)  # a rate needs a count that grows
                built.collect()
                return any(float(value) > 0 for value in _ask(port, seen))

            until(is_counted, 60, "Prometheus sees answers")
            empty = [
                f"{panel['title']}: {target['expr']}"
                for panel in SHOWN
                for target in panel["targets"]
                if not all(math.isfinite(float(value)) for value in _ask(port, target["expr"]) or ["nan"])
            ]
        finally:
            process.terminate()
            process.wait(20)
    assert empty == []


def _ask(port: int, expr: str) -> list[str]:
    """Return the values that Prometheus has for an expression now."""
    query = expr.replace("$__rate_interval", "30s").replace("$namespace", ".*")
    url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return [series["value"][1] for series in json.load(answer)["data"]["result"]]
    except urllib.error.HTTPError as error:
        if error.code != HTTPStatus.SERVICE_UNAVAILABLE:  # it starts
            raise AssertionError(f"{expr}: {error.read().decode()}") from None
        return []
    except urllib.error.URLError:
        return []
