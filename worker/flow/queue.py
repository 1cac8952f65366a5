"""
Which of the waiting requests of one lane is next.

Messages that failed here come behind those that did not, one step for each failure, so that what always fails keeps no
other message waiting.  Then come larger priority, earlier deadline, earlier publish time, earlier arrival.  One
admission in `aging_every` goes to the request that has waited longest instead, so that neither failures nor a low
priority nor a missing deadline make a request wait for ever: with n older requests, it waits for at most
`aging_every * (n + 1)` admissions.  A share was chosen rather than a rate of ageing because it needs no notion of how
long is long: a second is many admissions of embeddings and none of a chat.

The probe of a stopped lane is another message than the one that failed last, a fresh one where there is one, chosen at
random: where messages that fail stand in a block, the first of the queue would be one of them again and again.

A waiter is *ready*, or *delayed* until a caller says otherwise.
"""

import asyncio
import heapq
import math
import random
from collections import OrderedDict
from collections.abc import Iterator
from enum import Enum
from typing import Any

import msgspec


class AdmissionOrder(msgspec.Struct, frozen=True, kw_only=True):
    """A message's claim to be next."""

    deadline: float | None = None
    """Any clock, the same for all; `None` comes after every deadline."""
    priority: int = 0
    """Larger is sooner, among those with the same deadline or none."""
    publish_time: float = 0.0
    """Any clock, the same for all."""
    held: bool = False
    """It was attempted before and is held; counted, and no claim."""


class WaiterState(Enum):
    """Whether a waiter may be next."""

    READY = "ready"
    """Yes."""
    DELAYED = "delayed"
    """Not until `WaitQueue.make_ready` or `WaitQueue.release`."""
    GONE = "gone"
    """It is in no queue."""


class Waiter(msgspec.Struct, eq=False):
    """One caller that waits."""

    order: AdmissionOrder
    future: "asyncio.Future[Any]"
    """Gets the permit, or `None`: it has waited too long, or the gate was closed."""
    key: str | None = None
    """The message; `None`: not known."""
    rank: int = 0
    """How far it stands behind fresh messages."""
    streamed: bool = False
    is_moved: bool = False
    """It got no permit because it is to wait elsewhere."""
    state: WaiterState = WaiterState.GONE
    arrival: int = 0
    claim: tuple[float, ...] = ()
    """What the waiters are sorted by; smaller is sooner."""


class WaitQueue:
    """
    The callers that wait for one lane.

    Args:
        aging_every: See the module; 0 for strict order.
        rng: Chooses probes.
    """

    def __init__(self, *, aging_every: int = 8, rng: random.Random | None = None) -> None:
        if aging_every < 0:
            raise ValueError("aging_every must not be negative")
        self._aging_every = aging_every
        self._rng = rng or random.Random()  # noqa: S311 - no secret
        self._admissions = 0
        self._arrivals = 0
        self._held = 0
        self._waiters: OrderedDict[int, Waiter] = OrderedDict()  # by arrival
        # A heap of the ready ones.  An entry stays when its waiter leaves otherwise, and is skipped when it is reached.
        self._by_claim: list[tuple[tuple[float, ...], Waiter]] = []

    def __len__(self) -> int:
        return len(self._waiters)

    @property
    def held(self) -> int:
        """Waiters whose message was attempted before."""
        return self._held

    def add(self, waiter: Waiter, *, is_delayed: bool) -> None:
        """Add a waiter, ready or delayed."""
        self._arrivals += 1
        waiter.arrival = self._arrivals
        waiter.claim = _claim(waiter)
        self._waiters[waiter.arrival] = waiter
        self._held += waiter.order.held
        if is_delayed:
            waiter.state = WaiterState.DELAYED
        else:
            self._push(waiter)

    def count_admission(self) -> None:
        """Count an admission without waiting, so that ageing has the same rhythm."""
        self._admissions += 1

    def make_ready(self, waiter: Waiter) -> None:
        """End the delay of a waiter; harmless when that is over or the waiter has left."""
        if waiter.state is WaiterState.DELAYED:
            self._push(waiter)

    def discard(self, waiter: Waiter) -> None:
        """Remove a waiter, whatever its state; harmless when it has left."""
        if waiter.state is WaiterState.GONE:
            return
        waiter.state = WaiterState.GONE
        del self._waiters[waiter.arrival]
        self._held -= waiter.order.held

    def pop(self) -> Waiter | None:
        """Remove and return the next ready waiter; `None` when none is ready."""
        waiter = self._longest_waiting() if self._is_aging() else self._first()
        if waiter is not None:
            self._admissions += 1
            self.discard(waiter)
        return waiter

    def pop_probe(self, last_failed: str | None, *, newest: bool) -> Waiter | None:
        """
        Remove and return the ready waiter that is the best probe; `None` when none is ready.

        Args:
            last_failed: The message that failed last.
            newest: Of the best take the newest, and none at random: messages that fail often came together, so that
                one is the least like them.
        """
        ready = [each for each in self._waiters.values() if each.state is WaiterState.READY]
        others = [each for each in ready if last_failed is None or each.key != last_failed] or ready
        if not others:
            return None
        freshest = min(each.rank for each in others)
        best = [each for each in others if each.rank == freshest]
        waiter = best[-1] if newest else self._rng.choice(best)
        self._admissions += 1
        self.discard(waiter)
        return waiter

    def has_ready(self) -> bool:
        """Whether a waiter is ready."""
        return self._first(keep=True) is not None

    def release(self) -> None:
        """Make every waiter ready: the lane works again."""
        for waiter in self._waiters.values():
            self.make_ready(waiter)

    def forgive(self) -> None:
        """Let none stand behind another for its failures."""
        self._by_claim.clear()
        for waiter in self._waiters.values():
            waiter.rank = 0
            waiter.claim = _claim(waiter)
            if waiter.state is WaiterState.READY:
                self._push(waiter)

    def drain(self) -> Iterator[Waiter]:
        """Remove and yield every waiter, in the order of arrival."""
        for waiter in list(self._waiters.values()):
            self.discard(waiter)
            yield waiter

    def _is_aging(self) -> bool:
        return self._aging_every > 0 and (self._admissions + 1) % self._aging_every == 0

    def _longest_waiting(self) -> Waiter | None:
        return next((each for each in self._waiters.values() if each.state is WaiterState.READY), None)

    def _first(self, *, keep: bool = False) -> Waiter | None:
        """Return the ready waiter with the best claim and take its entry off the heap, unless it is to be kept."""
        while self._by_claim:
            waiter = self._by_claim[0][1]
            is_ready = waiter.state is WaiterState.READY
            if is_ready and keep:
                return waiter
            heapq.heappop(self._by_claim)
            if is_ready:
                return waiter
        return None

    def _push(self, waiter: Waiter) -> None:
        if len(self._by_claim) > 64 + 2 * len(self._waiters):  # most entries are those of waiters that have left
            self._by_claim = [(e.claim, e) for e in self._waiters.values() if e.state is WaiterState.READY]
            heapq.heapify(self._by_claim)
        waiter.state = WaiterState.READY
        heapq.heappush(self._by_claim, (waiter.claim, waiter))


def _claim(waiter: Waiter) -> tuple[float, ...]:
    order = waiter.order
    deadline = math.inf if order.deadline is None else order.deadline
    return (waiter.rank, deadline, -order.priority, order.publish_time, waiter.arrival)
