"""
Who gets which message next.

Every READY delivery that may go out stands in one of three places: `backlog` (published, never delivered), `returned`
(came back after a nack, an expiry or a backoff), or `parked` at the receiver that holds its ordering key.  `returned`
and `backlog` are served in turn, so a redelivery never waits behind the backlog and a message that always fails never
starves it.  Of an ordering key only the head stands anywhere.

An entry may be out of date (acked meanwhile, no longer the head): it is checked when it comes up, not removed when it
goes stale, which keeps acks cheap.  Receivers share what is ready: a take gets its part, rounded up, so that the first
of several to wake does not empty the queue; the next take of whoever asks gets the rest.
"""

from collections import deque
from collections.abc import Iterator

from worker.emulators.pubsub.deliveries import Delivery, KeyQueue, Receiver, State
from worker.emulators.pubsub.errors import PubSubError

_READY = State.READY


class Dispatcher:
    """The ready queues and the receivers of one subscription; grants no leases itself."""

    def __init__(self) -> None:
        self._backlog: deque[Delivery] = deque()
        self._returned: deque[Delivery] = deque()
        self._receivers: dict[Receiver, None] = {}  # in order of their last take, longest ago first
        self._serves_returned = True
        self._has_news = False

    def attach(self, receiver: Receiver) -> None:
        """Add a receiver."""
        self._receivers[receiver] = None

    def detach(self, receiver: Receiver) -> None:
        """Remove a receiver; its leases run on, and its ordering keys stay with it until they end."""
        self._receivers.pop(receiver, None)

    def close(self, error: PubSubError) -> None:
        """Tell every receiver why it gets nothing more."""
        for receiver in self._receivers:
            receiver.close(error)

    @property
    def receiver_count(self) -> int:
        """Number of receivers."""
        return len(self._receivers)

    def add(self, delivery: Delivery, *, is_returned: bool = False) -> None:
        """Queue a READY delivery where it belongs; one behind the head of its ordering key waits for the head."""
        key = delivery.key
        if key is not None:
            if key.head() is not delivery:
                return
            if key.owner is not None:
                key.owner.parked.append(delivery)
                key.owner.wake()
                return
        (self._returned if is_returned else self._backlog).append(delivery)
        self._has_news = True

    def add_head(self, key: KeyQueue) -> None:
        """Queue the head of a key that may have changed, or lost its owner."""
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
        """Wake the receivers with room, if anything was queued since the last call."""
        if self._has_news:
            self._has_news = False
            for receiver in self._receivers:
                if receiver.has_room():
                    receiver.wake()

    def batch(self, receiver: Receiver, max_messages: int, max_bytes: int) -> Iterator[Delivery]:
        """
        Yield what this receiver gets now; the caller leases each delivery before it asks for the next.

        Args:
            receiver: Who asks; its flow control holds as well.
            max_messages: At most so many.
            max_bytes: Sum of message sizes not to be exceeded, except by a first message that is larger alone.
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
            if not self._may_go(delivery, receiver):
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
        """Put a receiver that was served to the end of the line."""
        if receiver in self._receivers:
            del self._receivers[receiver]
            self._receivers[receiver] = None

    def _next_queue(self) -> deque[Delivery]:
        """Return the queue whose turn it is, possibly empty when both are."""
        if self._returned and (self._serves_returned or not self._backlog):
            self._serves_returned = False
            return self._returned
        self._serves_returned = True
        return self._backlog

    def _share(self) -> int:
        """Return how much of what is ready one receiver gets: an equal part for each that has room, rounded up."""
        ready = len(self._backlog) + len(self._returned)
        hungry = sum(1 for receiver in self._receivers if receiver.has_room()) if len(self._receivers) > 1 else 1
        return -(-ready // max(1, hungry))

    def _may_go(self, delivery: Delivery, receiver: Receiver) -> bool:
        """Tell whether a queued entry is still true; pass the head of somebody else's key on to its owner."""
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
        """Let the receiver that just got a message of a key get the next one as well."""
        key.advance()
        head = key.head()
        if head is not None and head.state is _READY:
            receiver.parked.appendleft(head)
