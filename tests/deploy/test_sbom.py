"""The bill of materials: what the image installs, all of it and nothing else, made without a network."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.tools import ROOT

LOCK = (ROOT / "requirements.lock").read_text("utf-8")


def make_sbom(folder: Path) -> dict[str, object]:
    """Run the recipe of `make sbom` in a folder with what it reads; return the document."""
    if shutil.which("make") is None:
        pytest.skip("no make")
    pytest.importorskip("cyclonedx_py", reason="cyclonedx-bom is not installed")
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "requirements.lock", "requirements-dev.lock", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    stamp = f"{sys.prefix}/.installed"
    command = ["make", f"VENV={sys.prefix}", "-o", stamp, "-o", f"{stamp}-dev", "sbom"]
    # Addresses that nothing can reach: a tool that asks a registry fails.
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    environ = {"PATH": "/usr/bin:/bin", **nowhere}
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document: dict[str, object] = json.loads((folder / "build" / "sbom.cdx.json").read_text("utf-8"))
    return document


def test_the_bill_of_materials_is_the_lock(tmp_path: Path):
    """Each pinned package once, with its version and the digests by which it is installed; the same every time."""
    document = make_sbom(tmp_path / "a")
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    components = {item["name"]: item for item in document["components"]}  # type: ignore[attr-defined]
    pins = dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", LOCK, re.MULTILINE))
    assert len(pins) > 40
    assert {name: item["version"] for name, item in components.items()} == pins
    digests = {
        entry["content"]
        for item in components.values()
        for reference in item["externalReferences"]
        for entry in reference["hashes"]
    }
    assert digests == set(re.findall(r"--hash=sha256:([0-9a-f]{64})", LOCK))
    root = document["metadata"]["component"]  # type: ignore[index]
    assert (root["name"], root["licenses"][0]["license"]["id"]) == ("pubsub-inference-worker", "Apache-2.0")
    assert make_sbom(tmp_path / "b") == document
