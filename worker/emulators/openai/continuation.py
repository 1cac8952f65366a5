"""
Requests that go on from a text: `continue_final_message` with the beginning of the answer as the last message.

Pure.  Such a request is about the same as the one without that message, so it has the same answer, of which only the
rest is said.  vLLM and SGLang do so; OpenAI and Azure refuse arguments that they do not know, the others ignore them.

Source: https://github.com/vllm-project/vllm/blob/main/vllm/entrypoints/openai/protocol.py (which refuses both keys
together), https://github.com/sgl-project/sglang/blob/main/python/sglang/srt/entrypoints/openai/serving_chat.py.
"""

from collections.abc import Mapping
from typing import Any

from worker.emulators.openai.dialects import Dialect
from worker.emulators.openai.error_shapes import Kind, SimError

_FLAGS = ("continue_final_message", "add_generation_prompt")


def opened_answer(body: Mapping[str, Any], dialect: Dialect) -> tuple[Mapping[str, Any], str]:
    """
    Return what the request would be without the beginning of its answer, and that beginning; empty when it has none.

    Args:
        body: The decoded request.
        dialect: What the server makes of the keys.

    Raises:
        SimError: The server does not know them, or they contradict each other.
    """
    if dialect.final_message == "ignored" or not any(flag in body for flag in _FLAGS):
        return body, ""
    if dialect.final_message == "refused":
        name = next(flag for flag in _FLAGS if flag in body)
        raise SimError(Kind.INVALID_REQUEST, f"Unrecognized request argument supplied: {name}")
    if body.get("continue_final_message") is not True:
        return body, ""
    if body.get("add_generation_prompt") is True:
        text = "Cannot set both `continue_final_message` and `add_generation_prompt` to True."
        raise SimError(Kind.INVALID_REQUEST, text)
    messages = body.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict) or last.get("role") != "assistant" or not isinstance(last.get("content"), str):
        return body, ""
    kept = {key: value for key, value in body.items() if key not in _FLAGS}
    return {**kept, "messages": (messages or [])[:-1]}, last["content"]


def rest_of(tokens: list[str], begun: str) -> list[str]:
    """Return the tokens behind a text that they begin with; all of them when they begin otherwise."""
    if not "".join(tokens).startswith(begun):
        return tokens
    said = 0
    for place, token in enumerate(tokens):
        if said + len(token) > len(begun):
            return [token[len(begun) - said :], *tokens[place + 1 :]]
        said += len(token)
    return []
