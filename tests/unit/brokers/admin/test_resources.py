"""A subscription to protobuf and back: nothing is lost, absent fields have the service's defaults."""

import pytest
from google.protobuf import duration_pb2
from google.pubsub_v1 import types
from hypothesis import given
from hypothesis import strategies as st

from worker.brokers.admin.resources import Field, Policy, Subscription, read_subscription, write_subscription

NAME, TOPIC = "projects/p/subscriptions/s", "projects/p/topics/t"
SECONDS = st.integers(0, 600).map(float) | st.sampled_from([0.25, 1.5])


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Draw a policy that the service could have."""
    has_retry, has_dead = draw(st.booleans()), draw(st.booleans())
    return {
        Field.ACK_DEADLINE: draw(st.integers(10, 600)),
        Field.RETENTION: draw(st.integers(600, 2_678_400)),
        Field.EXPIRY: draw(st.none() | st.integers(86_400, 10**7)),
        Field.MINIMUM_BACKOFF: draw(SECONDS) if has_retry else None,
        Field.MAXIMUM_BACKOFF: draw(SECONDS) if has_retry else None,
        Field.DEAD_LETTER_TOPIC: "projects/q/topics/dead" if has_dead else None,
        Field.MAX_DELIVERY_ATTEMPTS: draw(st.integers(5, 100)) if has_dead else None,
    }


@given(policies())
def test_what_is_written_is_read_again(policy: Policy) -> None:
    """Every field, also those whose absence means something."""
    wanted = Subscription(NAME, TOPIC, policy)
    assert read_subscription(write_subscription(wanted)) == wanted


def test_what_is_not_listed_is_not_set() -> None:
    """So that a subscription made by another tool gets the service's own defaults."""
    assert {field.name for field, _ in write_subscription(Subscription(NAME, TOPIC, {})).ListFields()} == {
        "name",
        "topic",
    }


def test_absent_values_are_the_services_defaults() -> None:
    """10 to 600 s of backoff, 5 attempts, 31 days to expiry."""
    message = types.Subscription.pb()(name=NAME, topic=TOPIC)
    message.retry_policy.SetInParent()
    message.dead_letter_policy.dead_letter_topic = "projects/q/topics/dead"
    policy = read_subscription(message).policy
    assert [policy[each] for each in (Field.MINIMUM_BACKOFF, Field.MAXIMUM_BACKOFF)] == [10, 600]
    assert (policy[Field.MAX_DELIVERY_ATTEMPTS], policy[Field.EXPIRY]) == (5, 31 * 86_400)
    message.expiration_policy.ttl.CopyFrom(duration_pb2.Duration(seconds=86_400))
    assert read_subscription(message).policy[Field.EXPIRY] == 86_400


OBSTACLES = {
    "pushes to a URL": {"push_config": {"push_endpoint": "https://example.invalid"}},
    "writes to BigQuery": {"bigquery_config": {"table": "p.d.t"}},
    "writes to Cloud Storage": {"cloud_storage_config": {"bucket": "b"}},
    "detached": {"detached": True},
    "its topic was deleted": {"topic": "_deleted-topic_"},
}


@pytest.mark.parametrize(("words", "fields"), OBSTACLES.items(), ids=OBSTACLES)
def test_what_cannot_be_pulled_from_is_an_obstacle(words: str, fields: dict[str, object]) -> None:
    """In words that say why."""
    message = types.Subscription.pb(types.Subscription(**{"name": NAME, "topic": TOPIC, **fields}))
    assert words in str(read_subscription(message).obstacle)


def test_an_empty_push_config_is_how_the_service_spells_pull() -> None:
    """It returns one for every pull subscription."""
    message = types.Subscription.pb()(name=NAME, topic=TOPIC)
    message.push_config.SetInParent()
    assert read_subscription(message).obstacle is None
