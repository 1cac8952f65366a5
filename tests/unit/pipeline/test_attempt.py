"""One attempt: what is sent, how its end is judged, what the gate is told, and what an outage excuses."""

import asyncio
from dataclasses import replace

import pytest

from tests.support.fakes import GOOD, REFUSED, Answer, FakeBackend, status
from tests.support.pipeline import Pipeline, a_delivery, message
from tests.support.virtual_time import loop_time, settle, unix_time, virtual_time
from worker.delivery import Delivery
from worker.flow.breaker import BreakerEffect
from worker.flow.circuit import CircuitState
from worker.flow.queue import AdmissionOrder
from worker.pipeline.attempt import (
    MAX_EXCUSED,
    MAX_EXCUSED_CRASHES,
    MAX_RETRY_AFTER_PAUSE_S,
    SUSPICION_S,
    failure_signal,
)
from worker.policy.model import BreakerAction, Decision, Disposition, ErrorClass, Fault, Phase
from worker.wire.message import RequestMessage

REQUEST = RequestMessage(path="/v1/chat/completions", body=b'{"model":"m"}', model="m")
FAILED = Decision(
    disposition=Disposition.NACK, error_class=ErrorClass.SERVER_ERROR, breaker=BreakerAction.COUNT, max_tries=2
)


async def _make(pipeline: Pipeline, request: RequestMessage = REQUEST, delivery: Delivery | None = None) -> Decision:
    delivery = delivery or a_delivery(request)
    permit = await pipeline.route.gate.admit(AdmissionOrder(), model=request.model)
    return await pipeline.attempts.make(delivery, request, pipeline.route, permit)


async def _open(pipeline: Pipeline) -> None:
    """Open the breaker by attempts of others."""
    for _ in range(5):
        await _make(pipeline)
    assert pipeline.route.is_open()


@virtual_time
async def test_a_good_answer_is_replied_and_served() -> None:
    """The window learns that it was served and the slot is free again."""
    pipeline = Pipeline()
    decision = await _make(pipeline)
    assert (decision.disposition, decision.error_class) == (Disposition.REPLY, None)
    assert pipeline.gate.window.served == 1
    pipeline.assert_nothing_leaks()


@pytest.mark.parametrize(("asked", "is_good"), [("[]", True), ('["a"]', False)])
def test_no_embeddings_are_the_right_answer_to_no_texts(asked: str, is_good: bool) -> None:
    """And to texts they are an empty answer, which is tried again."""

    @virtual_time
    async def run() -> None:
        pipeline = Pipeline(FakeBackend(Answer(body=b'{"object":"list","data":[]}')))
        request = RequestMessage(path="/v1/embeddings", body=b'{"model":"m","input":%s}' % asked.encode(), model="m")
        decision = await _make(pipeline, request)
        assert decision.error_class == (None if is_good else ErrorClass.EMPTY_CHOICES)

    run()


@virtual_time
async def test_what_is_sent() -> None:
    """Path, body and headers of the request, an id of this try, and the time until the deadline."""
    pipeline = Pipeline(attempts={"send_idempotency_key": True})
    request = replace(REQUEST, headers={"x-a": "1"}, stream=True, deadline=unix_time() + 60)
    await _make(pipeline, request, a_delivery(request, message(message_id="m", attempt=2)))
    sent = pipeline.backend.requests[0]
    assert (sent.path, sent.body, sent.stream_requested) == (request.path, request.body, True)
    assert sent.headers == {"x-a": "1", "x-request-id": "m-2-1", "idempotency-key": "m"}
    assert sent.timeout_s == pytest.approx(60)


@virtual_time
async def test_no_idempotency_key_unless_wanted_and_no_limit_without_a_deadline() -> None:
    """The defaults: the key is opt-in, the route's own limit alone."""
    pipeline = Pipeline()
    await _make(pipeline)
    assert "idempotency-key" not in pipeline.backend.requests[0].headers
    assert pipeline.backend.requests[0].timeout_s is None


@virtual_time
async def test_overload_narrows_the_window() -> None:
    """A 429 is a capacity signal: fewer run at once."""
    pipeline = Pipeline(FakeBackend(status(429)))
    before = pipeline.gate.window.limit
    decision = await _make(pipeline)
    assert decision.disposition is Disposition.HOLD
    assert (pipeline.gate.window.rejected, pipeline.gate.window.limit < before) == (1, True)


@virtual_time
async def test_a_failure_that_is_the_messages_own_tells_the_breaker_nothing() -> None:
    """A refused request is no sign of a sick backend, however many there are."""
    pipeline = Pipeline(FakeBackend(then=status(400)))
    for _ in range(20):
        await _make(pipeline)
    assert pipeline.route.breaker().state is CircuitState.CLOSED


@virtual_time
async def test_a_trip_is_counted_and_logged_once(logs) -> None:
    """When the breaker opens an operator sees why, once."""
    pipeline = Pipeline(FakeBackend(then=REFUSED))
    permits = [await pipeline.route.gate.admit(AdmissionOrder()) for _ in range(6)]
    await asyncio.gather(
        *(pipeline.attempts.make(a_delivery(REQUEST), REQUEST, pipeline.route, permit) for permit in permits)
    )
    assert pipeline.count("breaker_trips_total", "fake", "connect") == 1
    assert len([line for line in logs if line["event"] == "breaker_opened"]) == 1


@virtual_time
async def test_a_lonely_403_is_the_requests_and_three_in_a_row_are_ours() -> None:
    """One is answered, the third without a success between is held as refused credentials."""
    pipeline = Pipeline(FakeBackend(status(403), GOOD, status(403), status(403), status(403)))
    decisions = [await _make(pipeline) for _ in range(5)]
    classes = [decision.error_class for decision in decisions]
    assert classes == [ErrorClass.FORBIDDEN, None, ErrorClass.FORBIDDEN, ErrorClass.FORBIDDEN, ErrorClass.AUTH]
    assert pipeline.route.is_open()


@virtual_time
async def test_an_exception_of_the_adapter_is_an_internal_error(logs) -> None:
    """It becomes a decision with a traceback in the log; the breaker is told nothing."""
    pipeline = Pipeline(FakeBackend(Answer(error=RuntimeError("bug"))))
    decision = await _make(pipeline)
    assert (decision.disposition, decision.error_class) == (Disposition.NACK, ErrorClass.INTERNAL_ERROR)
    assert [line for line in logs if line["event"] == "internal_error"]
    assert pipeline.gate.breaker.route.failures == 0


@virtual_time
async def test_cancelled_it_gives_the_slot_back_and_says_nothing() -> None:
    """The window learns neither success nor failure, and nothing is counted as running."""
    pipeline = Pipeline()
    pipeline.backend.hold()
    making = asyncio.ensure_future(_make(pipeline))
    await settle()
    assert pipeline.count("in_flight") == 1
    making.cancel()
    with pytest.raises(asyncio.CancelledError):
        await making
    assert (pipeline.gate.window.served, pipeline.gate.window.rejected) == (0, 0)
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_the_event_holds_what_came() -> None:
    """Rules and hooks see phase, status, headers, body, fault and the counts of tries."""
    answer = status(500, b"boom", headers={"x-a": "1"}, fault=Fault.CONNECTION_LOST, phase=Phase.BODY)
    pipeline, delivery = Pipeline(FakeBackend(answer)), a_delivery(REQUEST, message(attempt=3))
    await _make(pipeline, delivery=delivery)
    event = delivery.event
    assert event is not None
    assert (event.backend, event.path, event.model) == ("fake", REQUEST.path, "m")
    assert (event.status, event.body, event.headers) == (500, b"boom", {"x-a": "1"})
    assert (event.fault, event.phase, event.detail) == (Fault.CONNECTION_LOST, Phase.BODY, "scripted")
    assert (event.delivery_attempt, event.attempts) == (3, 1)


@virtual_time
async def test_an_error_status_is_judged_though_the_deadline_cut_its_body() -> None:
    """A status is the whole truth, also when its body was not read to the end in time."""
    answer = status(500, b"", fault=Fault.TOTAL_TIMEOUT, phase=Phase.BODY)
    pipeline = Pipeline(FakeBackend(answer))
    decision = await _make(pipeline, replace(REQUEST, deadline=unix_time() + 0.03))
    assert decision.error_class is ErrorClass.SERVER_ERROR


# Outages.


@virtual_time
async def test_a_failure_beside_successes_is_not_excused() -> None:
    """It waits to see whether others fail as well, and is then handed back."""
    pipeline, delivery = Pipeline(), a_delivery(REQUEST)
    decision = await pipeline.attempts.discount_outage(delivery, pipeline.route, FAILED, asyncio.Event())
    assert decision is FAILED
    assert loop_time() == pytest.approx(SUSPICION_S)


@virtual_time
async def test_a_failure_among_failures_is_excused() -> None:
    """Behind an open breaker it is held, is not charged, and no limit of its class applies."""
    pipeline, delivery = Pipeline(FakeBackend(then=status(500))), a_delivery(REQUEST)
    delivery.tries = delivery.charged_tries = 1
    await _open(pipeline)
    decision = await pipeline.attempts.discount_outage(delivery, pipeline.route, FAILED, asyncio.Event())
    assert (decision.disposition, decision.max_tries) == (Disposition.HOLD, None)
    assert (delivery.tries, delivery.charged_tries) == (1, 0)
    assert decision.rule.endswith("+outage")


@pytest.mark.parametrize(
    ("error_class", "excused"),
    [
        (ErrorClass.SERVER_ERROR, MAX_EXCUSED),
        (ErrorClass.CONNECT, MAX_EXCUSED),
        (ErrorClass.CONNECTION_LOST, MAX_EXCUSED_CRASHES),
        (ErrorClass.TIMEOUT, MAX_EXCUSED_CRASHES),
        (ErrorClass.STREAM_BROKEN, MAX_EXCUSED_CRASHES),
    ],
)
@virtual_time
async def test_excuses_run_out(error_class: ErrorClass, excused: int) -> None:
    """What was excused so often is handed back, soon if it may have taken the server down each time."""
    pipeline, delivery = Pipeline(FakeBackend(then=status(500))), a_delivery(REQUEST)
    await _open(pipeline)
    failed = replace(FAILED, error_class=error_class)
    held = 0
    while True:
        delivery.tries, delivery.charged_tries = delivery.tries + 1, delivery.charged_tries + 1
        decision = await pipeline.attempts.discount_outage(delivery, pipeline.route, failed, asyncio.Event())
        if decision.disposition is not Disposition.HOLD:
            break
        held += 1
    assert (held, decision) == (excused, failed)
    assert delivery.charged_tries == 1


@pytest.mark.parametrize(
    "decision",
    [
        replace(FAILED, disposition=Disposition.HOLD),
        replace(FAILED, disposition=Disposition.REPLY),
        replace(FAILED, breaker=BreakerAction.NONE),
    ],
    ids=["held", "answered", "no concern of the breaker"],
)
def test_only_what_is_handed_back_for_the_backends_sake_is_looked_at(decision: Decision) -> None:
    """Everything else passes at once and unchanged."""

    @virtual_time
    async def run() -> None:
        pipeline = Pipeline(FakeBackend(then=status(500)))
        await _open(pipeline)
        delivery = a_delivery(REQUEST)
        assert await pipeline.attempts.discount_outage(delivery, pipeline.route, decision, asyncio.Event()) is decision
        assert loop_time() == 0

    run()


@virtual_time
async def test_while_draining_nothing_is_excused() -> None:
    """A drain holds nothing: what failed goes back at once."""
    pipeline, draining = Pipeline(FakeBackend(then=status(500))), asyncio.Event()
    await _open(pipeline)
    draining.set()
    assert await pipeline.attempts.discount_outage(a_delivery(REQUEST), pipeline.route, FAILED, draining) is FAILED


# What the gate is told.

OVERLOADED = replace(FAILED, error_class=ErrorClass.RATE_LIMITED, is_overload=True)


@pytest.mark.parametrize("action", [BreakerAction.NONE, BreakerAction.COUNT, BreakerAction.TRIP])
@pytest.mark.parametrize("is_fresh", [True, False])
def test_a_failure_that_is_no_overload_has_the_decisions_effect(action: BreakerAction, is_fresh: bool) -> None:
    """Whether a refusal would have been fresh is of no concern; the window is not paused."""
    decision = replace(FAILED, breaker=action, retry_after_s=3.0)
    signal = failure_signal(decision, is_fresh=is_fresh, is_probe=False)
    assert (signal.breaker.value, signal.overload, signal.pause_s) == (action.value, False, None)
    assert (signal.error_class, signal.retry_after_s) == ("server_error", 3.0)


@pytest.mark.parametrize(
    ("action", "is_fresh", "is_probe", "effect"),
    [
        (BreakerAction.TRIP, True, False, BreakerEffect.COUNT),
        (BreakerAction.COUNT, True, False, BreakerEffect.COUNT),
        (BreakerAction.NONE, True, False, BreakerEffect.NONE),
        (BreakerAction.TRIP, False, False, BreakerEffect.NONE),
        (BreakerAction.COUNT, False, False, BreakerEffect.NONE),
        (BreakerAction.TRIP, False, True, BreakerEffect.COUNT),
    ],
)
def test_an_overload_counts_once_for_a_flight(
    action: BreakerAction, is_fresh: bool, is_probe: bool, effect: BreakerEffect
) -> None:
    """It never trips the breaker at once; a stale refusal has no effect unless a probe was refused."""
    signal = failure_signal(replace(OVERLOADED, breaker=action), is_fresh=is_fresh, is_probe=is_probe)
    assert (signal.breaker, signal.overload) == (effect, True)


@pytest.mark.parametrize(("retry_after_s", "pause_s"), [(None, None), (3.0, 3.0), (86400.0, MAX_RETRY_AFTER_PAUSE_S)])
def test_the_retry_after_of_an_overload_pauses_the_route(retry_after_s: float | None, pause_s: float | None) -> None:
    """To the second, and a minute at most; the breaker gets the hint as it is."""
    signal = failure_signal(replace(OVERLOADED, retry_after_s=retry_after_s), is_fresh=True, is_probe=False)
    assert (signal.pause_s, signal.retry_after_s) == (pause_s, retry_after_s)


@virtual_time
async def test_refusals_of_one_flight_are_one_failure_and_a_row_of_fresh_ones_opens_the_breaker() -> None:
    """However many attempts were under way together."""
    pipeline = Pipeline(FakeBackend(then=status(429)), window=8)
    permits = [await pipeline.route.gate.admit(AdmissionOrder()) for _ in range(8)]
    for permit in permits:
        await pipeline.attempts.make(a_delivery(REQUEST), REQUEST, pipeline.route, permit)
    assert pipeline.gate.breaker.route.failures == 1
    for _ in range(4):
        await _make(pipeline)
    assert pipeline.route.is_open()


# The wait before the next try.


@virtual_time
async def test_while_the_breaker_is_closed_the_backoff_decides() -> None:
    """Full jitter within the decision's bounds, and never before the backend's own wish."""
    pipeline, delivery = Pipeline(), a_delivery(REQUEST)
    delivery.tries = 3
    for _ in range(100):
        assert 0 <= pipeline.attempts.delay_s(delivery, pipeline.route, FAILED) <= 4.0
        wish = replace(FAILED, retry_after_s=9.0)
        assert pipeline.attempts.delay_s(delivery, pipeline.route, wish) == 9.0


@virtual_time
async def test_behind_an_open_breaker_another_message_goes_first() -> None:
    """Who failed waits beyond the next probe when others wait, and not at all when it is alone."""
    pipeline, delivery = Pipeline(FakeBackend(then=status(500))), a_delivery(REQUEST)
    await _open(pipeline)
    assert pipeline.attempts.delay_s(delivery, pipeline.route, FAILED) == 0.0
    other = asyncio.ensure_future(pipeline.route.gate.admit(AdmissionOrder()))
    await settle()
    probe_at = pipeline.route.breaker().next_probe_at
    assert probe_at is not None
    for _ in range(100):
        assert pipeline.attempts.delay_s(delivery, pipeline.route, FAILED) >= probe_at - loop_time()
    other.cancel()
    await asyncio.gather(other, return_exceptions=True)
