"""Validation: every fault of a file, with its line and the words that clients look for."""

import json
import tracemalloc

import pytest

from worker.batches.records import RecordCutter
from worker.batches.validate import Checked, Rules, Validator, validate
from worker.payloads.files import FileStore

CHAT = "/v1/chat/completions"
BODY = {"model": "m", "messages": []}


def line(**fields) -> bytes:
    return json.dumps({"custom_id": "a", "method": "POST", "url": CHAT, "body": BODY} | fields).encode() + b"\n"


def without(name: str) -> bytes:
    fields = json.loads(line())
    del fields[name]
    return json.dumps(fields).encode() + b"\n"


def rules(**fields) -> Rules:
    return Rules(**{"endpoint": CHAT, "max_lines": 50_000, "max_embedding_inputs": 50_000, "has_model": None} | fields)


def check(content: bytes, **fields) -> Checked:
    validator, cutter = Validator(rules(**fields)), RecordCutter()
    validator.look_at(cutter.feed(content))
    validator.look_at(cutter.finish())
    return validator.result()


def told(content: bytes, **fields) -> list[tuple[str, str | None, int | None]]:
    return [(fault.code, fault.param, fault.line) for fault in check(content, **fields).faults]


def test_a_good_file_has_no_fault():
    found = check(line() + b"\n" + line(custom_id="b"))
    assert found == Checked(faults=[], total=2, model="m")


def test_the_model_is_told_only_when_there_is_one():
    assert check(line() + line(custom_id="b", body=BODY | {"model": "other"})).model is None


@pytest.mark.parametrize(
    ("content", "fault", "words"),
    [
        (b"{\n", ("invalid_json_line", None), ["not", "valid json"]),
        (b"\xff\n", ("invalid_json_line", None), ["not", "valid json"]),
        (b'{"a": "\xff"}\n', ("invalid_json_line", None), ["utf-8"]),
        (b'{"a": NaN}\n', ("invalid_json_line", None), ["not", "valid json"]),
        (b'{"a": -Infinity}\n', ("invalid_json_line", None), ["not", "valid json"]),
        (line().replace(b'"a"', b'"\\ud800"'), ("invalid_json_line", None), ["not", "valid json"]),
        (line().replace(b"[]", b'["\\udfff"]'), ("invalid_json_line", None), ["not", "valid json"]),
        (line().replace(b"[]", b"[" + b"7" * 5_000 + b"]"), ("invalid_json_line", None), ["not", "valid json"]),
        (line().replace(b"[]", b"[" * 5_000 + b"]" * 5_000), ("invalid_json_line", None), ["not", "valid json"]),
        (b"[" * 100_000 + b"\n", ("invalid_json_line", None), ["not", "valid json"]),
        (b"[1]\n", ("invalid_request", None), ["object"]),
        (b"[NaN]\n", ("invalid_json_line", None), ["not", "valid json"]),
        (b"null\n", ("invalid_request", None), ["object"]),
        (without("custom_id"), ("missing_required_parameter", "custom_id"), ["missing", "custom_id"]),
        (without("method"), ("missing_required_parameter", "method"), ["missing", "method"]),
        (without("url"), ("missing_required_parameter", "url"), ["missing", "url"]),
        (without("body"), ("missing_required_parameter", "body"), ["missing", "body"]),
        (line(custom_id=7), ("invalid_request", "custom_id"), ["string"]),
        (line(custom_id=None), ("invalid_request", "custom_id"), ["string"]),
        (line(custom_id=""), ("invalid_request", "custom_id"), ["empty"]),
        (line(method="GET"), ("invalid_request", "method"), ["POST"]),
        (line(method="post"), ("invalid_request", "method"), ["POST"]),
        (line(method=1), ("invalid_request", "method"), ["POST"]),
        (line(url=1), ("invalid_request", "url"), ["string"]),
        (line(url="/v1/embeddings"), ("invalid_url", "url"), ["does not match", "endpoint"]),
        (line(body=[]), ("invalid_request", "body"), ["object"]),
        (line(body={"messages": []}), ("invalid_request", "body.model"), ["missing", "model"]),
        (line(body=BODY | {"model": 1}), ("invalid_request", "body.model"), ["string"]),
        (line(body={"model": "m"}), ("invalid_request", "body.messages"), ["missing", "messages"]),
        (line(body=BODY | {"messages": "x"}), ("invalid_request", "body.messages"), ["list"]),
        (line(body=BODY | {"stream": True}), ("streaming_unsupported", "body.stream"), ["streaming", "not supported"]),
        (line(body=BODY | {"stream": "no"}), ("streaming_unsupported", "body.stream"), ["streaming", "not supported"]),
        (line(body=BODY | {"model": "x"}), ("model_not_found", "body.model"), ["'x'", "not supported"]),
    ],
)
def test_a_fault_is_told_with_its_line(content, fault, words):
    found = check(b"\r\n" + line(custom_id="good") + content, has_model=lambda name: name == "m")
    assert [(each.code, each.param, each.line) for each in found.faults] == [(*fault, 3)]
    for word in words:
        assert word.lower() in found.faults[0].message.lower()


@pytest.mark.parametrize("stream", [None, False])
def test_a_body_may_say_that_it_does_not_stream(stream):
    assert told(line(body=BODY | {"stream": stream})) == []


def test_long_digits_in_a_string_or_a_float_are_no_fault():
    assert told(line(body=BODY | {"user": "9" * 6_000})) == []
    assert told(line().replace(b"[]", b"[1." + b"9" * 6_000 + b"]")) == []
    assert told(line(body=BODY | {"user": "\U0001f600"})) == []  # a whole pair, as escapes


def test_independent_faults_of_a_line_are_all_told_in_order():
    content = json.dumps({"method": "GET", "url": "/x", "body": {"stream": True}}).encode()
    assert told(content) == [
        ("missing_required_parameter", "custom_id", 1),
        ("invalid_request", "method", 1),
        ("invalid_url", "url", 1),
        ("invalid_request", "body.model", 1),
        ("invalid_request", "body.messages", 1),
        ("streaming_unsupported", "body.stream", 1),
    ]


def test_a_custom_id_may_be_used_once():
    content = line() + line(custom_id="b") + line().replace(b'"a"', b'"\\u0061"')
    assert told(content) == [("duplicate_custom_id", "custom_id", 3)]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf\r\n"])
def test_a_file_without_a_record_is_empty(content):
    assert told(content) == [("empty_file", None, None)]


def test_lines_are_limited():
    content = b"".join(line(custom_id=str(number)) for number in range(11))
    assert told(content, max_lines=10) == [("too_many_tasks", None, None)]
    assert told(content, max_lines=11) == []


@pytest.mark.parametrize(
    ("value", "count"),
    [("a", 1), (["a", "b"], 2), ([1, 2, 3], 1), ([[1, 2], [3]], 2), ([], 1)],
)
def test_inputs_of_embeddings_are_counted(value, count):
    content = line(url="/v1/embeddings", body={"model": "m", "input": value})
    options = {"endpoint": "/v1/embeddings"}
    assert told(content, max_embedding_inputs=count, **options) == []
    assert told(content, max_embedding_inputs=count - 1, **options) == [("too_many_tasks", None, None)]


@pytest.mark.parametrize(
    ("endpoint", "good", "bad"),
    [
        ("/v1/completions", {"model": "m", "prompt": ["a"]}, {"model": "m", "prompt": 1}),
        ("/v1/responses", {"model": "m", "input": "a"}, {"model": "m"}),
        ("/v1/embeddings", {"model": "m", "input": "a"}, {"model": "m", "input": {}}),
        ("/v1/moderations", {"input": "a"}, {"model": 1, "input": "a"}),
        ("/v1/images/generations", {"prompt": "a"}, {"prompt": ["a"]}),
        ("/v1/images/edits", {"prompt": "a", "images": []}, {"images": []}),
        ("/v1/videos", {"prompt": "a"}, {"model": "m"}),
        ("/v1/other", {}, None),
    ],
)
def test_each_endpoint_has_its_fields(endpoint, good, bad):
    assert told(line(url=endpoint, body=good), endpoint=endpoint) == []
    if bad is not None:
        (fault,) = told(line(url=endpoint, body=bad), endpoint=endpoint)
        assert fault[0] == "invalid_request"
        assert fault[1].startswith("body.")


def test_a_line_that_no_message_carries_is_refused():
    content = line() + line(custom_id="b", body=BODY | {"user": "x" * 10_000_000})
    assert told(content) == [("invalid_request", None, 2)]


async def test_a_file_is_looked_at_in_bounded_memory(tmp_path):
    (tmp_path / "in").write_bytes(
        b"".join(line(custom_id=str(n), body=BODY | {"user": "x" * 2_000}) for n in range(20_000))
    )
    tracemalloc.start()
    try:
        found = await validate(FileStore(tmp_path), "in", rules())
        assert tracemalloc.get_traced_memory()[1] < 15_000_000
    finally:
        tracemalloc.stop()
    assert (found.total, found.faults) == (20_000, [])


async def test_one_line_of_200_megabytes_takes_no_memory(tmp_path):
    with (tmp_path / "in").open("wb") as file:
        file.truncate(200_000_000)
    tracemalloc.start()
    try:
        found = await validate(FileStore(tmp_path), "in", rules())
        assert tracemalloc.get_traced_memory()[1] < 40_000_000
    finally:
        tracemalloc.stop()
    assert [fault.line for fault in found.faults] == [1]


async def test_a_file_of_bad_lines_names_each(tmp_path):
    (tmp_path / "in").write_bytes(b"{}\n" * 50_000)
    found = await validate(FileStore(tmp_path), "in", rules())
    assert len(found.faults) == 200_000
    assert found.faults[-1].line == 50_000
