"""
Podman, where it really works: found, tried, and asked for the images that the tests need.

Nothing is pulled and nothing is installed.  `tests/deploy/podman/setup.sh` makes an engine and stand-ins for the base
images on a Debian machine that has neither; what it found out about the machine stands in the file named below, and a
machine with an ordinary podman and the published images needs no such file.
"""

import functools
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.deploy.tools import ROOT, call

ENVIRONMENT = Path(os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))) / "inference-worker" / "podman.env"
EMULATOR = "gcr.io/google.com/cloudsdktool/google-cloud-cli:emulators"
"""Google's image with the Pub/Sub emulator."""


class NoEngineError(Exception):
    """There is no working podman or an image is missing; the text is the reason of the skip."""


@dataclass(frozen=True)
class Engine:
    """A working podman and the images to build from and to test with."""

    environ: dict[str, str]
    build_flags: tuple[str, ...]
    images: dict[str, str] = field(default_factory=dict)
    """`python`, `runtime`, `emulator`: names of images that exist here."""

    def __call__(self, *arguments: str | Path, check: bool = True) -> str:
        """Run a podman command; return its output, or raise `AssertionError` with what it said."""
        done = call("podman", *arguments, env=self.environ, limit_s=1800)  # a build on a machine that is busy
        assert not check or done.returncode == 0, (
            f"podman {' '.join(map(str, arguments))}: {done.stderr or done.stdout}"
        )
        return done.stdout.strip()

    def run(self, *arguments: str) -> tuple[int, str]:
        """Run a container to its end, a minute at most; return the exit code and everything it printed."""
        done = call("podman", "run", "--rm", "--pull=never", "--timeout=60", *arguments, env=self.environ)
        return done.returncode, done.stdout + done.stderr

    def output(self, *arguments: str) -> str:
        """Return everything a command printed, whatever came of it."""
        done = call("podman", *arguments, env=self.environ)
        return done.stdout + done.stderr

    def inspect(self, name: str, *, image: bool = False) -> dict[str, Any]:
        """Return what the engine knows of a container or an image."""
        return dict(json.loads(self(*(("image",) if image else ()), "inspect", name))[0])

    def has(self, image: str) -> bool:
        return call("podman", "image", "exists", image, env=self.environ).returncode == 0


def _saved() -> dict[str, str]:
    """Return what setup.sh found out: `NAME=value` lines."""
    if not ENVIRONMENT.exists():
        return {}
    pairs = (line.split("=", 1) for line in ENVIRONMENT.read_text().splitlines() if "=" in line)
    return {name: value.strip("'\"") for name, value in pairs}


def _default(argument: str) -> str:
    """Return the image that the Dockerfile itself names."""
    found = re.search(rf"^ARG {argument}=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


@functools.cache
def find_engine() -> Engine:
    """
    Return a podman that builds and runs, with its images.

    Raises:
        NoEngineError: What is missing.
    """
    if os.environ.get("CI") and not os.environ.get("IMAGE_TESTS"):
        raise NoEngineError(
            "images are not built in CI unless IMAGE_TESTS is set: many minutes, and an engine of its own"
        )
    if shutil.which("podman") is None:
        raise NoEngineError("no podman on this machine")
    saved = _saved()
    kept = {
        name: text
        for name, text in os.environ.items()
        if name in {"PATH", "HOME", "XDG_RUNTIME_DIR", "CONTAINERS_CONF"}
    }
    names = {
        "python": saved.get("PYTHON_IMAGE", _default("PYTHON_IMAGE")),
        "runtime": saved.get("RUNTIME_IMAGE", _default("RUNTIME_IMAGE")),
        "emulator": saved.get("EMULATOR_IMAGE", EMULATOR),
    }
    environ = {**kept, **({"CONTAINERS_CONF": saved["CONTAINERS_CONF"]} if "CONTAINERS_CONF" in saved else {})}
    engine = Engine(environ, tuple(saved.get("BUILD_FLAGS", "").split()), names)
    for image in names.values():
        if not engine.has(image):
            raise NoEngineError(f"podman has no image {image}; pull it, or see tests/deploy/podman/setup.sh")
    code, text = engine.run("--network=none", "--entrypoint=python3", names["runtime"], "-c", "print('works')")
    if (code, text.strip()) != (0, "works"):
        raise NoEngineError(f"podman cannot run a container here: {text.strip().splitlines()[-1:]}")
    return engine
