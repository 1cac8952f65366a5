"""
Which of the waiting requests is next on one route.

Held messages (attempted before) come before new ones, then larger priority, earlier deadline, earlier publish time,
earlier arrival.  One admission in `aging_every` goes to the request that has waited longest instead, so that neither a
low priority nor a missing deadline makes a request wait for ever: with n older requests, it waits for at most
`aging_every * (n + 1)` admissions.  A share was chosen rather than a rate of ageing because it needs no notion of how
long is long: a second is many admissions of embeddings and none of a chat.

A waiter is *ready*, *delayed* until a caller says otherwise, or *parked* while the circuit of its model is open.
"""

import asyncio
import heapq
import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
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
    """It was attempted before and is held: goes before every new one."""


class WaiterState(Enum):
    """Whether a waiter may be next."""

    READY = "ready"
    """Yes."""
    DELAYED = "delayed"
    """Not until `WaitQueue.make_ready` or `WaitQueue.release`."""
    PARKED = "parked"
    """Not while the circuit of its model is open."""
    GONE = "gone"
    """It is in no queue."""


@dataclass(slots=True, eq=False)
class Waiter:
    """One caller that waits."""

    order: AdmissionOrder
    model: str | None
    future: "asyncio.Future[Any]"
    """Gets the permit, or the reason why there is none."""
    streamed: bool = False
    state: WaiterState = WaiterState.GONE
    arrival: int = 0
    claim: tuple[float, ...] = ()
    """What the waiters are sorted by; smaller is sooner."""


class WaitQueue:
    """
    The callers that wait for one route.

    Args:
        aging_every: See the module; 0 for strict order.
    """

    def __init__(self, *, aging_every: int = 8) -> None:
        if aging_every < 0:
            raise ValueError("aging_every must not be negative")
        self._aging_every = aging_every
        self._admissions = 0
        self._arrivals = 0
        self._held = 0
        self._waiters: OrderedDict[int, Waiter] = OrderedDict()  # by arrival
        # A heap of the ready ones.  An entry stays when its waiter leaves otherwise, and is skipped when it is reached.
        self._by_claim: list[tuple[tuple[float, ...], Waiter]] = []
        self._parked: dict[str, dict[int, Waiter]] = {}  # by model and arrival

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
        order = waiter.order
        deadline = math.inf if order.deadline is None else order.deadline
        waiter.claim = (not order.held, -order.priority, deadline, order.publish_time, waiter.arrival)
        self._waiters[waiter.arrival] = waiter
        self._held += order.held
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
        if waiter.state is WaiterState.PARKED:
            self._unpark(waiter)
        waiter.state = WaiterState.GONE
        del self._waiters[waiter.arrival]
        self._held -= waiter.order.held

    def pop(self, breaker: Breaker) -> Waiter | None:
        """Remove and return the next ready waiter whose model's circuit allows an attempt; park those before it."""
        for waiter in self._candidates():
            if breaker.allows_model(waiter.model):
                self._admissions += 1
                self.discard(waiter)
                return waiter
            assert waiter.model is not None
            waiter.state = WaiterState.PARKED
            self._parked.setdefault(waiter.model, {})[waiter.arrival] = waiter
        return None

    def unpark(self, breaker: Breaker) -> None:
        """Make parked waiters ready: all of a model whose circuit is closed, the next one of a model to be probed."""
        for model in [each for each in self._parked if breaker.allows_model(each)]:
            parked = list(self._parked[model].values())
            is_closed = breaker.model_changes_at(model) is None
            for waiter in parked if is_closed else [min(parked, key=lambda each: each.claim)]:
                self._unpark(waiter)
                self._push(waiter)

    def release(self) -> None:
        """Make every delayed and every parked waiter ready."""
        self._parked.clear()
        for waiter in self._waiters.values():
            if waiter.state is not WaiterState.READY:
                self._push(waiter)

    def drain(self) -> Iterator[Waiter]:
        """Remove and yield every waiter, in the order of arrival."""
        for waiter in list(self._waiters.values()):
            self.discard(waiter)
            yield waiter

    def next_unpark_at(self, now: float, breaker: Breaker) -> float | None:
        """Return the next instant after `now` at which a parked waiter may become ready; `None` when there is none."""
        instants = (breaker.model_changes_at(model) for model in self._parked)
        return min((each for each in instants if each is not None and each > now), default=None)

    def _candidates(self) -> Iterator[Waiter]:
        """Yield ready waiters in the order in which they are next; each has left the heap or stays ready."""
        if self._aging_every and (self._admissions + 1) % self._aging_every == 0:
            yield from (each for each in self._waiters.values() if each.state is WaiterState.READY)
            return
        while self._by_claim:
            waiter = heapq.heappop(self._by_claim)[1]
            if waiter.state is WaiterState.READY:
                yield waiter

    def _push(self, waiter: Waiter) -> None:
        if len(self._by_claim) > 64 + 2 * len(self._waiters):  # most entries are those of waiters that have left
            self._by_claim = [(e.claim, e) for e in self._waiters.values() if e.state is WaiterState.READY]
            heapq.heapify(self._by_claim)
        waiter.state = WaiterState.READY
        heapq.heappush(self._by_claim, (waiter.claim, waiter))

    def _unpark(self, waiter: Waiter) -> None:
        assert waiter.model is not None
        parked = self._parked[waiter.model]
        del parked[waiter.arrival]
        if not parked:
            del self._parked[waiter.model]
