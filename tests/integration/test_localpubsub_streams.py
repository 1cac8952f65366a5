"""StreamingPull on the embedded server over real gRPC."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from google.api_core import exceptions
from google.protobuf import duration_pb2

from tests.support.embedded_pubsub import SUBSCRIPTION, Google, Stream, running
from tests.support.waiting import eventually


@pytest.fixture
async def google() -> AsyncIterator[Google]:
    async with running() as clients:
        yield clients


async def test_a_stream_gets_exactly_what_its_flow_control_allows(google: Google) -> None:
    """It gets ten messages, and one more for each settled one."""
    await google.set_up()
    await google.publish(*[b"x"] * 100)
    stream = await Stream(google).open(max_outstanding_messages=10)
    received = await stream.receive(10)
    await google.ack(*(item.ack_id for item in received[:5]))
    received += await stream.receive(5)
    snapshot = google.state
    assert (len(snapshot.leased), snapshot.delivered_count) == (10, 15)
    stream.cancel()


async def test_a_stream_sets_its_own_ack_deadline_and_may_change_it(google: Google) -> None:
    """The new ack deadline applies to messages sent from then on."""
    await google.set_up(ack_deadline_seconds=600)
    stream = await Stream(google).open(stream_ack_deadline_seconds=20)
    await google.publish(b"1")
    await stream.receive(1)
    assert 19 < google.state.leased[0].expires_in_s <= 20
    stream.send(stream_ack_deadline_seconds=300, max_outstanding_messages=0)
    await eventually(lambda: google.faults.calls("StreamingPull") == 1)
    await asyncio.gather(*(google.publish(b"2") for _ in range(3)))
    await stream.receive(3)
    assert 299 < google.state.leased[-1].expires_in_s <= 300
    stream.cancel()


async def test_acks_and_deadlines_travel_over_the_stream(google: Google) -> None:
    """One request can ack, extend and nack."""
    await google.set_up(retry_policy={"minimum_backoff": duration_pb2.Duration(seconds=600)})
    await google.publish(b"1", b"2", b"3")
    stream = await Stream(google).open()
    first, second, third = (item.ack_id for item in await stream.receive(3))
    stream.send(ack_ids=[first], modify_deadline_ack_ids=[second, third], modify_deadline_seconds=[500, 0])
    await eventually(lambda: len(google.state.backing_off) == 1)
    snapshot = google.state
    assert snapshot.acked_count == 1
    assert [lease.ack_id for lease in snapshot.leased] == [second]
    assert snapshot.leased[0].expires_in_s > 400
    stream.cancel()


async def test_an_exactly_once_stream_confirms_acks(google: Google) -> None:
    """Valid and invalid ack ids are listed, and every response has the properties of the subscription."""
    await google.set_up(enable_exactly_once_delivery=True, enable_message_ordering=True)
    await google.publish(b"1", b"2")
    stream = await Stream(google).open()
    response = await stream.next()
    assert response is not None
    assert response.subscription_properties.exactly_once_delivery_enabled
    assert response.subscription_properties.message_ordering_enabled
    first, second = (item.ack_id for item in response.received_messages)
    stream.send(ack_ids=[first, "garbage"])
    confirmed = await stream.next()
    assert confirmed is not None
    assert list(confirmed.acknowledge_confirmation.ack_ids) == [first]
    assert list(confirmed.acknowledge_confirmation.invalid_ack_ids) == ["garbage"]
    stream.send(modify_deadline_ack_ids=[first, second], modify_deadline_seconds=[10, 10])
    confirmed = await stream.next()
    assert confirmed is not None
    assert list(confirmed.modify_ack_deadline_confirmation.ack_ids) == [second]
    assert list(confirmed.modify_ack_deadline_confirmation.invalid_ack_ids) == [first]
    stream.cancel()


async def test_pings_are_answered_from_protocol_version_1_on(google: Google) -> None:
    """Clients that send empty requests to keep a stream alive take no answer for a broken stream."""
    await google.set_up()
    stream = await Stream(google).open(protocol_version=1)
    stream.send()
    response = await stream.next()
    assert response is not None
    assert list(response.received_messages) == []
    stream.half_close()
    assert await stream.next() is None
    silent = await Stream(google).open()
    silent.send()
    silent.half_close()
    assert await silent.next() is None


async def test_a_half_closed_stream_ends_well_and_its_leases_run_on(google: Google) -> None:
    """Its messages are redelivered only after the ack deadline."""
    await google.set_up()
    await google.publish(b"x")
    stream = await Stream(google).open()
    await stream.receive(1)
    stream.half_close()
    assert await stream.next() is None
    snapshot = google.state
    assert (len(snapshot.leased), snapshot.receivers) == (1, 0)


@pytest.mark.parametrize(
    ("requests", "error", "text"),
    [
        ([{"subscription": ""}], exceptions.InvalidArgument, "must set subscription"),
        ([{"subscription": SUBSCRIPTION + "-none"}], exceptions.NotFound, "resource=requests-worker-none"),
        ([{"stream_ack_deadline_seconds": 9}], exceptions.InvalidArgument, "stream_ack_deadline_seconds is too small"),
        ([{"stream_ack_deadline_seconds": 601}], exceptions.InvalidArgument, "is too large"),
        ([{"ack_ids": ["garbage"]}], exceptions.InvalidArgument, "invalid ack ID"),
        ([{}, {"ack_ids": ["garbage"]}], exceptions.InvalidArgument, "invalid ack ID"),
        ([{}, {"subscription": SUBSCRIPTION}], exceptions.InvalidArgument, "only be set in the first"),
        ([{}, {"max_outstanding_messages": 5}], exceptions.InvalidArgument, "only be set in the first"),
        ([{}, {"modify_deadline_ack_ids": ["x"]}], exceptions.InvalidArgument, "must have the same size"),
        (
            [{}, {"modify_deadline_ack_ids": ["x"], "modify_deadline_seconds": [-1]}],
            exceptions.InvalidArgument,
            "ack_deadline_seconds is too small",
        ),
    ],
)
async def test_a_wrong_request_ends_the_stream(
    google: Google, requests: list[dict[str, Any]], error: type[Exception], text: str
) -> None:
    """The status has the reason, for the first request and for later ones."""
    await google.set_up()
    stream = await Stream(google).open(**requests[0])
    for request in requests[1:]:
        stream.send(**request)
    with pytest.raises(error, match=text):
        await stream.next()
    await eventually(lambda: google.state.receivers == 0)


async def test_a_stream_ends_when_its_subscription_is_deleted(google: Google) -> None:
    """It ends with NOT_FOUND at once."""
    await google.set_up()
    await google.publish(b"x")
    stream = await Stream(google).open()
    await stream.receive(1)
    await google.subscriber.delete_subscription(subscription=SUBSCRIPTION)
    with pytest.raises(exceptions.NotFound, match="resource=requests-worker"):
        await stream.next()


async def test_a_cancelled_stream_leaves_nothing_behind(google: Google) -> None:
    """Its receiver is detached and its task ended."""
    await google.set_up()
    stream = await Stream(google).open()
    await eventually(lambda: google.state.receivers == 1)
    stream.cancel()
    await eventually(lambda: google.state.receivers == 0)
    await eventually(lambda: not [t for t in asyncio.all_tasks() if "streaming-pull-reader" in t.get_name()])


async def test_streams_share_a_backlog(google: Google) -> None:
    """No stream gets all messages."""
    await google.set_up()
    streams = [await Stream(google).open(max_outstanding_messages=50) for _ in range(2)]
    await google.publish(*[b"x"] * 100)
    received = await asyncio.gather(*(stream.receive(50) for stream in streams))
    assert len({item.message.message_id for part in received for item in part}) == 100
    for stream in streams:
        stream.cancel()
