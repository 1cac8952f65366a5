"""One attempt: what is sent, what is said about its end, and what the gate is told."""

import asyncio
import uuid

import pytest
from msgspec import structs

from tests.support.fakes import GOOD, REFUSED, Answer, FakeBackend, status
from tests.support.pipeline import Pipeline, a_delivery, message
from tests.support.virtual_time import settle, unix_time, virtual_time
from worker.delivery import Delivery
from worker.flow.circuit import CircuitState
from worker.flow.gate import Permit
from worker.flow.queue import AdmissionOrder
from worker.pipeline.attempt import attempt_id
from worker.policy.model import Decision, Disposition, ErrorClass, Fault, Phase
from worker.wire.body import RequestBody
from worker.wire.message import RequestMessage

REQUEST = RequestMessage(path="/v1/chat/completions", body=RequestBody(b'{"model":"m"}'), model="m")


async def _make(pipeline: Pipeline, request: RequestMessage = REQUEST, delivery: Delivery | None = None) -> Decision:
    permit = await pipeline.target.gate.admit(AdmissionOrder(), lane_name=request.model)
    return await _attempt(pipeline, permit, request, delivery)


async def _attempt(
    pipeline: Pipeline, permit: Permit, request: RequestMessage = REQUEST, delivery: Delivery | None = None
) -> Decision:
    delivery = delivery or a_delivery(request)
    delivery.backend = pipeline.target.name
    with permit:
        end, _ = await pipeline.processor._attempt(delivery, request, pipeline.target, permit)
        return end.decision


@virtual_time
async def test_a_good_answer_is_replied_and_served() -> None:
    """The window learns that it was served and the slot is free again."""
    pipeline = Pipeline()
    decision = await _make(pipeline)
    assert (decision.disposition, decision.error_class) == (Disposition.REPLY, None)
    assert pipeline.lane.window.served == 1
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_a_header_that_is_allowed_for_other_routes_stays_out() -> None:
    """What an operator allows for one backend is not thereby allowed for all."""
    pipeline = Pipeline()
    pipeline.target.foreign_headers = frozenset({"x-amzn-sagemaker-target-variant"})
    headers = {"x-amzn-sagemaker-target-variant": "blue", "x-mine": "1"}
    await _make(pipeline, structs.replace(REQUEST, headers=headers))
    (sent,) = pipeline.backend.requests
    assert set(sent.headers) == {"x-mine", "x-request-id"}


@virtual_time
async def test_the_backend_gets_the_metadata() -> None:
    """For settings that take a text out of it; the body is what it was."""
    pipeline = Pipeline()
    await _make(pipeline, structs.replace(REQUEST, metadata=b'{"trace":"t"}'))
    (sent,) = pipeline.backend.requests
    assert (sent.metadata, sent.body) == (b'{"trace":"t"}', REQUEST.body)


@pytest.mark.parametrize(("asked", "is_good"), [("[]", True), ('["a"]', False)])
def test_no_embeddings_are_the_right_answer_to_no_texts(asked: str, is_good: bool) -> None:
    """And to texts they are an empty answer, which is tried again."""

    @virtual_time
    async def run() -> None:
        pipeline = Pipeline(FakeBackend(Answer(body=b'{"object":"list","data":[]}')))
        request = RequestMessage(
            path="/v1/embeddings", body=RequestBody(b'{"model":"m","input":%s}' % asked.encode()), model="m"
        )
        decision = await _make(pipeline, request)
        assert decision.error_class == (None if is_good else ErrorClass.EMPTY_ANSWER)

    run()


@virtual_time
async def test_what_is_sent() -> None:
    """Path, body and headers of the request, an id of this try, and the time until the deadline."""
    pipeline = Pipeline(attempts={"send_idempotency_key": True})
    request = structs.replace(REQUEST, headers={"x-a": "1"}, deadline=unix_time() + 60)
    await _make(pipeline, request, a_delivery(request, message(message_id="m", attempt=2)))
    sent = pipeline.backend.requests[0]
    assert (sent.path, sent.body) == (request.path, request.body)
    assert sent.headers == {"x-a": "1", "x-request-id": attempt_id("m", 2, 1), "idempotency-key": "m"}
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
    """A 429 is a capacity signal, and a second one confirms it: fewer run at once."""
    pipeline = Pipeline(FakeBackend(then=status(429)))
    decision = await _make(pipeline)
    assert decision.disposition is Disposition.HOLD
    before = pipeline.lane.window.limit
    await _make(pipeline)
    assert (pipeline.lane.window.rejected, pipeline.lane.window.limit < before) == (2, True)


@virtual_time
async def test_a_failure_that_is_the_messages_own_tells_the_breaker_nothing() -> None:
    """A refused request is no sign of a sick backend, however many there are."""
    pipeline = Pipeline(FakeBackend(then=status(400)))
    for _ in range(20):
        await _make(pipeline)
    assert pipeline.circuit.state is CircuitState.CLOSED


@virtual_time
async def test_a_trip_is_counted_and_logged_once(logs) -> None:
    """When the breaker opens an operator sees why, once."""
    pipeline = Pipeline(FakeBackend(then=REFUSED))
    permits = [await pipeline.target.gate.admit(AdmissionOrder()) for _ in range(6)]
    await asyncio.gather(*(_attempt(pipeline, permit) for permit in permits))
    assert pipeline.count("breaker_trips_total", "fake", "connect") == 1
    assert len([line for line in logs if line["event"] == "breaker_opened"]) == 1


@virtual_time
async def test_403s_of_three_models_are_about_our_credentials() -> None:
    """Two are answered, the third without a success between is held and counts once against the route."""
    pipeline = Pipeline(FakeBackend(GOOD, then=status(403)))
    decisions = [await _make(pipeline)]
    for model in ("a", "a", "a", "b", "c"):
        await asyncio.sleep(60)
        decisions.append(await _make(pipeline, structs.replace(REQUEST, model=model)))
    classes = [decision.error_class for decision in decisions]
    assert classes == [None, *[ErrorClass.FORBIDDEN] * 4, ErrorClass.AUTH]
    assert pipeline.gate.circuit.failures == 1


@virtual_time
async def test_an_exception_of_the_adapter_is_an_internal_error(logs) -> None:
    """It becomes a decision with a traceback in the log; the breaker learns nothing."""
    pipeline = Pipeline(FakeBackend(Answer(error=RuntimeError("bug"))))
    decision = await _make(pipeline)
    assert (decision.disposition, decision.error_class) == (Disposition.NACK, ErrorClass.INTERNAL_ERROR)
    assert [line for line in logs if line["event"] == "internal_error"]
    assert pipeline.circuit.failures == 0


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
    assert (pipeline.lane.window.served, pipeline.lane.window.rejected) == (0, 0)
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_the_event_holds_what_came() -> None:
    """Rules and hooks see phase, status, headers, body, fault and the counts of attempts."""
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
    decision = await _make(pipeline, structs.replace(REQUEST, deadline=unix_time() + 0.03))
    assert decision.error_class is ErrorClass.SERVER_ERROR


@virtual_time
async def test_refusals_of_one_flight_are_one_failure_and_a_row_of_fresh_ones_opens_the_breaker() -> None:
    """However many attempts were under way together."""
    pipeline = Pipeline(FakeBackend(then=status(429)), window=8)
    for permit in [await pipeline.target.gate.admit(AdmissionOrder(), lane_name="m") for _ in range(8)]:
        await _attempt(pipeline, permit)
    assert pipeline.circuit.failures == 2  # the first raises a suspicion, the second confirms it
    for _ in range(4):
        await _make(pipeline)
    assert pipeline.target.is_open()


def test_an_attempts_id_is_a_uuid_of_its_own() -> None:
    """Servers refuse others; it tells message, delivery and attempt apart, and is the same for the same attempt."""
    ids = [attempt_id(*each) for each in (("m", 1, 1), ("m", 1, 2), ("m", 2, 1), ("n", 1, 1), ("\n", 1, 1), ("", 1, 1))]
    assert len(set(ids)) == 6
    assert [str(uuid.UUID(each)) for each in ids] == ids
    assert attempt_id("m", 1, 1) == ids[0] == str(uuid.uuid5(uuid.NAMESPACE_OID, "m-1-1"))
    assert [str(uuid.UUID(each)) for each in ids] == ids
