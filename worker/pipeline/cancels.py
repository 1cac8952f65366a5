"""
What was cancelled: remembered for a while, since a cancelled request may still stand in the queue.

Every worker hears every control message, so each knows by itself which of the messages that come are not wanted any
more.  Pure; the processor ends what is under way.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable

from worker.wire.control import CancelRequest
from worker.wire.message import ReceivedMessage

MAX_IDS = 100_000
"""Cancelled ids that are remembered; what was cancelled first is forgotten first."""
MAX_SETS = 1_000
"""The same for sets of attributes: each is compared with every message."""


class Cancels:
    """
    The cancelled requests.

    Args:
        remember_s: How long a cancellation is remembered; as long as messages may stay in the queue.
        wall_clock: Unix seconds.
    """

    def __init__(self, remember_s: float, wall_clock: Callable[[], float] = time.time) -> None:
        self._remember_s = remember_s
        self._wall_clock = wall_clock
        self._ids: OrderedDict[str, float] = OrderedDict()
        """Until when each is remembered, in the order in which they came."""
        self._sets: deque[tuple[float, CancelRequest]] = deque(maxlen=MAX_SETS)

    def add(self, request: CancelRequest) -> None:
        """Remember a cancellation."""
        now = self._wall_clock()
        until = now + self._remember_s
        for message_id in request.message_ids:
            self._ids[message_id] = until
            self._ids.move_to_end(message_id)
        while self._ids and (len(self._ids) > MAX_IDS or next(iter(self._ids.values())) <= now):
            self._ids.popitem(last=False)
        if request.attributes:
            self._sets.append((until, request))

    def covers(self, message: ReceivedMessage) -> bool:
        """Whether a message was cancelled."""
        if not self._ids and not self._sets:
            return False
        now = self._wall_clock()
        while self._sets and self._sets[0][0] <= now:
            self._sets.popleft()
        if self._ids.get(message.message_id, 0.0) > now:
            return True
        return any(_means(request, message) for _, request in self._sets)


def _means(request: CancelRequest, message: ReceivedMessage) -> bool:
    """Say whether a message is meant by its attributes."""
    if message.publish_time > request.published_at:
        return False
    return all(message.attributes.get(name) == value for name, value in request.attributes.items())
