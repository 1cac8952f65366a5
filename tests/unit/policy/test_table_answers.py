"""Success statuses: what is an answer, and what only looks like one."""

import json

import pytest

from tests.support.policy import classify
from worker.policy.model import BreakerAction, ErrorEvent, Phase

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


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        (CHAT, {"choices": [{"finish_reason": "stop"}]}, None),
        (CHAT, {"choices": [{"finish_reason": "content_filter"}]}, None),
        (CHAT, {"choices": [{"finish_reason": "length"}, {"finish_reason": "abort"}]}, "aborted"),
        (CHAT, {"choices": [{"finish_reason": "error"}]}, "aborted"),
        (CHAT, {"choices": [{"finish_reason": None}]}, None),
        (CHAT, {"choices": [{"finish_reason": 7}]}, None),
        (CHAT, {"choices": []}, "empty_answer"),
        (CHAT, {"choices": None}, "empty_answer"),
        (CHAT, {"id": "x"}, "empty_answer"),
        (CHAT, {"choices": {"a": 1}}, "malformed"),
        (CHAT, {"choices": ["text"]}, "malformed"),
        (CHAT, {"error": {"message": "upstream", "code": 502}}, "server_error"),
        (CHAT, {"error": {"message": "slow down", "code": 429}}, "rate_limited"),
        (CHAT, {"error": {"message": "x", "code": "insufficient_quota"}}, "quota"),
        (CHAT, {"error": "no idea"}, "server_error"),
        ("/v1/completions", {"choices": [{"text": "x", "finish_reason": "stop"}]}, None),
        ("/v1/completions", {"choices": []}, "empty_answer"),
        ("/v1/embeddings", {"data": [{"embedding": [0.1]}]}, None),
        ("/v1/embeddings", {"data": []}, "empty_answer"),
        ("/v1/embeddings", {"object": "list"}, "empty_answer"),
        ("/v1/responses", {"status": "completed", "output": [{}], "error": None}, None),
        ("/v1/responses", {"status": "incomplete", "output": []}, None),
        ("/v1/responses", {"status": "queued", "output": []}, None),
        ("/v1/responses", {"output": [{}]}, None),
        ("/v1/responses", {"status": "completed", "output": []}, "empty_answer"),
        ("/v1/responses", {"status": "completed"}, "empty_answer"),
        ("/v1/responses", {"status": "cancelled", "output": []}, "aborted"),
        ("/v1/responses", {"status": "failed", "error": {"code": "server_error", "message": "x"}}, "server_error"),
        ("/v1/responses", {"status": "failed", "error": {"code": "rate_limit_exceeded"}}, "rate_limited"),
        ("/v1/responses", {"status": "failed", "error": {"code": "invalid_prompt"}}, "invalid_request"),
        ("/v1/responses", {"status": "failed", "error": None}, "server_error"),
        ("/v1/rerank", {"results": []}, None),
        ("/v1/rerank", {}, None),
    ],
)
def test_a_success_status_needs_an_answer(path, body, expected):
    """A 2xx is judged by its body: what each path must hold, what says error, and who gave up."""
    assert verdict(an_event(200, body, path=path))[0] == expected


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"   ",
        b"null",
        b"[]",
        b'"text"',
        b"<html></html>",
        b'{"choices": [{"finish_reason": "stop"}]',
        b'{"choices": [{"finish_reason": "stop"}]} x',
        b'{"choices": [{"finish_reason": "stop", "logprob": NaN}]}',
        b'{"choices": [{"finish_reason": "stop", "logprob": -Infinity}]}',
        b'{"choices": [{"finish_reason": "stop", "text": "\xff"}]}',
        b'{"choices": [{"finish_reason": "stop", "text": "\\ud800", "logprob": NaN}]}',
        b'\xef\xbb\xbf{"choices": [{"finish_reason": "stop"}]}',
        b"[" * 100_000,
        b'{"choices": ' + b"[" * 100_000,
    ],
    ids=range(15),
)
def test_a_success_status_with_something_else_than_json_is_malformed(body):
    """Empty, cut, HTML, NaN, invalid UTF-8, too deep: none of it may stand in a message."""
    assert verdict(an_event(200, body)) == ("malformed", "nack")


@pytest.mark.parametrize(
    "text", [rb"\ud800", rb"\uDFFF tail", rb"\ud83d\ude00", "\u2028 ä".encode(), b"\xf0\x9f\x98\x80"]
)
def test_strange_text_does_not_make_an_answer_malformed(text):
    """A lone surrogate is grammatical JSON (RFC 8259, 8.2): the answer it stands in is not thrown away."""
    body = b'{"choices": [{"finish_reason": "stop", "message": {"content": "' + text + b'"}}]}'
    decision = classify(an_event(200, body))
    assert (decision.error_class, decision.breaker) == (None, BreakerAction.SUCCESS)


def test_a_good_answer_keeps_its_status():
    """A 201 is answered as 201."""
    body = {"choices": [{"finish_reason": "stop"}]}
    assert classify(an_event(201, body)).reply_status == 201


def test_nothing_embedded_is_right_when_nothing_was_asked():
    """An empty `data` answers an empty `input`."""
    assert verdict(an_event(200, {"data": []}, path="/v1/embeddings", input_is_empty=True))[0] is None
