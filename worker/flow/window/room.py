"""
How much room there is now: the limit as it takes effect in time.

The rule decides on a limit; what may start at an instant is less while growth is *poured out*, during a *dip* and while
a Retry-After keeps the window *closed*.  Pouring lets the first refusal come back before the rest has started, and is
why a gate that opens causes no stampede.
"""

from worker.flow.clock import Now


class Room:
    """
    A limit that takes effect little by little.

    Args:
        limit: Where it starts.
        minimum: It never falls below.
        maximum: It never rises above.
        now: Monotonic seconds.
    """

    def __init__(self, limit: int, minimum: int, maximum: int, *, now: Now) -> None:
        if not 1 <= minimum <= limit <= maximum:
            raise ValueError(f"need 1 <= minimum <= initial <= maximum, not {minimum}, {limit}, {maximum}")
        self._now = now
        self._minimum, self._maximum = minimum, maximum
        self._limit = float(limit)
        self._dip = 0.0
        self._closed_until = 0.0
        # When the pouring begins, how long it takes, and the limit it starts from.
        self._pour: tuple[float, float, float] | None = None

    @property
    def limit(self) -> float:
        """The limit decided on, between `minimum` and `maximum`."""
        return self._limit

    @property
    def minimum(self) -> int:
        """Lower bound of the limit."""
        return self._minimum

    @property
    def maximum(self) -> int:
        """Upper bound of the limit."""
        return self._maximum

    @property
    def dipped(self) -> bool:
        """Whether a dip is under way."""
        return self._dip > 0.0

    @property
    def closed_until(self) -> float | None:
        """When a Retry-After is over; `None` while none is pending."""
        return self._closed_until if self._closed_until > self._now() else None

    def final(self) -> int:
        """Return the limit as it is when everything is poured out."""
        return max(self._minimum, int(self._limit - self._dip))

    def current(self) -> int:
        """Return the limit as it is now."""
        if self._pour is None:
            return self.final()
        began_at, seconds, start = self._pour
        passed = self._now() - began_at
        if passed >= seconds:
            self._pour = None
            return self.final()
        poured = start + (self._limit - start) * max(passed, 0.0) / seconds
        return max(self._minimum, int(poured - self._dip))

    def has_room(self, in_flight: int) -> bool:
        """Whether one more may start beside these."""
        return in_flight < self.current() and self.closed_until is None

    def opens_at(self, in_flight: int) -> float | None:
        """Return when there is room beside these by the passing of time alone; `None` if there is, or never."""
        if self.closed_until is not None:
            return self.closed_until
        if self._pour is None or in_flight < self.current() or in_flight >= self.final():
            return None
        began_at, seconds, start = self._pour
        share = (in_flight + 1 + self._dip - start) / (self._limit - start)
        # A little later than computed, for the limit is cut to a whole number.
        return began_at + seconds * min(share, 1.0) + 1e-6

    def set(self, limit: float) -> None:
        """Change the limit at once, within the bounds."""
        self._limit = min(max(limit, float(self._minimum)), float(self._maximum))
        self._pour = None

    def grow(self, limit: float, seconds: float) -> bool:
        """Raise the limit within the bounds and pour the difference out; return whether there is one."""
        before = self.current()
        self.set(limit)
        self.pour(before, seconds)
        return self.final() > before

    def pour(self, start: float, seconds: float) -> None:
        """Let the limit take effect from `start` on over some time, beginning when the window is open."""
        if seconds > 0.0 and start < self._limit:
            self._pour = (max(self._now(), self._closed_until), seconds, start)

    def dip(self, depth: float) -> None:
        """Keep the room this much below the limit; 0 ends it."""
        self._dip = depth

    def close(self, until: float) -> None:
        """Give no room before an instant; the later of two wins."""
        self._closed_until = max(self._closed_until, until)

    def set_bounds(self, minimum: int, maximum: int) -> None:
        """Change the bounds and move the limit between them."""
        if not 1 <= minimum <= maximum:
            raise ValueError(f"need 1 <= minimum <= maximum, not {minimum}, {maximum}")
        self._minimum, self._maximum = minimum, maximum
        self.set(self._limit)
