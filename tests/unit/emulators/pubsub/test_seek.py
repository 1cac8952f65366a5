from google.pubsub_v1 import types

from tests.support.localpubsub_harness import EPOCH_S, START, Bench
from worker.emulators.pubsub.clock import NS_PER_S
from worker.emulators.pubsub.deliveries import DeliveryPolicy
from worker.emulators.pubsub.messages import store


def at(seconds: float) -> int:
    """Nanoseconds since the epoch, some seconds after the start of the test."""
    return int((EPOCH_S + seconds) * NS_PER_S)


def three_minutes_of_messages(**policy: object) -> Bench:
    """Messages 1, 2, 3, published at 0, 60 and 120 s."""
    bench = Bench(**policy)
    for _ in range(3):
        bench.publish()
        bench.time.sleep(60.0)
    return bench


def test_a_seek_to_the_future_purges_what_is_there() -> None:
    """Everything counts as acked; what is published afterwards is delivered."""
    bench = three_minutes_of_messages(minimum_backoff_s=5.0)
    receiver = bench.receiver()
    receiver.take(2)
    receiver.nack("1")
    bench.subscription.seek(at(1_000_000))
    snapshot = bench.subscription.snapshot()
    assert snapshot.delivery_attempts == {}
    assert snapshot.acked_count == 3
    bench.time.sleep(100.0)
    assert receiver.take() == []
    bench.publish()
    assert receiver.take() == ["4"]


def test_a_seek_purges_what_was_published_before_it() -> None:
    """The time itself belongs to what stays."""
    bench = three_minutes_of_messages()
    bench.subscription.seek(at(60.0))
    assert bench.receiver().take() == ["2", "3"]


def test_a_seek_back_replays_retained_acked_messages_in_order() -> None:
    """With a fresh count of attempts."""
    bench = three_minutes_of_messages(retains_acked=True)
    receiver = bench.receiver()
    receiver.take()
    receiver.nack("2")
    receiver.take()
    receiver.ack("3", "2", "1")
    bench.subscription.seek(at(30.0))
    assert bench.subscription.snapshot().delivery_attempts == {"2": 1, "3": 1}
    assert bench.subscription.snapshot().acked_count == 1
    assert receiver.take() == ["2", "3"]
    receiver.ack("2", "3")
    assert bench.subscription.snapshot().acked_count == 3


def test_without_retention_of_acked_messages_a_seek_back_finds_nothing() -> None:
    """They were forgotten when they were acked."""
    bench = three_minutes_of_messages()
    receiver = bench.receiver()
    receiver.take()
    receiver.ack("1", "2", "3")
    bench.subscription.seek(at(0.0))
    assert receiver.take() == []


def test_a_seek_back_leaves_leases_and_backoffs_alone() -> None:
    """They were not acked before and are not acked now."""
    bench = three_minutes_of_messages(ack_deadline_s=60.0, minimum_backoff_s=30.0, retains_acked=True)
    receiver = bench.receiver()
    receiver.take(2)
    receiver.nack("2")
    bench.subscription.seek(at(0.0))
    snapshot = bench.subscription.snapshot()
    assert snapshot.ready == ("3",)
    assert [lease.message_id for lease in snapshot.leased] == ["1"]
    assert snapshot.backing_off == {"2": 30.0}
    assert receiver.ack("1") == []


def test_an_ordered_key_starts_over_after_a_seek() -> None:
    """Replayed messages come before those that were out, so these are taken back."""
    bench = Bench(is_ordered=True, retains_acked=True)
    receiver = bench.receiver()
    bench.publish(3, key="a")
    receiver.take()
    receiver.ack("1")
    bench.subscription.seek(at(0.0))
    assert receiver.take() == ["1", "2", "3"]
    assert receiver.outstanding_messages == 3
    receiver.ack("1", "2", "3")
    assert receiver.outstanding_messages == 0
    assert bench.subscription.snapshot().delivery_attempts == {}


def test_what_the_topic_retained_is_replayed_through_the_filter() -> None:
    """Messages the subscription forgot or never had come in publish order; those it holds are not doubled."""
    bench = Bench(matches=lambda attributes: "skip" not in attributes)
    receiver = bench.receiver()
    bench.publish(2)
    receiver.take(1)
    receiver.ack("1")
    now_ns = bench.time.clock.now_ns()
    message = types.PubsubMessage.pb()
    replay = [
        store(message(data=b"x"), 0, at(-1.0)),
        store(message(data=b"x"), 1, now_ns),
        store(message(data=b"x"), 2, now_ns),
        store(message(data=b"x", attributes={"skip": ""}), 3, now_ns),
    ]
    bench.subscription.seek(at(0.0), replay)
    assert bench.subscription.snapshot().acked_count == 1, "what is older than the seek is not even looked at"
    assert receiver.take() == ["1", "2"]


def test_unacked_messages_are_dropped_after_the_retention() -> None:
    """Ready, leased and backing off alike, within a second."""
    bench = Bench(ack_deadline_s=600.0, minimum_backoff_s=600.0, retention_s=600.0)
    receiver = bench.receiver()
    bench.publish(3)
    receiver.take(2)
    receiver.nack("2")
    bench.time.sleep(300.0)
    bench.publish()
    assert bench.announced[-1] == START + 600.0
    bench.time.sleep(300.0)
    assert bench.subscription.tick() == START + 900.0
    snapshot = bench.subscription.snapshot()
    assert snapshot.delivery_attempts == {"4": 1}
    assert snapshot.dropped_count == 3
    assert receiver.ack("1") == [], "an ack of a dropped message is ignored"
    assert bench.subscription.snapshot().acked_count == 0
    assert receiver.outstanding_messages == 0


def test_retained_acked_messages_are_dropped_too_and_not_counted_as_lost() -> None:
    """A seek further back finds nothing."""
    bench = Bench(retains_acked=True, retention_s=600.0)
    receiver = bench.receiver()
    bench.publish()
    receiver.take()
    receiver.ack("1")
    bench.time.sleep(601.0)
    bench.subscription.tick()
    bench.subscription.seek(at(0.0))
    assert receiver.take() == []
    assert bench.subscription.snapshot().dropped_count == 0


def test_a_shorter_retention_holds_for_messages_already_there() -> None:
    """The next tick drops what is too old under the new policy."""
    bench = three_minutes_of_messages(retention_s=6_000.0)
    bench.subscription.apply(DeliveryPolicy(retention_s=100.0))
    bench.subscription.tick()
    assert bench.receiver().take() == ["3"]


def test_clear_drops_everything() -> None:
    """Detaching gives up what is held, leased or not."""
    bench = three_minutes_of_messages()
    receiver = bench.receiver()
    receiver.take(1)
    bench.subscription.clear()
    snapshot = bench.subscription.snapshot()
    assert snapshot.delivery_attempts == {}
    assert snapshot.dropped_count == 3
    assert receiver.take() == []
