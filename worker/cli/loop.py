"""How a command runs a coroutine: the event loop, its signals, and the end of the process that started it."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from worker.cli.exit_codes import EXIT_FAILED, EXIT_INTERRUPTED
from worker.errors import SettingsError

ORPHAN_S = 5.0
"""How long a part of `local` may drain after its parent died: its broker dies at the same time."""


def run_loop(main: Callable[[], Awaitable[int]]) -> int:
    """Run a coroutine on uvloop where it is installed, on asyncio's own loop elsewhere; return its result."""
    try:
        import uvloop  # noqa: PLC0415 - not on every system
    except ImportError:
        factory = None
    else:
        factory = uvloop.new_event_loop

    async def call() -> int:
        return await main()

    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(call())


def on_signals(stop: Callable[[], object]) -> None:
    """Have SIGTERM and SIGINT call `stop` on the running loop."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)


class Interrupts:
    """What Ctrl-C and SIGTERM do: the first one drains, where something is to drain; the next one ends everything."""

    def __init__(self) -> None:
        self._count = 0
        self.task: asyncio.Task[int] | None = None
        self.drain: Callable[[], None] | None = None
        """What the first one calls; `None`: it ends everything."""

    @property
    def has_come(self) -> bool:
        """Whether there was one."""
        return self._count > 0

    def count(self) -> None:
        """Take one signal."""
        self._count += 1
        if self._count == 1 and self.drain is not None:
            self.drain()
        elif self.task is not None:
            self.task.cancel()


def run_interruptible(
    job: Callable[[Interrupts], Coroutine[Any, Any, int]], on_interrupted: Callable[[], object]
) -> int:
    """
    Run a command that drains at the first Ctrl-C and ends at the next one; return its exit code.

    Args:
        job: The command.
        on_interrupted: Called when it was ended: the exit code is that of an interruption.
    """

    async def main() -> int:
        interrupts = Interrupts()
        interrupts.task = asyncio.ensure_future(job(interrupts))
        on_signals(interrupts.count)
        try:
            return await interrupts.task
        except asyncio.CancelledError:
            on_interrupted()
            return EXIT_INTERRUPTED

    return run_loop(main)


def serve_until_stopped(serve: Callable[[], Awaitable[None]], where: str) -> int:
    """
    Run a server at an address until SIGTERM or Ctrl-C; return 0.

    Raises:
        SettingsError: It cannot listen there.
    """

    async def main() -> int:
        task = asyncio.ensure_future(serve())
        on_signals(task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            return 0
        except OSError as error:  # the address is taken or belongs to another machine
            reason = f"cannot listen on {where}: {error.strerror}" if error.strerror else str(error)
            raise SettingsError([reason]) from None
        return 0

    return run_loop(main)


def stop_with_parent() -> None:
    """
    Wait until the process that started this one has ended, then stop as for SIGTERM, and after `ORPHAN_S` at once.

    Threads: runs in one of its own; standard input is a pipe that only the parent holds open.
    """
    while os.read(0, 4096):
        continue
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_S)
    os._exit(EXIT_FAILED)
