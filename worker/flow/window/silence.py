"""
Who has not begun to answer though it should have long ago: a backend's queue, seen while it is waited in.

Only of attempts whose first byte will be reported.  It tells at once what times tell when the wait is over, and it is
no matter of how long the requests are.
"""

from itertools import takewhile

LATE = 2.0
"""Times the usual time to a first byte after which silence means waiting: prefills seldom differ by more."""

LEAST = 2
"""So many may be silent whatever their share: one long prompt is no queue."""


class Silence:
    """The attempts that have not begun to answer, in the order they started."""

    def __init__(self) -> None:
        self._since: dict[int, float] = {}

    def __bool__(self) -> bool:
        return bool(self._since)

    def begin(self, number: int, now: float) -> None:
        """An attempt was started."""
        self._since[number] = now

    def end(self, number: int) -> None:
        """It has begun to answer, or is over; harmless for one that is not known."""
        self._since.pop(number, None)

    def share(self, now: float, usual_s: float, in_flight: int) -> float:
        """Return how much of what is under way has been silent for too long; 0 for a few."""
        since = now - LATE * usual_s
        late = sum(1 for _ in takewhile(lambda started_at: started_at < since, self._since.values()))
        return late / in_flight if late > LEAST and in_flight > 0 else 0.0
