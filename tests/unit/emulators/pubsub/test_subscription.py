import math

import pytest

from tests.support.localpubsub_harness import START, Bench
from worker.emulators.pubsub.deliveries import DeliveryPolicy
from worker.emulators.pubsub.errors import InvalidArgumentError, NotFoundError


def test_a_message_is_leased_once_at_a_time() -> None:
    """While a lease runs nobody else gets the message."""
    bench = Bench()
    first, second = bench.receiver(), bench.receiver()
    bench.publish()
    assert first.take() == ["1"]
    assert second.take() == []
    bench.time.sleep(9.99)
    assert second.take() == []


def test_an_acked_message_never_comes_back() -> None:
    """Nothing is left of it, whatever time passes."""
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
    """Neither before nor after the ack deadline."""
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
    """A stream brings its ack deadline along."""
    bench = Bench(ack_deadline_s=60.0)
    receiver = bench.receiver(ack_deadline_s=10.0)
    bench.publish()
    receiver.take()
    assert bench.subscription.snapshot().leased[0].expires_in_s == 10.0


@pytest.mark.parametrize("seconds", [3.0, 45.0])
def test_a_modified_deadline_counts_from_the_call(seconds: float) -> None:
    """Longer and shorter than the first one."""
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


def test_a_nack_without_retry_policy_comes_back_at_once() -> None:
    """And counts as an attempt."""
    bench = Bench()
    receiver = bench.receiver()
    bench.publish()
    receiver.take()
    receiver.nack("1")
    assert bench.subscription.snapshot().delivery_attempts == {"1": 2}
    assert receiver.take() == ["1"]


def test_a_second_nack_of_the_same_lease_costs_nothing() -> None:
    """Repeating a call whose answer was lost burns no attempt."""
    bench = Bench(minimum_backoff_s=5.0)
    receiver = bench.receiver()
    bench.publish()
    receiver.take()
    receiver.nack("1")
    receiver.nack("1")
    assert bench.subscription.snapshot().delivery_attempts == {"1": 2}


@pytest.mark.parametrize("how", ["nack", "expiry"])
def test_backoff_doubles_from_the_first_failure_to_the_maximum(how: str) -> None:
    """minimum x 2^(n-1), capped: after nacks and after expired leases alike, the first included."""
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


def test_a_late_tick_backdates_what_it_does() -> None:
    """The backoff after an expiry counts from the end of the lease, not from when somebody looked."""
    bench = Bench(ack_deadline_s=10.0, minimum_backoff_s=5.0)
    receiver = bench.receiver()
    bench.publish()
    receiver.take()
    bench.time.sleep(12.0)
    assert bench.subscription.snapshot().backing_off == {"1": 3.0}
    bench.time.sleep(3.0)
    assert receiver.take() == ["1"]


def test_backoff_stays_finite_after_thousands_of_failures() -> None:
    """The doubling stops long before the float overflows."""
    policy = DeliveryPolicy(minimum_backoff_s=0.1, maximum_backoff_s=600.0)
    assert policy.backoff_s(100_000) == 600.0
    assert DeliveryPolicy(minimum_backoff_s=0.0).backoff_s(100_000) == 0.0


def test_backoff_delays_its_own_message_only() -> None:
    """Others are delivered meanwhile."""
    bench = Bench(minimum_backoff_s=60.0)
    receiver = bench.receiver()
    bench.publish(2)
    receiver.take(1)
    receiver.nack("1")
    assert receiver.take() == ["2"]


def test_the_attempt_is_told_only_with_a_dead_letter_policy() -> None:
    """Without one the field stays unset, as on the service; the server knows it all the same."""
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
    """Nacks and expiries count alike; after the fifth it is gone from here."""
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


def test_without_its_dead_letter_topic_a_message_is_tried_on() -> None:
    """It stays until forwarding works, which the next failure tries."""
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
    """Best effort in the receiver's favour, without exactly-once delivery."""
    bench = Bench(ack_deadline_s=10.0, minimum_backoff_s=5.0)
    receiver = bench.receiver()
    bench.publish(2)
    receiver.take()
    bench.time.sleep(10.0)
    receiver.ack("1")
    bench.time.sleep(5.0)
    assert receiver.take() == ["2"]


def test_the_ack_id_of_an_earlier_lease_does_nothing_after_redelivery() -> None:
    """It is answered OK and ignored."""
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
def test_an_ack_id_never_given_out_is_refused_and_nothing_is_acked(garbage: str) -> None:
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
    """The first one settled it."""
    bench = Bench(is_exactly_once=True)
    receiver = bench.receiver()
    bench.publish()
    receiver.take()
    assert receiver.ack("1", "1") == [], "twice in one request is one ack"
    assert receiver.ack("1") == [receiver.ack_ids["1"]]


def test_exactly_once_refuses_what_came_after_the_lease() -> None:
    """Late acks and deadline changes fail at the deadline, others in the request are applied."""
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


def test_switching_exactly_once_on_holds_for_leases_in_being() -> None:
    """A policy is followed from the moment it is applied."""
    bench = Bench(ack_deadline_s=10.0)
    receiver = bench.receiver()
    bench.publish()
    receiver.take()
    bench.subscription.apply(DeliveryPolicy(is_exactly_once=True))
    bench.time.sleep(10.0)
    assert receiver.ack("1") == [receiver.ack_ids["1"]]


def test_a_message_the_filter_does_not_match_is_never_delivered() -> None:
    """It is gone at once, and a seek does not find it."""
    bench = Bench(matches=lambda attributes: attributes.get("a") == "yes")
    receiver = bench.receiver()
    bench.publish(a="yes")
    bench.publish(a="no")
    bench.publish()
    assert receiver.take() == ["1"]
    bench.subscription.seek(0)
    assert bench.subscription.snapshot().delivery_attempts == {"1": 1}


def test_what_a_departed_receiver_held_comes_back_after_the_deadline() -> None:
    """Leaving nacks nothing."""
    bench = Bench(ack_deadline_s=10.0)
    first, second = bench.receiver(), bench.receiver()
    bench.publish()
    first.take()
    first.leave()
    assert second.take() == []
    bench.time.sleep(10.0)
    assert second.take() == ["1"]


def test_a_tick_is_announced_when_it_becomes_earlier() -> None:
    """The shell hears of every earlier end, and learns the next one from the tick."""
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
    """They are woken and find the error."""
    bench = Bench()
    receivers = [bench.receiver(), bench.receiver()]
    error = NotFoundError.of("projects/p/subscriptions/s")
    bench.subscription.close(error)
    assert [(r.error, r.wakes) for r in receivers] == [(error, 1), (error, 1)]


def test_the_snapshot_tells_where_everything_stands() -> None:
    """Ready, leased, backing off, attempts and counts, at one moment."""
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
