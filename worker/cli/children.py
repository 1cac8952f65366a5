"""
The processes below `inference-worker local`.

Each is the same program with another command, and ends when this one does, however that happens: it watches a pipe
that only this process holds open.
"""

import asyncio
import json
import signal
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

from worker.errors import WorkerError

MAX_RESTARTS = 5
"""A worker that dies more often than this has a cause that starting it again does not cure."""
STOP_S = 10.0
EXIT_SETTINGS = 2


class ChildError(WorkerError):
    """A process of the tree ended that should not have; permanent for this run."""


class Child:
    """
    One process below this one; ends when this one does.

    Args:
        name: For messages.
        arguments: Of `inference-worker`.
    """

    def __init__(self, name: str, *arguments: str) -> None:
        self.name = name
        self._arguments = arguments
        self.process: asyncio.subprocess.Process | None = None

    async def start(self, stdout: int | None = None, stderr: int | None = None) -> asyncio.subprocess.Process:
        """Start it in a session of its own, so that Ctrl-C reaches this process alone."""
        command = [sys.executable, "-m", "worker", "--watch-stdin", *self._arguments]
        self.process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            limit=1 << 22,
        )
        return self.process

    async def read_address(self, stream: asyncio.StreamReader | None, mark: str) -> str:
        """
        Return the address it announces in the first line that holds `mark`.

        Raises:
            ChildError: It ended before.
        """
        assert stream is not None
        lines: list[str] = []
        while line := (await stream.readline()).decode("utf-8", "replace"):
            lines.append(line.rstrip())
            if mark in line:
                return next(word for word in line.replace(";", " ").split() if ":" in word and word[-1].isalnum())
        raise ChildError(f"{self.name} did not start: {' '.join(lines[-3:])}")

    async def stop(self) -> None:
        """Ask it to stop, and end it when it does not."""
        if self.process is None or self.process.returncode is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_S):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


class WorkerChild(Child):
    """The worker: started again when it dies; its log is kept on request and its warnings are shown, each once."""

    def __init__(self, log: BinaryIO | None, backend_url: str, *arguments: str) -> None:
        super().__init__("the worker", *arguments)
        self._log = log
        self._backend_url = backend_url
        self._told: set[tuple[str, str]] = set()

    async def supervise(self) -> None:
        """
        Run it until cancelled.

        Raises:
            ChildError: It cannot use its settings, or died too often.
        """
        for _ in range(MAX_RESTARTS):
            process = await self.start(stderr=asyncio.subprocess.PIPE)
            last = await self._follow(process.stderr)
            code = await process.wait()
            if code == EXIT_SETTINGS:
                raise ChildError(f"the worker cannot start: {last}")
            _say(f"the worker ended with {code}; starting it again")
        raise ChildError(f"the worker died {MAX_RESTARTS} times; last words: {last}")

    async def _follow(self, stream: asyncio.StreamReader | None) -> str:
        """Read its log to the end; return the last line that says why it ended."""
        assert stream is not None
        last = ""
        while line := await stream.readline():
            if self._log is not None:
                self._log.write(line)
            try:
                entry = json.loads(line)
            except ValueError:
                last = (last + " " if last.startswith("inference-worker:") else "") + line.decode(
                    "utf-8", "replace"
                ).strip()
                continue
            if entry.get("level") in {"warning", "error"}:
                last = entry.get("error") or entry["event"]
                self._tell(entry)
        return last

    def _tell(self, entry: Mapping[str, Any]) -> None:
        key = (entry["event"], str(entry.get("error_class")))
        if key not in self._told and len(self._told) < 20:  # noqa: PLR2004 - a hint, not a log
            self._told.add(key)
            error = entry.get("error") or entry.get("reason") or ""
            where = self._backend_url if entry.get("backend") == "default" else entry.get("backend")
            details = ", ".join(filter(None, (entry.get("error_class"), where)))
            event = entry["event"].replace("_", " ")  # docs/operations.md has a sentence for each
            text = f"{entry['level']}: {event}{f': {error}' if error else ''}"
            _say(" ".join(f"{text}{f' ({details})' if details else ''}".split()))


def _say(text: str) -> None:
    sys.stderr.write(f"worker: {text}\n")
    sys.stderr.flush()
