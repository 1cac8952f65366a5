"""The engine's only knowledge of time: one clock for deadlines, one for publish times, and a way to skip ahead."""

import time
from collections.abc import Callable

NS_PER_S = 1_000_000_000
_NS_PER_US = 1_000


class Clock:
    """
    Two clocks that can be moved forward together.

    Args:
        monotonic: Seconds from any origin, never backwards; ends of leases and backoffs.
        wall: Seconds since the Unix epoch; publish times, retention, seek.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self._monotonic = monotonic
        self._wall = wall
        self._ahead_s = 0.0

    def now(self) -> float:
        """Return the monotonic time in seconds."""
        return self._monotonic() + self._ahead_s

    def now_ns(self) -> int:
        """Return the wall time in nanoseconds since the epoch, in whole microseconds as the service gives them."""
        return int((self._wall() + self._ahead_s) * 1_000_000) * _NS_PER_US

    def advance(self, seconds: float) -> None:
        """
        Move both clocks ahead for good, so that a test need not wait for a lease to end.

        Args:
            seconds: At least 0.
        """
        if seconds < 0:
            raise ValueError(f"time does not run backwards: {seconds}")
        self._ahead_s += seconds
