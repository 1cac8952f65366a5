"""
An event loop whose time does not pass but jumps: waits of hours take no time, in the order they would have.

Whenever every task waits, the loop moves its clock to the next timer.  When every task waits and there is no timer
either, nothing will ever happen again, and the test fails instead of hanging: a wait without an end is found at once.
So is a loop that goes on turning although no time passes, as with a timer that is set again for an instant that is over.
Only for code that stays on its loop; a thread's answer would come after the jump.
"""

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any

EPOCH = 1_700_000_000.0
"""Unix seconds at which virtual time begins."""


class DeadlockError(AssertionError):
    """Every task waits for another."""


class SpinError(AssertionError):
    """The loop turns for ever at one instant."""


MAX_TURNS = 100_000
"""Turns of the loop at one instant; a test of ten thousand tasks takes some hundreds."""


class _Selector(selectors.DefaultSelector):
    """Reports what is ready and never waits; what it would have waited is added to the loop's time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self._turns = 0

    def select(self, timeout: float | None = None) -> Any:
        self._turns = 0 if timeout else self._turns + 1
        if self._turns > MAX_TURNS:
            raise SpinError(f"{MAX_TURNS} turns of the loop at {self.now} s: something is done again and again at once")
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise DeadlockError("every task waits and no timer is set: this wait has no end")
            self.now += max(0.0, timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """See the module."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


def loop_time() -> float:
    """Monotonic seconds of the running loop, for everything that takes a clock."""
    return asyncio.get_running_loop().time()


def unix_time() -> float:
    """Unix seconds of the running loop."""
    return EPOCH + loop_time()


async def settle(rounds: int = 20) -> None:
    """Let everything run that can run without time passing."""
    for _ in range(rounds):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object], step_s: float = 1.0) -> None:
    """Let time pass until something holds."""
    while not condition():  # noqa: ASYNC110 - virtual time passes at once
        await asyncio.sleep(step_s)


def virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test on virtual time; a task that is left over fails it."""

    async def main(*args: Any, **kwargs: Any) -> None:
        await test(*args, **kwargs)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks left over: {left}"

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(main(*args, **kwargs))

    return run
