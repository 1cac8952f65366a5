"""Which requests are streamed, and how they are asked for it."""

import json
import tracemalloc
from typing import Any

import pytest

from worker.backends.request.stream import (
    DIFFERENT_IN_STREAMS,
    UNARY_FEATURES,
    Form,
    build_call,
    choices_of,
    wanted_form,
)
from worker.settings.conflicts import find_conflicts
from worker.settings.schema import Settings
from worker.wire.body import RequestBody
from worker.wire.endpoints import CHAT as CHAT_API
from worker.wire.endpoints import COMPLETIONS, endpoint_of
from worker.wire.endpoints import RESPONSES as RESPONSES_API

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
ON, OFF = {"stream": True}, {"stream": False}
USAGE = {"include_usage": True}


def body_of(body: dict[str, Any]) -> RequestBody:
    return RequestBody(json.dumps(body).encode())


def form(mode: Any, body: dict[str, Any], path: str = CHAT) -> Form:
    return wanted_form(mode, endpoint_of(path), body_of(body))


def asked(path: str, body: dict[str, Any], form: Form) -> dict[str, Any]:
    """What stands in the request that is sent."""
    return json.loads(build_call(endpoint_of(path), body_of(body), form).body)


@pytest.mark.parametrize(
    ("mode", "body", "streamed"),
    [
        ("auto", {}, True),
        ("auto", OFF, True),
        ("auto", ON, True),
        ("auto", {"n": 1}, True),
        ("auto", {"n": None}, True),
        ("auto", {"n": 2}, False),
        ("auto", {"n": 2, **ON}, False),
        ("always", {"n": 2}, True),
        ("always", OFF, True),
        ("never", {}, False),
        ("never", ON, False),
        ("as_requested", {}, False),
        ("as_requested", OFF, False),
        ("as_requested", ON, True),
        ("as_requested", {"stream": "true"}, False),
    ],
)
def test_the_setting_and_the_request_decide_together(mode: str, body: dict[str, Any], streamed: bool) -> None:
    """Only `as_requested` looks at what the request says; the other values are the operator's decision."""
    assert (form(mode, body) is not Form.UNARY) is streamed


@pytest.mark.parametrize("mode", ["auto", "always"])
@pytest.mark.parametrize("feature", UNARY_FEATURES)
def test_what_servers_refuse_to_stream_is_asked_for_as_a_whole(mode: str, feature: str) -> None:
    """`"stream": true` in the request is no reason to stream it all the same; only `as_requested` follows it."""
    assert form(mode, {feature: 1}) is Form.UNARY
    assert form(mode, {feature: 1, **ON}) is Form.UNARY
    assert form(mode, {feature: None}) is Form.STREAM_WITH_USAGE
    assert form("as_requested", {feature: 1, **ON}) is Form.STREAM_WITH_USAGE


@pytest.mark.parametrize("feature", DIFFERENT_IN_STREAMS)
def test_auto_does_not_stream_what_streams_answer_differently(feature: str) -> None:
    """Tool calls and log probabilities come out of many servers' streams with parts missing."""
    assert form("auto", {feature: ["x"]}) is Form.UNARY
    assert form("auto", {feature: []}) is Form.STREAM_WITH_USAGE
    assert form("always", {feature: ["x"]}) is Form.STREAM_WITH_USAGE


def test_what_cannot_be_assembled_is_not_streamed() -> None:
    """Other paths, and bodies that are no objects."""
    assert form("always", ON, "/v1/embeddings") is Form.UNARY
    assert wanted_form("always", CHAT_API, RequestBody(b"[]")) is Form.UNARY


@pytest.mark.parametrize(
    ("prompt", "choices"),
    [("a", 1), (["a", "b"], 2), ([[1, 2], [3]], 2), ([1, 2, 3], 1), ([], 1), (None, 1), ({}, 1)],
)
def test_prompts_multiply_the_choices_of_completions(prompt: Any, choices: int) -> None:
    """A list of prompts has an answer each; a list of tokens is one prompt."""
    body = body_of({"prompt": prompt, "n": 3})
    assert choices_of(COMPLETIONS, body) == 3 * choices
    assert choices_of(CHAT_API, body) == 3
    assert choices_of(RESPONSES_API, body) == 1


@pytest.mark.parametrize("n", [None, True, 0, -1, "2", 1.5, 1])
def test_a_number_of_choices_that_makes_no_sense_is_one(n: Any) -> None:
    """The server will say what is wrong with it."""
    assert choices_of(CHAT_API, body_of({"n": n})) == choices_of(CHAT_API, body_of({})) == 1


@pytest.mark.parametrize(
    ("body", "sent"),
    [
        ({}, {**ON, "stream_options": USAGE}),
        (OFF, {**ON, "stream_options": USAGE}),
        (ON, {**ON, "stream_options": USAGE}),
        ({**ON, "stream_options": None}, {**ON, "stream_options": USAGE}),
        ({**ON, "stream_options": {"x": 1, "include_usage": False}}, {**ON, "stream_options": {"x": 1, **USAGE}}),
        ({"stream_options": {"x": 1}}, {**ON, "stream_options": {"x": 1, **USAGE}}),
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_stream_with_usage_is_asked_for(path: str, body: dict[str, Any], sent: dict[str, Any]) -> None:
    """`stream` and `stream_options.include_usage` are set, other options stay."""
    assert asked(path, {"model": "m", **body}, Form.STREAM_WITH_USAGE) == {"model": "m", **sent}


def test_a_request_that_says_so_already_is_sent_as_it_is() -> None:
    """Not a byte differs."""
    data = b'{ "stream" : true, "stream_options":{"include_usage": true} ,"n":1.0}'
    assert build_call(CHAT_API, RequestBody(data), Form.STREAM_WITH_USAGE).body is data


def test_without_usage_the_options_go() -> None:
    """A server that does not know `stream_options` gets none; those of the Responses API are about other things."""
    body = {"stream_options": {"include_obfuscation": False}}
    assert asked(CHAT, body, Form.STREAM) == ON
    assert asked(RESPONSES, body, Form.STREAM) == {**ON, **body}


@pytest.mark.parametrize("path", [CHAT, "/v1/images/generations"])
def test_a_stream_that_is_not_wanted_is_not_asked_for(path: str) -> None:
    """`stream: true` would bring events where nothing reads them; what does not ask for them is left alone."""
    assert asked(path, {"a": 1, **ON, "stream_options": USAGE}, Form.UNARY) == {"a": 1}
    assert asked(path, {"a": 1, **OFF}, Form.UNARY) == {"a": 1, **OFF}


@pytest.mark.parametrize(
    "body",
    [
        {"stream": "yes"},
        {"stream": 1},
        {"stream": []},
        {"stream_options": USAGE},
        {"stream_options": {}, **OFF},
        {"stream_options": USAGE, "stream": None},
        {"stream_options": "x", **ON},
        {"stream_options": {"include_usage": "yes"}, **ON},
    ],
)
@pytest.mark.parametrize("mode", ["auto", "always", "never", "as_requested"])
def test_what_servers_refuse_reaches_them_as_it_is(mode: Any, body: dict[str, Any]) -> None:
    """The requester gets the server's refusal, not an answer to another request."""
    assert form(mode, body) is Form.UNARY
    data = json.dumps(body).encode()
    assert build_call(CHAT_API, RequestBody(data), Form.UNARY).body is data


@pytest.mark.parametrize("key", ["logprobs", "top_logprobs"])
def test_zero_log_probabilities_are_log_probabilities(key: str) -> None:
    """A completion tells that of each token then."""
    assert form("auto", {key: 0}, TEXT) is Form.UNARY
    assert form("auto", {key: None}, TEXT) is form("auto", {key: False}, TEXT) is Form.STREAM_WITH_USAGE


@pytest.mark.parametrize("key", ["n", "prompt", "tools", "response_format", "max_tokens", "stream_options", "else"])
def test_no_objects_are_built_of_what_a_requester_sends(key: str) -> None:
    """Millions of empty lists are bytes."""
    data = b'{"%s": [%s[]]}' % (key.encode(), b"[]," * 2_000_000)
    tracemalloc.start()
    try:
        for mode in ("auto", "as_requested", "always"):
            body = RequestBody(data)
            chosen = wanted_form(mode, COMPLETIONS, body)
            build_call(COMPLETIONS, body, chosen).new_accumulator()
        assert tracemalloc.get_traced_memory()[1] < 5 * len(data)
    finally:
        tracemalloc.stop()


def test_continuation_without_streams_is_refused_at_start() -> None:
    """Nothing could ever be continued: the settings say so instead of doing nothing."""
    pubsub = {"request_subscription": "s", "response_topic": "t"}
    for stream, faults in [("never", 1), ("auto", 0), ("as_requested", 0)]:
        backend = {"base_url": "http://b", "stream": stream, "continuation": "vllm"}
        found = find_conflicts(Settings.model_validate({"pubsub": pubsub, "backend": backend}))
        assert len(found) == faults
        assert all(fault.startswith("backend.continuation: ") for fault in found)
