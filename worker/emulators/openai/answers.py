"""
Unary bodies of chat completions, completions and embeddings; the Responses API has its own module.

Pure: a generation and an identity in, a dictionary out.  `stream` sends the same content in pieces; what is added here
must be added there, or a streamed answer would no longer add up to the unary one.
"""

import math
import struct
from base64 import b64encode
from dataclasses import dataclass
from typing import Any

from worker.emulators.openai.dialects import Dialect
from worker.emulators.openai.dice import Dice
from worker.emulators.openai.generation import Choice, Generation
from worker.emulators.openai.validation import Call

DIMENSIONS = 128
"""Length of an embedding when the request names none; real ones are 8 times as long, which no rehearsal needs."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What makes one answer different from another to the same request."""

    value: str
    """The part of the id after its prefix: the caller's X-Request-Id when there is one."""
    created: int
    """Unix seconds."""


def usage(dialect: Dialect, generation: Generation, so_far: int | None = None) -> dict[str, Any]:
    """
    Return the usage object of chat and text completions.

    Args:
        dialect: Whether details are filled in.
        generation: What was generated.
        so_far: Tokens generated until now, for usage in the middle of a stream; None is all of them.
    """
    completion = generation.completion_tokens if so_far is None else so_far
    counted: dict[str, Any] = {
        "prompt_tokens": generation.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": generation.prompt_tokens + completion,
    }
    if dialect.usage_details:
        counted["prompt_tokens_details"] = {"cached_tokens": generation.cached_tokens, "audio_tokens": 0}
        counted["completion_tokens_details"] = {
            "reasoning_tokens": generation.reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        }
    return counted


def chat_logprobs(tokens: list[str], place: int = 0) -> dict[str, Any]:
    """Return the `logprobs` object for tokens that begin at `place` of the answer; the numbers depend on the place."""
    content = [
        {"token": token, "logprob": _logprob(number), "bytes": list(token.encode()), "top_logprobs": []}
        for number, token in enumerate(tokens, place)
    ]
    return {"content": content, "refusal": None}


def text_logprobs(tokens: list[str], place: int = 0, offset: int = 0) -> dict[str, Any]:
    """Return the older `logprobs` object of text completions, for tokens from `place` at the character `offset`."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    numbers = [_logprob(number) for number in range(place, place + len(tokens))]
    top = [{token: number} for token, number in zip(tokens, numbers, strict=True)]
    return {"tokens": tokens, "token_logprobs": numbers, "top_logprobs": top, "text_offset": offsets}


def _logprob(place: int) -> float:
    return -((place * 7 % 10) + 1) / 16


def common(object_name: str, prefix: str, call: Call, dialect: Dialect, identity: Identity) -> dict[str, Any]:
    """Return the keys that a body and each of its chunks share."""
    shared: dict[str, Any] = {
        "id": f"{prefix}-{identity.value}",
        "object": object_name,
        "created": identity.created,
        "model": call.model,
    }
    if dialect.fingerprint is not None:
        shared["system_fingerprint"] = dialect.fingerprint
    return shared


def tool_call(choice: Choice, place: int) -> dict[str, Any]:
    """Return one tool call of a message."""
    call = choice.tool_calls[place]
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": "".join(call.arguments)},
    }


def chat_body(call: Call, generation: Generation, dialect: Dialect, identity: Identity) -> dict[str, Any]:
    """Return a chat completion."""
    choices = []
    for choice in generation.choices:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text}
        if choice.reasoning and dialect.reasoning_field:
            message[dialect.reasoning_field] = "".join(choice.reasoning)
        if choice.tool_calls:
            message["content"] = None
            message["tool_calls"] = [tool_call(choice, place) for place in range(len(choice.tool_calls))]
        wanted = call.body.get("logprobs") is True and not choice.tool_calls
        choices.append(
            {
                "index": choice.index,
                "message": {**message, "refusal": None},
                "logprobs": chat_logprobs(choice.tokens) if wanted else None,
                "finish_reason": choice.finish_reason,
                **dialect.choice_extra,
            }
        )
    return {
        **common("chat.completion", "chatcmpl", call, dialect, identity),
        "choices": choices,
        "usage": usage(dialect, generation),
        **(dialect.first_event or {}),
        **dialect.body_extra,
    }


def completion_body(call: Call, generation: Generation, dialect: Dialect, identity: Identity) -> dict[str, Any]:
    """Return a text completion; several prompts have their choices one after the other."""
    wanted = call.body.get("logprobs") is not None
    choices = [
        {
            "index": choice.index,
            "text": echoed(call, choice) + choice.text,
            "logprobs": text_logprobs(choice.tokens) if wanted else None,
            "finish_reason": choice.finish_reason,
            **dialect.choice_extra,
        }
        for choice in generation.choices
    ]
    return {
        **common("text_completion", "cmpl", call, dialect, identity),
        "choices": choices,
        "usage": usage(dialect, generation),
        **(dialect.first_event or {}),
        **dialect.body_extra,
    }


def echoed(call: Call, choice: Choice) -> str:
    """Return the prompt that stands before a completion when the request says `echo`."""
    return call.inputs[choice.index // call.n] if call.body.get("echo") is True else ""


def embedding_body(call: Call, seed: int) -> dict[str, Any]:
    """
    Return embeddings: unit vectors that depend on the model, the text and the seed, not on the rest of the request.

    The same text has the same vector in every request, as people expect who compare or cache them.
    """
    size = int(call.body.get("dimensions") or DIMENSIONS)
    as_text = call.body.get("encoding_format") == "base64"
    data = []
    for index, text in enumerate(call.inputs):
        raw = struct.unpack(f"<{size}h", Dice(seed, call.model, text).data("embedding", 2 * size))
        norm = math.sqrt(math.fsum(number * number for number in raw)) or 1.0
        vector: list[float] | str = [round(number / norm, 8) for number in raw]
        if as_text:
            vector = b64encode(struct.pack(f"<{size}f", *vector)).decode()
        data.append({"object": "embedding", "index": index, "embedding": vector})
    tokens = {"prompt_tokens": call.prompt_tokens, "total_tokens": call.prompt_tokens}
    return {"object": "list", "data": data, "model": call.model, "usage": tokens}
