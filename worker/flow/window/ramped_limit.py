"""
A limit that takes effect over time.

The rule decides on a limit; what may start at an instant is less while the limit *ramps up* after growth, while it
*probes down* to see response times without a queue, and while a pause keeps the window *closed*.  Because of the ramp,
the first refusal arrives before the other new requests have started, and a window that opens causes no burst.
"""

from worker.flow.clock import Now


class RampedLimit:
    """
    How many requests may run at once now.

    Args:
        limit: The first limit.
        minimum: The limit never falls below it; at least 1.
        maximum: The limit never rises above it.
        now: Monotonic seconds.
    """

    def __init__(self, limit: int, minimum: int, maximum: int, *, now: Now) -> None:
        if not 1 <= minimum <= limit <= maximum:
            raise ValueError(f"need 1 <= minimum <= initial <= maximum, not {minimum}, {limit}, {maximum}")
        self._now = now
        self._minimum, self._maximum = minimum, maximum
        self.target = float(limit)
        """The limit decided on, between `minimum` and `maximum`; not always a whole number."""
        self._probe_depth = 0.0
        self._after_ramp = limit
        self._closed_until = 0.0
        # When the ramp begins, how many seconds it takes, and the limit at its start.
        self._ramp: tuple[float, float, float] | None = None

    @property
    def minimum(self) -> int:
        """Lower bound of the limit."""
        return self._minimum

    @property
    def maximum(self) -> int:
        """Upper bound of the limit."""
        return self._maximum

    @property
    def is_probing_down(self) -> bool:
        """Whether the limit is lowered for a measurement."""
        return self._probe_depth > 0.0

    @property
    def closed_until(self) -> float | None:
        """When the pause ends; `None` while there is none."""
        return self._closed_until if self._closed_until > 0.0 and self._closed_until > self._now() else None

    def after_ramp(self) -> int:
        """Return the limit as it will be at the end of the ramp."""
        return self._after_ramp

    def current(self) -> int:
        """Return the limit as it is now."""
        if self._ramp is None:
            return self._after_ramp
        began_at, seconds, start = self._ramp
        passed = self._now() - began_at
        if passed >= seconds:
            self._ramp = None
            return self._after_ramp
        reached = start + (self.target - start) * max(passed, 0.0) / seconds
        return max(self._minimum, int(reached - self._probe_depth))

    def has_room(self, in_flight: int) -> bool:
        """Whether one more request may start beside `in_flight` others."""
        return in_flight < self.current() and self.closed_until is None

    def opens_at(self, in_flight: int) -> float | None:
        """
        Return the instant from which one more request may start because time has passed.

        `None` when one may start now, or when only the end of another request makes room.
        """
        if self.closed_until is not None:
            return self.closed_until
        if self._ramp is None or in_flight < self.current() or in_flight >= self.after_ramp():
            return None
        began_at, seconds, start = self._ramp
        share = (in_flight + 1 + self._probe_depth - start) / (self.target - start)
        # A little later than computed, because `current` rounds down to a whole number.
        return began_at + seconds * min(share, 1.0) + 1e-6

    def set(self, limit: float) -> None:
        """Change the limit at once, within the bounds."""
        self.target = min(max(limit, float(self._minimum)), float(self._maximum))
        self._ramp = None
        self._round_down()

    def grow(self, limit: float, seconds: float) -> bool:
        """Raise the limit within the bounds, over so many seconds; return whether that makes room."""
        before = self.current()
        self.set(limit)
        self.ramp_up(before, seconds)
        return self.after_ramp() > before

    def ramp_up(self, start: float, seconds: float) -> None:
        """Let the limit rise from `start` to its target over so many seconds, beginning when no pause is left."""
        if seconds > 0.0 and start < self.target:
            self._ramp = (max(self._now(), self._closed_until), seconds, start)

    def probe_down(self, depth: float) -> None:
        """Hold the limit this much below its target; 0 ends that."""
        self._probe_depth = depth
        self._round_down()

    def close(self, until: float) -> None:
        """Allow no start before an instant; the later of two instants counts."""
        self._closed_until = max(self._closed_until, until)

    def end_pause(self) -> None:
        """Allow starts again at once."""
        self._closed_until = 0.0

    def _round_down(self) -> None:
        self._after_ramp = max(self._minimum, int(self.target - self._probe_depth))
