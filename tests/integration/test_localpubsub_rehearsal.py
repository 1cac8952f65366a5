"""Skipping time and injecting faults on the embedded server over real gRPC."""

from collections.abc import AsyncIterator

import grpc
import pytest
from google.api_core import exceptions
from google.protobuf import duration_pb2

from tests.support.embedded_pubsub import SUBSCRIPTION, TOPIC, Google, Stream, running
from tests.support.waiting import eventually


@pytest.fixture
async def google() -> AsyncIterator[Google]:
    async with running() as clients:
        yield clients


async def test_a_lease_ends_by_itself_and_wakes_a_waiting_stream(google: Google) -> None:
    """The server's own timer ends it in real time."""
    await google.set_up(ack_deadline_seconds=10)
    await google.publish(b"x")
    (received,) = await google.pull()
    stream = await Stream(google).open()
    await google.subscriber.modify_ack_deadline(
        subscription=SUBSCRIPTION, ack_ids=[received.ack_id], ack_deadline_seconds=1
    )
    (again,) = await stream.receive(1)
    assert again.message.message_id == received.message.message_id
    assert google.state.expired_count == 1
    stream.cancel()


async def test_the_clock_can_be_moved_forward(google: Google) -> None:
    """Leases and backoffs end at once and in order."""
    await google.set_up(ack_deadline_seconds=600, retry_policy={"minimum_backoff": duration_pb2.Duration(seconds=300)})
    await google.publish(b"x")
    await google.pull()
    stream = await Stream(google).open()
    google.server.advance(601)
    assert list(google.state.backing_off.values()) == pytest.approx([299], abs=1)
    google.server.advance(300)
    assert len(await stream.receive(1)) == 1
    with pytest.raises(ValueError, match="backwards"):
        google.server.advance(-1)
    stream.cancel()


async def test_a_failing_method_recovers(google: Google) -> None:
    """Two calls fail, the third succeeds, and all are counted."""
    await google.set_up()
    google.faults.fail("Publish", grpc.StatusCode.UNAVAILABLE, times=2, message="come back later")
    for _ in range(2):
        with pytest.raises(exceptions.ServiceUnavailable, match="come back later"):
            await google.publish(b"x")
    await google.publish(b"x")
    assert google.faults.calls("Publish") == 3
    assert len(google.state.ready) == 1


async def test_a_publish_can_be_accepted_and_answered_with_an_error(google: Google) -> None:
    """After a fault behind the work the message is published although the publisher got an error."""
    await google.set_up()
    google.faults.fail("Publish", grpc.StatusCode.DEADLINE_EXCEEDED, times=1, after=True)
    with pytest.raises(exceptions.DeadlineExceeded):
        await google.publish(b"x")
    assert len(await google.pull()) == 1


async def test_a_slow_method_runs_into_the_clients_deadline(google: Google) -> None:
    """With a delay before the work, nothing was done."""
    await google.set_up()
    google.faults.delay("Publish", 60.0, times=1)
    with pytest.raises(exceptions.DeadlineExceeded):
        await google.publisher.publish(topic=TOPIC, messages=[{"data": b"x"}], retry=None, timeout=0.1)
    await google.publish(b"y")
    assert [item.message.data for item in await google.pull()] == [b"y"]


async def test_pulls_fail_on_request(google: Google) -> None:
    """A fault before the work leases nothing; a fault after it leaves the message leased."""
    await google.set_up()
    await google.publish(b"x")
    google.faults.fail("Pull", grpc.StatusCode.UNAVAILABLE, times=1)
    with pytest.raises(exceptions.ServiceUnavailable):
        await google.pull()
    assert google.state.delivered_count == 0
    google.faults.fail("Pull", grpc.StatusCode.UNAVAILABLE, times=1, after=True)
    with pytest.raises(exceptions.ServiceUnavailable):
        await google.pull()
    assert len(google.state.leased) == 1


async def test_streams_are_broken_and_refused_on_request(google: Google) -> None:
    """Open streams end with the status; new ones are refused until the fault is cleared."""
    await google.set_up()
    stream = await Stream(google).open()
    await eventually(lambda: google.state.receivers == 1)
    assert google.faults.break_streams(grpc.StatusCode.INTERNAL, message="proxy restarted") == 1
    with pytest.raises(exceptions.InternalServerError, match="proxy restarted"):
        await stream.next()
    google.faults.fail("StreamingPull", grpc.StatusCode.PERMISSION_DENIED)
    with pytest.raises(exceptions.PermissionDenied):  # as it opens or at the first response
        await (await Stream(google).open()).next()
    google.faults.clear("StreamingPull")
    await google.publish(b"x")
    accepted = await Stream(google).open()
    assert len(await accepted.receive(1)) == 1
    accepted.cancel()
