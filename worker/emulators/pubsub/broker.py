"""
All topics and subscriptions of one server: their registry, delivery to every subscription, and dead letters.

Pure like the subscriptions it holds: the server passes requests in, and calls `tick` at the times that `on_due` names.
Any project name is accepted.  Everything is in memory and is lost when the process ends.

Resources go in and out as protobuf messages; the caller must not change a message it received.
"""

import bisect
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from worker.emulators.pubsub import resources
from worker.emulators.pubsub.clock import NS_PER_S, Clock
from worker.emulators.pubsub.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PubSubError,
    too_small,
)
from worker.emulators.pubsub.messages import StoredMessage, check_messages, store, with_attributes
from worker.emulators.pubsub.subscription import Subscription

_DEFAULT_PAGE = 1_000
"""Items of a list answer when the client sets no page size."""


class Topic:
    """A topic's resource, its subscriptions, and the messages it retains itself."""

    def __init__(self, resource: Any) -> None:
        self.resource = resource
        self.subscriptions: dict[str, Subscription] = {}
        """By path, without the detached ones."""
        self.retained: deque[StoredMessage] = deque()
        """Messages for a seek of any of its subscriptions, oldest first."""

    def deliver(self, messages: Sequence[StoredMessage], now_ns: int) -> None:
        """Add messages to every subscription, and retain them if the topic has a retention."""
        if resources.topic_retention_s(self.resource) > 0:
            self.retained.extend(messages)
        self.drop_old(now_ns)
        for subscription in self.subscriptions.values():
            subscription.enqueue(messages)

    def drop_old(self, now_ns: int) -> None:
        """Drop retained messages that are older than the retention."""
        if self.retained:
            oldest_ns = now_ns - int(resources.topic_retention_s(self.resource) * NS_PER_S)
            while self.retained and self.retained[0].publish_ns < oldest_ns:
                self.retained.popleft()


class Broker:
    """
    The whole service, without the network.

    Args:
        clock: The clock.
        on_due: Called with the clock time of the next `tick` whenever that becomes earlier.
    """

    def __init__(self, clock: Clock, on_due: Callable[[float], None]) -> None:
        self._clock = clock
        self._on_due = on_due
        self._topics: dict[str, Topic] = {}
        self._resources: dict[str, Any] = {}  # of subscriptions
        self._subscriptions: dict[str, Subscription] = {}
        # Message ids and ack ids start from the wall clock, so that two runs of the server never issue the same id and
        # a client that detects duplicates by id may remember ids across a restart.
        self._sequence = clock.now_ns() // 1_000
        self._ack_id_space = f"{self._sequence:x}"
        self._created = 0
        self._last_publish_ns = 0

    # Topics.

    def create_topic(self, given: Any) -> Any:
        """Create a topic; raises AlreadyExistsError, InvalidArgumentError or UnimplementedError."""
        resources.check_name("topics", given.name)
        if given.name in self._topics:
            raise AlreadyExistsError.of(given.name)
        topic = self._topics[given.name] = Topic(resources.complete_topic(given))
        return topic.resource

    def get_topic(self, path: str) -> Any:
        """Return the topic's resource; raises NotFoundError."""
        return self._topic(path).resource

    def update_topic(self, given: Any, paths: Sequence[str]) -> Any:
        """Replace the fields of an update mask; raises NotFoundError or InvalidArgumentError."""
        topic = self._topic(given.name)
        topic.resource = resources.complete_topic(resources.merge_topic(topic.resource, given, paths))
        topic.drop_old(self._clock.now_ns())
        for path in topic.subscriptions:
            self._replace(path, resources.complete_subscription(self._resources[path], topic.resource))
        return topic.resource

    def delete_topic(self, path: str) -> None:
        """Delete a topic; its subscriptions and their messages stay; raises NotFoundError."""
        topic = self._topic(path)
        del self._topics[path]
        for subscription_path in topic.subscriptions:
            orphan = resources.copy_of(self._resources[subscription_path])
            orphan.topic = resources.DELETED_TOPIC
            self._replace(subscription_path, resources.complete_subscription(orphan, None))

    def list_topics(self, project: str, page_size: int, page_token: str) -> tuple[list[Any], str]:
        """Return a page of a project's topics in order of name, and the token of the next page or ""."""
        resources.check_project(project)
        paths, token = _page(self._topics, f"{project}/topics/", page_size, page_token)
        return [self._topics[path].resource for path in paths], token

    def list_topic_subscriptions(self, path: str, page_size: int, page_token: str) -> tuple[list[str], str]:
        """Return a page of the paths of a topic's attached subscriptions, and a token; raises NotFoundError."""
        return _page(self._topic(path).subscriptions, "", page_size, page_token)

    def publish(self, path: str, messages: Sequence[Any]) -> list[str]:
        """
        Accept messages and add them to every subscription of the topic.

        Args:
            path: The topic.
            messages: Protobuf `PubsubMessage` objects; all are accepted or none.

        Returns:
            Their message ids, in order.

        Raises:
            NotFoundError, InvalidArgumentError, FailedPreconditionError: Nothing was accepted; permanent.
        """
        topic = self._topic(path)
        check_messages(messages)
        now_ns = self._publish_time()
        stored = [store(message, self._next_sequence(), now_ns) for message in messages]
        topic.deliver(stored, now_ns)
        return [message.message_id for message in stored]

    # Subscriptions.

    def create_subscription(self, given: Any) -> Any:
        """Create a subscription; raises AlreadyExistsError, NotFoundError and the errors of `complete_subscription`."""
        resources.check_name("subscriptions", given.name)
        if given.name in self._resources:
            raise AlreadyExistsError.of(given.name)
        topic = self._topic(given.topic)
        resource = resources.complete_subscription(given, topic.resource)
        resource.detached = False
        self._check_dead_letter_topic(resource)
        self._created += 1
        subscription = Subscription(
            resources.policy_of(resource),
            self._clock,
            ack_id_prefix=f"{self._ack_id_space}-{self._created}-",
            on_due=self._on_due,
            forward=lambda message, count: self._forward(given.name, message, count),
        )
        self._resources[given.name] = resource
        self._subscriptions[given.name] = topic.subscriptions[given.name] = subscription
        return resource

    def get_subscription(self, path: str) -> Any:
        """Return the subscription's resource; raises NotFoundError."""
        self.subscription(path, attached=False)
        return self._resources[path]

    def update_subscription(self, given: Any, paths: Sequence[str]) -> Any:
        """Replace the fields of an update mask, in force at once; raises as `create_subscription`."""
        current = self.get_subscription(given.name)
        topic = self._topics.get(current.topic)
        merged = resources.complete_subscription(
            resources.merge_subscription(current, given, paths), None if topic is None else topic.resource
        )
        if "dead_letter_policy" in paths:
            self._check_dead_letter_topic(merged)
        return self._replace(given.name, merged)

    def delete_subscription(self, path: str) -> None:
        """Delete a subscription and its messages, and end its receivers; raises NotFoundError."""
        subscription = self.subscription(path, attached=False)
        self._unlink(path)
        del self._resources[path], self._subscriptions[path]
        subscription.close(NotFoundError.of(path))

    def detach_subscription(self, path: str) -> None:
        """Drop the messages of a subscription and remove it from its topic; raises NotFoundError."""
        subscription = self.subscription(path, attached=False)
        self._unlink(path)
        detached = resources.copy_of(self._resources[path])
        detached.detached = True
        self._resources[path] = detached
        subscription.clear()
        subscription.close(_detached_error(path))

    def list_subscriptions(self, project: str, page_size: int, page_token: str) -> tuple[list[Any], str]:
        """Return a page of a project's subscriptions in order of name, and the token of the next page or ""."""
        resources.check_project(project)
        paths, token = _page(self._resources, f"{project}/subscriptions/", page_size, page_token)
        return [self._resources[path] for path in paths], token

    def subscription(self, path: str, *, attached: bool = True) -> Subscription:
        """
        Return the engine of a subscription.

        Raises:
            NotFoundError: It does not exist.
            InvalidArgumentError: The path is not a valid name.
            FailedPreconditionError: It was detached, and `attached` is `True`.
        """
        subscription = self._subscriptions.get(path)
        if subscription is None:
            resources.check_name("subscriptions", path)
            raise NotFoundError.of(path)
        if attached and self._resources[path].detached:
            raise _detached_error(path)
        return subscription

    def seek(self, path: str, time_ns: int) -> None:
        """Seek a subscription to a time; see `Subscription.seek`.  Raises NotFoundError, FailedPreconditionError."""
        subscription = self.subscription(path)
        topic = self._topics.get(self._resources[path].topic)
        if topic is not None:
            topic.drop_old(self._clock.now_ns())
        subscription.seek(time_ns, () if topic is None else topic.retained)

    # Lifecycle.

    def close(self, error: PubSubError) -> None:
        """Tell every receiver why it gets no more messages."""
        for subscription in self._subscriptions.values():
            subscription.close(error)

    def tick(self) -> float:
        """Do what is due in every subscription and return the clock time of the next call, or infinity."""
        return min((subscription.tick() for subscription in list(self._subscriptions.values())), default=math.inf)

    def _topic(self, path: str) -> Topic:
        topic = self._topics.get(path)
        if topic is None:
            resources.check_name("topics", path)
            raise NotFoundError.of(path)
        return topic

    def _forward(self, source_path: str, message: StoredMessage, delivery_count: int) -> bool:
        """Publish a message that used up its attempts; `False` if its dead-letter topic does not exist."""
        topic = self._topics.get(self._resources[source_path].dead_letter_policy.dead_letter_topic)
        if topic is None:
            return False
        now_ns = self._publish_time()
        added = _dead_letter_attributes(source_path, message, delivery_count)
        topic.deliver([with_attributes(message, added, self._next_sequence(), now_ns)], now_ns)
        return True

    def _check_dead_letter_topic(self, resource: Any) -> None:
        if resource.HasField("dead_letter_policy"):
            path = resource.dead_letter_policy.dead_letter_topic
            if path not in self._topics:
                raise NotFoundError.of(path)

    def _replace(self, path: str, resource: Any) -> Any:
        self._resources[path] = resource
        self._subscriptions[path].apply(resources.policy_of(resource))
        return resource

    def _unlink(self, path: str) -> None:
        topic = self._topics.get(self._resources[path].topic)
        if topic is not None:
            topic.subscriptions.pop(path, None)

    def _next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence

    def _publish_time(self) -> int:
        """Return the publish time of a request, never before an earlier one even if the wall clock goes back."""
        self._last_publish_ns = max(self._last_publish_ns, self._clock.now_ns())
        return self._last_publish_ns


def _detached_error(path: str) -> FailedPreconditionError:
    return FailedPreconditionError(f"The subscription is detached from its topic (resource={path.rsplit('/', 1)[-1]}).")


def _page(paths: Mapping[str, object], prefix: str, size: int, token: str) -> tuple[list[str], str]:
    """
    Return one page of the paths that begin with a prefix, in order, and the token of the next or an empty string.

    Args:
        paths: All paths.
        prefix: For example `projects/P/topics/`.
        size: Largest number of paths; 0 for the default of 1,000.
        token: Empty for the first page, else the token returned with the page before: the first path of the page.

    Raises:
        InvalidArgumentError: Negative size; permanent.
    """
    if size < 0:
        raise InvalidArgumentError(too_small("page_size", size, 0))
    found = sorted(path for path in paths if path.startswith(prefix))
    start = bisect.bisect_left(found, token)
    end = start + (size or _DEFAULT_PAGE)
    return found[start:end], found[end] if end < len(found) else ""


def _dead_letter_attributes(source_path: str, message: StoredMessage, delivery_count: int) -> dict[str, str]:
    """
    Return the attributes that the service adds to a message it forwards to a dead-letter topic.

    A fifth attribute, the delivery error message, exists for export subscriptions only, which this server lacks.
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
