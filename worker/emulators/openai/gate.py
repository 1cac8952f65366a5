"""
How many requests are served at once, and who waits.

First come, first served.  The limit may change while requests wait; lowering it stops nobody who is already in.
"""

import asyncio
from collections import deque


class Gate:
    """Slots for requests in service; one event loop."""

    def __init__(self, limit: int | None = None) -> None:
        """Allow `limit` requests at once; None is no limit."""
        self._limit = limit
        self._queue: deque[asyncio.Future[None]] = deque()
        self.in_service = 0

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._queue)

    @property
    def has_room(self) -> bool:
        """Whether a request could enter at once without overtaking one that waits."""
        return self._limit is None or (self.in_service < self._limit and not self._queue)

    def set_limit(self, limit: int | None) -> None:
        """Change the limit; a higher one lets waiting requests in."""
        self._limit = limit
        self._admit()

    def _admit(self) -> None:
        while self._queue and (self._limit is None or self.in_service < self._limit):
            future = self._queue.popleft()
            if not future.done():
                self.in_service += 1
                future.set_result(None)

    async def enter(self) -> None:
        """
        Wait for a slot and take it; call `leave` once for it.

        Cancellation: no slot is kept, even if it was granted at the same moment.
        """
        if self.has_room:
            self.in_service += 1
            return
        future = asyncio.get_running_loop().create_future()
        self._queue.append(future)
        try:
            await future
        except asyncio.CancelledError:
            if future in self._queue:
                self._queue.remove(future)
            if future.done() and not future.cancelled():
                self.leave()
            raise

    def leave(self) -> None:
        """Give a slot back; the request that has waited longest gets it."""
        self.in_service -= 1
        self._admit()
