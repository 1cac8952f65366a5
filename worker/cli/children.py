"""The processes below `inference-worker local`: each ends when this process ends, also when it is killed."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from worker.cli.exit_codes import EXIT_USAGE
from worker.errors import WorkerError

MAX_RESTARTS = 5
"""A worker that dies more often than this will not recover by a restart."""
STOP_S = 10.0

Say = Callable[[str], None]


class ChildError(WorkerError):
    """A process of the tree ended unexpectedly; permanent for this run."""


class Child:
    """
    A child process, which ends when this process ends.

    Args:
        name: Name in messages.
        arguments: Of `inference-worker`.
        environ: Added to the environment.
    """

    def __init__(self, name: str, *arguments: str, environ: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._arguments = arguments
        self._environ = environ or {}
        self._is_hurried = False
        self.process: asyncio.subprocess.Process | None = None

    async def start(self, stdout: int | None = None, stderr: int | None = None) -> asyncio.subprocess.Process:
        """
        Start the process in its own session, so that Ctrl-C reaches this process alone.

        Cancellation: the process may have been started; it ends with this one.
        """
        command = [sys.executable, "-m", "worker", "--watch-stdin", *self._arguments]
        self.process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            env={**os.environ, **self._environ},
            limit=1 << 22,
        )
        return self.process

    async def read_address(self, stream: asyncio.StreamReader | None, mark: str) -> str:
        """
        Return the address in the first line of the process that contains `mark`.

        Raises:
            ChildError: The process ended before.

        Cancellation: lines may be lost.
        """
        assert stream is not None
        lines: list[str] = []
        while line := (await stream.readline()).decode("utf-8", "replace"):
            lines.append(line.rstrip())
            if mark in line:
                return next(word for word in line.replace(";", " ").split() if ":" in word and word[-1].isalnum())
        raise ChildError(f"{self.name} did not start: {' '.join(lines[-3:])}")

    def hurry(self) -> None:
        """Have `stop` kill the process at once."""
        self._is_hurried = True

    async def stop(self) -> None:
        """Send SIGTERM, and SIGKILL after `STOP_S` seconds.  Cancellation: the process may still run."""
        if self.process is None or self.process.returncode is not None:
            return
        self.process.send_signal(signal.SIGKILL if self._is_hurried else signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_S):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


class WorkerChild(Child):
    """
    The worker: restarted when it dies; its log is kept on request, and each of its warnings is shown once.

    Args:
        log: Gets every line of the log; `None`: nothing does.
        backend_url: Shown in the place of the route's name.
        say: Shows a line.
        ends_on_refusal: A refused key ends the run as long as this returns true.
        arguments: Of `inference-worker`.
        environ: Added to the environment.
    """

    def __init__(
        self,
        log: BinaryIO | None,
        backend_url: str,
        say: Say,
        ends_on_refusal: Callable[[], bool],
        *arguments: str,
        environ: Mapping[str, str],
    ) -> None:
        super().__init__("the worker", *arguments, environ=environ)
        self._log = log
        self._backend_url = backend_url
        self._say = say
        self._ends_on_refusal = ends_on_refusal
        self._shown: set[tuple[str, str]] = set()
        self._is_draining = False

    async def supervise(self) -> None:
        """
        Run the worker until it has drained.

        Raises:
            ChildError: The worker cannot use its settings, died too often, or is refused by the server.

        Cancellation: the process still runs; `stop` ends it.
        """
        for _ in range(MAX_RESTARTS):
            process = await self.start(stderr=asyncio.subprocess.PIPE)
            if self._is_draining:
                process.send_signal(signal.SIGTERM)
            last = await self._follow(process.stderr)
            code = await process.wait()
            if self._is_draining:
                return
            if code == EXIT_USAGE:
                raise ChildError(f"the worker cannot start: {last}")
            self._say(f"worker: ended with {code}; restarting it")
        raise ChildError(f"the worker died {MAX_RESTARTS} times; its last message: {last}")

    def drain(self) -> None:
        """Have the worker finish the requests at the server and end; idempotent."""
        if not self._is_draining and self.process is not None and self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        self._is_draining = True

    async def _follow(self, stream: asyncio.StreamReader | None) -> str:
        """Read the log to its end; return the last line with a reason for the end."""
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
                self._end_on_refusal(entry)
                self._show(entry)
        return last

    def _end_on_refusal(self, entry: Mapping[str, Any]) -> None:
        """Raise if the server refuses the key and has answered nothing yet; later a key may just be changing."""
        if entry["event"] == "attempt_held" and entry.get("error_class") == "auth" and self._ends_on_refusal():
            raise ChildError(
                f"{self._where(entry)}: {entry['error']} (status {entry.get('backend_status')}); "
                "no line was answered; correct --api-key-file, OPENAI_API_KEY, --header or --backend-url"
            )

    def _show(self, entry: Mapping[str, Any]) -> None:
        key = (entry["event"], str(entry.get("error_class")))
        if key not in self._shown and not self._is_draining and len(self._shown) < 20:  # noqa: PLR2004 - a hint, not a log
            self._shown.add(key)
            error = entry.get("error") or entry.get("reason") or ""
            details = ", ".join(filter(None, (entry.get("error_class"), self._where(entry))))
            event = entry["event"].replace("_", " ")  # docs/log.md has a sentence for each
            text = f"worker: {entry['level']}: {event}{f': {error}' if error else ''}"
            self._say(" ".join(f"{text}{f' ({details})' if details else ''}".split()))

    def _where(self, entry: Mapping[str, Any]) -> str | None:
        return self._backend_url if entry.get("backend") == "default" else entry.get("backend")
