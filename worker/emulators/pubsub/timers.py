"""
When the next lease or backoff ends: a heap that forgives.

Extending a lease must cost nothing, since clients extend every lease they receive.  So a delivery has at most one live
entry in the heap, and the entry may be earlier than the truth (`Delivery.due_at`): when it comes up too early it is put
back at the right time.  Entries of settled deliveries stay behind and are swept out once they outnumber the live ones,
so memory follows the leases in being, not the messages that passed.
"""

import heapq
import math

from worker.emulators.pubsub.deliveries import Delivery

_SWEEP_SLACK = 64
"""Stale entries allowed beside the live ones; below it a sweep would cost more than it frees."""


class Timers:
    """The pending ends of one subscription's leases and backoffs; all methods are amortised O(log n)."""

    def __init__(self) -> None:
        # Time, message sequence (ends at the same moment come in publish order), entry id, delivery.
        self._heap: list[tuple[float, int, int, Delivery]] = []
        self._ids = 0
        self._armed = 0

    def __len__(self) -> int:
        """Return the number of entries, stale ones included."""
        return len(self._heap)

    def arm(self, delivery: Delivery, at: float) -> None:
        """Set or move the delivery's end to clock time `at`."""
        if delivery.due_at == math.inf:
            self._armed += 1
        delivery.due_at = at
        if delivery.timer_at > at:
            self._push(delivery, at)

    def disarm(self, delivery: Delivery) -> None:
        """Forget the delivery's end."""
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
        """Put back a popped entry that came too early; let a stale or disarmed one go."""
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
