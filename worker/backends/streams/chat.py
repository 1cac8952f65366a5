"""
The two APIs of `choices`: chat completions, where a choice grows a message, and completions, where it grows a text.

Source: https://platform.openai.com/docs/api-reference/chat, https://platform.openai.com/docs/api-reference/completions.
"""

from typing import Any

import msgspec

from worker.backends.streams.choices import Choice, ChoicesAccumulator
from worker.backends.streams.events import CONTENT, DATA
from worker.backends.streams.merge import ShapeError, Text, ToolCalls, finished, merge
from worker.backends.streams.shortcut import CommonChatChoice, CommonChatChunk, CommonTextChoice, CommonTextChunk

_INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "refusal", "reasoning", "reasoning_content")
_GENERATED = {
    "content",
    "reasoning",  # vLLM, Ollama, OpenRouter
    "reasoning_content",  # DeepSeek, SGLang, llama.cpp, older vLLM
    "refusal",
    "reasoning_details",
    "thinking_blocks",
    "audio",
}


class ChatAccumulator(ChoicesAccumulator):
    """`/v1/chat/completions`: `choices[].delta` becomes `choices[].message`."""

    _object = "chat.completion"
    _common = msgspec.json.Decoder(CommonChatChunk)
    _message_keys = frozenset({"delta", "message"})

    def _append_common(self, choice: Choice, part: CommonChatChoice) -> int:
        delta = part.delta
        message = choice.message
        if delta.role is not None and delta.role != message.get("role"):
            return -1
        growing: list[tuple[Any, str]] = []
        if delta.content is not None:
            growing.append((message.get("content"), delta.content))
        if delta.reasoning is not None:
            growing.append((message.get("reasoning"), delta.reasoning))
        if delta.reasoning_content is not None:
            growing.append((message.get("reasoning_content"), delta.reasoning_content))
        for call in delta.tool_calls or ():
            calls = message.get("tool_calls")
            text = calls.arguments_of(call.index) if type(calls) is ToolCalls else None
            growing.append((text, call.function.arguments))
        bits = DATA
        for text, _ in growing:
            if type(text) is not Text:
                return -1
        for text, piece in growing:
            if piece:
                text.append(piece)
                bits = DATA | CONTENT
        return bits

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
    _common = msgspec.json.Decoder(CommonTextChunk)
    _message_keys = frozenset({"text"})

    def _append_common(self, choice: Choice, part: CommonTextChoice) -> int:
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
    for key, value in delta.items():
        if not value:
            continue
        if key in _GENERATED:
            return True
        if key == "tool_calls":
            for call in value if isinstance(value, list) else [value]:
                if _is_generated_call(call.get("function")) or _is_generated_call(call.get("custom")):
                    return True
        elif key == "function_call" and _is_generated_call(value):
            return True
    return False


def _is_generated_call(function: Any) -> bool:
    return isinstance(function, dict) and bool(
        function.get("arguments") or function.get("name") or function.get("input")
    )
