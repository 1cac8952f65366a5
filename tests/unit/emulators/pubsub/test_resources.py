from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.pubsub_v1 import types

from worker.emulators.pubsub import resources
from worker.emulators.pubsub.errors import InvalidArgumentError, OutOfRangeError, UnimplementedError

Topic = types.Topic.pb()
Subscription = types.Subscription.pb()


def seconds(number: float) -> Duration:
    return Duration(seconds=int(number), nanos=int(number % 1 * 1e9))


def complete(**fields: Any) -> Any:
    return resources.complete_subscription(Subscription(**fields), Topic())


def test_defaults_are_the_documented_ones() -> None:
    """The deadline is 10 s, the retention 7 days, the expiration 31 days, and the subscription is pulled."""
    subscription = complete(name="s", topic="t")
    assert subscription.ack_deadline_seconds == 10
    assert subscription.message_retention_duration.seconds == 604_800
    assert subscription.expiration_policy.ttl.seconds == 2_678_400
    assert subscription.HasField("push_config")
    assert subscription.state == types.Subscription.State.ACTIVE
    assert not subscription.HasField("retry_policy")
    policy = resources.policy_of(subscription)
    assert (policy.minimum_backoff_s, policy.max_delivery_attempts, policy.matches) == (None, 0, None)


def test_never_expiring_stays_so() -> None:
    """An expiration policy without ttl is kept."""
    subscription = complete(expiration_policy={})
    assert subscription.HasField("expiration_policy")
    assert not subscription.expiration_policy.HasField("ttl")


def test_policies_have_their_own_defaults() -> None:
    """An empty retry policy is 10 to 600 s, an unset number of attempts is 5."""
    subscription = complete(retry_policy={}, dead_letter_policy={"dead_letter_topic": "t"})
    policy = resources.policy_of(subscription)
    assert (policy.minimum_backoff_s, policy.maximum_backoff_s, policy.max_delivery_attempts) == (10.0, 600.0, 5)
    assert subscription.dead_letter_policy.max_delivery_attempts == 5


def test_everything_set_reaches_the_engine() -> None:
    """Every field of the delivery policy is read from the resource."""
    policy = resources.policy_of(
        complete(
            ack_deadline_seconds=33,
            retry_policy={"minimum_backoff": seconds(0.5), "maximum_backoff": seconds(4)},
            dead_letter_policy={"dead_letter_topic": "t", "max_delivery_attempts": 7},
            enable_message_ordering=True,
            enable_exactly_once_delivery=True,
            retain_acked_messages=True,
            message_retention_duration=seconds(1_000),
            filter="attributes:a",
        )
    )
    assert policy.matches is not None
    assert (policy.matches({"a": ""}), policy.matches({})) == (True, False)
    assert (policy.ack_deadline_s, policy.minimum_backoff_s, policy.maximum_backoff_s) == (33.0, 0.5, 4.0)
    assert (policy.max_delivery_attempts, policy.retention_s) == (7, 1_000.0)
    assert (policy.is_ordered, policy.is_exactly_once, policy.retains_acked) == (True, True, True)


def test_the_longer_retention_holds_for_unacked_messages() -> None:
    """The topic's retention is shown on the subscription and applies if it is longer."""
    topic = Topic(message_retention_duration=seconds(2_000_000))
    subscription = resources.complete_subscription(Subscription(), topic)
    assert subscription.topic_message_retention_duration.seconds == 2_000_000
    assert resources.policy_of(subscription).retention_s == 2_000_000.0


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"ack_deadline_seconds": 9}, InvalidArgumentError, "ack_deadline_seconds is too small. You passed 9 .* is 10"),
        ({"ack_deadline_seconds": -1}, InvalidArgumentError, "too small"),
        ({"ack_deadline_seconds": 601}, InvalidArgumentError, "too large. You passed 601 .* is 600"),
        ({"message_retention_duration": seconds(599)}, InvalidArgumentError, "message_retention_duration is too small"),
        ({"message_retention_duration": seconds(2_678_401)}, InvalidArgumentError, "is too large"),
        ({"expiration_policy": {"ttl": seconds(86_399)}}, InvalidArgumentError, "ttl is too small"),
        ({"retry_policy": {"minimum_backoff": seconds(601)}}, InvalidArgumentError, "minimum_backoff is out of bounds"),
        ({"retry_policy": {"minimum_backoff": seconds(-1)}}, InvalidArgumentError, "between 0s and 600s"),
        ({"retry_policy": {"maximum_backoff": seconds(601)}}, InvalidArgumentError, "maximum_backoff is out of bounds"),
        (
            {"retry_policy": {"maximum_backoff": seconds(5)}},
            InvalidArgumentError,
            "You passed 5s .* minimum value is 10s",
        ),
        ({"dead_letter_policy": {"max_delivery_attempts": 4}}, OutOfRangeError, "You passed 4 .* minimum value is 5"),
        ({"dead_letter_policy": {"max_delivery_attempts": 101}}, OutOfRangeError, "maximum value is 100"),
        ({"filter": "bogus =="}, InvalidArgumentError, "Invalid filter"),
        ({"push_config": {"push_endpoint": "https://x"}}, UnimplementedError, "does not implement push subscriptions"),
        ({"bigquery_config": {"table": "a.b.c"}}, UnimplementedError, "BigQuery"),
        ({"cloud_storage_config": {"bucket": "b"}}, UnimplementedError, "Cloud Storage"),
        ({"message_transforms": [{}]}, UnimplementedError, "message transforms"),
    ],
)
def test_a_subscription_out_of_bounds_is_refused(fields: dict[str, Any], error: type[Exception], text: str) -> None:
    """The error has the status and the numbers of the service; no field is silently ignored."""
    with pytest.raises(error, match=text):
        complete(**fields)


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"message_retention_duration": seconds(599)}, InvalidArgumentError, "is too small"),
        ({"schema_settings": {"schema": "s"}}, UnimplementedError, "schemas"),
        ({"kms_key_name": "k"}, UnimplementedError, "encryption keys"),
        ({"ingestion_data_source_settings": {"aws_kinesis": {}}}, UnimplementedError, "ingestion"),
    ],
)
def test_a_topic_out_of_bounds_is_refused(fields: dict[str, Any], error: type[Exception], text: str) -> None:
    """The error has the status and the numbers of the service."""
    with pytest.raises(error, match=text):
        resources.complete_topic(Topic(**fields))


def test_the_bounds_themselves_are_allowed() -> None:
    """Bounds are inclusive."""
    complete(
        ack_deadline_seconds=600, message_retention_duration=seconds(600), retry_policy={"minimum_backoff": seconds(0)}
    )
    complete(dead_letter_policy={"max_delivery_attempts": 100}, message_retention_duration=seconds(2_678_400))


def test_an_update_changes_the_fields_of_its_mask_only() -> None:
    """A field that is absent is cleared, other fields of the patch are ignored, the original stays as it was."""
    current = complete(name="s", ack_deadline_seconds=20, labels={"a": "b"}, retry_policy={})
    patch = Subscription(ack_deadline_seconds=30, labels={"c": "d"}, filter="attributes:x")
    merged = resources.merge_subscription(current, patch, ["ack_deadline_seconds", "retry_policy"])
    assert merged.ack_deadline_seconds == 30
    assert not merged.HasField("retry_policy")
    assert dict(merged.labels) == {"a": "b"}
    assert merged.filter == ""
    assert current.ack_deadline_seconds == 20
    assert dict(resources.merge_subscription(current, patch, ["labels"]).labels) == {"c": "d"}
    assert patch.filter == "attributes:x", "the caller's message is not touched"


@pytest.mark.parametrize(
    ("paths", "text"),
    [
        ([], "must contain a non-empty paths list"),
        (["bogus"], "bogus is not a known Subscription field"),
        (["ackDeadlineSeconds"], "ackDeadlineSeconds is not a known Subscription field"),
        (["retry_policy.minimum_backoff"], "not a known Subscription field"),
        (["name"], "the name field in the Subscription is not mutable"),
        (["topic"], "not mutable"),
        (["filter"], "not mutable"),
        (["enable_message_ordering"], "not mutable"),
        (["detached"], "not mutable"),
    ],
)
def test_a_bad_mask_is_refused(paths: list[str], text: str) -> None:
    """A mask must be set and name known, mutable fields."""
    with pytest.raises(InvalidArgumentError, match=text):
        resources.merge_subscription(complete(name="s"), Subscription(), paths)


def test_a_topics_mask_is_checked() -> None:
    """It is checked against the fields of a topic."""
    with pytest.raises(InvalidArgumentError, match="the name field in the Topic is not mutable"):
        resources.merge_topic(Topic(name="t"), Topic(name="u"), ["name"])
    assert dict(resources.merge_topic(Topic(name="t"), Topic(labels={"a": "b"}), ["labels"]).labels) == {"a": "b"}


@pytest.mark.parametrize(
    "path",
    ["projects/p/topics/abc", "projects/my.project:x/topics/A-_.~+%9", "projects/p/topics/" + "a" * 255],
)
def test_a_documented_name_is_accepted(path: str) -> None:
    """A name has 3 to 255 characters and starts with a letter; every project exists."""
    resources.check_name("topics", path)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "abc",
        "projects/p/topics/ab",
        "projects/p/topics/1abc",
        "projects/p/topics/goog-topic",
        "projects/p/topics/a b c",
        "projects/p/topics/abc/def",
        "projects//topics/abc",
        "projects/p/subscriptions/abc",
        "projects/p/topics/abc\n",
        "projects/p/topics/" + "a" * 256,
    ],
)
def test_any_other_name_is_refused(path: str) -> None:
    """The error has the text of the service."""
    with pytest.raises(InvalidArgumentError, match=r"Invalid \[topics\] name: \(name="):
        resources.check_name("topics", path)


def test_a_parent_is_a_project() -> None:
    """Lists take `projects/P`."""
    resources.check_project("projects/p")
    with pytest.raises(InvalidArgumentError, match=r"Invalid \[projects\] name"):
        resources.check_project("p")
