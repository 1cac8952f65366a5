"""
Which receiver gets which message next.

Every READY delivery that may be sent is in one of three queues: `backlog` (published, never delivered), `returned`
(ready again after a nack, an expiry or a backoff), or `parked` of the receiver that owns its ordering key.  `returned`
and `backlog` are served in turn, so that a redelivery never waits behind the backlog and a message that always fails
never blocks it.  Of an ordering key only the head is in a queue.

An entry may be out of date (acked meanwhile, or no longer the head): it is checked when it reaches the front of its
queue instead of being removed at once, which keeps acks cheap.  Receivers share the ready messages: a take gets an
equal part, rounded up, so that the first receiver to wake does not empty the queue; later takes get the rest.
"""

from collections import deque
from collections.abc import Iterator

from worker.emulators.pubsub.deliveries import Delivery, KeyQueue, Receiver, State
from worker.emulators.pubsub.errors import PubSubError

_READY = State.READY


class Dispatcher:
    """The ready queues and the receivers of one subscription; `Leases` grants the leases."""

    def __init__(self) -> None:
        self._backlog: deque[Delivery] = deque()
        self._returned: deque[Delivery] = deque()
        self._receivers: dict[Receiver, None] = {}  # in order of their last take, longest ago first
        self._serves_returned = True
        self._was_added = False  # since the last call of `wake`

    def attach(self, receiver: Receiver) -> None:
        """Add a receiver."""
        self._receivers[receiver] = None

    def detach(self, receiver: Receiver) -> None:
        """Remove a receiver; its leases run on, and it owns its ordering keys until they end."""
        self._receivers.pop(receiver, None)

    def close(self, error: PubSubError) -> None:
        """Tell every receiver why it gets no more messages."""
        for receiver in self._receivers:
            receiver.close(error)

    @property
    def receiver_count(self) -> int:
        """Number of receivers."""
        return len(self._receivers)

    def add(self, delivery: Delivery, *, is_returned: bool = False) -> None:
        """Add a READY delivery to its queue, unless it waits behind the head of its ordering key."""
        key = delivery.key
        if key is not None:
            if key.head() is not delivery:
                return
            if key.owner is not None:
                key.owner.parked.append(delivery)
                key.owner.wake()
                return
        (self._returned if is_returned else self._backlog).append(delivery)
        self._was_added = True

    def add_head(self, key: KeyQueue) -> None:
        """Add the head of an ordering key to its queue, after the head or the owner changed."""
        head = key.head()
        if head is not None and head.state is _READY:
            self.add(head, is_returned=True)

    def clear(self) -> None:
        """Empty all queues; receivers stay."""
        self._backlog.clear()
        self._returned.clear()
        for receiver in self._receivers:
            receiver.parked.clear()

    def wake(self) -> None:
        """Wake the receivers that have room, if a message was added since the last call."""
        if self._was_added:
            self._was_added = False
            for receiver in self._receivers:
                if receiver.has_room():
                    receiver.wake()

    def batch(self, receiver: Receiver, max_messages: int, max_bytes: int) -> Iterator[Delivery]:
        """
        Yield the deliveries this receiver gets now; the caller leases each one before it asks for the next.

        Args:
            receiver: The receiver; its flow control applies as well.
            max_messages: Largest number of messages.
            max_bytes: Largest sum of message sizes; a first message that is larger than this is yielded alone.
        """
        share = self._share()
        size = 0
        while max_messages > 0:
            if not receiver.has_room():
                receiver.is_starved = True
                return
            queue = receiver.parked or (self._next_queue() if share > 0 else None)
            if not queue:
                return
            delivery = queue[0]
            if not self._may_lease(delivery, receiver):
                queue.popleft()
                continue
            message_size = delivery.message.size_bytes
            if size and size + message_size > max_bytes:
                return
            queue.popleft()
            size += message_size
            max_messages -= 1
            if queue is not receiver.parked:
                share -= 1
            yield delivery
            if delivery.key is not None:
                self._park_next(delivery.key, receiver)

    def rotate(self, receiver: Receiver) -> None:
        """Move a receiver that got messages to the end of the order."""
        if receiver in self._receivers:
            del self._receivers[receiver]
            self._receivers[receiver] = None

    def _next_queue(self) -> deque[Delivery]:
        """Return the queue whose turn it is; it is empty only when both are."""
        if self._returned and (self._serves_returned or not self._backlog):
            self._serves_returned = False
            return self._returned
        self._serves_returned = True
        return self._backlog

    def _share(self) -> int:
        """Return how many of the ready messages one receiver gets: an equal part for each that has room, rounded up."""
        ready = len(self._backlog) + len(self._returned)
        sharing = sum(1 for receiver in self._receivers if receiver.has_room()) if len(self._receivers) > 1 else 1
        return -(-ready // max(1, sharing))

    def _may_lease(self, delivery: Delivery, receiver: Receiver) -> bool:
        """Tell whether the receiver may lease a queued delivery; the head of a key with another owner moves to that."""
        if delivery.state is not _READY:
            return False
        key = delivery.key
        if key is None:
            return True
        if key.head() is not delivery:
            return False
        if key.owner is None or key.owner is receiver:
            return True
        key.owner.parked.append(delivery)
        key.owner.wake()
        return False

    def _park_next(self, key: KeyQueue, receiver: Receiver) -> None:
        """Park the next message of a key at the receiver that just leased one, which owns the key now."""
        key.advance()
        head = key.head()
        if head is not None and head.state is _READY:
            receiver.parked.appendleft(head)
