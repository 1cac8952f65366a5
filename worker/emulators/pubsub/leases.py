"""
Every change of a delivery's state.

`subscription` decides when a state changes; this module changes it, and keeps everything that depends on it consistent:
the receiver's flow control, the timer, the ack id, the queue of the ordering key, and the counters.  Pure: the time is
an argument.

Keep it in step with the picture of the states in `deliveries`.
"""

from collections.abc import Callable, Sequence

from worker.emulators.pubsub.clock import Timers
from worker.emulators.pubsub.deliveries import Delivery, DeliveryPolicy, KeyQueue, Receiver, State
from worker.emulators.pubsub.dispatch import Dispatcher
from worker.emulators.pubsub.errors import InvalidArgumentError
from worker.emulators.pubsub.messages import StoredMessage

# Bound once: these are compared several times for every message.
_READY, _LEASED, _BACKING_OFF = State.READY, State.LEASED, State.BACKING_OFF
_ACKED, _DROPPED = State.ACKED, State.DROPPED


class Leases:
    """
    The messages of one subscription and their states.

    Args:
        policy: The delivery policy; may be replaced at any time.
        ack_id_prefix: Distinguishes its ack ids from those of every other subscription.
        forward: Publishes a message that used up its delivery attempts, given with their number, to the dead-letter
            topic.  Returns `False` when that topic does not exist; the message is then delivered again, as by the
            service.
    """

    def __init__(
        self, policy: DeliveryPolicy, ack_id_prefix: str, forward: Callable[[StoredMessage, int], bool]
    ) -> None:
        self.policy = policy
        self.deliveries: dict[int, Delivery] = {}
        """By message sequence, so in publish order; acked ones stay only if the policy retains them for a seek."""
        self.dispatcher = Dispatcher()
        self.timers = Timers()
        self.issued = self.acked = self.expired = self.dead_lettered = self.dropped = 0
        self._by_ack_id: dict[str, Delivery] = {}  # of each latest lease, also after that ended without an ack
        self._keys: dict[str, KeyQueue] = {}
        self._prefix = ack_id_prefix
        self._forward = forward

    def add(self, message: StoredMessage) -> None:
        """Add a published message, READY."""
        delivery = Delivery(message)
        self.deliveries[message.sequence] = delivery
        if message.ordering_key and self.policy.is_ordered:
            self._join_key(delivery)
        self.dispatcher.add(delivery)

    def lease(self, delivery: Delivery, receiver: Receiver, deadline: float) -> str:
        """READY → LEASED until clock time `deadline`; return the new ack id, which replaces the earlier one."""
        self._by_ack_id.pop(delivery.ack_id, None)
        self.issued += 1
        delivery.ack_id = ack_id = f"{self._prefix}{self.issued}"
        self._by_ack_id[ack_id] = delivery
        delivery.state = _LEASED
        delivery.receiver = receiver
        receiver.outstanding_messages += 1
        receiver.outstanding_bytes += delivery.message.size_bytes
        if delivery.key is not None:
            delivery.key.owner = receiver
            delivery.key.outstanding += 1
        self.timers.arm(delivery, deadline)
        return ack_id

    def fail(self, delivery: Delivery, at: float) -> None:
        """LEASED → READY, BACKING_OFF or DROPPED, after a nack or an expiry at clock time `at`; counts an attempt."""
        delivery.failures += 1
        limit = self.policy.max_delivery_attempts
        if 0 < limit <= delivery.failures and self._forward(delivery.message, delivery.failures):
            self.dead_lettered += 1
            self._settle(delivery, _DROPPED)
            return
        self._unlease(delivery)
        if delivery.key is not None:
            self._rewind(delivery.key, delivery)
        wait = self.policy.backoff_s(delivery.failures)
        if wait > 0:
            delivery.state = _BACKING_OFF
            self.timers.arm(delivery, at + wait)
        else:
            self.timers.disarm(delivery)
            self.make_ready(delivery)

    def make_ready(self, delivery: Delivery) -> None:
        """LEASED or BACKING_OFF → READY; the caller has disarmed the timer."""
        delivery.state = _READY
        self.dispatcher.add(delivery, is_returned=True)

    def acknowledge(self, delivery: Delivery) -> None:
        """Any state → ACKED."""
        if delivery.state is not _ACKED:
            self.acked += 1
            self._settle(delivery, _ACKED)

    def drop(self, delivery: Delivery) -> None:
        """Any state → DROPPED; the message is not forwarded to the dead-letter topic."""
        if delivery.state is not _ACKED:
            self.dropped += 1
        self._settle(delivery, _DROPPED)

    def restore(self, delivery: Delivery) -> None:
        """ACKED → READY, with delivery attempts from 1 again; the caller then calls `requeue_all`."""
        self.acked -= 1
        delivery.failures = 0
        delivery.state = _READY

    def requeue_all(self) -> None:
        """Build all queues and ordering keys anew in publish order; the unacked messages of keys become READY."""
        self.deliveries = dict(sorted(self.deliveries.items()))
        self.dispatcher.clear()
        self._keys.clear()
        for delivery in self.deliveries.values():
            delivery.key = None
            if delivery.message.ordering_key and self.policy.is_ordered and delivery.state is not _ACKED:
                self._withdraw(delivery)
                self._join_key(delivery)
            if delivery.state is _READY:
                self.dispatcher.add(delivery)

    def resolve(self, ack_ids: Sequence[str]) -> list[Delivery | None]:
        """
        Return the delivery of each ack id; `None` for an id that is no longer valid.

        Raises:
            InvalidArgumentError: An id was never issued, and the subscription is not exactly-once.  Permanent.
        """
        found = [self._by_ack_id.get(ack_id) for ack_id in ack_ids]
        if not self.policy.is_exactly_once:
            for ack_id, delivery in zip(ack_ids, found, strict=True):
                if delivery is None and not self._was_issued(ack_id):
                    raise InvalidArgumentError(f"You have passed an invalid ack ID to the service (ack_id={ack_id}).")
        return found

    def _was_issued(self, ack_id: str) -> bool:
        number = ack_id.removeprefix(self._prefix)
        return number != ack_id and number.isascii() and number.isdecimal() and 0 < int(number) <= self.issued

    def _join_key(self, delivery: Delivery) -> None:
        delivery.key = self._keys.setdefault(delivery.message.ordering_key, KeyQueue())
        delivery.key.append(delivery)

    def _unlease(self, delivery: Delivery) -> None:
        """Remove the lease from the receiver's flow control; a key whose last lease ended has no owner."""
        receiver = delivery.receiver
        if receiver is None:
            return
        delivery.receiver = None
        receiver.outstanding_messages -= 1
        receiver.outstanding_bytes -= delivery.message.size_bytes
        if receiver.is_starved:
            receiver.is_starved = False
            receiver.wake()
        key = delivery.key
        if key is not None:
            key.outstanding -= 1
            if key.outstanding == 0:
                key.owner = None

    def _withdraw(self, delivery: Delivery) -> None:
        """End the lease or backoff without counting an attempt; the ack id becomes invalid; no queue is changed."""
        self._unlease(delivery)
        self.timers.disarm(delivery)
        self._by_ack_id.pop(delivery.ack_id, None)
        delivery.ack_id = ""
        delivery.state = _READY

    def _rewind(self, key: KeyQueue, failed: Delivery) -> None:
        """Make the messages after a failed one of the same key READY again; no attempt is counted for them."""
        for later in key.rewind(failed):
            if later.state is _LEASED:
                self._withdraw(later)
            elif later.state is _ACKED and not self.policy.is_exactly_once:
                self.acked -= 1
                later.state = _READY

    def _settle(self, delivery: Delivery, state: State) -> None:
        """Any state → ACKED or DROPPED; it leaves its key's queue when all messages before it are settled too."""
        was_leased = delivery.state is _LEASED
        self._withdraw(delivery)
        delivery.state = state
        if state is _DROPPED:
            self.deliveries.pop(delivery.message.sequence, None)
        key = delivery.key
        if key is None:
            self._forget(delivery)
            return
        for settled in key.trim():
            settled.key = None
            self._forget(settled)
        if not key:
            self._keys.pop(delivery.message.ordering_key, None)
        elif key.owner is None or not was_leased:
            self.dispatcher.add_head(key)

    def _forget(self, delivery: Delivery) -> None:
        """Remove a settled message, unless acked messages are retained for a seek."""
        if not self.policy.retains_acked:
            self.deliveries.pop(delivery.message.sequence, None)
