"""The answers of a run, as `collect` and `local` take them from the response topic."""

import asyncio

from worker.brokers.connection import Broker
from worker.client.errors import ClientError
from worker.client.ports import AnswerHandler
from worker.ports import Settlement
from worker.telemetry.metrics import Metrics
from worker.wire.message import ReceivedMessage

END = "end_of_answers"
"""Attribute of the message that `local` sends itself on the response topic when its worker has ended: what the worker
published comes before it."""


class ReceivedAnswers:
    """
    The messages of a subscription of the response topic; see `worker.client.ports.Answers`.

    Args:
        broker: Connected as its subscriber.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self.ended = asyncio.Event()
        """The message with `END` has come, and with it all that were published before."""

    async def __call__(self, handler: AnswerHandler) -> None:
        """Call the handler for every answer; an answer that it could not write is nacked."""

        async def take(message: ReceivedMessage) -> Settlement:
            if END in message.attributes:
                self.ended.set()
                return Settlement.ACK
            try:
                await handler(message.data, message.attributes, message.message_id)
            except ClientError:  # the run is ending and reports the reason itself
                return Settlement.NACK
            return Settlement.ACK

        await self._broker.subscriber(Metrics()).run(take)
