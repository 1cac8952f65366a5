"""The fakes keep the contracts of the ports, or the tests that use them prove nothing."""

import asyncio
import time

import pytest

from tests.support import fakeclock
from tests.support.fakes import (
    GOOD,
    REFUSED,
    FakeBackend,
    FakeClock,
    FakePayloads,
    FakePublisher,
    FakeSubscriber,
    status,
)
from tests.support.virtual_time import DeadlockError, SpinError, VirtualLoop, loop_time, settle, virtual_time
from worker.errors import BackendError, MessageRejectedError, PayloadError, PublishRetryableError
from worker.policy.model import Fault, Phase
from worker.ports import AttemptResult, BackendRequest, Settlement
from worker.wire.body import RequestBody
from worker.wire.message import ReceivedMessage

REQUEST = BackendRequest(path="/v1/completions", body=RequestBody(b"{}"))


@virtual_time
async def test_hours_take_no_time() -> None:
    """Virtual time jumps to the next timer, in order, and agrees with what was waited for."""
    started, order = time.monotonic(), []

    async def wait(hours: int) -> None:
        await asyncio.sleep(hours * 3600)
        order.append(hours)

    await asyncio.gather(wait(2), wait(1))
    assert order == [1, 2]
    assert loop_time() == pytest.approx(7200)
    assert time.monotonic() - started < 5


def test_a_wait_without_an_end_fails() -> None:
    """When nothing can ever happen again the test fails instead of hanging."""
    loop = VirtualLoop()
    try:
        with pytest.raises(DeadlockError):
            loop.run_until_complete(asyncio.wait_for(asyncio.Event().wait(), None))
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
    finally:
        loop.close()


def test_a_loop_that_turns_without_time_passing_fails() -> None:
    """Like a timer that is set again and again for an instant that is over."""
    loop = VirtualLoop()

    def again() -> None:
        loop.call_at(0.0, again)

    again()
    with pytest.raises(SpinError):
        loop.run_forever()
    loop.close()


def test_a_timer_set_again_at_once_fails() -> None:
    """The same on the clock that a test advances."""
    clock = fakeclock.FakeClock()

    def again() -> None:
        clock.call_at(0.0, again)

    again()
    with pytest.raises(AssertionError, match="again and again"):
        clock.advance(1.0)


def test_a_task_left_over_fails() -> None:
    """A test that leaves a task behind fails."""

    @virtual_time
    async def leaky() -> None:
        leaky_task.append(asyncio.ensure_future(asyncio.Event().wait()))

    leaky_task: list[asyncio.Future[bool]] = []
    with pytest.raises(AssertionError, match="left over"):
        leaky()


def test_clock_jumps_only_its_wall_side() -> None:
    """An operator who sets the clock moves Unix time and no timer."""
    clock, ran = FakeClock(), []
    clock.call_at(clock.now() + 5, lambda: ran.append(clock.now()))
    before = clock.unix()
    clock.jump(-3600)
    clock.advance(4)
    assert not ran
    assert clock.unix() == before - 3596
    clock.advance(2)
    assert ran == [1005.0]


@virtual_time
async def test_backend_follows_its_script_and_then_repeats() -> None:
    """Answers come in the order of the script; what comes after it is `then`."""
    backend, results = FakeBackend(status(500), then=GOOD), [AttemptResult(), AttemptResult(), AttemptResult()]
    for result in results:
        await backend.invoke(REQUEST, result)
    assert [result.status for result in results] == [500, 200, 200]
    assert backend.requests == [REQUEST] * 3
    assert all(result.phase is Phase.PARSE and result.ended is not None for result in results)


@virtual_time
async def test_backend_without_response_raises() -> None:
    """A connection that fails is an exception with its fault, and the result says how far it came."""
    result = AttemptResult()
    with pytest.raises(BackendError) as raised:
        await FakeBackend(REFUSED).invoke(REQUEST, result)
    assert raised.value.fault == Fault.CONNECT
    assert (result.phase, result.status) == (Phase.CONNECT, None)


@virtual_time
async def test_backend_is_held_open_counted_and_cancelled() -> None:
    """An attempt that is held stays under way until it is let go or cancelled."""
    backend = FakeBackend()
    backend.hold()
    first, second = (asyncio.ensure_future(backend.invoke(REQUEST, AttemptResult())) for _ in range(2))
    await settle()
    assert (backend.running, backend.peak) == (2, 2)
    second.cancel()
    await settle()
    assert (backend.running, backend.cancelled) == (1, 1)
    backend.let_go()
    await first
    assert backend.running == 0


@virtual_time
async def test_backend_keeps_the_time_it_is_given() -> None:
    """What takes longer than the request's deadline ends in the fault the real backend has for it."""
    backend = FakeBackend()
    backend.hold()
    with pytest.raises(BackendError, match=Fault.TOTAL_TIMEOUT):
        await backend.invoke(BackendRequest(path="/", body=RequestBody(b"{}"), timeout_s=5.0), AttemptResult())
    assert loop_time() == pytest.approx(5.0)


@virtual_time
async def test_publisher_fails_as_told_and_records_what_it_took() -> None:
    """A failed publish leaves nothing on the topic; an oversize one is rejected before anything is sent."""
    publisher = FakePublisher(PublishRetryableError("later"), limit=30)
    with pytest.raises(PublishRetryableError):
        await publisher.publish(b"{}", {"request_message_id": "7"})
    with pytest.raises(MessageRejectedError):
        await publisher.publish(b"x" * 31, {})
    assert await publisher.publish(b"{}", {"request_message_id": "7"}) == "1"
    assert [each.data for each in publisher.of("7")] == [b"{}"]
    assert publisher.of("8") == []


@virtual_time
async def test_subscriber_redelivers_what_is_nacked_with_a_higher_attempt() -> None:
    """An ack ends a message; a nack brings it again, one attempt higher, after the backoff."""
    seen: list[tuple[int | None, float]] = []

    async def handle(message: ReceivedMessage) -> Settlement:
        seen.append((message.delivery_attempt, loop_time()))
        return Settlement.ACK if len(seen) == 3 else Settlement.NACK

    subscriber = FakeSubscriber(max_attempts=5, backoff_s=10)
    message_id = subscriber.publish(b"{}")
    running = asyncio.ensure_future(subscriber.run(handle))
    await asyncio.sleep(100)
    assert seen == [(1, 0.0), (2, 10.0), (3, 20.0)]
    assert subscriber.count(Settlement.NACK) == {message_id: 2}
    assert subscriber.count(Settlement.ACK) == {message_id: 1}
    await subscriber.drain(0)
    await running


@virtual_time
async def test_subscriber_dead_letters_after_the_last_attempt() -> None:
    """What is nacked as often as the policy allows is never delivered again."""

    async def handle(_: ReceivedMessage) -> Settlement:
        return Settlement.NACK

    subscriber = FakeSubscriber(max_attempts=2)
    message_id = subscriber.publish(b"{}")
    running = asyncio.ensure_future(subscriber.run(handle))
    await asyncio.sleep(100)
    assert subscriber.dead == [message_id]
    assert [attempt for _, attempt, _ in subscriber.settlements] == [1, 2]
    await subscriber.drain(0)
    await running


@virtual_time
async def test_subscriber_never_runs_more_handlers_than_allowed() -> None:
    """Flow control: what is beyond `max_in_flight` waits."""

    async def handle(_: ReceivedMessage) -> Settlement:
        await asyncio.sleep(1)
        return Settlement.ACK

    subscriber = FakeSubscriber(max_in_flight=3)
    for _ in range(10):
        subscriber.publish(b"{}")
    running = asyncio.ensure_future(subscriber.run(handle))
    await asyncio.sleep(10)
    assert subscriber.peak == 3
    assert len(subscriber.settlements) == 10
    await subscriber.drain(0)
    await running


@virtual_time
async def test_subscriber_drains_with_a_grace_and_then_cancels() -> None:
    """What ends within the grace is settled by its verdict, the rest is nacked, and nothing new is delivered."""

    async def handle(message: ReceivedMessage) -> Settlement:
        await asyncio.sleep(float(message.data))
        return Settlement.ACK

    subscriber = FakeSubscriber()
    quick, slow = subscriber.publish(b"2"), subscriber.publish(b"200")
    running = asyncio.ensure_future(subscriber.run(handle))
    await asyncio.sleep(1)
    draining = asyncio.ensure_future(subscriber.drain(5))
    await settle()
    late = subscriber.publish(b"0")
    await draining
    await running
    assert loop_time() == pytest.approx(6)
    assert subscriber.count(Settlement.ACK) == {quick: 1}
    assert subscriber.count(Settlement.NACK) == {slow: 1}
    assert late not in {message_id for message_id, _, _ in subscriber.settlements}


@virtual_time
async def test_object_storage_gives_back_what_was_written() -> None:
    """One place for a message, told with its size and in pieces; what is not there, and the next failure, are raised."""
    payloads = FakePayloads(a=b"x" * 100_000)
    payloads.check("gs://b/a")
    with pytest.raises(ValueError, match="not below"):
        payloads.check("gs://c/a")
    async with payloads.open("gs://b/a") as payload:
        chunks = [chunk async for chunk in payload.chunks]
        assert (payload.size, len(chunks), b"".join(chunks)) == (100_000, 2, b"x" * 100_000)
    first, second = await payloads.write("1", b"{}"), await payloads.write("1", b"[]")
    assert first.uri == second.uri
    async with payloads.open(second.uri) as payload:
        assert [chunk async for chunk in payload.chunks] == [b"[]"]
    payloads.failures.append(PayloadError(Fault.PAYLOAD_UNAVAILABLE))
    for uri, fault in (("gs://b/a", "payload_unavailable"), ("gs://b/absent", "payload_not_found")):
        with pytest.raises(PayloadError, match=fault):
            async with payloads.open(uri):
                pass
