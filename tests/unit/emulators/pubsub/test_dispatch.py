from tests.support.embedded_pubsub import Bench


def test_flow_control_by_messages_is_exact() -> None:
    """With a limit of ten, ten are sent; every answer makes room for one more."""
    bench = Bench()
    receiver = bench.receiver(max_messages=10)
    bench.publish(100)
    assert receiver.take() == [str(i) for i in range(1, 11)]
    assert receiver.take() == []
    receiver.ack("1", "2", "3")
    receiver.nack("4", "5")
    assert len(receiver.take()) == 5


def test_flow_control_counts_until_the_lease_ends() -> None:
    """An expired lease makes room, as an ack does."""
    bench = Bench(ack_deadline_s=10.0, minimum_backoff_s=60.0)
    receiver = bench.receiver(max_messages=1)
    bench.publish(2)
    assert receiver.take() == ["1"]
    bench.time.sleep(10.0)
    assert receiver.take() == ["2"]


def test_flow_control_by_bytes_stops_once_reached() -> None:
    """The message that reaches the limit is still sent, the next one is not."""
    bench = Bench()
    receiver = bench.receiver(max_bytes=2_500)
    bench.publish(10, size=1_000)
    assert len(receiver.take()) == 3
    receiver.ack("1")
    assert len(receiver.take()) == 1


def test_a_message_larger_than_the_byte_limit_is_sent_alone() -> None:
    """Otherwise it would never be delivered."""
    bench = Bench()
    receiver = bench.receiver(max_bytes=100)
    bench.publish(2, size=1_000)
    assert receiver.take() == ["1"]
    receiver.ack("1")
    assert receiver.take() == ["2"]


def test_a_response_stays_within_its_bytes() -> None:
    """Only a single message may be larger."""
    bench = Bench()
    receiver = bench.receiver()
    bench.publish(5, size=900)
    bench.publish(1, size=9_000)
    assert receiver.take(max_bytes=3_000) == ["1", "2", "3"]
    assert receiver.take(max_bytes=3_000) == ["4", "5"]
    assert receiver.take(max_bytes=3_000) == ["6"]


def test_a_waiting_receiver_is_woken_once_for_a_burst() -> None:
    """One publish request of many messages wakes it once."""
    bench = Bench()
    receiver = bench.receiver()
    bench.publish(100)
    assert receiver.wakes == 1


def test_a_full_receiver_is_woken_by_room_not_by_messages() -> None:
    """A new message that it could not take does not wake it."""
    bench = Bench()
    receiver = bench.receiver(max_messages=1)
    bench.publish()
    receiver.take()
    wakes = receiver.wakes
    bench.publish(10)
    assert receiver.wakes == wakes
    receiver.ack("1")
    assert receiver.wakes == wakes + 1
    assert receiver.take() == ["2"]


def test_a_backoff_that_ends_wakes_the_receivers() -> None:
    """The tick wakes them."""
    bench = Bench(minimum_backoff_s=5.0)
    receiver = bench.receiver()
    bench.publish()
    receiver.take()
    receiver.nack("1")
    wakes = receiver.wakes
    bench.time.sleep(5.0)
    bench.subscription.tick()
    assert receiver.wakes > wakes
    assert receiver.take() == ["1"]


def test_several_receivers_share_a_backlog() -> None:
    """The first take leaves the others their parts, and later takes get the rest."""
    bench = Bench()
    receivers = [bench.receiver() for _ in range(4)]
    bench.publish(100)
    assert [len(receiver.take()) for receiver in receivers] == [25, 19, 14, 11]
    rest = 0
    while part := receivers[0].take():
        rest += len(part)
    assert rest == 31


def test_a_full_receiver_has_no_share() -> None:
    """Receivers with room get its part."""
    bench = Bench()
    full, free = bench.receiver(max_messages=1), bench.receiver()
    bench.publish()
    full.take()
    bench.publish(50)
    assert len(free.take()) == 50


def test_single_messages_go_to_the_receivers_in_turn() -> None:
    """The receiver that was served last is woken last."""
    bench = Bench()
    order: list[int] = []
    receivers = [bench.receiver() for _ in range(3)]
    for number, receiver in enumerate(receivers):
        receiver.wake = lambda number=number: order.append(number)
    for _ in range(3):
        order.clear()
        bench.publish()
        receivers[order[0]].take()
    assert order[0] == 2


def test_a_redelivery_does_not_wait_behind_the_backlog() -> None:
    """Redeliveries and new messages are served in turn, however often a message fails."""
    bench = Bench()
    receiver = bench.receiver()
    bench.publish(1_000)
    receiver.take(1)
    for _ in range(5):
        receiver.nack("1")
        assert "1" in receiver.take(2)


def test_a_message_that_always_fails_does_not_block_the_backlog() -> None:
    """This also holds with one lease at a time."""
    bench = Bench()
    receiver = bench.receiver(max_messages=1)
    bench.publish(3)
    seen = []
    for _ in range(6):
        (message_id,) = receiver.take()
        seen.append(message_id)
        if message_id == "1":
            receiver.nack("1")
        else:
            receiver.ack(message_id)
    assert {"2", "3"} <= set(seen)
    assert bench.subscription.snapshot().acked_count == 2
