"""A shell in which a page's commands are pasted as they stand, and the finding of them on the page."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.waiting import until

ROOT = Path(__file__).parents[2]


class Shell:
    """A shell in a copy of the checkout, with nothing of this project on its PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "checkout"
        self.folder.mkdir()
        for name in (
            "Makefile",
            "docs",
            "examples",
            "worker",
            "benchmarks",
            "tests",
            "pyproject.toml",
            "requirements-dev.lock",
        ):
            (self.folder / name).symlink_to(ROOT / name)
        self.home = folder / "home"
        self.bin = self.home / ".local" / "bin"
        own = Path(sys.prefix).resolve() / "bin"
        path = [entry for entry in os.environ["PATH"].split(":") if Path(entry).resolve() != own]
        self.environ = {
            **os.environ,
            "HOME": str(self.home),
            "PATH": ":".join([str(self.bin), *path]),
            "PYTHONPATH": str(ROOT),
        }

    def run(self, command: str, code: int = 0) -> str:
        """Run one command, which ends with an exit code; return what it printed."""
        # The environment of this test stands in for the one that `make` would install: same recipes, no download.
        make = f"make VENV={sys.prefix} -o {sys.prefix}/.installed -o {sys.prefix}/.installed-dev"
        command = re.sub(r"^make", make, command)
        command = re.sub(r"^python", sys.executable, command)
        done = subprocess.run(
            ["sh", "-c", command], cwd=self.folder, env=self.environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, "utf-8")

    def rows(self, name: str) -> list[dict[str, object]]:
        return [json.loads(line) for line in (self.folder / name).read_bytes().splitlines()]

    @contextmanager
    def serving(self, command: str, ready: str) -> Iterator[subprocess.Popen[bytes]]:
        """
        Run a command that serves until it is interrupted, from its line `ready` on; end it as Ctrl-C does.

        An exit code other than 0 fails, with all that the command printed.
        """
        log = self.folder / f"{re.sub(r'[^a-z]+', '-', command)[:60]}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["sh", "-c", f"exec {command}"], cwd=self.folder, env=self.environ, stdout=output, stderr=output
            )
        try:
            until(lambda: ready in log.read_text("utf-8") or process.poll() is not None, 60, f"{command} is ready")
            assert process.poll() is None, log.read_text("utf-8")
            yield process
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0, log.read_text("utf-8")
        finally:
            process.kill()
            process.wait()


def blocks(page: Path, language: str = "sh") -> Iterator[str]:
    """Yield every command of a page's blocks in their order, a continued line as one command with its line breaks."""
    for text in re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        yield from re.findall(r"(?:[^\n]*\\\n)*[^\n]+", text)
