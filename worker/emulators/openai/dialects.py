"""
How the servers that all speak "OpenAI" differ in what they send when things go well; `error_shapes` has the rest.

One row per server, one field per difference that breaks naive clients.  The rows describe published source and
documentation of the servers, not captured traffic: https://github.com/vllm-project/vllm,
https://github.com/sgl-project/sglang, https://github.com/huggingface/text-generation-inference,
https://github.com/ggml-org/llama.cpp (tools/server), https://github.com/ollama/ollama (openai/openai.go),
https://github.com/BerriAI/litellm, https://learn.microsoft.com/azure/ai-services/openai/reference.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

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
