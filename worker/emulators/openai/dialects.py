"""
How the servers that all speak "OpenAI" differ: in their answers, and in how they write an error.

A `Dialect` has one field per difference that breaks naive clients.  `SimError` names a fault in a word of no dialect;
`error_answer` turns it into the status and the bytes that a client of a dialect sees, `stream_error` into the event in
the middle of a stream.  Texts that a client must recognise (a context length, a loading model) carry the servers' key
words, the rest is ours.

Source: published code and documentation of the servers, not captured traffic: https://github.com/vllm-project/vllm,
https://github.com/sgl-project/sglang, https://github.com/huggingface/text-generation-inference,
https://github.com/ggml-org/llama.cpp (tools/server), https://github.com/ollama/ollama (openai/openai.go),
https://github.com/BerriAI/litellm, https://learn.microsoft.com/azure/ai-services/openai/reference.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import msgspec

UsageOn = Literal["own_chunk", "empty_delta", "finish_chunk", "first_chunk"]
"""A chunk with empty `choices`; one more chunk with an empty delta; the last chunk with a finish_reason; the first."""

_SAFE: Mapping[str, Any] = {
    name: {"filtered": False, "severity": "safe"} for name in ("hate", "self_harm", "sexual", "violence")
}


@dataclass(frozen=True, slots=True)
class Dialect:
    """What one server does in its own way when it answers; everything not named here is as OpenAI does it."""

    name: str
    reasoning_field: Literal["reasoning", "reasoning_content"] | None = None
    """Where a chat answer's reasoning text stands; None hides the text and only counts its tokens."""
    first_event: Mapping[str, Any] | None = None
    """Keys of an additional first chunk whose `choices` is empty; they are in the unary body too."""
    choice_extra: Mapping[str, Any] = field(default_factory=dict)
    """Keys added to each choice of a unary body and to each chunk with a finish_reason."""
    body_extra: Mapping[str, Any] = field(default_factory=dict)
    """Keys added to a unary body and to the last chunk that has choices."""
    repeat_role: bool = False
    """Every delta repeats the role, instead of one first chunk that has only the role."""
    finish_with_text: bool = False
    """finish_reason stands on the chunk of the last token, instead of on one of its own."""
    fingerprint: str | None = None
    """`system_fingerprint`."""
    fingerprint_last_only: bool = False
    """Only the last chunk with choices has it, instead of every chunk."""
    usage_on: UsageOn = "own_chunk"
    """Where `stream_options.include_usage` puts the usage."""
    usage_null: bool = False
    """Until then every chunk says `"usage": null`."""
    usage_details: bool = False
    """`prompt_tokens_details` and `completion_tokens_details` are filled."""
    whole_tool_calls: bool = False
    """A tool call comes in one delta, instead of its name first and its arguments piece by piece."""
    obfuscation: bool = False
    """Chunks are padded with an `obfuscation` text, which means nothing."""
    done_after_error: bool = False
    """An error event is followed by `[DONE]`, so that `[DONE]` does not prove success."""
    final_message: Literal["continued", "refused", "ignored"] = "ignored"
    """What becomes of `continue_final_message`."""


_ROWS = (
    Dialect(
        "openai",
        fingerprint="fp_simulated",
        usage_null=True,
        usage_details=True,
        obfuscation=True,
        final_message="refused",
    ),
    Dialect(
        "azure",
        first_event={"prompt_filter_results": [{"prompt_index": 0, "content_filter_results": _SAFE}]},
        choice_extra={"content_filter_results": _SAFE},
        fingerprint="fp_simulated",
        usage_null=True,
        usage_details=True,
        final_message="refused",
    ),
    Dialect(
        "vllm",
        reasoning_field="reasoning",
        choice_extra={"stop_reason": None, "token_ids": None},
        fingerprint="vllm-simulated",
        fingerprint_last_only=True,
        done_after_error=True,
        final_message="continued",
    ),
    Dialect(
        "sglang",
        reasoning_field="reasoning_content",
        choice_extra={"matched_stop": 2},
        done_after_error=True,
        final_message="continued",
    ),
    Dialect("tgi", repeat_role=True, finish_with_text=True, whole_tool_calls=True, fingerprint="tgi-simulated"),
    Dialect(
        "llamacpp",
        reasoning_field="reasoning_content",
        body_extra={"timings": {"prompt_ms": 1.0, "predicted_ms": 1.0}},
        fingerprint="b0-simulated",
    ),
    Dialect(
        "ollama",
        reasoning_field="reasoning",
        repeat_role=True,
        whole_tool_calls=True,
        fingerprint="fp_ollama",
    ),
    Dialect(
        "litellm",
        reasoning_field="reasoning_content",
        usage_on="empty_delta",
        usage_details=True,
        done_after_error=True,
    ),
)
DIALECTS: Mapping[str, Dialect] = {row.name: row for row in _ROWS}


JSON_TYPE = "application/json"


class Kind(StrEnum):
    """What is wrong, in one word that no dialect uses up."""

    INVALID_REQUEST = "invalid_request"
    TOO_LARGE = "too_large"
    CONTEXT_LENGTH = "context_length"
    CONTENT_FILTER = "content_filter"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    MODEL_NOT_FOUND = "model_not_found"
    NOT_FOUND = "not_found"
    METHOD = "method_not_allowed"
    RATE_LIMIT = "rate_limit"
    QUOTA = "quota"
    SERVER_ERROR = "server_error"
    OVERLOADED = "overloaded"
    NOT_READY = "not_ready"


@dataclass(frozen=True, slots=True)
class _ErrorFields:
    status: int
    message: str
    type: str
    code: str | None = None
    param: str | None = None


_ERRORS: Mapping[Kind, _ErrorFields] = {
    Kind.INVALID_REQUEST: _ErrorFields(400, "The request is not valid.", "invalid_request_error"),
    Kind.TOO_LARGE: _ErrorFields(413, "The request is too large.", "invalid_request_error"),
    Kind.CONTEXT_LENGTH: _ErrorFields(
        400,
        "This model's maximum context length is {window} tokens. However, your request resulted in {tokens} tokens.",
        "invalid_request_error",
        "context_length_exceeded",
        "messages",
    ),
    Kind.CONTENT_FILTER: _ErrorFields(
        400, "The request was refused by the content policy.", "invalid_request_error", "content_policy_violation"
    ),
    Kind.UNAUTHORIZED: _ErrorFields(401, "Incorrect API key provided.", "invalid_request_error", "invalid_api_key"),
    Kind.FORBIDDEN: _ErrorFields(403, "You may not use this resource.", "permission_error", "forbidden"),
    Kind.MODEL_NOT_FOUND: _ErrorFields(
        404, "The model `{model}` does not exist.", "invalid_request_error", "model_not_found", "model"
    ),
    Kind.NOT_FOUND: _ErrorFields(404, "Invalid URL ({method} {path})", "invalid_request_error"),
    Kind.METHOD: _ErrorFields(
        405, "Not allowed to {method} on {path}.", "invalid_request_error", "method_not_supported"
    ),
    Kind.RATE_LIMIT: _ErrorFields(429, "Rate limit reached for requests.", "requests", "rate_limit_exceeded"),
    Kind.QUOTA: _ErrorFields(
        429,
        "You exceeded your current quota, please check your plan and billing details.",
        "insufficient_quota",
        "insufficient_quota",
    ),
    Kind.SERVER_ERROR: _ErrorFields(500, "The server had an error while processing your request.", "server_error"),
    Kind.OVERLOADED: _ErrorFields(503, "The server is currently overloaded.", "server_error", "server_is_overloaded"),
    Kind.NOT_READY: _ErrorFields(503, "Loading model", "unavailable_error"),
}

_CLASS_NAMES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    429: "RateLimitError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
    504: "Timeout",
}
"""Exception names by status, as Python servers put them into `type`."""

_VARIANTS: Mapping[tuple[str, Kind], Mapping[str, Any]] = {
    ("azure", Kind.CONTENT_FILTER): {"code": "content_filter", "param": "prompt"},
    ("azure", Kind.MODEL_NOT_FOUND): {"code": "DeploymentNotFound", "param": None},
    ("azure", Kind.UNAUTHORIZED): {"code": "401", "message": "Access denied due to invalid subscription key."},
    ("azure", Kind.RATE_LIMIT): {"code": "429", "message": "Requests have exceeded the call rate limit."},
    ("vllm", Kind.CONTEXT_LENGTH): {"param": "input_tokens"},
    ("vllm", Kind.OVERLOADED): {"message": "The engine is currently busy. Please try again later."},
    ("sglang", Kind.CONTEXT_LENGTH): {
        "message": "The input ({tokens} tokens) is longer than the model's maximum context length ({window} tokens)."
    },
    ("sglang", Kind.OVERLOADED): {"message": "The request queue is full."},
    ("tgi", Kind.INVALID_REQUEST): {"status": 422, "type": "validation"},
    ("tgi", Kind.CONTEXT_LENGTH): {
        "status": 422,
        "type": "validation",
        "message": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= {window}. Given: {tokens}",
    },
    ("tgi", Kind.RATE_LIMIT): {"type": "overloaded", "message": "Model is overloaded"},
    ("tgi", Kind.OVERLOADED): {"status": 429, "type": "overloaded", "message": "Model is overloaded"},
    ("tgi", Kind.SERVER_ERROR): {"status": 424, "type": "generation", "message": "Request failed during generation"},
    ("llamacpp", Kind.CONTEXT_LENGTH): {
        "type": "exceed_context_size_error",
        "message": "request ({tokens} tokens) exceeds the available context size ({window} tokens)",
    },
    ("llamacpp", Kind.UNAUTHORIZED): {"type": "authentication_error", "message": "Invalid API Key"},
    ("llamacpp", Kind.NOT_FOUND): {"type": "not_found_error", "message": "File Not Found"},
    ("llamacpp", Kind.OVERLOADED): {"type": "unavailable_error", "message": "no slot available"},
    ("ollama", Kind.MODEL_NOT_FOUND): {
        "type": "not_found_error",
        "message": 'model "{model}" not found',
        "code": None,
        "param": None,
    },
    ("ollama", Kind.OVERLOADED): {
        "type": "api_error",
        "message": "server busy, please try again. maximum pending requests exceeded",
        "code": None,
    },
    ("ollama", Kind.SERVER_ERROR): {"type": "api_error"},
    ("litellm", Kind.UNAUTHORIZED): {"type": "auth_error", "message": "Authentication Error, invalid proxy token"},
    ("litellm", Kind.RATE_LIMIT): {"type": "throttling_error"},
}
"""Where a dialect says it differently: replaced fields of `_ErrorFields`."""


class SimError(Exception):
    """An error answer that is not yet in any dialect."""

    def __init__(
        self,
        kind: Kind,
        message: str | None = None,
        *,
        status: int | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        **facts: object,
    ) -> None:
        """
        Say what is wrong.

        Args:
            kind: Which fault.
            message: The text for people; None is the dialect's own for this kind.
            status: The HTTP status; None is the dialect's own.
            param: The offending field, as `messages[0].role`.
            code: OpenAI's code for the case, for example `missing_required_parameter`.
            headers: Further headers, for example Retry-After.
            facts: What the texts may name: model, tokens, window, method, path.
        """
        super().__init__(message or kind.value)
        self.kind = kind
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})
        self.facts = facts

    def in_dialect(self, dialect: str) -> _ErrorFields:
        """Return the fields of the error in a dialect's words."""
        base = _ERRORS[self.kind]
        variant = _VARIANTS.get((dialect, self.kind), {})
        message = self.message or str(variant.get("message", base.message)).format_map(_TextValues(self.facts))
        return _ErrorFields(
            self.status or variant.get("status", base.status),
            message,
            variant.get("type", base.type),
            self.code or variant.get("code", base.code),
            self.param or variant.get("param", base.param),
        )


class _TextValues(dict[str, object]):
    """Facts for a text; one that is unknown reads as a question mark instead of failing."""

    def __missing__(self, key: str) -> str:
        return "?"


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer: what the server will send if nothing breaks."""

    status: int
    body: bytes
    content_type: str = JSON_TYPE
    headers: Mapping[str, str] = field(default_factory=dict)


def _json(dialect: str, error: SimError, fields: _ErrorFields, path: str) -> Any:  # noqa: PLR0911 - one return per dialect
    """Return the JSON body of an error in a dialect."""
    numbered = {"message": fields.message, "type": fields.type, "param": fields.param, "code": fields.status}
    match dialect:
        case "vllm":
            if error.kind in {Kind.UNAUTHORIZED, Kind.NOT_READY}:
                return {"error": "Unauthorized" if fields.status == 401 else fields.message}  # noqa: PLR2004 - the status
            return {"error": {**numbered, "type": _CLASS_NAMES.get(fields.status, "InternalServerError")}}
        case "sglang":
            if error.kind is Kind.UNAUTHORIZED:
                return {"error": "Unauthorized"}
            flat = {"object": "error", **numbered, "type": _CLASS_NAMES.get(fields.status, "InternalServerError")}
            return {"error": flat} if path.startswith("/v1/responses") else flat
        case "tgi":
            return {"error": fields.message, "error_type": fields.type}
        case "llamacpp":
            sizes = {"n_prompt_tokens": error.facts.get("tokens"), "n_ctx": error.facts.get("window")}
            extra = sizes if error.kind is Kind.CONTEXT_LENGTH else {}
            return {"error": {"code": fields.status, "message": fields.message, "type": fields.type, **extra}}
        case "litellm":
            name = _CLASS_NAMES.get(fields.status, "InternalServerError")
            return {"error": {**numbered, "message": f"litellm.{name}: {fields.message}", "code": str(fields.status)}}
        case "azure":
            body: dict[str, Any] = {
                "code": fields.code or str(fields.status),
                "message": fields.message,
                "type": None,
                "param": fields.param,
            }
            if error.kind is Kind.CONTENT_FILTER:
                found = {"jailbreak": {"filtered": True, "detected": True}}
                body["status"] = fields.status
                body["innererror"] = {"code": "ResponsibleAIPolicyViolation", "content_filter_result": found}
            return {"error": body}
    return {"error": {"message": fields.message, "type": fields.type, "param": fields.param, "code": fields.code}}


def error_answer(dialect: str, error: SimError, *, path: str = "", streamed: bool = False) -> Answer:
    """
    Return the answer a client of the dialect sees.

    Args:
        dialect: A key of `DIALECTS`.
        error: What is wrong.
        path: The request's path; SGLang nests errors of the Responses API and no others.
        streamed: Whether the request asked for a stream; LiteLLM then answers an SSE frame with the error's status.
    """
    fields = error.in_dialect(dialect)
    if error.kind in {Kind.NOT_FOUND, Kind.METHOD} and dialect in {"vllm", "sglang", "litellm"}:
        detail = "Not Found" if error.kind is Kind.NOT_FOUND else "Method Not Allowed"
        return Answer(fields.status, msgspec.json.encode({"detail": detail}), JSON_TYPE, error.headers)
    if dialect == "tgi" and error.kind in {Kind.UNAUTHORIZED, Kind.NOT_FOUND, Kind.METHOD}:
        return Answer(fields.status, b"", "text/plain", error.headers)
    if dialect == "ollama" and error.kind is Kind.NOT_FOUND:
        return Answer(fields.status, b"404 page not found", "text/plain", error.headers)
    body = msgspec.json.encode(_json(dialect, error, fields, path))
    if dialect == "litellm" and streamed:
        return Answer(fields.status, b"data: " + body + b"\n\ndata: [DONE]\n\n", "text/event-stream", error.headers)
    return Answer(fields.status, body, JSON_TYPE, error.headers)


def stream_error(dialect: str, error: SimError) -> dict[str, Any] | None:
    """
    Return the payload of an error event in the middle of a stream; None is a server that just stops.

    TGI puts 422 there whatever happened; Ollama's OpenAI writer drops the error, and the stream ends without a word.
    """
    fields = error.in_dialect(dialect)
    if dialect == "ollama":
        return None
    if dialect == "tgi":
        return {"error": {"message": fields.message, "http_status_code": 422}}
    body = _json(dialect, error, fields, "/v1/responses")
    if isinstance(body.get("error"), str):
        body = {"error": {"message": body["error"], "type": fields.type, "param": None, "code": fields.status}}
    return {"error": body["error"]}
