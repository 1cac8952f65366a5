"""
checkov's policies for manifests, Dockerfile and Terraform: what it finds and deploy/checkov.yaml does not answer, fails.

checkov is not among the packages of the tests: it brings 290 MB, and pins what the worker has newer.  It is found on
the path, or in `.venv/checkov`.
"""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.manifests import VARIANTS, rendered
from tests.deploy.tools import DEPLOY, ROOT, call, find_tool

CONFIG = DEPLOY / "checkov.yaml"
REAL = "gke"
ELSEWHERE = {
    "CKV_K8S_43": "digest: an image that was built a minute ago, or a base without any",
    "CKV_K8S_14": "tag: of a base that no overlay has given an image yet",
    "CKV_K8S_15": "pull policy: the same",
    "CKV_K8S_8": "liveness: of the broker and the model server of overlays/local, which are for an hour",
    "CKV2_K8S_6": "network policy: for these three a component's business, or a local cluster's",
}
"""Accepted where a variant is not meant for production."""


def _found(folder: Path, *skipped: str) -> list[str]:
    """Return what fails, as `check resource`."""
    program = find_tool("checkov") or shutil.which("checkov", path=str(Path(sys.prefix) / "checkov" / "bin"))
    if program is None:
        pytest.skip("checkov is not installed (pipx install checkov)")
    skips = [*yaml.safe_load(CONFIG.read_text())["skip-check"], *skipped]
    done = call(
        program, "--config-file", CONFIG, "--directory", folder, "--output", "json", "--skip-check", ",".join(skips)
    )
    assert done.returncode in {0, 1}, done.stderr
    reports: Any = json.loads(done.stdout)
    reports = reports if isinstance(reports, list) else [reports]
    assert sum(report["summary"]["passed"] for report in reports) > 10, "it looked at something"
    return [
        f"{check['check_id']} {check['resource']}" for report in reports for check in report["results"]["failed_checks"]
    ]


@pytest.mark.slow
def test_what_is_for_production_passes(tmp_path: Path):
    """The overlay for GKE, the Dockerfile and the Terraform configuration."""
    (tmp_path / "gke.yaml").write_text(rendered(REAL))
    shutil.copy(ROOT / "Dockerfile", tmp_path)
    shutil.copytree(DEPLOY / "terraform", tmp_path / "terraform")
    assert _found(tmp_path) == []


@pytest.mark.slow
def test_the_other_variants_pass_but_for_what_they_are(tmp_path: Path):
    """Every other overlay and component: no digest, no policy of the network, and nothing else."""
    for name in VARIANTS:
        if name != REAL:
            (tmp_path / f"{name}.yaml").write_text(rendered(name))
    assert _found(tmp_path, *ELSEWHERE) == []


@pytest.mark.slow
def test_a_hole_is_found(tmp_path: Path):
    """What the policies are there for fails: a container that may write everywhere, as anybody."""
    text = rendered(REAL)
    hole = re.sub(r"readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", text)
    assert hole != text
    (tmp_path / "gke.yaml").write_text(hole)
    assert [found.split()[0] for found in _found(tmp_path)] == ["CKV_K8S_22"]
