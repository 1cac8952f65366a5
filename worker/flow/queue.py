"""
Who is next among those who wait for one route.

Held messages (tried before) come before new ones, then larger priority, earlier deadline, earlier publish time, earlier
arrival.  One admission in `aging_every` goes to whoever has waited longest instead, so that neither a low priority nor
a message without a deadline waits for ever: with n older waiters, at most `aging_every * (n + 1)` admissions.  A share
was chosen over a rate of ageing because it needs no notion of how long is long: a second is many admissions of
embeddings and none of a chat.

A waiter is *ready*, *delayed* (not before an instant) or *parked* (its model's circuit is open).  All are kept in heaps
with lazy deletion, so every operation is O(log n) amortised.
"""

import asyncio
import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from worker.flow.breaker import Breaker


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionOrder:
    """A message's claim to be next."""

    priority: int = 0
    """Larger is sooner."""
    deadline: float | None = None
    """Any clock, the same for all; `None` comes after every deadline."""
    publish_time: float = 0.0
    """Any clock, the same for all."""
    held: bool = False
    """It was tried before and is held: goes before every new one."""


class Place(Enum):
    """Where a waiter stands."""

    READY = "ready"
    DELAYED = "delayed"
    PARKED = "parked"
    GONE = "gone"


@dataclass(slots=True, eq=False)
class Waiter:
    """One caller that waits."""

    order: AdmissionOrder
    model: str | None
    future: "asyncio.Future[Any]"
    """Gets the permit, or the reason why there is none."""
    ready_at: float
    give_up_at: float | None
    streamed: bool = False
    place: Place = Place.GONE
    arrival: int = 0
    claim: tuple[float, ...] = field(default=())


class _Heap:
    """A heap of waiters whose dead entries are skipped when met and swept when they are the majority."""

    __slots__ = ("_entries", "_places", "_pushes")

    def __init__(self, *places: Place) -> None:
        self._places = places
        self._entries: list[tuple[tuple[float, ...], int, Waiter]] = []
        self._pushes = 0

    def push(self, key: tuple[float, ...], waiter: Waiter, live: int) -> None:
        if len(self._entries) > 64 + 4 * live:
            self._entries = [entry for entry in self._entries if entry[2].place in self._places]
            heapq.heapify(self._entries)
        self._pushes += 1
        heapq.heappush(self._entries, (key, self._pushes, waiter))

    def first(self) -> tuple[tuple[float, ...], Waiter] | None:
        """Return the first live entry's key and waiter, and leave it."""
        while self._entries and self._entries[0][2].place not in self._places:
            heapq.heappop(self._entries)
        return (self._entries[0][0], self._entries[0][2]) if self._entries else None

    def pop(self) -> Waiter | None:
        """Take the first live waiter out."""
        first = self.first()
        if first is None:
            return None
        heapq.heappop(self._entries)
        return first[1]

    def __iter__(self) -> Iterator[Waiter]:
        """Iterate over the live waiters, in no order, each possibly more than once."""
        return (waiter for _, _, waiter in list(self._entries) if waiter.place in self._places)


class WaitQueue:
    """
    Everyone who waits for one route.

    Args:
        aging_every: See the module; 0 for strict order.
    """

    def __init__(self, *, aging_every: int = 8) -> None:
        if aging_every < 0:
            raise ValueError("aging_every must not be negative")
        self._aging_every = aging_every
        self._popped = 0
        self._arrivals = 0
        self._live = 0
        self._held = 0
        self._by_claim = _Heap(Place.READY)
        self._by_age = _Heap(Place.READY)
        self._delayed = _Heap(Place.DELAYED)
        self._patience = _Heap(Place.READY, Place.DELAYED, Place.PARKED)
        self._parked: dict[str, _Heap] = {}

    def __len__(self) -> int:
        return self._live

    @property
    def held(self) -> int:
        """Waiters whose message was tried before."""
        return self._held

    def add(self, waiter: Waiter, now: float) -> None:
        """Let a waiter in; it is counted from now on."""
        self._arrivals += 1
        waiter.arrival = self._arrivals
        order = waiter.order
        deadline = math.inf if order.deadline is None else order.deadline
        waiter.claim = (not order.held, -order.priority, deadline, order.publish_time, waiter.arrival)
        self._live += 1
        self._held += order.held
        if waiter.ready_at > now:
            waiter.place = Place.DELAYED
            self._delayed.push((waiter.ready_at,), waiter, self._live)
        else:
            self._make_ready(waiter)
        if waiter.give_up_at is not None:
            self._patience.push((waiter.give_up_at,), waiter, self._live)

    def passed(self) -> None:
        """Count an admission that found nobody waiting, as if it had waited."""
        self._popped += 1

    def discard(self, waiter: Waiter) -> None:
        """Forget a waiter, wherever it stands; harmless when it has left."""
        if waiter.place is not Place.GONE:
            waiter.place = Place.GONE
            self._live -= 1
            self._held -= waiter.order.held

    def pop(self, breaker: Breaker) -> Waiter | None:
        """Take out whoever is next and may start as far as its model is concerned; `None` when nobody is."""
        while True:
            aged = self._aging_every > 0 and (self._popped + 1) % self._aging_every == 0
            waiter = (self._by_age if aged else self._by_claim).pop()
            if waiter is None:
                return None
            if breaker.allows_model(waiter.model):
                self._popped += 1
                self.discard(waiter)
                return waiter
            assert waiter.model is not None
            waiter.place = Place.PARKED
            parked = self._parked.setdefault(waiter.model, _Heap(Place.PARKED))
            parked.push(waiter.claim, waiter, self._live)

    def expired(self, now: float) -> Iterator[Waiter]:
        """Take out everyone whose patience is over."""
        while (first := self._patience.first()) is not None and first[0][0] <= now:
            self.discard(first[1])
            yield first[1]

    def ripen(self, now: float, breaker: Breaker) -> None:
        """Make ready what is delayed no longer; of a model that may be probed, its first waiter."""
        while (first := self._delayed.first()) is not None and first[0][0] <= now:
            self._make_ready(first[1])
        for model in [name for name in self._parked if breaker.allows_model(name)]:
            self._unpark(model, everyone=breaker.model_changes_at(model) is None)

    def release(self, model: str | None) -> None:
        """Make everyone ready whom a delay or an open circuit kept back; of one model, or of all."""
        for waiter in self._delayed:
            if model is None or waiter.model == model:
                self._make_ready(waiter)
        for name in list(self._parked):
            if model is None or name == model:
                self._unpark(name, everyone=True)

    def drain(self) -> Iterator[Waiter]:
        """Take out everyone, in no order."""
        for heap in (self._by_claim, self._delayed, *self._parked.values()):
            for waiter in heap:
                self.discard(waiter)
                yield waiter

    def next_instant(self, now: float, breaker: Breaker) -> float | None:
        """
        Return when a delay, a patience or a model's wait is over next; `None` when nothing here ends by itself.

        To be asked after `expired` and `ripen`, so that everything of the past has been dealt with.
        """
        instants = [first[0][0] for heap in (self._delayed, self._patience) if (first := heap.first()) is not None]
        for name, parked in self._parked.items():
            changes_at = breaker.model_changes_at(name)
            if changes_at is not None and changes_at > now and parked.first() is not None:
                instants.append(changes_at)
        return min(instants, default=None)

    def _make_ready(self, waiter: Waiter) -> None:
        waiter.place = Place.READY
        self._by_claim.push(waiter.claim, waiter, self._live)
        self._by_age.push((waiter.arrival,), waiter, self._live)

    def _unpark(self, model: str, *, everyone: bool) -> None:
        parked = self._parked[model]
        while (waiter := parked.pop()) is not None:
            self._make_ready(waiter)
            if not everyone:
                break
        if parked.first() is None:
            del self._parked[model]
