"""The simulated SageMaker, without a server: paths, errors, frames and what breaks them."""

import json

import pytest

from tests.support import event_stream
from worker.backends.streams.eventstream import FrameReader, Part, ServiceError
from worker.emulators.openai.options import SimOptions, as_json
from worker.emulators.openai.sagemaker import (
    ERRORS,
    FrameBreak,
    FrameFault,
    Framer,
    Invocation,
    ServiceRefusalError,
    check_invocation,
    frame,
    invocation_of,
    model_error,
    path_of,
    variant_of,
)
from worker.errors import BackendError
from worker.policy.normalise import normalise
from worker.wire.sagemaker import MAX_REQUEST_BYTES

EP = Invocation("ep", is_streamed=False)
EP_STREAM = Invocation("ep", is_streamed=True)


def test_the_paths_of_the_operations() -> None:
    """Nothing else is SageMaker's."""
    assert invocation_of("/endpoints/ep/invocations") == EP
    assert invocation_of("/endpoints/ep/invocations-response-stream") == EP_STREAM
    for path in ("/endpoints/ep", "/endpoints//invocations", "/v1/chat/completions", "/endpoints/a/b/invocations"):
        assert invocation_of(path) is None


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"messages": [], "prompt": "p"}, "/v1/chat/completions"),
        ({"prompt": "p", "input": "i"}, "/v1/completions"),
        ({"input": "i"}, "/v1/embeddings"),
        ({"inputs": "i"}, "/invocations"),
    ],
)
def test_the_container_is_asked_by_the_body(body: dict[str, object], path: str) -> None:
    """In vLLM's order."""
    assert path_of(body) == path


def test_frames_are_those_of_the_tests_own_encoder() -> None:
    """Two encoders that share nothing write the same."""
    headers = {":message-type": "event", ":event-type": "PayloadPart"}
    assert frame(headers, b"x") == event_stream.frame(headers, b"x")


@pytest.mark.parametrize("break_", FrameBreak)
@pytest.mark.parametrize("after", [0, 1, 10, 25])
def test_a_break_comes_after_so_many_bytes(break_: FrameBreak, after: int) -> None:
    """With exactly the payload before it, and nothing behind it."""
    framer = Framer(FrameFault(break_=break_, after_bytes=after, part_bytes=4))
    data = framer.feed(b"0123456789") + framer.feed(b"abcdefghij") + framer.feed(b"ABCDEFGHIJ")
    reader, came, error = FrameReader(), b"", None
    try:
        for item in reader.feed(data):
            if isinstance(item, Part):
                came += item.payload
            else:
                error = item
        reader.close()
    except BackendError:
        assert break_ in {FrameBreak.BAD_CRC, FrameBreak.CUT_FRAME}
    whole = b"0123456789abcdefghijABCDEFGHIJ"
    assert came == (whole if break_ is FrameBreak.NONE else whole[:after])
    assert framer.is_over is (break_ is not FrameBreak.NONE)
    names = {
        FrameBreak.MODEL_STREAM_ERROR: "ModelStreamError",
        FrameBreak.INTERNAL_STREAM_FAILURE: "InternalStreamFailure",
    }
    if break_ in names:
        assert isinstance(error, ServiceError)
        assert error.name == names[break_]


def test_a_model_error_has_the_containers_own_inside() -> None:
    """Where the normaliser finds it."""
    answer = model_error(503, b'{"error":{"message":"busy","type":"ServiceUnavailableError"}}', "blue")
    facts = normalise(answer.status, {name.lower(): value for name, value in answer.headers.items()}, answer.body)
    assert (answer.status, facts.status, facts.message, facts.wrapped) == (424, 503, "busy", ("sagemaker",))


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_has_its_name_in_the_header(name: str) -> None:
    """As AWS writes it, with a URL behind."""
    answer = ServiceRefusalError(name).answer()
    assert answer.status == ERRORS[name][0]
    assert answer.headers["x-amzn-errortype"].startswith(f"{name}:http")
    assert json.loads(answer.body)["Message"]


@pytest.mark.parametrize(
    ("headers", "size", "invocation", "name"),
    [
        ({}, MAX_REQUEST_BYTES + 1, EP, "RequestEntityTooLargeException"),
        ({"x-amzn-sagemaker-custom-attributes": "x" * 1025}, 1, EP, "ValidationError"),
        ({"x-amzn-sagemaker-target-variant": "a b"}, 1, EP, "ValidationError"),
        ({"x-amzn-sagemaker-target-model": "m"}, 1, EP_STREAM, "ValidationError"),
        ({"x-amzn-sagemaker-accept": " "}, 1, EP_STREAM, "ValidationError"),
        ({}, 1, Invocation("other", is_streamed=False), "ValidationError"),
    ],
)
def test_what_the_service_refuses(headers: dict[str, str], size: int, invocation: Invocation, name: str) -> None:
    """Before the container sees it."""
    with pytest.raises(ServiceRefusalError) as caught:
        check_invocation(invocation, headers, size, ("ep",))
    assert caught.value.name == name


def test_what_the_service_passes_on() -> None:
    """The largest body, every field."""
    check_invocation(EP, {"x-amzn-sagemaker-target-model": "m"}, MAX_REQUEST_BYTES, ())
    check_invocation(EP_STREAM, {"x-amzn-sagemaker-inference-id": "a b"}, 0, ("x", "ep"))


def test_the_variant_that_answers() -> None:
    """The one that is asked for, or one by the body, always the same."""
    header = "x-amzn-sagemaker-target-variant"
    assert variant_of({header: "b"}, ("a", "b"), 0) == "b"
    assert {variant_of({}, ("a", "b"), key) for key in range(10)} == {"a", "b"}
    with pytest.raises(ServiceRefusalError, match="Variant c"):
        variant_of({header: "c"}, ("a", "b"), 0)


def test_the_key_is_never_shown() -> None:
    """Neither in the state nor in an error."""
    options = SimOptions.of(aws_key="AKIA1:the-secret:the-token")
    assert as_json(options)["aws_key"] == "AKIA1:********"
    assert "the-secret" not in repr(options)
    with pytest.raises(ValueError, match="ID:SECRET") as caught:
        SimOptions.of(aws_key="the-secret")
    assert "the-secret" not in str(caught.value)
