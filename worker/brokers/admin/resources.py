"""
Topics and subscriptions as values, in the words of the settings, and as protobuf messages, both ways.

A desired subscription lists only the fields that `setup` looks after; what it does not list is the owner's and stays as
it is.  `plan` compares such values, `infrastructure` sends them.

Source of names and defaults: google/pubsub/v1/pubsub.proto, messages Subscription, RetryPolicy, DeadLetterPolicy and
ExpirationPolicy.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from google.protobuf import duration_pb2
from google.pubsub_v1 import types


class Field(StrEnum):
    """What `setup` looks after in a subscription, and of it the retention in a topic; durations are seconds."""

    ACK_DEADLINE = "ack_deadline_s"
    RETENTION = "retention_s"
    EXPIRY = "expiry_s"
    """Idle time after which the subscription is deleted; `None`: never."""
    MINIMUM_BACKOFF = "minimum_backoff_s"
    """`None`: no retry policy, a nacked message is redelivered at once."""
    MAXIMUM_BACKOFF = "maximum_backoff_s"
    DEAD_LETTER_TOPIC = "dead_letter_topic"
    """Full name; `None`: no dead-letter policy."""
    MAX_DELIVERY_ATTEMPTS = "max_delivery_attempts"


Value = float | str | None
Policy = Mapping[Field, Value]


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic."""

    name: str
    """Full name."""
    retention_s: float | None = None
    """How long its messages are kept for subscriptions that are made later, seconds; `None`: not at all, or of a topic
    that is wanted: as it is."""


@dataclass(frozen=True, slots=True)
class Subscription:
    """A pull subscription."""

    name: str
    """Full name."""
    topic: str
    """Full name of what it is subscribed to; cannot be changed later."""
    policy: Policy
    filter: str = ""
    """Which messages of the topic it gets; empty: all.  Cannot be changed later."""
    obstacle: str | None = field(default=None, kw_only=True)
    """Of one that was found: why the worker can never pull from it, whatever is changed; `None`: nothing."""


@dataclass(frozen=True, slots=True)
class UnsupportedField:
    """A field that a server does not take; only emulators lack any."""

    name: str
    """Full name of the topic or subscription."""
    field: Field
    text: str
    """The server's own words."""


@dataclass(frozen=True, slots=True)
class Binding:
    """One role of an IAM policy."""

    role: str
    members: frozenset[str]


MASKS = {
    Field.ACK_DEADLINE: "ack_deadline_seconds",
    Field.RETENTION: "message_retention_duration",
    Field.EXPIRY: "expiration_policy",
    Field.MINIMUM_BACKOFF: "retry_policy",
    Field.MAXIMUM_BACKOFF: "retry_policy",
    Field.DEAD_LETTER_TOPIC: "dead_letter_policy",
    Field.MAX_DELIVERY_ATTEMPTS: "dead_letter_policy",
}
"""The API's field for each of ours (google/pubsub/v1/pubsub.proto, message Subscription)."""
DELETED_TOPIC = "_deleted-topic_"
"""What the API names as the topic of a subscription that has outlived it."""

_DEFAULT_BACKOFF_S = (10.0, 600.0)
"""What the service sets for a bound that a retry policy leaves out."""
_DEFAULT_ATTEMPTS = 5
_DEFAULT_EXPIRY_S = 31 * 86_400.0
"""What a subscription without an expiration policy has; never to expire is a policy without a ttl."""

_Topic: Any = types.Topic.pb()
_Subscription: Any = types.Subscription.pb()


def read_topic(message: Any) -> Topic:
    """Return the value of a protobuf `Topic`."""
    has_retention = message.HasField("message_retention_duration")
    return Topic(message.name, _seconds(message.message_retention_duration) if has_retention else None)


def write_topic(wanted: Topic) -> Any:
    """Return the protobuf `Topic`."""
    message = _Topic(name=wanted.name)
    if wanted.retention_s is not None:
        message.message_retention_duration.CopyFrom(_duration(wanted.retention_s))
    return message


def read_subscription(message: Any) -> Subscription:
    """Return the value of a protobuf `Subscription`."""
    retry = message.retry_policy if message.HasField("retry_policy") else None
    dead = message.dead_letter_policy if message.HasField("dead_letter_policy") else None
    policy: Policy = {
        Field.ACK_DEADLINE: message.ack_deadline_seconds,
        Field.RETENTION: _seconds(message.message_retention_duration),
        Field.EXPIRY: _expiry(message),
        Field.MINIMUM_BACKOFF: None if retry is None else _bound(retry, "minimum_backoff", _DEFAULT_BACKOFF_S[0]),
        Field.MAXIMUM_BACKOFF: None if retry is None else _bound(retry, "maximum_backoff", _DEFAULT_BACKOFF_S[1]),
        Field.DEAD_LETTER_TOPIC: None if dead is None else dead.dead_letter_topic,
        Field.MAX_DELIVERY_ATTEMPTS: None if dead is None else dead.max_delivery_attempts or _DEFAULT_ATTEMPTS,
    }
    return Subscription(message.name, message.topic, policy, message.filter, obstacle=_obstacle(message))


def _expiry(message: Any) -> float | None:
    if not message.HasField("expiration_policy"):
        return _DEFAULT_EXPIRY_S
    policy = message.expiration_policy
    return _seconds(policy.ttl) if policy.HasField("ttl") else None


def _obstacle(message: Any) -> str | None:
    if message.topic == DELETED_TOPIC:
        return "its topic was deleted, and a subscription cannot be given another; delete it or choose another name"
    if message.detached:
        return "it is detached from its topic for good; delete it or choose another name"
    for name, words in (
        ("push_config", "pushes to a URL"),
        ("bigquery_config", "writes to BigQuery"),
        ("cloud_storage_config", "writes to Cloud Storage"),
    ):
        if message.HasField(name) and getattr(message, name).ListFields():
            return f"it {words}; the worker pulls, so choose another name"
    return None


def write_subscription(wanted: Subscription) -> Any:
    """Return the protobuf `Subscription`; fields that are not listed are not set."""
    message, policy = _Subscription(name=wanted.name, topic=wanted.topic, filter=wanted.filter), wanted.policy
    if Field.ACK_DEADLINE in policy:
        message.ack_deadline_seconds = policy[Field.ACK_DEADLINE]
    if Field.RETENTION in policy:
        message.message_retention_duration.CopyFrom(_duration(policy[Field.RETENTION]))
    if Field.EXPIRY in policy:
        message.expiration_policy.SetInParent()  # without a ttl: never
        if policy[Field.EXPIRY] is not None:
            message.expiration_policy.ttl.CopyFrom(_duration(policy[Field.EXPIRY]))
    if policy.get(Field.MINIMUM_BACKOFF) is not None:
        message.retry_policy.minimum_backoff.CopyFrom(_duration(policy[Field.MINIMUM_BACKOFF]))
        message.retry_policy.maximum_backoff.CopyFrom(_duration(policy[Field.MAXIMUM_BACKOFF]))
    if policy.get(Field.DEAD_LETTER_TOPIC) is not None:
        message.dead_letter_policy.dead_letter_topic = policy[Field.DEAD_LETTER_TOPIC]
        message.dead_letter_policy.max_delivery_attempts = policy[Field.MAX_DELIVERY_ATTEMPTS]
    return message


def _bound(retry: Any, name: str, default: float) -> float:
    return _seconds(getattr(retry, name)) if retry.HasField(name) else default


def _seconds(duration: Any) -> float:
    return float(duration.seconds + duration.nanos / 1e9)


def _duration(seconds: Any) -> Any:
    return duration_pb2.Duration(seconds=int(seconds), nanos=round(seconds % 1 * 1e9))
