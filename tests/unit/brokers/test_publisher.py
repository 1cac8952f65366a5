"""The publisher over a small gRPC server: batches, their limits, and what each failure means for whom."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from google.pubsub_v1 import types

from tests.support.waiting import eventually
from worker.brokers import publisher as module
from worker.brokers.publisher import MAX_RPCS, PubSubPublisher
from worker.errors import (
    MessageRejectedError,
    MessageTooLargeError,
    PublishError,
    PublishRefusedError,
    PublishRetryableError,
)
from worker.settings.schema import PublishSettings
from worker.wire.message import MAX_PUBSUB_MESSAGE_BYTES, message_bytes

TOPIC = "projects/p/topics/t"
Request = types.PublishRequest.pb()
Response = types.PublishResponse.pb()
Answer = Callable[[Any, "grpc.aio.ServicerContext[Any, Any]"], Awaitable[Any]]


class FakeTopic:
    """A gRPC server with the one method; `requests` holds every batch in order of arrival."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.metadata: list[dict[str, str]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.arrived = asyncio.Condition()
        self.fail: Callable[[Any], grpc.StatusCode | None] = lambda _: None
        self.ids = lambda request: [f"id-{m.data.decode()[:20]}" for m in request.messages]
        self.address = ""

    async def publish(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        async with self.arrived:
            self.arrived.notify_all()
        await self.gate.wait()
        if (code := self.fail(request)) is not None:
            await context.abort(code, "so it is")
        return Response(message_ids=self.ids(request))

    async def until(self, count: int) -> None:
        async with self.arrived:
            await self.arrived.wait_for(lambda: len(self.requests) >= count)

    def sizes(self) -> list[int]:
        return [len(request.messages) for request in self.requests]


@pytest.fixture
async def topic() -> AsyncIterator[FakeTopic]:
    """A topic that accepts everything until told otherwise."""
    fake = FakeTopic()
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    handler = grpc.unary_unary_rpc_method_handler(
        fake.publish, request_deserializer=Request.FromString, response_serializer=Response.SerializeToString
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("google.pubsub.v1.Publisher", {"Publish": handler}),)
    )
    fake.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield fake
    fake.gate.set()
    await server.stop(None)


@pytest.fixture
async def opened(topic: FakeTopic) -> AsyncIterator[Callable[..., PubSubPublisher]]:
    """A factory of publishers onto the topic, closed at the end."""
    publishers: list[PubSubPublisher] = []

    def build(**settings: Any) -> PubSubPublisher:
        channel = grpc.aio.insecure_channel(topic.address, options=[("grpc.max_send_message_length", -1)])
        publishers.append(PubSubPublisher(channel, TOPIC, PublishSettings(**settings)))
        return publishers[-1]

    yield build
    topic.gate.set()
    for publisher in publishers:
        await publisher.aclose()


Open = Callable[..., PubSubPublisher]


def publish_all(publisher: PubSubPublisher, *data: bytes) -> list["asyncio.Task[str]"]:
    return [asyncio.create_task(publisher.publish(item, {"n": item.decode()[:20]})) for item in data]


async def started() -> None:
    """Let every new task run to its first wait."""
    for _ in range(3):
        await asyncio.sleep(0)


async def outcomes(tasks: list["asyncio.Task[str]"]) -> list[Any]:
    found = await asyncio.gather(*tasks, return_exceptions=True)
    return [type(item) if isinstance(item, BaseException) else item for item in found]


# Batches


async def test_a_message_arrives_as_it_was_given(topic: FakeTopic, opened: Open) -> None:
    """Data, attributes, the topic's full name, and the routing header Google's front end wants."""
    assert await opened().publish(b"{}", {"a": "é", "b": ""}) == "id-{}"
    (request,) = topic.requests
    assert (request.topic, request.messages[0].data) == (TOPIC, b"{}")
    assert dict(request.messages[0].attributes) == {"a": "é", "b": ""}
    assert topic.metadata[0]["x-goog-request-params"] == f"topic={TOPIC}"


async def test_messages_of_one_moment_share_an_rpc_and_get_their_own_ids(topic: FakeTopic, opened: Open) -> None:
    """Ids come back in the order of the messages, each to its caller."""
    data = [f"{n}".encode() for n in range(37)]
    assert await outcomes(publish_all(opened(), *data)) == [f"id-{n}" for n in range(37)]
    assert topic.sizes() == [37]


async def test_a_full_batch_goes_at_once(topic: FakeTopic, opened: Open) -> None:
    """By number of messages, without waiting for the delay."""
    publisher = opened(batch_messages=10, batch_delay_s=1)
    tasks = publish_all(publisher, *(f"{n}".encode() for n in range(25)))
    await topic.until(2)
    await outcomes(tasks[:20])
    assert topic.sizes() == [10, 10]
    await publisher.aclose()
    assert topic.sizes() == [10, 10, 5]
    assert (await outcomes(tasks))[20:] == ["id-20", "id-21", "id-22", "id-23", "id-24"]


async def test_a_batch_never_exceeds_its_bytes(topic: FakeTopic, opened: Open) -> None:
    """What would make it too large starts the next one; a larger single message goes alone."""
    tasks = publish_all(opened(batch_bytes=1000), *(b"x" * size for size in (400, 400, 400, 5000, 10)))
    await outcomes(tasks)
    assert sorted(topic.sizes()) == [1, 1, 1, 2]  # RPCs under way at once arrive in any order


async def test_busy_rpcs_let_batches_grow_up_to_their_limits(topic: FakeTopic, opened: Open) -> None:
    """With every RPC busy what comes is collected; a large message does not push a batch over the broker's limit."""
    publisher = opened(batch_bytes=6_000_000, batch_delay_s=0)
    topic.gate.clear()
    tasks = []
    for number in range(MAX_RPCS):
        tasks += publish_all(publisher, b"%d" % number)
        await topic.until(number + 1)
    tasks += publish_all(publisher, *(b"y" * 100 for _ in range(50)))
    await started()
    assert len(topic.requests) == MAX_RPCS
    tasks += publish_all(publisher, b"a" * 5_900_000, b"b" * 9_000_000)
    await topic.until(MAX_RPCS + 2)
    topic.gate.set()
    assert all(isinstance(outcome, str) for outcome in await outcomes(tasks))
    assert max(request.ByteSize() for request in topic.requests) <= MAX_PUBSUB_MESSAGE_BYTES
    assert sorted(topic.sizes()) == [1] * (MAX_RPCS + 1) + [51]


async def test_the_next_batch_goes_when_an_rpc_ends(
    topic: FakeTopic, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that was collected is forgotten."""
    monkeypatch.setattr(module, "MAX_RPCS", 1)
    publisher = opened(batch_delay_s=0)
    topic.gate.clear()
    tasks = publish_all(publisher, b"0")
    await topic.until(1)
    tasks += publish_all(publisher, b"1", b"2", b"3")
    await started()
    topic.gate.set()
    assert await outcomes(tasks) == ["id-0", "id-1", "id-2", "id-3"]
    assert topic.sizes() == [1, 3]


# Size


async def test_the_largest_message_fits_and_one_byte_more_is_refused_unsent(topic: FakeTopic, opened: Open) -> None:
    """The limit counts the request that carries it; over it nothing is sent."""
    publisher = opened()
    attributes = {f"key-{n}": "v" * 50 for n in range(100)}
    size = MAX_PUBSUB_MESSAGE_BYTES - message_bytes(b"", attributes)
    with pytest.raises(MessageTooLargeError, match="10000000"):
        await publisher.publish(b"x" * size, attributes)
    with pytest.raises(MessageTooLargeError, match="10000000"):
        await publisher.publish(b"x" * (MAX_PUBSUB_MESSAGE_BYTES + 1), {})
    assert topic.requests == []
    low, high = size - 5000, size
    while high - low > 1:  # the largest that is taken
        middle = (low + high) // 2
        try:
            await publisher.publish(b"x" * middle, attributes)
        except MessageTooLargeError:
            high = middle
        else:
            low = middle
    largest = max(request.ByteSize() for request in topic.requests)
    assert MAX_PUBSUB_MESSAGE_BYTES - 100 < largest <= MAX_PUBSUB_MESSAGE_BYTES


# Failures


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.UNAVAILABLE, PublishRetryableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, PublishRetryableError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, PublishRetryableError),
        (grpc.StatusCode.ABORTED, PublishRetryableError),
        (grpc.StatusCode.INTERNAL, PublishRetryableError),
        (grpc.StatusCode.UNKNOWN, PublishRetryableError),
        (grpc.StatusCode.CANCELLED, PublishRetryableError),
        (grpc.StatusCode.UNAUTHENTICATED, PublishRetryableError),
        (grpc.StatusCode.NOT_FOUND, PublishRefusedError),
        (grpc.StatusCode.PERMISSION_DENIED, PublishRefusedError),
        (grpc.StatusCode.FAILED_PRECONDITION, PublishRefusedError),
        (grpc.StatusCode.UNIMPLEMENTED, PublishRefusedError),
        (grpc.StatusCode.INVALID_ARGUMENT, MessageRejectedError),
        (grpc.StatusCode.OUT_OF_RANGE, MessageRejectedError),
    ],
    ids=lambda value: value.name if isinstance(value, grpc.StatusCode) else value.__name__,
)
async def test_a_status_means_one_thing(
    topic: FakeTopic, opened: Open, code: grpc.StatusCode, error: type[PublishError]
) -> None:
    """Every waiting caller gets the kind of error that says what to do, naming topic and status."""
    topic.fail = lambda _: code
    tasks = publish_all(opened(), b"0", b"1")
    assert await outcomes(tasks) == [error, error]
    for task in tasks:
        assert code.name in str(task.exception())
        assert TOPIC in str(task.exception())
    assert tasks[0].exception() is not tasks[1].exception()  # a traceback belongs to one
    retried = 3 if error is MessageRejectedError else 1
    assert len(topic.requests) == retried  # one try each; only an invalid batch is taken apart


async def test_one_bad_message_does_not_fail_its_neighbours(topic: FakeTopic, opened: Open) -> None:
    """A batch the broker calls invalid is sent again message by message."""
    topic.fail = lambda request: (
        grpc.StatusCode.INVALID_ARGUMENT if any(m.data == b"bad" for m in request.messages) else None
    )
    tasks = publish_all(opened(), b"0", b"bad", b"2")
    assert await outcomes(tasks) == ["id-0", MessageRejectedError, "id-2"]


async def test_a_server_that_never_answers_is_given_up(topic: FakeTopic, opened: Open) -> None:
    """Bounded in time, and retryable: the message may be there all the same."""
    topic.gate.clear()
    with pytest.raises(PublishRetryableError, match="DEADLINE_EXCEEDED"):
        await opened(timeout_s=0.05).publish(b"0", {})


async def test_a_slow_broker_gets_an_answer_twice_and_no_more(topic: FakeTopic, opened: Open) -> None:
    """The first RPC goes on when its time is over; what it is told confirms the second try."""
    publisher = opened(timeout_s=0.05)
    topic.gate.clear()
    with pytest.raises(PublishRetryableError, match="DEADLINE_EXCEEDED"):
        await publisher.publish(b"0", {"n": "0"})
    publisher._timeout_s = 60.0  # the second try has time, however busy the machine is
    again = publish_all(publisher, b"0")
    await topic.until(2)
    topic.ids = lambda _: [f"rpc-{len(topic.requests)}"]
    topic.gate.set()
    assert await outcomes(again) == ["rpc-2"]
    assert await outcomes(publish_all(publisher, b"1")) == ["rpc-3"]
    assert [m.data for request in topic.requests for m in request.messages] == [b"0", b"0", b"1"]


async def test_what_is_confirmed_between_two_tries_is_not_sent_again(topic: FakeTopic, opened: Open) -> None:
    """The caller waits before its next try; the first RPC may be confirmed meanwhile."""
    publisher = opened(timeout_s=0.05)
    topic.gate.clear()
    tasks = publish_all(publisher, b"0", b"1")
    assert await outcomes(tasks) == [PublishRetryableError] * 2
    late = next(iter(publisher._late_rpcs))
    publisher._timeout_s = 60.0
    topic.gate.set()
    await late
    assert await outcomes(publish_all(publisher, b"0", b"1")) == ["id-0", "id-1"]
    assert topic.sizes() == [2]


async def test_another_message_is_not_confirmed_by_one_that_is_late(topic: FakeTopic, opened: Open) -> None:
    """Same bytes with other attributes are another message."""
    publisher = opened(timeout_s=0.05)
    topic.gate.clear()
    assert await outcomes(publish_all(publisher, b"0")) == [PublishRetryableError]
    publisher._timeout_s = 60.0
    topic.gate.set()
    assert await publisher.publish(b"0", {"n": "other"}) == "id-0"
    assert topic.sizes() == [1, 1]


async def test_each_timeout_doubles_the_time_until_the_broker_is_quick_again(topic: FakeTopic, opened: Open) -> None:
    """A limit that was too short is not tried again; it ends at a minute."""
    publisher = opened(timeout_s=0.02)
    topic.gate.clear()
    for said in ("0.02 s", "0.04 s", "0.08 s"):
        with pytest.raises(PublishRetryableError, match=said):
            await publisher.publish(b"0", {})
    topic.gate.set()
    publisher._timed_out(None, [], 50.0)
    assert publisher._timeout_s == module.MAX_TIMEOUT_S
    publisher._settings = PublishSettings(timeout_s=5)
    assert await publisher.publish(b"1", {}) == "id-1"
    assert publisher._timeout_s == 5


async def test_late_rpcs_leave_room_for_others_and_are_forgotten(
    topic: FakeTopic, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker that never answers an RPC blocks no further ones; what ended is not remembered for ever."""
    monkeypatch.setattr(module, "MAX_RPCS", 1)
    monkeypatch.setattr(module, "KEEP_LATE_S", 0.0)
    publisher = opened(timeout_s=0.05, batch_delay_s=0)
    topic.gate.clear()
    tasks = publish_all(publisher, b"0")
    await topic.until(1)
    tasks += publish_all(publisher, b"1")
    await topic.until(2)
    assert await outcomes(tasks) == [PublishRetryableError] * 2
    topic.fail = lambda _: grpc.StatusCode.UNAVAILABLE
    late = tuple(publisher._late_rpcs)
    topic.gate.set()
    await asyncio.gather(*late)
    await eventually(lambda: not publisher._late)


async def test_closing_gives_up_late_rpcs(topic: FakeTopic, opened: Open) -> None:
    """Their callers have been told."""
    publisher = opened(timeout_s=0.05)
    topic.gate.clear()
    assert await outcomes(publish_all(publisher, b"0")) == [PublishRetryableError]
    waiting = publish_all(publisher, b"1")
    await topic.until(2)
    async with asyncio.timeout(5):
        await publisher.aclose()
    assert await outcomes(waiting) == [PublishRetryableError]


async def test_nobody_there_is_retryable(opened: Open) -> None:
    """A refused connection fails at once."""
    channel = grpc.aio.insecure_channel("127.0.0.1:1")
    publisher = PubSubPublisher(channel, TOPIC, PublishSettings())
    with pytest.raises(PublishRetryableError, match="UNAVAILABLE"):
        await publisher.publish(b"0", {})
    await publisher.aclose()


async def test_too_few_ids_are_no_confirmation(topic: FakeTopic, opened: Open) -> None:
    """An answer that does not name every message confirms none."""
    topic.ids = lambda _: ["only-one"]
    assert await outcomes(publish_all(opened(), b"0", b"1")) == [PublishRetryableError] * 2


async def test_a_channel_closed_under_a_publish_cancels_nobody(topic: FakeTopic, opened: Open) -> None:
    """grpc cancels the RPC; the caller that waits for the publish was not cancelled and must not look so."""
    publisher = opened()
    topic.gate.clear()
    (task,) = publish_all(publisher, b"0")
    await topic.until(1)
    await publisher._channel.close(None)
    assert await outcomes([task]) == [PublishRetryableError]
    with pytest.raises(PublishRetryableError):
        await publisher.publish(b"1", {})


async def test_an_exception_nobody_foresaw_reaches_the_caller(topic: FakeTopic, opened: Open) -> None:
    """No publish stays pending and none looks cancelled."""
    publisher = opened()
    publisher._call = lambda *_args, **_kwargs: 1 / 0
    with pytest.raises(PublishRetryableError, match="ZeroDivisionError"):
        await publisher.publish(b"0", {})


# Cancellation and closing


async def test_a_cancelled_publish_leaves_the_others_alone(topic: FakeTopic, opened: Open) -> None:
    """Before or while the RPC runs: its own message may be there, its neighbours are confirmed."""
    publisher = opened()
    topic.gate.clear()
    tasks = publish_all(publisher, b"0", b"1", b"2")
    await started()
    tasks[0].cancel()
    await topic.until(1)
    tasks[1].cancel()
    await started()
    topic.gate.set()
    assert await outcomes(tasks) == [asyncio.CancelledError, asyncio.CancelledError, "id-2"]


async def test_closing_sends_what_waits_and_waits_for_it(topic: FakeTopic, opened: Open) -> None:
    """A drain loses no answer, whatever the delay of a batch."""
    publisher = opened(batch_delay_s=1)
    tasks = publish_all(publisher, b"0", b"1")
    await started()
    await publisher.aclose()
    assert [task.result() for task in tasks] == ["id-0", "id-1"]
    await publisher.aclose()


async def test_closing_waits_for_busy_rpcs_and_what_was_collected_behind_them(
    topic: FakeTopic, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what could not be sent yet."""
    monkeypatch.setattr(module, "MAX_RPCS", 1)
    publisher = opened(batch_delay_s=0)
    topic.gate.clear()
    tasks = publish_all(publisher, b"0")
    await topic.until(1)
    tasks += publish_all(publisher, b"1")
    await started()
    closing = asyncio.create_task(publisher.aclose())
    await started()
    assert not closing.done()
    topic.gate.set()
    await closing
    assert [task.result() for task in tasks] == ["id-0", "id-1"]


async def test_closing_waits_for_no_answer_that_was_given_up(
    topic: FakeTopic, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker that does not answer has had its time when the drain is over; only callers that still wait are waited for."""
    monkeypatch.setattr(module, "MAX_RPCS", 1)
    publisher = opened(batch_delay_s=0)
    topic.gate.clear()
    given_up = publish_all(publisher, b"0")
    await topic.until(1)
    given_up += publish_all(publisher, b"1")
    await started()
    for task in given_up:
        task.cancel()
    assert await outcomes(given_up) == [asyncio.CancelledError] * 2
    async with asyncio.timeout(5):
        await publisher.aclose()
    assert topic.sizes() == [1]


async def test_after_closing_nothing_is_taken(opened: Open) -> None:
    """A publish that comes too late is told so, and stays retryable elsewhere."""
    publisher = opened()
    await publisher.aclose()
    with pytest.raises(PublishRetryableError, match="closed"):
        await publisher.publish(b"0", {})
