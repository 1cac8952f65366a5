"""
Google's high-level client, unmodified, against the embedded server in a thread of its own.

It knows the server by `PUBSUB_EMULATOR_HOST` only, as a user's program would.
"""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from google.api_core.exceptions import NotFound
from google.cloud import pubsub_v1
from google.cloud.pubsub_v1.subscriber.exceptions import AcknowledgeError, AcknowledgeStatus
from google.cloud.pubsub_v1.subscriber.message import Message
from google.cloud.pubsub_v1.types import FlowControl, PublisherOptions
from google.protobuf.duration_pb2 import Duration
from google.pubsub_v1.services.publisher.transports import PublisherGrpcTransport
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcTransport

from tests.support.waiting import until
from worker.emulators.pubsub import LocalPubSubThread, SubscriptionSnapshot

TOPIC = "projects/any-project/topics/requests"
SUBSCRIPTION = "projects/any-project/subscriptions/requests-worker"
WAIT_S = 20.0


class Program:
    """A user's program with a publisher and a subscriber, and the server it uses."""

    def __init__(self, server: LocalPubSubThread) -> None:
        self.server = server
        self.faults = server.faults
        self.publisher = pubsub_v1.PublisherClient(publisher_options=PublisherOptions(enable_message_ordering=True))
        self.subscriber = pubsub_v1.SubscriberClient()
        self.received: queue.Queue[Message] = queue.Queue()

    def set_up(self, **subscription: Any) -> None:
        self.publisher.create_topic(name=TOPIC)
        self.subscriber.create_subscription(request={"name": SUBSCRIPTION, "topic": TOPIC, **subscription})

    def publish(self, *data: bytes, **fields: Any) -> list[str]:
        futures = [self.publisher.publish(TOPIC, item, **fields) for item in data]
        return [future.result(WAIT_S) for future in futures]

    @contextmanager
    def subscribed(self, **options: Any) -> Iterator[Any]:
        """Put every message that arrives into `received`; yields the client's future."""
        future = self.subscriber.subscribe(SUBSCRIPTION, self.received.put, **options)
        try:
            yield future
        finally:
            future.cancel()
            if not future.done() or future.exception(0) is None:
                future.result(WAIT_S)

    def next(self) -> Message:
        return self.received.get(timeout=WAIT_S)

    @property
    def state(self) -> SubscriptionSnapshot:
        return self.faults.inspect(SUBSCRIPTION)

    def close(self) -> None:
        self.publisher.stop()
        self.publisher.transport.close()
        self.subscriber.close()


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[Program]:
    with LocalPubSubThread() as server:
        monkeypatch.setenv("PUBSUB_EMULATOR_HOST", server.address)
        running = Program(server)
        yield running
        running.close()


def test_five_hundred_messages_are_received_and_acked(program: Program) -> None:
    """Each message is received and acked once, with its attributes."""
    program.set_up()
    with program.subscribed():
        message_ids = program.publish(*(b"%d" % number for number in range(500)), origin="test")
        received = [program.next() for _ in message_ids]
        for message in received:
            message.ack()
        until(lambda: program.state.acked_count == 500)
    assert {message.message_id for message in received} == set(message_ids)
    assert {int(message.data) for message in received} == set(range(500))
    assert all(dict(message.attributes) == {"origin": "test"} for message in received)
    assert program.state.delivered_count == 500
    assert program.received.empty()


def test_the_server_applies_the_flow_control(program: Program) -> None:
    """With a limit of ten the server sends ten messages; after five acks it sends five more."""
    program.set_up()
    program.publish(*[b"x"] * 100)
    with program.subscribed(flow_control=FlowControl(max_messages=10)):
        first = [program.next() for _ in range(10)]
        assert program.state.delivered_count == 10
        for message in first[:5]:
            message.ack()
        for _ in range(5):
            program.next()
        assert program.state.delivered_count == 15
        assert program.received.empty()


def test_a_nack_is_redelivered_after_the_backoff(program: Program) -> None:
    """The backoff grows exponentially from the first nack on, and every attempt is counted."""
    program.publisher.create_topic(name=TOPIC + "-dead")
    program.set_up(
        retry_policy={"minimum_backoff": Duration(seconds=100), "maximum_backoff": Duration(seconds=300)},
        dead_letter_policy={"dead_letter_topic": TOPIC + "-dead", "max_delivery_attempts": 5},
    )
    program.publish(b"x")
    with program.subscribed():
        for attempt, wait in ((1, 100), (2, 200), (3, 300), (4, 300)):
            message = program.next()
            assert message.delivery_attempt == attempt
            message.nack()
            until(lambda: bool(program.state.backing_off))
            assert list(program.state.backing_off.values()) == [pytest.approx(wait, abs=5)]
            program.server.advance(wait)
        message = program.next()
        assert message.delivery_attempt == 5
        message.nack()
        until(lambda: program.state.dead_lettered_count == 1)


def test_exactly_once_tells_the_second_ack_from_the_first(program: Program) -> None:
    """The first ack succeeds, the second fails with INVALID_ACK_ID."""
    program.set_up(enable_exactly_once_delivery=True)
    program.publish(b"x")
    with program.subscribed():
        message = program.next()
        assert message.ack_with_response().result(WAIT_S) is AcknowledgeStatus.SUCCESS
        with pytest.raises(AcknowledgeError) as raised:
            message.ack_with_response().result(WAIT_S)
        assert raised.value.error_code is AcknowledgeStatus.INVALID_ACK_ID


def test_exactly_once_refuses_an_ack_after_the_lease(program: Program) -> None:
    """The message is redelivered with a new ack id, whose ack succeeds."""
    program.set_up(enable_exactly_once_delivery=True)
    program.publish(b"x")
    with program.subscribed():
        late = program.next()
        program.server.advance(700)
        again = program.next()
        with pytest.raises(AcknowledgeError) as raised:
            late.ack_with_response().result(WAIT_S)
        assert raised.value.error_code is AcknowledgeStatus.INVALID_ACK_ID
        assert again.ack_with_response().result(WAIT_S) is AcknowledgeStatus.SUCCESS


def test_a_deleted_subscription_ends_the_future(program: Program) -> None:
    """The future raises NotFound at once."""
    program.set_up()
    with program.subscribed() as future:
        until(lambda: program.state.receivers == 1)
        program.subscriber.delete_subscription(subscription=SUBSCRIPTION)
        with pytest.raises(NotFound, match="resource=requests-worker"):
            future.result(WAIT_S)


@pytest.mark.slow
def test_a_broken_stream_is_reopened_by_the_client(program: Program) -> None:
    """The client retries a retryable status by itself; messages acked before stay acked."""
    program.set_up()
    with program.subscribed():
        program.publish(b"1")
        program.next().ack()
        until(lambda: program.state.acked_count == 1)
        assert program.faults.break_streams(grpc.StatusCode.UNAVAILABLE, subscription_path=SUBSCRIPTION) == 1
        program.publish(b"2")
        assert program.next().data == b"2"
        assert program.faults.calls("StreamingPull") == 2


def test_ordered_messages_arrive_in_order_also_after_a_nack(program: Program) -> None:
    """The nacked message and all later ones of its key are redelivered in order."""
    program.set_up(enable_message_ordering=True)
    program.publish(*(b"%d" % number for number in range(20)), ordering_key="k")
    settled: list[bytes] = []
    refused = threading.Event()
    done = threading.Event()

    def handle(message: Message) -> None:
        if message.data == b"7" and not refused.is_set():
            refused.set()
            message.nack()
            return
        settled.append(message.data)
        message.ack()
        if message.data == b"19" and b"7" in settled:  # not the 19 that came along with the refused 7
            done.set()

    future = program.subscriber.subscribe(SUBSCRIPTION, handle)
    assert done.wait(WAIT_S)
    until(lambda: not program.state.delivery_attempts)
    future.cancel()
    future.result(WAIT_S)
    last_run = settled[max(index for index, data in enumerate(settled) if data == b"7") :]
    assert last_run == [b"%d" % number for number in range(7, 20)]


def test_keys_are_not_stuck_after_a_reconnect(program: Program) -> None:
    """Later streams get all messages of keys that the first stream owned."""
    program.set_up(enable_message_ordering=True)
    for key in ("a", "b", "c"):
        program.publish(*(b"%d" % number for number in range(10)), ordering_key=key)
    seen: set[str] = set()
    for _ in range(3):
        with program.subscribed(flow_control=FlowControl(max_messages=5)):
            message = program.next()
            message.ack()
            seen.add(message.message_id)
        while not program.received.empty():
            program.received.get_nowait()
        program.server.advance(700)
    with program.subscribed():
        while len(seen) < 30:
            message = program.next()
            message.ack()
            seen.add(message.message_id)
        until(lambda: not program.state.delivery_attempts)


def test_five_megabytes_pass_over_a_channel_without_limits(program: Program) -> None:
    """A client that uses the environment variable has gRPC's limit of 4 MiB; a channel with its own options has not."""
    program.set_up()
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    data = b"x" * 5_000_000
    with (
        grpc.insecure_channel(program.server.address, options=options) as publishing,
        grpc.insecure_channel(program.server.address, options=options) as subscribing,
    ):
        publisher = pubsub_v1.PublisherClient(transport=PublisherGrpcTransport(channel=publishing))
        subscriber = pubsub_v1.SubscriberClient(transport=SubscriberGrpcTransport(channel=subscribing))
        future = subscriber.subscribe(SUBSCRIPTION, program.received.put)
        publisher.publish(TOPIC, data).result(WAIT_S)
        message = program.next()
        assert message.data == data
        message.ack()
        until(lambda: program.state.acked_count == 1)
        future.cancel()
        future.result(WAIT_S)
        publisher.stop()


def test_a_blocked_caller_does_not_stop_the_server(program: Program) -> None:
    """The server's loop runs in another thread while this thread blocks in `result`."""
    program.set_up()
    program.faults.delay("Publish", 0.05, times=1)
    program.publish(b"x")
    assert program.faults.calls("Publish") == 1
    program.faults.reset_calls()
    assert program.faults.calls("Publish") == 0


def test_start_raises_the_error_of_the_bind() -> None:
    """The error of the bind is raised to the caller, and the thread ends."""
    before = set(threading.enumerate())
    with LocalPubSubThread() as server:
        second = LocalPubSubThread(port=server.port)
        with pytest.raises(OSError, match=str(server.port)):
            second.start()
        second.stop()
    server.stop()
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name == "localpubsub"]
