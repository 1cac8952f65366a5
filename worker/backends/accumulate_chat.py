"""
The two APIs of `choices`: chat completions, where a choice grows a message, and completions, where it grows a text.

Source: https://platform.openai.com/docs/api-reference/chat, https://platform.openai.com/docs/api-reference/completions;
the fields of the commonest chunks are those of OpenAI, vLLM, SGLang, llama.cpp, TGI and Ollama.
"""

from typing import Any

import msgspec

from worker.backends.accumulate_choices import Choice, ChoicesAccumulator, CommonChunk
from worker.backends.accumulate_events import CONTENT, DATA
from worker.backends.accumulate_merge import ShapeError, Text, finished, merge

_INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "refusal", "reasoning", "reasoning_content")
_GENERATED = (
    "content",
    "reasoning",  # vLLM, Ollama, OpenRouter
    "reasoning_content",  # DeepSeek, SGLang, llama.cpp, older vLLM
    "refusal",
    "reasoning_details",
    "thinking_blocks",
    "audio",
)


class _CommonDelta(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    role: str | None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None


class _CommonChatChoice(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    delta: _CommonDelta
    index: int = 0
    logprobs: None = None
    finish_reason: None = None
    stop_reason: None = None
    token_ids: None = None
    matched_stop: None = None


class _CommonChatChunk(CommonChunk, forbid_unknown_fields=True, gc=False, kw_only=True):
    choices: list[_CommonChatChoice]


class _CommonTextChoice(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    text: str
    index: int = 0
    logprobs: None = None
    finish_reason: None = None
    stop_reason: None = None
    token_ids: None = None
    prompt_token_ids: None = None
    prompt_logprobs: None = None
    matched_stop: None = None


class _CommonTextChunk(CommonChunk, forbid_unknown_fields=True, gc=False, kw_only=True):
    choices: list[_CommonTextChoice]


class ChatAccumulator(ChoicesAccumulator):
    """`/v1/chat/completions`: `choices[].delta` becomes `choices[].message`."""

    _object = "chat.completion"
    _common = msgspec.json.Decoder(_CommonChatChunk)
    _message_keys = frozenset({"delta", "message"})

    def _append_common(self, choice: Choice, part: _CommonChatChoice) -> int:
        delta = part.delta
        message = choice.message
        if delta.role is not None and delta.role != message.get("role"):
            return -1
        pieces = []
        for key, piece in (
            ("content", delta.content),
            ("reasoning", delta.reasoning),
            ("reasoning_content", delta.reasoning_content),
        ):
            if piece is not None:
                text = message.get(key)
                if type(text) is not Text:
                    return -1
                if piece:
                    pieces.append((text, piece))
        for text, piece in pieces:
            text.append(piece)
        return DATA | CONTENT if pieces else DATA

    def _merge_message(self, choice: Choice, part: dict[str, Any]) -> bool:
        delta = part.get("delta")
        if delta is None and isinstance(part.get("message"), dict):
            # A whole message in a stream (gateways that only pretend to stream): it stands for all that came before it.
            delta = part["message"]
            choice.message.clear()
        if delta is None:
            return False
        if not isinstance(delta, dict):
            raise ShapeError("a choice's `delta` is not an object")
        merge(choice.message, delta)
        return _is_generated(delta)

    def _choice_body(self, choice: Choice) -> dict[str, Any]:
        message = finished(choice.message)
        message["role"] = message.get("role") or "assistant"
        if not message.get("content") and any(message.get(key) for key in _INSTEAD_OF_CONTENT):
            message["content"] = None  # most streams begin with an empty string; unstreamed, nothing stands there
        message.setdefault("content", None)
        return _with_fields({"index": choice.index, "message": message}, choice)


class CompletionAccumulator(ChoicesAccumulator):
    """`/v1/completions`: `choices[].text` is concatenated, the arrays of `logprobs` are extended."""

    _object = "text_completion"
    _common = msgspec.json.Decoder(_CommonTextChunk)
    _message_keys = frozenset({"text"})

    def _append_common(self, choice: Choice, part: _CommonTextChoice) -> int:
        text = choice.message.get("content")
        if type(text) is not Text:
            return -1
        if not part.text:
            return DATA
        text.append(part.text)
        return DATA | CONTENT

    def _merge_message(self, choice: Choice, part: dict[str, Any]) -> bool:
        text = part.get("text")
        if text is None:
            return False
        if not isinstance(text, str):
            raise ShapeError("a choice's `text` is not a string")
        merge(choice.message, {"content": text})
        return bool(text)

    def _choice_body(self, choice: Choice) -> dict[str, Any]:
        return _with_fields({"index": choice.index, "text": str(choice.message.get("content", ""))}, choice)


def _with_fields(body: dict[str, Any], choice: Choice) -> dict[str, Any]:
    fields = finished(choice.fields)
    body["finish_reason"] = fields.pop("finish_reason", None) or None
    return body | fields


def _is_generated(delta: dict[str, Any]) -> bool:
    """Whether a delta holds generated text; a role, an id or an empty string is none."""
    if any(delta.get(key) for key in _GENERATED):
        return True
    calls = delta.get("tool_calls") or []
    calls = calls if isinstance(calls, list) else [calls]
    functions = [delta.get("function_call")] + [call.get(kind) for call in calls for kind in ("function", "custom")]
    return any(
        isinstance(function, dict) and any(function.get(key) for key in ("name", "arguments", "input"))
        for function in functions
    )
