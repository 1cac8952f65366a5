"""The backend for SageMaker's endpoints against a simulated one: both operations, every field, every fault."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.attempts import CHAT, HELLO, Ended, attempt
from tests.support.aws_tokens import token_service, use_keys, use_web_identity
from tests.support.event_stream import exception, frame, part, parts
from tests.support.random_bodies import canon
from tests.support.raw_http import Connection, RawServer, always, answer, raw_server
from worker.backends.sagemaker import SageMakerBackend, as_object
from worker.emulators.openai import SimBackend, SimOptions
from worker.emulators.openai.options import EXAMPLE_KEY
from worker.policy.model import Phase
from worker.settings.schema import RouteSettings
from worker.wire.sagemaker import MAX_REQUEST_BYTES, public_address

KEY_ID, SECRET = EXAMPLE_KEY.split(":")
STREAM = {**HELLO, "stream": True}
Open = Callable[..., SageMakerBackend]


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_keys(monkeypatch, tmp_path, KEY_ID, SECRET)


@pytest.fixture
async def sim() -> AsyncIterator[SimBackend]:
    """A simulated endpoint with two variants."""
    async with SimBackend(SimOptions.of(sagemaker=True, variants="blue,green", endpoints="ep")) as backend:
        yield backend


@pytest.fixture
async def open_backend() -> AsyncIterator[Open]:
    """A factory of backends, closed at the end of the test."""
    opened: list[SageMakerBackend] = []

    def build(base_url: str, sagemaker: dict[str, Any] | None = None, **route: Any) -> SageMakerBackend:
        section = {"endpoint": "ep", **(sagemaker or {})}
        settings = {"name": "r", "base_url": base_url, "timeouts": {"total_s": 20}, "sagemaker": section, **route}
        backend = SageMakerBackend(RouteSettings.model_validate(settings))
        opened.append(backend)
        return backend

    yield build
    for backend in opened:
        await backend.aclose()
        await backend.aclose()


# Answers


async def test_an_answer_as_a_whole_and_as_a_stream(sim: SimBackend, open_backend: Open) -> None:
    """Both operations give the same body; whether it was streamed, and which variant answered, is known."""
    backend = open_backend(sim.base_url)
    whole, streamed = await attempt(backend), await attempt(backend, body=STREAM)
    assert canon(whole.body) == canon(streamed.body)
    assert (whole.result.streamed, streamed.result.streamed) == (False, True)
    assert streamed.result.first_token_at is not None
    assert {whole.result.variant, streamed.result.variant} <= {"blue", "green"}
    assert whole.result.attributes["sagemaker_content_type"] == "application/json"
    assert streamed.result.attributes["sagemaker_content_type"] == "text/event-stream"
    assert (await attempt(backend, "/v1/completions", {"model": "m", "prompt": "p"})).body["choices"]
    assert (await attempt(backend, "/v1/embeddings", {"model": "m", "input": "p"})).body["data"]
    assert set(sim.snapshot()["by_path"]) == {"/endpoints/ep/invocations", "/endpoints/ep/invocations-response-stream"}


async def test_a_whole_answer_in_frames(sim: SimBackend, open_backend: Open) -> None:
    """For answers that take longer than SageMaker waits for one in one piece."""
    backend = open_backend(sim.base_url, {"response_stream": True})
    ended = await attempt(backend)
    assert ended.body["choices"]
    assert not ended.result.streamed
    assert list(sim.snapshot()["by_path"]) == ["/endpoints/ep/invocations-response-stream"]


@pytest.mark.parametrize("size", [1, 7, 37, 1000])
async def test_parts_of_any_size(size: int, sim: SimBackend, open_backend: Open) -> None:
    """Frames do not begin where events do."""
    backend = open_backend(sim.base_url)
    plain = await attempt(backend, body=STREAM)
    sim._controls.apply({"mode": "frames", "part_bytes": size})
    assert canon((await attempt(backend, body=STREAM)).body) == canon(plain.body)


@pytest.mark.parametrize(("stream", "is_streamed"), [("auto", True), ("always", True), ("never", False)])
async def test_the_routes_mode_of_streaming(
    stream: str, is_streamed: bool, sim: SimBackend, open_backend: Open
) -> None:
    """As for any other server."""
    backend = open_backend(sim.base_url, stream=stream)
    ended = await attempt(backend)
    assert ended.body["usage"]["completion_tokens"] > 0
    assert ended.result.streamed is is_streamed is backend.streams(CHAT, _body(HELLO))


def _body(value: Any) -> Any:
    from worker.wire.body import RequestBody

    return RequestBody(json.dumps(value).encode())


# Fields


FIELDS = {
    "custom_attributes": "{metadata.a};k={metadata.n}  v",
    "target_variant": "green",
    "target_container_hostname": "second",
    "inference_component_name": "part-1",
    "session_id": "session-{message_id}",
    "inference_id": "{message_id} {attempt_id}",
    "prefix_aware_id": "{model}",
}
SENT = {
    "x-amzn-sagemaker-custom-attributes": "a b;k=12  v",
    "x-amzn-sagemaker-target-variant": "green",
    "x-amzn-sagemaker-target-container-hostname": "second",
    "x-amzn-sagemaker-inference-component": "part-1",
    "x-amzn-sagemaker-session-id": "session-17",
    "x-amzn-sagemaker-inference-id": "17 try-1",
    "x-amzn-sagemaker-prefix-aware-id": "m",
}
REQUEST = {
    "message_id": "17",
    "metadata": b'{"a":"a b","n":12}',
    "headers": {"x-request-id": "try-1", "traceparent": "t"},
}


def headers_of(server: RawServer, number: int = -1) -> dict[str, str]:
    lines = server.requests[number][0].decode().rstrip().split("\r\n")[1:]
    return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}


async def test_every_field_stands_in_its_header(open_backend: Open) -> None:
    """Rendered for each request; nothing that SageMaker would drop is sent, and everything that counts is signed."""
    async with raw_server(always(answer(b"{}"))) as server:
        backend = open_backend(server.url, {**FIELDS, "target_model": "m.tar.gz", "enable_explanations": "true"})
        await attempt(backend, **REQUEST)
    headers = headers_of(server)
    sent = {name: value for name, value in headers.items() if name.startswith("x-amzn")}
    whole = {"x-amzn-sagemaker-target-model": "m.tar.gz", "x-amzn-sagemaker-enable-explanations": "true"}
    assert sent == {**SENT, **whole}
    assert (headers["content-type"], headers["accept"]) == ("application/json", "application/json")
    assert server.requests[0][0].startswith(b"POST /endpoints/ep/invocations HTTP/1.1\r\n")
    signed = headers["authorization"].partition("SignedHeaders=")[2].partition(",")[0].split(";")
    assert set(signed) == {*sent, "accept", "content-type", "host", "x-amz-date"}
    assert not headers.keys() & {"x-request-id", "traceparent"}


async def test_the_fields_of_a_streamed_request(open_backend: Open) -> None:
    """`Accept` has a header of its own there."""
    async with raw_server(always(answer(b"{}"))) as server:
        await attempt(open_backend(server.url, FIELDS), body=STREAM, **REQUEST)
    headers = headers_of(server, 0)
    sent = {name: value for name, value in headers.items() if name.startswith("x-amzn")}
    assert sent == {**SENT, "x-amzn-sagemaker-accept": "text/event-stream"}


@pytest.mark.parametrize("name", ["target_model", "enable_explanations"])
async def test_what_sagemaker_does_not_stream_is_asked_for_as_a_whole(name: str, open_backend: Open) -> None:
    """Also where the body asks for a stream, from the settings as from a message."""
    header = "x-amzn-sagemaker-" + name.replace("_", "-")
    async with raw_server(always(answer(b"{}"))) as server:
        backend = open_backend(server.url, {name: "x"})
        assert not backend.streams(CHAT, _body(STREAM))
        await attempt(backend, body=STREAM)
        backend = open_backend(server.url, {"message_fields": [name], "response_stream": True})
        await attempt(backend, body=STREAM, headers={header: "x"})
    for head, body in server.requests:
        assert head.startswith(b"POST /endpoints/ep/invocations HTTP")
        assert f"{header}: x".encode() in head
        assert json.loads(body) == HELLO


async def test_a_message_sets_what_it_may(open_backend: Open) -> None:
    """Its field wins over the setting's; one that the operator did not allow is refused before anything is sent."""
    headers = {"x-amzn-sagemaker-target-variant": "blue"}
    async with raw_server(always(answer(b"{}"))) as server:
        backend = open_backend(server.url, {"target_variant": "green", "message_fields": ["target_variant"]})
        await attempt(backend, headers=headers)
        refused = await attempt(open_backend(server.url, {"target_variant": "green"}), headers=headers)
    assert headers_of(server)["x-amzn-sagemaker-target-variant"] == "blue"
    assert len(server.requests) == 1
    assert (refused.error_class, refused.decision.disposition, refused.reply[0]) == ("invalid_request", "reply", 400)


async def test_variants_are_compared_by_their_weights(sim: SimBackend, open_backend: Open) -> None:
    """A message has the same variant in every attempt; many messages divide as the weights say."""
    backend = open_backend(sim.base_url, {"variants": {"blue": 3, "green": 1}})
    chosen = [(await attempt(backend, message_id=str(number))).result.variant for number in range(200)]
    again = [(await attempt(backend, message_id=str(number))).result.variant for number in range(20)]
    assert again == chosen[:20]
    assert 130 <= chosen.count("blue") <= 170
    assert chosen.count("blue") + chosen.count("green") == 200


@pytest.mark.parametrize(
    ("sagemaker", "metadata"),
    [
        ({"custom_attributes": "{metadata.a}"}, {"a": "x" * 1025}),
        ({"custom_attributes": "{metadata.a}"}, {"a": "line\nbreak"}),
        ({"custom_attributes": "{metadata.a}"}, {"a": "é"}),
        ({"custom_attributes": "{metadata.a}"}, {"a": " a"}),
        ({"custom_attributes": "{metadata.a}"}, {"a": "a\r\nx-evil: 1"}),
        ({"target_variant": "{metadata.a}"}, {"a": "a/b"}),
        ({"session_id": "{metadata.a}"}, {"a": "-"}),
        ({"inference_id": "{metadata.a}"}, {"a": "x" * 65}),
    ],
)
async def test_a_field_that_cannot_be_sent_as_it_is(
    sagemaker: dict[str, Any], metadata: dict[str, str], open_backend: Open
) -> None:
    """Is the requester's fault, told with the name of the field and without its value; nothing is sent."""
    async with raw_server(always(answer(b"{}"))) as server:
        ended = await attempt(open_backend(server.url, sagemaker), metadata=json.dumps(metadata).encode())
    assert (ended.error_class, ended.result.phase, server.requests) == ("invalid_request", Phase.PREPARE, [])
    status, body = ended.reply
    assert status == 400
    assert next(iter(sagemaker)) in body["error"]["message"]
    assert metadata["a"] not in body["error"]["message"] or len(metadata["a"]) < 3
    assert body["error"]["type"] == "worker_error"
    assert not body["error"]["retryable"]


async def test_a_body_over_the_limit(sim: SimBackend, open_backend: Open) -> None:
    """The largest that SageMaker takes is sent; one byte more is answered 413 without being sent."""
    backend = open_backend(sim.base_url, {"answers": "json"})
    rest = len(json.dumps({**HELLO, "pad": ""}))
    for size, error_class in ((MAX_REQUEST_BYTES, ""), (MAX_REQUEST_BYTES + 1, "invalid_request")):
        ended = await attempt(backend, body={**HELLO, "pad": "x" * (size - rest)})
        assert ended.error_class == error_class
    status, body = ended.reply
    assert (status, sim.snapshot()["requests"]) == (413, 1)
    assert (
        body["error"]["message"] == f"The body has {MAX_REQUEST_BYTES + 1} bytes; SageMaker takes {MAX_REQUEST_BYTES}."
    )


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"model": "m", "prompt": "p"}),
        (CHAT, {"model": "m", "messages": None}),
        ("/v1/completions", {"model": "m", "prompt": "p", "messages": []}),
        ("/v1/embeddings", {"model": "m", "input": "p", "prompt": "p"}),
        ("/v1/responses", {"model": "m", "input": "p"}),
    ],
)
async def test_a_body_that_a_container_would_take_for_another_api(
    path: str, body: dict[str, Any], sim: SimBackend, open_backend: Open
) -> None:
    """SageMaker passes on no path, so the two must agree."""
    ended = await attempt(open_backend(sim.base_url), path, body)
    assert (ended.error_class, ended.reply[0], sim.snapshot()["requests"]) == ("invalid_request", 400, 0)


# What a container answers that knows no OpenAI


@pytest.mark.parametrize(
    ("kind", "body", "expected"),
    [
        ("json", b'{"a": 1}', b'{"a": 1}'),
        ("json", b"[[0.5, 1e3]]\n", b'{"output":[[0.5, 1e3]]}'),
        ("json", b'"text"', b'{"output":"text"}'),
        ("json", b'{"t":1}\n{"t":2}\n\n', b'{"output":[{"t":1},{"t":2}]}'),
        ("json", b"no JSON", b"no JSON"),
        ("json", b"[NaN]", b"[NaN]"),
        ("json", b"", b""),
        ("text", "hé\n".encode(), '{"output":"hé\\n"}'.encode()),
        ("text", b"data: x\n\n", b'{"output":"data: x\\n\\n"}'),
    ],
)
async def test_json_and_text_become_the_body_of_a_reply(
    kind: str, body: bytes, expected: bytes, open_backend: Open
) -> None:
    """In one piece, and put together from frames of any size."""
    assert as_object(body, kind) == expected
    async with raw_server(always(answer(body))) as server:
        whole = await attempt(open_backend(server.url, {"answers": kind}), "/invocations", b'{"x":1}')
    assert whole.result.body == expected
    for size in (1, 3, 1000):
        ended = await _framed(open_backend, parts(body, size), kind=kind)
        assert ended.result.body == expected
        assert ended.error_class == ("malformed" if not expected.startswith(b"{") else "")


async def test_a_body_for_another_container_is_left_alone(open_backend: Open) -> None:
    """Whatever a `stream` in it means there; if it asks for a stream, the answer may come as one."""
    body = b'{ "inputs": "x","stream":true , "parameters":{"n":1}}'
    async with raw_server(always(answer(b'{"a":1}\n{"a":2}'))) as server:
        ended = await attempt(open_backend(server.url, {"answers": "json"}, stream="never"), "/invocations", body)
    ((head, sent),) = server.requests
    assert sent == body
    assert head.startswith(b"POST /endpoints/ep/invocations-response-stream HTTP")
    assert b"x-amzn-sagemaker-accept: text/event-stream" in head
    assert ended.body == {"output": [{"a": 1}, {"a": 2}]}


async def test_text_that_is_no_text(open_backend: Open) -> None:
    """An image, say."""
    assert (await _framed(open_backend, parts(b"\x89PNG\xff", 3), kind="text")).error_class == "stream_broken"


# What breaks


HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.amazon.eventstream\r\nX-Amzn-SageMaker-Content-Type: %b\r\n"
    b"x-amzn-RequestId: r-1\r\nTransfer-Encoding: chunked\r\n\r\n"
)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


async def _framed(open_backend: Open, frames: bytes, **more: Any) -> Ended:
    """Make an attempt whose answer is these frames."""
    (ended,) = await _each_framed(open_backend, [frames], **more)
    return ended


async def _each_framed(
    open_backend: Open, cases: Sequence[bytes], *, kind: str = "openai", ends: bytes = b"0\r\n\r\n", **route: Any
) -> list[Ended]:
    """Make an attempt for each of some answers in frames; nothing is learned from one for the next."""
    label = b"text/event-stream" if kind == "openai" else b"application/json"
    left = list(cases)

    async def script(connection: Connection) -> None:
        await connection.read_request()
        await connection.send(HEAD % label + chunk(left[0]) + ends)

    async with raw_server(script) as server:
        sagemaker = {"answers": kind, "response_stream": True}
        path, body = (CHAT, STREAM) if kind == "openai" else ("/invocations", {"x": 1})
        backend, ended = open_backend(server.url, sagemaker, **{"stream": "always", **route}), []
        while left:
            ended.append(await attempt(backend, path, body))
            del left[0]
    return ended


def event(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return b"data: " + json.dumps({"id": "c", "choices": [choice]}).encode() + b"\n\n"


EVENTS = event("Hel") + event("lo") + event("", "stop") + b"data: [DONE]\n\n"
TEXTS = ("", "Hel", "Hello")


def partial_text(ended: Ended) -> str:
    partial = ended.reply[1].get("partial")
    return "" if partial is None else partial["choices"][0]["message"]["content"]


async def test_an_end_at_every_byte_of_the_frames(open_backend: Open) -> None:
    """Clean for HTTP, which boto3 takes for a whole answer: each is a broken stream with what had come, or whole."""
    frames = parts(EVENTS, 20)
    seen = []
    ends = range(len(frames) + 1)
    for end, ended in zip(ends, await _each_framed(open_backend, [frames[:end] for end in ends]), strict=True):
        if ended.error_class == "":
            seen.append(ended.body["choices"][0]["message"]["content"])
            continue
        assert ended.error_class == "stream_broken", end
        assert ended.decision.disposition == "nack"
        status, body = ended.reply
        seen.append(partial_text(ended))
        assert status == 502
        assert body.get("truncated", False) is (seen[-1] != "")
    assert seen == sorted(seen, key=len)
    assert set(seen) == set(TEXTS)
    assert ended.body["choices"][0]["message"]["content"] == "Hello"


async def test_a_flipped_bit_at_every_byte_of_a_frame(open_backend: Open) -> None:
    """No wrong text ever gets through: what came before that frame is kept."""
    first, spoilt, rest = part(event("Hel")), part(event("lo")), part(event("", "stop") + b"data: [DONE]\n\n")
    bad = [spoilt[:at] + bytes((spoilt[at] ^ 1,)) + spoilt[at + 1 :] for at in range(len(spoilt))]
    for at, ended in enumerate(await _each_framed(open_backend, [first + each + rest for each in bad])):
        assert (ended.error_class, partial_text(ended)) == ("stream_broken", "Hel"), at


FAULTS = {
    "model takes too long": (
        exception("ModelStreamError", ErrorCode="ModelInvocationTimeExceeded", Message="too long"),
        ("model_time_exceeded", "reply", 504),
    ),
    "model's stream broke": (
        exception("ModelStreamError", ErrorCode="StreamBroken", Message="gone"),
        ("stream_broken", "nack", 502),
    ),
    "service's stream broke": (exception("InternalStreamFailure", Message="x"), ("stream_broken", "nack", 502)),
    "an error message": (
        frame({":message-type": "error", ":error-code": "InternalFailure", ":error-message": "x"}),
        ("stream_broken", "nack", 502),
    ),
    "an unknown exception": (exception("SomethingNew", Message="x"), ("stream_broken", "nack", 502)),
}


@pytest.mark.parametrize(("fault", "expected"), FAULTS.values(), ids=FAULTS)
async def test_an_error_at_every_place_of_a_stream(
    fault: bytes, expected: tuple[str, str, int], open_backend: Open
) -> None:
    """Its class, with the text that had come; behind a whole answer it spoils nothing."""
    whole = parts(EVENTS, 20)
    size = len(part(b"x" * 20))
    cases = [whole[: size * count] + fault for count in range(len(EVENTS) // 20 + 1)]
    for count, ended in enumerate(await _each_framed(open_backend, cases)):
        came = EVENTS[: 20 * count]
        if event("", "stop") in came:
            assert ended.body["choices"][0]["message"]["content"] == "Hello"
            continue
        assert (ended.error_class, ended.decision.disposition.value, ended.reply[0]) == expected
        expected_text = "Hello" if event("lo") in came else "Hel" if event("Hel") in came else ""
        assert partial_text(ended) == expected_text


@pytest.mark.parametrize("fault", ["bad_crc", "cut_frame", "model_stream_error", "internal_stream_failure"])
@pytest.mark.parametrize("after", [0, 500])
async def test_what_breaks_the_frames_is_not_about_the_form(
    fault: str, after: int, sim: SimBackend, open_backend: Open
) -> None:
    """So no whole answer is asked for in the same attempt, though the first stream of this endpoint broke."""
    await sim.control({"mode": "frames", "break": fault, "after_bytes": after})
    ended = await attempt(open_backend(sim.base_url, stream="auto"))
    assert ended.error_class in {"stream_broken", "model_time_exceeded"}
    assert sim.snapshot()["requests"] == 1


@pytest.mark.parametrize("ends", [b"", b"zz\r\n"], ids=["cut", "illegal"])
async def test_a_connection_that_breaks_within_the_frames(ends: bytes, open_backend: Open) -> None:
    """Of HTTP, below the frames."""
    ended = await _framed(open_backend, part(event("Hel")), ends=ends)
    assert (ended.error_class, partial_text(ended)) == ("stream_broken", "Hel")


async def test_silence_within_the_frames(open_backend: Open) -> None:
    """Frames without payload are no sign of life."""

    async def script(connection: Connection) -> None:
        await connection.read_request()
        await connection.send(HEAD % b"text/event-stream" + chunk(part(event("Hel"))))
        while True:
            await connection.send(chunk(part(b"")))
            await asyncio.sleep(0)

    async with raw_server(script) as server:
        backend = open_backend(server.url, timeouts={"idle_s": 0.2, "total_s": 20})
        ended = await attempt(backend, body=STREAM)
    assert (ended.error_class, partial_text(ended)) == ("stream_idle", "Hel")


@pytest.mark.parametrize("kind", ["json", "text"])
async def test_json_and_text_that_break_keep_what_came(kind: str, open_backend: Open) -> None:
    """As text, since a half of JSON is nothing else."""
    for ends in (part(b'[1, "t')[:-3], part(b'[1, "t') + FAULTS["model takes too long"][0]):
        ended = await _framed(open_backend, part(b'{"a":') + ends, kind=kind)
        assert ended.error_class in {"stream_broken", "model_time_exceeded"}
        status, body = ended.reply
        assert status in {502, 504}
        assert body["partial"]["output"].startswith('{"a":')
        assert body["truncated"] is True


# Errors


ERRORS = {
    "ThrottlingException": ("rate_limited", "hold", 429),
    "ModelNotReadyException": ("not_ready", "hold", 503),
    "ServiceUnavailable": ("overloaded", "hold", 503),
    "InternalFailure": ("server_error", "nack", 500),
    "InternalDependencyException": ("server_error", "nack", 530),
    "ValidationError": ("invalid_request", "reply", 400),
    "AccessDeniedException": ("auth", "hold", 502),
    "ExpiredTokenException": ("auth", "hold", 502),
    "UnrecognizedClientException": ("auth", "hold", 502),
    "InvalidSignatureException": ("auth", "hold", 502),
}


@pytest.mark.parametrize("stream", ["as_requested", "auto"])
@pytest.mark.parametrize(("name", "expected"), ERRORS.items())
async def test_an_error_of_the_service(
    name: str, expected: tuple[str, str, int], stream: str, sim: SimBackend, open_backend: Open
) -> None:
    """Each in its class, asked once: the service's errors are not about the form of the answer."""
    backend = open_backend(sim.base_url, stream=stream)
    await sim.control({"mode": "sagemaker_error", "error": name})
    for body in (HELLO, STREAM):
        await sim.reset(["stats"])
        ended = await attempt(backend, body=body)
        assert (ended.error_class, ended.decision.disposition.value, ended.reply[0]) == expected
        assert sim.snapshot()["requests"] == 1
        assert ended.result.backend_request_id


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, ("invalid_request", "reply", 400)),
        (404, ("invalid_request", "reply", 404)),
        (422, ("invalid_request", "reply", 422)),
        (429, ("rate_limited", "hold", 429)),
        (500, ("server_error", "nack", 500)),
        (503, ("overloaded", "hold", 503)),
        (0, ("server_error", "nack", 424)),
    ],
)
async def test_a_containers_error_by_its_own_status(
    status: int, expected: tuple[str, str, int], sim: SimBackend, open_backend: Open
) -> None:
    """What `ModelError` has inside is judged as if no service were around it."""
    fault = {"mode": "sagemaker_error", "error": "ModelError", "original_status": status, "original_message": "oops"}
    await sim.control(fault)
    ended = await attempt(open_backend(sim.base_url))
    assert (ended.error_class, ended.decision.disposition.value, ended.reply[0]) == expected


async def test_a_container_that_refuses_streams(sim: SimBackend, open_backend: Open) -> None:
    """Is asked for the whole answer, in the same attempt, as without SageMaker."""
    refusal = json.dumps({"error": {"message": "stream is not supported", "type": "BadRequestError", "code": 400}})
    fault = {"mode": "sagemaker_error", "error": "ModelError", "original_status": 400, "original_message": refusal}
    await sim.control({**fault, "match": {"stream": True}})
    ended = await attempt(open_backend(sim.base_url, stream="auto"))
    assert ended.body["choices"]
    assert not ended.result.streamed
    assert sim.snapshot()["requests"] == 2


async def test_an_endpoint_that_does_not_exist(sim: SimBackend, open_backend: Open) -> None:
    """Is the class that operators may hold."""
    ended = await attempt(open_backend(sim.base_url, {"endpoint": "other"}))
    assert (ended.error_class, ended.reply[0]) == ("model_not_found", 404)


# Credentials and the clock


async def test_a_wrong_secret(
    sim: SimBackend, open_backend: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The worker's fault: held, nothing of it in the answer; noticed once another one is there."""
    use_keys(monkeypatch, tmp_path, KEY_ID, "wrong-secret-of-mine")
    backend = open_backend(sim.base_url)
    ended = await attempt(backend)
    assert (ended.error_class, ended.decision.disposition) == ("auth", "hold")
    assert "signature" not in json.dumps(ended.reply[1])
    assert not backend.credentials_changed()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    backend._identity._next_load = 0.0  # as if the last look were a while ago
    assert not backend.credentials_changed()
    await backend._identity.aclose()
    assert backend.credentials_changed()
    assert (await attempt(backend)).body["choices"]
    assert not backend.credentials_changed()


async def test_no_credentials(open_backend: Open, monkeypatch: pytest.MonkeyPatch, sim: SimBackend) -> None:
    """Nothing is sent."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    ended = await attempt(open_backend(sim.base_url))
    assert (ended.error_class, ended.decision.disposition, ended.decision.breaker) == ("auth", "hold", "trip")
    assert sim.snapshot()["requests"] == 0


@pytest.mark.parametrize("skew_s", [-4000, 4000])
async def test_a_clock_that_is_wrong(skew_s: int, open_backend: Open, logs: list[Any]) -> None:
    """Costs one request, not a held message: the attempt is signed again by the service's time."""
    async with SimBackend(SimOptions.of(sagemaker=True, clock_skew_s=skew_s)) as sim:
        backend = open_backend(sim.base_url)
        for body in (HELLO, STREAM, HELLO):
            assert (await attempt(backend, body=body)).body["choices"]
        assert sim.snapshot()["by_status"] == {"403": 1, "200": 3}
    assert [line["event"] for line in logs if line["event"] == "clock_corrected"] == ["clock_corrected"]


async def test_temporary_credentials_never_reach_an_answer(
    open_backend: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """AWS repeats what was signed in its errors, the session's token with it."""

    async def echo(connection: Connection) -> None:
        head, _ = await connection.read_request()
        text = json.dumps({"message": head.decode()}).encode()
        await connection.send(answer(text, f"X-Echo: {head.decode().splitlines()[-2]}", status="400 Bad Request"))

    with token_service() as tokens:
        tokens.key = ("ASIAEXAMPLEEXAMPLE00", "the-secret-key", "the+session/token==")
        use_web_identity(monkeypatch, tmp_path, tokens)
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        async with raw_server(echo) as server:
            ended = await attempt(open_backend(server.url))
    assert "x-amz-security-token: the+session/token==" in server.requests[0][0].decode()
    everything = repr((ended.result.headers, ended.result.body, ended.reply))
    for secret in tokens.key:
        assert secret not in everything


async def test_every_attempt_is_signed_anew(sim: SimBackend, open_backend: Open) -> None:
    """Many at once on many connections, all accepted."""
    backend = open_backend(sim.base_url)
    ended = await asyncio.gather(*(attempt(backend, message_id=str(number)) for number in range(64)))
    assert {each.error_class for each in ended} == {""}
    assert sim.snapshot()["by_status"] == {"200": 64}


async def test_a_model_server_that_is_away(open_backend: Open) -> None:
    """As any other."""
    ended = await attempt(open_backend("http://127.0.0.1:9"))
    assert (ended.error_class, ended.decision.disposition) == ("connect", "hold")


@pytest.mark.parametrize(
    ("region", "address"),
    [
        ("eu-west-1", "https://runtime.sagemaker.eu-west-1.amazonaws.com"),
        ("cn-north-1", "https://runtime.sagemaker.cn-north-1.amazonaws.com.cn"),
    ],
)
def test_the_services_address(region: str, address: str, open_backend: Open) -> None:
    """Where none is set."""
    assert public_address(region) == address
    backend = SageMakerBackend(
        RouteSettings.model_validate({"name": "r", "sagemaker": {"endpoint": "e", "region": region}})
    )
    assert backend._origin == address
