"""Deadlines, holding, and a backend that fails for everybody: what it costs the messages, and what it must not."""

import asyncio

import pytest

from tests.support.fakes import GOOD, REFUSED, Answer, FakeBackend, FakeSubscriber, status
from tests.support.pipeline import Pipeline, data, message
from tests.support.virtual_time import loop_time, settle, until, virtual_time
from worker.errors import PublishRefusedError
from worker.flow.circuit import CircuitState
from worker.policy.judge import MAX_OUTAGE_RETRIES
from worker.policy.model import Fault, Phase
from worker.ports import BackendRequest, Settlement
from worker.settings.schema import BreakerSettings

ACK, NACK = Settlement.ACK, Settlement.NACK
BUSY = status(429)
UNAUTHORIZED = status(401, b'{"error":"Unauthorized, key sk-1234"}')


# Holding.


@virtual_time
async def test_a_busy_backend_costs_no_attempt() -> None:
    """The message stays leased and unsettled until the backend takes it."""
    pipeline = Pipeline(FakeBackend(BUSY, BUSY, status(503), GOOD))
    handling = pipeline.start(message(attempt=1))
    await settle()
    assert not handling.done()
    assert await handling is ACK
    assert [each.json["status_code"] for each in pipeline.answers] == [200]
    assert pipeline.count("attempts_total", "fake", "rate_limited", "hold") == 2


@virtual_time
async def test_retry_after_is_kept() -> None:
    """The backend is not asked again before the time it named."""
    pipeline = Pipeline(FakeBackend(status(429, headers={"retry-after": "20"})))
    assert await pipeline.handle(message(attempt=1)) is ACK
    assert loop_time() >= 20


@virtual_time
async def test_a_hold_that_lasts_too_long_is_handed_back() -> None:
    """After `hold_max_s` the message goes back, on the last attempt it is answered."""
    for attempt, expected in ((1, NACK), (5, ACK)):
        pipeline = Pipeline(FakeBackend(then=BUSY), hold_max_s=300.0)
        began = loop_time()
        assert await pipeline.handle(message(attempt=attempt)) is expected
        assert loop_time() - began <= 300
        pipeline.assert_nothing_leaks()
    assert pipeline.answer.json["status_code"] == 429


@virtual_time
async def test_an_untried_message_is_kept_as_long_as_the_lease() -> None:
    """One that only waited for others goes back when its lease can be kept no longer."""
    pipeline = Pipeline(window=1, lease_s=600.0)
    pipeline.backend.hold()
    first = pipeline.start()
    await settle()
    assert await pipeline.handle(message(attempt=1)) is NACK
    assert loop_time() == pytest.approx(600)
    pipeline.backend.let_go()
    await first


@virtual_time
async def test_the_wait_before_its_turn_is_part_of_the_lease() -> None:
    """A message that came 400 s ago is nacked 200 s from now, with a lease of 600 s."""
    pipeline = Pipeline(window=1, lease_s=600.0)
    pipeline.backend.hold()
    await asyncio.sleep(400)
    first = pipeline.start()
    await settle()
    assert await pipeline.handle(message(attempt=1, received_at=0.0)) is NACK
    assert loop_time() == pytest.approx(600)
    pipeline.backend.let_go()
    await first


# Outages.


@virtual_time
async def test_after_refused_connections_nobody_waits_for_the_first_long_answer() -> None:
    """A connection that stands is the proof: the probe's ten minutes of generation keep nobody back."""
    backend = FakeBackend(then=REFUSED)
    pipeline = Pipeline(backend)
    handling = [pipeline.start(message(attempt=1)) for _ in range(12)]
    await asyncio.sleep(60)
    assert pipeline.circuit.state is not CircuitState.CLOSED
    backend.then = Answer(seconds=600.0)
    back_at = loop_time()
    await until(lambda: backend.running == len(handling), 0.1)
    assert loop_time() - back_at < 6
    assert await asyncio.gather(*handling) == [ACK] * len(handling)


@virtual_time
async def test_a_server_that_only_accepts_connections_burns_no_attempts() -> None:
    """Behind a balancer without servers a connection proves nothing: the breaker opens again, by what is true now."""
    backend = FakeBackend(then=REFUSED)
    pipeline = Pipeline(backend)
    handling = [pipeline.start(message(attempt=1)) for _ in range(12)]
    await asyncio.sleep(60)
    backend.then = Answer(status=None, body=b"", fault=Fault.CONNECTION_LOST, phase=Phase.HEADERS)
    await asyncio.sleep(60)
    assert pipeline.circuit.error_class == "connection_lost"
    backend.then = GOOD
    assert await asyncio.gather(*handling) == [ACK] * len(handling)
    assert {each.json["status_code"] for each in pipeline.answers} == {200}


@virtual_time
async def test_an_outage_of_ten_minutes_burns_nothing() -> None:
    """Nobody gets an error, no delivery attempt is spent, and the full rate is back within five seconds."""
    backend = FakeBackend(then=REFUSED)
    pipeline = Pipeline(backend)
    subscriber = FakeSubscriber(max_attempts=5)
    ids = [subscriber.publish(data()) for _ in range(40)]
    serving = pipeline.serve(subscriber)
    await asyncio.sleep(600)
    assert subscriber.settlements == []
    calls = len(backend.requests)
    assert calls < 16 + 600 / 3  # a probe every four seconds, less their jitter
    backend.then = GOOD
    await asyncio.sleep(6)
    assert subscriber.count(ACK) == dict.fromkeys(ids, 1)
    assert subscriber.count(NACK) == {}
    assert {each.json["status_code"] for each in pipeline.answers} == {200}
    await subscriber.drain(0)
    await serving


@virtual_time
async def test_an_outage_that_meets_only_messages_that_failed_before_burns_nothing() -> None:
    """Three were refused while others were served, and are left; then the server is away for half an hour."""
    backend = FakeBackend(then=lambda request: UNAUTHORIZED if b"refused" in request.body.data else GOOD)
    pipeline = Pipeline(backend)
    subscriber = FakeSubscriber(max_attempts=5)
    serving = pipeline.serve(subscriber)
    for _ in range(3):
        for user in ("refused", *["served"] * 8):
            subscriber.publish(data({"model": "m", "user": user, "messages": []}))
            await asyncio.sleep(0.1)
    backend.then = REFUSED
    await asyncio.sleep(1800)
    assert pipeline.circuit.error_class == "connect"
    backend.then = GOOD
    await asyncio.sleep(6)
    assert [each.json["status_code"] for each in pipeline.answers] == [200] * 27
    await subscriber.drain(0)
    await serving


@virtual_time
async def test_servers_that_fail_together_are_an_outage() -> None:
    """As many 500s at a time as open the breaker are the backend's fault: all of their messages are kept."""
    backend = FakeBackend(then=status(500))
    pipeline = Pipeline(backend)
    handling = [pipeline.start(message(attempt=1)) for _ in range(8)]
    await asyncio.sleep(120)
    assert not any(task.done() for task in handling)
    backend.then = GOOD
    assert await asyncio.gather(*handling) == [ACK] * 8
    assert loop_time() < 126


@virtual_time
async def test_one_failure_among_successes_is_the_messages() -> None:
    """While others are served a 500 costs its message one attempt, and nobody else anything."""

    def answer(request: BackendRequest) -> Answer:
        return status(500) if b"poison" in request.body.data else Answer(seconds=0.1)

    pipeline = Pipeline(FakeBackend(then=answer))
    poison = pipeline.start(message(data({"model": "poison"}), attempt=1))
    others = [pipeline.start() for _ in range(20)]
    assert await poison is NACK
    assert await asyncio.gather(*others) == [ACK] * 20
    assert pipeline.circuit.trips == 0


@virtual_time
async def test_poison_does_not_keep_the_breaker_open() -> None:
    """The message whose probe failed steps back: another message is the next probe and closes the breaker."""

    def answer(request: BackendRequest) -> Answer:
        return status(500) if b"poison" in request.body.data or loop_time() < 30 else GOOD

    pipeline = Pipeline(FakeBackend(then=answer))
    poison = [pipeline.start(message(data({"model": "poison"}), attempt=1)) for _ in range(5)]
    await asyncio.sleep(1)
    good = [pipeline.start(message(attempt=1)) for _ in range(10)]
    assert await asyncio.gather(*good) == [ACK] * 10
    assert loop_time() < 60
    pipeline.processor.begin_drain()
    await asyncio.gather(*poison)


@virtual_time
async def test_poison_alone_runs_out_of_attempts() -> None:
    """With nothing else to tell a prompt that kills its server from an outage, it is not tried for as long as a lease."""
    pipeline = Pipeline(FakeBackend(then=status(500)), max_delivery_attempts=2)
    subscriber = FakeSubscriber(max_attempts=2)
    for _ in range(6):
        subscriber.publish(data())
    serving = pipeline.serve(subscriber)
    await asyncio.sleep(6 * 3600)
    assert {each.json["status_code"] for each in pipeline.answers} == {500}
    assert len(pipeline.answers) == 6
    assert len(pipeline.backend.requests) <= 6 * 2 * (MAX_OUTAGE_RETRIES + 1)
    await subscriber.drain(0)
    await serving


@virtual_time
async def test_refused_credentials_trip_once_and_everybody_waits() -> None:
    """One wave of 401s is one trip; nobody is answered, nothing of the 401's text gets out; a new key mends it."""
    backend = FakeBackend(then=UNAUTHORIZED)
    pipeline = Pipeline(backend)
    handling = [pipeline.start(message(attempt=1)) for _ in range(12)]
    await asyncio.sleep(5)
    assert pipeline.circuit.trips == 1
    assert pipeline.count("breaker_trips_total", "fake", "auth") == 1
    assert not any(task.done() for task in handling)
    assert pipeline.gate.held == 12
    asked = len(backend.requests)
    backend.then = GOOD
    pipeline.target.gate.allow_probe()  # what the supervisor does when the key file changes
    assert await asyncio.gather(*handling) == [ACK] * 12
    assert loop_time() < 6
    assert len(backend.requests) - asked <= 13


@virtual_time
async def test_refused_credentials_are_answered_without_the_backends_words() -> None:
    """On the last attempt of a drain the requester learns the class; the 401's text stays here."""
    pipeline = Pipeline(FakeBackend(then=UNAUTHORIZED))
    handling = pipeline.start(message(attempt=5))
    await settle()
    pipeline.processor.begin_drain()
    assert await handling is ACK
    assert pipeline.answer.attributes["error_class"] == "auth"
    assert pipeline.answer.json["status_code"] == 502
    assert b"sk-1234" not in pipeline.answer.data


@virtual_time
async def test_untried_messages_behind_an_open_breaker_say_what_closed_it() -> None:
    """A message that only waited for the backend is answered, on its last attempt, with the reason of the wait."""
    pipeline = Pipeline(FakeBackend(then=UNAUTHORIZED), lease_s=600.0, max_delivery_attempts=5)
    first = pipeline.start(message(attempt=1))
    await settle()
    handling = pipeline.start(message(attempt=5))
    await settle()
    pipeline.processor.begin_drain()
    assert await handling is ACK
    assert pipeline.answer.attributes["error_class"] == "auth"
    assert await first is NACK


@virtual_time
async def test_a_probe_that_is_cancelled_frees_the_next() -> None:
    """A half-open breaker does not wait for a probe that was given up."""
    backend = FakeBackend(REFUSED, REFUSED, REFUSED)
    pipeline = Pipeline(backend, breaker=BreakerSettings(probe_interval_s=10, max_probe_interval_s=10))
    handling = pipeline.start(message(attempt=1))
    await until(pipeline.target.is_open)
    backend.hold()
    await until(lambda: backend.running)
    assert pipeline.circuit.state is CircuitState.HALF_OPEN
    handling.cancel()
    assert await handling is NACK
    backend.let_go()
    cancelled_at = loop_time()
    assert await pipeline.handle() is ACK
    assert loop_time() - cancelled_at < 1


@virtual_time
async def test_while_answers_cannot_be_published_nothing_new_is_started() -> None:
    """A topic that is gone pauses the intake; the answers that exist wait, and everything goes on by itself."""
    pipeline = Pipeline(FakeBackend(then=Answer(seconds=1.0)), window=4)
    pipeline.publisher.always = PublishRefusedError("gone")
    handling = [pipeline.start() for _ in range(20)]
    await asyncio.sleep(10)
    assert pipeline.intake.reasons == ("publish",)
    asked = len(pipeline.backend.requests)
    assert asked < 20
    await asyncio.sleep(600)
    assert len(pipeline.backend.requests) == asked
    pipeline.publisher.always = None
    resumed_at = loop_time()
    assert await asyncio.gather(*handling) == [ACK] * 20
    assert loop_time() - resumed_at < 15
    assert pipeline.intake.reasons == ()
    assert pipeline.pauses == [("publish", True), ("publish", False)]
    assert len(pipeline.backend.requests) == 20


@virtual_time
async def test_a_message_that_fails_at_the_slow_beginning_of_an_outage_waits_for_the_end_of_a_doubt() -> None:
    """The row is long enough only just before its first failure would be nacked, and another attempt hangs."""
    hanging = Answer(status=None, body=b"", fault=Fault.TOTAL_TIMEOUT, phase=Phase.HEADERS, seconds=60.0)
    failing = status(500)
    pipeline = Pipeline(FakeBackend(failing, hanging, then=failing), breaker=BreakerSettings(failures=5))
    tasks = []
    for _ in range(6):  # the last of them fails after 0.9 s
        tasks.append(pipeline.start(message(attempt=1)))
        await asyncio.sleep(0.18)
    await asyncio.sleep(0.5)
    assert not tasks[0].done()
    assert pipeline.circuit.state is not CircuitState.CLOSED
    pipeline.backend.then = GOOD
    await asyncio.sleep(120.0)
    assert [task.result() for task in tasks if task is not tasks[1]] == [ACK] * 5
    assert [each.json["status_code"] for each in pipeline.answers][:5] == [200] * 5
