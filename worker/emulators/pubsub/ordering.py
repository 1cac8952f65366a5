"""
The queue of one ordering key within one subscription.

Messages of a key are delivered in publish order.  Several may be out at once, all with the same receiver (`owner`), so
what is out is always a run of the queue that ends at `cursor`.  When one of them comes back, the cursor returns to it
and everything behind it is delivered again after it, messages acked meanwhile included; only exactly-once delivery
keeps those acks.  A receiver that goes away keeps the key until its leases end, and no longer.

The queue only knows positions.  Leases, acks and timers are `subscription`'s.

Source: https://cloud.google.com/pubsub/docs/ordering
"""

from collections import deque
from collections.abc import Iterator

from worker.emulators.pubsub.deliveries import Consumer, Delivery, State

_SETTLED = frozenset({State.ACKED, State.DROPPED})


class KeyQueue:
    """Unsettled messages of one ordering key, and the settled ones between them."""

    __slots__ = ("_base", "_cursor", "_items", "outstanding", "owner")

    def __init__(self) -> None:
        self._items: deque[Delivery] = deque()
        self._base = 0  # position of the first item
        self._cursor = 0  # position of the next item to deliver
        self.outstanding = 0
        """Leases on messages of this key."""
        self.owner: Consumer | None = None
        """Who holds them; nobody else gets the key meanwhile."""

    def __bool__(self) -> bool:
        """Tell whether the queue holds anything."""
        return bool(self._items)

    def append(self, delivery: Delivery) -> None:
        """Add the newest message of the key."""
        delivery.position = self._base + len(self._items)
        self._items.append(delivery)

    def head(self) -> Delivery | None:
        """Return the next message to deliver, whether or not it may go out now; `None` when all are out."""
        while self._cursor < self._base + len(self._items):
            item = self._items[self._cursor - self._base]
            if item.state not in _SETTLED:
                return item
            self._cursor += 1
        return None

    def advance(self) -> None:
        """Note that the head went out."""
        self._cursor += 1

    def rewind(self, delivery: Delivery) -> Iterator[Delivery]:
        """Make a message that was out the head again; yield, in order, every later one that had gone out."""
        end = min(self._cursor, self._base + len(self._items))
        self._cursor = min(self._cursor, delivery.position)
        for position in range(delivery.position + 1, end):
            yield self._items[position - self._base]

    def trim(self) -> Iterator[Delivery]:
        """Take settled messages off the front, and yield them: nothing before them can come back any more."""
        while self._items and self._items[0].state in _SETTLED:
            self._base += 1
            yield self._items.popleft()
