"""Programs the checks of deploy/ call: beside the interpreter (installed by the test group) or on the path."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"


def find_tool(name: str) -> str | None:
    """Return the program's path; the one in the environment of the tests wins."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def need_tool(name: str) -> str:
    """Return the program's path, or skip with the reason."""
    found = find_tool(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def call(
    *command: str | Path,
    limit_s: float = 300,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    text: str = "",
) -> "subprocess.CompletedProcess[str]":
    """Run a program to its end, with a text as its input; its output is text, its exit code the caller's to judge."""
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        timeout=limit_s,
        cwd=cwd,
        env=env,
        input=text,
    )
