"""One answer, one line, in the shape of its request."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.client.io.lines import Refusal, Shape
from worker.client.io.outputs import batch_line, decode_answer, local_answer, message_line, output_line
from worker.wire.message import encode_response

texts = st.text(st.characters(codec="utf-8"), max_size=10)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(texts, json_values, max_size=3)


def envelope(code, *, backend, message="It failed.", **more):
    error = {"message": message, "type": "backend_error", "param": None, "code": code, "backend": backend}
    return {"error": {**error, "attempts": 2, "retryable": True}, **more}


def an_answer(status=200, body=None, attributes=None, **more):
    data = encode_response(status, b"{}", json.dumps({} if body is None else body).encode())
    return decode_answer(data, {**(attributes or {}), **more})


def a_batch_output(answer):
    line = batch_line("line-1-00000000", b'"a"', answer)
    assert line.endswith(b"\n")
    return json.loads(line)


@settings(max_examples=40)
@given(objects, objects, objects, st.booleans(), st.integers(100, 599))
def test_message_line_keeps_every_byte(metadata, body, stats, ascii_only, status):
    """Metadata, body and stats stand in the line exactly as in the answer."""
    raw = [json.dumps(value, ensure_ascii=ascii_only).encode() for value in (metadata, body, stats)]
    answer = decode_answer(encode_response(status, raw[0], raw[1], stats=raw[2]), {})
    line = message_line("line-7-0a1b2c3d", answer)
    head = b'{"id":"line-7-0a1b2c3d","status_code":%d,"metadata":' % status
    assert line == head + raw[0] + b',"body":' + raw[1] + b',"stats":' + raw[2] + b"}\n"


def test_line_breaks_between_tokens_become_spaces():
    """A body printed over several lines still makes one output line with the same JSON."""
    body = json.dumps({"a": [1, {"b": "c\nd"}]}, indent=2).replace("\n", "\r\n").encode()
    line = message_line("line-1-00000000", decode_answer(encode_response(200, b"{}", body), {}))
    assert line.count(b"\n") == 1
    assert b"\r" not in line
    assert json.loads(line)["body"] == {"a": [1, {"b": "c\nd"}]}


def test_claim_check_takes_the_place_of_the_body():
    """An answer in object storage keeps its `body_uri`, and there is no empty body beside it."""
    answer = decode_answer(b'{"status_code":200,"metadata":{},"body_uri":"gs://b/o"}', {})
    expected = {"id": "line-1-00000000", "status_code": 200, "metadata": {}, "body_uri": "gs://b/o"}
    assert json.loads(message_line("line-1-00000000", answer)) == expected
    assert a_batch_output(answer)["response"]["body_uri"] == "gs://b/o"


@pytest.mark.parametrize(
    "data",
    [b"", b"text", b"[]", b'{"metadata":{}}', b'{"status_code":"200"}', b'{"status_code":200,"body":"\xff"}'],
)
def test_what_is_no_answer_becomes_a_502(data):
    """A line is answered with well-formed JSON even when the message on the response topic is none."""
    line = json.loads(message_line("line-1-00000000", decode_answer(data, {})))
    assert line["status_code"] == 502
    assert line["body"]["error"]["code"] == "malformed_answer"


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"usage": {"prompt_tokens": 3, "completion_tokens": 4}}, (3, 4)),
        ({"usage": {"input_tokens": 5, "output_tokens": 6}}, (5, 6)),
        ({"usage": {"prompt_tokens": 7, "total_tokens": 7}}, (7, None)),
        ({"usage": None}, (None, None)),
        ({"usage": "many"}, (None, None)),
        ({"usage": {"prompt_tokens": "3"}}, (None, None)),
        ({}, (None, None)),
        ([1], (None, None)),
    ],
)
def test_usage_is_read_in_both_spellings(body, tokens):
    """Chat and completions say prompt and completion, responses say input and output; nonsense counts as nothing."""
    answer = an_answer(200, body)
    assert (answer.input_tokens, answer.output_tokens) == tokens


def test_good_batch_line():
    """A success has the response with its request id, and a null error."""
    answer = an_answer(200, {"id": "c"}, backend_request_id="req-9", request_message_id="m-1")
    assert a_batch_output(answer) == {
        "id": "batch_req_line-1-00000000",
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": "req-9", "body": {"id": "c"}},
        "error": None,
    }


def test_a_batch_line_keeps_what_was_measured():
    """`stats` stands beside OpenAI's keys, byte for byte, also where no server answered."""
    data = encode_response(502, b"{}", json.dumps(envelope("connect", backend=None)).encode(), stats=b'{"ttft_s": 0.5}')
    line = batch_line("line-1-00000000", b'"a"', decode_answer(data, {}))
    assert line.endswith(b',"stats":{"ttft_s": 0.5}}\n')
    assert json.loads(line)["response"] is None


def test_message_id_stands_in_for_the_backends_request_id():
    """Without a request id of the backend's, the id of the request message is given."""
    assert a_batch_output(an_answer(request_message_id="m-1"))["response"]["request_id"] == "m-1"


@pytest.mark.parametrize(
    "body",
    [
        envelope("connect", backend=None),
        envelope("bad_message", backend=None),
        envelope("malformed", backend={"status": 200, "body": None, "text": "<html>"}),
    ],
    ids=["connect", "bad-message", "malformed"],
)
def test_no_response_where_no_server_answered(body):
    """Errors behind which no server's answer stands have a null response."""
    line = a_batch_output(an_answer(502, body, error_class=body["error"]["code"]))
    assert line["response"] is None
    assert line["error"] == {"code": body["error"]["code"], "message": "It failed."}


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (502, envelope("server_error", backend={"status": 500, "body": None, "text": "<html>"})),
        (502, envelope("stream_broken", backend={"status": 200}, partial={"choices": []}, truncated=True)),
        (502, envelope("connection_lost", backend=None, partial={"choices": []})),
        (400, {"error": {"message": "bad", "type": "invalid_request_error", "param": None, "code": None}}),
    ],
    ids=["server-error", "partial", "partial-without-response", "verbatim"],
)
def test_response_where_a_server_answered(status, body):
    """A server's error, and the text that a broken stream had generated, stand beside the error."""
    line = a_batch_output(an_answer(status, body))
    assert line["response"] == {"status_code": status, "request_id": None, "body": body}
    assert line["error"]["code"]
    assert line["error"]["message"]


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ({"error": {"message": "m", "code": "c"}}, "c", "m"),
        ({"error": {"message": "m", "code": 400}}, "invalid_request", "m"),
        ({"error": "Unauthorized"}, "invalid_request", "Unauthorized"),
        ({"object": "error", "message": "flat", "code": 400}, "invalid_request", "flat"),
        ({"detail": "Not Found"}, "invalid_request", "Not Found"),
        ({"detail": [{"msg": "x"}]}, "invalid_request", "The answer has status 400."),
        ({}, "invalid_request", "The answer has status 400."),
        ([], "invalid_request", "The answer has status 400."),
    ],
)
def test_error_has_code_and_message_for_every_servers_shape(body, code, message):
    """`error.code` and `error.message` are texts that are not empty, for any error of a server."""
    assert a_batch_output(an_answer(400, body))["error"] == {"code": code, "message": message}


@pytest.mark.parametrize(
    ("status", "attributes", "code"),
    [
        (429, {}, "rate_limit_exceeded"),
        (418, {}, "http_418"),
        (302, {}, "http_302"),
        (500, {"error_class": "timeout"}, "timeout"),
    ],
)
def test_code_is_derived_from_class_or_status(status, attributes, code):
    """Without a code of the server's own, the worker's class names the error, then the status."""
    assert a_batch_output(an_answer(status, {}, attributes))["error"]["code"] == code


def test_local_answer_has_openais_error_shape():
    """A line refused here has the same shape as any other, with its metadata."""
    refusal = Refusal(status_code=413, code="request_too_large", message="too large", metadata=b'{"n":1}')
    line = json.loads(output_line("line-2-00000000", Shape.MESSAGE, b"null", local_answer(refusal)))
    error = {"message": "too large", "type": "invalid_request_error", "param": None, "code": "request_too_large"}
    assert line == {"id": "line-2-00000000", "status_code": 413, "metadata": {"n": 1}, "body": {"error": error}}


def test_local_answer_of_a_batch_line_has_no_response():
    """A batch line refused here has a null response and the reason."""
    refusal = Refusal(status_code=400, code="invalid_request", message="'method' must be POST", param="method")
    line = json.loads(output_line("line-2-00000000", Shape.BATCH, b'"x"', local_answer(refusal)))
    assert (line["custom_id"], line["response"]) == ("x", None)
    assert line["error"] == {"code": "invalid_request", "message": "'method' must be POST"}
