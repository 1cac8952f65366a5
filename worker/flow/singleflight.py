"""
One piece of work for each key at a time; whoever comes second gets the first one's outcome.

A broker that delivers at least once may deliver a message again while it is being worked on.  The second delivery must
not cost a second inference: it joins, and both are settled by the one outcome.

The work runs in a task of its own that nobody owns alone.  A caller that is cancelled only leaves; the others keep
waiting and the work goes on.  When the last caller is cancelled the work is cancelled too, and that caller waits for
its end: nothing runs on unobserved.  So the leader needs no successor: leading means nothing but having been first.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(slots=True, eq=False)
class _Flight(Generic[V]):
    task: "asyncio.Task[V]"
    callers: int = 0


class SingleFlight(Generic[K, V]):
    """Runs at most one piece of work for each key at a time; forgets the key when it ends."""

    def __init__(self) -> None:
        self._flights: dict[K, _Flight[V]] = {}

    def __len__(self) -> int:
        """Return the number of keys in flight."""
        return len(self._flights)

    def __contains__(self, key: K) -> bool:
        return key in self._flights

    async def run(self, key: K, work: Callable[[], Awaitable[V]]) -> tuple[V, bool]:
        """
        Return the outcome of the work under way for `key`, starting `work` if there is none.

        Args:
            key: What must not be done twice at a time.
            work: Called once, without arguments, if nothing is in flight for the key.

        Returns:
            The outcome, and whether this call joined the work of another.

        Raises:
            Exception: What the work raised; every caller gets the same object.
            asyncio.CancelledError: The caller was cancelled, or the work was by something else than its callers.

        Cancellation: see the module.  A caller that comes while the work is being cancelled waits for its end, takes
        the outcome if it finished all the same, and starts anew otherwise.
        """
        while (flight := self._flights.get(key)) is not None and flight.task.cancelling():
            await asyncio.wait([flight.task])
            if not flight.task.cancelled():
                return flight.task.result(), True
        joined = flight is not None
        if flight is None:
            flight = self._flights[key] = _Flight(asyncio.ensure_future(_call(work)))
            flight.task.add_done_callback(lambda task: self._landed(key, task))
        flight.callers += 1
        try:
            return await asyncio.shield(flight.task), joined
        except asyncio.CancelledError:
            if flight.callers == 1 and not flight.task.done():
                flight.task.cancel()
                await asyncio.wait([flight.task])
            raise
        finally:
            flight.callers -= 1

    def _landed(self, key: K, task: "asyncio.Task[V]") -> None:
        flight = self._flights.get(key)
        if flight is not None and flight.task is task:
            del self._flights[key]
        if not task.cancelled():
            task.exception()  # Retrieved: when every caller has left, nobody is there to be told.


async def _call(work: Callable[[], Awaitable[V]]) -> V:
    return await work()
