"""
The values of the lease state machine: a message within one subscription, whoever receives it, and the rules it follows.

`subscription` moves these objects; nothing here acts on its own or reads a clock.  A delivery's life::

                  take                    ack
      READY ───────────────▶ LEASED ───────────────▶ ACKED
        ▲   nack or expiry,    │                       │ seek back
        │   no backoff         │ nack or expiry        ▼
        ├──────────────────────┤                     READY
        │ backoff is over      ▼                    DROPPED: dead-lettered, retention over, purged
        └──────────────── BACKING_OFF               (ack and drop are reached from every state)
"""

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from worker.emulators.pubsub.errors import PubSubError
from worker.emulators.pubsub.filters import Predicate
from worker.emulators.pubsub.messages import StoredMessage

if TYPE_CHECKING:
    from worker.emulators.pubsub.ordering import KeyQueue

MAX_BACKOFF_DOUBLINGS = 64
"""2**64 times any positive backoff exceeds the 600 s maximum; keeps the float finite after thousands of nacks."""


class State(Enum):
    """Where a delivery stands."""

    READY = "ready"
    LEASED = "leased"
    BACKING_OFF = "backing_off"
    ACKED = "acked"
    DROPPED = "dropped"


@dataclass(frozen=True, slots=True)
class DeliveryPolicy:
    """What the subscription's resource says about delivering, in the engine's terms."""

    ack_deadline_s: float = 10.0
    """Seconds a lease lasts when the receiver names no deadline of its own."""
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
    """Seconds after its publication at which a message is dropped, acked or not."""
    matches: Predicate | None = None
    """The filter, or `None` to deliver everything."""

    def backoff_s(self, failures: int) -> float:
        """
        Return the wait before the next delivery.

        Exact, where the service promises best effort: minimum, twice that, four times that, up to the maximum.

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
        "consumer",
        "due_at",
        "failures",
        "key",
        "message",
        "position",
        "state",
        "timer_at",
        "timer_id",
    )

    def __init__(self, message: StoredMessage, key: "KeyQueue | None" = None) -> None:
        self.message = message
        self.key = key
        """The queue of its ordering key, or `None` when it is not ordered."""
        self.position = 0
        """Place within `key`, from 0."""
        self.state = State.READY
        self.failures = 0
        """Nacks and expired leases; a delivery attempt is this plus 1."""
        self.ack_id = ""
        """Of the latest lease, also after it ended; empty before the first and once it can no longer be used."""
        self.consumer: Consumer | None = None
        """Who holds the lease."""
        self.due_at = math.inf
        """Clock time at which the lease or the backoff ends; set through `Timers` only."""
        self.timer_at = math.inf
        """Time of its entry in the timers' heap; earlier than `due_at` after a lease was extended."""
        self.timer_id = 0
        """Identity of that entry; any other entry is stale."""

    @property
    def attempt(self) -> int:
        """Delivery attempt of the current or next lease, from 1: one more than nacks and expiries."""
        return self.failures + 1


class Consumer:
    """
    One receiver as the engine sees it: a StreamingPull, or a Pull while it lasts.

    Args:
        wake: Called when there may be something to take, or when `error` was set.  Must not block or raise.
        ack_deadline_s: Seconds its leases last; `None` uses the subscription's.
        max_messages: Leases it may hold at once; 0 or less for no limit.
        max_bytes: Sum of message sizes at which it gets no more; 0 or less for no limit.
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
        """Whether flow control, not a lack of messages, ended its last take; the next release wakes it."""
        self.parked: deque[Delivery] = deque()
        """Next messages of ordering keys that are bound to this receiver."""
        self.error: PubSubError | None = None
        """Why the subscription can serve it no longer."""

    def limit(self, max_messages: int, max_bytes: int) -> None:
        """Set flow control; see the class's arguments."""
        self.max_messages = max_messages if max_messages > 0 else math.inf
        self.max_bytes = max_bytes if max_bytes > 0 else math.inf

    def has_room(self) -> bool:
        """
        Tell whether one more message may be sent.

        Both limits stop further messages once reached; neither splits or withholds the message that reaches it.
        Source: `StreamingPullRequest.max_outstanding_bytes` in google/pubsub/v1/pubsub.proto.
        """
        return self.outstanding_messages < self.max_messages and self.outstanding_bytes < self.max_bytes

    def close(self, error: PubSubError) -> None:
        """Tell the receiver that it gets nothing more, and why."""
        self.error = error
        self.wake()


@dataclass(frozen=True, slots=True)
class LeaseSnapshot:
    """One lease at one moment."""

    message_id: str
    ack_id: str
    delivery_attempt: int
    """From 1."""
    expires_in_s: float
    """Seconds left."""


@dataclass(frozen=True, slots=True)
class SubscriptionSnapshot:
    """Everything a test may want to know about a subscription at one moment; message ids in publish order."""

    ready: tuple[str, ...]
    """Waiting for a receiver; of an ordering key also those behind a message that backs off."""
    leased: tuple[LeaseSnapshot, ...]
    """With a receiver."""
    backing_off: Mapping[str, float]
    """Message id to seconds left until it is ready again."""
    delivery_attempts: Mapping[str, int]
    """Message id to the attempt of its current or next delivery, from 1, for every message not yet acked."""
    acked_count: int
    """Messages acked since the subscription was created; a seek back takes its messages out again."""
    delivered_count: int
    """Leases granted since the subscription was created."""
    expired_count: int
    """Leases that ran out."""
    dead_lettered_count: int
    """Messages forwarded to the dead-letter topic."""
    dropped_count: int
    """Messages removed unacked: retention over, or subscription detached."""
    consumers: int
    """StreamingPulls, and Pulls that wait."""
