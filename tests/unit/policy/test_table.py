"""The built-in table: every row pinned, every class reachable, the order of what counts."""

import json

import pytest

from tests.support.policy import classify
from worker.policy.model import BreakerAction, Disposition, ErrorClass, ErrorEvent, Fault, Phase, Scope
from worker.policy.reply import error_reply
from worker.policy.table import ROWS

CHAT = "/v1/chat/completions"


def an_event(status: int | None = 200, body: bytes | dict = b"", **changes) -> ErrorEvent:
    """An attempt's end on the chat path, complete unless said otherwise."""
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    given = {"backend": "default", "path": CHAT, "phase": Phase.BODY, "status": status, "body": data}
    return ErrorEvent(**(given | changes))


def verdict(event: ErrorEvent, **how) -> tuple[str | None, str]:
    """Class and disposition of the built-in table."""
    decision = classify(event, **how)
    return decision.error_class, decision.disposition


REPLY, NACK, HOLD = Disposition.REPLY, Disposition.NACK, Disposition.HOLD
BY_DISPOSITION = {do: {name for name, row in ROWS.items() if row.do is do} for do in Disposition}


def test_every_class_has_a_row():
    """No failure is without an answer to what is done about it."""
    assert set(ROWS) == set(ErrorClass)


def test_what_is_held_concerns_every_message():
    """Capacity, account, credentials and reachability are nobody's message: they are held, and tell the breaker."""
    of_backends = {"rate_limited", "overloaded", "quota", "auth", "not_ready", "connect"}
    assert BY_DISPOSITION[HOLD] == of_backends | {"payload_unavailable"}
    assert all(ROWS[name].breaker is not BreakerAction.NONE for name in of_backends)
    assert all(ROWS[name].max_attempts is None for name in BY_DISPOSITION[HOLD])


def test_what_is_answered_at_once_is_the_requests_own():
    """A second attempt cannot mend it: it is no failure of the backend."""
    assert all(ROWS[name].breaker is BreakerAction.NONE for name in BY_DISPOSITION[REPLY])
    assert {name for name in BY_DISPOSITION[REPLY] if ROWS[name].retryable} == {"deadline_exceeded"}


def test_what_is_tried_again_may_succeed_later():
    """Held or nacked, the requester is told that the same request could succeed."""
    assert all(ROWS[name].retryable for name in BY_DISPOSITION[HOLD] | BY_DISPOSITION[NACK])


def test_capacity_is_the_windows_affair():
    """An overload decreases the window; for the breaker it is one failure in a row, never a reason to open at once."""
    assert {name for name, row in ROWS.items() if row.is_overload} == {"rate_limited", "overloaded"}
    assert all(row.breaker is BreakerAction.COUNT for row in ROWS.values() if row.is_overload)


def test_what_costs_a_generation_has_a_limit_of_attempts():
    """A timeout, a stalled or broken stream, a useless answer: each attempt may have cost minutes of a GPU."""
    limited = {name: row.max_attempts for name, row in ROWS.items() if row.max_attempts is not None}
    assert limited == {"timeout": 2, "malformed": 3, "empty_answer": 2, "stream_broken": 3, "stream_idle": 2}


def test_an_error_is_answered_as_an_error():
    """Whatever the backend's status was, the answer's is an error's, and the worker has words for it."""
    for row in ROWS.values():
        assert 400 <= row.fixed_status <= 599
        assert row.says.endswith(".")


def test_only_ours_and_credentials_hide_the_backend():
    """What a backend says about credentials, and what an internal fault left behind, concerns no requester."""
    assert {name for name, row in ROWS.items() if not row.expose_backend} == {"auth", "internal_error"}
    assert all(not row.verbatim for row in ROWS.values() if not row.expose_backend)


def test_only_the_host_and_the_account_concern_every_model():
    """What else fails says nothing about another model behind the same address."""
    assert {name for name, row in ROWS.items() if row.scope is Scope.BACKEND} == {"auth", "quota", "connect"}


@pytest.mark.parametrize(
    ("fault", "phase", "expected"),
    [
        (Fault.CONNECT, Phase.CONNECT, "connect"),
        (Fault.CONNECT_TIMEOUT, Phase.CONNECT, "connect"),
        (Fault.FIRST_BYTE_TIMEOUT, Phase.HEADERS, "timeout"),
        (Fault.IDLE_TIMEOUT, Phase.STREAM, "stream_idle"),
        (Fault.TOTAL_TIMEOUT, Phase.BODY, "timeout"),
        (Fault.TOTAL_TIMEOUT, Phase.STREAM, "timeout"),
        (Fault.CONNECTION_LOST, Phase.HEADERS, "connection_lost"),
        (Fault.CONNECTION_LOST, Phase.BODY, "connection_lost"),
        (Fault.CONNECTION_LOST, Phase.STREAM, "stream_broken"),
        (Fault.DECODING, Phase.BODY, "malformed"),
        (Fault.DECODING, Phase.STREAM, "stream_broken"),
        (Fault.RESPONSE_TOO_LARGE, Phase.BODY, "reply_too_large"),
        (Fault.STREAM_BROKEN, Phase.STREAM, "stream_broken"),
        (Fault.INTERNAL, Phase.PREPARE, "internal_error"),
    ],
)
@pytest.mark.parametrize("status", [None, 200])
def test_a_fault_decides_where_no_error_status_came(fault, phase, expected, status):
    """What broke, and how far the attempt had come, is the class; a success status does not change it."""
    assert verdict(an_event(status, fault=fault, phase=phase))[0] == expected


def test_object_storage_is_no_backend():
    """A body that cannot be fetched tells breaker and window nothing; its class is named like its fault."""
    faults = [fault for fault in Fault if fault.startswith("payload_")]
    assert len(faults) == 5
    for fault in faults:
        decision = classify(an_event(None, fault=fault, phase=Phase.PREPARE))
        assert decision.error_class == fault
        assert (decision.breaker, decision.is_overload) == (BreakerAction.NONE, False)


def test_every_fault_is_classified():
    """No kind of failure of the backend port is without a class."""
    for fault in Fault:
        assert classify(an_event(None, fault=fault)).error_class is not None


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        *((status, "auth") for status in (301, 302, 303, 307, 308)),
        *((status, "malformed") for status in (101, 204, 205, 206, 226, 300, 304, 600, 799, 999)),
        *((status, "invalid_request") for status in (400, 404, 405, 410, 413, 415, 422, 451, 501)),
        (401, "auth"),
        (402, "quota"),
        (403, "forbidden"),
        (407, "auth"),
        *((status, "timeout") for status in (408, 499)),
        *((status, "server_error") for status in (409, 424, 425, 500, 502, 504, 508, 520, 529, 530, 599)),
        (429, "rate_limited"),
        (503, "overloaded"),
    ],
)
@pytest.mark.parametrize("body", [b"", b"<html><body>x</body></html>", b'{"error": {"message": "x"}}'])
def test_a_bare_status(status, expected, body):
    """Without a known word in the body the status alone decides."""
    assert verdict(an_event(status, body))[0] == expected


def test_a_status_is_the_whole_truth_even_if_the_body_broke():
    """A 429 whose body was cut is still a 429 with its Retry-After, not a lost connection."""
    event = an_event(429, b'{"err', fault=Fault.CONNECTION_LOST, headers={"retry-after": "7"})
    decision = classify(event)
    assert (decision.error_class, decision.retry_after_s) == (ErrorClass.RATE_LIMITED, 7.0)


@pytest.mark.parametrize("headers", [{}, {"retry-after": "0"}, {"retry-after": "3600"}, {"retry-after-ms": "250"}])
def test_a_rate_limit_counts_whatever_it_asks_for(headers):
    """Retry-After says how long to wait; it does not make one refused message a reason to stop everything."""
    decision = classify(an_event(429, headers=headers))
    assert decision.breaker is BreakerAction.COUNT
    assert decision.is_overload


def test_an_answer_carries_no_retry_after():
    """Retry-After means something only where there is a next try."""
    assert classify(an_event(400, headers={"retry-after": "5"})).retry_after_s is None
    assert classify(an_event(500, headers={"retry-after": "5"})).retry_after_s == 5.0


@pytest.mark.parametrize("body", [b"", b"<html>Forbidden</html>", {"error": {"code": 403, "message": "no"}}])
def test_the_third_403_of_a_row_is_about_our_credentials(body):
    """A refused model or path says nothing about the others; three without a success between do."""
    assert verdict(an_event(403, body), forbidden_in_a_row=1) == ("forbidden", "reply")
    assert verdict(an_event(403, body), forbidden_in_a_row=2) == ("forbidden", "reply")
    assert verdict(an_event(403, body), forbidden_in_a_row=3) == ("auth", "hold")


def test_a_row_of_403s_is_the_same_inside_a_stream():
    """An error event that comes first is judged as the HTTP error that it names."""
    event = an_event(200, {"error": {"code": 403, "message": "no"}}, in_stream=True)
    assert verdict(event, forbidden_in_a_row=1) == ("forbidden", "reply")
    assert verdict(event, forbidden_in_a_row=3) == ("auth", "hold")


@pytest.mark.parametrize(
    "event",
    [
        an_event(403, {"error": {"code": "content_filter", "message": "x"}}),
        an_event(403, {"error": {"code": "context_length_exceeded", "message": "x"}}),
        an_event(403, {"error": {"code": "insufficient_quota", "message": "x"}}),
        an_event(400),
        an_event(404),
        an_event(500),
    ],
)
def test_a_row_of_403s_concerns_no_other_class(event):
    """What a 403 says in known words, and every other status, means what it means without a row."""
    assert verdict(event, forbidden_in_a_row=9) == verdict(event)


def test_a_conflict_is_tried_twice():
    """A 409 is a lock timeout to OpenAI's client: it is nacked, but not for ever."""
    decision = classify(an_event(409))
    assert (decision.disposition, decision.max_attempts, decision.reply_status) == (Disposition.NACK, 2, 409)


@pytest.mark.parametrize(
    ("status", "value", "expected"),
    [
        (500, "false", ("server_error", "reply")),
        (408, "false", ("timeout", "reply")),
        (500, "true", ("server_error", "nack")),
        (400, "true", ("invalid_request", "nack")),
        (400, "false", ("invalid_request", "reply")),
        (429, "false", ("rate_limited", "hold")),
        (401, "false", ("auth", "hold")),
        (500, "maybe", ("server_error", "nack")),
    ],
)
def test_x_should_retry_counts_where_it_concerns_the_message(status, value, expected):
    """The backend's verdict makes a server error final or a refusal retryable, but never answers a held queue."""
    assert verdict(an_event(status, headers={"x-should-retry": value})) == expected


@pytest.mark.parametrize(
    ("body", "has_partial", "expected"),
    [
        ({"error": {"message": "x", "code": 503}}, False, "overloaded"),
        ({"error": {"message": "x", "code": 503}}, True, "stream_broken"),
        ({"error": {"message": "x", "code": "429"}}, False, "rate_limited"),
        ({"error": {"message": "x", "code": "429"}}, True, "stream_broken"),
        ({"error": {"message": "x", "code": 400, "type": "BadRequestError"}}, True, "invalid_request"),
        ({"error": {"message": "x", "code": 404, "type": "NotFoundError", "param": "model"}}, False, "model_not_found"),
        ({"error": {"message": "x", "http_status_code": 422}}, True, "stream_broken"),
        ({"error": {"message": "x", "http_status_code": 422}}, False, "stream_broken"),
        ({"error": {"message": "x", "http_status_code": 500}}, False, "server_error"),
        ({"error": {"message": "x", "code": "content_filter"}}, True, "content_filter"),
        ({"error": {"message": "x", "code": "insufficient_quota"}}, True, "quota"),
        ({"error": {"message": "x"}}, False, "stream_broken"),
        ({"type": "error", "code": "rate_limit_exceeded", "message": "x", "param": None}, False, "rate_limited"),
        ({"type": "error", "code": "server_error", "message": "x", "param": None}, False, "stream_broken"),
        ({"ErrorCode": "ModelInvocationTimeExceeded", "Message": "x"}, True, "model_time_exceeded"),
        ({"ErrorCode": "StreamBroken", "Message": "x"}, False, "stream_broken"),
        (b'{"choices": [{"delta": {"content": "This mod', True, "stream_broken"),
        (b"", True, "stream_broken"),
    ],
)
def test_an_error_inside_a_stream(body, has_partial, expected):
    """As the first event it is a plain error with its own code; after text has come it broke the stream, unless final."""
    event = an_event(200, body, in_stream=True, has_partial=has_partial, phase=Phase.STREAM)
    assert verdict(event)[0] == expected
    assert (
        verdict(an_event(200, body, in_stream=True, has_partial=has_partial, fault=Fault.STREAM_BROKEN))[0] == expected
    )


def test_a_stream_that_stalls_is_idle_whatever_was_sent_before():
    """Without an error event the fault names the class inside a stream too."""
    event = an_event(200, b"", in_stream=True, has_partial=True, fault=Fault.IDLE_TIMEOUT, phase=Phase.STREAM)
    assert verdict(event)[0] == "stream_idle"


def test_an_event_without_status_and_fault_is_ours_to_fix():
    """Neither a response nor a reason is a fault of the worker."""
    assert verdict(an_event(None)) == ("internal_error", "nack")


def test_the_credentials_text_never_becomes_a_message():
    """OpenAI's 401 quotes the key; the decision carries our words instead."""
    body = {"error": {"message": "Incorrect API key provided: sk-abc***xyz", "code": "invalid_api_key"}}
    decision = classify(an_event(401, body))
    assert "sk-" not in decision.message
    assert (decision.verbatim, decision.expose_backend) == (False, False)


ANSWER = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}]}


@pytest.mark.parametrize(
    ("status", "is_good"),
    [*((status, True) for status in (200, 201, 202, 203)), *((status, False) for status in (204, 205, 206, 226, 304))],
)
def test_only_some_statuses_make_a_body_an_answer(status, is_good):
    """A part of an answer is none, and 204 and 205 have no body."""
    assert (verdict(an_event(status, ANSWER))[0] is None) is is_good


@pytest.mark.parametrize("status", [206, 304, 500, 503, 600, 999])
def test_a_success_object_is_never_an_error_answer(status):
    """Under a status that is no success it would read as an answer; the requester gets an envelope."""
    event = an_event(status, ANSWER)
    code, body = error_reply(classify(event), event, attempts=1)
    assert 400 <= code <= 599
    assert json.loads(body)["error"]["message"]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_the_operators_mistake(status):
    """Every message gets it: held, the route stopped, and the place it points to named."""
    decision = classify(an_event(status, b"<html>", headers={"location": "https://h/v1"}))
    assert (decision.disposition, decision.breaker) == (HOLD, BreakerAction.TRIP)
    assert "https://h/v1" in decision.message


@pytest.mark.parametrize("fault", [Fault.CONNECT, Fault.CONNECTION_LOST, Fault.DECODING, Fault.STREAM_BROKEN])
def test_what_broke_is_said(fault):
    """The library's or the parser's words stand in the message, bounded; those of our own faults do not."""
    decision = classify(an_event(None, fault=fault, detail="BadStatusLine: SSH-2.0 " + "x" * 5000))
    assert "BadStatusLine: SSH-2.0 xxx" in decision.message
    assert len(decision.message) < 700
    assert "secret" not in classify(an_event(None, fault=Fault.INTERNAL, detail="KeyError: secret")).message
