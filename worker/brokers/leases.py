"""
Leases: what is held of a subscription, until when, and what the broker is still to be told.  Pure: no I/O, one clock.

The life of a lease::

    add ──▶ UNCONFIRMED ──▶ WAITING ──▶ RUNNING ──▶ ACKING ──▶ GONE
            exactly-once:    its turn    handler      │
            receipt sent         └──────────┴──────▶ NACKING ──▶ GONE

* `next` starts what may run: in order of arrival, and one delivery at a time of each ordering key.  A nack also nacks
  what waits behind it under its key, and what was sent before the broker knew of the nack: all of that is delivered
  again, in order.
* The first lease is as long as the subscription's ack deadline, so that the messages of a killed worker are back after
  that.  What is held for longer than half of it is extended to a minute, again and again: that outlives an event loop
  that does not turn for 25 s.
* `requests` returns what is to be sent now, in batches of bounded size.  `confirmed` and `failed` take what came of it.
  What failed is sent again with backoff: a nack until its lease ends, an ack for a while longer, since a late ack still
  counts where the message has not been delivered again.
* What was held for `max_lease_duration_s`, counted from its arrival, is not extended any more.

Source: https://cloud.google.com/pubsub/docs/lease-management, https://cloud.google.com/pubsub/docs/ordering and
https://cloud.google.com/pubsub/docs/exactly-once-delivery.
"""

import math
import random
import time
from collections import deque
from collections.abc import Callable, Mapping
from enum import Enum

import msgspec

from worker.policy.backoff import Backoff
from worker.ports import Settlement
from worker.settings.schema import PubSubSettings
from worker.wire.message import ReceivedMessage

FIRST_S = 20.0
"""Length of the first lease where the subscription's own ack deadline cannot be read."""
EXTENSION_S = 60.0
"""How far a lease is extended at a time, or by the first lease where that is longer."""
EXTEND_AFTER = (0.4, 0.5)
"""Share of a lease after which it is extended; random between these, so that extensions spread."""
TICK_S = 1.0
"""Interval at which `tick` is to be called."""
LATE_ACK_S = 60.0
"""How long after the end of its lease an ack is still tried."""
GATHER_S = 0.01
"""How long an ack or nack waits for others to share its request; Google's client waits as long."""
GATHER_SHARE = 4
"""They wait no longer once they are a fourth of `max_in_flight`: the broker sends nothing else in their place."""
REORDER_S = 5.0
"""How long after a nack what the broker had sent before may still arrive; generous."""
RETRY_BACKOFF = Backoff(base_s=0.2, max_s=2.0, jitter=0.5)
"""Several tries fit into the half of the shortest lease, 10 s."""
MAX_IDS = 1_000
"""Ack ids in one request at most."""
MAX_ID_BYTES = 400_000
"""Bytes of ack ids in one request; Pub/Sub takes requests of 512 KiB (https://cloud.google.com/pubsub/quotas)."""
MAX_REQUESTS = 8
"""Requests under way at once; beyond it batches grow instead."""
RESIZE_SHARE = 8
"""A stream is replaced when its limits are wrong by an eighth of the settings'."""
OVERRUN = 2
"""A server that sends this many times of what may be held ignores the limits of its stream."""


class State(Enum):
    """What is happening to a lease; the picture is at the top of this file."""

    UNCONFIRMED = "unconfirmed"
    WAITING = "waiting"
    RUNNING = "running"
    ACKING = "acking"
    NACKING = "nacking"
    GONE = "gone"


_UNSTARTED = frozenset({State.UNCONFIRMED, State.WAITING})


class Kind(Enum):
    """What a request tells the broker."""

    ACK = "ack"
    NACK = "nack"
    EXTEND = "extend"


class Grant(msgspec.Struct):
    """What one stream may deliver: its limits, which cannot be changed while it is open, and what they are used for."""

    max_messages: int
    max_bytes: int
    messages: int = 0
    """Delivered by it and still held."""
    size_bytes: int = 0


class Lease(msgspec.Struct, eq=False):
    """One delivery that is held."""

    ack_id: str
    message: ReceivedMessage
    size_bytes: int
    grant: Grant
    key: str
    """Its ordering key where the subscription keeps order, else empty."""
    arrived_at: float
    ends_at: float
    """By this clock; the broker's lease ends no earlier."""
    extend_at: float
    """`math.inf` while that is pending or under way, and once it is not extended any more."""
    state: State
    is_lost: bool = False
    """It ended, or the broker said so, before it was settled."""


class Request(msgspec.Struct, eq=False):
    """One request to the broker."""

    kind: Kind
    leases: list[Lease]
    seconds: int
    """The new ack deadline; 0 for a nack, without meaning for an ack."""
    sent_at: float

    @property
    def ack_ids(self) -> list[str]:
        """What it is about."""
        return [lease.ack_id for lease in self.leases]


class Leases:
    """
    Everything that is held of one subscription.

    Args:
        settings: How much may be held, and how long.
        on_lost: Called once for each delivery whose lease ended before it was settled; must not raise.
        on_refused: Called when the broker refused an ack; must not raise.
        clock: Monotonic seconds.
        uniform: Random numbers from 0 to 1.

    Attributes:
        first_s: Length of the leases that streams grant, seconds.
        extra: Messages that may be held beyond `max_in_flight`.
    """

    def __init__(
        self,
        settings: PubSubSettings,
        *,
        on_lost: Callable[[Lease], None],
        on_refused: Callable[[Lease], None],
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[], float] = random.random,
    ) -> None:
        self._settings = settings
        self._on_lost = on_lost
        self._on_refused = on_refused
        self._clock = clock
        self._uniform = uniform
        self.first_s = FIRST_S
        self.extra = 0
        self._held: dict[str, Lease] = {}
        self._size_bytes = 0
        self._ready: deque[Lease] = deque()
        self._keys: dict[str, deque[Lease]] = {}
        self._nacked: dict[str, tuple[float, set[str]]] = {}  # by key, until when which ids are known to come again
        self._ticked_at = clock()
        self._stall = (0.0, 0.0)  # when the last one began, and until when what it delayed may arrive
        self._pending: dict[Kind, dict[Lease, None]] = {kind: {} for kind in Kind}
        self._due_at = math.inf
        self._enough = max(1, settings.max_in_flight // GATHER_SHARE)
        self._under_way = 0
        self._failures = 0
        self._retry_at = 0.0

    def __len__(self) -> int:
        return len(self._held)

    # Flow control.

    @property
    def max_running(self) -> int:
        """Handlers that may run at once."""
        return self._settings.max_in_flight + self.extra

    def _left(self, own: Grant | None = None) -> Grant:
        """Return what may be held beside all that is held, without what one stream brought."""
        messages, size_bytes = (own.messages, own.size_bytes) if own else (0, 0)
        return Grant(
            self.max_running - len(self._held) + messages,
            self._settings.max_in_flight_bytes - self._size_bytes + size_bytes,
        )

    def room(self) -> Grant | None:
        """Return what another stream may deliver; `None` when that is nothing."""
        left = self._left()
        return left if left.max_messages > 0 and left.max_bytes > 0 else None

    @property
    def is_full(self) -> bool:
        """Whether as many messages are held as may be."""
        return len(self._held) >= self.max_running

    def fits(self, grant: Grant) -> bool:
        """
        Return whether the open stream's limits are still about right.

        They are too small when deliveries of earlier streams are settled or `extra` has grown, and too large when
        `extra` has shrunk.
        """
        left, settings = self._left(grant), self._settings
        return (
            abs(left.max_messages - grant.max_messages) < max(1, settings.max_in_flight // RESIZE_SHARE)
            and abs(left.max_bytes - grant.max_bytes) < settings.max_in_flight_bytes // RESIZE_SHARE
        )

    def is_overrun(self) -> bool:
        """Return whether far more is held than any server sends that honours limits."""
        max_bytes = OVERRUN * self._settings.max_in_flight_bytes
        return len(self._held) >= OVERRUN * self.max_running or self._size_bytes >= max_bytes

    # A delivery's way.

    def add(
        self, ack_id: str, message: ReceivedMessage, size_bytes: int, grant: Grant, *, key: str, is_exactly_once: bool
    ) -> None:
        """
        Hold a delivery that has just arrived.

        Args:
            ack_id: Of this delivery.
            message: What the handler gets.
            size_bytes: What it counts against limits of bytes.
            grant: Of the stream that brought it.
            key: Its ordering key where the subscription keeps order, else empty.
            is_exactly_once: Another worker may have got it meanwhile: it waits until the broker confirms the lease.
        """
        now = self._clock()
        began = self._began(now)
        extend_at = -math.inf if is_exactly_once else began + self._pause(self.first_s)
        state = State.UNCONFIRMED if is_exactly_once else State.WAITING
        lease = Lease(ack_id, message, size_bytes, grant, key, now, began + self.first_s, extend_at, state)
        self._held[ack_id] = lease
        self._size_bytes += size_bytes
        grant.messages += 1
        grant.size_bytes += size_bytes
        if key:
            until, message_ids = self._nacked.get(key, (0.0, ()))
            if now < until and message.message_id not in message_ids:
                self._nack(lease)  # not a redelivery, so it was sent before the broker knew
                return
            self._nacked.pop(key, None)
            self._keys.setdefault(key, deque()).append(lease)
        self._offer(lease)
        if extend_at <= now:
            self._extend(lease, now)

    def _began(self, now: float) -> float:
        """Return when the lease of what arrives now began at the latest: what a stall delayed came before it ended."""
        if now - self._ticked_at > 2 * TICK_S:
            return self._ticked_at
        since, until = self._stall
        return since if now < until else now

    def _pause(self, seconds: float) -> float:
        low, high = EXTEND_AFTER
        return seconds * (low + (high - low) * self._uniform())

    def _offer(self, lease: Lease) -> None:
        """Let a lease start when its turn comes, unless another of its key is before it."""
        if lease.state is State.WAITING and (not lease.key or self._keys[lease.key][0] is lease):
            self._ready.append(lease)

    def next(self) -> Lease | None:
        """
        Start the next delivery; `None` when there is none that may run.

        What waited too long is nacked instead, and what lost its lease while it waited is forgotten.
        """
        while self._ready:
            lease, now = self._ready.popleft(), self._clock()
            if lease.state is not State.WAITING:
                continue
            if now >= lease.ends_at:
                self._abandon(lease)
            elif now - lease.arrived_at >= self._settings.max_lease_duration_s:
                self.settle(lease, Settlement.NACK)
            else:
                lease.state = State.RUNNING
                return lease
        return None

    def settle(self, lease: Lease, settlement: Settlement) -> None:
        """Tell the broker, when `requests` is next called, which `next_at` says."""
        if settlement is Settlement.NACK:
            self._nack(lease)
            self._nack_behind(lease)
            return
        lease.state = State.ACKING
        self._put(Kind.ACK, lease)
        if lease.key and (queue := self._keys.get(lease.key)) and queue[0] is lease:
            queue.popleft()
            if queue:
                self._offer(queue[0])
            else:
                del self._keys[lease.key]

    def nack_unstarted(self) -> None:
        """Nack everything that no handler has begun."""
        for lease in self._held.values():
            if lease.state in _UNSTARTED:
                self._nack(lease)
        self._keys = {key: deque([queue[0]]) for key, queue in self._keys.items() if queue[0].state is State.RUNNING}

    def _nack(self, lease: Lease) -> None:
        lease.state = State.NACKING
        self._comes_again(lease)
        self._pending[Kind.EXTEND].pop(lease, None)
        self._put(Kind.NACK, lease)

    def _nack_behind(self, lease: Lease) -> None:
        """Nack what waits under the key of a delivery that comes again; what runs keeps its place before them."""
        for other in self._keys.pop(lease.key, deque()):
            if other.state is State.RUNNING and other is not lease:
                self._keys[lease.key] = deque([other])
            elif other.state in _UNSTARTED and other is not lease:
                self._nack(other)

    def _comes_again(self, lease: Lease) -> None:
        """Note which message of its key is to be waited for, at least."""
        if lease.key:
            _, message_ids = self._nacked.get(lease.key, (0.0, set[str]()))
            message_ids.add(lease.message.message_id)
            self._nacked[lease.key] = self._clock() + REORDER_S, message_ids

    def _abandon(self, lease: Lease) -> None:
        """Forget a delivery that was not begun and whose lease is over."""
        self._comes_again(lease)
        self._nack_behind(lease)
        self._remove(lease)

    def _remove(self, lease: Lease) -> None:
        if self._held.pop(lease.ack_id, None) is None:
            return
        lease.state = State.GONE
        self._size_bytes -= lease.size_bytes
        lease.grant.messages -= 1
        lease.grant.size_bytes -= lease.size_bytes
        for pending in self._pending.values():
            pending.pop(lease, None)

    def _lose(self, lease: Lease) -> None:
        if not lease.is_lost:
            lease.is_lost = True
            self._on_lost(lease)

    # Time.

    def tick(self) -> None:
        """Look for leases that are to be extended or have ended; call it every `TICK_S`."""
        now = self._clock()
        if now - self._ticked_at > 2 * TICK_S:
            self._stall = (self._ticked_at, now + TICK_S)
        self._ticked_at = now
        self._nacked = {key: nacked for key, nacked in self._nacked.items() if nacked[0] > now}
        for lease in list(self._held.values()):
            if lease.extend_at <= now:
                self._extend(lease, now)
            if lease.ends_at <= now:
                self._ended(lease, now)

    def _extend(self, lease: Lease, now: float) -> None:
        lease.extend_at = math.inf
        if lease.state is not State.NACKING and now - lease.arrived_at < self._settings.max_lease_duration_s:
            self._put(Kind.EXTEND, lease)

    def _ended(self, lease: Lease, now: float) -> None:
        """Judge a lease that is over; what runs goes on, since its answer is wanted all the same."""
        if lease.state in _UNSTARTED:
            self._abandon(lease)
        elif lease.state is State.NACKING:
            self._remove(lease)
        else:
            self._lose(lease)
            if lease.state is State.ACKING and now >= lease.ends_at + LATE_ACK_S:
                self._remove(lease)

    # Requests.

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left to be acked or nacked."""
        return not any(lease.state in {State.ACKING, State.NACKING} for lease in self._held.values())

    def _put(self, kind: Kind, lease: Lease) -> None:
        pending = self._pending[kind]
        pending[lease] = None
        is_due = kind is Kind.EXTEND or len(pending) >= self._enough
        self._due_at = min(self._due_at, self._clock() + (0.0 if is_due else GATHER_S))

    def hurry(self) -> None:
        """Make everything due now, whatever failed before."""
        self._due_at = self._retry_at = 0.0

    def next_at(self) -> float:
        """Return when `requests` has something, in seconds of the clock; `math.inf` while it has nothing."""
        if self._under_way >= MAX_REQUESTS or not any(self._pending.values()):
            return math.inf
        return max(self._due_at, self._retry_at)

    def requests(self) -> list[Request]:
        """Return what is to be sent now; each is to be given to `confirmed` or `failed`."""
        now, found = self._clock(), list[Request]()
        if self.next_at() > now:
            return found
        for kind, pending in self._pending.items():
            seconds = math.ceil(max(EXTENSION_S, self.first_s)) if kind is Kind.EXTEND else 0
            while pending and self._under_way < MAX_REQUESTS:
                self._under_way += 1
                found.append(Request(kind, _take(pending), seconds, now))
        if not any(self._pending.values()):
            self._due_at = math.inf
        return found

    def confirmed(self, request: Request) -> None:
        """Take a request that the broker has answered well."""
        self._under_way -= 1
        self._failures = 0
        for lease in request.leases:
            self._apply(request, lease)

    def failed(self, request: Request, *, is_permanent: bool = False, reasons: Mapping[str, str] | None = None) -> None:
        """
        Take a request that failed: what may succeed is sent again, the rest is given up.

        Args:
            request: As returned by `requests`.
            is_permanent: It would fail again.
            reasons: Of an exactly-once subscription, by ack id; ids that are not named were applied.
        """
        self._under_way -= 1
        now, again = self._clock(), list[Lease]()
        for lease in request.leases:
            reason = (reasons or {}).get(lease.ack_id, "")
            if reasons and not reason:
                self._apply(request, lease)
            elif reason.startswith("TRANSIENT_") or not (reasons or is_permanent):
                again.append(lease)
            else:
                self._refused(request.kind, lease)
        if again and now >= self._retry_at:  # those that failed together count once
            self._failures += 1
            self._retry_at = now + RETRY_BACKOFF.delay_s(self._failures, self._uniform())
        for lease in again:
            if lease.state is not State.GONE and not (request.kind is Kind.EXTEND and lease.state is State.NACKING):
                self._put(request.kind, lease)

    def _apply(self, request: Request, lease: Lease) -> None:
        if request.kind is not Kind.EXTEND:
            self._remove(lease)
        elif lease.state is not State.GONE:
            lease.ends_at = request.sent_at + request.seconds
            lease.extend_at = request.sent_at + self._pause(request.seconds)
            if lease.state is State.UNCONFIRMED:
                lease.state = State.WAITING
                self._offer(lease)

    def _refused(self, kind: Kind, lease: Lease) -> None:
        """Take a refusal of the broker that no other try would change: this lease is over."""
        if lease.state is State.GONE or lease.state is State.NACKING:
            self._remove(lease)
        elif kind is Kind.EXTEND and lease.state is State.UNCONFIRMED:
            self._abandon(lease)
        else:
            self._lose(lease)
            if kind is Kind.ACK:
                self._on_refused(lease)
                self._remove(lease)


def _take(pending: dict[Lease, None]) -> list[Lease]:
    """Take as many leases as fit into one request."""
    taken, size = list[Lease](), 0
    for lease in pending:
        size += len(lease.ack_id) + 4  # tag and length
        if taken and (len(taken) == MAX_IDS or size > MAX_ID_BYTES):
            break
        taken.append(lease)
    for lease in taken:
        del pending[lease]
    return taken
