# ruff: noqa: INP001 - a script beside what it writes
"""
Write rules.yaml as Kubernetes objects, for Google's managed Prometheus and for prometheus-operator.

`python deploy/alerts/generate.py` writes them, `--check` fails when one is stale.  Which object a group needs follows
from whose metrics it asks for: Google's `Rules` see their own namespace only, `ClusterRules` their cluster, and
`GlobalRules` everything the project has, Cloud Monitoring's own metrics included
(https://cloud.google.com/stackdriver/docs/managed-prometheus/rules-managed).  The latter two have no namespace, so they
are no part of an overlay, which gives everything its own.
"""

import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
KUSTOMIZE = HERE.parent / "kustomize"
HEADER = "# Made from deploy/alerts/rules.yaml by `python deploy/alerts/generate.py`; do not edit.\n"
NAME = "inference-worker"
LABELS = {"app.kubernetes.io/name": NAME}
GMP_KINDS = {
    "inference-worker": "Rules",
    "inference-worker-keda": "ClusterRules",
    "inference-worker-pubsub": "GlobalRules",
}
OPERATOR_GROUPS = ("inference-worker", "inference-worker-keda")
"""An in-cluster Prometheus has no metrics of Cloud Monitoring."""


class _Dumper(yaml.SafeDumper):
    """Indents lists below their key, as the other manifests do, and long text as a block."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002
        super().increase_indent(flow, indentless=False)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    is_long = len(value) > 80  # noqa: PLR2004 - what fits on a line beside its key
    style = "|" if "\n" in value else ">" if is_long else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def render() -> dict[str, str]:
    """Return the text of each file by its path below deploy/kustomize."""
    groups = yaml.safe_load((HERE / "rules.yaml").read_text())["groups"]
    by_name = {group["name"]: group for group in groups}
    own, *wider = [
        _object("monitoring.googleapis.com/v1", kind, name, [by_name[name]]) for name, kind in GMP_KINDS.items()
    ]
    operator = _object("monitoring.coreos.com/v1", "PrometheusRule", NAME, [by_name[name] for name in OPERATOR_GROUPS])
    return {
        "components/alerts-gmp/rules.yaml": _dump([own]),
        "cluster-alerts/rules.yaml": _dump(wider),
        "components/alerts-prometheus-operator/rules.yaml": _dump([operator]),
    }


def _object(version: str, kind: str, name: str, groups: list[Any]) -> dict[str, Any]:
    return {
        "apiVersion": version,
        "kind": kind,
        "metadata": {"name": name, "labels": dict(LABELS)},
        "spec": {"groups": groups},
    }


def _dump(documents: list[dict[str, Any]]) -> str:
    return HEADER + yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=90)


def main() -> int:
    """Write the files, or with `--check` compare them; return the exit code."""
    stale = []
    for name, text in render().items():
        path = KUSTOMIZE / name
        if path.exists() and path.read_text() == text:
            continue
        if "--check" in sys.argv:
            stale.append(name)
        else:
            path.write_text(text)
            sys.stdout.write(f"deploy/kustomize/{name} written\n")
    if stale:
        sys.stderr.write(f"stale, run `python deploy/alerts/generate.py`: {', '.join(stale)}\n")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
