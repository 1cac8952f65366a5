import math

import pytest
from google.pubsub_v1 import types

from tests.support.embedded_pubsub import EPOCH_S, START, Bench
from worker.emulators.pubsub.clock import NS_PER_S
from worker.emulators.pubsub.deliveries import DeliveryPolicy
from worker.emulators.pubsub.errors import InvalidArgumentError, NotFoundError
from worker.emulators.pubsub.messages import store


def test_a_message_is_leased_once_at_a_time() -> None:
    """While a lease runs, no other receiver gets the message."""
    bench = Bench()
    first, second = bench.receiver(), bench.receiver()
    bench.publish()
    assert first.take() == ["1"]
    assert second.take() == []
    bench.time.sleep(9.99)
    assert second.take() == []


def test_an_acked_message_is_never_redelivered() -> None:
    """It is removed."""
    bench = Bench()
    receiver = bench.receiver()
    bench.publish()
    receiver.take()
    assert receiver.ack("1") == []
    bench.time.sleep(1_000)
    assert receiver.take() == []
    snapshot = bench.subscription.snapshot()
    assert snapshot.acked_count == 1
    assert snapshot.delivery_attempts == {}
    assert bench.subscription.tick() == START + 604_800.0, "only the look at retention is still planned"


def test_an_expired_lease_is_redelivered_at_its_deadline_exactly() -> None:
    """The message is redelivered neither before nor after its ack deadline."""
    bench = Bench(ack_deadline_s=10.0)
    receiver = bench.receiver()
    bench.publish()
    receiver.take()
    bench.time.sleep(9.999)
    assert receiver.take() == []
    bench.time.sleep(0.001)
    assert receiver.take() == ["1"]
    assert bench.subscription.snapshot().expired_count == 1


def test_the_receivers_own_deadline_overrides_the_subscriptions() -> None:
    """A stream may set its own ack deadline."""
    bench = Bench(ack_deadline_s=60.0)
    receiver = bench.receiver(ack_deadline_s=10.0)
    bench.publish()
    receiver.take()
    assert bench.subscription.snapshot().leased[0].expires_in_s == 10.0


@pytest.mark.parametrize("seconds", [3.0, 45.0])
def test_a_modified_deadline_counts_from_the_call(seconds: float) -> None:
    """It may be longer or shorter than the first one."""
    bench = Bench(ack_deadline_s=10.0)
    receiver = bench.receiver()
    bench.publish()
    receiver.take()
    bench.time.sleep(5)
    receiver.modify(seconds, "1")
    bench.time.sleep(seconds - 0.001)
    assert receiver.take() == []
    bench.time.sleep(0.001)
    assert receiver.take() == ["1"]


def test_a_nack_without_retry_policy_is_redelivered_at_once() -> None:
    """It counts as an attempt."""
    bench = Bench()
    receiver = bench.receiver()
    bench.publish()
    receiver.take()
    receiver.nack("1")
    assert bench.subscription.snapshot().delivery_attempts == {"1": 2}
    assert receiver.take() == ["1"]


def test_a_second_nack_of_the_same_lease_counts_no_attempt() -> None:
    """A client may repeat a call whose answer was lost; no attempt is counted."""
    bench = Bench(minimum_backoff_s=5.0)
    receiver = bench.receiver()
    bench.publish()
    receiver.take()
    receiver.nack("1")
    receiver.nack("1")
    assert bench.subscription.snapshot().delivery_attempts == {"1": 2}


@pytest.mark.parametrize("how", ["nack", "expiry"])
def test_backoff_doubles_from_the_first_failure_to_the_maximum(how: str) -> None:
    """It is minimum x 2^(n-1) up to the maximum, after nacks and after expired leases."""
    bench = Bench(ack_deadline_s=10.0, minimum_backoff_s=1.5, maximum_backoff_s=10.0)
    receiver = bench.receiver()
    bench.publish()
    for wait in (1.5, 3.0, 6.0, 10.0, 10.0):
        assert receiver.take() == ["1"]
        if how == "nack":
            receiver.nack("1")
        else:
            bench.time.sleep(10.0)
        assert bench.subscription.snapshot().backing_off == {"1": wait}
        bench.time.sleep(wait - 0.001)
        assert receiver.take() == []
        bench.time.sleep(0.001)


def test_a_late_tick_uses_the_time_of_the_end() -> None:
    """The backoff after an expiry starts at the end of the lease, not at the time of the tick."""
    bench = Bench(ack_deadline_s=10.0, minimum_backoff_s=5.0)
    receiver = bench.receiver()
    bench.publish()
    receiver.take()
    bench.time.sleep(12.0)
    assert bench.subscription.snapshot().backing_off == {"1": 3.0}
    bench.time.sleep(3.0)
    assert receiver.take() == ["1"]


def test_backoff_stays_finite_after_thousands_of_failures() -> None:
    """The doubling stops before the float overflows."""
    policy = DeliveryPolicy(minimum_backoff_s=0.1, maximum_backoff_s=600.0)
    assert policy.backoff_s(100_000) == 600.0
    assert DeliveryPolicy(minimum_backoff_s=0.0).backoff_s(100_000) == 0.0


def test_backoff_delays_its_own_message_only() -> None:
    """Other messages are delivered meanwhile."""
    bench = Bench(minimum_backoff_s=60.0)
    receiver = bench.receiver()
    bench.publish(2)
    receiver.take(1)
    receiver.nack("1")
    assert receiver.take() == ["2"]


def test_the_attempt_is_sent_only_with_a_dead_letter_policy() -> None:
    """Without one the field is unset, as on the service, although attempts are counted."""
    plain, counted = Bench(), Bench(max_delivery_attempts=5)
    for bench, expected in ((plain, [0, 0, 0]), (counted, [1, 2, 3])):
        receiver = bench.receiver()
        bench.publish()
        attempts = []
        for _ in range(3):
            receiver.take()
            attempts.append(receiver.attempts["1"])
            receiver.nack("1")
        assert attempts == expected
        assert bench.subscription.snapshot().delivery_attempts == {"1": 4}


def test_a_message_is_dead_lettered_after_exactly_its_attempts() -> None:
    """Nacks and expiries count alike; after the fifth the message is removed."""
    bench = Bench(ack_deadline_s=10.0, max_delivery_attempts=5)
    receiver = bench.receiver()
    bench.publish()
    for attempt in range(1, 6):
        assert bench.forwarded == []
        assert receiver.take() == ["1"]
        assert receiver.attempts["1"] == attempt
        if attempt % 2:
            receiver.nack("1")
        else:
            bench.time.sleep(10.0)
    snapshot = bench.subscription.snapshot()
    assert bench.forwarded == [("1", 5)]
    assert snapshot.dead_lettered_count == 1
    assert snapshot.delivery_attempts == {}
    assert receiver.take() == []


def test_without_a_dead_letter_topic_a_message_is_delivered_again() -> None:
    """It is delivered again; every further failure tries to forward it."""
    bench = Bench(max_delivery_attempts=5)
    bench.has_dead_letter_topic = False
    receiver = bench.receiver()
    bench.publish()
    for _ in range(7):
        receiver.take()
        receiver.nack("1")
    assert receiver.take() == ["1"]
    assert receiver.attempts["1"] == 8
    bench.has_dead_letter_topic = True
    receiver.nack("1")
    assert bench.forwarded == [("1", 8)]


def test_a_late_ack_settles_a_message_not_yet_delivered_again() -> None:
    """The service accepts such an ack without exactly-once delivery."""
    bench = Bench(ack_deadline_s=10.0, minimum_backoff_s=5.0)
    receiver = bench.receiver()
    bench.publish(2)
    receiver.take()
    bench.time.sleep(10.0)
    receiver.ack("1")
    bench.time.sleep(5.0)
    assert receiver.take() == ["2"]


def test_the_ack_id_of_an_earlier_lease_does_nothing_after_redelivery() -> None:
    """The call succeeds and is ignored."""
    bench = Bench()
    receiver = bench.receiver()
    bench.publish()
    receiver.take()
    stale = receiver.ack_ids["1"]
    receiver.nack("1")
    receiver.take()
    assert bench.subscription.acknowledge([stale]) == []
    assert bench.subscription.modify_ack_deadline([stale], 0) == []
    assert len(bench.subscription.snapshot().leased) == 1
    assert receiver.ack("1") == []
    assert bench.subscription.snapshot().acked_count == 1


@pytest.mark.parametrize(
    "garbage", ["garbage", "", "ours-1-", "ours-1-999", "ours-1-0", "ours-1--1", "ours-2-1", "ours-1-²"]
)
def test_an_unknown_ack_id_fails_the_whole_request(garbage: str) -> None:
    """The whole request fails."""
    bench = Bench()
    receiver = bench.receiver()
    bench.publish()
    receiver.take()
    with pytest.raises(InvalidArgumentError, match="invalid ack ID"):
        bench.subscription.acknowledge([receiver.ack_ids["1"], garbage])
    with pytest.raises(InvalidArgumentError, match="invalid ack ID"):
        bench.subscription.modify_ack_deadline([receiver.ack_ids["1"], garbage], 0)
    assert len(bench.subscription.snapshot().leased) == 1


def test_exactly_once_refuses_a_second_ack() -> None:
    """The first ack settled the message."""
    bench = Bench(is_exactly_once=True)
    receiver = bench.receiver()
    bench.publish()
    receiver.take()
    assert receiver.ack("1", "1") == [], "twice in one request is one ack"
    assert receiver.ack("1") == [receiver.ack_ids["1"]]


def test_exactly_once_refuses_acks_after_the_lease() -> None:
    """Late acks and deadline changes fail; the other ids of the request are applied."""
    bench = Bench(is_exactly_once=True, ack_deadline_s=10.0)
    receiver = bench.receiver()
    bench.publish(2)
    receiver.take()
    receiver.modify(60, "2")
    bench.time.sleep(10.0)
    assert receiver.modify(30, "1") == [receiver.ack_ids["1"]]
    assert receiver.ack("1", "2") == [receiver.ack_ids["1"]]
    assert bench.subscription.snapshot().acked_count == 1
    assert receiver.take() == ["1"]
    assert receiver.ack("1") == []
    assert bench.subscription.acknowledge(["garbage"]) == ["garbage"]


def test_exactly_once_applies_to_running_leases() -> None:
    """A policy applies from the moment it is set."""
    bench = Bench(ack_deadline_s=10.0)
    receiver = bench.receiver()
    bench.publish()
    receiver.take()
    bench.subscription.apply(DeliveryPolicy(is_exactly_once=True))
    bench.time.sleep(10.0)
    assert receiver.ack("1") == [receiver.ack_ids["1"]]


def test_a_message_the_filter_does_not_match_is_never_delivered() -> None:
    """It is not stored, and a seek does not find it."""
    bench = Bench(matches=lambda attributes: attributes.get("a") == "yes")
    receiver = bench.receiver()
    bench.publish(a="yes")
    bench.publish(a="no")
    bench.publish()
    assert receiver.take() == ["1"]
    bench.subscription.seek(0)
    assert bench.subscription.snapshot().delivery_attempts == {"1": 1}


def test_messages_of_a_detached_receiver_are_redelivered_after_the_deadline() -> None:
    """Detaching a receiver nacks no message."""
    bench = Bench(ack_deadline_s=10.0)
    first, second = bench.receiver(), bench.receiver()
    bench.publish()
    first.take()
    first.leave()
    assert second.take() == []
    bench.time.sleep(10.0)
    assert second.take() == ["1"]


def test_a_tick_is_announced_when_it_becomes_earlier() -> None:
    """The server is told of every earlier end; each tick returns the next time."""
    bench = Bench(ack_deadline_s=60.0, minimum_backoff_s=5.0)
    receiver = bench.receiver()
    bench.publish(2)
    receiver.take()
    assert bench.announced[-1] == START + 60.0
    receiver.nack("1")
    assert bench.announced[-1] == START + 5.0
    bench.time.sleep(5.0)
    assert bench.subscription.tick() == START + 60.0
    assert receiver.take(1) == ["1"]


def test_closing_tells_every_receiver_why() -> None:
    """Every receiver is woken and has the error."""
    bench = Bench()
    receivers = [bench.receiver(), bench.receiver()]
    error = NotFoundError.of("projects/p/subscriptions/s")
    bench.subscription.close(error)
    assert [(r.error, r.wakes) for r in receivers] == [(error, 1), (error, 1)]


def test_the_snapshot_shows_every_message() -> None:
    """It has ready, leased and backing-off messages, attempts and counts of one moment."""
    bench = Bench(ack_deadline_s=20.0, minimum_backoff_s=30.0)
    receiver = bench.receiver()
    bench.publish(4)
    receiver.take(3)
    receiver.ack("1")
    receiver.nack("2")
    bench.time.sleep(1.0)
    snapshot = bench.subscription.snapshot()
    assert snapshot.ready == ("4",)
    assert [(lease.message_id, lease.delivery_attempt, lease.expires_in_s) for lease in snapshot.leased] == [
        ("3", 1, 19.0)
    ]
    assert snapshot.leased[0].ack_id == receiver.ack_ids["3"]
    assert snapshot.backing_off == {"2": 29.0}
    assert snapshot.delivery_attempts == {"2": 2, "3": 1, "4": 1}
    assert (snapshot.acked_count, snapshot.delivered_count, snapshot.receivers) == (1, 3, 1)
    assert bench.subscription.snapshot() == snapshot, "looking changes nothing"
    assert math.isfinite(bench.subscription.tick())


def at(seconds: float) -> int:
    """Nanoseconds since the epoch, this many seconds after the start of the test."""
    return int((EPOCH_S + seconds) * NS_PER_S)


def three_minutes_of_messages(**policy: object) -> Bench:
    """Messages 1, 2, 3, published at 0, 60 and 120 s."""
    bench = Bench(**policy)
    for _ in range(3):
        bench.publish()
        bench.time.sleep(60.0)
    return bench


def test_a_seek_to_the_future_acks_all_messages() -> None:
    """All messages count as acked; messages published later are delivered."""
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


def test_a_seek_acks_what_was_published_before_it() -> None:
    """A message published at that very time stays."""
    bench = three_minutes_of_messages()
    bench.subscription.seek(at(60.0))
    assert bench.receiver().take() == ["2", "3"]


def test_a_seek_back_replays_retained_acked_messages_in_order() -> None:
    """Their attempts are counted from 1 again."""
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
    """They were removed when they were acked."""
    bench = three_minutes_of_messages()
    receiver = bench.receiver()
    receiver.take()
    receiver.ack("1", "2", "3")
    bench.subscription.seek(at(0.0))
    assert receiver.take() == []


def test_a_seek_back_leaves_leases_and_backoffs_alone() -> None:
    """Unacked messages keep their state."""
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
    """Replayed messages come before the leased ones, so their leases end."""
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
    """Messages that the subscription no longer has are added in publish order; those it has are not doubled."""
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
    """Ready, leased and backing-off messages are dropped within a second."""
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


def test_retained_acked_messages_are_dropped_and_not_counted() -> None:
    """A seek further back finds none."""
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
    """The next tick drops the messages that are too old under the new policy."""
    bench = three_minutes_of_messages(retention_s=6_000.0)
    bench.subscription.apply(DeliveryPolicy(retention_s=100.0))
    bench.subscription.tick()
    assert bench.receiver().take() == ["3"]


def test_clear_drops_everything() -> None:
    """Leased messages are dropped as well."""
    bench = three_minutes_of_messages()
    receiver = bench.receiver()
    receiver.take(1)
    bench.subscription.clear()
    snapshot = bench.subscription.snapshot()
    assert snapshot.delivery_attempts == {}
    assert snapshot.dropped_count == 3
    assert receiver.take() == []
