"""
One subscription: what receivers may call, and when leases, backoffs and retention end.

Pure: the server calls `take` for a receiver, `acknowledge` and `modify_ack_deadline` for its answers, and `tick` at the
time announced through `on_due`.  Every call first does what is due, so results are exact even when a tick is late.  The
states of a delivery are drawn in `deliveries`; `leases` changes them; `dispatch` chooses the receiver.

Promises: a message is leased to one receiver at a time · a delivery attempt is 1 plus the nacks and expiries so far ·
an unacked message is removed only by the dead-letter policy, the retention, a seek, or detaching.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from worker.emulators.pubsub.clock import NS_PER_S, Clock
from worker.emulators.pubsub.deliveries import DeliveryPolicy, Receiver, State
from worker.emulators.pubsub.errors import PubSubError
from worker.emulators.pubsub.leases import Leases
from worker.emulators.pubsub.messages import StoredMessage

_RETENTION_GRAIN_S = 1.0
"""Shortest time between two checks of the retention: the service promises no exact moment, and a check has a cost."""


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
    """The state of a subscription at one moment, for tests; message ids are in publish order."""

    ready: tuple[str, ...]
    """Messages that wait for a receiver, those behind a backing-off message of their ordering key included."""
    leased: tuple[LeaseSnapshot, ...]
    """Running leases."""
    backing_off: Mapping[str, float]
    """Message id to the seconds left until it is ready again."""
    delivery_attempts: Mapping[str, int]
    """Message id to the attempt of its current or next delivery, from 1, for every message not yet acked."""
    acked_count: int
    """Messages acked since the subscription was created, without those that a seek back restored."""
    delivered_count: int
    """Leases granted since the subscription was created."""
    expired_count: int
    """Leases that ran out."""
    dead_lettered_count: int
    """Messages forwarded to the dead-letter topic."""
    dropped_count: int
    """Messages removed without an ack: older than the retention, or the subscription was detached."""
    receivers: int
    """StreamingPulls, and Pulls that wait."""


class Subscription:
    """
    The messages and receivers of one subscription.

    Args:
        policy: The delivery policy; see `apply`.
        clock: The clock.
        ack_id_prefix: Distinguishes its ack ids from all others, including those of an earlier server process.
        on_due: Called with the clock time of the next `tick` whenever that becomes earlier.
        forward: See `Leases`.
    """

    def __init__(
        self,
        policy: DeliveryPolicy,
        clock: Clock,
        *,
        ack_id_prefix: str,
        on_due: Callable[[float], None],
        forward: Callable[[StoredMessage, int], bool],
    ) -> None:
        self._clock = clock
        self._on_due = on_due
        self._leases = Leases(policy, ack_id_prefix, forward)
        self._announced = math.inf
        self._retention_due = math.inf

    @property
    def policy(self) -> DeliveryPolicy:
        """The delivery policy in force."""
        return self._leases.policy

    def attach(self, receiver: Receiver) -> None:
        """Add a receiver, which then has its share of the messages."""
        self._leases.dispatcher.attach(receiver)

    def detach(self, receiver: Receiver) -> None:
        """Remove a receiver; its messages are redelivered when their leases end."""
        self._leases.dispatcher.detach(receiver)

    def close(self, error: PubSubError) -> None:
        """Tell all receivers why they get no more messages."""
        self._leases.dispatcher.close(error)

    def take(self, receiver: Receiver, max_messages: int, max_bytes: int) -> list[tuple[str, StoredMessage, int]]:
        """
        Lease to a receiver the messages it may get now.

        Args:
            receiver: The receiver.
            max_messages: Largest number of messages.
            max_bytes: Largest sum of message sizes; a first message that is larger than this is leased alone.

        Returns:
            Ack id, message and delivery attempt of each, possibly none.  The attempt is 0 without a dead-letter
            policy (`ReceivedMessage.delivery_attempt` in google/pubsub/v1/pubsub.proto).
        """
        now = self._do_due()
        leases, policy = self._leases, self._leases.policy
        deadline = now + (policy.ack_deadline_s if receiver.ack_deadline_s is None else receiver.ack_deadline_s)
        counts_attempts = policy.max_delivery_attempts > 0
        taken = [
            (
                leases.lease(delivery, receiver, deadline),
                delivery.message,
                delivery.failures + 1 if counts_attempts else 0,
            )
            for delivery in leases.dispatcher.batch(receiver, max_messages, max_bytes)
        ]
        if taken:
            leases.dispatcher.rotate(receiver)
        self._finish()
        return taken

    def acknowledge(self, ack_ids: Sequence[str]) -> list[str]:
        """
        Settle messages.

        Returns:
            On an exactly-once subscription the ids whose lease has ended; otherwise none.  Without exactly-once
            delivery a late ack settles a message that was not yet delivered again, and is ignored after that.

        Raises:
            InvalidArgumentError: This subscription never issued one of the ids; nothing was acked.  Permanent.
        """
        self._do_due()
        needs_lease = self.policy.is_exactly_once
        unique_ids = list(dict.fromkeys(ack_ids))
        invalid = []
        for ack_id, delivery in zip(unique_ids, self._leases.resolve(unique_ids), strict=True):
            if delivery is None or (needs_lease and delivery.state is not State.LEASED):
                invalid.append(ack_id)
            else:
                self._leases.acknowledge(delivery)
        self._finish()
        return invalid if needs_lease else []

    def modify_ack_deadline(self, ack_ids: Sequence[str], seconds: float) -> list[str]:
        """
        Move the end of leases, or nack their messages.

        Args:
            ack_ids: Ids of running leases; ended ones are ignored unless the subscription is exactly-once.
            seconds: The new end, counted from now; 0 is a nack, which counts as a delivery attempt.

        Returns:
            As `acknowledge`.

        Raises:
            InvalidArgumentError: As `acknowledge`.
        """
        now = self._do_due()
        unique_ids = list(dict.fromkeys(ack_ids))
        invalid = []
        for ack_id, delivery in zip(unique_ids, self._leases.resolve(unique_ids), strict=True):
            # A nack earlier in this request may have ended the lease of a later message of the same key.
            if delivery is None or delivery.state is not State.LEASED:
                invalid.append(ack_id)
            elif seconds > 0:
                self._leases.timers.arm(delivery, now + seconds)
            else:
                self._leases.fail(delivery, now)
        self._finish()
        return invalid if self.policy.is_exactly_once else []

    def tick(self) -> float:
        """Do what is due and return the clock time of the next call, or infinity."""
        self._do_due()
        self._finish()
        return self._announced

    def enqueue(self, messages: Iterable[StoredMessage]) -> None:
        """Add published messages, in publish order; those the filter does not match are left out."""
        matches = self.policy.matches
        for message in messages:
            if matches is None or matches(message.attributes):
                self._leases.add(message)
        if self._retention_due == math.inf and self._leases.deliveries:
            self._retention_due = self._clock.now() + self.policy.retention_s
        self._finish()

    def apply(self, policy: DeliveryPolicy) -> None:
        """Replace the delivery policy; running leases and backoffs keep their ends."""
        self._leases.policy = policy
        self._retention_due = self._clock.now() if self._leases.deliveries else math.inf
        self._finish()

    def seek(self, time_ns: int, replay: Iterable[StoredMessage] = ()) -> None:
        """
        Mark messages published before a time as acked and all others as not acked.

        Leases and backoffs run on, except those of ordering keys, which are delivered again in order.

        Args:
            time_ns: Nanoseconds since the epoch; a time in the future acks what is held now, nothing published later.
            replay: The messages that the topic itself retained.

        Source: `SeekRequest.time` in google/pubsub/v1/pubsub.proto,
        https://cloud.google.com/pubsub/docs/replay-overview
        """
        self._do_due()
        known = self._leases.deliveries.keys()
        self.enqueue([message for message in replay if message.publish_ns >= time_ns and message.sequence not in known])
        for delivery in list(self._leases.deliveries.values()):
            if delivery.message.publish_ns < time_ns:
                self._leases.acknowledge(delivery)
            elif delivery.state is State.ACKED:
                self._leases.restore(delivery)
        self._leases.requeue_all()
        self._finish()

    def clear(self) -> None:
        """Drop every message, when the subscription is detached."""
        for delivery in list(self._leases.deliveries.values()):
            self._leases.drop(delivery)
        self._leases.dispatcher.clear()

    def snapshot(self) -> SubscriptionSnapshot:
        """Return the state at this moment."""
        now = self._do_due()
        self._finish()
        leases = self._leases
        live = [delivery for delivery in leases.deliveries.values() if delivery.state is not State.ACKED]
        return SubscriptionSnapshot(
            ready=tuple(item.message.message_id for item in live if item.state is State.READY),
            leased=tuple(
                LeaseSnapshot(item.message.message_id, item.ack_id, item.attempt, item.due_at - now)
                for item in live
                if item.state is State.LEASED
            ),
            backing_off={
                item.message.message_id: item.due_at - now for item in live if item.state is State.BACKING_OFF
            },
            delivery_attempts={
                item.message.message_id: item.attempt for item in live if item.state is not State.DROPPED
            },
            acked_count=leases.acked,
            delivered_count=leases.issued,
            expired_count=leases.expired,
            dead_lettered_count=leases.dead_lettered,
            dropped_count=leases.dropped,
            receivers=leases.dispatcher.receiver_count,
        )

    def _do_due(self) -> float:
        """Apply every end that has passed, as of the moment it was due, and return the clock time."""
        now = self._clock.now()
        leases = self._leases
        while (due := leases.timers.pop_due(now)) is not None:
            at, delivery = due
            if delivery.state is State.LEASED:
                leases.expired += 1
                leases.fail(delivery, at)
            else:
                leases.make_ready(delivery)
        if self._retention_due <= now:
            self._drop_old(now)
        return now

    def _drop_old(self, now: float) -> None:
        """Drop the messages that are older than the retention, and plan the next check."""
        wall_ns = self._clock.now_ns()
        retention_ns = int(self.policy.retention_s * NS_PER_S)
        self._retention_due = math.inf
        for delivery in list(self._leases.deliveries.values()):
            left_ns = delivery.message.publish_ns + retention_ns - wall_ns
            if left_ns > 0:
                self._retention_due = now + max(_RETENTION_GRAIN_S, left_ns / NS_PER_S)
                break
            self._leases.drop(delivery)

    def _finish(self) -> None:
        """End a call: wake the receivers that may take messages, and announce the next tick if it became earlier."""
        self._leases.dispatcher.wake()
        due = min(self._leases.timers.next_due(), self._retention_due)
        if due < self._announced:
            self._on_due(due)
        self._announced = due
