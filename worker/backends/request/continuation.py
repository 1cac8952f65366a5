"""
Going on where a stream broke: the request that continues a text instead of generating it again.

Pure.  Only plain text can be continued, by servers that leave the last message open (`continue_final_message` of vLLM
and SGLang), or in completions by appending it to the prompt.  What makes a server start over or count anew (a grammar,
tools, several choices, an echoed prompt) is not continued.  The operator says by `continuation` that the server can:
one that ignores the keys would begin a second answer, which nobody could tell from a continuation.

Source: https://github.com/vllm-project/vllm/blob/main/vllm/entrypoints/openai/protocol.py (both keys, which exclude
each other there), https://github.com/sgl-project/sglang/blob/main/python/sglang/srt/entrypoints/openai/serving_chat.py
(a final assistant message whose content is a string); neither repeats the message in its answer.
"""

from typing import Any

import msgspec

from worker.backends.request.body import Fields, is_set, raw, value_of, with_changes
from worker.backends.request.stream import Call, Form, Kind, choices_of, form_changes, kind_of, maker
from worker.backends.streams.accumulate import Accumulator
from worker.ports import ResumePoint
from worker.settings.schema import ContinuationMode

_NOT_CONTINUED = (
    "continue_final_message",  # the request continues a text of its own
    "ebnf",
    "echo",
    "functions",
    "grammar",
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "json_schema",
    "logprobs",
    "min_tokens",
    "regex",
    "return_token_ids",
    "structural_tag",
    "structured_outputs",
    "suffix",
    "tools",
)
"""Keys of a request whose answer is not the broken one's text with more text behind it.  A grammar, for example, starts
at its beginning again: the rest would be a second document."""

_LIMITS = ("max_completion_tokens", "max_tokens")


class _Message(msgspec.Struct):
    role: str = ""


_decode_messages = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_message = msgspec.json.Decoder(_Message).decode


def continue_call(
    mode: ContinuationMode, path: str, body: bytes, fields: Fields, *, form: Form, resume_point: ResumePoint
) -> Call | None:
    """
    Return the call that goes on from what was salvaged, `None` where the request has to start anew.

    Its limit of tokens is what the earlier try left of it, at least 1.

    Args:
        mode: The route's setting.
        path: Of the request.
        body: As the requester wrote it.
        fields: The body's top level.
        form: In which it would be sent.
        resume_point: What there is.
    """
    kind = kind_of(path)
    changes = _opening(mode, kind, fields, resume_point.text) if can_continue(mode, kind, fields) else None
    if kind is None or changes is None or form is Form.UNARY:
        return None
    for limit in _LIMITS:
        tokens = value_of(fields, limit)
        if type(tokens) is int:
            changes[limit] = b"%d" % max(1, tokens - resume_point.tokens)
    changes |= form_changes(form, kind, fields)
    return Call(
        body=with_changes(body, fields, changes),
        form=form,
        new_accumulator=maker(path, fields, prefix={0: resume_point.text}),
        salvaged_tokens=resume_point.tokens,
    )


def can_continue(mode: ContinuationMode, kind: Kind | None, fields: Fields) -> bool:
    """Whether an answer to the request could be continued, as far as the request itself tells."""
    if kind is Kind.CHAT:
        is_possible = mode in {"vllm", "sglang"} and _is_last_open(fields)
    elif kind is Kind.COMPLETIONS:
        # Without a limit the server's own holds, 16 tokens usually, and would hold for each piece.
        is_possible = mode != "off" and raw(fields, "prompt").startswith(b'"') and is_set(fields, "max_tokens")
    else:
        is_possible = False
    return (
        is_possible
        and kind is not None
        and choices_of(kind, fields) == 1
        and not any(is_set(fields, key) for key in _NOT_CONTINUED)
        and (not is_set(fields, "response_format") or _format_of(fields) == "text")
    )


def resume_point_of(accumulator: Accumulator, before: int | None) -> ResumePoint | None:
    """
    Return what a broken stream leaves to go on from, `None` when that is nothing or not text alone.

    Args:
        accumulator: Of the broken stream.
        before: Tokens it began with, when it was a continuation itself.
    """
    text = accumulator.generated_text().get(0, "").rstrip()
    if not text or not accumulator.is_text_only:
        return None
    counted = (accumulator.usage or {}).get("completion_tokens")
    tokens = counted if type(counted) is int and counted > 0 else accumulator.content_events
    return ResumePoint(text=text, tokens=(before or 0) + tokens)


def _opening(mode: ContinuationMode, kind: Kind | None, fields: Fields, text: str) -> dict[str, bytes | None] | None:
    """Return what makes the server go on from a text."""
    if kind is Kind.COMPLETIONS:
        return {"prompt": raw(fields, "prompt")[:-1] + msgspec.json.encode(text)[1:]}
    messages = raw(fields, "messages")
    opened = messages[:-1] + b"," + msgspec.json.encode({"role": "assistant", "content": text}) + b"]"
    changes: dict[str, bytes | None] = {"messages": opened, "continue_final_message": b"true"}
    return changes | {"add_generation_prompt": b"false"} if mode == "vllm" else changes


def _is_last_open(fields: Fields) -> bool:
    """Whether the conversation ends with somebody else's message, so that the answer is one of its own."""
    try:
        messages = _decode_messages(raw(fields, "messages"))
        return bool(messages) and _decode_message(messages[-1]).role not in {"", "assistant"}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


def _format_of(fields: Fields) -> Any:
    wanted = value_of(fields, "response_format")
    return wanted.get("type") if isinstance(wanted, dict) else None
