"""Helm's own packages, built into a small program (`tests/deploy/helm`), and what it makes of the chart."""

import copy
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.go_programs import programs
from tests.deploy.manifests import KUSTOMIZE, STACKS, Variant, parse
from tests.deploy.tools import DEPLOY, call

CHART = DEPLOY / "helm" / "inference-worker"
SOURCE = Path(__file__).parent / "helm"
RELEASE, NAMESPACE = "inference-worker", "inference"
GKE = yaml.safe_load((KUSTOMIZE / "overlays" / "gke" / "values.yaml").read_text())["spec"]
BARE: dict[str, Any] = {
    "image": {"repository": "inference-worker", "tag": "dev"},
    "scaling": {"by": "none"},
    "scraping": "none",
    "networkPolicy": False,
}
OF_COMPONENT: dict[str, dict[str, Any]] = {
    "keda": {"scaling": {"by": "keda"}},
    "keda-zero": {"scaling": {"minReplicas": 0}},
    "hpa": {"scaling": {"by": "hpa"}},
    "hpa-gke": {"scaling": {"by": "hpa-gke"}},
    "gmp": {"scraping": "gmp"},
    "podmonitor": {"scraping": "prometheus-operator"},
    "networkpolicy": {"networkPolicy": True},
    "spot": {"spot": True},
    "api-key": {"backend": {"apiKeySecret": "inference-worker-backend"}},
    "sagemaker": {
        "backend": {"awsRoleArn": "arn:aws:iam::123456789012:role/inference-worker", "awsRegion": "eu-west-1"}
    },
    "batches": {"batches": {"enabled": True}},
    "alerts-gmp": {"alerts": {"for": "gmp", "runbook": GKE["alerts"]["runbook"]}},
    "alerts-prometheus-operator": {"alerts": {"for": "prometheus-operator", "runbook": GKE["alerts"]["runbook"]}},
    "values": {},
}
"""The switch of the chart for each component of Kustomize."""
EMULATOR = {
    "image": {"repository": "localhost/inference-worker", "tag": "dev", "pullPolicy": "IfNotPresent"},
    "projectId": "local",
    "emulatorHost": "pubsub:8085",
    "backend": {"baseUrl": "http://backend:8000", "namespace": "inference", "port": 8000},
}


def renderer() -> Path:
    """Return the program; skip where it cannot be built."""
    return programs(SOURCE) / "render"


def helm(values: dict[str, Any], *, release: str = RELEASE) -> tuple[int, str]:
    """Return the exit code, and the rendered YAML or Helm's complaint."""
    done = call(renderer(), CHART, release, NAMESPACE, text=yaml.safe_dump(values))
    return done.returncode, done.stdout if done.returncode == 0 else done.stderr


def rendered(values: dict[str, Any], *, release: str = RELEASE) -> Variant:
    """Return what Helm makes of the chart with these values over its own."""
    code, text = helm(values, release=release)
    assert code == 0, text
    return parse(text, "helm")


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    """Return the parts, the later ones over the earlier, section by section."""
    whole: dict[str, Any] = {}
    for part in parts:
        for key, value in copy.deepcopy(part).items():
            whole[key] = {**whole[key], **value} if isinstance(value, dict) and key in whole else value
    return whole


def of_stack(name: str) -> dict[str, Any]:
    """Return the values for what `manifests.STACKS` has under this name."""
    return merged(BARE, *(OF_COMPONENT[component] for component in STACKS[name]))
