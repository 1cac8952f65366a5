"""Error answers: always one JSON object of bounded size, never the credentials' text, never a partial 200."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.policy import classify
from worker.policy import reply
from worker.policy.budgets import Budget, apply_budgets
from worker.policy.model import Decision, ErrorEvent, Fault, Phase


def an_event(status: int | None, body: bytes = b"", **changes) -> ErrorEvent:
    """An attempt's end on the chat path."""
    given_ = {"backend": "b", "path": "/v1/chat/completions", "phase": Phase.BODY, "status": status, "body": body}
    return ErrorEvent(**(given_ | changes))


def answer(event: ErrorEvent, **how) -> tuple[int, dict]:
    """Status and parsed body of the answer the table leads to."""
    status, body = reply.error_reply(classify(event), event, attempts=how.pop("attempts", 1), **how)
    return status, json.loads(body)


@pytest.mark.parametrize(
    "body",
    [
        b'{"error":{"message":"x","type":null,"param":null,"code":null}}',
        b'  {"error" : {"message":"big", "n": 123456789012345678901234567890}}  ',
        b'{"detail":[{"loc":["body"],"msg":"x"}]}',
        rb'{"error":{"message":"\ud800"}}',
    ],
)
def test_the_backends_json_stands_as_it_is(body):
    """An error object is passed on byte for byte, spaces around it aside."""
    event = an_event(422, body)
    assert reply.error_reply(classify(event), event, attempts=1) == (422, body.strip())


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (
            b"<html><head><title>502 Bad Gateway</title></head></html>",
            "<html><head><title>502 Bad Gateway</title></head></html>",
        ),
        (b"", None),
        (b'{"error": {"mess', '{"error": {"mess'),
        (b"\xff\xfe broken", "\ufffd\ufffd broken"),
        (b'{"error": {"message": "\xff"}}', '{"error": {"message": "\ufffd"}}'),
        (b'{"error": NaN}', '{"error": NaN}'),
        (b"[1,2]", "[1,2]"),
    ],
    ids=["html", "empty", "half", "not utf-8", "json not utf-8", "nan", "list"],
)
def test_anything_else_goes_into_the_envelope(body, text):
    """Whatever the backend sent, the answer is well-formed and holds the text, bounded."""
    status, parsed = answer(an_event(500, body, headers={"x-request-id": "r-1"}), attempts=3)
    assert status == 500
    assert parsed["error"]["backend"] == {"status": 500, "body": None, "text": text, "request_id": "r-1"}
    assert {"type": "backend_error", "code": "server_error", "attempts": 3, "retryable": True}.items() <= parsed[
        "error"
    ].items()
    assert parsed.keys() == {"error"}


def test_text_is_bounded():
    """A page of megabytes leaves 2 KiB, without a character cut in half."""
    _, parsed = answer(an_event(502, "ä".encode() * 3_000_000))
    assert parsed["error"]["backend"]["text"] == "ä" * 1024
    assert len(parsed["error"]["message"].encode()) <= 2048


def test_a_huge_error_object_is_not_passed_on():
    """A validation error that echoes a prompt of megabytes becomes an envelope."""
    status, parsed = answer(an_event(422, json.dumps({"detail": "x" * 1_000_000}).encode()))
    assert (status, parsed["error"]["backend"]["body"]) == (422, None)


def test_the_credentials_text_is_not_leaked():
    """An answer about refused credentials holds nothing of what the backend said."""
    event = an_event(401, b'{"error":{"message":"Incorrect API key provided: sk-1","param":"sk-1"}}')
    status, body = reply.error_reply(classify(event), event, attempts=1)
    assert status == 502
    assert b"sk-1" not in body
    assert json.loads(body)["error"]["backend"] is None


def test_the_credentials_text_is_not_leaked_past_the_deadline():
    """A budget that turns the answer into another class does not lift the cover."""
    event = an_event(401, b'{"error":{"message":"sk-1"}}')
    budget = Budget(max_delivery_attempts=5, delivery_attempt=1, lease_left_s=9, hold_max_s=9, deadline_left_s=0)
    decision = apply_budgets(classify(event), budget)
    status, body = reply.error_reply(decision, event, attempts=1)
    assert (status, b"sk-1" in body) == (504, False)
    assert json.loads(body)["error"]["code"] == "deadline_exceeded"


def test_a_partial_answer_is_marked_and_never_a_success():
    """What was accumulated of a broken stream is salvaged, beside the error."""
    partial = b'{"choices":[{"index":0,"message":{"content":"Hel"},"finish_reason":null}]}'
    event = an_event(200, fault=Fault.CONNECTION_LOST, phase=Phase.STREAM, has_partial=True)
    status, parsed = answer(event, partial=partial)
    assert (status, parsed["truncated"], parsed["partial"]) == (502, True, json.loads(partial))


def test_a_final_error_inside_a_stream_carries_the_partial():
    """Even where the error object could stand verbatim, the text that came before it is kept."""
    event = an_event(200, b'{"error":{"message":"no","code":400}}', in_stream=True, has_partial=True)
    status, parsed = answer(event, partial=b'{"choices":[]}')
    assert (status, parsed["error"]["backend"]["body"]["error"]["message"]) == (400, "no")


@pytest.mark.parametrize("partial", [b"", None, b"{", b"[]", b"NaN"])
def test_no_partial_no_truncation(partial):
    """`truncated` is there only with a partial that is a JSON object."""
    _, parsed = answer(an_event(None, fault=Fault.CONNECTION_LOST), partial=partial)
    assert parsed.keys() == {"error"}


def test_an_aborted_answer_is_its_own_partial():
    """What the backend had when it gave up stands once in the answer, as the partial."""
    body = b'{"choices":[{"message":{"content":"Hel"},"finish_reason":"abort"}]}'
    status, parsed = answer(an_event(200, body))
    assert (status, parsed["partial"], parsed["truncated"]) == (503, json.loads(body), True)
    assert parsed["error"]["backend"]["body"] is None


def test_an_event_stream_under_an_error_status_is_unwrapped():
    """LiteLLM's frame becomes the JSON object inside it."""
    event = an_event(429, b'data: {"error":{"message":"x","code":"429"}}\n\ndata: [DONE]\n\n')
    assert answer(event) == (429, {"error": {"message": "x", "code": "429"}})


def test_the_container_behind_sagemaker_is_what_counts():
    """A ModelError is answered with the container's own status and body."""
    body = {"Message": "m", "OriginalStatusCode": 422, "OriginalMessage": '{"error":"bad","error_type":"validation"}'}
    event = an_event(424, json.dumps(body).encode(), headers={"x-amzn-errortype": "ModelError:http://x/"})
    assert answer(event) == (422, {"error": "bad", "error_type": "validation"})


def test_an_empty_success_does_not_pass_for_an_answer():
    """A success object without choices stands inside the envelope, not as the body of a 502."""
    status, parsed = answer(an_event(200, b'{"id":"x","choices":[]}'))
    assert (status, parsed["error"]["backend"]["body"]) == (502, {"id": "x", "choices": []})


def test_an_operators_code_stands_in_the_envelope():
    """A rule that sets a code gets an envelope with that code, although the body could stand as it is."""
    event = an_event(400, b'{"error":{"message":"x","param":"p"}}')
    decision = Decision(disposition="reply", error_class="invalid_request", reply_status=451, reply_code="blocked")
    status, body = reply.error_reply(decision, event, attempts=1)
    error = json.loads(body)["error"]
    assert (status, error["code"], error["param"]) == (451, "blocked", "p")


def test_bodies_of_the_workers_own():
    """What never reached a backend is answered in the same envelope, marked as ours."""
    bodies = {
        "bad_message": reply.bad_message_body("unknown key: 'promt'", param="promt"),
        "reply_too_large": reply.reply_too_large_body(11_000_000, 10_000_000, attempts=2),
        "reply_refused": reply.reply_refused_body(attempts=2),
        "idempotency_conflict": reply.idempotency_conflict_body("k" * 10_000),
    }
    for code, body in bodies.items():
        error = json.loads(body)["error"]
        assert (error["code"], error["type"], error["backend"]) == (code, "worker_error", None)
        assert error["message"]
        assert len(body) < 4096
    assert json.loads(bodies["bad_message"])["error"]["param"] == "promt"


headers = st.dictionaries(
    st.sampled_from(
        ["content-type", "retry-after", "retry-after-ms", "x-should-retry", "x-amzn-errortype", "x-request-id"]
    ),
    st.one_of(st.text(max_size=40), st.sampled_from(["text/event-stream", "ModelError:http://x", "12", "true"])),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "error",
                    "message",
                    "detail",
                    "code",
                    "type",
                    "status",
                    "OriginalStatusCode",
                    "OriginalMessage",
                    "choices",
                    "innererror",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
bodies = st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode())


@given(
    status=st.none() | st.integers(100, 599),
    headers=headers,
    body=bodies,
    fault=st.none() | st.sampled_from(Fault),
    phase=st.sampled_from(Phase),
    in_stream=st.booleans(),
    has_partial=st.booleans(),
    partial=st.none() | st.binary(max_size=20) | st.just(b'{"choices":[]}'),
)
def test_no_response_at_all_can_break_judging_or_answering(partial, **what):
    """Any status, headers, bytes and fault lead to a decision, and every error to one JSON object of bounded size."""
    event = ErrorEvent(backend="b", path="/v1/chat/completions", **what)
    decision = classify(event)
    if decision.error_class is None:
        assert json.loads(event.body)
        return
    status, body = reply.error_reply(decision, event, attempts=1, partial=partial)
    assert 400 <= status <= 599
    assert len(body) <= reply.MAX_ENVELOPE_BYTES
    parsed = json.loads(body)
    assert isinstance(parsed, dict)
    assert ("truncated" in parsed) == ("partial" in parsed)
    assert decision.retry_after_s is None or 0.0 <= decision.retry_after_s <= 86_400.0


@pytest.mark.parametrize(
    "body", [b"bye", b"upstream timed out", b": x\n\n", b"\x00\x01", b"<html>", b"data: [DONE]\n\n"]
)
@pytest.mark.parametrize("content_type", ["text/event-stream", "application/json"])
def test_a_stream_that_cannot_be_read_leaves_its_first_bytes(body: bytes, content_type: str) -> None:
    """Whatever they are, and whatever they are called."""
    event = an_event(
        200,
        body,
        headers={"content-type": content_type},
        phase=Phase.STREAM,
        fault=Fault.STREAM_BROKEN,
        detail="an event is not JSON",
    )
    status, answered = answer(event)
    assert (status, answered["error"]["backend"]["text"]) == (502, body.decode())
    assert "an event is not JSON" in answered["error"]["message"]
