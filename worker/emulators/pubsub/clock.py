"""
Time in the engine: a clock that tests can move forward, and the ends of the running leases and backoffs.

Nothing else in the engine reads a clock or plans for a later time.
"""

import heapq
import math
import time
from collections.abc import Callable

from worker.emulators.pubsub.deliveries import Delivery

NS_PER_S = 1_000_000_000
_NS_PER_US = 1_000

_SWEEP_SLACK = 64
"""Stale entries allowed beside the live ones; a sweep of fewer would cost more than it frees."""


class Clock:
    """
    A monotonic clock and a wall clock, which can be moved forward together.

    Args:
        monotonic: Seconds from any origin, for leases and backoffs.
        wall: Seconds since the Unix epoch, for publish times, retention and seek.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self._monotonic = monotonic
        self._wall = wall
        self._ahead_s = 0.0

    def now(self) -> float:
        """Return the monotonic time in seconds."""
        return self._monotonic() + self._ahead_s

    def now_ns(self) -> int:
        """Return the wall time in nanoseconds since the epoch, rounded down to microseconds as the service does."""
        return int((self._wall() + self._ahead_s) * 1_000_000) * _NS_PER_US

    def advance(self, seconds: float) -> None:
        """
        Move both clocks forward permanently, so that a test need not wait for a lease to end.

        Args:
            seconds: At least 0.
        """
        if seconds < 0:
            raise ValueError(f"the clock cannot be moved backwards: {seconds} s")
        self._ahead_s += seconds


class Timers:
    """
    When the leases and backoffs of one subscription end: a heap with lazy updates.

    Clients extend every lease they receive, so extending must cost nothing.  A delivery has at most one live entry in
    the heap, and that entry may be earlier than the real end (`Delivery.due_at`); when it reaches the top it is pushed
    again with the real end.  Entries of settled deliveries stay in the heap until they outnumber the live ones and are
    swept out, so that memory follows the running leases and not the number of messages that passed.

    All methods are amortised O(log n).
    """

    def __init__(self) -> None:
        # Time, message sequence (ends at the same moment come in publish order), entry id, delivery.
        self._heap: list[tuple[float, int, int, Delivery]] = []
        self._ids = 0
        self._armed = 0

    def __len__(self) -> int:
        """Return the number of entries, stale ones included."""
        return len(self._heap)

    def arm(self, delivery: Delivery, at: float) -> None:
        """Set or move the end of the delivery's lease or backoff to clock time `at`."""
        if delivery.due_at == math.inf:
            self._armed += 1
        delivery.due_at = at
        if delivery.timer_at > at:
            self._push(delivery, at)

    def disarm(self, delivery: Delivery) -> None:
        """Cancel the end of the delivery's lease or backoff."""
        if delivery.due_at == math.inf:
            return
        delivery.due_at = math.inf
        self._armed -= 1
        if len(self._heap) > 2 * self._armed + _SWEEP_SLACK:
            self._sweep()

    def next_due(self) -> float:
        """Return the clock time of the earliest end, or infinity."""
        heap = self._heap
        while heap:
            at, _, entry_id, delivery = heap[0]
            if entry_id == delivery.timer_id and delivery.due_at == at:
                return at
            self._refresh(heapq.heappop(heap))
        return math.inf

    def pop_due(self, now: float) -> tuple[float, Delivery] | None:
        """Disarm and return the delivery with the earliest end at or before `now`, with that end; or `None`."""
        if self.next_due() > now:
            return None
        at, _, _, delivery = heapq.heappop(self._heap)
        delivery.timer_at = delivery.due_at = math.inf
        self._armed -= 1
        return at, delivery

    def _push(self, delivery: Delivery, at: float) -> None:
        self._ids += 1
        delivery.timer_at = at
        delivery.timer_id = self._ids
        heapq.heappush(self._heap, (at, delivery.message.sequence, self._ids, delivery))

    def _refresh(self, entry: tuple[float, int, int, Delivery]) -> None:
        """Push a popped entry again if its delivery's end moved later; discard a stale or disarmed entry."""
        _, _, entry_id, delivery = entry
        if entry_id != delivery.timer_id:
            return
        delivery.timer_at = math.inf
        if delivery.due_at != math.inf:
            self._push(delivery, delivery.due_at)

    def _sweep(self) -> None:
        """Rebuild the heap with one entry for each armed delivery."""
        entries = self._heap
        self._heap = []
        for _, _, entry_id, delivery in entries:
            if entry_id != delivery.timer_id:
                continue
            delivery.timer_at = math.inf
            if delivery.due_at != math.inf:
                self._push(delivery, delivery.due_at)
