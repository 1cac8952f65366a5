"""Which shape a line has, and what is published for it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.client.io.lines import RawLine, Shape, prepare, rejected
from worker.errors import MessageError
from worker.wire.body import RequestBody
from worker.wire.message import LINE_ID, LINE_SHAPE, MAX_PUBSUB_MESSAGE_BYTES, decode_request

BATCH = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m"}}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


def a_line(data: bytes, number: int = 1) -> RawLine:
    return RawLine.of(number, data)


def a_batch_line(**changes: object) -> bytes:
    return json.dumps({key: value for key, value in {**BATCH, **changes}.items() if value is not ...}).encode()


def test_id_is_number_and_hash_of_the_bytes():
    """The id names the line's number and the SHA-256 of its bytes, so that any program can compute it."""
    assert RawLine.of(7, b"abc").line_id == "line-7-ba7816bf"


@pytest.mark.parametrize(
    "data",
    [
        b'{"path": "/v1/x",  "metadata":{"a":1}, "body":{}}',
        b'{"path":"/v1/x","custom_id":"a","url":"/v1/x","method":"POST","body":{}}',
        b'{"body":{}}',
        b"not json",
        b"[1,2]",
        b'"text"',
        b'{"path":"/v1/x","body":{"temperature":NaN}}',
        b'{"custom_id":"a","url":"/v1/x","method":"POST","body":{"t":NaN}}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
    ],
    ids=["message", "both", "no-path", "text", "array", "string", "nan", "nan-in-batch", "bytes", "deep"],
)
def test_what_is_no_batch_line_is_published_as_it_stands(data):
    """Everything that is no batch line goes to the worker byte for byte, bad or not: the worker judges messages."""
    prepared = prepare(a_line(data, 3))
    assert (prepared.shape, prepared.refusal) == (Shape.MESSAGE, None)
    assert prepared.data == data
    assert prepared.attributes == {LINE_ID: a_line(data, 3).line_id}


def test_a_batch_line_is_published_as_it_stands():
    """The worker reads it as a request; the attribute says that its answer has OpenAI's shape."""
    data = a_batch_line(custom_id="\u00e9 1")
    prepared = prepare(a_line(data))
    assert (prepared.shape, prepared.data, prepared.refusal) == (Shape.BATCH, data, None)
    assert prepared.custom_id == b'"\\u00e9 1"'
    assert prepared.attributes == {LINE_ID: a_line(data).line_id, LINE_SHAPE: "batch"}
    assert decode_request(prepared.data).path == "/v1/chat/completions"


@given(
    custom_id=st.text(st.characters(codec="utf-8"), min_size=1),
    body=st.dictionaries(st.text(st.characters(codec="utf-8")), json_values, max_size=3),
    ascii_only=st.booleans(),
)
def test_batch_line_keeps_custom_id_and_body(custom_id, body, ascii_only):
    """Any custom_id and any body arrive at the worker as they stood in the line."""
    raw_body = json.dumps(body, ensure_ascii=ascii_only).encode()
    raw_id = json.dumps(custom_id, ensure_ascii=ascii_only).encode()
    line = b'{"body":%s,"custom_id":%s,"method":"POST","url":"/v1/x"}' % (raw_body, raw_id)
    prepared = prepare(a_line(line))
    request = decode_request(prepared.data)
    assert request.body == RequestBody(raw_body)
    assert json.loads(request.metadata) == {"custom_id": custom_id}
    assert prepared.custom_id == raw_id


@pytest.mark.parametrize("changes", [{"custom_id": ...}, {"method": "GET"}, {"url": "/v1/../x"}, {"body": [1]}])
def test_the_worker_judges_a_batch_line(changes):
    """So that there is one judge, and a line on the topic and a line of a file are told the same."""
    prepared = prepare(a_line(a_batch_line(**changes)))
    assert (prepared.shape, prepared.refusal) == (Shape.BATCH, None)
    with pytest.raises(MessageError):
        decode_request(prepared.data)


@pytest.mark.parametrize("custom_id", [b'"\xff"', b'"\\ud800"', b"7", b"null"])
def test_custom_id_that_is_no_text_is_not_echoed(custom_id):
    """An output line stays valid JSON in UTF-8 for any custom_id."""
    prepared = prepare(a_line(b'{"custom_id":%s,"method":"POST","url":"/v1/x","body":{}}' % custom_id))
    assert prepared.custom_id == b"null"


def test_line_over_the_brokers_limit_is_refused_with_its_metadata():
    """A line no message can carry gets a 413 with its size and the limit, and its metadata comes back."""
    data = b'{"path":"/v1/x","metadata":{"n":9007199254740993},"body":{"a":"%s"}}' % (b"x" * MAX_PUBSUB_MESSAGE_BYTES)
    prepared = prepare(a_line(data))
    assert prepared.data == b""
    assert (prepared.refusal.status_code, prepared.refusal.code) == (413, "request_too_large")
    assert prepared.refusal.metadata == b'{"n":9007199254740993}'
    assert f"has {len(data)} bytes" in prepared.refusal.message
    assert f"at most {MAX_PUBSUB_MESSAGE_BYTES} bytes" in prepared.refusal.message


def test_line_over_the_brokers_limit_is_told_the_way_around():
    """Whether the line or the broker's rejection shows it: a larger body goes by reference."""
    prepared = prepare(a_line(b'{"path":"/v1/x","body":{"a":"%s"}}' % (b"x" * MAX_PUBSUB_MESSAGE_BYTES)))
    for refusal in (prepared.refusal, rejected(b"x" * MAX_PUBSUB_MESSAGE_BYTES, "no")):
        assert "`body_uri`" in refusal.message


def test_batch_line_over_the_brokers_limit_keeps_its_custom_id():
    """A batch line that is too large is refused in its own shape."""
    prepared = prepare(a_line(a_batch_line(body={"a": "x" * MAX_PUBSUB_MESSAGE_BYTES})))
    assert prepared.shape is Shape.BATCH
    assert prepared.custom_id == b'"a"'
    assert prepared.refusal.status_code == 413


def test_attributes_count_towards_the_limit():
    """The limit is on data and attributes together: a line that fits only without its id is refused."""
    head = b'{"path":"/v1/x","body":{"a":"'
    attribute_bytes = len(LINE_ID) + len("line-1-00000000")
    room = MAX_PUBSUB_MESSAGE_BYTES - attribute_bytes - len(head) - len(b'"}}')
    assert prepare(a_line(head + b"x" * room + b'"}}')).refusal is None
    assert prepare(a_line(head + b"x" * (room + 1) + b'"}}')).refusal.status_code == 413


def test_line_that_was_not_kept_is_refused():
    """A line over the reader's limit has an answer too."""
    prepared = prepare(RawLine(4, b"", 40_000_000, "0a1b2c3d"))
    assert prepared.line_id == "line-4-0a1b2c3d"
    assert (prepared.refusal.status_code, prepared.refusal.code) == (413, "line_too_long")


@pytest.mark.parametrize(("size", "status"), [(100, 400), (MAX_PUBSUB_MESSAGE_BYTES - 10, 413)])
def test_what_the_broker_rejects_is_named_by_its_likely_reason(size, status):
    """A message near the limit that the broker rejects was too large; another one was invalid."""
    assert rejected(b"x" * size, "no").status_code == status
