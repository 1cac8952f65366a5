"""What goes out for a delivery: published before the ack, well-formed whatever the backend sent."""

import json

import pytest

from tests.support.fakes import Answer, FakeBackend, FakePublisher, status
from tests.support.pipeline import METADATA, Pipeline, data, message
from tests.support.virtual_time import unix_time, virtual_time
from worker.errors import PublishRefusedError, PublishRetryableError
from worker.ports import BackendRequest, Settlement

ACK, NACK = Settlement.ACK, Settlement.NACK


@virtual_time
async def test_a_failed_publish_never_repeats_the_inference() -> None:
    """The publish is tried again, the backend is not asked again."""
    failures = [PublishRetryableError("away")] * 20
    pipeline = Pipeline(publisher=FakePublisher(*failures))
    assert await pipeline.handle() is ACK
    assert (len(pipeline.backend.requests), pipeline.publisher.attempts) == (1, 21)


@virtual_time
async def test_an_answer_that_cannot_be_published_within_the_lease_goes_back() -> None:
    """When the lease budget is over the message is handed back, and nothing keeps the intake closed."""
    pipeline = Pipeline(lease_s=600.0)
    pipeline.publisher.always = PublishRefusedError("gone")
    started = unix_time()
    assert await pipeline.handle() is NACK
    assert 580 < unix_time() - started <= 600
    assert pipeline.intake.reasons == ()
    assert len(pipeline.backend.requests) == 1


@virtual_time
async def test_an_answer_too_large_is_counted_as_the_error_it_became() -> None:
    """Metrics, share of errors and log tell what the requester got, not what the backend said."""
    pipeline = Pipeline(publisher=FakePublisher(limit=600))
    pipeline.backend.then = Answer(body=b'{"choices":[{"text":"' + b"x" * 1000 + b'"}]}')
    assert await pipeline.handle() is ACK
    assert pipeline.answer.attributes["error_class"] == "reply_too_large"
    assert pipeline.count("deliveries_total", "ack", "reply_too_large") == 1
    dominant = pipeline.error_share.dominant()
    assert dominant is not None
    assert dominant.error_class == "reply_too_large"


# Well-formedness.


@pytest.mark.parametrize("attempt", [1, 5])
@pytest.mark.parametrize(
    ("code", "body"),
    [
        (502, b"<html><body>Bad Gateway</body></html>"),
        (200, b""),
        (200, b'{"choices":[{"index":0,'),
        (200, b'{"choices":[{"x":"\xff\xfe"}]}'),
        (200, b'{"choices":[{"x":NaN}]}'),
        (200, b'{"choices":[{"x":Infinity}]}'),
        (200, b'"text"'),
        (200, b"null"),
        (200, b'{"choices":[]}'),
        (500, b"\xff\xfe\x00"),
        (500, b'{"error":{"message":"\xff"}}'),
        (400, b'{"error":{"message":NaN}}'),
        (400, b"[" * 5000),
        (400, b'{"error":' + b'{"a":' * 3000 + b"1" + b"}" * 3001),
        (429, b""),
        (301, b"moved"),
        (400, b'{"error":"\\ud800"}'),
    ],
)
def test_whatever_the_backend_sends_the_answer_is_json(code: int, body: bytes, attempt: int) -> None:
    """HTML, nothing, half a document or invalid UTF-8: what is published is valid JSON with the metadata."""

    @virtual_time
    async def run() -> None:
        pipeline = Pipeline(FakeBackend(then=status(code, body)), hold_max_s=10.0, dead_letters=True)
        settlement = await pipeline.handle(message(attempt=attempt))
        assert len(pipeline.answers) == (settlement is ACK)
        assert settlement is ACK or attempt == 1
        for answer in pipeline.answers:
            document = json.loads(answer.data.decode("utf-8"), parse_constant=pytest.fail)
            assert document["metadata"] == METADATA
            assert document["status_code"] >= 400
            assert document["body"]["error"]

    run()


@virtual_time
async def test_stats_stand_in_the_answer_when_wanted() -> None:
    """With `reply.include_stats` an answer tells its times, tokens and attempts."""
    pipeline = Pipeline(FakeBackend(Answer(seconds=2.0)), include_stats=True)
    await pipeline.handle(message(attempt=1, publish_time=unix_time() - 30))
    stats = pipeline.answer.json["stats"]
    assert (stats["queue_s"], stats["ttlt_s"], stats["attempts"]) == (30.0, 2.0, 1)
    assert stats["tokens"] == {"input": 3, "output": 5, "input_cached": None, "output_reasoning": None}


@virtual_time
async def test_a_script_can_judge_by_request() -> None:
    """Two messages that differ only in their body are judged by their own answers."""

    def answer(request: BackendRequest) -> Answer:
        return status(400) if b'"bad"' in request.body.data else Answer()

    pipeline = Pipeline(FakeBackend(then=answer))
    await pipeline.handle(message(data({"model": "bad"})))
    await pipeline.handle(message(data({"model": "good"})))
    assert [each.json["status_code"] for each in pipeline.answers] == [400, 200]
