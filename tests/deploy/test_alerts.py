"""Alerts: they fire when they should, ask for what exists, and each has a runbook section; so has every error class."""

import copy
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.deploy.crds import custom_faults
from tests.deploy.manifests import KUSTOMIZE, kustomize, variant
from tests.deploy.promql import FOREIGN, asked, faults
from tests.deploy.tools import DEPLOY, ROOT, call, need_tool
from worker.policy.model import ErrorClass

ALERTS = DEPLOY / "alerts"
GROUPS = yaml.safe_load((ALERTS / "rules.yaml").read_text())["groups"]
RULES = {rule["alert"]: rule for group in GROUPS for rule in group["rules"]}
RUNBOOK = (ROOT / "docs" / "operations.md").read_text()


def _anchors(text: str) -> dict[str, str]:
    """Return the sections of a page by the anchor that GitHub gives their headings."""
    found = {}
    parts = re.split(r"^#{1,6} (.+)$", text, flags=re.MULTILINE)
    for heading, body in zip(parts[1::2], parts[2::2], strict=True):
        anchor = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        assert anchor not in found, f"two headings {heading}"
        found[anchor] = body.strip()
    return found


SECTIONS = _anchors(RUNBOOK)


def test_the_rules_are_valid() -> None:
    """promtool finds nothing wrong with expressions and templates."""
    done = call(need_tool("promtool"), "check", "rules", ALERTS / "rules.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_fires_when_it_should_and_only_then() -> None:
    """The worlds of rules_test.yaml, each with everything that fires in it."""
    done = call(need_tool("promtool"), "test", "rules", "rules_test.yaml", cwd=ALERTS)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_made_to_fire() -> None:
    """No rule is in the file that no test has seen fire."""
    fired = set()
    for world in yaml.safe_load((ALERTS / "rules_test.yaml").read_text())["tests"]:
        for check in world.get("promql_expr_test", ()):
            fired |= {re.search(r'alertname="(\w+)"', each["labels"])[1] for each in check["exp_samples"]}
        fired |= {check["alertname"] for check in world.get("alert_rule_test", ()) if check["exp_alerts"]}
    assert fired == set(RULES)


@pytest.mark.slow
def test_the_tests_notice_rules_that_never_fire(tmp_path: Path) -> None:
    """With every expression made empty, promtool misses every alert by name."""
    promtool = need_tool("promtool")
    groups = copy.deepcopy(GROUPS)
    for rule in (rule for group in groups for rule in group["rules"]):
        rule["expr"] = f"({rule['expr']}) and on () (vector(1) > 2)"
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": groups}))
    (tmp_path / "rules_test.yaml").write_text((ALERTS / "rules_test.yaml").read_text())
    done = call(promtool, "test", "rules", "rules_test.yaml", cwd=tmp_path)
    assert done.returncode != 0
    assert {alert for alert in RULES if alert not in done.stdout + done.stderr} == set()


@pytest.mark.parametrize("alert", RULES)
def test_rules_ask_for_what_exists(alert: str) -> None:
    """Metrics and labels are the catalogue's, or of a declared list of others'."""
    assert faults(RULES[alert]["expr"]) == []


def test_foreign_metrics_are_all_needed() -> None:
    """The list of what is not ours names nothing that no rule asks for."""
    assert frozenset().union(*(asked(rule["expr"]).metrics for rule in RULES.values())) >= FOREIGN


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        ("sum(rate(inference_worker_requests_total[5m]))", None),
        (
            'inference_worker_requests_total{outcome="ok"} > 0 unless on (namespace) inference_worker_draining == 1',
            None,
        ),
        ("histogram_quantile(0.5, sum by (le) (rate(inference_worker_queue_wait_seconds_bucket[5m])))", None),
        ("inference_worker_requests", "no metric inference_worker_requests"),
        ("rate(inference_worker_queue_wait_seconds[5m])", "no metric inference_worker_queue_wait_seconds"),
        ('inference_worker_requests_total{class="ok"}', "inference_worker_requests_total has no label class"),
        ("sum by (colour) (inference_worker_in_flight)", "nothing has the label colour"),
    ],
)
def test_the_reader_of_expressions_sees_what_is_wrong(expression: str, fault: str | None) -> None:
    """Misspelt names and labels are found, PromQL's own words are not taken for metrics."""
    assert faults(expression) == ([] if fault is None else [fault])


@pytest.mark.parametrize("alert", RULES)
def test_every_alert_leads_to_its_runbook(alert: str) -> None:
    """The link is this page's, the section is there and says more than nothing."""
    rule = RULES[alert]
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert (page, anchor) == ("docs/operations.md", alert.lower())
    assert len(SECTIONS[anchor]) > 40


def test_no_runbook_section_is_left_over() -> None:
    """A section that is named like an alert belongs to one."""
    assert {anchor for anchor in SECTIONS if anchor.startswith("inferenceworker")} == {name.lower() for name in RULES}


@pytest.mark.parametrize("error_class", ErrorClass)
def test_every_error_class_has_a_runbook_section(error_class: ErrorClass) -> None:
    """Under its own name, as metrics, log lines and answers have it."""
    assert f"\n### `{error_class.value}`\n" in RUNBOOK
    assert len(SECTIONS[error_class.value]) > 40


def test_links_inside_the_runbook_lead_somewhere() -> None:
    """Every anchor exists."""
    assert set(re.findall(r"\]\(#([\w-]+)\)", RUNBOOK)) <= SECTIONS.keys()


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("alerts_generate", ALERTS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_objects_for_clusters_are_up_to_date() -> None:
    """The components and `cluster-alerts` have what the generator makes of rules.yaml."""
    for name, text in _generator().render().items():
        assert (KUSTOMIZE / name).read_text() == text, f"{name} is stale: python deploy/alerts/generate.py"


def _objects(*folders: str) -> list[dict[str, Any]]:
    return [each for name in folders for each in yaml.safe_load_all((KUSTOMIZE / name / "rules.yaml").read_text())]


@pytest.mark.parametrize("name", ["with-alerts-gmp", "with-alerts-operator"])
def test_links_of_rendered_alerts_are_absolute(name: str) -> None:
    """They lead to the page that the values name, each to its own section."""
    runbook = yaml.safe_load((KUSTOMIZE / "overlays" / "gke" / "values.yaml").read_text())["spec"]["alerts"]["runbook"]
    rules = [
        rule
        for each in variant(name).of_kind("Rules", "PrometheusRule")
        for group in each["spec"]["groups"]
        for rule in group["rules"]
    ]
    assert len(rules) > 10
    for rule in rules:
        assert rule["annotations"]["runbook_url"] == f"{runbook}#{rule['alert'].lower()}"


def test_links_of_alerts_for_the_cluster_are_absolute() -> None:
    """These have no namespace, so they are rendered apart."""
    text = kustomize(KUSTOMIZE / "cluster-alerts")
    assert "namespace" not in {key for each in yaml.safe_load_all(text) for key in each["metadata"]}
    assert text.count("runbook_url: https://") == text.count("runbook_url: ") > 3


def test_google_takes_the_objects() -> None:
    """Every object has the shape of the definition of Rules; the wider kinds have the same."""
    pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    objects = _objects("components/alerts-gmp", "cluster-alerts")
    assert [each["kind"] for each in objects] == ["Rules", "ClusterRules", "GlobalRules"]
    for each in objects:
        assert custom_faults({**each, "kind": "Rules"}) == []
    assert custom_faults({**objects[0], "spec": {"groups": [{"name": "x", "rules": [{"alret": "y"}]}]}})


def test_each_object_sees_its_metrics() -> None:
    """Rules see their namespace only: what Cloud Monitoring or KEDA has stands in the wider kinds, and nowhere else."""
    for each in _objects("components/alerts-gmp", "cluster-alerts"):
        for rule in each["spec"]["groups"][0]["rules"]:
            foreign = {name.partition("_")[0] for name in asked(rule["expr"]).metrics & FOREIGN}
            assert foreign == {"Rules": set(), "ClusterRules": {"keda"}, "GlobalRules": {"pubsub"}}[each["kind"]]
    (operator,) = _objects("components/alerts-prometheus-operator")
    exprs = [rule["expr"] for group in operator["spec"]["groups"] for rule in group["rules"]]
    assert not any("googleapis" in expr for expr in exprs)
    assert len(exprs) == sum(len(group["rules"]) for group in GROUPS if group["name"] != "inference-worker-pubsub")
