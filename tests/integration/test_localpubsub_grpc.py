"""The embedded server over real gRPC: its life, resources, Publish and Pull."""

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from google.api_core import exceptions
from google.protobuf import field_mask_pb2, timestamp_pb2

from tests.support.embedded_pubsub import SUBSCRIPTION, TOPIC, Google, Stream, running
from tests.support.waiting import eventually
from worker.emulators.pubsub import LocalPubSub, serve


@pytest.fixture
async def google() -> AsyncIterator[Google]:
    async with running() as clients:
        yield clients


async def test_a_server_owns_its_port_until_it_stops() -> None:
    """A second server on the port is refused; it can start after the first one stopped."""
    first = LocalPubSub()
    await first.start()
    assert first.address == f"127.0.0.1:{first.port}"
    second = LocalPubSub(port=first.port)
    with pytest.raises(OSError, match=str(first.port)):
        await second.start()
    with pytest.raises(RuntimeError, match="already"):
        await first.start()
    await first.stop()
    await first.stop()
    await second.start()
    await second.stop()


async def test_a_restarted_server_keeps_its_state() -> None:
    """Resources, messages and leases are kept under the same address, and the leases end by themselves."""
    server = LocalPubSub()
    await server.start()
    address = server.address
    async with grpc.aio.insecure_channel(address) as channel:
        google = Google(channel, server)
        await google.set_up()
        await google.publish(b"x")
        await google.pull()
        server.advance(9.9)
        await server.stop()
    await server.start()
    assert server.address == address
    async with grpc.aio.insecure_channel(address) as channel:
        stream = await Stream(Google(channel, server)).open()
        assert [item.message.data for item in await stream.receive(1)] == [b"x"]
        stream.cancel()
    await server.stop()


async def test_serve_tells_its_address_and_stops_when_cancelled() -> None:
    """After the cancellation the port is free."""
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve("127.0.0.1", 0, on_ready=ready.set_result))
    address = await ready
    async with grpc.aio.insecure_channel(address) as channel:
        await channel.channel_ready()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    again = LocalPubSub(port=int(address.rsplit(":", 1)[1]))
    await again.start()
    await again.stop()


async def test_only_loopback_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    """For any other address a warning is logged."""
    for host, warns in (("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            async with LocalPubSub(host):
                assert ("development only" in caplog.text) is warns


async def test_stopping_ends_streams_as_unavailable(google: Google) -> None:
    """Clients retry that status."""
    await google.set_up()
    stream = await Stream(google).open()
    await eventually(lambda: google.state.receivers == 1)
    waiting = asyncio.create_task(stream.next())
    await google.server.stop()
    with pytest.raises(exceptions.ServiceUnavailable, match="stopping"):
        await waiting


async def test_resources_are_created_read_updated_listed_and_deleted(google: Google) -> None:
    """The generated clients can do all of it, and see the defaults."""
    await google.set_up(labels={"a": "b"}, retry_policy={})
    read = await google.subscriber.get_subscription(subscription=SUBSCRIPTION)
    assert (read.topic, dict(read.labels), read.ack_deadline_seconds) == (TOPIC, {"a": "b"}, 10)
    assert read.retry_policy.maximum_backoff.total_seconds() == 600
    updated = await google.subscriber.update_subscription(
        subscription={"name": SUBSCRIPTION, "ack_deadline_seconds": 40, "labels": {"c": "d"}},
        update_mask=field_mask_pb2.FieldMask(paths=["ack_deadline_seconds"]),
    )
    assert (updated.ack_deadline_seconds, dict(updated.labels)) == (40, {"a": "b"})
    topic = await google.publisher.update_topic(
        topic={"name": TOPIC, "labels": {"x": "y"}}, update_mask=field_mask_pb2.FieldMask(paths=["labels"])
    )
    assert dict(topic.labels) == {"x": "y"}
    assert [topic.name async for topic in await google.publisher.list_topics(project="projects/any")] == [TOPIC]
    listed = await google.subscriber.list_subscriptions(project="projects/any")
    assert [subscription.name async for subscription in listed] == [SUBSCRIPTION]
    attached = await google.publisher.list_topic_subscriptions(topic=TOPIC)
    assert [path async for path in attached] == [SUBSCRIPTION]
    await google.subscriber.delete_subscription(subscription=SUBSCRIPTION)
    await google.publisher.delete_topic(topic=TOPIC)
    assert [topic.name async for topic in await google.publisher.list_topics(project="projects/any")] == []


async def test_refusals_carry_the_services_status_and_words(google: Google) -> None:
    """Each kind of error has the status and the text of the service."""
    with pytest.raises(exceptions.NotFound, match=r"Resource not found \(resource=requests\)\."):
        await google.publisher.get_topic(topic=TOPIC)
    await google.set_up()
    with pytest.raises(exceptions.AlreadyExists, match=r"already exists in the project \(resource=requests\)\."):
        await google.publisher.create_topic(name=TOPIC)
    with pytest.raises(exceptions.InvalidArgument, match=r"Invalid \[topics\] name: \(name=bad\)"):
        await google.publisher.create_topic(name="bad")
    with pytest.raises(exceptions.OutOfRange, match="max_delivery_attempts"):
        await google.subscriber.create_subscription(
            request={
                "name": SUBSCRIPTION + "-2",
                "topic": TOPIC,
                "dead_letter_policy": {"dead_letter_topic": TOPIC, "max_delivery_attempts": 3},
            }
        )
    with pytest.raises(exceptions.MethodNotImplemented, match="does not implement snapshots"):
        await google.subscriber.create_snapshot(name="projects/any/snapshots/snap", subscription=SUBSCRIPTION)
    with pytest.raises(exceptions.MethodNotImplemented, match="does not implement push subscriptions"):
        await google.subscriber.modify_push_config(
            subscription=SUBSCRIPTION, push_config={"push_endpoint": "https://example.invalid"}
        )
    await google.subscriber.modify_push_config(subscription=SUBSCRIPTION, push_config={})


async def test_an_unknown_method_and_a_broken_request_are_told_apart(google: Google) -> None:
    """An unknown method is UNIMPLEMENTED, a request that cannot be parsed is INVALID_ARGUMENT."""
    async with grpc.aio.insecure_channel(google.server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await channel.unary_unary("/google.pubsub.v1.Publisher/Invent", None, None)(b"")
        with pytest.raises(grpc.aio.AioRpcError) as broken:
            await channel.unary_unary("/google.pubsub.v1.Publisher/Publish", None, None)(b"\xff\xff")
    assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert broken.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "google.pubsub.v1.PublishRequest" in str(broken.value.details())


async def test_a_subscription_can_be_sought_and_detached(google: Google) -> None:
    """A seek to the future acks the backlog; a detached subscription refuses pulls."""
    await google.set_up()
    await google.publish(b"old")
    future = timestamp_pb2.Timestamp(seconds=4_000_000_000)
    await google.subscriber.seek(request={"subscription": SUBSCRIPTION, "time": future})
    await google.publish(b"new")
    assert [item.message.data for item in await google.pull()] == [b"new"]
    with pytest.raises(exceptions.InvalidArgument, match="No target"):
        await google.subscriber.seek(request={"subscription": SUBSCRIPTION})
    stream = await Stream(google).open()
    await google.publisher.detach_subscription(request={"subscription": SUBSCRIPTION})
    with pytest.raises(exceptions.FailedPrecondition, match="detached"):
        await google.pull()
    with pytest.raises(exceptions.FailedPrecondition, match="detached"):
        await stream.next()


async def test_a_message_is_published_pulled_and_acked(google: Google) -> None:
    """Bytes, attributes, key, id and time arrive, and an ack settles the message."""
    await google.set_up()
    data = bytes(range(256))
    (message_id,) = await google.publish(data, attributes={"schlüssel": "wért"}, ordering_key="k")
    (received,) = await google.pull()
    assert (received.message.data, received.message.message_id) == (data, message_id)
    assert dict(received.message.attributes) == {"schlüssel": "wért"}
    assert received.message.ordering_key == "k"
    assert received.message.publish_time.timestamp() > 1_700_000_000
    await google.ack(received.ack_id)
    assert google.state.acked_count == 1


async def test_a_pull_waits_for_the_first_message(google: Google) -> None:
    """It returns as soon as that is published."""
    await google.set_up()
    waiting = asyncio.create_task(google.pull())
    await eventually(lambda: google.state.receivers == 1)
    await google.publish(b"x")
    assert [item.message.data for item in await waiting] == [b"x"]
    assert google.state.receivers == 0


async def test_a_pull_without_messages_ends_empty(google: Google) -> None:
    """It ends shortly before the client's deadline, or at once with `return_immediately`."""
    await google.set_up()
    assert await google.pull(deadline_s=0.3) == []
    request = {"subscription": SUBSCRIPTION, "max_messages": 1, "return_immediately": True}
    with pytest.warns(DeprecationWarning, match="return_immediately"):
        answer = await google.subscriber.pull(request=request, retry=None, timeout=10)
    assert list(answer.received_messages) == []


async def test_a_waiting_pull_ends_when_its_subscription_is_deleted(google: Google) -> None:
    """It ends with NOT_FOUND at once."""
    await google.set_up()
    waiting = asyncio.create_task(google.pull())
    await eventually(lambda: google.state.receivers == 1)
    await google.subscriber.delete_subscription(subscription=SUBSCRIPTION)
    with pytest.raises(exceptions.NotFound, match="resource=requests-worker"):
        await waiting


@pytest.mark.parametrize("count", [0, -1])
async def test_a_pull_must_ask_for_at_least_one_message(google: Google, count: int) -> None:
    """`max_messages` of zero or less is refused."""
    await google.set_up()
    with pytest.raises(exceptions.InvalidArgument, match="max_messages is too small"):
        await google.pull(count)


async def test_a_publish_over_ten_megabytes_is_refused_in_the_services_words(google: Google) -> None:
    """A publish just below arrives; one above is INVALID_ARGUMENT, not gRPC's RESOURCE_EXHAUSTED."""
    await google.set_up()
    data = b"x" * 9_999_900
    await google.publish(data)
    (received,) = await google.pull()
    assert received.message.data == data
    with pytest.raises(exceptions.InvalidArgument, match=r"request_size is too large\. You passed 100000"):
        await google.publish(b"x" * 10_000_000)
    with pytest.raises(exceptions.InvalidArgument, match="Request payload size exceeds the limit"):
        await google.publish(b"x" * 19_000_000)


async def test_responses_fit_a_channel_with_default_limits(google: Google) -> None:
    """Eight messages of 900 KB arrive over a channel with gRPC's default limit of 4 MiB."""
    await google.set_up()
    await google.publish(*[b"x" * 900_000] * 8)
    async with grpc.aio.insecure_channel(google.server.address) as channel:
        stream = await Stream(Google(channel, google.server)).open()
        assert len(await stream.receive(8)) == 8
        stream.cancel()


async def test_a_late_exactly_once_ack_has_an_error_info(google: Google) -> None:
    """The status has the ErrorInfo that client libraries read."""
    await google.set_up(enable_exactly_once_delivery=True)
    await google.publish(b"1", b"2")
    first, second = (item.ack_id for item in await google.pull())
    await google.ack(first)
    with pytest.raises(exceptions.InvalidArgument) as raised:
        await google.ack(first, second)
    assert raised.value.reason == "EXACTLY_ONCE_ACKID_FAILURE"
    assert raised.value.domain == "pubsub.googleapis.com"
    assert raised.value.metadata == {first: "PERMANENT_FAILURE_INVALID_ACK_ID"}
    with pytest.raises(exceptions.InvalidArgument) as raised:
        await google.nack(second)
    assert raised.value.metadata == {second: "PERMANENT_FAILURE_INVALID_ACK_ID"}, "the valid one had been acked"
