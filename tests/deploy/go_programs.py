"""
Programs that the checks of deploy/ build of Go modules: what has no package that pip could install.

A folder has a go.mod with the few modules that are wanted at a version, and perhaps a main.go.  Everything else follows
from the modules' own requirements; `go mod tidy` writes it into a copy.
"""

import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.deploy.tools import call, need_tool

CACHE = Path(os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))) / "inference-worker"
"""Survives a checkout: without Go's own cache a build takes minutes, that of Kubernetes up to an hour."""


def _digest(source: Path) -> str:
    names = sorted(path for path in source.iterdir() if path.suffix in {".go", ".mod"})
    return hashlib.sha256(b"".join(path.read_bytes() for path in names)).hexdigest()[:16]


@functools.cache
def programs(source: Path, *, packages: tuple[str, ...] = (".",), limit_s: float = 900) -> Path:
    """
    Return the folder with the programs of these packages, built once for each version of the source.

    Skips where there is no Go, or where the modules cannot be had.

    Args:
        source: The folder with go.mod.
        packages: What `go build` gets; `tool` is every tool that go.mod lists.
        limit_s: For each step.
    """
    kept = CACHE / f"{source.name}-{_digest(source)}"
    if kept.exists():
        return kept
    go = need_tool("go")
    with tempfile.TemporaryDirectory() as temporary:
        copy, out = Path(temporary) / "source", Path(temporary) / "programs"
        shutil.copytree(source, copy)
        out.mkdir()
        _replace_staging(go, copy)
        fetched = call(go, "mod", "tidy", cwd=copy, limit_s=limit_s)
        if fetched.returncode != 0:
            pytest.skip(f"the modules of {source.name} cannot be had: {fetched.stderr.strip().splitlines()[-1]}")
        built = call(go, "build", "-ldflags=-s -w", "-o", f"{out}/", *packages, cwd=copy, limit_s=limit_s)
        assert built.returncode == 0, built.stderr
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=CACHE))
        shutil.copytree(out, partial, dirs_exist_ok=True)
        if kept.exists():  # another process was faster
            shutil.rmtree(partial)
        else:
            partial.rename(kept)
    return kept


def _replace_staging(go: str, copy: Path) -> None:
    """
    Give the libraries that k8s.io/kubernetes has in its own repository the version they are published as.

    Its go.mod replaces them by folders, which counts in the main module alone; v0.N.P is published with v1.N.P.
    """
    version = re.search(r"k8s\.io/kubernetes v1\.(\S+)", (copy / "go.mod").read_text())
    if version is None:
        return
    with tempfile.TemporaryDirectory() as outside:
        module = f"k8s.io/kubernetes@v1.{version[1]}"
        fetched = call(go, "mod", "download", "-json", module, cwd=Path(outside), limit_s=300)
    if fetched.returncode != 0:
        pytest.skip(f"{module} cannot be had: {fetched.stdout.strip() or fetched.stderr.strip()}")
    text = Path(json.loads(fetched.stdout)["GoMod"]).read_text()
    staged = re.findall(r"^\s*(k8s\.io/\S+) => \./staging/", text, re.MULTILINE)
    edited = call(go, "mod", "edit", *(f"-replace={name}={name}@v0.{version[1]}" for name in staged), cwd=copy)
    assert edited.returncode == 0, edited.stderr
