"""
The limits of one attempt: first sign of an answer, silence, total.

A limit moves with every sign of life, a thousand times in a long stream.  So moving it only writes down a number; the
loop's one timer fires when the shortest of the limits might have passed, looks, and is set anew if none has.
"""

import asyncio
from types import TracebackType
from typing import Self

from worker.policy.model import Fault
from worker.settings.schema import TimeoutSettings


class AttemptTimer:
    """
    The limits of one attempt behind one `asyncio.Timeout`.

    Use it as `async with timer`; whichever limit passes first ends that with TimeoutError, and `fault` says which it
    was.  Must be made on the event loop; single use.

    Args:
        settings: The limits.
        limit_s: For the whole attempt, in place of `settings.total_s`.
    """

    def __init__(self, settings: TimeoutSettings, limit_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._now = self._loop.time
        self._first_byte_s = settings.first_byte_s
        self._idle_s = settings.idle_s
        self._ends = self._now() + limit_s
        self._kind = Fault.FIRST_BYTE_TIMEOUT
        self._at: float | None = self._ends
        self._timeout = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        # Not later than any limit that may be set soon: then moving one needs no timer.
        now = self._now()
        self._set_timer(min(self._ends, now + self._idle_s, now + (self._first_byte_s or self._idle_s)))
        self.await_first_byte()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        await self._timeout.__aexit__(kind, error, trace)

    @property
    def fault(self) -> Fault:
        """Which limit it is that stands next; after a TimeoutError, the one that has passed."""
        return Fault.TOTAL_TIMEOUT if self._at == self._ends else self._kind

    def await_first_byte(self) -> None:
        """Start to wait for the first sign of an answer."""
        self._move(Fault.FIRST_BYTE_TIMEOUT, self._first_byte_s)

    def restart_idle(self) -> None:
        """Start to wait for the next sign of life."""
        self._move(Fault.IDLE_TIMEOUT, self._idle_s)

    def stop(self) -> None:
        """Wait no longer for anything: the answer is there."""
        self._at = None

    def _move(self, kind: Fault, after_s: float | None) -> None:
        now = self._now()
        if self._at is not None and now > self._at:
            return  # it has passed: no sign of life takes that back, however fast they come
        at = self._ends
        if after_s is not None and now + after_s < at:
            at = now + after_s
        self._kind, self._at = kind, at
        if self._timer is None:  # it has fired: nothing was waited for, or the sign of life came just in time
            self._timeout.reschedule(None)
            self._set_timer(at)
        elif at < self._timer_at:
            self._timer.cancel()
            self._set_timer(at)

    def _set_timer(self, at: float) -> None:
        self._timer_at = at
        self._timer = self._loop.call_at(at, self._look)

    def _look(self) -> None:
        """End the attempt if its limit has passed; it may have moved since the timer was set, or the loop be early."""
        self._timer = None
        if self._at is None:
            return
        if self._now() < self._at:
            self._set_timer(self._at)
        else:
            self._timeout.reschedule(self._at)
