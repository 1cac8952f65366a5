"""Copies of requests that failed for good, on a topic that the operator names (`dead_letter.topic`)."""

from worker.delivery import Reply
from worker.errors import PublishError
from worker.policy.model import ErrorClass
from worker.ports import Publisher
from worker.telemetry.logs import get_logger
from worker.telemetry.metrics import Metrics
from worker.wire.message import ReceivedMessage, clip_attributes

_log = get_logger("dead_letters")


class DeadLetters:
    """
    Publishes the copies, best effort: one that cannot be published is counted and logged, the answer matters more.

    Args:
        publisher: The topic.
        metrics: Counts copies.
    """

    def __init__(self, publisher: Publisher, metrics: Metrics) -> None:
        self._publisher = publisher
        self._metrics = metrics

    async def copy(self, message: ReceivedMessage, reply: Reply) -> None:
        """
        Publish the original bytes with the reason in attributes; a broker that refuses them raises nothing here.

        Only of requests that were answered with a retryable error, and of messages that are not requests.

        Cancellation: the copy may or may not be published.
        """
        if not reply.retryable and reply.error_class != ErrorClass.BAD_MESSAGE:
            return
        attributes = clip_attributes(
            {
                "request_message_id": message.message_id,
                "error_class": reply.error_class or "",
                "status_code": str(reply.status_code),
                **{f"original.{key}": value for key, value in message.attributes.items()},
            }
        )
        try:
            await self._publisher.publish(message.data, attributes)
        except PublishError as error:
            self._metrics.dead_letter_copies_total.labels("failed").inc()
            _log.error("dead_letter_copy_failed", message_id=message.message_id, error=str(error))
        else:
            self._metrics.dead_letter_copies_total.labels("ok").inc()
