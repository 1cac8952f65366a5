"""The subscriber over the embedded server on the same loop: one delivery becomes one task and exactly one settlement."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import uvloop

from tests.support.embedded_pubsub import SUBSCRIPTION, Google, running
from tests.support.waiting import eventually
from worker.brokers import subscriber as module
from worker.brokers.connection import async_channel
from worker.brokers.subscriber import LAST_ACKS_S, SETTLE_S, PubSubSubscriber
from worker.errors import BrokerResourceError
from worker.policy.backoff import Backoff
from worker.ports import Settlement
from worker.settings.schema import PubSubSettings
from worker.telemetry.metrics import Metrics
from worker.wire.message import ReceivedMessage

ACK, NACK = Settlement.ACK, Settlement.NACK


class Party:
    """A subscriber, the server it pulls from, and a handler that does what it is told."""

    def __init__(self, google: Google, **settings: Any) -> None:
        self.google = google
        self.faults = google.faults
        self.metrics = Metrics()
        self.renewals = 0
        sizes = PubSubSettings(emulator_host=google.server.address, **settings)
        self.subscriber = PubSubSubscriber(
            async_channel(sizes, None), SUBSCRIPTION, sizes, self.metrics, renew_credentials=self.renew
        )
        self.received: list[ReceivedMessage] = []
        self.cancelled = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.verdicts: list[Settlement | Exception] = []
        """What the handler does with the next deliveries; the rest is acked."""

    def renew(self) -> None:
        self.renewals += 1

    async def handle(self, message: ReceivedMessage) -> Settlement:
        self.received.append(message)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        verdict = self.verdicts.pop(0) if self.verdicts else ACK
        if isinstance(verdict, Exception):
            raise verdict
        return verdict

    def run(self) -> "asyncio.Task[None]":
        return asyncio.create_task(self.subscriber.run(self.handle))

    async def until(self, count: int) -> None:
        await eventually(lambda: len(self.received) >= count, what=f"{count} deliveries")

    def count(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"inference_worker_{name}", labels)


@pytest.fixture
async def google() -> AsyncIterator[Google]:
    """An embedded server on this loop, and clients."""
    async with running() as found:
        yield found


@pytest.fixture
async def party(google: Google) -> AsyncIterator[Party]:
    """A subscriber of a subscription with a dead-letter policy."""
    await google.set_up(ack_deadline_seconds=20)
    found = Party(google)
    yield found
    found.gate.set()
    await found.subscriber.drain(0)


@pytest.fixture
def _no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REOPEN_BACKOFF", Backoff(base_s=0.001, max_s=0.001, jitter=0.0))


@pytest.mark.parametrize("settlement", [ACK, NACK])
async def test_a_delivery_is_settled_as_its_handler_says(party: Party, settlement: Settlement) -> None:
    """One handler call, one settlement, and the lease is counted while it runs."""
    party.verdicts = [settlement]
    party.gate.clear()
    (message_id,) = await party.google.publish(b"{}", attributes={"a": "b"}, ordering_key="k")
    party.run()
    await party.until(1)
    assert party.count("leased_messages") == 1
    message = party.received[0]
    assert (message.message_id, message.data, message.attributes) == (message_id, b"{}", {"a": "b"})
    assert (message.delivery_attempt, message.ordering_key) == (None, "k")
    party.gate.set()
    await eventually(lambda: party.google.state.acked_count == 1, what="the ack")
    await eventually(lambda: party.count("leased_messages") == 0, what="the answer to it")
    assert len(party.received) == (1 if settlement is ACK else 2)


async def test_the_first_lease_is_the_subscriptions_own(party: Party) -> None:
    """For that long a killed worker's messages stay away; it is not extended at once."""
    party.gate.clear()
    await party.google.publish(b"{}")
    party.run()
    await party.until(1)
    (lease,) = party.google.state.leased
    assert 15 < lease.expires_in_s <= 20
    assert party.faults.calls("ModifyAckDeadline") == 0


async def test_where_it_cannot_be_read_it_is_twenty_seconds(google: Google) -> None:
    """The role that may pull may not read the subscription."""
    await google.set_up(ack_deadline_seconds=600)
    google.faults.fail("GetSubscription", grpc.StatusCode.PERMISSION_DENIED)
    party = Party(google)
    party.gate.clear()
    await google.publish(b"{}")
    party.run()
    await party.until(1)
    assert 15 < google.state.leased[0].expires_in_s <= 20
    await party.subscriber.drain(0)


async def test_a_handler_that_raises_nacks_its_delivery(party: Party, logs: list[dict[str, Any]]) -> None:
    """An exception that was not foreseen is counted and logged with its traceback; the message comes again."""
    party.verdicts = [RuntimeError("boom")]
    await party.google.publish(b"{}")
    party.run()
    await eventually(lambda: party.google.state.acked_count == 1)
    assert (party.count("internal_errors_total"), len(party.received)) == (1, 2)
    (failure,) = [line for line in logs if line["event"] == "handler_failed"]
    assert (failure["log_level"], str(failure["exc_info"])) == ("error", "boom")


async def test_a_delivery_cancelled_before_its_first_step_is_settled_too(party: Party) -> None:
    """A task that never ran a line must not leave its message leased."""
    party.run()
    await eventually(lambda: party.subscriber.is_open)
    start, tasks = party.subscriber._start_ready, party.subscriber._running

    def start_and_cancel() -> None:
        start()
        for task in tasks:
            task.cancel()

    party.subscriber._start_ready = start_and_cancel  # type: ignore[method-assign]
    await party.google.publish(b"{}")
    await eventually(lambda: len(party.google.state.delivery_attempts) == 1 and party.google.state.delivered_count > 1)
    assert party.received == []


async def test_a_drain_before_the_run_prevents_it(party: Party) -> None:
    """Stopped before it began: `run` returns and opens nothing; draining again changes nothing."""
    await party.subscriber.drain(5)
    await party.subscriber.run(party.handle)
    await party.subscriber.drain(0)
    assert not party.subscriber.is_open
    assert party.faults.calls("StreamingPull") == 0


async def test_a_cancelled_run_nacks_what_runs(party: Party) -> None:
    """Like a drain without grace."""
    party.gate.clear()
    await party.google.publish(b"{}")
    task = party.run()
    await party.until(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert party.cancelled == 1
    assert len(party.google.state.ready) == 1


async def test_the_drain_waits_for_what_runs_and_then_cancels_it(party: Party) -> None:
    """Within the grace a handler may finish; a shorter grace wins and cancels."""
    party.gate.clear()
    await party.google.publish(b"{}")
    party.run()
    await party.until(1)
    patient = asyncio.create_task(party.subscriber.drain(3600))
    await eventually(lambda: not party.subscriber.is_open)
    assert not patient.done()
    await party.subscriber.drain(0)
    await patient
    assert party.cancelled == 1
    assert (len(party.google.state.ready), party.count("leased_messages")) == (1, 0)


async def test_what_stops_pulling_is_told_once(party: Party) -> None:
    """When a nack does not come straight back any more."""
    told: list[int] = []
    party.gate.clear()
    await party.google.publish(b"{}")
    task = asyncio.create_task(party.subscriber.run(party.handle, lambda: told.append(party.google.state.receivers)))
    await party.until(1)
    await party.subscriber.drain(0)
    await task
    assert told == [0]


@pytest.mark.parametrize(("first", "second", "is_hurried"), [(60, 30, True), (0, 0, True), (30, 60, False)])
async def test_a_second_drain_hurries_unless_it_has_more_time(
    party: Party, first: float, second: float, is_hurried: bool
) -> None:
    """A shorter grace or none leaves little time for the last acks; a longer one changes nothing."""
    drains = [asyncio.ensure_future(party.subscriber.drain(grace_s)) for grace_s in (first, second)]
    await asyncio.gather(*drains)
    assert party.subscriber._settle_s == (LAST_ACKS_S if is_hurried else SETTLE_S)


async def test_a_hurry_in_the_moment_that_ends_the_last_wait_is_harmless(party: Party) -> None:
    """The second SIGTERM comes between the end of that time and the turn of the loop that notices it."""

    async def last_wait() -> None:
        async with asyncio.timeout(0) as party.subscriber._closing:
            try:
                await asyncio.Event().wait()
            finally:
                party.subscriber._hurry()

    with pytest.raises(TimeoutError):
        await last_wait()


@pytest.mark.parametrize(
    ("policy", "attempts"), [(7, 7), (0, 5), (None, None)], ids=["set", "the service's default", "no policy"]
)
async def test_the_limit_of_attempts_is_read(
    google: Google, policy: int | None, attempts: int | None, logs: list[Any]
) -> None:
    """From the dead-letter policy; 0 there means 5.  Without one nothing counts deliveries, which is a warning."""
    await google.publisher.create_topic(name="projects/any/topics/dead")
    dead = {"dead_letter_topic": "projects/any/topics/dead", "max_delivery_attempts": policy or 0}
    await google.set_up(**({} if policy is None else {"dead_letter_policy": dead}))
    party = Party(google)
    assert await party.subscriber.max_delivery_attempts() == attempts
    warned = [line["subscription"] for line in logs if line["event"] == "dead_letter_policy_missing"]
    assert warned == ([SUBSCRIPTION] if policy is None else [])
    await party.subscriber.drain(0)


@pytest.mark.parametrize(
    ("code", "raised"),
    [
        (grpc.StatusCode.PERMISSION_DENIED, None),
        (grpc.StatusCode.NOT_FOUND, BrokerResourceError),
        (grpc.StatusCode.UNAVAILABLE, ConnectionError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, ConnectionError),
    ],
)
async def test_a_limit_that_cannot_be_read(party: Party, code: grpc.StatusCode, raised: type[Exception] | None) -> None:
    """Taking an outage for `no policy` would let the last attempt pass unanswered; a refusal is not an outage."""
    party.faults.fail("GetSubscription", code)
    if raised is None:
        assert await party.subscriber.max_delivery_attempts() is None
        return
    with pytest.raises(raised):
        await party.subscriber.max_delivery_attempts()


@pytest.mark.usefixtures("_no_wait")
async def test_refused_credentials_are_renewed_and_tried_again(party: Party) -> None:
    """A token that was revoked before its time ends no worker; a subscription that is gone still does."""
    party.faults.fail("StreamingPull", grpc.StatusCode.UNAUTHENTICATED, times=3)
    task = party.run()
    await party.google.publish(b"{}")
    await party.until(1)
    assert party.renewals == 3
    await party.google.subscriber.delete_subscription(subscription=SUBSCRIPTION)
    with pytest.raises(BrokerResourceError, match="NOT_FOUND"):
        await task


@pytest.mark.usefixtures("_no_wait")
async def test_credentials_that_stay_refused_end_the_worker(party: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    """After some time an operator has to look, and a restart may help."""
    monkeypatch.setattr(module, "UNAUTHENTICATED_PATIENCE_S", 0.05)
    party.faults.fail("StreamingPull", grpc.StatusCode.UNAUTHENTICATED, message="revoked")
    with pytest.raises(BrokerResourceError, match="revoked"):
        await party.run()
    assert party.renewals > 1


@pytest.mark.parametrize("code", ["NOT_FOUND", "PERMISSION_DENIED", "INVALID_ARGUMENT", "FAILED_PRECONDITION"])
async def test_a_subscription_that_is_gone_or_refused_ends_the_worker_at_once(party: Party, code: str) -> None:
    """No other stream is opened."""
    party.faults.fail("StreamingPull", grpc.StatusCode[code])
    with pytest.raises(BrokerResourceError, match=code):
        await party.run()
    assert party.faults.calls("StreamingPull") == 1
    assert not party.subscriber.is_open


@pytest.mark.usefixtures("_no_wait")
@pytest.mark.parametrize("code", ["ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL", "UNAVAILABLE", "UNKNOWN"])
async def test_every_other_end_of_a_stream_opens_another(party: Party, code: str) -> None:
    """Whatever the server calls it."""
    party.faults.fail("StreamingPull", grpc.StatusCode[code], times=2)
    party.run()
    await party.google.publish(b"{}")
    await party.until(1)
    assert party.faults.calls("StreamingPull") == 3
    assert party.count("subscription_reopens_total") == 2


@pytest.mark.usefixtures("_no_wait")
async def test_acks_and_nacks_renew_refused_credentials_too(party: Party) -> None:
    """A stream that is open asks for no token, perhaps for hours."""
    party.faults.fail("Acknowledge", grpc.StatusCode.UNAUTHENTICATED, times=2)
    await party.google.publish(b"{}")
    party.run()
    await eventually(lambda: party.google.state.acked_count == 1)
    assert party.renewals == 2


async def test_more_messages_may_come_at_once_where_the_limit_kept_them_back(
    google: Google, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream is replaced without waiting for the next tick; where there was room, it is not."""
    monkeypatch.setattr(module, "TICK_S", 3600.0)
    await google.set_up(ack_deadline_seconds=20)
    party = Party(google, max_in_flight=2)
    party.gate.clear()
    running_task = party.run()
    await google.publish(*(b"{}" for _ in range(5)))
    await party.until(2)
    party.subscriber.allow_extra(2)
    await party.until(4)
    assert len(party.received) == 4
    party.gate.set()
    await party.until(5)
    await party.subscriber.drain(5)
    await running_task


def test_draining_without_grace_twice_is_harmless_on_the_workers_own_loop() -> None:
    """After a second SIGTERM everything is closed as well; uvloop's timer of the past cannot be asked for its time."""

    async def run() -> None:
        channel = grpc.aio.insecure_channel("127.0.0.1:1")
        settings = PubSubSettings(request_subscription="s", response_topic="t", emulator_host="127.0.0.1:1")
        subscriber = PubSubSubscriber(channel, "projects/p/subscriptions/s", settings, Metrics(), settle_s=0.0)
        await subscriber.drain(0)
        await subscriber.drain(0)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
