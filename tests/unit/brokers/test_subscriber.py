"""The subscriber's own part, without a broker: one delivery becomes one task and exactly one settlement."""

import asyncio
import concurrent.futures
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import pytest
from google.api_core import exceptions

from worker.brokers.connection import sync_channel
from worker.brokers.subscriber import LAST_ACKS_S, SETTLE_S, PubSubSubscriber
from worker.errors import BrokerResourceError
from worker.policy.backoff import Backoff
from worker.ports import Settlement
from worker.settings.schema import PubSubSettings
from worker.telemetry.metrics import Metrics
from worker.wire.message import ReceivedMessage

SUBSCRIPTION = "projects/p/subscriptions/s"


class FakeMessage:
    """A delivery of the client library that writes down how it was settled."""

    message_id = "7"
    data = b"{}"
    attributes = {"a": "b"}  # noqa: RUF012 - never changed
    publish_time = datetime(2026, 1, 1, tzinfo=UTC)
    delivery_attempt = 3
    ordering_key = None
    size = 2

    def __init__(self) -> None:
        self.settlements: list[str] = []

    def nack(self) -> None:
        self.settlements.append("nack")

    def ack_with_response(self) -> "asyncio.Future[None]":
        self.settlements.append("ack")
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done


class FakeScheduler:
    """Counts what was settled, as the library's shutdown waits for."""

    def __init__(self) -> None:
        self.settlements = 0

    def settled(self) -> None:
        self.settlements += 1


class Party:
    """A subscriber that never opened a stream, and the means to hand it deliveries."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        settings = PubSubSettings(emulator_host="127.0.0.1:1")
        self.channel = sync_channel(settings, None)
        self.subscriber = PubSubSubscriber(self.channel, SUBSCRIPTION, settings, self.metrics)
        self.scheduler = FakeScheduler()
        self.message = FakeMessage()
        self.received: list[ReceivedMessage] = []
        self.verdict: Any = Settlement.ACK

    async def handle(self, message: ReceivedMessage) -> Settlement:
        self.received.append(message)
        if isinstance(self.verdict, BaseException):
            raise self.verdict
        return cast("Settlement", self.verdict)

    def deliver(self) -> None:
        self.subscriber._handler = self.handle
        self.subscriber._arrived(
            cast("Any", SimpleNamespace(scheduler=self.scheduler, messages=0)), cast("Any", self.message)
        )

    @property
    def outcome(self) -> tuple[list[str], int, float]:
        """Settlements, what the scheduler was told, and the gauge of leases."""
        gauge = self.metrics.registry.get_sample_value("inference_worker_leased_messages")
        assert gauge is not None
        assert self.subscriber._outstanding.messages == gauge, "what is held is counted in and out"
        return self.message.settlements, self.scheduler.settlements, gauge


@pytest.fixture
async def party() -> AsyncIterator[Party]:
    """A party whose channel is closed at the end."""
    found = Party()
    yield found
    found.channel.close()


async def settled(party: Party) -> None:
    await party.subscriber._all_settled()


@pytest.mark.parametrize("verdict", [Settlement.ACK, Settlement.NACK])
async def test_a_delivery_is_settled_as_its_handler_says(party: Party, verdict: Settlement) -> None:
    """One handler call, one settlement, and the lease is counted while it runs."""
    party.verdict = verdict
    party.deliver()
    assert party.outcome == ([], 0, 1.0)
    await settled(party)
    assert party.outcome == ([verdict.value], 1, 0.0)
    (message,) = party.received
    assert message == ReceivedMessage(
        message_id="7", data=b"{}", attributes={"a": "b"}, publish_time=1767225600.0, delivery_attempt=3
    )


async def test_a_lease_is_counted_from_the_arrival(party: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    """A delivery that waited for its turn says when it came, not when its turn was."""
    now = 1000.0
    monkeypatch.setattr("worker.brokers.subscriber.time.monotonic", lambda: now)
    running = [object() for _ in range(party.subscriber._settings.max_in_flight)]
    party.subscriber._tasks.update(cast("Any", running))
    party.deliver()
    now += 500.0
    party.subscriber._tasks.difference_update(cast("Any", running))
    party.subscriber._start_next()
    await settled(party)
    assert [message.received_at for message in party.received] == [1000.0]


async def test_a_handler_that_raises_hands_its_delivery_back(party: Party, logs: list[dict[str, Any]]) -> None:
    """An exception nobody foresaw is counted, logged with its traceback and nacked."""
    party.verdict = RuntimeError("boom")
    party.deliver()
    await settled(party)
    assert party.outcome == (["nack"], 1, 0.0)
    assert party.metrics.registry.get_sample_value("inference_worker_internal_errors_total") == 1
    assert (logs[0]["log_level"], logs[0]["message_id"], logs[0]["exc_info"]) == ("error", "7", True)


async def test_a_cancelled_handler_hands_its_delivery_back(party: Party) -> None:
    """The grace is over: nack, without noise."""
    party.verdict = asyncio.CancelledError()
    party.deliver()
    await settled(party)
    assert party.outcome == (["nack"], 1, 0.0)


async def test_a_delivery_cancelled_before_its_first_step_is_settled_too(party: Party) -> None:
    """A task that never ran a line must not leave its message leased."""
    party.deliver()
    for task in party.subscriber._tasks:
        task.cancel()
    await settled(party)
    assert party.received == []
    assert party.outcome == (["nack"], 1, 0.0)


async def test_what_arrives_while_stopping_is_handed_back_unstarted(party: Party) -> None:
    """Between our stop and the library's, a burst may still come."""
    await party.subscriber.drain(5)
    party.deliver()
    assert party.outcome == (["nack"], 1, 0.0)
    assert not party.subscriber._tasks
    assert party.received == []


async def test_a_drain_before_the_run_prevents_it(party: Party) -> None:
    """Stopped before it began: `run` returns and opens nothing; draining again changes nothing."""
    await party.subscriber.drain(5)
    await party.subscriber.run(party.handle)
    await party.subscriber.drain(0)
    assert not party.subscriber.is_open
    assert not party.subscriber._streams


async def test_the_drain_waits_for_what_runs_and_then_cancels_it(party: Party) -> None:
    """Within the grace a handler finishes; a shorter grace wins and cancels."""
    gate = asyncio.Event()
    ended: list[str] = []

    async def handle(_: ReceivedMessage) -> Settlement:
        try:
            await gate.wait()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        return Settlement.ACK

    party.handle = handle  # type: ignore[method-assign]
    party.deliver()
    drains = [asyncio.create_task(party.subscriber.drain(3600))]
    await asyncio.sleep(0)
    assert party.outcome == ([], 0, 1.0)
    drains.append(asyncio.create_task(party.subscriber.drain(0)))
    await asyncio.gather(*drains)
    assert ended == ["cancelled"]
    assert party.outcome == (["nack"], 1, 0.0)


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


async def test_a_late_ack_is_counted_as_a_lost_lease(party: Party) -> None:
    """On an exactly-once subscription a refused ack says that the message will come again."""
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    failed.set_exception(RuntimeError("INVALID_ACK_ID"))
    party.message.ack_with_response = lambda: failed  # type: ignore[method-assign]
    party.deliver()
    await settled(party)
    assert party.metrics.registry.get_sample_value("inference_worker_lost_leases_total") == 1


@pytest.mark.parametrize(
    ("policy", "attempts"),
    [
        (SimpleNamespace(dead_letter_topic="t", max_delivery_attempts=7), 7),
        (SimpleNamespace(dead_letter_topic="t", max_delivery_attempts=0), 5),
        (SimpleNamespace(dead_letter_topic="", max_delivery_attempts=0), None),
        (exceptions.PermissionDenied("x"), None),
    ],
    ids=["set", "the service's default", "no policy", "not permitted"],
)
async def test_the_limit_of_attempts_is_read(party: Party, policy: Any, attempts: int | None) -> None:
    """From the dead-letter policy; 0 there means 5; unknown where reading is not permitted."""
    party.subscriber._client = FakeClient(policy)
    assert await party.subscriber.max_delivery_attempts() == attempts


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (exceptions.NotFound("x"), BrokerResourceError),
        (exceptions.ServiceUnavailable("x"), ConnectionError),
        (exceptions.DeadlineExceeded("x"), ConnectionError),
        (exceptions.RetryError("x", cause=None), ConnectionError),
    ],
)
async def test_a_limit_that_cannot_be_read_is_an_error(party: Party, error: Exception, raised: type[Exception]) -> None:
    """Taking an outage for `no policy` would let the last attempt pass unanswered."""
    party.subscriber._client = FakeClient(error)
    with pytest.raises(raised):
        await party.subscriber.max_delivery_attempts()


class FakeClient:
    """Answers the one question the subscriber asks of its client."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def get_subscription(self, request: dict[str, str], timeout: float) -> Any:
        assert (request, timeout) == ({"subscription": SUBSCRIPTION}, 30)
        if isinstance(self._answer, Exception):
            raise self._answer
        return SimpleNamespace(dead_letter_policy=self._answer)


class EndingStreams:
    """A client each of whose streams ends at once with the next error."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.opened = 0

    def subscribe(self, *_args: Any, **_kwargs: Any) -> Any:
        self.opened += 1
        future: Any = concurrent.futures.Future()
        future._StreamingPullFuture__manager = SimpleNamespace(
            _messages_on_hold=SimpleNamespace(size=0), _on_hold_bytes=0
        )
        future.set_exception(self.errors.pop(0) if len(self.errors) > 1 else self.errors[0])
        return future


async def test_refused_credentials_are_renewed_and_tried_again(party: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that was revoked before its time ends no worker; a subscription that is gone still does."""
    monkeypatch.setattr("worker.brokers.subscriber.REOPEN_BACKOFF", Backoff(base_s=0.001, max_s=0.001, jitter=0.0))
    renewals: list[int] = []
    party.subscriber._renew_credentials = lambda: renewals.append(1)
    client = EndingStreams(*[exceptions.Unauthenticated("revoked")] * 3, exceptions.NotFound("gone"))
    party.subscriber._client = client
    with pytest.raises(BrokerResourceError, match="gone"):
        await party.subscriber.run(party.handle)
    assert (client.opened, len(renewals)) == (4, 3)


async def test_credentials_that_stay_refused_end_the_worker(party: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    """After some time an operator has to look, and a restart may help."""
    monkeypatch.setattr("worker.brokers.subscriber.REOPEN_BACKOFF", Backoff(base_s=0.001, max_s=0.001, jitter=0.0))
    monkeypatch.setattr("worker.brokers.stream.UNAUTHENTICATED_PATIENCE_S", 0.05)
    client = EndingStreams(exceptions.Unauthenticated("revoked"))
    party.subscriber._client = client
    with pytest.raises(BrokerResourceError, match="revoked"):
        await party.subscriber.run(party.handle)
    assert client.opened > 1


@pytest.mark.parametrize(
    "error", [exceptions.NotFound("x"), exceptions.PermissionDenied("x"), exceptions.InvalidArgument("x")]
)
async def test_a_subscription_that_is_gone_or_refused_ends_the_worker_at_once(
    party: Party, error: exceptions.GoogleAPICallError
) -> None:
    """No other stream is opened."""
    client = EndingStreams(error)
    party.subscriber._client = client
    with pytest.raises(BrokerResourceError):
        await party.subscriber.run(party.handle)
    assert client.opened == 1
