"""Streams that break: what the answer carries, and what a retry must not."""

import asyncio
from typing import Any

import pytest

from tests.support.fakes import Answer, FakeBackend, status
from tests.support.pipeline import METADATA, Pipeline, data, message
from tests.support.streams import broken, content, error_event, partial
from tests.support.virtual_time import EPOCH, virtual_time
from worker.policy.model import Fault
from worker.ports import Settlement

ACK, NACK = Settlement.ACK, Settlement.NACK

# The answer to a stream that broke for good


@pytest.mark.parametrize(
    ("fault", "code", "error_class"),
    [
        (Fault.STREAM_BROKEN, 502, "stream_broken"),
        (Fault.CONNECTION_LOST, 502, "stream_broken"),
        (Fault.DECODING, 502, "stream_broken"),
        (Fault.IDLE_TIMEOUT, 504, "stream_idle"),
        (Fault.TOTAL_TIMEOUT, 504, "timeout"),
    ],
)
def test_out_of_tries_the_answer_is_an_error_with_the_partial(fault: Fault, code: int, error_class: str) -> None:
    """Never a 200; the attribute says that it is truncated, the metadata is echoed, the metric counts it."""

    @virtual_time
    async def run() -> None:
        pipeline = Pipeline(FakeBackend(then=broken(fault)))
        assert await pipeline.handle(message(attempt=5)) is ACK
        answer = pipeline.answer
        body = answer.json["body"]
        assert (answer.json["status_code"], answer.json["metadata"]) == (code, METADATA)
        assert (content(body), body["truncated"], body["error"]["code"]) == ("Hel", True, error_class)
        assert body["partial"]["choices"][0]["finish_reason"] is None
        assert (answer.attributes["truncated"], answer.attributes["status_code"]) == ("true", str(code))
        assert pipeline.count("partial_responses_total", error_class) == 1

    run()


@virtual_time
async def test_without_a_partial_nothing_is_truncated() -> None:
    """A stream that broke before its first text has nothing to show."""
    nothing = broken(result={"partial": None, "content_events": 0})
    pipeline = Pipeline(FakeBackend(then=nothing))
    await pipeline.handle(message(attempt=5))
    body = pipeline.answer.json["body"]
    assert not {"partial", "truncated"} & set(body)
    assert "truncated" not in pipeline.answer.attributes
    assert pipeline.count("partial_responses_total", "stream_broken") == 0


@virtual_time
async def test_tries_left_it_is_handed_back_without_an_answer() -> None:
    """A partial is no reason to give up."""
    pipeline = Pipeline(FakeBackend(then=broken()))
    assert await pipeline.handle(message(attempt=1)) is NACK
    assert pipeline.answers == []


@pytest.mark.parametrize(
    ("error", "code", "error_class"),
    [
        ({"message": "no", "type": "BadRequestError", "code": 400}, 400, "invalid_request"),
        ({"message": "no", "type": "invalid_request_error", "code": "context_length_exceeded"}, 400, "context_length"),
        ({"message": "no", "type": "t", "code": "content_policy_violation"}, 400, "content_filter"),
    ],
)
def test_a_final_error_inside_a_stream_is_answered_with_its_status(
    error: dict[str, Any], code: int, error_class: str
) -> None:
    """Text had come, the message is at fault: that status, the partial, at the first attempt."""

    @virtual_time
    async def run() -> None:
        pipeline = Pipeline(FakeBackend(error_event({"error": error})))
        assert await pipeline.handle(message(attempt=1)) is ACK
        answer = pipeline.answer
        assert (answer.json["status_code"], answer.attributes["error_class"]) == (code, error_class)
        assert content(answer.json["body"]) == "Hel"
        assert answer.json["body"]["error"]["backend"]["body"] == {"error": error}

    run()


@pytest.mark.parametrize(("text", "error_class"), [("", "overloaded"), ("Hel", "stream_broken")])
def test_an_error_event_is_what_it_names_until_text_has_come(text: str, error_class: str) -> None:
    """First of all events it is a plain error, held here; after text it broke the stream."""

    @virtual_time
    async def run() -> None:
        event = error_event({"error": {"message": "busy", "type": "ServiceUnavailableError", "code": 503}}, text=text)
        pipeline = Pipeline(FakeBackend(event), hold_max_s=0.001)
        await pipeline.handle(message(attempt=5))
        answer = pipeline.answer
        assert answer.attributes["error_class"] == error_class
        assert ("partial" in answer.json["body"]) is bool(text)
        if not text:  # as if it had been answered with 503
            assert answer.json["body"]["error"]["message"] == "busy"

    run()


@virtual_time
async def test_an_aborted_answer_is_a_partial_too() -> None:
    """The stream is whole, but its server says that it gave up."""
    body = partial().replace(b"null", b'"abort"')
    pipeline = Pipeline(FakeBackend(then=Answer(body=body)))
    await pipeline.handle(message(attempt=5))
    answer = pipeline.answer
    assert (answer.json["status_code"], answer.attributes["truncated"]) == (503, "true")
    assert content(answer.json["body"]) == "Hel"


# A retry starts clean


@virtual_time
async def test_a_retry_has_nothing_of_the_broken_try() -> None:
    """Neither its text nor its tokens: the answer is the second one's alone."""
    good = Answer(first_token_s=1.0, seconds=2.0, result={"stream_usage": {"completion_tokens": 5}})
    usage = {"completion_tokens": 900}
    pipeline = Pipeline(
        FakeBackend(broken(Fault.CONNECTION_LOST, result={"stream_usage": usage}), good), include_stats=True
    )
    first = message(attempt=1, message_id="m")
    assert await pipeline.handle(first) is NACK
    assert await pipeline.handle(message(attempt=2, message_id="m")) is ACK
    answer = pipeline.answer
    assert "Hel" not in answer.data.decode()
    assert answer.json["stats"]["tokens"]["output"] == 5
    assert pipeline.count("tokens_total", "fake", "other", "m", "output") == 5


@virtual_time
async def test_the_partial_is_that_of_the_last_try() -> None:
    """An attempt that was refused outright leaves nothing, whatever the one before had."""
    pipeline = Pipeline(FakeBackend(broken(Fault.IDLE_TIMEOUT), status(500)), hold_max_s=0.001)
    assert await pipeline.handle(message(attempt=1, message_id="m")) is NACK
    await pipeline.handle(message(attempt=5, message_id="m"))
    assert "partial" not in pipeline.answer.json["body"]


# Shutdown and deadline


@pytest.mark.parametrize(("attempt", "settlement"), [(5, ACK), (1, NACK)])
def test_on_shutdown_the_last_attempt_is_salvaged(attempt: int, settlement: Settlement) -> None:
    """With attempts left the message goes back; without, what came goes out instead of a silent dead letter."""

    @virtual_time
    async def run() -> None:
        streaming = Answer(first_token_s=1.0, seconds=100.0, result={"partial": partial()})
        pipeline = Pipeline(FakeBackend(streaming))
        handling = pipeline.start(message(attempt=attempt))
        await asyncio.sleep(10)
        pipeline.processor.begin_drain()
        handling.cancel()
        assert await handling is settlement
        assert len(pipeline.answers) == (settlement is ACK)
        for answer in pipeline.answers:
            assert (answer.json["status_code"], answer.attributes["truncated"]) == (503, "true")
            assert content(answer.json["body"]) == "Hel"
        pipeline.assert_nothing_leaks()

    run()


@virtual_time
async def test_a_stream_cut_by_its_deadline_shows_what_came() -> None:
    """The requester waits no longer and gets what there is."""
    pipeline = Pipeline(FakeBackend(broken(Fault.TOTAL_TIMEOUT, seconds=20.0)))
    await pipeline.handle(message(data(deadline=EPOCH + 20), attempt=1))
    answer = pipeline.answer
    assert answer.attributes["error_class"] == "deadline_exceeded"
    assert content(answer.json["body"]) == "Hel"
