from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.pubsub_v1 import types

from tests.support.embedded_pubsub import EPOCH_S, START, BrokerBench, FakeTime
from worker.emulators.pubsub.broker import Broker
from worker.emulators.pubsub.broker import Topic as RegisteredTopic
from worker.emulators.pubsub.clock import NS_PER_S
from worker.emulators.pubsub.deliveries import Receiver
from worker.emulators.pubsub.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from worker.emulators.pubsub.messages import store

Topic = types.Topic.pb()
Subscription = types.Subscription.pb()


def data_of(pulled: list[tuple[str, Any, int]]) -> list[bytes]:
    return [message.data for _, message, _ in pulled]


def test_every_subscription_gets_every_message() -> None:
    """Messages published before it was created excepted."""
    bench = BrokerBench()
    first = bench.subscribe("first")
    bench.publish(b"1")
    second = bench.subscribe("second")
    bench.publish(b"2", b"3")
    assert data_of(bench.pull(first)) == [b"1", b"2", b"3"]
    assert data_of(bench.pull(second)) == [b"2", b"3"]


def test_a_message_arrives_as_published() -> None:
    """It has the id and time of its publication, and all that the publisher sent."""
    bench = BrokerBench()
    path = bench.subscribe()
    bench.time.sleep(1.5)
    (message_id,) = bench.publish(b"x", attributes={"a": "b"}, ordering_key="k")
    ((_, message, attempt),) = bench.pull(path)
    assert (message.message_id, message.ordering_key, dict(message.attributes)) == (message_id, "k", {"a": "b"})
    assert message.publish_time.ToNanoseconds() == int(EPOCH_S) * NS_PER_S + 1_500_000_000
    assert attempt == 0


def test_message_ids_are_unique_over_restarts() -> None:
    """A server started later issues other ids, as clients may remember ids to detect duplicates."""
    first, second = BrokerBench(), BrokerBench()
    second.time.sleep(1.0)
    later = Broker(second.time.clock, lambda _: None)
    later.create_topic(Topic(name=second.topic))
    earlier_ids = {message_id for _ in range(10) for message_id in first.publish(b"x")}
    later_ids = set(later.publish(second.topic, [types.PubsubMessage.pb()(data=b"x")]))
    assert len(earlier_ids) == 10
    assert max(earlier_ids) < min(later_ids)


def test_publish_times_never_go_back() -> None:
    """They stay when the wall clock goes back."""
    time = FakeTime()
    broker = Broker(time.clock, lambda _: None)
    broker.create_topic(Topic(name=BrokerBench.topic))
    broker.create_subscription(Subscription(name="projects/p/subscriptions/s-1", topic=BrokerBench.topic))
    for passed_s in (10.0, 5.0, 20.0):
        time.passed_s = passed_s
        broker.publish(BrokerBench.topic, [types.PubsubMessage.pb()(data=b"x")])
    taken = broker.subscription("projects/p/subscriptions/s-1").take(Receiver(lambda: None), 10, 1_000)
    assert [(m.publish_ns / NS_PER_S) - EPOCH_S for _, m, _ in taken] == [10.0, 10.0, 20.0]


def test_one_bad_message_refuses_its_whole_request() -> None:
    """No message of the request is delivered."""
    bench = BrokerBench()
    path = bench.subscribe()
    with pytest.raises(InvalidArgumentError):
        bench.publish(b"x", b"")
    assert bench.pull(path) == []


def test_a_dead_letter_names_its_source() -> None:
    """Content, attributes and key stay, four attributes are added, id and time are new, attempts start again from 1."""
    bench = BrokerBench()
    bench.broker.create_topic(Topic(name="projects/q/topics/dead"))
    policy = {"dead_letter_topic": "projects/q/topics/dead", "max_delivery_attempts": 5}
    dead = bench.subscribe("dead-sub", topic="projects/q/topics/dead", dead_letter_policy=policy)
    source = bench.subscribe("source-sub", dead_letter_policy=policy)
    (message_id,) = bench.publish(b"x", attributes={"a": "b"}, ordering_key="k")
    bench.time.sleep(7.25)
    attempts = []
    for _ in range(5):
        ((ack_id, _, attempt),) = bench.pull(source)
        attempts.append(attempt)
        bench.broker.subscription(source).modify_ack_deadline([ack_id], 0)
    assert attempts == [1, 2, 3, 4, 5]
    assert bench.pull(source) == []
    ((_, message, attempt),) = bench.pull(dead)
    assert (message.data, message.ordering_key, attempt) == (b"x", "k", 1)
    assert int(message.message_id) > int(message_id)
    assert message.publish_time.ToNanoseconds() == int(EPOCH_S) * NS_PER_S + 7_250_000_000
    assert dict(message.attributes) == {
        "a": "b",
        "CloudPubSubDeadLetterSourceDeliveryCount": "5",
        "CloudPubSubDeadLetterSourceSubscription": "source-sub",
        "CloudPubSubDeadLetterSourceSubscriptionProject": "p",
        "CloudPubSubDeadLetterSourceTopicPublishTime": "2023-11-14T22:13:20.000+00:00",
    }


def test_a_dead_letter_without_subscription_is_gone() -> None:
    """As on the service: the topic exists and has no subscription."""
    bench = BrokerBench()
    bench.broker.create_topic(Topic(name="projects/p/topics/dead"))
    source = bench.subscribe(dead_letter_policy={"dead_letter_topic": "projects/p/topics/dead"})
    bench.publish(b"x")
    for _ in range(5):
        ((ack_id, _, _),) = bench.pull(source)
        bench.broker.subscription(source).modify_ack_deadline([ack_id], 0)
    late = bench.subscribe("late", topic="projects/p/topics/dead")
    assert bench.pull(late) == []
    assert bench.broker.subscription(source).snapshot().dead_lettered_count == 1


def test_without_its_dead_letter_topic_a_message_stays() -> None:
    """The message is delivered again, beyond its limit of attempts."""
    bench = BrokerBench()
    bench.broker.create_topic(Topic(name="projects/p/topics/dead"))
    source = bench.subscribe(dead_letter_policy={"dead_letter_topic": "projects/p/topics/dead"})
    bench.broker.delete_topic("projects/p/topics/dead")
    bench.publish(b"x")
    for _ in range(6):
        ((ack_id, _, attempt),) = bench.pull(source)
        bench.broker.subscription(source).modify_ack_deadline([ack_id], 0)
    assert attempt == 6


def test_a_dead_letter_topic_must_exist() -> None:
    """It is checked when the policy is set, by creation or update."""
    bench = BrokerBench()
    policy = {"dead_letter_topic": "projects/p/topics/none"}
    with pytest.raises(NotFoundError, match=r"Resource not found \(resource=none\)\."):
        bench.subscribe(dead_letter_policy=policy)
    path = bench.subscribe()
    with pytest.raises(NotFoundError):
        bench.broker.update_subscription(Subscription(name=path, dead_letter_policy=policy), ["dead_letter_policy"])


def test_names_are_unique_and_unknown_ones_are_not_found() -> None:
    """The errors have the texts of the service."""
    bench = BrokerBench()
    path = bench.subscribe()
    with pytest.raises(AlreadyExistsError, match=r"already exists in the project \(resource=topic-a\)\."):
        bench.broker.create_topic(Topic(name=bench.topic))
    with pytest.raises(AlreadyExistsError, match=r"resource=sub-a"):
        bench.subscribe()
    missing = "projects/p/topics/missing"
    for call in (
        lambda: bench.broker.get_topic(missing),
        lambda: bench.broker.delete_topic(missing),
        lambda: bench.broker.list_topic_subscriptions(missing, 0, ""),
        lambda: bench.publish(b"x", topic=missing),
        lambda: bench.subscribe("other", topic=missing),
        lambda: bench.broker.get_subscription("projects/p/subscriptions/missing"),
        lambda: bench.broker.delete_subscription("projects/p/subscriptions/missing"),
        lambda: bench.broker.subscription("projects/p/subscriptions/missing"),
        lambda: bench.broker.seek("projects/p/subscriptions/missing", 0),
        lambda: bench.broker.detach_subscription("projects/p/subscriptions/missing"),
    ):
        with pytest.raises(NotFoundError, match=r"Resource not found \(resource=missing\)\."):
            call()
    with pytest.raises(InvalidArgumentError, match=r"Invalid \[subscriptions\] name"):
        bench.broker.subscription(path.replace("subscriptions", "topics"))


def test_a_deleted_topic_leaves_its_subscriptions_and_their_backlog() -> None:
    """They name a deleted topic, also after a new topic of the same name was created."""
    bench = BrokerBench()
    path = bench.subscribe()
    bench.publish(b"1")
    bench.broker.delete_topic(bench.topic)
    assert bench.broker.get_subscription(path).topic == "_deleted-topic_"
    bench.broker.create_topic(Topic(name=bench.topic))
    bench.publish(b"2")
    assert data_of(bench.pull(path)) == [b"1"]
    bench.broker.update_subscription(Subscription(name=path, ack_deadline_seconds=30), ["ack_deadline_seconds"])
    assert bench.broker.get_subscription(path).ack_deadline_seconds == 30


def test_a_deleted_subscription_ends_its_receivers_and_gets_nothing_more() -> None:
    """The receivers get NOT_FOUND; a new subscription of the same name is empty."""
    bench = BrokerBench()
    path = bench.subscribe()
    receiver = Receiver(lambda: None)
    bench.broker.subscription(path).attach(receiver)
    bench.publish(b"1")
    bench.broker.delete_subscription(path)
    assert isinstance(receiver.error, NotFoundError)
    bench.publish(b"2")
    assert bench.subscribe() == path
    assert bench.pull(path) == []


def test_a_detached_subscription_drops_everything_and_delivers_nothing() -> None:
    """It still exists, is not listed with its topic, and refuses calls that need messages."""
    bench = BrokerBench()
    path = bench.subscribe()
    receiver = Receiver(lambda: None)
    bench.broker.subscription(path).attach(receiver)
    bench.publish(b"1")
    bench.broker.detach_subscription(path)
    bench.publish(b"2")
    assert isinstance(receiver.error, FailedPreconditionError)
    assert bench.broker.get_subscription(path).detached
    assert bench.broker.list_topic_subscriptions(bench.topic, 0, "") == ([], "")
    assert bench.broker.subscription(path, attached=False).snapshot().dropped_count == 1
    with pytest.raises(FailedPreconditionError, match=r"detached .*resource=sub-a"):
        bench.broker.subscription(path)
    with pytest.raises(FailedPreconditionError):
        bench.broker.seek(path, 0)
    bench.broker.delete_subscription(path)


def test_an_update_holds_at_once() -> None:
    """The next nack of a leased message follows the new policy."""
    bench = BrokerBench()
    path = bench.subscribe()
    bench.publish(b"x")
    ((ack_id, _, _),) = bench.pull(path)
    patch = types.Subscription.pb(types.Subscription(name=path, retry_policy={"minimum_backoff": Duration(seconds=20)}))
    updated = bench.broker.update_subscription(patch, ["retry_policy"])
    assert updated.retry_policy.maximum_backoff.seconds == 600
    assert updated == bench.broker.get_subscription(path)
    bench.broker.subscription(path).modify_ack_deadline([ack_id], 0)
    assert list(bench.broker.subscription(path).snapshot().backing_off.values()) == [20.0]


def test_a_refused_update_changes_nothing() -> None:
    """The resource and the policy of the engine stay."""
    bench = BrokerBench()
    path = bench.subscribe(ack_deadline_seconds=20)
    with pytest.raises(InvalidArgumentError):
        bench.broker.update_subscription(Subscription(name=path, ack_deadline_seconds=5), ["ack_deadline_seconds"])
    assert bench.broker.get_subscription(path).ack_deadline_seconds == 20
    assert bench.broker.subscription(path).policy.ack_deadline_s == 20.0


def test_lists_come_in_pages_in_order_of_name() -> None:
    """A list has one project; its last page has no token."""
    bench = BrokerBench()
    for name in ("c", "a", "b"):
        bench.broker.create_topic(Topic(name=f"projects/q/topics/topic-{name}"))
        bench.broker.create_subscription(
            Subscription(name=f"projects/q/subscriptions/sub-{name}", topic="projects/q/topics/topic-c")
        )
    topics, token = bench.broker.list_topics("projects/q", 2, "")
    assert [topic.name[-1] for topic in topics] == ["a", "b"]
    topics, token = bench.broker.list_topics("projects/q", 2, token)
    assert ([topic.name[-1] for topic in topics], token) == (["c"], "")
    subscriptions, token = bench.broker.list_subscriptions("projects/q", 0, "")
    assert ([s.name[-1] for s in subscriptions], token) == (["a", "b", "c"], "")
    paths, token = bench.broker.list_topic_subscriptions("projects/q/topics/topic-c", 2, "")
    assert (paths, token) == (
        ["projects/q/subscriptions/sub-a", "projects/q/subscriptions/sub-b"],
        "projects/q/subscriptions/sub-c",
    )
    assert bench.broker.list_topics("projects/none", 0, "") == ([], "")
    with pytest.raises(InvalidArgumentError, match="page_size"):
        bench.broker.list_topics("projects/q", -1, "")


def test_a_topic_with_retention_replays_to_a_later_subscription() -> None:
    """A seek also finds messages published before the subscription was created, within the retention."""
    bench = BrokerBench()
    retention = Topic(name=bench.topic, message_retention_duration=Duration(seconds=600))
    bench.publish(b"unretained")
    bench.broker.update_topic(retention, ["message_retention_duration"])
    bench.publish(b"1")
    bench.time.sleep(400.0)
    bench.publish(b"2")
    path = bench.subscribe()
    bench.broker.seek(path, 0)
    assert data_of(bench.pull(path)) == [b"1", b"2"]
    bench.time.sleep(300.0)
    late = bench.subscribe("late")
    bench.broker.seek(late, 0)
    assert data_of(bench.pull(late)) == [b"2"]


def test_a_topic_drops_old_messages_when_it_gets_new_ones() -> None:
    """It does not need a seek for that."""
    topic = RegisteredTopic(Topic(message_retention_duration=Duration(seconds=600)))
    for second in (0, 599, 601, 1_200):
        topic.deliver([store(types.PubsubMessage.pb()(data=b"x"), second, second * NS_PER_S)], second * NS_PER_S)
    assert [message.sequence for message in topic.retained] == [601, 1_200]


def test_a_topics_retention_reaches_its_subscriptions() -> None:
    """They show it from the update on, until the topic is deleted."""
    bench = BrokerBench()
    path = bench.subscribe()
    retention = Topic(name=bench.topic, message_retention_duration=Duration(seconds=2_000_000))
    bench.broker.update_topic(retention, ["message_retention_duration"])
    assert bench.broker.get_subscription(path).topic_message_retention_duration.seconds == 2_000_000
    assert bench.broker.subscription(path).policy.retention_s == 2_000_000.0
    bench.broker.delete_topic(bench.topic)
    assert not bench.broker.get_subscription(path).HasField("topic_message_retention_duration")


def test_a_tick_serves_all_subscriptions() -> None:
    """It returns the time of the next tick that any of them needs."""
    bench = BrokerBench()
    short, long = bench.subscribe("short", ack_deadline_seconds=10), bench.subscribe("long", ack_deadline_seconds=60)
    bench.publish(b"x")
    bench.pull(short)
    bench.pull(long)
    assert bench.due == START + 10.0
    bench.time.sleep(10.0)
    assert bench.broker.tick() == START + 60.0
    assert len(bench.broker.subscription(short).snapshot().ready) == 1


def test_ack_ids_of_another_subscription_are_refused() -> None:
    """Ack ids of an earlier server process are refused as well."""
    bench, other_run = BrokerBench(), BrokerBench()
    other_run.time.sleep(60.0)
    other_run.broker = Broker(other_run.time.clock, lambda _: None)
    other_run.broker.create_topic(Topic(name=bench.topic))
    first, second = bench.subscribe("first"), bench.subscribe("second")
    other_run.subscribe("first")
    bench.publish(b"x")
    other_run.publish(b"x")
    ((foreign, _, _),) = bench.pull(second)
    ((own, _, _),) = bench.pull(first)
    ((later_run, _, _),) = other_run.pull(first)
    for ack_id in (foreign, later_run):
        with pytest.raises(InvalidArgumentError, match="invalid ack ID"):
            bench.broker.subscription(first).acknowledge([ack_id])
    bench.broker.subscription(first).acknowledge([own])
