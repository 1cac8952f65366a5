"""Deliveries under way, by message: the same message in flight twice is worked on once."""

import asyncio
from dataclasses import dataclass

from worker.delivery import Delivery
from worker.pipeline.shutdown import Finisher
from worker.ports import Settlement
from worker.wire.message import ReceivedMessage


@dataclass(slots=True, eq=False)
class Flight:
    """A delivery under way, and what its message's other deliveries wait for."""

    delivery: Delivery
    outcome: "asyncio.Future[Settlement]"


class Flights:
    """
    What is under way.

    Args:
        finisher: How long a delivery that is told to stop still waits for the other one.
    """

    def __init__(self, finisher: Finisher) -> None:
        self._finisher = finisher
        self._running: dict[str, Flight] = {}

    def find(self, message: ReceivedMessage) -> Flight | None:
        """Return the flight of a message's other delivery."""
        return self._running.get(message.message_id)

    def begin(self, delivery: Delivery) -> None:
        """Let later deliveries of its message find this one."""
        outcome: asyncio.Future[Settlement] = asyncio.get_running_loop().create_future()
        self._running[delivery.message.message_id] = Flight(delivery, outcome)

    def end(self, delivery: Delivery, settlement: Settlement) -> None:
        """Tell who waits."""
        self._running.pop(delivery.message.message_id).outcome.set_result(settlement)

    async def join(self, flight: Flight, message: ReceivedMessage) -> Settlement:
        """
        Share the outcome of the delivery under way.

        Cancellation: the other one is told to stop too; its outcome is waited for as long as it may take to finish.
        """
        if (message.delivery_attempt or 0) > (flight.delivery.message.delivery_attempt or 0):
            flight.delivery.message = message  # the last permitted attempt may be this one
        try:
            await asyncio.wait({flight.outcome})
        except asyncio.CancelledError:
            await self._finisher.wait(flight.outcome)
        return flight.outcome.result() if flight.outcome.done() else Settlement.NACK
