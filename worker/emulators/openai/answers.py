"""
Answers of chats, completions, embeddings and moderations: unary bodies, and the chunks of the same content streamed.

Pure: a generation and an identity in; a dictionary, or events in the order and shape of each dialect, out.  The chunks
of one answer add up to its unary body, so whatever is added to the one must be added to the other; a test merges them
for every dialect.  The Responses API and images have their own modules.
"""

import math
import struct
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from worker.emulators.openai.dialects import Dialect, UsageOn
from worker.emulators.openai.generation import Choice, Generation
from worker.emulators.openai.seeded import Draws
from worker.emulators.openai.sse import Event
from worker.emulators.openai.validation import Call, Endpoint

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

    The same text has the same vector in every request, so vectors can be compared and cached.
    """
    size = int(call.body.get("dimensions") or DIMENSIONS)
    as_text = call.body.get("encoding_format") == "base64"
    data = []
    for index, text in enumerate(call.inputs):
        raw = struct.unpack(f"<{size}h", Draws(seed, call.model, text).data("embedding", 2 * size))
        norm = math.sqrt(math.fsum(number * number for number in raw)) or 1.0
        vector: list[float] | str = [round(number / norm, 8) for number in raw]
        if as_text:
            vector = b64encode(struct.pack(f"<{size}f", *vector)).decode()
        data.append({"object": "embedding", "index": index, "embedding": vector})
    tokens = {"prompt_tokens": call.prompt_tokens, "total_tokens": call.prompt_tokens}
    return {"object": "list", "data": data, "model": call.model, "usage": tokens}


_CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/instructions",
    "self-harm/intent",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
_WITH_IMAGES = frozenset(name for name in _CATEGORIES if name.startswith(("self-harm", "violence"))) | {"sexual"}
"""Categories whose scores images count for; https://platform.openai.com/docs/guides/moderation."""
_FLAGGED_SHARE = 0.1


def moderation_body(call: Call, seed: int, identity: Identity) -> dict[str, Any]:
    """
    Return the moderation of each input, which depends on the model, the input and the seed: one in ten is flagged.

    The simulated server does not read the text: which one is flagged, and in which category, is chance.
    """
    results = []
    for text in call.inputs:
        draws = Draws(seed, call.model, text)
        scores = {name: round(draws.uniform(name) / 100, 8) for name in _CATEGORIES}
        flagged = draws.uniform("flagged") < _FLAGGED_SHARE
        if flagged:
            worst = _CATEGORIES[draws.between("worst", 0, len(_CATEGORIES) - 1)]
            scores[worst] = round((1 + draws.uniform("score")) / 2, 8)
        results.append(
            {
                "flagged": flagged,
                "categories": {name: score >= 0.5 for name, score in scores.items()},  # noqa: PLR2004 - half
                "category_scores": scores,
                "category_applied_input_types": {name: _input_types(call, name) for name in _CATEGORIES},
            }
        )
    return {"id": f"modr-{identity.value}", "model": call.model, "results": results}


def _input_types(call: Call, category: str) -> list[str]:
    """Return the kinds of input that a category's score is about."""
    parts = call.body["input"] if isinstance(call.body["input"], list) else []
    kinds = {str(part["type"]).removesuffix("_url") for part in parts if isinstance(part, dict)} or {"text"}
    return sorted(kinds if category in _WITH_IMAGES else kinds & {"text"})


_Piece = tuple[dict[str, Any], int]
"""One choice object of a chunk and the tokens it stands for."""


def chunk_events(
    call: Call, generation: Generation, dialect: Dialect, identity: Identity, usage_on: UsageOn | None = None
) -> list[Event]:
    """
    Return the events of a streamed answer, `[DONE]` last.

    Args:
        call: The request; decides about usage and logprobs.
        generation: What was generated.
        dialect: The shape.
        identity: The id.
        usage_on: Where the usage stands, instead of where the dialect puts it.
    """
    chat = call.endpoint is Endpoint.CHAT
    name, prefix = ("chat.completion.chunk", "chatcmpl") if chat else ("text_completion", "cmpl")
    shared = common(name, prefix, call, dialect, identity)
    if dialect.fingerprint_last_only:
        shared.pop("system_fingerprint", None)
    make = _chat_pieces if chat else _text_pieces
    events = []
    if dialect.first_event is not None:
        blank = {"id": "", "object": "", "created": 0, "model": ""}
        events.append(Event({**blank, "choices": [], **dialect.first_event}))
    for piece, tokens in _interleave([make(call, choice, dialect) for choice in generation.choices]):
        events.append(Event({**shared, "choices": [piece]}, tokens=tokens))
        if dialect.obfuscation:
            events[-1].payload["obfuscation"] = "x" * (len(events) * 5 % 11)  # type: ignore[index]  # set just above
    if not events:
        events.append(Event({**shared, "choices": []}))
    if call.include_usage:
        _add_usage(events, call, generation, dialect, shared=shared, usage_on=usage_on or dialect.usage_on)
    last = events[-1].payload
    if last is not None and dialect.fingerprint_last_only:
        last["system_fingerprint"] = dialect.fingerprint
    finishing = next((event.payload for event in reversed(events) if event.payload and event.payload["choices"]), None)
    if finishing is not None:
        finishing.update(dialect.body_extra)
    events.append(Event(None))
    return events


def _interleave(choices: list[Iterator[_Piece]]) -> Iterator[_Piece]:
    """Yield the pieces of several choices in turns, as a server that generates them side by side."""
    while choices:
        alive = []
        for pieces in choices:
            if (piece := next(pieces, None)) is not None:
                yield piece
                alive.append(pieces)
        choices = alive


def _add_usage(
    events: list[Event],
    call: Call,
    generation: Generation,
    dialect: Dialect,
    *,
    shared: dict[str, Any],
    usage_on: UsageOn,
) -> None:
    """Put the usage where the request's client will find it."""
    so_far = 0
    for event in events:
        so_far += event.tokens
        if event.payload is not None and call.continuous_usage:
            event.payload["usage"] = usage(dialect, generation, so_far)
        elif event.payload is not None and dialect.usage_null:
            event.payload["usage"] = None
    counted = usage(dialect, generation)
    match usage_on:
        case "own_chunk":
            events.append(Event({**shared, "choices": [], "usage": counted}))
        case "empty_delta":
            empty: dict[str, Any] = {"index": 0, "finish_reason": None}
            empty["delta" if call.endpoint is Endpoint.CHAT else "text"] = {} if call.endpoint is Endpoint.CHAT else ""
            events.append(Event({**shared, "choices": [empty], "usage": counted}))
        case "finish_chunk":
            (events[-1].payload or {})["usage"] = counted
        case "first_chunk":
            (events[0].payload or {})["usage"] = counted


def _chat_pieces(call: Call, choice: Choice, dialect: Dialect) -> Iterator[_Piece]:
    role = {"role": "assistant"} if dialect.repeat_role else {}
    wanted = call.body.get("logprobs") is True and not choice.tool_calls
    deltas: list[tuple[dict[str, Any], int, dict[str, Any] | None]] = []
    hidden = 0
    if dialect.reasoning_field:
        deltas += [({dialect.reasoning_field: token}, 1, None) for token in choice.reasoning]
    else:
        hidden = len(choice.reasoning)
    for place, token in enumerate(choice.tokens):
        deltas.append(({"content": token}, 1, chat_logprobs([token], place) if wanted else None))
    for place in range(len(choice.tool_calls)):
        deltas += [(delta, tokens, None) for delta, tokens in _tool_deltas(choice, place, dialect)]
    if not dialect.repeat_role:
        yield {"index": choice.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}, hidden
    merged = dialect.finish_with_text and deltas
    for number, (delta, tokens, logprobs) in enumerate(deltas, 1):
        piece: dict[str, Any] = {"index": choice.index, "delta": {**role, **delta}, "finish_reason": None}
        if logprobs:
            piece["logprobs"] = logprobs
        if merged and number == len(deltas):
            piece |= {"finish_reason": choice.finish_reason, **dialect.choice_extra}
        yield piece, tokens
    if not merged:
        finish = {"index": choice.index, "delta": dict(role), "finish_reason": choice.finish_reason}
        yield {**finish, **dialect.choice_extra}, 0


def _tool_deltas(choice: Choice, place: int, dialect: Dialect) -> Iterator[_Piece]:
    call = choice.tool_calls[place]
    head: dict[str, Any] = {"index": place, "id": call.id, "type": "function"}
    if dialect.whole_tool_calls:
        function = {"name": call.name, "arguments": "".join(call.arguments)}
        yield {"tool_calls": [{**head, "function": function}]}, len(call.arguments)
        return
    yield {"tool_calls": [{**head, "function": {"name": call.name, "arguments": ""}}]}, 0
    for token in call.arguments:
        yield {"tool_calls": [{"index": place, "function": {"arguments": token}}]}, 1


def _text_pieces(call: Call, choice: Choice, dialect: Dialect) -> Iterator[_Piece]:
    wanted = call.body.get("logprobs") is not None
    if prompt := echoed(call, choice):
        yield {"index": choice.index, "text": prompt, "logprobs": None, "finish_reason": None}, 0
    merged = dialect.finish_with_text and choice.tokens
    offset = 0
    for place, token in enumerate(choice.tokens):
        logprobs = text_logprobs([token], place, offset) if wanted else None
        offset += len(token)
        piece: dict[str, Any] = {"index": choice.index, "text": token, "logprobs": logprobs, "finish_reason": None}
        if merged and place == len(choice.tokens) - 1:
            piece |= {"finish_reason": choice.finish_reason, **dialect.choice_extra}
        yield piece, 1
    if not merged:
        finish = {"index": choice.index, "text": "", "logprobs": None, "finish_reason": choice.finish_reason}
        yield {**finish, **dialect.choice_extra}, 0
