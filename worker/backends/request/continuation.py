"""
Going on where a stream broke: the request that continues a text instead of generating it again.

Pure.  Only plain text can be continued, by servers that leave the last message open (`continue_final_message` of vLLM
and SGLang), or in completions by appending it to the prompt.  What makes a server start over or count anew (a grammar,
tools, several choices, an echoed prompt) is not continued.  The operator says by `continuation` that the server can:
one that ignores the keys would begin a second answer, which cannot be told from a continuation.

Source: https://github.com/vllm-project/vllm/blob/main/vllm/entrypoints/openai/protocol.py (both keys, which exclude
each other there), https://github.com/sgl-project/sglang/blob/main/python/sglang/srt/entrypoints/openai/serving_chat.py
(a final assistant message whose content is a string); neither repeats the message in its answer.
"""

import re

import msgspec

from worker.backends.request.stream import Call, Form, accumulator_maker, choices_of, form_changes
from worker.backends.streams.accumulator import Accumulator
from worker.ports import ResumePoint
from worker.settings.schema import ContinuationMode
from worker.wire.body import RequestBody
from worker.wire.endpoints import CHAT, COMPLETIONS, Endpoint
from worker.wire.usage import usage_of

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


_TOKENS = re.compile(rb"-?[0-9]{1,18}")
_MAX_COMMAS = 100_000
"""Of a conversation that is taken apart to find its last message."""


class _Message(msgspec.Struct):
    role: str = ""


class _Format(msgspec.Struct):
    type: str = ""


_decode_messages = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_message = msgspec.json.Decoder(_Message).decode
_decode_format = msgspec.json.Decoder(_Format).decode


def continue_call(
    mode: ContinuationMode, endpoint: Endpoint, body: RequestBody, *, form: Form, resume_point: ResumePoint
) -> Call | None:
    """
    Return the call that goes on from a resume point, `None` where the request has to start anew.

    Its limit of tokens is what the earlier attempt left of it, at least 1.

    Args:
        mode: The route's setting.
        endpoint: Of the request's path.
        body: As the requester wrote it.
        form: In which it would be sent.
        resume_point: Where the earlier attempt ended.
    """
    if form is Form.UNARY or not can_continue(mode, endpoint, body):
        return None
    changes = _opening(mode, endpoint, body, resume_point.text)
    for limit in _LIMITS:
        if _TOKENS.fullmatch(body.raw(limit)):
            changes[limit] = b"%d" % max(1, int(body.raw(limit)) - resume_point.tokens)
    changes |= form_changes(form, endpoint, body)
    return Call(
        body=body.with_changes(changes),
        form=form,
        new_accumulator=accumulator_maker(endpoint, body, prefix={0: resume_point.text}),
        salvaged_tokens=resume_point.tokens,
    )


def can_continue(mode: ContinuationMode, endpoint: Endpoint, body: RequestBody) -> bool:
    """Whether an answer to the request could be continued, as far as the request itself tells."""
    if endpoint is CHAT:
        is_possible = mode in {"vllm", "sglang"} and _is_last_open(body)
    elif endpoint is COMPLETIONS:
        # Without a limit the server's own holds, 16 tokens usually, and would hold for each piece.
        is_possible = mode != "off" and body.raw("prompt").startswith(b'"') and body.is_set("max_tokens")
    else:
        is_possible = False
    return (
        is_possible
        and choices_of(endpoint, body) == 1
        and not any(map(body.is_set, _NOT_CONTINUED))
        and (not body.is_set("response_format") or _format_of(body) == "text")
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
    usage = usage_of(accumulator.usage or {})
    tokens = (usage.output if usage is not None else None) or accumulator.content_events
    return ResumePoint(text=text, tokens=(before or 0) + tokens)


def _opening(mode: ContinuationMode, endpoint: Endpoint, body: RequestBody, text: str) -> dict[str, bytes | None]:
    """Return what makes the server go on from a text."""
    if endpoint is COMPLETIONS:
        return {"prompt": body.raw("prompt")[:-1] + msgspec.json.encode(text)[1:]}
    messages = body.raw("messages")
    opened = messages[:-1] + b"," + msgspec.json.encode({"role": "assistant", "content": text}) + b"]"
    changes: dict[str, bytes | None] = {"messages": opened, "continue_final_message": b"true"}
    return changes | {"add_generation_prompt": b"false"} if mode == "vllm" else changes


def _is_last_open(body: RequestBody) -> bool:
    """Whether the conversation does not end with a message of the assistant's, which the answer would go on from."""
    raw = body.raw("messages")
    if raw.count(b",") > _MAX_COMMAS:
        return False
    try:
        messages = _decode_messages(raw)
        return bool(messages) and _decode_message(messages[-1]).role not in {"", "assistant"}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


def _format_of(body: RequestBody) -> str:
    try:
        return _decode_format(body.raw("response_format")).type
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
