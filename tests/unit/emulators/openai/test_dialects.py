"""Errors in eight dialects."""

import json
from typing import Any

import pytest

from worker.emulators.openai.dialects import DIALECTS, Kind, SimError, error_answer, stream_error

FACTS: dict[str, Any] = {"model": "m", "tokens": 200, "window": 100, "method": "POST", "path": "/x"}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("kind", Kind)
def test_every_dialect_spells_every_kind(dialect: str, kind: Kind) -> None:
    """Each error has a status of an error and a body that no template shows through."""
    answer = error_answer(dialect, SimError(kind, **FACTS), path="/v1/chat/completions")
    assert 400 <= answer.status < 600
    assert b"{window}" not in answer.body
    assert b"?" not in answer.body
    if answer.content_type == "application/json":
        assert isinstance(json.loads(answer.body), dict)


@pytest.mark.parametrize(
    ("dialect", "kind", "status", "expected"),
    [
        ("openai", Kind.QUOTA, 429, {"error": {"type": "insufficient_quota", "code": "insufficient_quota"}}),
        ("openai", Kind.CONTEXT_LENGTH, 400, {"error": {"code": "context_length_exceeded"}}),
        ("openai", Kind.MODEL_NOT_FOUND, 404, {"error": {"code": "model_not_found"}}),
        ("azure", Kind.CONTENT_FILTER, 400, {"error": {"code": "content_filter", "innererror": {"code": "ResponsibleAIPolicyViolation"}}}),
        ("azure", Kind.RATE_LIMIT, 429, {"error": {"code": "429"}}),
        ("vllm", Kind.MODEL_NOT_FOUND, 404, {"error": {"type": "NotFoundError", "param": "model", "code": 404}}),
        ("vllm", Kind.UNAUTHORIZED, 401, {"error": "Unauthorized"}),
        ("vllm", Kind.NOT_FOUND, 404, {"detail": "Not Found"}),
        ("vllm", Kind.OVERLOADED, 503, {"error": {"type": "ServiceUnavailableError", "code": 503}}),
        ("sglang", Kind.CONTEXT_LENGTH, 400, {"object": "error", "type": "BadRequestError", "code": 400}),
        ("tgi", Kind.OVERLOADED, 429, {"error": "Model is overloaded", "error_type": "overloaded"}),
        ("tgi", Kind.CONTEXT_LENGTH, 422, {"error_type": "validation"}),
        ("tgi", Kind.SERVER_ERROR, 424, {"error_type": "generation"}),
        ("llamacpp", Kind.NOT_READY, 503, {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}),
        ("llamacpp", Kind.CONTEXT_LENGTH, 400, {"error": {"type": "exceed_context_size_error", "n_prompt_tokens": 200, "n_ctx": 100}}),
        ("ollama", Kind.MODEL_NOT_FOUND, 404, {"error": {"type": "not_found_error", "code": None}}),
        ("litellm", Kind.RATE_LIMIT, 429, {"error": {"code": "429"}}),
    ],
)  # fmt: skip
def test_dialects_have_their_own_shapes(dialect: str, kind: Kind, status: int, expected: dict[str, Any]) -> None:
    """The fields that tell the dialects apart are where each server puts them."""
    answer = error_answer(dialect, SimError(kind, **FACTS))
    assert answer.status == status
    assert_contains(json.loads(answer.body), expected)


def assert_contains(found: Any, expected: Any) -> None:
    """Check that every key of `expected` is in `found` with that value."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            assert_contains(found[key], value)
    else:
        assert found == expected


def test_sglang_nests_errors_of_the_responses_api() -> None:
    """SGLang's flat error is nested for `/v1/responses`."""
    error = SimError(Kind.INVALID_REQUEST, "no")
    assert json.loads(error_answer("sglang", error, path="/v1/responses").body)["error"]["code"] == 400
    assert "error" not in json.loads(error_answer("sglang", error, path="/v1/completions").body)


def test_tgi_answers_a_missing_key_with_nothing() -> None:
    """TGI's 401 has an empty body."""
    answer = error_answer("tgi", SimError(Kind.UNAUTHORIZED))
    assert (answer.status, answer.body) == (401, b"")


def test_litellm_answers_streams_with_an_event() -> None:
    """LiteLLM sends a server-sent event with an error status to a request that asked for a stream."""
    answer = error_answer("litellm", SimError(Kind.RATE_LIMIT), streamed=True)
    assert (answer.status, answer.content_type) == (429, "text/event-stream")
    assert answer.body.startswith(b'data: {"error":')


def test_own_status_message_and_headers_win() -> None:
    """What the caller says about an error replaces the dialect's words."""
    error = SimError(Kind.SERVER_ERROR, "boom", status=503, code="x", headers={"Retry-After": "1"})
    answer = error_answer("tgi", error)
    assert (answer.status, answer.headers) == (503, {"Retry-After": "1"})
    assert json.loads(answer.body)["error"] == "boom"


def test_errors_inside_streams() -> None:
    """Codes are usable statuses, except TGI's constant 422; Ollama says nothing at all."""
    error = SimError(Kind.OVERLOADED, status=503)
    assert {
        name: (stream_error(name, error) or {}).get("error", {}).get("code") for name in ("vllm", "sglang", "litellm")
    } == {
        "vllm": 503,
        "sglang": 503,
        "litellm": "503",
    }
    assert stream_error("tgi", error) == {"error": {"message": "Model is overloaded", "http_status_code": 422}}
    assert stream_error("ollama", error) is None
    assert isinstance((stream_error("vllm", SimError(Kind.UNAUTHORIZED)) or {})["error"], dict)
