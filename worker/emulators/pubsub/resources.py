"""
Topics and subscriptions as resources: their names, bounds, defaults and updates, and the policy read from them.

Resources are the protobuf messages of the API.  The engine stores them only to return them to clients; it works with
the `DeliveryPolicy` read from them.  The functions take a message, check it, and return a new one; none keeps state.
A field for a feature that this server lacks is refused as unimplemented, never ignored.

Source: google/pubsub/v1/pubsub.proto, https://cloud.google.com/pubsub/quotas#resource_limits; the texts were seen from
Google's emulator or the service.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from google.pubsub_v1 import types

from worker.emulators.pubsub.deliveries import DeliveryPolicy
from worker.emulators.pubsub.errors import (
    InvalidArgumentError,
    OutOfRangeError,
    UnimplementedError,
    check_bounds,
    too_small,
)
from worker.emulators.pubsub.filters import parse

DELETED_TOPIC = "_deleted-topic_"
"""Topic of a subscription whose topic was deleted."""

_NAME = re.compile(r"projects/[^/]+/(topics|subscriptions)/(?!goog)[A-Za-z][A-Za-z0-9\-_.~+%]{2,254}")
"""Source: https://cloud.google.com/pubsub/docs/pubsub-basics#resource_names"""

_PROJECT = re.compile(r"projects/[^/]+")

_DAY_S = 86_400
ACK_DEADLINE_S = (10, 600)
"""Bounds of the ack deadline of a subscription and of a stream, in seconds."""

_RETENTION_S = (600, 31 * _DAY_S)
_DELIVERY_ATTEMPTS = (5, 100)
_BACKOFF_S = (0, 600)
_DEFAULT_ACK_DEADLINE_S = 10
_DEFAULT_RETENTION_S = 7 * _DAY_S
_DEFAULT_EXPIRATION_S = 31 * _DAY_S
_DEFAULT_MINIMUM_BACKOFF_S = 10
_DEFAULT_MAXIMUM_BACKOFF_S = 600

_MUTABLE_TOPIC_FIELDS = frozenset({"labels", "message_storage_policy", "message_retention_duration", "tags"})
_MUTABLE_SUBSCRIPTION_FIELDS = frozenset(
    {
        "ack_deadline_seconds",
        "dead_letter_policy",
        "enable_exactly_once_delivery",
        "expiration_policy",
        "labels",
        "message_retention_duration",
        "push_config",
        "retain_acked_messages",
        "retry_policy",
        "tags",
    }
)

_UNIMPLEMENTED_FIELDS: Mapping[str, str] = {
    "bigquery_config": "BigQuery subscriptions",
    "bigtable_config": "Bigtable subscriptions",
    "cloud_storage_config": "Cloud Storage subscriptions",
    "ingestion_data_source_settings": "ingestion from other systems",
    "kms_key_name": "customer-managed encryption keys",
    "message_transforms": "message transforms",
    "push_config": "push subscriptions",
    "schema_settings": "schemas",
}


def check_name(kind: str, path: str) -> None:
    """
    Refuse a path that cannot name a resource of this kind.

    Args:
        kind: `topics` or `subscriptions`.
        path: The full path, `projects/P/topics/T`.

    Raises:
        InvalidArgumentError: Permanent.
    """
    match = _NAME.fullmatch(path)
    if match is None or match[1] != kind:
        raise InvalidArgumentError(f"Invalid [{kind}] name: (name={path})")


def check_project(path: str) -> None:
    """Refuse a parent that is not `projects/P`; every project exists here."""
    if _PROJECT.fullmatch(path) is None:
        raise InvalidArgumentError(f"Invalid [projects] name: (name={path})")


def complete_topic(given: Any) -> Any:
    """
    Check a `Topic` and set the fields that the service sets.

    Raises:
        InvalidArgumentError: A value is out of bounds; permanent.
        UnimplementedError: It needs a feature that this server lacks; permanent.
    """
    _refuse_unimplemented(given)
    topic = copy_of(given)
    topic.state = types.Topic.State.ACTIVE
    if topic.HasField("message_retention_duration"):
        check_bounds("message_retention_duration", _seconds(topic.message_retention_duration), *_RETENTION_S)
    return topic


def complete_subscription(given: Any, topic: Any | None) -> Any:
    """
    Check a `Subscription` and set the documented defaults.

    Args:
        given: The subscription, from a client or after an update.
        topic: The resource of its topic; `None` when that was deleted.

    Raises:
        InvalidArgumentError, OutOfRangeError: A value is out of bounds; permanent.
        UnimplementedError: It needs a feature that this server lacks; permanent.
    """
    _refuse_unimplemented(given)
    subscription = copy_of(given)
    subscription.state = types.Subscription.State.ACTIVE
    subscription.push_config.SetInParent()
    subscription.ack_deadline_seconds = subscription.ack_deadline_seconds or _DEFAULT_ACK_DEADLINE_S
    check_bounds("ack_deadline_seconds", subscription.ack_deadline_seconds, *ACK_DEADLINE_S)
    _default_duration(subscription, "message_retention_duration", _DEFAULT_RETENTION_S)
    check_bounds("message_retention_duration", _seconds(subscription.message_retention_duration), *_RETENTION_S)
    if not subscription.HasField("expiration_policy"):
        _default_duration(subscription.expiration_policy, "ttl", _DEFAULT_EXPIRATION_S)
    elif subscription.expiration_policy.HasField("ttl") and _seconds(subscription.expiration_policy.ttl) < _DAY_S:
        raise InvalidArgumentError(too_small("ttl", f"{_seconds(subscription.expiration_policy.ttl):g}s", f"{_DAY_S}s"))
    if subscription.HasField("retry_policy"):
        _complete_retry_policy(subscription.retry_policy)
    if subscription.HasField("dead_letter_policy"):
        _complete_dead_letter_policy(subscription.dead_letter_policy)
    if subscription.filter:
        parse(subscription.filter)
    subscription.ClearField("topic_message_retention_duration")
    if topic is not None and topic.HasField("message_retention_duration"):
        subscription.topic_message_retention_duration.CopyFrom(topic.message_retention_duration)
    return subscription


def policy_of(subscription: Any) -> DeliveryPolicy:
    """Read the delivery policy from a complete `Subscription`."""
    retry = subscription.retry_policy if subscription.HasField("retry_policy") else None
    return DeliveryPolicy(
        ack_deadline_s=float(subscription.ack_deadline_seconds),
        minimum_backoff_s=None if retry is None else _seconds(retry.minimum_backoff),
        maximum_backoff_s=_DEFAULT_MAXIMUM_BACKOFF_S if retry is None else _seconds(retry.maximum_backoff),
        max_delivery_attempts=subscription.dead_letter_policy.max_delivery_attempts,
        is_ordered=subscription.enable_message_ordering,
        is_exactly_once=subscription.enable_exactly_once_delivery,
        retains_acked=subscription.retain_acked_messages,
        # An unacked message is dropped when its age exceeds the longer of the two retentions
        # (https://cloud.google.com/pubsub/docs/replay-overview#configuring_message_retention).
        retention_s=max(
            _seconds(subscription.message_retention_duration),
            _seconds(subscription.topic_message_retention_duration),
        ),
        matches=parse(subscription.filter) if subscription.filter else None,
    )


def topic_retention_s(topic: Any) -> float:
    """Return the seconds for which the topic itself keeps messages for a seek; 0 if it keeps none."""
    return _seconds(topic.message_retention_duration)


def copy_of(resource: Any) -> Any:
    """Return a copy of a protobuf message."""
    copy = type(resource)()
    copy.CopyFrom(resource)
    return copy


def merge_topic(current: Any, given: Any, paths: Iterable[str]) -> Any:
    """Return a copy of the topic with the fields of an update mask replaced; raises as `merge_subscription`."""
    return _merge(current, given, list(paths), "Topic", _MUTABLE_TOPIC_FIELDS)


def merge_subscription(current: Any, given: Any, paths: Iterable[str]) -> Any:
    """
    Return a copy of the subscription with the fields of an update mask replaced; a field absent in `given` is cleared.

    Raises:
        InvalidArgumentError: The mask is empty, or names an unknown or immutable field; permanent.
    """
    return _merge(current, given, list(paths), "Subscription", _MUTABLE_SUBSCRIPTION_FIELDS)


def _merge(current: Any, given: Any, paths: list[str], kind: str, mutable: frozenset[str]) -> Any:
    request = f"Update{kind}Request"
    if not paths:
        raise InvalidArgumentError(
            f"The update_mask in the {request} must be set, and must contain a non-empty paths list."
        )
    known = current.DESCRIPTOR.fields_by_name
    for path in paths:
        if path not in known:
            raise InvalidArgumentError(
                f"Invalid update_mask provided in the {request}: {path} is not a known {kind} field. Note that field "
                "paths must be of the form 'push_config' rather than 'pushConfig'."
            )
        if path not in mutable and path not in _UNIMPLEMENTED_FIELDS:
            raise InvalidArgumentError(
                f"Invalid update_mask provided in the {request}: the {path} field in the {kind} is not mutable."
            )
    patch, merged = copy_of(given), copy_of(current)
    for path in known:
        if path in paths:
            merged.ClearField(path)
        else:
            patch.ClearField(path)
    merged.MergeFrom(patch)
    return merged


def _refuse_unimplemented(resource: Any) -> None:
    for field, value in resource.ListFields():
        feature = _UNIMPLEMENTED_FIELDS.get(field.name)
        # Clients send an empty push_config for a pull subscription.
        if feature is not None and not (field.name == "push_config" and not value.ListFields()):
            raise UnimplementedError.of(feature)


def _complete_retry_policy(policy: Any) -> None:
    _default_duration(policy, "minimum_backoff", _DEFAULT_MINIMUM_BACKOFF_S)
    minimum_s = _seconds(policy.minimum_backoff)
    _check_backoff("minimum_backoff", minimum_s)
    _default_duration(policy, "maximum_backoff", _DEFAULT_MAXIMUM_BACKOFF_S)
    maximum_s = _seconds(policy.maximum_backoff)
    _check_backoff("maximum_backoff", maximum_s)
    if maximum_s < minimum_s:
        raise InvalidArgumentError(too_small("maximum_backoff", f"{maximum_s:g}s", f"{minimum_s:g}s"))


def _check_backoff(name: str, seconds: float) -> None:
    low, high = _BACKOFF_S
    if not low <= seconds <= high:
        raise InvalidArgumentError(
            f"The value for {name} is out of bounds. You passed {seconds:g}s in the request, but the value must be "
            f"between {low}s and {high}s."
        )


def _complete_dead_letter_policy(policy: Any) -> None:
    low, high = _DELIVERY_ATTEMPTS
    policy.max_delivery_attempts = policy.max_delivery_attempts or low
    check_bounds("max_delivery_attempts", policy.max_delivery_attempts, low, high, OutOfRangeError)


def _default_duration(message: Any, field: str, seconds: int) -> None:
    if not message.HasField(field):
        getattr(message, field).seconds = seconds


def _seconds(duration: Any) -> float:
    return float(duration.seconds + duration.nanos / 1e9)
