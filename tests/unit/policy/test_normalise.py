"""The normaliser: every shape of error body becomes the same facts, and no bytes can break it."""

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.policy.normalise import MAX_BODY_BYTES, MAX_MESSAGE_BYTES, Facts, Shape, normalise


def facts_of(body: bytes | object, status: int | None = 500, **headers: str) -> Facts:
    """Normalise a body given as bytes or as what its JSON says."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return normalise(status, {name.replace("_", "-"): value for name, value in headers.items()}, data)


def test_nested_with_a_number_as_code():
    """vLLM's code is the status again; it is kept as text and as a hint."""
    facts = facts_of({"error": {"message": "m", "type": "T", "param": "p", "code": 404}})
    assert (facts.shape, facts.message, facts.type, facts.param) == (Shape.NESTED, "m", "T", "p")
    assert (facts.code, facts.status_hint) == ("404", 404)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("429", ("429", 429)),
        (429, ("429", 429)),
        ("insufficient_quota", ("insufficient_quota", None)),
        (None, (None, None)),
        ("", (None, None)),
        (True, (None, None)),
        ([1], (None, None)),
        (200, ("200", None)),
        (600, ("600", None)),
        (-404, ("-404", None)),
        (404.5, ("404.5", None)),
        ("\u0664\u0660\u0664", ("\u0664\u0660\u0664", None)),
    ],
)
def test_code(code, expected):
    """A code is text; only an HTTP error status in it is a hint."""
    facts = facts_of({"error": {"message": "m", "code": code}})
    assert (facts.code, facts.status_hint) == expected


def test_tgis_constant_inside_streams_is_no_hint():
    """TGI writes 422 whatever happened; another number is believed."""
    assert facts_of({"error": {"message": "m", "http_status_code": 422}}).status_hint is None
    assert facts_of({"error": {"message": "m", "http_status_code": 503}}).status_hint == 503


@pytest.mark.parametrize(
    ("body", "shape", "message"),
    [
        ({"error": "text"}, Shape.STRING, "text"),
        ({"object": "error", "message": "flat"}, Shape.FLAT, "flat"),
        ({"Message": "aws"}, Shape.FLAT, "aws"),
        ({"msg": "short"}, Shape.FLAT, "short"),
        ({"object": "error"}, Shape.FLAT, ""),
        ({"detail": "Not Found"}, Shape.DETAIL, "Not Found"),
        ({"detail": [{"msg": "x"}]}, Shape.DETAIL, '[{"msg": "x"}]'),
        ({"error": {"message": {"a": 1}}}, Shape.NESTED, '{"a": 1}'),
        ({"errors": [{"message": "first"}, {"message": "second"}]}, Shape.NESTED, "first"),
        ({"choices": []}, Shape.OBJECT, ""),
        ({"error": None}, Shape.OBJECT, ""),
        ({"error": 7}, Shape.OBJECT, ""),
        ([1, 2], Shape.JSON, "[1, 2]"),
        ("just text", Shape.JSON, '"just text"'),
        (b"plain", Shape.TEXT, "plain"),
        (b"  <HTML><head><TITLE> 502 Bad </title>", Shape.HTML, "502 Bad"),
        (b"<!DOCTYPE html><p>no title", Shape.HTML, "<!DOCTYPE html><p>no title"),
        (b"<xml/>", Shape.TEXT, "<xml/>"),
        (b"", Shape.EMPTY, ""),
        (b" \r\n", Shape.EMPTY, ""),
        (b"null", Shape.TEXT, "null"),
        (b'\xef\xbb\xbf{"error": "bom"}', Shape.STRING, "bom"),
        (b'{"error": "cut', Shape.TEXT, '{"error": "cut'),
        (b'{"error": "\xff"}', Shape.STRING, "\ufffd"),
        (b"[" * 100_000, Shape.TEXT, "[" * MAX_MESSAGE_BYTES),
        (b'{"error": ' + b"9" * 5000 + b"}", Shape.TEXT, ('{"error": ' + "9" * 5000)[:MAX_MESSAGE_BYTES]),
    ],
    ids=range(26),
)
def test_shape(body, shape, message):
    """Every shape is told from the others, and its message found."""
    facts = facts_of(body)
    assert (facts.shape, facts.message) == (shape, message)


def test_a_string_error_takes_its_type_from_beside_it():
    """TGI's `error_type` stands next to `error`, and so may a code."""
    facts = facts_of({"error": "x", "error_type": "overloaded", "code": 429})
    assert (facts.type, facts.status_hint) == ("overloaded", 429)
    assert facts_of({"error": "x", "type": "t"}).type == "t"


@pytest.mark.parametrize("key", ["innererror", "inner_error"])
def test_the_inner_code(key):
    """Azure's reason is one level further in."""
    assert facts_of({"error": {"code": "content_filter", key: {"code": "X"}}}).inner_code == "X"
    assert facts_of({"error": {key: "text"}}).inner_code is None


@pytest.mark.parametrize(
    "body",
    [
        b'data: {"error": {"message": "m", "code": "429"}}\n\ndata: [DONE]\n\n',
        b'event: error\r\ndata: {"error": {"message": "m",\r\ndata: "code": "429"}}\r\n\r\n',
        b': ping\n\ndata: [DONE]\n\ndata:{"error": {"message": "m", "code": "429"}}',
        b'\xef\xbb\xbfdata: {"error": {"message": "m", "code": "429"}}\r\rdata: [DONE]\r\r',
    ],
)
def test_an_event_stream_is_unwrapped(body):
    """The first frame that is not the end is the body, whatever ends its lines."""
    facts = facts_of(body, content_type="text/event-stream; charset=utf-8")
    assert (facts.shape, facts.message, facts.status_hint, facts.wrapped) == (Shape.NESTED, "m", 429, ("sse",))
    assert json.loads(facts.payload)["error"]["message"] == "m"


def test_an_event_stream_is_told_by_its_beginning_too():
    """A proxy that loses the content type does not hide the error; a line separator of Unicode ends no line."""
    assert facts_of('data: {"error": "a\u2028b"}\n\n'.encode()).message == "a\u2028b"


@pytest.mark.parametrize(
    "body", [b"upstream timed out", b"bye", b"\x00\xff", b"<html><title>t</title></html>", b"null"]
)
def test_what_is_no_event_stream_is_read_as_what_it_is(body):
    """Whatever its content type says."""
    assert facts_of(body, content_type="text/event-stream") == facts_of(body, content_type="text/plain")
    assert facts_of(body).message or body == b"null"


def test_an_event_stream_without_data_is_empty():
    """Nothing but comments and the end says nothing."""
    assert facts_of(b": ping\n\ndata: [DONE]\n\n", content_type="text/event-stream").shape is Shape.EMPTY


def test_a_list_of_one_is_unwrapped():
    """Google's compatible layer wraps its error; a longer list is only JSON."""
    facts = facts_of([{"error": {"code": 429, "message": "m", "status": "RESOURCE_EXHAUSTED"}}])
    assert (facts.wrapped, facts.message, facts.type) == (("list",), "m", "RESOURCE_EXHAUSTED")
    assert facts_of({"error": {"message": "m", "status": "NOT_FOUND"}}).code is None
    assert json.loads(facts.payload)["error"]["code"] == 429
    assert facts_of([{"error": "a"}, {"error": "b"}]).shape is Shape.JSON


def model_error(status: object, message: object) -> dict:
    """SageMaker's wrapper."""
    return {"Message": "outer", "OriginalStatusCode": status, "OriginalMessage": message}


def test_sagemaker_is_unwrapped():
    """The container's own status and body are the facts; its payload is what may stand in an answer."""
    inner = '{"error": "x", "error_type": "overloaded"}'
    facts = facts_of(model_error(429, inner), 424)
    assert (facts.status, facts.type, facts.wrapped, facts.payload) == (
        429,
        "overloaded",
        ("sagemaker",),
        inner.encode(),
    )


@pytest.mark.parametrize(("status", "expected"), [(0, 424), (200, 424), ("500", 424), (None, 424), (503, 503)])
def test_sagemakers_inner_status_must_be_an_error(status, expected):
    """A status that is none leaves the response's own."""
    assert facts_of(model_error(status, ""), 424).status == expected


def test_sagemaker_without_an_inner_message_speaks_for_itself():
    """The outer message stands in when the container said nothing."""
    facts = facts_of(model_error(500, None), 424)
    assert (facts.message, json.loads(facts.payload)["Message"]) == ("outer", "outer")


def test_sagemaker_inside_sagemaker_ends():
    """Wrappers inside wrappers are unwrapped as far as they go."""
    body = "deep"
    for _ in range(10):
        body = json.dumps(model_error(500, body))
    facts = facts_of(body.encode(), 424)
    assert (facts.message, facts.wrapped) == ("deep", ("sagemaker",) * 10)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("ModelError:http://internal.amazon.com/coral/", "ModelError"),
        ("com.amazon.coral.service#ExpiredTokenException", "ExpiredTokenException"),
        ("InternalFailure", "InternalFailure"),
        ("", None),
        (":", None),
    ],
)
def test_the_aws_error_name_is_the_type(header, expected):
    """The name stands in a header, with an address behind it; the body's own type goes first."""
    assert facts_of({"Message": "m"}, x_amzn_errortype=header).type == expected
    assert facts_of({"message": "m", "type": "own"}, x_amzn_errortype=header).type == "own"


def test_bodies_beyond_the_limit_are_text():
    """A megabyte of echoed prompt is not parsed."""
    body = json.dumps({"error": {"message": "m", "code": "insufficient_quota", "input": "x" * MAX_BODY_BYTES}})
    facts = facts_of(body.encode())
    assert (facts.shape, facts.code, facts.payload) == (Shape.TEXT, None, b"")


def test_a_long_event_stream_is_read_as_far_as_its_first_event():
    """What follows the error event does not hide it, however long it is."""
    body = b'data: {"error": {"message": "m", "code": 503}}\n\n' + b"data: x\n\n" * MAX_BODY_BYTES
    assert facts_of(body).status_hint == 503


def test_every_text_is_bounded():
    """Whatever a server writes into its fields, little of it is kept."""
    long = "ä" * 2_000
    facts = facts_of(
        {"error": {"message": long, "type": long, "code": long, "param": long, "innererror": {"code": long}}}
    )
    assert len(facts.message.encode()) == MAX_MESSAGE_BYTES
    assert {len(str(text).encode()) for text in (facts.type, facts.code, facts.param, facts.inner_code)} == {256}


def test_lone_surrogates_do_not_get_out():
    """Text that UTF-8 cannot carry is replaced, so that logs and answers can be written."""
    assert facts_of(rb'{"error": {"message": "a\ud800b", "code": "\udfff"}}').message == "a?b"


@given(st.binary(max_size=300), st.sampled_from(["", "text/event-stream", "application/json"]))
def test_no_bytes_break_it(body, content_type):
    """Any bytes under any content type become facts that can be written as UTF-8."""
    facts = normalise(500, {"content-type": content_type}, body)
    for text in (facts.message, facts.type, facts.code, facts.param, facts.inner_code):
        (text or "").encode()
    assert facts.status == 500


def test_the_limit_of_digits_is_pythons():
    """The test of a number with 5,000 digits means something only while Python refuses it."""
    assert 0 < sys.get_int_max_str_digits() < 5000
