"""
Which messages were answered lately: the memory form of the dedupe store.

Written after the answer is published and before the request is acked.  A key that comes again with the same request is
a hit: ack it, its answer is out.  The same key with another request is a conflict: the requester reused an id.
A crash between publish and ack loses the entry and gives a second answer; `request_message_id` lets consumers drop it.
"""

from collections import OrderedDict
from dataclasses import dataclass
from enum import StrEnum

from worker.flow.clock import Now


class Dedupe(StrEnum):
    """What is known of a key."""

    MISS = "miss"
    """Nothing, or no longer."""
    HIT = "hit"
    """The same request was answered."""
    CONFLICT = "conflict"
    """Another request was answered under this key."""


@dataclass(frozen=True, slots=True)
class DedupeStatistics:
    """A store at one instant."""

    entries: int
    hits: int
    misses: int
    conflicts: int
    evicted: int
    """Entries that left for lack of room before their time: the capacity is too small for the rate."""


class MemoryDedupe:
    """
    Remembers answered messages of this process, least recently used first out.

    Args:
        capacity: Entries kept; about 200 bytes each.
        ttl_s: How long an entry is believed after its last `put`, seconds.  Longer than a redelivery takes.
        now: Monotonic seconds.
    """

    def __init__(self, capacity: int = 100_000, ttl_s: float = 3600.0, *, now: Now) -> None:
        if capacity < 1 or ttl_s <= 0:
            raise ValueError("capacity counts from 1 and ttl_s must be positive")
        self._capacity = capacity
        self._ttl_s = ttl_s
        self._now = now
        self._entries: OrderedDict[str, tuple[str, float]] = OrderedDict()
        self._hits = self._misses = self._conflicts = self._evicted = 0

    def get(self, key: str, fingerprint: str) -> Dedupe:
        """
        Say what is known of a key.

        Args:
            key: The message id, or the requester's own key.
            fingerprint: Digest of the request; two requests are the same when theirs are.
        """
        entry = self._entries.get(key)
        if entry is None or self._now() >= entry[1]:
            if entry is not None:
                del self._entries[key]
            self._misses += 1
            return Dedupe.MISS
        self._entries.move_to_end(key)
        if entry[0] != fingerprint:
            self._conflicts += 1
            return Dedupe.CONFLICT
        self._hits += 1
        return Dedupe.HIT

    def put(self, key: str, fingerprint: str) -> None:
        """Remember that the answer of this request is published; the latest fingerprint of a key stays."""
        self._entries[key] = (fingerprint, self._now() + self._ttl_s)
        self._entries.move_to_end(key)
        while len(self._entries) > self._capacity:
            _, (_, expires_at) = self._entries.popitem(last=False)
            self._evicted += self._now() < expires_at

    def statistics(self) -> DedupeStatistics:
        """Return a snapshot; entries that are out of time and not asked for since are still counted."""
        return DedupeStatistics(len(self._entries), self._hits, self._misses, self._conflicts, self._evicted)
