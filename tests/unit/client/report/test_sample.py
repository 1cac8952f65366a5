"""The values of one output line, in both shapes, with and without the worker's measurements."""

import json

import pytest

from worker.client.report.sample import NoAnswerError, read_sample
from worker.wire.usage import Usage

STATS = {
    "ttft_s": 0.31, "ttlt_s": 2.04, "tpot_s": None, "queue_s": 12.7, "held_s": 0.0,
    "tokens": {"input": 812, "output": 156, "input_cached": 512, "output_reasoning": 40},
    "salvaged_tokens": None, "attempts": 2, "delivery_attempt": 1, "streamed": True,
    "request_time": "2026-11-20T20:42:17.500Z", "backend": "default", "model": "asked-for", "error_class": None,
}  # fmt: skip
BODY = {"model": "answered-by", "usage": {"prompt_tokens": 3, "completion_tokens": 4}, "choices": [{}]}


def read(**line):
    return read_sample(json.dumps(line).encode())


def a_message(status=200, body=BODY, **more):
    return read(id="line-1-0", status_code=status, metadata={}, body=body, **more)


def a_batch_line(status=200, body=BODY, error=None, **more):
    response = None if status is None else {"status_code": status, "request_id": "r", "body": body}
    return read(id="batch_req_line-1-0", custom_id="a", response=response, error=error, **more)


@pytest.mark.parametrize("make", [a_message, a_batch_line])
def test_measurements_stand_above_the_body(make):
    """The worker's word about model and tokens counts, so that report and live metrics agree."""
    sample = make(stats=STATS)
    assert (sample.is_error, sample.status_code, sample.model) == (False, 200, "asked-for")
    assert sample.tokens == Usage(input=812, output=156, input_cached=512, output_reasoning=40)
    assert (sample.measured.ttft_s, sample.measured.tpot_s, sample.measured.held_s) == (0.31, None, 0.0)
    assert sample.measured.ended - sample.measured.started == pytest.approx(2.04)
    assert sample.measured.started == 1795207337.5


@pytest.mark.parametrize("make", [a_message, a_batch_line])
def test_without_measurements_the_body_has_to_do(make):
    """Model and usage come from it; times are unknown."""
    sample = make()
    assert (sample.model, sample.tokens, sample.measured) == ("answered-by", Usage(input=3, output=4), None)


def test_usage_in_an_error_is_not_counted():
    """As in the worker's metrics: an error that was not streamed has no tokens."""
    assert a_message(500, {"error": {"code": "x"}, "usage": {"prompt_tokens": 3}}).tokens == Usage()


@pytest.mark.parametrize(
    ("body", "error_class"),
    [
        ({"error": {"code": "bad_message", "type": "worker_error"}}, "bad_message"),
        ({"error": {"code": 400, "type": "BadRequestError"}}, "BadRequestError"),
        ({"error": "overloaded", "code": "busy"}, "busy"),
        ({"error": {"code": ""}}, "http_503"),
        ({}, "http_503"),
        ("text", "http_503"),
        ({"error": {"code": "a\x1b[2Jb\n"}}, "a\ufffd[2Jb\ufffd"),
        ({"error": {"code": "x" * 500}}, "x" * 128),
    ],
)
def test_an_errors_class_is_found_in_the_body(body, error_class):
    """Code, then type, then the status; names are short and cannot drive a terminal."""
    assert a_message(503, body).error_class == error_class


def test_the_workers_class_stands_above_the_servers_code():
    """The same word as in metrics and logs."""
    body = {"error": {"code": "context_length_exceeded"}}
    assert a_message(400, body, stats={**STATS, "error_class": "context_length"}).error_class == "context_length"


def test_a_batch_error_without_a_response_has_no_status():
    """The shape has no place for it; the class is there."""
    sample = a_batch_line(None, error={"code": "connect", "message": "m"})
    assert (sample.is_error, sample.status_code, sample.error_class) == (True, None, "connect")


def test_part_of_an_answer_is_noticed():
    """An error has `truncated`; the same key in a good answer is ignored."""
    assert a_message(502, {"error": {"code": "stream_broken"}, "partial": {}, "truncated": True}).is_truncated
    assert not a_message(200, {"truncated": True}).is_truncated


@pytest.mark.parametrize(
    "line",
    [
        b"", b"text", b"[]", b"{}", b'{"id":"line-1-0","status_code":2', b'{"status_code":"200"}',
        b'{"status_code":99}', b'{"custom_id":"a","response":null,"error":null}', b'{"status_code":200,"stats":7}',
        b'{"status_code":200,"stats":{"ttft_s":-1}}', b'{"status_code":200,"stats":{"ttlt_s":1e300}}', b'{"status_code":200,"stats":{"request_time":"yesterday"}}',
        b'{"path":"/v1/chat/completions","body":{}}', b"[" * 5000, b'{"custom_id":"\xff"',
    ],
)  # fmt: skip
def test_what_is_no_answer_is_refused(line):
    """Torn lines, requests, other programs' lines; never a guess."""
    with pytest.raises(NoAnswerError):
        read_sample(line)


@pytest.mark.parametrize("make", [a_message, a_batch_line])
@pytest.mark.parametrize(
    ("body", "reasons"),
    [
        ({"choices": [{"finish_reason": "stop"}, {"finish_reason": "length"}]}, ("stop", "length")),
        ({"choices": [{"finish_reason": None}, {}]}, ()),
        ({"choices": [{"finish_reason": "a\x1bb"}]}, ("a\ufffdb",)),
        ({"status": "completed", "output": []}, ("completed",)),
        ({"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}, ("max_output_tokens",)),
        ({"data": [{"embedding": [1]}]}, ()),
        ({"choices": "odd"}, ()),
    ],
    ids=["chat", "unknown", "control characters", "responses", "responses, cut", "embeddings", "another shape"],
)
def test_why_a_generation_ended_is_read_from_the_answer(make, body, reasons):
    """Of each choice, in the words of the server; with and without measurements."""
    assert make(body=body).finish_reasons == reasons
    assert make(body=body, stats=STATS).finish_reasons == reasons


def test_an_error_has_no_finish_reason():
    """Whatever its body holds."""
    assert a_message(500, {"choices": [{"finish_reason": "stop"}]}).finish_reasons == ()
