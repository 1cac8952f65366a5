"""
Several subscriptions as one: what a worker pulls from when its settings name more than one.

Each keeps its own stream, leases and limits; the processor gets the messages of all of them.  When one of them is gone
or refused, the worker stops as it does with a single one: what runs is finished first.
"""

import asyncio
from collections.abc import Callable, Sequence

from worker.brokers.subscriber import PubSubSubscriber
from worker.flow.shares import MAX_EXTRA
from worker.ports import Handler


class SubscriberGroup:
    """
    Subscriptions that are run together; see `worker.ports.Subscriber` for the contract.

    Args:
        members: At least one; all with different sources.
    """

    def __init__(self, members: Sequence[PubSubSubscriber]) -> None:
        self._members = {member.source: member for member in members}
        self._runs: list[asyncio.Task[None]] = []
        self._pulling = len(members)
        self._on_stopped: Callable[[], None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether messages are being pulled from every one of them."""
        return all(member.is_open for member in self._members.values())

    async def run(self, handler: Handler, on_stopped: Callable[[], None] | None = None) -> None:
        """
        Deliver until drained; see `worker.ports.Subscriber.run`.

        When one subscription fails the others go on until `drain`, whose caller knows of it by the exception.

        Cancellation: drains without grace first.
        """
        self._on_stopped = on_stopped
        loop = asyncio.get_running_loop()
        self._runs = [loop.create_task(member.run(handler, self._stopped)) for member in self._members.values()]
        try:
            done, _ = await asyncio.wait(self._runs, return_when=asyncio.FIRST_EXCEPTION)
        except asyncio.CancelledError:
            await self.drain(0)
            raise
        for run in done:
            await run  # raises what it failed with

    def _stopped(self) -> None:
        """Take note that one of them is pulled from no longer; what is nacked comes back from none once all are."""
        self._pulling -= 1
        if self._pulling == 0 and self._on_stopped is not None:
            self._on_stopped()

    async def drain(self, grace_s: float) -> None:
        """
        Stop all of them; see `worker.ports.Subscriber.drain`.

        Cancellation: the drains go on; only this wait for their end is given up.
        """
        await asyncio.gather(*(member.drain(grace_s) for member in self._members.values()))
        await asyncio.gather(*self._runs, return_exceptions=True)  # `run` has raised what one failed with

    def allow_extra(self, messages: int) -> None:
        """Let each of them lease so many more, within its own bound; see `worker.ports.Subscriber.allow_extra`."""
        for member in self._members.values():
            member.allow_extra(min(messages, member.max_in_flight * MAX_EXTRA))

    async def max_delivery_attempts(self, source: str = "") -> int | None:
        """
        Return the limit of one of them; see `worker.ports.Subscriber.max_delivery_attempts`.

        Cancellation: leaves nothing behind.
        """
        return await self._members[source].max_delivery_attempts()
