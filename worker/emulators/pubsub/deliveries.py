"""
The state of the engine: a message within one subscription, its receivers, its ordering key, and the delivery policy.

`leases` changes these objects; nothing here reads a clock.  The states of a delivery::

                  take                    ack
      READY ───────────────▶ LEASED ───────────────▶ ACKED
        ▲   nack or expiry,    │                       │ seek back
        │   no backoff         │ nack or expiry        ▼
        ├──────────────────────┤                     READY
        │ backoff is over      ▼                    DROPPED: dead-lettered, retention over, purged
        └──────────────── BACKING_OFF               (ACKED and DROPPED are reached from every state)

Ordering keys: messages of a key are delivered in publish order.  Several may be leased at once, all by the same
receiver (`KeyQueue.owner`), so the leased ones are always a run of the queue that ends at its cursor.  When one of them
fails, the cursor returns to it, and everything behind it is delivered again after it, including messages that were
acked meanwhile; only exactly-once delivery keeps those acks.  When a receiver leaves, the key stays with it until its
leases end.

Source: https://cloud.google.com/pubsub/docs/ordering
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from worker.emulators.pubsub.errors import PubSubError
from worker.emulators.pubsub.filters import Predicate
from worker.emulators.pubsub.messages import StoredMessage

MAX_BACKOFF_DOUBLINGS = 64
"""2**64 times any positive backoff exceeds the 600 s maximum; keeps the float finite after thousands of nacks."""


class State(Enum):
    """What is happening to a delivery; the picture is at the top of this file."""

    READY = "ready"
    LEASED = "leased"
    BACKING_OFF = "backing_off"
    ACKED = "acked"
    DROPPED = "dropped"


_SETTLED = frozenset({State.ACKED, State.DROPPED})


@dataclass(frozen=True, slots=True)
class DeliveryPolicy:
    """The settings of a subscription that the engine follows; `resources.policy_of` reads them from the resource."""

    ack_deadline_s: float = 10.0
    """Seconds a lease lasts when the receiver sets no deadline of its own."""
    minimum_backoff_s: float | None = None
    """Seconds before the second delivery; `None` without a retry policy: redelivery is immediate."""
    maximum_backoff_s: float = 600.0
    """Seconds the backoff never exceeds."""
    max_delivery_attempts: int = 0
    """Deliveries before the message goes to the dead-letter topic; 0 without a dead-letter policy."""
    is_ordered: bool = False
    """Whether ordering keys are honoured."""
    is_exactly_once: bool = False
    """Whether an ack needs a lease that still runs."""
    retains_acked: bool = False
    """Whether acked messages stay for a later seek."""
    retention_s: float = 604_800.0
    """Age in seconds at which a message is dropped, acked or not."""
    matches: Predicate | None = None
    """The filter; `None` delivers every message."""

    def backoff_s(self, failures: int) -> float:
        """
        Return the seconds to wait before the next delivery: the minimum, doubled with each failure, up to the maximum.

        The wait is exact; the service promises best effort only.

        Args:
            failures: Nacks and expired leases of the message so far; at least 1.

        Source: https://cloud.google.com/pubsub/docs/handling-failures#exponential_backoff
        """
        if self.minimum_backoff_s is None:
            return 0.0
        doublings = min(failures - 1, MAX_BACKOFF_DOUBLINGS)
        return min(self.maximum_backoff_s, self.minimum_backoff_s * 2.0**doublings)


class Delivery:
    """One message within one subscription."""

    __slots__ = (
        "ack_id",
        "due_at",
        "failures",
        "key",
        "message",
        "position",
        "receiver",
        "state",
        "timer_at",
        "timer_id",
    )

    def __init__(self, message: StoredMessage, key: "KeyQueue | None" = None) -> None:
        self.message = message
        self.key = key
        """The queue of its ordering key; `None` when the message is not ordered."""
        self.position = 0
        """Position within `key`, from 0."""
        self.state = State.READY
        self.failures = 0
        """Nacks and expired leases so far; the delivery attempt is this plus 1."""
        self.ack_id = ""
        """Ack id of the latest lease, also after that ended; empty before the first and when it is no longer valid."""
        self.receiver: Receiver | None = None
        """The receiver that holds the lease."""
        self.due_at = math.inf
        """Clock time at which the lease or the backoff ends; set through `Timers` only."""
        self.timer_at = math.inf
        """Time of its entry in the heap of `Timers`; earlier than `due_at` after the lease was extended."""
        self.timer_id = 0
        """Number of that entry; any other entry is stale."""

    @property
    def attempt(self) -> int:
        """Delivery attempt of the current or next lease, from 1."""
        return self.failures + 1


class Receiver:
    """
    One receiver: a StreamingPull, or a Pull while it waits.

    Args:
        wake: Called when there may be a message to take, or when `error` was set.  Must not block or raise.
        ack_deadline_s: Seconds its leases last; `None` uses the subscription's deadline.
        max_messages: Number of leases it may hold at once; 0 or less for no limit.
        max_bytes: Sum of message sizes at which it gets no more messages; 0 or less for no limit.
    """

    __slots__ = (
        "ack_deadline_s",
        "error",
        "is_starved",
        "max_bytes",
        "max_messages",
        "outstanding_bytes",
        "outstanding_messages",
        "parked",
        "wake",
    )

    def __init__(
        self,
        wake: Callable[[], None],
        *,
        ack_deadline_s: float | None = None,
        max_messages: int = 0,
        max_bytes: int = 0,
    ) -> None:
        self.wake = wake
        self.ack_deadline_s = ack_deadline_s
        self.limit(max_messages, max_bytes)
        self.outstanding_messages = 0
        self.outstanding_bytes = 0
        self.is_starved = False
        """Whether flow control, not a lack of messages, ended its last take; the end of a lease then wakes it."""
        self.parked: deque[Delivery] = deque()
        """Next messages of the ordering keys whose owner it is."""
        self.error: PubSubError | None = None
        """Why it gets no more messages; `None` while the subscription serves it."""

    def limit(self, max_messages: int, max_bytes: int) -> None:
        """Set flow control; see the class's arguments."""
        self.max_messages = max_messages if max_messages > 0 else math.inf
        self.max_bytes = max_bytes if max_bytes > 0 else math.inf

    def has_room(self) -> bool:
        """
        Tell whether one more message may be sent.

        A limit stops further messages once it is reached; the message that reaches it is still sent.
        Source: `StreamingPullRequest.max_outstanding_bytes` in google/pubsub/v1/pubsub.proto.
        """
        return self.outstanding_messages < self.max_messages and self.outstanding_bytes < self.max_bytes

    def close(self, error: PubSubError) -> None:
        """Tell the receiver why it gets no more messages."""
        self.error = error
        self.wake()


class KeyQueue:
    """The unsettled messages of one ordering key within one subscription, and the settled ones between them."""

    __slots__ = ("_base", "_cursor", "_items", "outstanding", "owner")

    def __init__(self) -> None:
        self._items: deque[Delivery] = deque()
        self._base = 0  # position of the first item
        self._cursor = 0  # position of the next item to deliver
        self.outstanding = 0
        """Number of leases on messages of this key."""
        self.owner: Receiver | None = None
        """The receiver that holds these leases; no other receiver gets messages of the key until they end."""

    def __bool__(self) -> bool:
        """Tell whether the queue holds anything."""
        return bool(self._items)

    def append(self, delivery: Delivery) -> None:
        """Add the newest message of the key."""
        delivery.position = self._base + len(self._items)
        self._items.append(delivery)

    def head(self) -> Delivery | None:
        """Return the next message to deliver, READY or not; `None` when all are leased or settled."""
        while self._cursor < self._base + len(self._items):
            item = self._items[self._cursor - self._base]
            if item.state not in _SETTLED:
                return item
            self._cursor += 1
        return None

    def advance(self) -> None:
        """Move past the head, which was leased."""
        self._cursor += 1

    def rewind(self, delivery: Delivery) -> Iterator[Delivery]:
        """Make a leased message the head again; yield, in order, the later ones that had been leased."""
        end = min(self._cursor, self._base + len(self._items))
        self._cursor = min(self._cursor, delivery.position)
        for position in range(delivery.position + 1, end):
            yield self._items[position - self._base]

    def trim(self) -> Iterator[Delivery]:
        """Remove settled messages from the front and yield them: no message before them can be redelivered."""
        while self._items and self._items[0].state in _SETTLED:
            self._base += 1
            yield self._items.popleft()
