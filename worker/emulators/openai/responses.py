"""
The Responses API: its body and its typed events, from the same generation as everything else.

Source: https://platform.openai.com/docs/api-reference/responses and `.../responses-streaming`.  There is no `[DONE]`;
a stream ends with `response.completed`, `response.incomplete` or `response.failed`, whose `response` is the unary body.
"""

from typing import Any

from worker.emulators.openai.answers import Identity
from worker.emulators.openai.dialects import Dialect
from worker.emulators.openai.generation import Choice, Generation
from worker.emulators.openai.sse import Event
from worker.emulators.openai.validation import Call

_WHOLE = frozenset({"stop", "tool_calls"})
_REASONS = {"length": "max_output_tokens"}
"""What `incomplete_details.reason` calls a finish_reason, where the two names differ."""
_ECHOED: tuple[tuple[str, Any], ...] = (
    ("instructions", None),
    ("max_output_tokens", None),
    ("metadata", {}),
    ("parallel_tool_calls", True),
    ("previous_response_id", None),
    ("temperature", 1.0),
    ("tool_choice", "auto"),
    ("tools", []),
    ("top_p", 1.0),
)
"""Request parameters that the response repeats, with their defaults."""


def _items(choice: Choice, identity: Identity, dialect: Dialect) -> list[dict[str, Any]]:
    """Return the finished output items of an answer, in order."""
    status = "completed" if choice.finish_reason in _WHOLE else "incomplete"
    items: list[dict[str, Any]] = []
    if choice.reasoning:
        content = [{"type": "reasoning_text", "text": "".join(choice.reasoning)}] if dialect.reasoning_field else []
        items.append({"type": "reasoning", "id": f"rs_{identity.value}", "summary": [], "content": content})
    for place, call in enumerate(choice.tool_calls):
        items.append(
            {
                "type": "function_call",
                "id": f"fc_{identity.value}_{place}",
                "call_id": call.id,
                "name": call.name,
                "arguments": "".join(call.arguments),
                "status": status,
            }
        )
    if not choice.tool_calls:
        part = {"type": "output_text", "text": choice.text, "annotations": [], "logprobs": []}
        items.append(
            {
                "type": "message",
                "id": f"msg_{identity.value}",
                "role": "assistant",
                "status": status,
                "content": [part],
            }
        )
    return items


def _shell(call: Call, identity: Identity) -> dict[str, Any]:
    echoed = {name: call.body.get(name, default) for name, default in _ECHOED}
    return {
        "id": f"resp_{identity.value}",
        "object": "response",
        "created_at": identity.created,
        "model": call.model,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "output": [],
        "usage": None,
        **echoed,
    }


def response_body(call: Call, generation: Generation, dialect: Dialect, identity: Identity) -> dict[str, Any]:
    """Return a response; an answer cut by `max_output_tokens` has the status `incomplete`."""
    choice = generation.choices[0] if generation.choices else None
    finish = choice.finish_reason if choice else "stop"
    reason = None if finish in _WHOLE else _REASONS.get(finish, finish)
    output = generation.completion_tokens
    return {
        **_shell(call, identity),
        "status": "incomplete" if reason else "completed",
        "incomplete_details": {"reason": reason} if reason else None,
        "output": _items(choice, identity, dialect) if choice else [],
        "usage": {
            "input_tokens": generation.prompt_tokens,
            "input_tokens_details": {"cached_tokens": generation.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": output,
            "output_tokens_details": {"reasoning_tokens": generation.reasoning_tokens},
            "total_tokens": generation.prompt_tokens + output,
        },
    }


class _Writer:
    """Collects events and numbers them, as `sequence_number` demands."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def add(self, kind: str, tokens: int = 0, **payload: Any) -> None:
        body = {"type": kind, "sequence_number": len(self.events), **payload}
        self.events.append(Event(body, name=kind, tokens=tokens, terminal=kind.endswith(("completed", "incomplete"))))


def response_events(call: Call, generation: Generation, dialect: Dialect, identity: Identity) -> list[Event]:
    """Return every event of a streamed response, the terminal one last."""
    final = response_body(call, generation, dialect, identity)
    out = _Writer()
    shell = _shell(call, identity)
    out.add("response.created", response=shell)
    out.add("response.in_progress", response=shell)
    choice = generation.choices[0] if generation.choices else Choice(0, [])
    calls = iter(choice.tool_calls)
    for index, item in enumerate(final["output"]):
        started = {**item, "status": "in_progress"} if "status" in item else dict(item)
        place = {"output_index": index, "item_id": item["id"]}
        match item["type"]:
            case "function_call":
                out.add("response.output_item.added", output_index=index, item={**started, "arguments": ""})
                for token in next(calls).arguments:
                    out.add("response.function_call_arguments.delta", 1, **place, delta=token)
                out.add("response.function_call_arguments.done", **place, arguments=item["arguments"])
            case "message":
                out.add("response.output_item.added", output_index=index, item={**started, "content": []})
                _text_events(out, place, choice.tokens, item["content"][0])
            case _:
                out.add("response.output_item.added", output_index=index, item={**started, "content": []})
                for token in choice.reasoning:
                    shown = token if item["content"] else ""
                    out.add("response.reasoning_text.delta", 1, **place, content_index=0, delta=shown)
        out.add("response.output_item.done", output_index=index, item=item)
    out.add(f"response.{final['status']}", response=final)
    return out.events


def _text_events(out: _Writer, place: dict[str, Any], tokens: list[str], part: dict[str, Any]) -> None:
    where = {**place, "content_index": 0}
    out.add("response.content_part.added", **where, part={**part, "text": ""})
    for token in tokens:
        out.add("response.output_text.delta", 1, **where, delta=token, logprobs=[])
    out.add("response.output_text.done", **where, text=part["text"], logprobs=[])
    out.add("response.content_part.done", **where, part=part)
