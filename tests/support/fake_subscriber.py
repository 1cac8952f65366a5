"""A small working subscription with a dead-letter policy, without a network; see `worker.ports.Subscriber`."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from tests.support.virtual_time import unix_time
from worker.policy.backoff import Backoff
from worker.ports import Handler, Settlement
from worker.wire.message import ReceivedMessage


class FakeSubscriber:
    """
    A subscription with a dead-letter policy; see `worker.ports.Subscriber`.

    Args:
        max_in_flight: Handlers at once.
        max_attempts: Deliveries of one message; what is nacked once more goes to `dead`.  `None`: no policy.
        backoff_s: Wait before the first redelivery, in the loop's time; doubles with each.
        max_backoff_s: Longest wait before a redelivery; `None`: every wait is `backoff_s`.
    """

    def __init__(
        self,
        *,
        max_in_flight: int = 100,
        max_attempts: int | None = None,
        backoff_s: float = 1.0,
        max_backoff_s: float | None = None,
    ) -> None:
        self.max_attempts = max_attempts
        self.settlements: list[tuple[str, int, Settlement]] = []
        """Message id, delivery attempt from 1, verdict; in the order of settling."""
        self.dead: list[str] = []
        self.in_flight = self.peak = 0
        self._backoff = Backoff(base_s=backoff_s, max_s=max_backoff_s or backoff_s, jitter=0.0)
        self._slots = asyncio.Semaphore(max_in_flight)
        self._inbox: asyncio.Queue[tuple[ReceivedMessage, int]] = asyncio.Queue()
        self._ids = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._timers: set[asyncio.TimerHandle] = set()
        self._stopping = asyncio.Event()
        self._over = asyncio.Event()
        self._drained = asyncio.Event()

    def publish(self, data: bytes, attributes: Mapping[str, str] | None = None) -> str:
        """Put a message on the subscription; return its id."""
        message_id = f"m{next(self._ids)}"
        message = ReceivedMessage(
            message_id=message_id, data=data, attributes=dict(attributes or {}), publish_time=unix_time()
        )
        self.deliver(message, 1)
        return message_id

    def deliver(self, message: ReceivedMessage, attempt: int) -> None:
        """Deliver a message, again if it is on its way already: brokers deliver at least once."""
        self._inbox.put_nowait((message, attempt))

    async def run(self, handler: Handler) -> None:
        pulling = asyncio.ensure_future(self._pull(handler))
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await stopping
        finally:
            for task in (pulling, stopping):
                task.cancel()
            await asyncio.gather(pulling, stopping, return_exceptions=True)
            if not self._stopping.is_set():  # cancelled
                await self.drain(0)
        await self._drained.wait()

    async def _pull(self, handler: Handler) -> None:
        while True:
            await self._slots.acquire()
            message, attempt = await self._inbox.get()
            task = asyncio.ensure_future(self._deliver(handler, message, attempt))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _deliver(self, handler: Handler, message: ReceivedMessage, attempt: int) -> None:
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        counted = attempt if self.max_attempts is not None else None
        try:
            verdict = await handler(replace(message, delivery_attempt=counted))
        except asyncio.CancelledError:
            verdict = Settlement.NACK
        self.in_flight -= 1
        self._slots.release()
        self.settlements.append((message.message_id, attempt, verdict))
        if verdict is Settlement.NACK and not self._stopping.is_set():
            self._redeliver(message, attempt + 1)

    def _redeliver(self, message: ReceivedMessage, attempt: int) -> None:
        if self.max_attempts is not None and attempt > self.max_attempts:
            self.dead.append(message.message_id)
            return
        delay_s = self._backoff.ceiling_s(attempt - 1)
        timer = asyncio.get_running_loop().call_later(delay_s, self.deliver, message, attempt)
        self._timers.add(timer)

    async def drain(self, grace_s: float) -> None:
        self._stopping.set()
        for timer in self._timers:
            timer.cancel()
        asyncio.get_running_loop().call_later(grace_s, self._over.set)
        settled = asyncio.ensure_future(self._settled())
        over = asyncio.ensure_future(self._over.wait())
        await asyncio.wait({settled, over}, return_when=asyncio.FIRST_COMPLETED)
        over.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(settled, over, return_exceptions=True)
        self._drained.set()

    async def _settled(self) -> None:
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    async def max_delivery_attempts(self) -> int | None:
        return self.max_attempts

    def count(self, settlement: Settlement) -> Counter[str]:
        """Return how often each message was settled so."""
        return Counter(message_id for message_id, _, verdict in self.settlements if verdict is settlement)
