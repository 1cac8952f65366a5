"""A clock that stands still until told otherwise, and a way to let every ready task run."""

import asyncio
import heapq
from collections.abc import Callable

MAX_TIMERS = 10_000
"""Timers of one instant; more are one that is set again and again for an instant that is over."""


class FakeTimer:
    """A callback on the fake clock."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class FakeClock:
    """Monotonic seconds under the test's control; timers run inside `advance`, in order."""

    def __init__(self, start: float = 1000.0) -> None:
        self._now = start
        self._timers: list[tuple[float, int, FakeTimer]] = []
        self._count = 0

    def now(self) -> float:
        return self._now

    def call_at(self, when: float, callback: Callable[[], None]) -> FakeTimer:
        self._count += 1
        timer = FakeTimer(callback)
        heapq.heappush(self._timers, (when, self._count, timer))
        return timer

    def advance(self, seconds: float) -> None:
        """Let time pass; run what becomes due, each at its own instant."""
        end = self._now + seconds
        at_once = 0
        while self._timers and self._timers[0][0] <= end:
            when, _, timer = heapq.heappop(self._timers)
            at_once = 0 if when > self._now else at_once + 1
            assert at_once < MAX_TIMERS, f"a timer is set for {when} again and again"
            self._now = max(self._now, when)
            callback, timer.callback = timer.callback, None
            if callback is not None:
                callback()
        self._now = end

    def pending(self) -> int:
        """Timers that will still run."""
        return sum(timer.callback is not None for _, _, timer in self._timers)


async def settle(rounds: int = 5) -> None:
    """Let every task that can run do so; a hand-over through a future takes two turns of the loop."""
    for _ in range(rounds):
        await asyncio.sleep(0)
