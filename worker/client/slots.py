"""
The bound of unanswered lines: by number and by bytes, so that neither many lines nor large ones fill the memory.

Their bytes stand in the broker, in the worker and in the publisher's batches until they are answered; with the embedded
broker all of that is one machine.
"""

import asyncio


class Slots:
    """
    Counts lines in and out; one task enters, any leaves.

    Args:
        limit: Lines inside at once, at least 1.
        limit_bytes: Their bytes together; a single larger line still enters when nothing else is inside.
    """

    def __init__(self, limit: int, limit_bytes: int) -> None:
        if limit < 1:
            raise ValueError("the window must be at least 1")
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._changed = asyncio.Event()
        self.count = 0
        self.bytes = 0

    async def enter(self, size: int) -> None:
        """Wait for room and take it.  Cancellation: nothing is taken."""
        while self.count and (self.count >= self._limit or self.bytes + size > self._limit_bytes):
            self._changed.clear()
            await self._changed.wait()
        self.count += 1
        self.bytes += size

    def leave(self, size: int) -> None:
        """Give room back."""
        self.count -= 1
        self.bytes -= size
        self._changed.set()

    async def empty(self) -> None:
        """Wait until nothing is inside.  Cancellation: leaves nothing behind."""
        while self.count:
            self._changed.clear()
            await self._changed.wait()
