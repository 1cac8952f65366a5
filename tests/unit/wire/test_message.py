"""Decode and encode: what is taken, what is refused and how, and that nothing is changed on the way."""

import json
import tracemalloc
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from worker.errors import MessageError
from worker.wire.body import RequestBody, is_json_object
from worker.wire.message import (
    MAX_ATTRIBUTES,
    RequestMessage,
    clip_attributes,
    decode_request,
    encode_request,
    encode_response,
    message_bytes,
    read_metadata_leniently,
)

PATH = "/v1/chat/completions"
META = b'{"id": 9007199254740993, "z": 1, "a": [1.50, 1e2]}'

json_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | json_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(json_text, inner, max_size=4),
    max_leaves=12,
)
json_objects = st.dictionaries(json_text, json_values, max_size=5)
layouts = st.sampled_from([{}, {"separators": (",", ":")}, {"indent": 2}, {"ensure_ascii": False}])


def a_message(**parts: Any) -> bytes:
    """A request's data from raw JSON parts; `path`, `body` and `metadata` have good values unless given as `None`."""
    raw: dict[str, bytes | None] = {
        "path": b'"%s"' % PATH.encode(),
        "metadata": META,
        "body": b'{"model":"m"}',
        **parts,
    }
    return b"{" + b",".join(b'"%s":%s' % (k.encode(), v) for k, v in raw.items() if v is not None) + b"}"


def refusal(data: bytes) -> MessageError:
    with pytest.raises(MessageError) as caught:
        decode_request(data)
    assert is_json_object(caught.value.metadata)
    assert len(caught.value.reason) < 1000
    return caught.value


def outcome(data: bytes) -> RequestMessage | MessageError:
    try:
        return decode_request(data)
    except MessageError as error:
        return error


# What comes through unchanged


@given(body=json_objects, metadata=json_objects, layout=layouts, outer=layouts, order=st.permutations(range(3)))
def test_body_and_metadata_survive_byte_for_byte(
    body: Any, metadata: Any, layout: Any, outer: Any, order: list[int]
) -> None:
    """Numbers of any size, key order and white space of body and metadata come out as they stood in the message."""
    items = [("path", PATH), ("metadata", metadata), ("body", body)]
    raw_body, raw_metadata = json.dumps(body, **layout).encode(), json.dumps(metadata, **layout).encode()
    text = json.dumps({items[n][0]: f"@{items[n][0]}" for n in order}, **outer).encode()
    text = text.replace(b'"@body"', raw_body).replace(b'"@metadata"', raw_metadata)
    request = decode_request(text.replace(b'"@path"', json.dumps(PATH).encode()))
    assert request.body is not None
    assert (raw_body, raw_metadata, PATH) == (request.body.data, request.metadata, request.path)
    response = json.loads(encode_response(200, request.metadata, request.body.data))
    assert {"status_code": 200, "metadata": metadata, "body": body} == response
    assert list(metadata) == list(response["metadata"])


@pytest.mark.parametrize("number", ["9223372036854775808", "1" * 4000, "-9007199254740993", "1.10", "1e400", "0.1e-7"])
def test_numbers_keep_their_spelling(number: str) -> None:
    """A number no float or 64-bit integer can hold is echoed digit by digit."""
    request = decode_request(a_message(metadata=b'{"n":%s}' % number.encode(), body=b'{"seed":%s}' % number.encode()))
    assert request.metadata == b'{"n":%s}' % number.encode()
    assert request.body == RequestBody(b'{"seed":%s}' % number.encode())


@given(path=st.just(PATH), body=json_objects, metadata=json_objects, deadline=st.none() | st.floats(0, 4e9))
def test_what_is_encoded_is_decoded(path: str, body: Any, metadata: Any, deadline: float | None) -> None:
    """`encode_request` and `decode_request` are inverse."""
    raw = [json.dumps(part).encode() for part in (body, metadata)]
    request = decode_request(encode_request(path=path, body=raw[0], metadata=raw[1], deadline=deadline, priority=-3))
    assert (path, RequestBody(raw[0]), raw[1], deadline, -3) == (
        request.path,
        request.body,
        request.metadata,
        request.deadline,
        request.priority,
    )


def test_metadata_is_optional() -> None:
    """A message without metadata has an empty object."""
    assert decode_request(a_message(metadata=None)).metadata == b"{}"


@pytest.mark.parametrize(
    ("body", "model", "stream"),
    [
        (b'{"model":"m","stream":true}', "m", True),
        (b'{"stream" : false , "model" : "a\\u00e9\\n" }', "aé\n", False),
        (b'{"model":7,"stream":"true"}', None, False),
        (b'{"model":null,"stream":null}', None, False),
        (b'{"model":1e999,"stream":1}', None, False),
        (b'{"model":' + b"[" * 300 + b"]" * 300 + b"}", None, False),
        (b"{}", None, False),
        (b'{"model":"a","model":"b"}', "b", False),
    ],
)
def test_model_and_stream_are_read_where_they_have_their_type(body: bytes, model: str | None, stream: bool) -> None:
    """Looking into the body never refuses it: what is wrong in there is the backend's to say."""
    request = decode_request(a_message(body=body))
    assert request.body is not None
    assert (request.model, request.body.asks_for_stream, request.body.data) == (model, stream, body)


@pytest.mark.parametrize(
    ("raw", "seconds"),
    [
        (b"null", None),
        (b"1767225600", 1767225600.0),
        (b"1767225600.25", 1767225600.25),
        (b'"2026-01-01T00:00:00Z"', 1767225600.0),
        (b'"2026-01-01t00:00:00.500z"', 1767225600.5),
        (b'"2026-01-01T02:00:00.123456789+02:00"', 1767225600.123456),
        (b'"2026-01-01 00:00:00"', 1767225600.0),
    ],
)
def test_a_deadline_is_text_or_seconds(raw: bytes, seconds: float | None) -> None:
    """RFC 3339 in any zone, without one taken as UTC, or Unix seconds."""
    assert decode_request(a_message(deadline=raw)).deadline == seconds


@pytest.mark.parametrize("raw", [b'{"X-A":"1","x-b":null}', b'{"x-b":null,"X-A":"1"}', b'{"X-A":"1"}'])
def test_a_header_that_is_null_is_absent(raw: bytes) -> None:
    """As every optional key is: programs write what they do not have as `null`."""
    assert decode_request(a_message(headers=raw)).headers == {"x-a": "1"}


def test_headers_come_in_lower_case() -> None:
    """Names of headers are compared with the allow-list in lower case."""
    request = decode_request(a_message(headers=b'{"X-Tenant":"a b","Traceparent":""}'))
    assert request.headers == {"x-tenant": "a b", "traceparent": ""}


def test_body_uri_stands_for_the_body() -> None:
    """A message may name its body instead of carrying it."""
    request = decode_request(a_message(body=None, body_uri=b'"gs://b/o"'))
    assert (request.body, request.body_uri) == (None, "gs://b/o")


# What is refused


@pytest.mark.parametrize("rest", [b'"}]}', b'"}]}}'])
def test_half_a_surrogate_pair_is_not_called_truncated(rest: bytes) -> None:
    """At the very end as well: a requester whose text was cut between two halves looks for the right thing."""
    with pytest.raises(MessageError, match="invalid utf-16 surrogate pair"):
        decode_request(b'{"path":"/v1/x","body":{"a":[{"b":"\\ud83d' + rest)


def test_what_is_cut_is_called_truncated() -> None:
    """Also when a whole pair stands at the end."""
    with pytest.raises(MessageError, match="truncated"):
        decode_request(b'{"path":"/v1/x","body":{"a":"\\ud83d\\ude00"}')


DEEP = b"[" * 100_000
BAD_JSON = {
    "no data": b"",
    "not JSON": b"hello",
    "cut": a_message()[:-1],
    "two documents": a_message() + a_message(),
    "NUL behind": a_message() + b"\x00",
    "byte order mark": b"\xef\xbb\xbf" + a_message(),
    "UTF-16": a_message().decode().encode("utf-16"),
    "NaN": a_message(body=b'{"temperature":NaN}'),
    "Infinity": a_message(body=b'{"temperature":-Infinity}'),
    "single quotes": a_message(body=b"{'a':1}"),
    "trailing comma": a_message(body=b'{"a":1,}'),
    "comment": a_message(body=b'{"a":1/**/}'),
    "leading zero": a_message(body=b'{"a":01}'),
    "bad escape": a_message(body=b'{"a":"\\x"}'),
    "raw line break": a_message(body=b'{"a":"\n"}'),
    "lone surrogate in the body": a_message(body=b'{"a":"\\ud83d"}'),
    "lone surrogate in the path": a_message(path=b'"/v1/\\udc00x"'),
    "lone surrogate in a key": a_message(**{"\\ud800": b"1"}),
    "invalid UTF-8 in the body": a_message(body=b'{"a":"\xff"}'),
    "invalid UTF-8 in a key": b'{"\xff":1}',
    "overlong UTF-8": a_message(body=b'{"a":"\xc0\xaf"}'),
    "UTF-8 of a surrogate": a_message(body=b'{"a":"\xed\xa0\x80"}'),
    "nested too deeply": a_message(body=b'{"a":' + DEEP + b"]" * 100_000 + b"}"),
    "nested without end": DEEP,
    "10 MB of letters": b"x" * 10_000_000,
    "10 MB of brackets": b"[" * 10_000_000,
    "10 MB of a number": b"1" * 10_000_000,
    "an array": b"[]",
    "a number": b"1",
    "a string": b'"{}"',
    "null": b"null",
}


@pytest.mark.parametrize("data", BAD_JSON.values(), ids=BAD_JSON)
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    """Each kind of broken data gives a MessageError with a short reason."""
    assert refusal(data).reason


BAD_SHAPE = {
    "empty object": (b"{}", "body"),
    "path missing": (a_message(path=None), "path"),
    "path a number": (a_message(path=b"1"), "path"),
    "path null": (a_message(path=b"null"), "path"),
    "path an object": (a_message(path=b"{}"), "path"),
    "body missing": (a_message(body=None), "body"),
    "body null": (a_message(body=b"null"), "body"),
    "body a string": (a_message(body=b'"{}"'), "body"),
    "body an array": (a_message(body=b"[]"), "body"),
    "body and body_uri": (a_message(body_uri=b'"gs://b/o"'), "body_uri"),
    "body_uri a number": (a_message(body=None, body_uri=b"1"), "body_uri"),
    "metadata an array": (a_message(metadata=b"[1]"), "metadata"),
    "metadata a string": (a_message(metadata=b'"x"'), "metadata"),
    "unknown key": (a_message(boddy=b"{}"), "boddy"),
    "unknown key, huge": (a_message(**{"k" * 100_000: b"1"}), "k" * 64),
    "unknown keys": (a_message(**{f"key{n}": b"1" for n in range(50)}), "key0"),
    "key with a different case": (a_message(Body=b"{}"), "Body"),
    "body twice": (a_message()[:-1] + b',"body":{"model":"n"}}', "body"),
    "body twice, the same": (a_message()[:-1] + b',"body":{"model":"m"}}', "body"),
    "path twice, prefix": (b'{"priority":12,"priority":1,"path":"/v1/x","body":{}}', "priority"),
    "path twice, prefix at the end": (b'{"path":"/v1/x","body":{},"priority":12,"priority":1}', "priority"),
    "path twice, escaped": (a_message()[:-1] + b',"p\\u0061th":"/v1/y"}', "path"),
    "priority a float": (a_message(priority=b"1.5"), "priority"),
    "priority text": (a_message(priority=b'"1"'), "priority"),
    "priority true": (a_message(priority=b"true"), "priority"),
    "priority too large": (a_message(priority=b"1" * 5000), "priority"),
    "deadline true": (a_message(deadline=b"true"), "deadline"),
    "deadline words": (a_message(deadline=b'"tomorrow"'), "deadline"),
    "deadline a date": (a_message(deadline=b'"2026-01-01"'), "deadline"),
    "deadline digits": (a_message(deadline=b'"20261231"'), "deadline"),
    "deadline of no calendar": (a_message(deadline=b'"2026-02-30T00:00:00Z"'), "deadline"),
    "deadline an object": (a_message(deadline=b"{}"), "deadline"),
    "deadline beyond a float": (a_message(deadline=b"1e999"), "deadline"),
    "headers an array": (a_message(headers=b"[]"), "headers"),
    "headers of numbers": (a_message(headers=b'{"a":1}'), "headers"),
    "header with a line break": (a_message(headers=b'{"a":"b\\r\\nx-evil: 1"}'), "headers"),
    "header with NUL": (a_message(headers=b'{"a":"\\u0000"}'), "headers"),
    "header not ASCII": (a_message(headers='{"a":"é"}'.encode()), "headers"),
    "header name with a colon": (a_message(headers=b'{"a:b":"c"}'), "headers"),
    "header name empty": (a_message(headers=b'{"":"c"}'), "headers"),
}


@pytest.mark.parametrize(("data", "param"), BAD_SHAPE.values(), ids=BAD_SHAPE)
def test_a_wrong_shape_is_refused_with_its_key(data: bytes, param: str) -> None:
    """The refusal names the top-level key at fault."""
    assert refusal(data).param == param


@pytest.mark.parametrize("name", [name for name, (data, _) in BAD_SHAPE.items() if META in data])
def test_a_refusal_of_shape_carries_the_metadata(name: str) -> None:
    """A requester finds their own metadata in the refusal."""
    assert refusal(BAD_SHAPE[name][0]).metadata == META


def test_unknown_keys_are_named() -> None:
    """The refusal names the unknown keys and the known ones."""
    assert (
        "unknown keys 'modle', 'x'; known keys are path, metadata, body"
        in refusal(a_message(modle=b"1", x=b"2")).reason
    )


@pytest.mark.parametrize(
    "name",
    [
        *("cut", "two documents", "NUL behind", "byte order mark", "NaN", "Infinity", "raw line break", "bad escape"),
        *("lone surrogate in the body", "invalid UTF-8 in the body", "nested too deeply", "leading zero"),
    ],
)
def test_metadata_before_the_fault_is_found(name: str) -> None:
    """The usual mistakes of producers leave the metadata readable."""
    assert refusal(BAD_JSON[name]).metadata == META


@pytest.mark.parametrize("fault", [b'{"t":NaN}', b'{"t":"\xff"}', b'{"t":"a\nb"}', b'{"t":"\\ud800"}'])
def test_metadata_behind_the_fault_is_found(fault: bytes) -> None:
    """A value that can at least be skipped does not hide the metadata after it."""
    assert refusal(b'{"path":"/v1/x", "body": %s, "metadata" : %s }' % (fault, META)).metadata == META


@pytest.mark.parametrize("metadata", [b'{"a":NaN}', b'{"a":"\xff"}', b"[]", b'{"a":"\\ud800"}', b"3"])
def test_broken_metadata_is_not_echoed(metadata: bytes) -> None:
    """Metadata that would make the answer unparseable is left out."""
    assert refusal(a_message(metadata=metadata)).metadata == b"{}"


def test_looking_for_metadata_in_a_huge_broken_message_is_bounded() -> None:
    """Ten megabytes of broken JSON do not become objects for every byte."""
    data = a_message(metadata=None, body=b'{"a":[' + b"[]," * 3_000_000 + b"NaN]}")
    tracemalloc.start()
    try:
        assert refusal(data).metadata == b"{}"
        assert tracemalloc.get_traced_memory()[1] < 3 * len(data)  # as objects: ten times as much again
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=200))
@example(b"{")
@example(b'{"')
@example(b'{"metadata"')
@example(b'{"metadata":')
@example(b"\xef\xbb\xbf")
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    """Whatever the bytes, the outcome is a request or a MessageError whose metadata is a JSON object."""
    assert is_json_object(outcome(data).metadata)


@given(st.data())
def test_no_damage_raises_anything_else(data: st.DataObject) -> None:
    """Bytes cut, swapped or inserted into a good message end the same way."""
    good = a_message(deadline=b'"2026-01-01T00:00:00Z"', priority=b"1", headers=b'{"a":"b"}')
    start = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(start, min(len(good), start + 20)))
    pieces = st.sampled_from([b'"', b"{", b"}", b"[", b",", b":", b"\\", b"\\ud800", b"NaN", b"1e999", b"9" * 400])
    filling = data.draw(st.binary(max_size=4) | pieces)
    answer = outcome(good[:start] + filling + good[end:])
    body = answer.body if isinstance(answer, RequestMessage) else None
    json.loads(encode_response(200, answer.metadata, body.data if body is not None else b"{}"))


keys = st.sampled_from(["path", "body", "metadata", "deadline", "priority", "headers", "body_uri", "other"])


@given(st.lists(st.tuples(keys, json_values), max_size=6), layouts)
def test_no_values_raise_anything_else(items: Iterable[tuple[str, Any]], layout: Any) -> None:
    """Any JSON under any key is taken or refused."""
    text = "{" + ",".join(f"{json.dumps(key)}: {json.dumps(value, **layout)}" for key, value in items) + "}"
    answer = outcome(text.encode())
    assert is_json_object(answer.metadata)
    if isinstance(answer, RequestMessage):
        assert len({key for key, _ in items}) == len(list(items))
        assert answer.path.startswith("/")


# OpenAI batch lines


def a_batch(**changes: object) -> bytes:
    """A batch line; `...` takes a key out."""
    fields = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"input": "x"}, **changes}
    return json.dumps({key: value for key, value in fields.items() if value is not ...}).encode()


def test_a_batch_line_is_a_request() -> None:
    """`path` is its url, the body its own bytes, and the custom_id comes back in the metadata."""
    data = b'{"custom_id":"\\u00e9 1", "method":"POST", "url":"v1/embeddings", "body":{"input" : 1.0e2, "model":"m"}}'
    request = decode_request(data)
    assert (request.path, request.model) == ("/v1/embeddings", "m")
    assert request.body == RequestBody(b'{"input" : 1.0e2, "model":"m"}')
    assert request.metadata == b'{"custom_id":"\\u00e9 1"}'


@pytest.mark.parametrize(
    ("changes", "param", "reason"),
    [
        ({"custom_id": ...}, "custom_id", "custom_id is missing"),
        ({"custom_id": None}, "custom_id", "custom_id is missing"),
        ({"custom_id": 5}, "custom_id", "custom_id must be a string"),
        ({"custom_id": ""}, "custom_id", "custom_id must not be empty"),
        ({"method": ...}, "method", "method is missing"),
        ({"method": "GET"}, "method", "method must be POST"),
        ({"method": 1}, "method", "method must be a string"),
        ({"url": ...}, "url", "url is missing"),
        ({"url": "http://elsewhere/v1/x"}, "url", "url must not name a scheme or a host"),
        ({"body": ...}, "body", "body is missing"),
        ({"body": [1]}, "body", "body must be a JSON object"),
        ({"priority": 1}, "priority", "unknown key 'priority'; known keys are custom_id, method, url, body"),
    ],
)
def test_a_faulty_batch_line_is_refused_with_its_key(changes: dict[str, Any], param: str, reason: str) -> None:
    """The reason names the key as it stands in the line; the custom_id comes back where it is one."""
    with pytest.raises(MessageError) as caught:
        decode_request(a_batch(**changes))
    assert (caught.value.param, caught.value.reason) == (param, reason)
    custom_id = changes.get("custom_id", "a")
    assert json.loads(caught.value.metadata) == ({} if custom_id is ... else {"custom_id": custom_id})


def test_a_batch_line_that_cannot_be_parsed_keeps_its_custom_id() -> None:
    """As the metadata of a message do."""
    data = b'{"custom_id":"a","method":"POST","url":"/v1/x","body":{"t":NaN}}'
    assert read_metadata_leniently(data) == b'{"custom_id":"a"}'
    with pytest.raises(MessageError, match="custom_id is given twice"):
        decode_request(b'{"custom_id":"a","custom_id":"b","method":"POST","url":"/v1/x","body":{}}')


def test_a_message_with_a_path_is_no_batch_line() -> None:
    """A custom_id beside a path is an unknown key."""
    with pytest.raises(MessageError, match="unknown key 'custom_id'; known keys are path"):
        decode_request(a_message(custom_id=b'"a"'))


# The rest of the wire


def test_stats_stand_last() -> None:
    """Stats are an own key behind the body."""
    assert encode_response(200, b"{}", b"large", stats=b'{"s":1}', body_uri="gs://b/o") == (
        b'{"status_code":200,"metadata":{},"body_uri":"gs://b/o","stats":{"s":1}}'
    )
    assert encode_response(200, b"{}", b'{"a":1}', stats=b'{"s":1}') == (
        b'{"status_code":200,"metadata":{},"body":{"a":1},"stats":{"s":1}}'
    )


def test_the_lenient_reading_of_metadata_never_raises() -> None:
    """Data without metadata gives an empty object."""
    assert [read_metadata_leniently(data) for data in (b"", b"{}", b"[[", b"\xff", b'{"metadata":3}')] == [b"{}"] * 5


def test_sizes_count_bytes_of_data_and_attributes() -> None:
    """Pub/Sub's limit counts bytes of data, names and values."""
    assert message_bytes(b"abc", {"é": "ab", "x": ""}) == 3 + 2 + 2 + 1


def test_attributes_are_cut_to_what_the_broker_takes() -> None:
    """Values are cut at a character's border, names that are too long or reserved are left out, 100 remain."""
    clipped = clip_attributes({"": "x", "k" * 257: "x", "googclient": "x", "a": "é" * 600, "s": "\ud800", "e": ""})
    assert clipped == {"a": "é" * 512, "s": "?", "e": ""}
    assert len(clip_attributes({f"k{n}": "v" for n in range(150)})) == MAX_ATTRIBUTES


def test_moments_are_unix_seconds() -> None:
    """A deadline agrees with the standard library's clock."""
    moment = datetime(2030, 5, 6, 7, 8, 9, tzinfo=UTC)
    assert decode_request(a_message(deadline=json.dumps(moment.isoformat()).encode())).deadline == moment.timestamp()


@pytest.mark.parametrize("key", ["metadata", "priority", "headers", "deadline", "body_uri"])
def test_a_null_is_as_good_as_absent(key: str) -> None:
    """For every optional key alike; JSON writers of many languages write what is not there as null."""
    request = decode_request(a_message(**{key: b"null"}))
    absent = {"metadata": b"{}", "priority": 0, "headers": {}, "deadline": None, "body_uri": None}
    assert getattr(request, key) == absent[key]


def test_a_null_body_is_absent_beside_its_uri() -> None:
    """The two exclude each other, and null is neither."""
    request = decode_request(a_message(body=b"null", body_uri=b'"gs://b/o"'))
    assert (request.body, request.body_uri) == (None, "gs://b/o")


@pytest.mark.parametrize("deadline", [b"1795870961000", b"1795870961000.5", b"1795870961000000", b"1e300", b"-1e12"])
def test_a_deadline_that_is_no_unix_seconds_is_refused(deadline: bytes) -> None:
    """Milliseconds are the usual mistake: taken as seconds they would be the year 58000."""
    with pytest.raises(MessageError, match="milliseconds") as caught:
        decode_request(a_message(deadline=deadline))
    assert caught.value.param == "deadline"
