"""
Chunks of streamed chat and text completions, in the order and shape each dialect has.

Pure: a generation in, events out.  The chunks of one answer add up to the body that `answers` makes of the same
generation; a test merges them for every dialect.
"""

from collections.abc import Iterator
from typing import Any

from worker.emulators.openai.answers import Identity, chat_logprobs, common, echoed, text_logprobs, usage
from worker.emulators.openai.dialects import Dialect, UsageOn
from worker.emulators.openai.events import Event
from worker.emulators.openai.generation import Choice, Generation
from worker.emulators.openai.validation import Call, Endpoint

_Piece = tuple[dict[str, Any], int]
"""One choice object of a chunk and the tokens it stands for."""


def chunk_events(
    call: Call, generation: Generation, dialect: Dialect, identity: Identity, usage_on: UsageOn | None = None
) -> list[Event]:
    """
    Return the events of a streamed answer, `[DONE]` last.

    Args:
        call: The request; decides about usage and logprobs.
        generation: What is said.
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
