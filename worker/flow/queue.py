"""
Which of the waiting requests of one lane is next.

Requests belong to *shares*: of one subscription, of one tenant, or of both; without either there is one share.

* A share of a lower level comes before all of a higher one.
* Shares of the same level get the window in proportion to their weights: each start is charged with one mean answer,
  corrected by what the answer took when it ends, and the share that has been charged least for its weight is next.
  What a share does not use the others get; it cannot save it up.

Within a share, messages that failed here come behind those that did not, one step for each failure, so that what always
fails keeps no other message waiting.  Then come earlier deadline, larger priority, earlier publish time, earlier
arrival.  One admission in `aging_every` goes to the request that has waited longest instead, so that neither failures
nor a low priority nor a missing deadline make a request wait for ever: with n older requests, it waits for at most
`aging_every * (n + 1)` admissions of its share.  A share of admissions was chosen rather than a rate of ageing because
it needs no notion of how long is long: a second is many admissions of embeddings and none of a chat.

Where requests have a *prefix*, one that begins like the request that started last comes first among those that have
failed as often and have the same deadline and priority, so that the engine finds the beginning of its prompt in its
cache.  None is overtaken for that once it has waited for `overtaken_s`.

The probe of a stopped lane is another message than the one that failed last, a fresh one where there is one, chosen at
random: where messages that fail stand in a block, the first of the queue would be one of them again and again.

A waiter is *ready*, or *delayed* until a caller says otherwise.

Source: start-time fair queueing (https://dl.acm.org/doi/10.1145/248157.248171), with the cost corrected afterwards.
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

from worker.flow.clock import Now

MAX_SHARES = 256
"""Shares that are remembered though nothing of them waits."""
MEAN_STEP = 0.05
"""How far one answer moves the mean time of an answer."""
MAX_CHARGE = 10.0
"""One answer costs its share at most this many mean answers."""


class Share(msgspec.Struct, frozen=True):
    """Whose part of the window a request uses."""

    level: int = 0
    """Smaller is before all larger ones."""
    name: str = ""
    weight: float = 1.0
    """Above 0; in proportion to the other shares of the level."""


OVERTAKEN_S = 300.0
"""So long a request may be overtaken for the prefix of others.  House decision: a few minutes more in a batch of hours,
and time for a group that fills the leased buffer (ADR 29)."""
_ALIKE = 3
"""So many parts of a claim are alike where a prefix may decide: failures, deadline and priority."""

ALONE = Share()
"""The share of all requests where they are not told apart: nothing is charged."""


class AdmissionOrder(msgspec.Struct, frozen=True, kw_only=True):
    """A message's claim to be next."""

    share: Share = ALONE
    deadline: float | None = None
    """Any clock, the same for all; `None` comes after every deadline."""
    priority: int = 0
    """Larger is sooner, among those with the same deadline or none."""
    publish_time: float = 0.0
    """Any clock, the same for all."""
    held: bool = False
    """It was attempted before and is held; counted, and no claim."""
    limited: bool = False
    """It waits for a limit of its tenant: nothing but the end of its delay makes it ready."""
    prefix: int | None = None
    """The same for requests whose prompts begin alike; `None`: with none of them."""


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
    since: float = 0.0
    """When it began to wait, monotonic seconds; for its prefix alone."""
    is_moved: bool = False
    """It got no permit because it is to wait elsewhere."""
    state: WaiterState = WaiterState.GONE
    arrival: int = 0
    claim: tuple[float, ...] = ()
    """What the waiters of a share are sorted by; smaller is sooner."""


class _Line:
    """The waiters of one share."""

    def __init__(self) -> None:
        self.charged = 0.0
        """Mean answers, divided by the weight."""
        self.waiters: OrderedDict[int, Waiter] = OrderedDict()  # by arrival
        self._by_prefix: dict[int, dict[int, Waiter]] = {}  # and by arrival
        self._last_prefix: int | None = None
        # A heap of the ready ones.  An entry stays when its waiter leaves otherwise, and is skipped when it is reached.
        self._by_claim: list[tuple[tuple[float, ...], Waiter]] = []

    def add(self, waiter: Waiter) -> None:
        """Add a waiter that is not ready yet."""
        self.waiters[waiter.arrival] = waiter
        if waiter.order.prefix is not None:
            self._by_prefix.setdefault(waiter.order.prefix, {})[waiter.arrival] = waiter

    def remove(self, waiter: Waiter) -> None:
        """Remove a waiter."""
        del self.waiters[waiter.arrival]
        prefix = waiter.order.prefix
        if prefix is not None:
            del self._by_prefix[prefix][waiter.arrival]
            if not self._by_prefix[prefix]:
                del self._by_prefix[prefix]

    def next(self, now: Now, overtaken_s: float) -> Waiter | None:
        """
        Return the ready waiter that is next: the first, or one with the prefix that started last.

        Args:
            now: Monotonic seconds, on the clock of `Waiter.since`.
            overtaken_s: One that has waited for so long is not overtaken.
        """
        group = self._by_prefix.get(self._last_prefix) if self._last_prefix is not None else None
        first = self.first(keep=group is not None)
        if group is not None and first is not None:
            if now() - first.since < overtaken_s:
                for waiter in group.values():
                    if waiter.state is WaiterState.READY and waiter.claim[:_ALIKE] == first.claim[:_ALIKE]:
                        return waiter  # its entry of the heap is skipped later
            self.first()
        if first is not None:
            self._last_prefix = first.order.prefix
        return first

    def longest_waiting(self) -> Waiter | None:
        return next((each for each in self.waiters.values() if each.state is WaiterState.READY), None)

    def first(self, *, keep: bool = False) -> Waiter | None:
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

    def push(self, waiter: Waiter) -> None:
        """Make a waiter ready."""
        if len(self._by_claim) > 64 + 2 * len(self.waiters):  # most entries are those of waiters that have left
            self._by_claim = [(e.claim, e) for e in self.waiters.values() if e.state is WaiterState.READY]
            heapq.heapify(self._by_claim)
        waiter.state = WaiterState.READY
        heapq.heappush(self._by_claim, (waiter.claim, waiter))

    def forgive(self) -> None:
        """Let no waiter stand behind another for its failures."""
        self._by_claim.clear()
        for waiter in self.waiters.values():
            waiter.rank = 0
            waiter.claim = _claim(waiter)
            if waiter.state is WaiterState.READY:
                self.push(waiter)


def _no_time() -> float:
    return 0.0


class WaitQueue:
    """
    The callers that wait for one lane.

    Args:
        aging_every: See the module; 0 for strict order.
        rng: Chooses probes.
        overtaken_s: See the module, seconds.
    """

    def __init__(
        self, *, aging_every: int = 8, rng: random.Random | None = None, overtaken_s: float = OVERTAKEN_S
    ) -> None:
        if aging_every < 0:
            raise ValueError("aging_every must not be negative")
        self._aging_every = aging_every
        self._overtaken_s = overtaken_s
        self._rng = rng or random.Random()  # noqa: S311 - no secret
        self._admissions = 0
        self._arrivals = 0
        self._held = 0
        self._limited = 0
        self._waiting = 0
        self._lines: dict[Share, _Line] = {ALONE: _Line()}
        self._charged_least: dict[int, float] = {}
        """By level: what the share that started last had been charged before, below which none begins."""
        self._mean_s = 0.0

    def __len__(self) -> int:
        return self._waiting

    @property
    def held(self) -> int:
        """Waiters whose message was attempted before."""
        return self._held

    @property
    def limited(self) -> int:
        """Waiters that wait, or have waited, for a limit of their tenant."""
        return self._limited

    def add(self, waiter: Waiter, *, is_delayed: bool) -> None:
        """Add a waiter, ready or delayed."""
        self._arrivals += 1
        waiter.arrival = self._arrivals
        waiter.claim = _claim(waiter)
        line = self._line(waiter.order.share)
        line.add(waiter)
        self._waiting += 1
        self._held += waiter.order.held
        self._limited += waiter.order.limited
        if is_delayed:
            waiter.state = WaiterState.DELAYED
        else:
            line.push(waiter)

    def count_admission(self, share: Share = ALONE) -> None:
        """Count an admission without waiting, so that ageing has the same rhythm and its share is charged."""
        self._admissions += 1
        self._charge(share)

    def settle(self, share: Share, seconds: float) -> None:
        """Correct the charge of a start by what its answer took; called for each, answered or not."""
        if share is ALONE:
            return
        self._mean_s = self._mean_s + MEAN_STEP * (seconds - self._mean_s) if self._mean_s else seconds
        if self._mean_s > 0.0:
            cost = min(seconds / self._mean_s, MAX_CHARGE)
            self._line(share).charged += (cost - 1.0) / share.weight

    def make_ready(self, waiter: Waiter) -> None:
        """End the delay of a waiter; harmless when that is over or the waiter has left."""
        if waiter.state is WaiterState.DELAYED:
            self._lines[waiter.order.share].push(waiter)

    def discard(self, waiter: Waiter) -> None:
        """Remove a waiter, whatever its state; harmless when it has left."""
        if waiter.state is WaiterState.GONE:
            return
        waiter.state = WaiterState.GONE
        self._lines[waiter.order.share].remove(waiter)
        self._waiting -= 1
        self._held -= waiter.order.held
        self._limited -= waiter.order.limited

    def pop(self, now: Now = _no_time) -> Waiter | None:
        """
        Remove and return the next ready waiter; `None` when none is ready.

        Args:
            now: Monotonic seconds, on the clock of `Waiter.since`.
        """
        line = self._next_line()
        waiter = line.longest_waiting() if self._is_aging() else line.next(now, self._overtaken_s)
        if waiter is not None:
            self._leaves(waiter)
        return waiter

    def pop_probe(self, last_failed: str | None, *, newest: bool) -> Waiter | None:
        """
        Remove and return the ready waiter that is the best probe; `None` when none is ready.

        Args:
            last_failed: The message that failed last.
            newest: Of the best take the newest, and none at random: messages that fail often came together, so that
                one is the least like them.
        """
        ready = [each for each in self._all() if each.state is WaiterState.READY]
        others = [each for each in ready if last_failed is None or each.key != last_failed] or ready
        if not others:
            return None
        freshest = min(each.rank for each in others)
        best = [each for each in others if each.rank == freshest]
        waiter = max(best, key=lambda each: each.arrival) if newest else self._rng.choice(best)
        self._leaves(waiter)
        return waiter

    def has_ready(self) -> bool:
        """Whether a waiter is ready."""
        return any(line.first(keep=True) is not None for line in self._lines.values())

    def release(self) -> None:
        """Make every waiter ready: the lane works again."""
        for line in self._lines.values():
            for waiter in line.waiters.values():
                if not waiter.order.limited:  # its limit has another reason
                    self.make_ready(waiter)

    def forgive(self) -> None:
        """Let none stand behind another for its failures."""
        for line in self._lines.values():
            line.forgive()

    def drain(self) -> Iterator[Waiter]:
        """Remove and yield every waiter, in the order of arrival."""
        for waiter in sorted(self._all(), key=lambda each: each.arrival):
            self.discard(waiter)
            yield waiter

    def _all(self) -> Iterator[Waiter]:
        for line in self._lines.values():
            yield from line.waiters.values()

    def _is_aging(self) -> bool:
        return self._aging_every > 0 and (self._admissions + 1) % self._aging_every == 0

    def _leaves(self, waiter: Waiter) -> None:
        """Take note that a waiter starts."""
        self._admissions += 1
        self.discard(waiter)
        self._charge(waiter.order.share)

    def _next_line(self) -> _Line:
        """Return the share that is next; any where none has a ready waiter."""
        if len(self._lines) == 1:
            return self._lines[ALONE]
        best: tuple[tuple[float, ...], _Line] = ((), self._lines[ALONE])
        for share, line in self._lines.items():
            head = line.first(keep=True)
            if head is not None:
                claim = (share.level, head.rank > 0, line.charged, head.arrival)
                if not best[0] or claim < best[0]:
                    best = (claim, line)
        return best[1]

    def _line(self, share: Share) -> _Line:
        line = self._lines.get(share)
        if line is None:
            if len(self._lines) > MAX_SHARES:
                self._forget()
            line = self._lines[share] = _Line()
        if not line.waiters and share is not ALONE:  # what it did not use while it was away is gone
            line.charged = max(line.charged, self._charged_least.get(share.level, 0.0))
        return line

    def _charge(self, share: Share) -> None:
        if share is ALONE:
            return
        line = self._line(share)
        least = self._charged_least
        least[share.level] = max(least.get(share.level, 0.0), line.charged)
        line.charged += 1.0 / share.weight

    def _forget(self) -> None:
        """Forget half of the shares that nothing waits for, those with the least charge: little is forgiven them."""
        idle = [share for share, line in self._lines.items() if not line.waiters and share is not ALONE]
        idle.sort(key=lambda share: self._lines[share].charged)
        for share in idle[: (len(idle) + 1) // 2]:
            del self._lines[share]


def _claim(waiter: Waiter) -> tuple[float, ...]:
    order = waiter.order
    deadline = math.inf if order.deadline is None else order.deadline
    return (waiter.rank, deadline, -order.priority, order.publish_time, waiter.arrival)
