"""Several subscriptions as one."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.virtual_time import settle, virtual_time
from worker.brokers.group import SubscriberGroup
from worker.errors import BrokerResourceError
from worker.flow.shares import MAX_EXTRA
from worker.ports import Handler, Settlement
from worker.wire.message import ReceivedMessage


class Member:
    """A subscription that runs until it is drained or fails."""

    def __init__(self, source: str, max_in_flight: int = 10) -> None:
        self.source = source
        self.max_in_flight = max_in_flight
        self.is_open = False
        self.extra = 0
        self.graces: list[float] = []
        self._ends: asyncio.Future[None] | None = None
        self._on_stopped: Callable[[], None] | None = None

    async def run(self, handler: Handler, on_stopped: Callable[[], None] | None = None) -> None:
        self.is_open, self._on_stopped = True, on_stopped
        self._ends = asyncio.get_running_loop().create_future()
        await handler(ReceivedMessage(message_id="1", data=b"", source=self.source))
        try:
            await self._ends
        finally:
            self.is_open = False

    def fail(self) -> None:
        assert self._ends is not None
        self._ends.set_exception(BrokerResourceError(f"{self.source} is gone"))

    async def drain(self, grace_s: float) -> None:
        self.graces.append(grace_s)
        if self._ends is not None and self._on_stopped is not None:
            self._on_stopped()
            self._on_stopped = None
            if not self._ends.done():
                self._ends.set_result(None)

    def allow_extra(self, messages: int) -> None:
        self.extra = messages

    async def max_delivery_attempts(self, source: str = "") -> int | None:
        return len(self.source)


def a_group(*members: Member) -> SubscriberGroup:
    several: Any = members
    return SubscriberGroup(several)


class Handled:
    """Which messages came."""

    def __init__(self) -> None:
        self.keys: list[str] = []

    async def __call__(self, message: ReceivedMessage) -> Settlement:
        self.keys.append(message.key)
        return Settlement.ACK


@virtual_time
async def test_messages_of_all_are_handled_until_all_are_drained() -> None:
    """Ids of two topics may be the same, keys are not; the end of the pull is told once, of all of them."""
    one, two = Member("one"), Member("two")
    group, handled, stopped = a_group(one, two), Handled(), []
    running = asyncio.ensure_future(group.run(handled, lambda: stopped.append(1)))
    await settle()
    assert handled.keys == ["one-1", "two-1"]
    assert group.is_open
    await group.drain(7.0)
    await running
    assert (one.graces, two.graces, stopped, group.is_open) == ([7.0], [7.0], [1], False)


@virtual_time
async def test_one_that_is_gone_ends_the_run_and_the_others_wait_for_the_drain() -> None:
    """What runs there is finished within the grace, as with a single subscription."""
    one, two = Member("one"), Member("two")
    group = a_group(one, two)
    running = asyncio.ensure_future(group.run(Handled()))
    await settle()
    one.fail()
    with pytest.raises(BrokerResourceError, match="one is gone"):
        await running
    assert two.is_open
    assert not group.is_open
    await group.drain(1.0)
    assert not two.is_open


@virtual_time
async def test_cancellation_drains_all() -> None:
    """Without grace."""
    one, two = Member("one"), Member("two")
    running = asyncio.ensure_future(a_group(one, two).run(Handled()))
    await settle()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert (one.graces, two.graces) == ([0], [0])


@virtual_time
async def test_extra_leases_are_bounded_by_each_subscriptions_own_limit() -> None:
    """A small one must not lease thousands because a large one waits; each has its own number of attempts."""
    small, large = Member("small", 1), Member("large", 100)
    group = a_group(small, large)
    group.allow_extra(50)
    assert (small.extra, large.extra) == (MAX_EXTRA, 50)
    assert await group.max_delivery_attempts("small") == 5
