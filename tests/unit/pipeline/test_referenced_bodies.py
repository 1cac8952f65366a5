"""Requests whose bodies are objects: when they are fetched, what each failure costs, and how much memory they take."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.fakes import REFUSED, Answer, FakeBackend, FakePayloads, status
from tests.support.pipeline import METADATA, Pipeline, message, referring
from tests.support.virtual_time import EPOCH, loop_time, settle, virtual_time
from worker.errors import AdmissionClosedError, PayloadError, PublishRefusedError
from worker.pipeline.referenced_bodies import ByteRoom
from worker.policy.engine import ErrorPolicy
from worker.policy.model import Fault
from worker.policy.rules.load import parse_rules
from worker.ports import BackendRequest, Settlement
from worker.settings.schema import DedupeSettings, RouteMatch

ACK, NACK = Settlement.ACK, Settlement.NACK
AWAY = PayloadError(Fault.PAYLOAD_UNAVAILABLE, "503")
RAW = b'{"model":"m", "x":[ 1.0, 12345678901234567890 ]}'


def body_of(size: int) -> bytes:
    """A body of exactly so many bytes."""
    frame = b'{"model":"m","x":"%s"}'
    return frame % (b"x" * (size - len(frame) + 2))


@virtual_time
async def test_the_object_is_the_body_byte_for_byte() -> None:
    """Its model decides about the route; the answer is an ordinary one."""
    backend = FakeBackend(name="second")
    pipeline = Pipeline(
        FakeBackend(name="first"),
        backend,
        matches=[RouteMatch(models=["other"]), RouteMatch(models=["m"])],
        payloads=FakePayloads(a=RAW),
    )
    assert await pipeline.handle(message(referring("gs://b/a"))) is ACK
    assert backend.requests[0].body.data == RAW
    assert pipeline.answer.json["status_code"] == 200
    assert pipeline.answer.json["metadata"] == METADATA
    assert pipeline.count("payload_bytes_total", "read") == len(RAW)
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_a_message_with_its_own_body_asks_no_storage() -> None:
    """The usual case."""
    payloads = FakePayloads()
    pipeline = Pipeline(payloads=payloads)
    await pipeline.handle()
    assert payloads.opened == []


@pytest.mark.parametrize(
    ("pipeline_has", "uri", "attributes", "word"),
    [
        (None, "gs://b/a", {}, "body_uri is not accepted by this worker"),
        ({}, "gs://c/a", {}, "body_uri is not below a prefix"),
        ({}, "gs://b/a", {"body_sha256": "0" * 63}, "attribute body_sha256 must be 64 hex digits"),
        ({}, "gs://b/a", {"body_sha256": "g" * 64}, "attribute body_sha256 must be 64 hex digits"),
        ({"a": b"[1]"}, "gs://b/a", {}, "body_uri must name a JSON object"),
        ({"a": b""}, "gs://b/a", {}, "body_uri must name a JSON object"),
        ({"a": b'{"a":NaN}'}, "gs://b/a", {}, "body_uri must name a JSON object"),
        ({"a": b'{"a":"\xff"}'}, "gs://b/a", {}, "body_uri must name a JSON object"),
        ({"a": b'{"a":1} {}'}, "gs://b/a", {}, "body_uri must name a JSON object"),
        ({"a": b"\x1f\x8b\x08"}, "gs://b/a", {}, "body_uri must name a JSON object"),
    ],
)
def test_what_is_no_request_is_answered_once_with_a_400(
    pipeline_has: dict[str, bytes] | None, uri: str, attributes: dict[str, str], word: str
) -> None:
    """It says what is wrong, and the metadata comes back."""

    @virtual_time
    async def run() -> None:
        payloads = None if pipeline_has is None else FakePayloads(**pipeline_has)
        pipeline = Pipeline(payloads=payloads)
        assert await pipeline.handle(message(referring(uri), attributes=attributes)) is ACK
        assert pipeline.answer.error["code"] == "bad_message"
        assert word in pipeline.answer.error["message"]
        assert pipeline.answer.error["param"] == "body_uri"
        assert pipeline.answer.json["metadata"] == METADATA
        assert pipeline.backend.requests == []
        pipeline.assert_nothing_leaks()

    run()


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault.PAYLOAD_NOT_FOUND, 404),
        (Fault.PAYLOAD_TOO_LARGE, 413),
        (Fault.PAYLOAD_REFUSED, 403),
    ],
)
def test_what_no_second_try_can_mend_is_answered_at_once(fault: Fault, code: int) -> None:
    """One well-formed error, of a class of its own, with the words of the storage."""

    @virtual_time
    async def run() -> None:
        payloads = FakePayloads(a=RAW)
        payloads.failures.append(PayloadError(fault, "It has 7 bytes."))
        pipeline = Pipeline(payloads=payloads)
        assert await pipeline.handle(message(referring("gs://b/a"))) is ACK
        error = pipeline.answer.error
        assert (pipeline.answer.json["status_code"], error["code"], error["type"]) == (code, fault, "worker_error")
        assert (error["retryable"], error["backend"], error["attempts"]) == (False, None, 0)
        assert "It has 7 bytes." in error["message"]
        assert pipeline.answer.attributes["error_class"] == fault
        assert "backend" not in pipeline.answer.attributes
        assert pipeline.backend.requests == []
        assert pipeline.count("payload_bytes_total", "read") == 0
        pipeline.assert_nothing_leaks()

    run()


@virtual_time
async def test_the_digest_is_checked_where_it_is_given() -> None:
    """In capitals too; a body that was changed is not sent."""
    pipeline = Pipeline(payloads=FakePayloads(a=RAW))
    good = hashlib.sha256(RAW).hexdigest().upper()
    await pipeline.handle(message(referring("gs://b/a"), attributes={"body_sha256": good}))
    await pipeline.handle(message(referring("gs://b/a"), attributes={"body_sha256": "0" * 64}))
    assert [answer.json["status_code"] for answer in pipeline.answers] == [200, 409]
    assert pipeline.answers[1].error["code"] == "payload_mismatch"
    assert len(pipeline.backend.requests) == 1
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_storage_that_is_away_costs_no_delivery_attempt(logs: list[Any]) -> None:
    """The message is held, and its body fetched again until it comes; nothing of that is in the answer."""
    payloads = FakePayloads(a=RAW)
    payloads.failures.extend([AWAY] * 8)
    pipeline = Pipeline(payloads=payloads)
    assert await pipeline.handle(message(referring("gs://b/a"), attempt=5)) is ACK
    assert pipeline.answer.json["status_code"] == 200
    assert len(payloads.opened) == 9
    held = [line for line in logs if line["event"] == "fetch_held"]
    assert len(held) == 8
    assert held[0]["error_class"] == "payload_unavailable"
    assert "503" in held[0]["error"]
    (line,) = [line for line in logs if line["event"] == "delivery_answered"]
    assert "error_class" not in line
    assert line["held_s"] == pytest.approx(loop_time(), abs=0.01)
    assert pipeline.circuit.state == "closed"


@virtual_time
async def test_what_failed_before_has_no_part_in_a_later_failure() -> None:
    """Neither its attempts nor its error."""
    payloads = FakePayloads(a=RAW)
    payloads.failures.extend([AWAY] * 3)
    pipeline = Pipeline(FakeBackend(then=status(500)), payloads=payloads)
    assert await pipeline.handle(message(referring("gs://b/a"), attempt=5)) is ACK
    assert pipeline.answer.json["status_code"] == 500
    assert pipeline.answer.attributes["error_class"] == "server_error"
    assert len(pipeline.backend.requests) == 1


@virtual_time
async def test_storage_that_stays_away_ends_with_the_lease() -> None:
    """Then it is nacked, and on its last delivery attempt answered with an error that is retryable."""
    for attempt, expected in ((1, NACK), (5, ACK)):
        payloads = FakePayloads(a=RAW)
        payloads.always = AWAY
        pipeline = Pipeline(payloads=payloads, lease_s=600.0, dead_letters=True)
        began = loop_time()
        assert await pipeline.handle(message(referring("gs://b/a"), attempt=attempt)) is expected
        assert 530 < loop_time() - began <= 600
        if expected is ACK:
            assert (pipeline.answer.json["status_code"], pipeline.answer.error["retryable"]) == (503, True)
            assert pipeline.answer.error["code"] == "payload_unavailable"
            assert len(pipeline.dead_topic.published) == 1
        else:
            assert pipeline.count("deliveries_total", "nack", "payload_unavailable") == 1


@virtual_time
async def test_a_deadline_ends_a_fetch() -> None:
    """One that hangs, and one that is held; the answer names the last error."""
    payloads = FakePayloads(a=RAW)
    payloads.seconds = 3_600
    pipeline = Pipeline(payloads=payloads)
    assert await pipeline.handle(message(referring("gs://b/a", deadline=EPOCH + 20))) is ACK
    assert pipeline.answer.error["code"] == "deadline_exceeded"
    assert 20 <= loop_time() < 21
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_a_drain_waits_for_no_storage() -> None:
    """What is held is nacked at once, and what comes later is not fetched."""
    payloads = FakePayloads(a=RAW)
    payloads.always = AWAY
    pipeline = Pipeline(payloads=payloads)
    held = pipeline.start(message(referring("gs://b/a"), attempt=1))
    await settle()
    pipeline.processor.begin_drain()
    assert await held is NACK
    fetched = len(payloads.opened)
    assert await pipeline.handle(message(referring("gs://b/a"), attempt=1)) is NACK
    assert len(payloads.opened) == fetched
    assert loop_time() < 2
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_a_cancelled_fetch_is_nacked_and_keeps_nothing() -> None:
    """The grace of a drain is over."""
    payloads = FakePayloads(a=RAW)
    payloads.seconds = 3_600
    pipeline = Pipeline(payloads=payloads)
    running = pipeline.start(message(referring("gs://b/a"), attempt=1))
    await settle()
    running.cancel()
    assert await running is NACK
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_an_object_that_does_not_keep_its_promise_is_fetched_again() -> None:
    """It came short, or longer than storage said: it was changed meanwhile, or the connection broke."""

    class Broken(FakePayloads):
        async def _chunks(self, body: bytes) -> AsyncIterator[bytes]:
            for part in ([body[:-1]], [body, b"x"], [body])[len(self.opened) - 1]:
                yield part

    payloads = Broken(a=RAW)
    pipeline = Pipeline(payloads=payloads)
    assert await pipeline.handle(message(referring("gs://b/a"))) is ACK
    assert len(payloads.opened) == 3
    assert pipeline.backend.requests[0].body.data == RAW
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_memory_for_bodies_is_bounded_and_given_in_turn() -> None:
    """Two of three bodies fit; the third is fetched once one of them has its verdict, and never more is kept."""
    payloads = FakePayloads(**{str(n): body_of(400) for n in range(3)})
    backend = FakeBackend()
    backend.hold()
    pipeline = Pipeline(backend, payloads=payloads, max_payload_bytes=1_000)
    running = [pipeline.start(message(referring(f"gs://b/{n}"))) for n in range(3)]
    await settle()
    assert backend.running == 2
    assert pipeline.count("payload_memory_bytes") == 800
    backend.let_go()
    assert await asyncio.gather(*running) == [ACK] * 3
    assert backend.peak == 2
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_a_body_larger_than_all_the_memory_goes_alone() -> None:
    """`payloads.max_bytes` is checked elsewhere; nothing waits for what can never be."""
    pipeline = Pipeline(payloads=FakePayloads(a=body_of(2_000)), max_payload_bytes=1_000)
    assert await pipeline.handle(message(referring("gs://b/a"))) is ACK
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_the_memory_is_free_while_an_answer_waits_to_be_published() -> None:
    """The body is not needed any more; the topic may be gone for hours."""
    payloads = FakePayloads(a=RAW)
    pipeline = Pipeline(payloads=payloads)
    pipeline.publisher.always = PublishRefusedError("gone")
    running = pipeline.start(message(referring("gs://b/a")))
    await settle()
    assert len(pipeline.backend.requests) == 1
    assert pipeline.count("payload_memory_bytes") == 0
    pipeline.publisher.always = None
    assert await running is ACK


@virtual_time
async def test_what_waits_for_memory_is_nacked_by_a_drain() -> None:
    """At once, while what has its memory may finish."""
    payloads = FakePayloads(a=body_of(900), b=body_of(900))
    backend = FakeBackend()
    backend.hold()
    pipeline = Pipeline(backend, payloads=payloads, max_payload_bytes=1_000)
    first = pipeline.start(message(referring("gs://b/a"), attempt=1))
    await settle()
    second = pipeline.start(message(referring("gs://b/b"), attempt=1))
    await settle()
    pipeline.processor.begin_drain()
    assert await second is NACK
    backend.let_go()
    assert await first is ACK
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_held_by_the_backend_its_body_is_kept_and_not_fetched_again() -> None:
    """An outage of the backend asks nothing of storage."""
    payloads = FakePayloads(a=RAW)
    pipeline = Pipeline(FakeBackend(REFUSED, REFUSED, REFUSED), payloads=payloads)
    assert await pipeline.handle(message(referring("gs://b/a"))) is ACK
    assert len(payloads.opened) == 1
    assert len(pipeline.backend.requests) == 4


@virtual_time
async def test_a_redelivery_of_what_was_answered_fetches_nothing() -> None:
    """By its message, and by the requester's key where the object is the same."""
    payloads = FakePayloads(a=RAW, b=RAW)
    pipeline = Pipeline(payloads=payloads, dedupe=DedupeSettings(metadata_key="id"))
    first = message(referring("gs://b/a"))
    assert await pipeline.handle(first) is ACK
    assert await pipeline.handle(first) is ACK
    assert await pipeline.handle(message(referring("gs://b/a"))) is ACK
    assert len(payloads.opened) == len(pipeline.answers) == 1
    assert await pipeline.handle(message(referring("gs://b/b"))) is ACK
    assert pipeline.answers[1].error["code"] == "idempotency_conflict"


@virtual_time
async def test_an_operators_rule_has_the_last_word() -> None:
    """Here: what is refused is a role that an operator will grant."""
    policy = ErrorPolicy(parse_rules([{"name": "wait", "match": {"class": "payload_refused"}, "do": "hold"}]))
    payloads = FakePayloads(a=RAW)
    payloads.failures.extend([PayloadError(Fault.PAYLOAD_REFUSED, "403")] * 3)
    pipeline = Pipeline(payloads=payloads, policy=policy)
    assert await pipeline.handle(message(referring("gs://b/a"))) is ACK
    assert pipeline.answer.json["status_code"] == 200


@virtual_time
async def test_the_memory_is_that_of_the_backends_retries() -> None:
    """A failing request releases exactly what it took, whatever its end."""
    payloads = FakePayloads(a=RAW)

    def crash(_: BackendRequest) -> Answer:
        return Answer(error=RuntimeError("adapter"))

    pipeline = Pipeline(FakeBackend(then=crash), payloads=payloads)
    assert await pipeline.handle(message(referring("gs://b/a"), attempt=1)) is NACK
    pipeline.assert_nothing_leaks()


class TestByteRoom:
    """A number of bytes, first come, first served."""

    def room(self, capacity: int = 10) -> tuple[ByteRoom, list[int]]:
        taken: list[int] = []
        return ByteRoom(capacity, taken.append), taken

    @virtual_time
    async def test_a_small_one_does_not_overtake(self) -> None:
        """Else a large one might wait for ever."""
        room, _ = self.room()
        assert room.try_take(6)
        large = asyncio.ensure_future(room.take(8))
        await settle()
        assert not room.try_take(1)
        small = asyncio.ensure_future(room.take(1))
        await settle()
        assert not small.done()
        room.give_back(6)
        await asyncio.gather(large, small)

    @virtual_time
    async def test_one_that_gives_up_lets_the_next_in(self) -> None:
        """It takes nothing, also if its turn comes in the same moment."""
        room, taken = self.room()
        assert room.try_take(6)
        large, small = asyncio.ensure_future(room.take(8)), asyncio.ensure_future(room.take(4))
        await settle()
        large.cancel()
        await small
        assert taken[-1] == 10
        room.give_back(4)
        late = asyncio.ensure_future(room.take(8))
        await settle()
        room.give_back(6)
        late.cancel()
        await asyncio.gather(large, late, return_exceptions=True)
        assert late.cancelled()
        assert taken[-1] == 0

    @virtual_time
    async def test_closed_it_refuses_what_waits(self) -> None:
        """And what comes; bytes that are taken can still be given back."""
        room, taken = self.room()
        assert room.try_take(10)
        waiting = asyncio.ensure_future(room.take(1))
        await settle()
        room.close()
        room.close()
        for take in (waiting, room.take(1)):
            with pytest.raises(AdmissionClosedError):
                await take
        room.give_back(10)
        assert taken[-1] == 0
