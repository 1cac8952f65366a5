"""One delivery from bytes to settlement: what is promised whatever happens on the way."""

from typing import Any

import msgspec
import pytest

from tests.support.fakes import GOOD_BODY, REFUSED, Answer, FakeBackend, FakePublisher, status
from tests.support.pipeline import METADATA, Pipeline, data, message
from tests.support.virtual_time import settle, unix_time, virtual_time
from worker.pipeline.attempt import attempt_id
from worker.pipeline.routes import RouteMatch
from worker.policy.model import Decision, ErrorEvent
from worker.ports import Settlement
from worker.settings.schema import RequestSettings

ACK, NACK = Settlement.ACK, Settlement.NACK


@virtual_time
async def test_publish_is_confirmed_before_ack() -> None:
    """While the broker has not confirmed the answer the delivery is not settled."""
    pipeline = Pipeline()
    pipeline.publisher.hold()
    handling = pipeline.start()
    await settle()
    assert pipeline.publisher.attempts == 1
    assert not handling.done()
    pipeline.publisher.let_go()
    assert await handling is ACK
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_answer_is_the_backends_bytes_with_the_metadata() -> None:
    """The backend gets the body and the requester the answer byte for byte; the metadata comes back as it was."""
    raw = b'{"path":"/v1/chat/completions","metadata": {"n":1e2, "id":12345678901234567890} ,"body":{"model":"m", "x":[ ]}}'
    pipeline = Pipeline()
    assert await pipeline.handle(message(raw)) is ACK
    assert pipeline.backend.requests[0].body.data == b'{"model":"m", "x":[ ]}'
    expected = b'{"status_code":200,"metadata":{"n":1e2, "id":12345678901234567890},"body":' + GOOD_BODY + b"}"
    assert pipeline.answer.data == expected


@virtual_time
async def test_answer_carries_its_attributes() -> None:
    """An answer names its request, its status, the route and the backend's own id; no error class when it is good."""
    pipeline = Pipeline(FakeBackend(Answer(headers={"x-request-id": "b-7"})))
    await pipeline.handle(message(message_id="m-1", attempt=2))
    assert pipeline.answer.attributes == {
        "request_message_id": "m-1",
        "status_code": "200",
        "delivery_attempt": "2",
        "backend": "fake",
        "backend_request_id": "b-7",
    }


@pytest.mark.parametrize(
    ("payload", "word"),
    [
        (b"", "no data"),
        (b"not json", "not JSON"),
        (b"[1]", "JSON object"),
        (b"\xff\xfe", "UTF-8"),
        (b'{"path":"/v1/completions","body":{"a":NaN},"metadata":{"k":1}}', "not JSON"),
        (data(path="/admin"), "not allowed"),
        (data(path="/v1/../admin"), "'..'"),
        (data(headers={"x-user": "7"}), "'x-user'"),
        (msgspec.json.encode({"path": "/v1/completions", "body_uri": "gs://b/o"}), "body_uri"),
    ],
)
def test_what_is_no_request_is_answered_once_with_a_400(payload: bytes, word: str) -> None:
    """Bad input never reaches a backend, is never retried, and says what is wrong."""

    @virtual_time
    async def run() -> None:
        pipeline = Pipeline()
        assert await pipeline.handle(message(payload)) is ACK
        assert pipeline.answer.json["status_code"] == 400
        assert word in pipeline.answer.error["message"]
        assert pipeline.answer.attributes["error_class"] == pipeline.answer.error["code"] == "bad_message"
        assert pipeline.backend.requests == []

    run()


@virtual_time
async def test_a_refused_request_gets_its_metadata_back() -> None:
    """The requester must know which request was refused."""
    pipeline = Pipeline()
    await pipeline.handle(message(data(path="/admin")))
    assert pipeline.answer.json["metadata"] == METADATA


@virtual_time
async def test_a_request_that_no_route_takes_is_answered_404() -> None:
    """A model nobody serves is an answer of that class, in the attribute and in the body alike."""
    pipeline = Pipeline(FakeBackend(), matches=[RouteMatch(models=["other-*"])])
    assert await pipeline.handle() is ACK
    assert pipeline.answer.json["status_code"] == 404
    assert pipeline.answer.attributes["error_class"] == pipeline.answer.error["code"] == "model_not_found"
    assert "'m'" in pipeline.answer.error["message"]


@virtual_time
async def test_routes_are_tried_in_order() -> None:
    """A request goes to the first route that takes its model."""
    first, second = FakeBackend(name="first"), FakeBackend(name="second")
    pipeline = Pipeline(first, second, matches=[RouteMatch(models=["x"]), RouteMatch()])
    await pipeline.handle()
    assert (len(first.requests), len(second.requests)) == (0, 1)
    assert pipeline.answer.attributes["backend"] == "second"


@virtual_time
async def test_only_allowed_headers_reach_the_backend_and_each_attempt_has_its_id() -> None:
    """A header on the list goes along; the request id tells message, delivery and try apart."""
    pipeline = Pipeline(FakeBackend(REFUSED), request=RequestSettings(allowed_headers=["x-tenant"]))
    payload = data(headers={"X-Tenant": "t"})
    assert await pipeline.handle(message(payload, message_id="m", attempt=3)) is ACK
    assert [dict(request.headers) for request in pipeline.backend.requests] == [
        {"x-tenant": "t", "x-request-id": attempt_id("m", 3, 1)},
        {"x-tenant": "t", "x-request-id": attempt_id("m", 3, 2)},
    ]


# Failures.


@virtual_time
async def test_a_failed_server_is_a_nack_and_nothing_is_published() -> None:
    """A 500 among successes may be the message's fault: it goes back and costs one attempt."""
    pipeline = Pipeline(FakeBackend(status(500)))
    assert await pipeline.handle(message(attempt=1)) is NACK
    assert pipeline.answers == []
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_the_last_delivery_attempt_is_answered() -> None:
    """Where a nack would be dead-lettered silently the requester gets the error, with the number of attempts."""
    pipeline = Pipeline(FakeBackend(then=status(500, b'{"error":{"message":"cuda","type":"x","code":1}}')))
    assert await pipeline.handle(message(attempt=5)) is ACK
    assert pipeline.answer.json["status_code"] == 500
    assert pipeline.answer.attributes["error_class"] == "server_error"
    assert pipeline.answer.json["metadata"] == METADATA


@virtual_time
async def test_without_counting_the_age_ends_the_retries() -> None:
    """A try that fails on a message older than the limit is answered."""
    pipeline = Pipeline(FakeBackend(then=status(500)), max_message_age_s=3600.0, max_delivery_attempts=None)
    assert await pipeline.handle(message()) is NACK
    assert await pipeline.handle(message(publish_time=unix_time() - 3601)) is ACK
    assert pipeline.answer.json["status_code"] == 500


class _Broken:
    """Stands for a part with a bug."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.routes = ()

    def find(self, *_: object) -> object:
        raise self.error


@virtual_time
async def test_an_exception_nobody_foresaw_is_written_down_and_nacked(logs: list[Any]) -> None:
    """A bug ends in a traceback, a count and a nack; it does not end the puller."""
    pipeline = Pipeline(router=_Broken(ZeroDivisionError("bug")))
    assert await pipeline.handle(message(attempt=1)) is NACK
    assert [line for line in logs if line["event"] == "internal_error" and line["exc_info"]]
    assert pipeline.count("internal_errors_total") == 1
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_an_exception_nobody_foresaw_is_answered_on_the_last_attempt() -> None:
    """The last attempt answers a 500 that says nothing of the inside."""
    pipeline = Pipeline(router=_Broken(ZeroDivisionError("secret inside")))
    assert await pipeline.handle(message(attempt=5)) is ACK
    assert pipeline.answer.attributes["error_class"] == "internal_error"
    assert b"secret" not in pipeline.answer.data


@virtual_time
async def test_an_exception_before_the_first_try_ends_with_the_messages_age() -> None:
    """Where nothing counts attempts a bug that hits every delivery must not send a message round for ever."""
    pipeline = Pipeline(router=_Broken(KeyError("bug")), max_message_age_s=60.0, max_delivery_attempts=None)
    assert await pipeline.handle(message(publish_time=unix_time() - 61)) is ACK
    assert pipeline.answer.json["status_code"] == 500


@virtual_time
async def test_an_adapter_that_raises_gives_its_slot_back() -> None:
    """A bug in the HTTP adapter is an internal error of one message."""
    pipeline = Pipeline(FakeBackend(Answer(error=RuntimeError("bug"))))
    assert await pipeline.handle(message(attempt=1)) is NACK
    assert pipeline.count("internal_errors_total") == 1
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_a_policy_that_raises_gives_its_slot_back() -> None:
    """So is one in a rule."""

    class Policy:
        def decide(self, event: ErrorEvent, **_: int) -> Decision:
            raise RuntimeError("bug")

    pipeline = Pipeline(policy=Policy())
    assert await pipeline.handle(message(attempt=1)) is NACK
    pipeline.assert_nothing_leaks()


@virtual_time
async def test_what_fails_after_the_answer_is_out_still_acks() -> None:
    """A nack now would have it answered twice."""

    class Store:
        async def get(self, *_: str) -> str:
            return "miss"

        async def put(self, *_: str) -> None:
            raise RuntimeError("bug")

    pipeline = Pipeline(store=Store())
    assert await pipeline.handle() is ACK
    assert len(pipeline.answers) == 1
    assert pipeline.count("internal_errors_total") == 1


@virtual_time
async def test_a_publisher_that_raises_what_it_must_not_is_a_nack() -> None:
    """A bug below the publish is a traceback and a nack like any other."""
    pipeline = Pipeline(publisher=FakePublisher(TypeError("bug")))
    assert await pipeline.handle() is NACK
    assert pipeline.count("internal_errors_total") == 1
    pipeline.assert_nothing_leaks()
