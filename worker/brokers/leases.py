"""
Leases: what is held of a subscription, until when, and what the broker is still to be told.  Pure: no I/O, one clock.

The life of a lease::

    add ──▶ UNCONFIRMED ──▶ WAITING ──▶ RUNNING ──▶ ACKING ──▶ gone
            exactly-once:    its turn    handler      │
            receipt sent         └──────────┴──────▶ NACKING ──▶ gone

* `next` starts what may run: in order of arrival, and one delivery at a time of each ordering key.  A nack also nacks
  what waits behind it under its key: the broker delivers all of that again, in order.
* The first lease is as long as the subscription's ack deadline, so that the messages of a killed worker are back after
  that.  What is held longer than half of it is extended to a minute, again and again: that outlives an event loop that
  does not turn for 25 s.
* `requests` returns what is to be sent now, in batches of bounded size.  `confirmed` and `failed` take what came of it.
  What failed is sent again with backoff: a nack until its lease ends, an ack for a while longer, since a late ack still
  counts where the message has not been delivered again.
* What may not wait any longer than `max_lease_duration_s`, counted from its arrival, is not extended any more.

Source: https://cloud.google.com/pubsub/docs/lease-management, https://cloud.google.com/pubsub/docs/ordering and
https://cloud.google.com/pubsub/docs/exactly-once-delivery.
"""

import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

from worker.policy.backoff import Backoff
from worker.ports import Settlement
from worker.settings.schema import PubSubSettings
from worker.wire.message import ReceivedMessage

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
RETRY_BACKOFF = Backoff(base_s=0.2, max_s=5.0, jitter=0.5)
MAX_IDS = 1_000
"""Ack ids in one request at most."""
MAX_ID_BYTES = 400_000
"""Bytes of ack ids in one request; Pub/Sub takes requests of 512 KiB (https://cloud.google.com/pubsub/quotas)."""
ID_FRAME_BYTES = 4
"""Tag and length that protobuf puts before each."""
MAX_REQUESTS = 8
"""Requests of one kind under way at once; beyond it batches grow instead."""
RESIZE_SHARE = 8
"""A stream is replaced when its limits are wrong by an eighth of the settings'."""
OVERRUN = 2
"""A server that sends this many times of what may be held ignores the limits of its stream."""
TRANSIENT = "TRANSIENT_"
"""Begins the reasons of exactly-once failures that another try may not meet again."""


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


@dataclass(slots=True)
class Grant:
    """What one stream may deliver: its limits, which cannot be changed while it is open, and what they are used for."""

    max_messages: int
    max_bytes: int
    messages: int = 0
    """Delivered by it and still held."""
    size_bytes: int = 0


@dataclass(slots=True, eq=False)
class Lease:
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
    """`math.inf` while a request for it is under way, and once it is not extended any more."""
    state: State = State.WAITING
    is_lost: bool = False
    """It ended, or the broker said so, before it was settled."""


@dataclass(slots=True, eq=False)
class Request:
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


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request failed."""

    is_permanent: bool = False
    """The request as it stands would fail again."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Of an exactly-once subscription, by ack id; ids that are not named have been applied."""


class _Outbox:
    """Leases for which requests of one kind are to be sent."""

    def __init__(self, gather_s: float, uniform: Callable[[], float]) -> None:
        self._gather_s = gather_s
        self._uniform = uniform
        self._pending: dict[Lease, None] = {}
        self._halves: list[list[Lease]] = []  # of requests that were refused as a whole
        self.under_way = 0
        self._failures = 0
        self._due_at = math.inf
        self._retry_at = 0.0

    def __len__(self) -> int:
        return len(self._pending) + sum(map(len, self._halves))

    def put(self, lease: Lease, now: float) -> None:
        """Add a lease."""
        if not self._pending:
            self._due_at = now + self._gather_s
        self._pending[lease] = None

    def discard(self, lease: Lease) -> None:
        """Forget a lease whose request is not wanted any more."""
        self._pending.pop(lease, None)

    def split(self, leases: list[Lease]) -> None:
        """Send a batch again in two halves: something in it made the broker refuse all of it."""
        middle = len(leases) // 2
        self._halves += [leases[:middle], leases[middle:]]

    def due_at(self) -> float:
        """Return when to ask for batches."""
        if self.under_way >= MAX_REQUESTS or not (self._pending or self._halves):
            return math.inf
        return max(self._retry_at, 0.0 if self._halves else self._due_at)

    def hurry(self) -> None:
        """Make everything due."""
        self._due_at = self._retry_at = 0.0

    def batches(self, now: float) -> Iterator[list[Lease]]:
        """Take what is due and may be under way at once."""
        while self.due_at() <= now:
            yield self._halves.pop() if self._halves else self._take()

    def _take(self) -> list[Lease]:
        taken, size = list[Lease](), 0
        for lease in self._pending:
            size += len(lease.ack_id) + ID_FRAME_BYTES
            if taken and (len(taken) == MAX_IDS or size > MAX_ID_BYTES):
                break
            taken.append(lease)
        for lease in taken:
            del self._pending[lease]
        return taken

    def succeeded(self) -> None:
        """Count a request that was answered well."""
        self._failures, self._retry_at = 0, 0.0

    def failed(self, now: float) -> None:
        """Count a request that is to be tried again; those that failed together count once."""
        if now >= self._retry_at:
            self._failures += 1
            self._retry_at = now + RETRY_BACKOFF.delay_s(self._failures, self._uniform())


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
        on_lost: Callable[[Lease], None],
        *,
        on_refused: Callable[[Lease], None],
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[], float] = random.random,
    ) -> None:
        self._settings = settings
        self._on_lost = on_lost
        self._on_refused = on_refused
        self._clock = clock
        self._uniform = uniform
        self._held: dict[str, Lease] = {}
        self._size_bytes = 0
        self._ready: deque[Lease] = deque()
        self._keys: dict[str, deque[Lease]] = {}
        self._outboxes = {
            Kind.ACK: _Outbox(GATHER_S, uniform),
            Kind.NACK: _Outbox(GATHER_S, uniform),
            Kind.EXTEND: _Outbox(0.0, uniform),
        }
        self._acks, self._nacks, self._extensions = self._outboxes.values()
        self._ticked_at = clock()
        self._stall = (0.0, 0.0)  # when the last one began, and until when what it delayed may arrive
        self.first_s = EXTENSION_S
        self.extra = 0

    def __len__(self) -> int:
        return len(self._held)

    @property
    def _extension_s(self) -> float:
        return max(EXTENSION_S, self.first_s)

    # Flow control.

    @property
    def max_running(self) -> int:
        """Handlers that may run at once."""
        return self._settings.max_in_flight + self.extra

    def room(self) -> Grant | None:
        """Return what another stream may deliver beside all that is held; `None` when that is nothing."""
        messages = self.max_running - len(self._held)
        size_bytes = self._settings.max_in_flight_bytes - self._size_bytes
        return Grant(messages, size_bytes) if messages > 0 and size_bytes > 0 else None

    def fits(self, grant: Grant) -> bool:
        """
        Return whether the open stream's limits are still about right.

        They are too small when deliveries of earlier streams are settled or `extra` has grown, and too large when
        `extra` has shrunk.
        """
        settings = self._settings
        messages = self.max_running - (len(self._held) - grant.messages)
        size_bytes = settings.max_in_flight_bytes - (self._size_bytes - grant.size_bytes)
        return (
            abs(messages - grant.max_messages) < max(1, settings.max_in_flight // RESIZE_SHARE)
            and abs(size_bytes - grant.max_bytes) < settings.max_in_flight_bytes // RESIZE_SHARE
        )

    def is_overrun(self) -> bool:
        """Return whether far more is held than any server sends that honours limits."""
        return (
            len(self._held) >= OVERRUN * self.max_running
            or self._size_bytes >= OVERRUN * self._settings.max_in_flight_bytes
        )

    # A delivery's way.

    def add(
        self, ack_id: str, message: ReceivedMessage, size_bytes: int, grant: Grant, *, key: str, is_exactly_once: bool
    ) -> None:
        """
        Hold a delivery that has just arrived.

        Args:
            ack_id: Of this delivery.
            message: What the handler gets; `received_at` is when it arrived, by the clock.
            size_bytes: What it counts against limits of bytes.
            grant: Of the stream that brought it.
            key: Its ordering key where the subscription keeps order, else empty.
            is_exactly_once: Another worker may have got it meanwhile: it waits until the broker confirms the lease.
        """
        assert message.received_at is not None
        now = message.received_at
        began = self._began(now)
        extend_at = began + self._pause(self.first_s)
        lease = Lease(ack_id, message, size_bytes, grant, key, now, began + self.first_s, extend_at)
        self._held[ack_id] = lease
        self._size_bytes += size_bytes
        grant.messages += 1
        grant.size_bytes += size_bytes
        if key:
            self._keys.setdefault(key, deque()).append(lease)
        if is_exactly_once:
            lease.state = State.UNCONFIRMED
            self._extend(lease, now)
        else:
            self._offer(lease)
            if lease.extend_at <= now:
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
            lease = self._ready.popleft()
            if lease.state is not State.WAITING:
                continue
            now = self._clock()
            if now >= lease.ends_at:
                self._abandon(lease)
            elif now - lease.arrived_at >= self._settings.max_lease_duration_s:
                self.settle(lease, Settlement.NACK)
            else:
                lease.state = State.RUNNING
                return lease
        return None

    def settle(self, lease: Lease, settlement: Settlement) -> None:
        """Tell the broker, as soon as `requests` is called after `next_at`."""
        if settlement is Settlement.ACK:
            self._leave_key(lease)
            lease.state = State.ACKING
            self._acks.put(lease, self._clock())
        else:
            self._nack_behind(lease)
            self._nack(lease)

    def nack_unstarted(self) -> None:
        """Nack everything that no handler has begun."""
        for lease in self._held.values():
            if lease.state in _UNSTARTED:
                self._nack(lease)
        self._ready.clear()
        self._keys = {key: deque([queue[0]]) for key, queue in self._keys.items() if queue[0].state is State.RUNNING}

    def _nack(self, lease: Lease) -> None:
        lease.state = State.NACKING
        self._extensions.discard(lease)
        self._nacks.put(lease, self._clock())

    def _abandon(self, lease: Lease) -> None:
        """Forget a delivery that was not begun and whose lease is over; its key's later ones come again behind it."""
        self._nack_behind(lease)
        self._remove(lease)

    def _leave_key(self, lease: Lease) -> None:
        queue = self._keys.get(lease.key)
        if queue is None or queue[0] is not lease:
            return
        queue.popleft()
        if queue:
            self._offer(queue[0])
        else:
            del self._keys[lease.key]

    def _nack_behind(self, lease: Lease) -> None:
        """Nack what waits under the key of a delivery that comes again."""
        queue = self._keys.pop(lease.key, deque())
        for other in queue:
            if other.state in _UNSTARTED and other is not lease:
                self._nack(other)
            elif other.state is State.RUNNING and other is not lease:
                self._keys[lease.key] = deque([other])

    def _remove(self, lease: Lease) -> None:
        if self._held.pop(lease.ack_id, None) is None:
            return
        lease.state = State.GONE
        self._size_bytes -= lease.size_bytes
        lease.grant.messages -= 1
        lease.grant.size_bytes -= lease.size_bytes
        self._extensions.discard(lease)

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
        for lease in list(self._held.values()):
            if lease.extend_at <= now:
                self._extend(lease, now)
            if lease.ends_at <= now:
                self._ended(lease, now)

    def _extend(self, lease: Lease, now: float) -> None:
        lease.extend_at = math.inf
        if lease.state is not State.NACKING and now - lease.arrived_at < self._settings.max_lease_duration_s:
            self._extensions.put(lease, now)

    def _ended(self, lease: Lease, now: float) -> None:
        """Judge a lease that is over; what runs goes on, since its answer is wanted all the same."""
        if lease.state in _UNSTARTED:
            self._abandon(lease)
        elif lease.state is State.NACKING:
            self._nacks.discard(lease)
            self._remove(lease)
        else:
            self._lose(lease)
            if lease.state is State.ACKING and now >= lease.ends_at + LATE_ACK_S:
                self._acks.discard(lease)
                self._remove(lease)

    # Requests.

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left to be acked or nacked."""
        return not any(len(box) or box.under_way for box in (self._acks, self._nacks))

    def hurry(self) -> None:
        """Make every ack and nack due now, whatever failed before."""
        self._acks.hurry()
        self._nacks.hurry()

    def next_at(self) -> float:
        """Return when `requests` has something, in seconds of the clock; `math.inf` while it has nothing."""
        return min(self._acks.due_at(), self._nacks.due_at(), self._extensions.due_at())

    def requests(self) -> list[Request]:
        """Return what is to be sent now; each is to be given to `confirmed` or `failed`."""
        now, found = self._clock(), list[Request]()
        for kind, box in self._outboxes.items():
            seconds = math.ceil(self._extension_s) if kind is Kind.EXTEND else 0
            for batch in box.batches(now):
                if leases := [lease for lease in batch if _is_wanted(kind, lease)]:
                    box.under_way += 1
                    found.append(Request(kind, leases, seconds, now))
        return found

    def confirmed(self, request: Request) -> None:
        """Take a request that the broker has answered well."""
        box = self._outboxes[request.kind]
        box.under_way -= 1
        box.succeeded()
        for lease in request.leases:
            self._apply(request, lease)

    def failed(self, request: Request, failure: Failure) -> None:
        """Take a request that failed: what may succeed is sent again, the rest is given up."""
        box, now = self._outboxes[request.kind], self._clock()
        box.under_way -= 1
        leases = [lease for lease in request.leases if _is_wanted(request.kind, lease)]
        if failure.is_permanent and not failure.reasons:
            if len(leases) > 1:
                box.split(leases)
            else:
                for lease in leases:
                    self._refused(request.kind, lease)
            return
        again = []
        for lease in leases:
            reason = failure.reasons.get(lease.ack_id, "")
            if failure.reasons and not reason:
                self._apply(request, lease)
            elif failure.reasons and not reason.startswith(TRANSIENT):
                self._refused(request.kind, lease)
            else:
                again.append(lease)
        if again:
            box.failed(now)
        for lease in again:
            box.put(lease, now)

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
        if kind is Kind.EXTEND:
            if lease.state is State.UNCONFIRMED:
                self._abandon(lease)
            else:
                self._lose(lease)
        else:
            if kind is Kind.ACK:
                self._lose(lease)
                self._on_refused(lease)
            self._remove(lease)


def _is_wanted(kind: Kind, lease: Lease) -> bool:
    """Return whether a request is still to be sent: not for what is settled, nor an extension of what is nacked."""
    return lease.state is not State.GONE and not (kind is Kind.EXTEND and lease.state is State.NACKING)
