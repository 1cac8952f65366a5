import pytest

from tests.support.embedded_pubsub import Bench


def ordered(**policy: object) -> Bench:
    return Bench(is_ordered=True, **policy)


def test_a_key_is_delivered_in_publish_order() -> None:
    """This also holds when keys are interleaved and taken in parts."""
    bench = ordered()
    receiver = bench.receiver()
    for _ in range(3):
        bench.publish(key="a")
        bench.publish(key="b")
    received = receiver.take(2) + receiver.take(1) + receiver.take()
    assert [m for m in received if m in {"1", "3", "5"}] == ["1", "3", "5"]
    assert [m for m in received if m in {"2", "4", "6"}] == ["2", "4", "6"]


def test_keys_mean_nothing_on_an_unordered_subscription() -> None:
    """A nack redelivers only its own message."""
    bench = Bench()
    receiver = bench.receiver()
    bench.publish(3, key="a")
    receiver.take()
    receiver.nack("1")
    assert receiver.take() == ["1"]


@pytest.mark.parametrize("how", ["nack", "expiry"])
def test_a_failure_redelivers_the_message_and_all_later_ones(how: str) -> None:
    """The failed message comes first; leases of earlier messages run on."""
    bench = ordered(ack_deadline_s=10.0)
    receiver = bench.receiver()
    bench.publish(4, key="a")
    receiver.take()
    if how == "nack":
        receiver.nack("2")
    else:
        receiver.modify(60, "1", "3", "4")
        bench.time.sleep(10.0)
    assert receiver.take() == ["2", "3", "4"]
    assert [lease.message_id for lease in bench.subscription.snapshot().leased] == ["1", "2", "3", "4"]


def test_messages_behind_a_failure_count_no_attempt() -> None:
    """Only the failed message counts an attempt; the old ack ids of the others have no effect."""
    bench = ordered(max_delivery_attempts=5)
    receiver = bench.receiver()
    bench.publish(3, key="a")
    receiver.take()
    stale = receiver.ack_ids["3"]
    receiver.nack("1")
    bench.subscription.acknowledge([stale])
    bench.subscription.modify_ack_deadline([stale], 0)
    assert receiver.take() == ["1", "2", "3"]
    assert [receiver.attempts[m] for m in ("1", "2", "3")] == [2, 1, 1]


def test_one_request_that_nacks_all_counts_the_first_of_each_key() -> None:
    """The first nack ends the leases of the others before their turn."""
    bench = ordered()
    receiver = bench.receiver()
    bench.publish(3, key="a")
    receiver.take()
    receiver.nack("1", "2", "3")
    assert bench.subscription.snapshot().delivery_attempts == {"1": 2, "2": 1, "3": 1}
    assert receiver.take() == ["1", "2", "3"]


def test_acked_messages_behind_a_failure_are_delivered_again() -> None:
    """As documented, without exactly-once delivery."""
    for is_exactly_once, expected in ((False, ["1", "2", "3"]), (True, ["1", "3"])):
        bench = ordered(is_exactly_once=is_exactly_once)
        receiver = bench.receiver()
        bench.publish(3, key="a")
        receiver.take()
        receiver.ack("2")
        receiver.nack("1")
        assert receiver.take() == expected
        receiver.ack(*expected)
        snapshot = bench.subscription.snapshot()
        assert snapshot.acked_count == 3
        assert snapshot.delivery_attempts == {}


def test_a_backoff_delays_its_own_key_only() -> None:
    """Later messages of the key wait for it; messages of other keys and without a key do not."""
    bench = ordered(minimum_backoff_s=5.0)
    receiver = bench.receiver()
    bench.publish(2, key="a")
    receiver.take(1)
    receiver.nack("1")
    bench.publish(key="b")
    bench.publish()
    assert sorted(receiver.take()) == ["3", "4"]
    bench.publish(key="a")
    bench.time.sleep(4.999)
    assert receiver.take() == []
    bench.time.sleep(0.001)
    assert receiver.take() == ["1", "2", "5"]


def test_a_key_waits_for_all_of_its_backoffs() -> None:
    """The key continues when both have ended."""
    bench = ordered(minimum_backoff_s=5.0)
    receiver = bench.receiver()
    bench.publish(3, key="a")
    receiver.take()
    receiver.nack("2")
    bench.time.sleep(3.0)
    receiver.nack("1")
    bench.time.sleep(2.0)
    assert receiver.take() == []
    bench.time.sleep(3.0)
    assert receiver.take() == ["1", "2", "3"]


def test_a_key_stays_with_its_owner() -> None:
    """Other receivers get it after its last lease has ended."""
    bench = ordered()
    first, second = bench.receiver(max_messages=2), bench.receiver()
    bench.publish(4, key="a")
    assert first.take() == ["1", "2"]
    assert second.take() == []
    first.ack("1")
    assert second.take() == []
    assert first.take() == ["3"]
    first.ack("2", "3")
    assert second.take() == ["4"]


def test_new_messages_of_an_owned_key_wake_its_owner_only() -> None:
    """Other receivers could not take them."""
    bench = ordered()
    first, second = bench.receiver(), bench.receiver()
    bench.publish(key="a")
    first.take()
    before = (first.wakes, second.wakes)
    bench.publish(key="a")
    assert (first.wakes, second.wakes) == (before[0] + 1, before[1])
    assert first.take() == ["2"]


@pytest.mark.parametrize("answer", ["ack", "expiry", "nack"])
def test_a_key_is_never_stuck_after_its_receiver_left(answer: str) -> None:
    """The next receiver gets the unacked messages and those published since, in order."""
    bench = ordered(ack_deadline_s=10.0)
    first = bench.receiver()
    bench.publish(3, key="a")
    assert first.take(2) == ["1", "2"]
    first.leave()
    second = bench.receiver()
    bench.publish(2, key="a")
    assert second.take() == []
    if answer == "ack":
        first.ack("1", "2")
        expected = ["3", "4", "5"]
    elif answer == "nack":
        first.nack("1")
        expected = ["1", "2", "3", "4", "5"]
    else:
        bench.time.sleep(10.0)
        expected = ["1", "2", "3", "4", "5"]
    bench.subscription.tick()
    assert second.take() == expected
    second.ack(*expected)
    assert bench.subscription.snapshot().delivery_attempts == {}


def test_a_late_ack_lets_the_key_continue() -> None:
    """The message that waited for redelivery is settled, and the next one becomes the head."""
    bench = ordered(ack_deadline_s=10.0, minimum_backoff_s=600.0)
    receiver = bench.receiver()
    bench.publish(2, key="a")
    receiver.take(1)
    bench.time.sleep(10.0)
    assert receiver.take() == []
    receiver.ack("1")
    assert receiver.take() == ["2"]


def test_a_late_ack_between_leases_lets_the_key_continue_at_its_owner() -> None:
    """An earlier message is still leased, so its receiver gets the next one."""
    bench = ordered(ack_deadline_s=10.0, minimum_backoff_s=600.0)
    first, second = bench.receiver(), bench.receiver()
    bench.publish(3, key="a")
    assert first.take(2) == ["1", "2"]
    first.modify(60, "1")
    bench.time.sleep(10.0)
    assert first.take() == second.take() == []
    first.ack("2")
    assert second.take() == []
    assert first.take() == ["3"]


def test_a_dead_letter_lets_the_key_continue() -> None:
    """Later messages keep their leases when an earlier one is dead-lettered."""
    bench = ordered(max_delivery_attempts=5)
    receiver = bench.receiver()
    bench.publish(2, key="a")
    for _ in range(5):
        assert receiver.take() == ["1", "2"]
        receiver.nack("1")
    assert bench.forwarded == [("1", 5)]
    assert [lease.message_id for lease in bench.subscription.snapshot().leased] == ["2"]
    receiver.ack("2")
    bench.publish(key="a")
    assert receiver.take() == ["3"]


def test_retention_in_the_middle_of_a_key_leaves_the_rest_in_order() -> None:
    """Messages do not wait for dropped ones."""
    bench = ordered(ack_deadline_s=600.0, retention_s=600.0)
    receiver = bench.receiver()
    bench.publish(2, key="a")
    receiver.take(1)
    bench.time.sleep(500.0)
    bench.publish(2, key="a")
    bench.time.sleep(101.0)
    assert receiver.take() == ["3", "4"]
    assert bench.subscription.snapshot().dropped_count == 2


def test_dropping_a_retained_acked_message_leaves_its_key_whole() -> None:
    """Later messages of the key still wait for each other."""
    bench = ordered(retains_acked=True, retention_s=600.0, ack_deadline_s=600.0)
    first, second = bench.receiver(), bench.receiver()
    bench.publish(key="a")
    first.take()
    first.ack("1")
    bench.time.sleep(300.0)
    bench.publish(key="a")
    assert first.take() == ["2"]
    bench.time.sleep(301.0)
    bench.subscription.tick()
    bench.publish(key="a")
    assert second.take() == []
    assert first.take() == ["3"]
