"""
Time in this package: monotonic seconds and one kind of timer, both passed in.

The pure parts take a `Now`, the gate takes a `Clock`: jumps of the wall clock never reach a window or a breaker.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol

Now = Callable[[], float]
"""Monotonic seconds; only differences mean something."""


class TimerHandle(Protocol):
    """A callback that has not run yet."""

    def cancel(self) -> None:
        """Prevent the callback; harmless when it has run."""


class Clock(Protocol):
    """Monotonic time with timers."""

    def now(self) -> float:
        """Return monotonic seconds."""

    def call_at(self, when: float, callback: Callable[[], None]) -> TimerHandle:
        """Run `callback` on the event loop once `now()` has reached `when`; never before this call returns."""


async def wait_for(event: asyncio.Event, seconds: float) -> None:
    """
    Wait until the event is set, or so long.

    Cancellation: leaves nothing behind.
    """
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return


class LoopClock:
    """The running event loop's clock; to be created inside the loop that uses it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.now = self._loop.time
        """Returns the loop's monotonic seconds."""

    def call_at(self, when: float, callback: Callable[[], None]) -> TimerHandle:
        """Schedule `callback`; the loop may be late, never early by more than its clock's resolution."""
        return self._loop.call_at(when, callback)
