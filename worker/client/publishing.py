"""What `submit` and `local` do alike when they publish: bound what is on its way, and repeat what fails."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

from worker.errors import PayloadError, PublishRetryableError
from worker.policy.backoff import Backoff

PUBLISH_BACKOFF = Backoff(base_s=0.1, max_s=10.0)
"""Between publishes of one line: short at first, since most failures are short; at most 10 s, so that a run notices a
recovery soon."""
PATIENCE_S = 600.0
"""How long the publish of one line is repeated before the run ends with the broker's error."""
STORAGE_AWAY = "payload_unavailable"
"""The fault of object storage that passes by itself."""


class LineWindow:
    """
    Bounds the unanswered lines, by number and by bytes.

    A line's bytes stand in the broker, in the worker and in the publisher's batches until it is answered; with the
    embedded broker all of these are on one machine.  One task enters, any task leaves.

    Args:
        limit: Lines inside at once, at least 1.
        limit_bytes: Their bytes together; a single larger line enters only when nothing else is inside.
    """

    def __init__(self, limit: int, limit_bytes: int) -> None:
        if limit < 1:
            raise ValueError("the window must be at least 1")
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._changed = asyncio.Event()
        self.count = 0
        self.bytes = 0

    def has_room(self, size: int) -> bool:
        """Whether a line of `size` bytes may enter now."""
        return not self.count or (self.count < self._limit and self.bytes + size <= self._limit_bytes)

    async def enter(self, size: int) -> None:
        """Wait for room for `size` bytes and take it.  Cancellation: takes nothing."""
        while not self.has_room(size):
            self._changed.clear()
            await self._changed.wait()
        self.count += 1
        self.bytes += size

    def leave(self, size: int) -> None:
        """Release the room of a line of `size` bytes."""
        self.count -= 1
        self.bytes -= size
        self._changed.set()

    async def wait_until_empty(self) -> None:
        """Wait until no line is inside.  Cancellation: leaves nothing behind."""
        while self.count:
            self._changed.clear()
            await self._changed.wait()


class Repetition:
    """
    Does a step until it succeeds.

    Args:
        patience_s: How long a step is repeated.
        clock: Monotonic seconds.
        sleep: Waits.
    """

    def __init__(
        self,
        *,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._patience_s = patience_s
        self._clock = clock
        self._sleep = sleep
        self._rng = random.Random()  # noqa: S311 - jitter
        self.count = 0
        """Tries that failed and were repeated, of all steps."""
        self.reason = ""
        """Why the last one failed."""

    async def until_done(
        self, step: Callable[[], Awaitable[str]], *, is_over: Callable[[], bool] = lambda: False
    ) -> str | None:
        """
        Return what the step returns.

        Args:
            step: Fails with a `PublishError` or `PayloadError`.
            is_over: The result is not needed any more: returns `None`, without another try.

        Raises:
            PublishRetryableError: It failed for `patience_s`.
            PayloadError: As above, or storage refuses it.
            WorkerError: What else the step raises.

        Cancellation: as of the step.
        """
        began, failures = self._clock(), 0
        while not is_over():
            try:
                return await step()
            except (PublishRetryableError, PayloadError) as error:
                is_final = isinstance(error, PayloadError) and error.fault != STORAGE_AWAY
                if is_final or self._clock() - began >= self._patience_s:
                    raise
                self.count += 1
                self.reason = str(error)
                failures += 1
                await self._sleep(PUBLISH_BACKOFF.delay_s(failures, self._rng.random()))
        return None
