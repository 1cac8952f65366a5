"""Request coalescing: the same message delivered again while it is worked on shares the first delivery's outcome."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator

from worker.delivery import Delivery
from worker.pipeline.shutdown import ShutdownGrace
from worker.ports import Settlement
from worker.telemetry.record import Recorder
from worker.wire.message import ReceivedMessage


class InFlightDeliveries:
    """
    A handler around another one: one delivery of a message is worked on at a time.

    Args:
        work: Settles one delivery; raises nothing but CancelledError.
        grace: How long a delivery that is told to stop still waits for the other one.
        recorder: Counts the repeats.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        work: Callable[[Delivery], Awaitable[Settlement]],
        grace: ShutdownGrace,
        recorder: Recorder,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._work = work
        self._grace = grace
        self._recorder = recorder
        self._clock = clock
        self._running: dict[str, Delivery] = {}
        self._awaited: dict[str, asyncio.Future[Settlement]] = {}
        """Outcomes that another delivery of the message waits for."""

    def __len__(self) -> int:
        return len(self._running)

    def __iter__(self) -> Iterator[Delivery]:
        return iter(list(self._running.values()))

    async def handle(self, message: ReceivedMessage) -> Settlement:
        """
        Work on the message, or wait for the delivery that is worked on already.

        Cancellation: as that of `work`; a delivery that waits for another one is settled as that one is, within the
        grace, and nacked when the grace is over first.
        """
        message_id = message.key
        first = self._running.get(message_id)
        if first is not None:
            self._recorder.duplicate("in_flight")
            return await self._join(first, message)
        delivery = Delivery(message, self._clock() if message.received_at is None else message.received_at)
        self._running[message_id] = delivery
        settlement = Settlement.NACK
        try:
            settlement = await self._work(delivery)
        finally:
            del self._running[message_id]
            outcome = self._awaited.pop(message_id, None)
            if outcome is not None:
                outcome.set_result(settlement)
        return settlement

    async def _join(self, first: Delivery, message: ReceivedMessage) -> Settlement:
        if (message.delivery_attempt or 0) > (first.message.delivery_attempt or 0):
            first.message = message  # the last permitted attempt may be this one
        outcome = self._awaited.get(message.key)
        if outcome is None:
            outcome = self._awaited[message.key] = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait({outcome})
        except asyncio.CancelledError:
            await self._grace.wait(outcome)
        return outcome.result() if outcome.done() else Settlement.NACK
