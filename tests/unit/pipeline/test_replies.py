"""Publishing answers: what is tried again, for how long, what takes the place of what is too large."""

import asyncio
import hashlib
from collections.abc import Mapping

import pytest

from tests.support.fakes import GOOD_BODY, Answer, FakeBackend, FakePayloads, FakePublisher
from tests.support.pipeline import METADATA, Pipeline, a_delivery, data, message
from tests.support.virtual_time import loop_time, settle, virtual_time
from worker.delivery import Delivery, Reply
from worker.errors import (
    MessageRejectedError,
    MessageTooLargeError,
    PayloadError,
    PublishRefusedError,
    PublishRetryableError,
)
from worker.pipeline.replies import PAUSE_AFTER_ATTEMPTS, PUBLISH_BACKOFF, TRIAL_EVERY_S
from worker.ports import AttemptResult, Settlement
from worker.wire.message import ReceivedMessage

REPLY = Reply(status_code=200, body=b'{"ok":true}', metadata=b'{"k":1}')
POISON = Reply(status_code=200, body=b'"poison"', metadata=b'{"k":1}')
LARGE = Answer(body=GOOD_BODY.replace(b"hi", b"hi" * 1_000), seconds=2.0)


class Picky(FakePublisher):
    """A topic whose schema does not fit messages with some words."""

    def __init__(self, *words: bytes) -> None:
        super().__init__()
        self.words = words

    async def publish(self, data: bytes, attributes: Mapping[str, str]) -> str:
        if any(word in data for word in self.words):
            await asyncio.sleep(0)
            raise MessageRejectedError("INVALID_ARGUMENT: schema")
        return await super().publish(data, attributes)


def _delivery(**attributes: str) -> Delivery:
    return a_delivery(received=ReceivedMessage(message_id="m", data=b"{}", attributes=attributes))


@virtual_time
async def test_the_answer_is_published_as_the_wire_has_it() -> None:
    """Status, metadata and body stand in the data as they are; the caller gets back what the broker has."""
    pipeline = Pipeline()
    assert await pipeline.replier.publish(_delivery(), REPLY) is REPLY
    assert pipeline.answer.data == b'{"status_code":200,"metadata":{"k":1},"body":{"ok":true}}'


@virtual_time
async def test_what_a_service_says_beside_the_answer_is_in_the_attributes() -> None:
    """Its own, never what the request's attributes claim in its name."""
    pipeline = Pipeline(copy_attributes=("*",))
    delivery = _delivery(sagemaker_variant="forged", mine="kept")
    assert pipeline.replier.attributes(delivery, REPLY).keys() >= {"mine"}
    assert "sagemaker_variant" not in pipeline.replier.attributes(delivery, REPLY)
    delivery.result = AttemptResult(attributes={"sagemaker_variant": "blue", "sagemaker_custom_attributes": "a b"})
    attributes = pipeline.replier.attributes(delivery, REPLY)
    assert (attributes["sagemaker_variant"], attributes["sagemaker_custom_attributes"]) == ("blue", "a b")


@virtual_time
async def test_a_hiccup_is_tried_again_without_pausing() -> None:
    """One or two failures say nothing yet; the waits are short at first."""
    pipeline = Pipeline(publisher=FakePublisher(*[PublishRetryableError("a")] * (PAUSE_AFTER_ATTEMPTS - 1)))
    assert await pipeline.replier.publish(_delivery(), REPLY) is REPLY
    assert loop_time() < 0.5
    assert pipeline.pauses == []
    assert pipeline.count("publish_failures_total", "retryable") == 2


@virtual_time
async def test_a_third_failure_pauses_the_intake_until_an_answer_is_out() -> None:
    """About a second of trouble, and no further GPU second is spent on what would have to wait."""
    pipeline = Pipeline(publisher=FakePublisher(*[PublishRetryableError("a")] * 10))
    publishing = asyncio.ensure_future(pipeline.replier.publish(_delivery(), REPLY))
    await asyncio.sleep(1)
    assert pipeline.gate.paused
    assert await publishing is REPLY
    assert pipeline.pauses == [("publish", True), ("publish", False)]
    assert not pipeline.gate.paused


@virtual_time
async def test_a_refused_publish_pauses_at_once() -> None:
    """A topic that is gone needs an operator: nothing new is started meanwhile."""
    pipeline = Pipeline(publisher=FakePublisher(PublishRefusedError("gone")))
    publishing = asyncio.ensure_future(pipeline.replier.publish(_delivery(), REPLY))
    await settle()
    assert pipeline.intake.reasons == ("publish",)
    assert await publishing is REPLY
    assert pipeline.intake.reasons == ()


@virtual_time
async def test_the_waits_are_bounded_so_that_recovery_is_noticed() -> None:
    """After an hour of failures an answer is out within the longest wait of the recovery."""
    pipeline = Pipeline()
    pipeline.publisher.always = PublishRefusedError("gone")
    publishing = asyncio.ensure_future(pipeline.replier.publish(_delivery(), REPLY))
    await asyncio.sleep(3600)
    pipeline.publisher.always = None
    await publishing
    assert loop_time() <= 3600 + PUBLISH_BACKOFF.max_s


@virtual_time
async def test_it_gives_up_when_the_lease_ends_and_opens_the_intake() -> None:
    """No publish is repeated any more, so only the next message can find out."""
    pipeline = Pipeline(lease_s=120.0)
    pipeline.publisher.always = PublishRetryableError("away")
    assert await pipeline.replier.publish(_delivery(), REPLY) is None
    assert loop_time() <= 120
    assert pipeline.intake.reasons == ()


@virtual_time
async def test_the_pause_lasts_while_anyone_is_stuck_and_no_longer() -> None:
    """One that gives up leaves the pause to the others; the last one, cancelled, takes it along."""
    pipeline = Pipeline()
    pipeline.publisher.always = PublishRefusedError("gone")
    one, other = (asyncio.ensure_future(pipeline.replier.publish(_delivery(), REPLY)) for _ in range(2))
    await asyncio.sleep(60)
    one.cancel()
    await settle()
    assert pipeline.intake.reasons == ("publish",)
    other.cancel()
    await settle()
    assert pipeline.intake.reasons == ()


@virtual_time
async def test_one_answer_that_is_out_opens_the_intake_for_all() -> None:
    """It proves that the topic takes answers again; those that wait for their next try are no reason to wait."""
    pipeline = Pipeline()
    pipeline.publisher.always = PublishRefusedError("gone")
    stuck = asyncio.ensure_future(pipeline.replier.publish(_delivery(), REPLY))
    await asyncio.sleep(60)
    pipeline.publisher.always = None
    assert await pipeline.replier.publish(_delivery(), REPLY) is REPLY
    assert not stuck.done()
    assert pipeline.intake.reasons == ()
    assert await stuck is REPLY


@virtual_time
async def test_an_answer_too_large_becomes_a_small_error_with_the_metadata() -> None:
    """The requester learns the sizes and which request it was; the text generated does not fit."""
    pipeline = Pipeline(publisher=FakePublisher(limit=700))
    large = Reply(status_code=200, body=b'"%s"' % (b"x" * 1000), metadata=b'{"k":1}', stats=b'{"s":1}')
    published = await pipeline.replier.publish(_delivery(), large)
    assert published is not None
    assert published.error_class == "reply_too_large"
    assert pipeline.answer.json["metadata"] == {"k": 1}
    assert pipeline.answer.json["status_code"] == 502
    assert pipeline.answer.attributes["error_class"] == pipeline.answer.error["code"] == "reply_too_large"
    assert pipeline.count("publish_failures_total", "too_large") == 1


@virtual_time
async def test_an_answer_too_large_tells_what_it_cost() -> None:
    """Times and tokens were paid for: they stand in the stats and in the metrics, under the error it became."""
    pipeline = Pipeline(FakeBackend(LARGE), publisher=FakePublisher(limit=1_500), include_stats=True)
    await pipeline.handle()
    stats = pipeline.answer.json["stats"]
    assert (stats["ttlt_s"], stats["tokens"]["output"], stats["error_class"]) == (2.0, 5, "reply_too_large")
    assert pipeline.count("tokens_total", "fake", "other", "m", "output") == 5


@virtual_time
async def test_stats_too_large_are_left_out_before_metadata() -> None:
    """A name of a model may be as long as a requester likes; the metadata says whose answer it is."""
    pipeline = Pipeline(FakeBackend(LARGE), publisher=FakePublisher(limit=1_500), include_stats=True)
    await pipeline.handle(message(data({"model": "m" * 2_000})))
    assert "stats" not in pipeline.answer.json
    assert pipeline.answer.json["metadata"] == METADATA


@virtual_time
async def test_metadata_too_large_is_left_out() -> None:
    """Even then there is an answer: `request_message_id` tells which request it was."""
    pipeline = Pipeline(publisher=FakePublisher(limit=700))
    large = Reply(status_code=200, body=b"{}", metadata=b'{"k":"%s"}' % (b"x" * 1000))
    assert await pipeline.replier.publish(_delivery(), large) is not None
    assert pipeline.answer.data.startswith(b'{"status_code":502,"metadata":{},')
    assert pipeline.answer.attributes["request_message_id"] == "m"
    assert pipeline.answer.attributes["error_class"] == "reply_too_large"


@virtual_time
async def test_metadata_just_below_the_limit_ends_in_an_answer_too() -> None:
    """Ten megabytes of metadata with many attributes beside them fit nowhere, but an answer does."""
    pipeline = Pipeline(copy_attributes=("*",))
    metadata = b'{"k":"%s"}' % (b"x" * 9_899_900)
    attributes = {f"attribute-{n}": "v" * 1024 for n in range(98)}
    reply = Reply(status_code=200, body=b'"%s"' % (b"y" * 200_000), metadata=metadata)
    assert await pipeline.replier.publish(_delivery(**attributes), reply) is not None
    assert pipeline.answer.data.startswith(b'{"status_code":502,"metadata":{},')


@virtual_time
async def test_an_answer_too_large_goes_to_object_storage_where_it_may() -> None:
    """The body is the object, byte for byte; the answer names it, with its digest, and is no error."""
    payloads = FakePayloads()
    pipeline = Pipeline(FakeBackend(LARGE), publisher=FakePublisher(limit=1_500), include_stats=True, payloads=payloads)
    await pipeline.handle(message(message_id="m-1"))
    uri = "gs://b/answers/m-1.json"
    assert payloads.objects == {uri: LARGE.body}
    answer = pipeline.answer.json
    assert (answer["status_code"], answer["metadata"], answer["body_uri"]) == (200, METADATA, uri)
    assert "body" not in answer
    assert answer["stats"]["error_class"] is None
    assert pipeline.answer.attributes["body_sha256"] == hashlib.sha256(LARGE.body).hexdigest()
    assert "error_class" not in pipeline.answer.attributes
    assert pipeline.count("publish_failures_total", "too_large") == 0
    assert pipeline.count("deliveries_total", "ack", "ok") == 1
    assert pipeline.count("payload_bytes_total", "write") == len(LARGE.body)


@virtual_time
async def test_an_answer_that_fits_goes_to_no_storage() -> None:
    """Only what no message can carry."""
    payloads = FakePayloads()
    pipeline = Pipeline(payloads=payloads)
    await pipeline.handle()
    assert payloads.written == []
    assert "body_sha256" not in pipeline.answer.attributes


@virtual_time
async def test_a_write_that_fails_is_repeated_and_pauses_nothing(logs) -> None:
    """The answer is kept, inference is not repeated, and other answers can be published."""
    payloads = FakePayloads()
    payloads.failures.extend([PayloadError("payload_unavailable", "503")] * 5)
    pipeline = Pipeline(FakeBackend(LARGE), publisher=FakePublisher(limit=1_500), payloads=payloads)
    assert await pipeline.handle() is Settlement.ACK
    assert len(payloads.written) == 6
    assert len(pipeline.backend.requests) == 1
    assert pipeline.pauses == []
    assert [line["error"] for line in logs if line["event"] == "reply_not_stored"] == ["payload_unavailable: 503"] * 5
    assert "body_uri" in pipeline.answer.json


@virtual_time
async def test_an_answer_that_cannot_be_written_in_the_lease_is_nacked() -> None:
    """As one that cannot be published; no error takes its place, since storage may be back tomorrow."""
    payloads = FakePayloads()
    payloads.always = PayloadError("payload_unavailable", "403")
    pipeline = Pipeline(FakeBackend(LARGE), publisher=FakePublisher(limit=1_500), payloads=payloads, lease_s=600.0)
    assert await pipeline.handle() is Settlement.NACK
    assert pipeline.answers == []
    assert 590 < loop_time() <= 600
    assert pipeline.count("deliveries_total", "nack", "publish_failed") == 1


@virtual_time
async def test_metadata_that_no_message_can_carry_is_left_out_of_a_stored_answer() -> None:
    """The object is there all the same; the small error says that no message could name it."""
    payloads = FakePayloads()
    pipeline = Pipeline(publisher=FakePublisher(limit=700), payloads=payloads)
    large = Reply(status_code=200, body=b'"%s"' % (b"x" * 1000), metadata=b'{"k":"%s"}' % (b"x" * 1000))
    published = await pipeline.replier.publish(_delivery(), large)
    assert published is not None
    assert published.error_class == "reply_too_large"
    assert payloads.written == ["m"]


@virtual_time
async def test_a_digest_of_the_request_is_never_copied_to_the_answer() -> None:
    """A consumer must be able to rely on it."""
    pipeline = Pipeline(payloads=FakePayloads(), copy_attributes=("*",))
    await pipeline.handle(message(attributes={"body_sha256": "0" * 64, "k": "v"}))
    assert pipeline.answer.attributes["k"] == "v"
    assert "body_sha256" not in pipeline.answer.attributes


@virtual_time
async def test_a_small_error_that_fails_for_a_moment_is_tried_again() -> None:
    """What replaced the answer is published as stubbornly as the answer."""
    failures = [MessageTooLargeError("large"), PublishRetryableError("away"), PublishRefusedError("gone")]
    pipeline = Pipeline(publisher=FakePublisher(*failures))
    published = await pipeline.replier.publish(_delivery(), REPLY)
    assert published is not None
    assert published.error_class == "reply_too_large"


@virtual_time
async def test_a_topic_that_calls_every_answer_invalid_pauses_the_intake() -> None:
    """A schema of the topic: the answers are kept, none is generated again, and all are out once it is gone."""
    pipeline = Pipeline()
    pipeline.publisher.always = MessageRejectedError("INVALID_ARGUMENT: schema")
    handling = [pipeline.start(message(attempt=1)) for _ in range(20)]
    await asyncio.sleep(600)
    assert pipeline.intake.reasons == ("publish",)
    assert len(pipeline.backend.requests) == 20
    late = pipeline.start(message(attempt=1))
    await asyncio.sleep(1)
    assert len(pipeline.backend.requests) == 20
    pipeline.publisher.always = None
    assert await asyncio.gather(*handling, late) == [Settlement.ACK] * 21
    assert len(pipeline.backend.requests) == 21
    assert {answer.json["status_code"] for answer in pipeline.answers} == {200}
    assert pipeline.intake.reasons == ()


@virtual_time
async def test_an_answer_that_alone_is_called_invalid_is_replaced() -> None:
    """Others are published meanwhile, so that the topic is good: a small error that says so takes its place."""
    pipeline = Pipeline(publisher=Picky(b"poison"))
    refused = asyncio.ensure_future(pipeline.replier.publish(_delivery(), POISON))
    await settle()
    assert pipeline.intake.reasons == ()
    assert await pipeline.replier.publish(_delivery(), REPLY) is REPLY
    published = await refused
    assert published is not None
    assert (published.error_class, published.status_code) == ("reply_refused", 502)
    assert pipeline.publisher.published[-1].json["metadata"] == {"k": 1}
    assert pipeline.count("publish_failures_total", "too_large") == 0


@virtual_time
async def test_answers_that_are_called_invalid_end_once_more_others_are_published() -> None:
    """Two that are refused pause the intake; a trial each minute lets others show that the topic is good."""
    pipeline = Pipeline(publisher=Picky(b"poison"))
    refused = [asyncio.ensure_future(pipeline.replier.publish(_delivery(), POISON)) for _ in range(2)]
    await asyncio.sleep(1)
    assert pipeline.intake.reasons == ("publish",)
    others = [pipeline.start(message(attempt=1)) for _ in range(3)]
    await asyncio.sleep(TRIAL_EVERY_S / 2)
    assert not pipeline.backend.requests
    assert await asyncio.gather(*others) == [Settlement.ACK] * 3
    assert [reply and reply.error_class for reply in await asyncio.gather(*refused)] == ["reply_refused"] * 2
    assert pipeline.intake.reasons == ()
    assert loop_time() < 2 * TRIAL_EVERY_S


@virtual_time
async def test_an_answer_is_kept_where_nothing_else_is_published() -> None:
    """It may be the topic: neither a small error nor a nack before the lease ends."""
    pipeline = Pipeline(lease_s=300.0)
    pipeline.publisher.always = MessageRejectedError("schema")
    assert await pipeline.replier.publish(_delivery(), REPLY) is None
    assert loop_time() > 280


@virtual_time
async def test_a_small_error_that_is_called_invalid_too_is_given_up() -> None:
    """When not even the smallest error is taken, while others are, the message is nacked."""
    pipeline = Pipeline(publisher=Picky(b'"k"', b"reply_refused"))
    refused = asyncio.ensure_future(pipeline.replier.publish(_delivery(), POISON))
    await settle()
    other = Reply(status_code=200, body=b"{}", metadata=b"{}")
    assert await pipeline.replier.publish(_delivery(), other) is other
    assert await refused is None
    assert len(pipeline.publisher.published) == 1


@virtual_time
async def test_attributes_name_everything_that_is_known() -> None:
    """Absent means unknown: nothing is invented."""
    pipeline, delivery = Pipeline(), _delivery()
    assert pipeline.replier.attributes(delivery, REPLY) == {"request_message_id": "m", "status_code": "200"}
    delivery.message = ReceivedMessage(message_id="m", data=b"", delivery_attempt=3)
    delivery.backend, delivery.result = "vllm", AttemptResult(backend_request_id="r")
    reply = Reply(status_code=503, body=b"{}", error_class="aborted", truncated=True)
    assert pipeline.replier.attributes(delivery, reply) == {
        "request_message_id": "m",
        "status_code": "503",
        "error_class": "aborted",
        "truncated": "true",
        "delivery_attempt": "3",
        "backend": "vllm",
        "backend_request_id": "r",
    }


@pytest.mark.parametrize("patterns", [(), ("team", "x-*")])
def test_only_chosen_attributes_are_copied(patterns: tuple[str, ...]) -> None:
    """The request's attributes come along by pattern; without one none does."""

    @virtual_time
    async def run() -> None:
        pipeline = Pipeline(copy_attributes=patterns)
        attributes = pipeline.replier.attributes(_delivery(team="t", secret="s", **{"x-a": "1"}), REPLY)
        copied = {"team": "t", "x-a": "1"} if patterns else {}
        assert attributes == {"request_message_id": "m", "status_code": "200", **copied}

    run()


@virtual_time
async def test_a_request_cannot_put_words_into_the_answers_mouth() -> None:
    """What the worker says of an answer is never taken from the request, also where the worker says nothing."""
    pipeline = Pipeline(copy_attributes=("*",))
    forged = {"error_class": "auth", "truncated": "true", "request_message_id": "other", "backend": "b", "own": "1"}
    attributes = pipeline.replier.attributes(_delivery(**forged), REPLY)
    assert attributes == {"request_message_id": "m", "status_code": "200", "own": "1"}


@virtual_time
async def test_a_hundred_copied_attributes_leave_room_for_the_answers_own() -> None:
    """The broker takes a hundred: what is left out are copies."""
    pipeline = Pipeline(copy_attributes=("*",))
    attributes = pipeline.replier.attributes(_delivery(**{f"a{n}": "v" for n in range(100)}), REPLY)
    assert len(attributes) == 100
    assert attributes["request_message_id"] == "m"
    assert attributes["status_code"] == "200"
