"""What the registry in `broker` needs beside it: a topic's state, pages of lists, and the marks of a dead letter."""

import bisect
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from worker.emulators.pubsub.clock import NS_PER_S
from worker.emulators.pubsub.errors import InvalidArgumentError, too_small
from worker.emulators.pubsub.messages import StoredMessage
from worker.emulators.pubsub.resources import topic_retention_s
from worker.emulators.pubsub.subscription import Subscription

_DEFAULT_PAGE = 1_000
"""Items of a list answer when the client asks for no particular number."""


class Topic:
    """A topic's resource, its subscriptions, and what it retains itself."""

    def __init__(self, resource: Any) -> None:
        self.resource = resource
        self.subscriptions: dict[str, Subscription] = {}
        """By path; detached ones are not among them."""
        self.retained: deque[StoredMessage] = deque()
        """For a seek by any of its subscriptions, oldest first."""

    def deliver(self, messages: Sequence[StoredMessage], now_ns: int) -> None:
        """Hand messages to every subscription, and retain them if the topic is set up so."""
        if topic_retention_s(self.resource) > 0:
            self.retained.extend(messages)
        self.forget_old(now_ns)
        for subscription in self.subscriptions.values():
            subscription.enqueue(messages)

    def forget_old(self, now_ns: int) -> None:
        """Let go of retained messages that are older than the retention."""
        if self.retained:
            oldest_ns = now_ns - int(topic_retention_s(self.resource) * NS_PER_S)
            while self.retained and self.retained[0].publish_ns < oldest_ns:
                self.retained.popleft()


def page(paths: Mapping[str, object], prefix: str, size: int, token: str) -> tuple[list[str], str]:
    """
    Return one page of the paths that begin with a prefix, in order, and the token of the next or an empty string.

    Args:
        paths: All paths.
        prefix: For example `projects/P/topics/`.
        size: At most so many; 0 for the default of 1,000.
        token: Empty for the first page, else as returned before: the first path of the page.

    Raises:
        InvalidArgumentError: Negative size; permanent.
    """
    if size < 0:
        raise InvalidArgumentError(too_small("page_size", size, 0))
    wanted = sorted(path for path in paths if path.startswith(prefix))
    start = bisect.bisect_left(wanted, token)
    end = start + (size or _DEFAULT_PAGE)
    return wanted[start:end], wanted[end] if end < len(wanted) else ""


def dead_letter_attributes(source_path: str, message: StoredMessage, delivery_count: int) -> dict[str, str]:
    """
    Return what the service adds to a message it forwards to a dead-letter topic.

    A fifth attribute, the delivery error message, exists for export subscriptions only, which this server has not.
    Source: https://cloud.google.com/pubsub/docs/handling-failures#dead_letter_topic
    """
    _, project, _, subscription_id = source_path.split("/")
    published = datetime.fromtimestamp(message.publish_ns / NS_PER_S, UTC)
    return {
        "CloudPubSubDeadLetterSourceDeliveryCount": str(delivery_count),
        "CloudPubSubDeadLetterSourceSubscription": subscription_id,
        "CloudPubSubDeadLetterSourceSubscriptionProject": project,
        "CloudPubSubDeadLetterSourceTopicPublishTime": published.isoformat(timespec="milliseconds"),
    }
