"""Helm's own packages, built into a small program (`tests/deploy/helm`), and what it makes of the chart."""

import functools
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.manifests import Variant, parse
from tests.deploy.tools import DEPLOY, call, need_tool

CHART = DEPLOY / "helm" / "inference-worker"
SOURCE = Path(__file__).parent / "helm"
RELEASE, NAMESPACE = "inference-worker", "inference"
BUILD_LIMIT_S = 900
"""A first build compiles Kubernetes' client as well."""


@functools.cache
def renderer() -> Path:
    """
    Return the program, built once for each version of its source; skip where it cannot be built.

    It is kept in the cache folder of the user, since a build without Go's own cache takes minutes.
    """
    go = need_tool("go")
    content = b"".join((SOURCE / name).read_bytes() for name in ("main.go", "go.mod"))
    cache = Path(os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))) / "inference-worker"
    program = cache / f"helm-render-{hashlib.sha256(content).hexdigest()[:16]}"
    if program.exists():
        return program
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "render"
        shutil.copytree(SOURCE, copy)
        fetched = call(go, "mod", "tidy", cwd=copy, limit_s=BUILD_LIMIT_S)
        if fetched.returncode != 0:
            pytest.skip(f"Helm's packages cannot be had: {fetched.stderr.strip().splitlines()[-1]}")
        built = call(go, "build", "-o", Path(folder) / "program", ".", cwd=copy, limit_s=BUILD_LIMIT_S)
        assert built.returncode == 0, built.stderr
        cache.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(folder) / "program", program.with_suffix(".new"))
        program.with_suffix(".new").replace(program)
    return program


def helm(values: dict[str, Any], *, release: str = RELEASE) -> tuple[int, str]:
    """Return the exit code, and the rendered YAML or Helm's complaint."""
    done = call(renderer(), CHART, release, NAMESPACE, text=yaml.safe_dump(values))
    return done.returncode, done.stdout if done.returncode == 0 else done.stderr


def rendered(values: dict[str, Any], *, release: str = RELEASE) -> Variant:
    """Return what Helm makes of the chart with these values over its own."""
    code, text = helm(values, release=release)
    assert code == 0, text
    return parse(text, "helm")
