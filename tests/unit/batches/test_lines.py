"""From input lines to messages, from answers to results, from results to output lines."""

import json

import pytest

from tests.support.batches import CHAT
from worker.batches.ids import BATCH, make_id
from worker.batches.lines import dead_letter_of, ended_line, outcome_of, request_of, result_line
from worker.batches.states import Status
from worker.batches.store import Batch, Outcome
from worker.wire.message import decode_request

BATCH_ID = make_id(BATCH)
PLACE = {"run_id": BATCH_ID, "line_id": "3"}


def a_batch() -> Batch:
    fields = dict.fromkeys(Batch.__struct_fields__)
    return Batch(**{**fields, "id": BATCH_ID, "tenant": "t", "expires_at": 1_800_000_000})


def answer(status: int, body: object, **attributes: str) -> Outcome:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    data = b'{"status_code":%d,"metadata":{},"body":%s}' % (status, raw)
    found = outcome_of(data, {"request_message_id": "77", **PLACE, **attributes})
    assert found is not None
    return found


def written(outcome: Outcome, ended: Status | None = None) -> dict:
    line = result_line(outcome, b'"id-\\u00e4"', ended)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    return json.loads(line)


def own_error(status: int, code: str, backend: object = None) -> dict:
    error = {
        "message": "says why",
        "type": "worker_error",
        "param": None,
        "code": code,
        "backend": backend,
        "attempts": 3,
    }
    return {"error": error}


def test_a_record_becomes_a_request_message():
    body = b'{"model":"m","big":123456789012345678901234567890,"x":"\\u00e4"}'
    data = b'{"custom_id":"a","method":"POST","url":"%s","body":%s}' % (CHAT.encode(), body)
    message = request_of(a_batch(), 3, 5, data)
    request = decode_request(message.data)
    assert (request.path, request.deadline) == (CHAT, 1_800_000_000)
    assert request.body is not None
    assert request.body.data == body  # byte for byte
    key = f"batch_req_{BATCH_ID.removeprefix('batch_')}00000003"
    assert json.loads(request.metadata) == {"batch_id": BATCH_ID, "line": 5, "idempotency_key": key}
    assert message.attributes == {**PLACE, "tenant": "t"}


def test_a_good_answer():
    body = {
        "id": "x",
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 2}},
    }
    found = answer(200, body, backend_request_id="req-1")
    assert (found.record, found.is_ok, found.input_tokens, found.output_tokens, found.cached_tokens) == (
        3,
        True,
        3,
        4,
        2,
    )
    line = written(found)
    assert line["response"] == {"status_code": 200, "request_id": "req-1", "body": body}
    assert line["error"] is None
    assert line["custom_id"] == "id-ä"


def test_a_servers_error_has_both_response_and_error():
    body = {
        "error": {
            "message": "too long",
            "type": "invalid_request_error",
            "param": None,
            "code": "context_length_exceeded",
        }
    }
    line = written(answer(400, body, error_class="context_length"))
    assert line["response"]["body"] == body
    assert line["response"]["status_code"] == 400
    assert line["error"] == {"code": "context_length_exceeded", "message": "too long"}


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (429, {"error": {"message": "slow", "code": 429}}, "rate_limited"),
        (404, {"error": {"message": "no", "code": None}}, "rate_limited"),
        (503, {"detail": "busy"}, "rate_limited"),
        (500, [1], "rate_limited"),
        (502, b'"text"', "rate_limited"),
        (500, {"error": None}, "rate_limited"),
    ],
)
def test_an_odd_error_still_has_a_code_a_message_and_an_envelope(status, body, code):
    line = written(answer(status, body, error_class=code))
    assert line["error"]["code"] == code
    assert line["error"]["message"]
    assert isinstance(line["response"]["body"]["error"], dict)
    assert line["response"]["status_code"] == status


def test_what_no_server_answered_has_no_response():
    line = written(answer(504, own_error(504, "timeout"), error_class="timeout"))
    assert line["response"] is None
    assert line["error"] == {"code": "timeout", "message": "says why"}


def test_an_html_error_is_told_with_its_status():
    body = own_error(502, "server_error", {"status": 502, "body": None, "text": "<html>", "request_id": None})
    line = written(answer(502, body, error_class="server_error"))
    assert line["response"]["status_code"] == 502
    assert line["error"]["code"] == "server_error"


@pytest.mark.parametrize("body", [b"[]", b"1", b"null", b'"x"'])
def test_a_success_without_an_object_is_an_error_without_a_response(body):
    line = written(answer(200, body))
    assert line["response"] is None
    assert line["error"]["code"] == "malformed"


def test_an_answer_in_object_storage_is_told():
    data = b'{"status_code":200,"metadata":{},"body_uri":"gs://b/k"}'
    found = outcome_of(data, PLACE)
    assert found is not None
    line = written(found)
    assert line["response"] is None
    assert "gs://b/k" in line["error"]["message"]


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"\xff", b"[" * 100_000, b'{"status_code":0,"body":{}}', b'{"status_code":"x"}']
)
def test_what_is_no_answer_ends_the_line_all_the_same(data):
    found = outcome_of(data, PLACE)
    assert found is not None
    line = written(found)
    assert line["error"]["code"]
    assert line["error"]["message"]


def test_a_line_that_a_worker_cancelled_has_no_response():
    """Like one that was not sent any more, where its batch was cancelled; else it says that it was cancelled alone."""
    found = answer(499, own_error(499, "cancelled"), error_class="cancelled")
    for ended, code in ((Status.CANCELLED, "batch_cancelled"), (Status.EXPIRED, "cancelled"), (None, "cancelled")):
        line = written(found, ended)
        assert (line["error"]["code"], line["response"]) == (code, None)


def test_a_passed_deadline_is_the_batchs():
    found = answer(504, own_error(504, "deadline_exceeded"), error_class="deadline_exceeded")
    assert written(found, Status.EXPIRED)["error"]["code"] == "batch_expired"
    assert written(found, Status.CANCELLED)["error"]["code"] == "batch_cancelled"
    assert written(found, Status.EXPIRED)["response"] is None


@pytest.mark.parametrize(
    "attributes",
    [{}, {"run_id": "r-1", "line_id": "1"}, {"run_id": BATCH_ID}, {**PLACE, "line_id": "x"}, {**PLACE, "line_id": "-1"},
     {**PLACE, "line_id": "9" * 12}, {**PLACE, "line_id": "²"}],
)  # fmt: skip
def test_an_answer_to_something_else_is_not_taken(attributes):
    assert outcome_of(b'{"status_code":200,"body":{}}', attributes) is None


def test_a_line_that_the_batch_ended_before():
    line = json.loads(ended_line(BATCH_ID, 7, b'"c"', Status.CANCELLED))
    assert line["error"]["code"] == "batch_cancelled"
    assert line["id"] == f"batch_req_{BATCH_ID[6:]}00000007"


def test_a_line_break_in_a_body_does_not_break_the_line():
    assert written(answer(200, b'{\r\n "a":\n 1}'))["response"]["body"] == {"a": 1}


@pytest.mark.parametrize("attributes", [{}, {**PLACE, "line_id": "x"}, {**PLACE, "run_id": "8f14e45fceea"}])
def test_a_dead_letter_of_another_request_is_no_result(attributes: dict[str, str]):
    assert dead_letter_of(b"{}", attributes) is None


def test_a_dead_letter_without_a_count_is_a_result_all_the_same():
    found = dead_letter_of(b"not JSON", {**PLACE, "CloudPubSubDeadLetterSourceDeliveryCount": "\u0662"})
    assert found is not None
    assert (found.record, found.is_ok, found.code, found.body) == (3, False, "dead_lettered", None)
    assert found.message == "The request was delivered as often as it may be and no worker answered it."


@pytest.mark.parametrize(
    ("metadata", "line"),
    [('{"batch_id":"b","line":7}', 7), ("{}", None), ('{"line":0}', None), ('{"line":3000000000}', None), ("7", None)],
)
def test_a_result_knows_its_line_if_the_answer_tells_it(metadata: str, line: int | None):
    answer_ = b'{"status_code":200,"metadata":%s,"body":{}}' % metadata.encode()
    found, dead = outcome_of(answer_, PLACE), dead_letter_of(b'{"metadata":%s}' % metadata.encode(), PLACE)
    assert found is not None
    assert dead is not None
    assert found.line == dead.line == line
