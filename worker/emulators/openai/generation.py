"""
What the simulated model says: tokens, reasoning, tool calls and why it stopped, before any wire format.

Pure: the same call and draws give the same generation.  `answers` and `responses` turn one generation into a body or
into chunks, so the two always agree.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import msgspec

from worker.emulators.openai.fields import text_list
from worker.emulators.openai.options import SimOptions
from worker.emulators.openai.seeded import Draws, schema_value, split_tokens, tokens_from
from worker.emulators.openai.validation import Call, Endpoint

_EFFORT_TOKENS = 12
"""Reasoning tokens of a request that has `reasoning_effort` when the server's own setting is 0."""
_CACHE_BLOCK = 1024
"""Prompts below this are never cached; https://platform.openai.com/docs/guides/prompt-caching."""


_WITH_TEXT = frozenset({Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.RESPONSES})
_FORM = frozenset({"stream", "stream_options", "max_tokens", "max_completion_tokens", "max_output_tokens"})
"""Keys that say how an answer is sent and where it is cut, not what it is about."""


def subject(body: Mapping[str, Any]) -> bytes:
    """
    Return what an answer depends on: the request without its form of delivery, the order of its keys and its spaces.

    So the same question has the same answer streamed and not, however a client writes its JSON; a limit of tokens cuts
    it and does not change it.
    """
    kept = {key: value for key, value in body.items() if key not in _FORM}
    return msgspec.json.encode(kept, order="deterministic")


@dataclass(slots=True)
class ToolCall:
    """One function the model wants to be called."""

    id: str
    name: str
    arguments: list[str]
    """Tokens; joined they are JSON, unless `max_tokens` cut them."""


@dataclass(slots=True)
class Choice:
    """One of the answers to one prompt."""

    index: int
    tokens: list[str]
    """The text; empty when there are tool calls."""
    reasoning: list[str] = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str = "stop"

    @property
    def text(self) -> str:
        """The text in one piece."""
        return "".join(self.tokens)

    @property
    def token_count(self) -> int:
        """Generated tokens, reasoning and tool arguments included."""
        return len(self.tokens) + len(self.reasoning) + sum(len(call.arguments) for call in self.tool_calls)


@dataclass(frozen=True)
class Generation:
    """Everything generated for one request; not changed once it is made."""

    choices: list[Choice]
    prompt_tokens: int
    cached_tokens: int = 0

    @cached_property
    def completion_tokens(self) -> int:
        """Generated tokens of all choices."""
        return sum(choice.token_count for choice in self.choices)

    @cached_property
    def reasoning_tokens(self) -> int:
        """How many of the completion tokens are reasoning."""
        return sum(len(choice.reasoning) for choice in self.choices)


def generate(
    call: Call, draws: Draws, options: SimOptions, *, say: str | None = None, finish_reason: str | None = None
) -> Generation:
    """
    Return what the model says to a call.

    Args:
        call: A checked request; those that are not answered with text generate nothing.
        draws: Keyed with the request's body.
        options: Lengths.
        say: The exact text to say instead of an invented one; `max_tokens` does not cut it.
        finish_reason: The reason to give in every choice instead of the real one.
    """
    choices: list[Choice] = []
    if call.endpoint in _WITH_TEXT:
        prompts = max(1, len(call.inputs))
        choices = [_choice(call, place, draws, options, say) for place in range(prompts * call.n)]
    if finish_reason is not None:
        for choice in choices:
            choice.finish_reason = finish_reason
    cached = 0
    if call.prompt_tokens >= _CACHE_BLOCK and draws.uniform("cached") > 0.5:  # noqa: PLR2004 - every other one
        cached = call.prompt_tokens // _CACHE_BLOCK * _CACHE_BLOCK
    return Generation(choices, call.prompt_tokens, cached)


def _choice(call: Call, index: int, draws: Draws, options: SimOptions, say: str | None) -> Choice:
    choice = Choice(index, [])
    wanted = options.reasoning_tokens or (_EFFORT_TOKENS if _asks_for_reasoning(call.body) else 0)
    if call.endpoint in {Endpoint.CHAT, Endpoint.RESPONSES} and wanted:
        choice.reasoning = tokens_from(draws.data(f"reasoning{index}", wanted))
    if say is not None:
        choice.tokens = split_tokens(say)
    elif names := _wanted_tools(call, index, draws):
        choice.tool_calls = [_tool_call(call, name, index, place, draws) for place, name in enumerate(names)]
        choice.finish_reason = "tool_calls"
    elif (shaped := _shaped(call.body, draws)) is not None:
        choice.tokens = split_tokens(msgspec.json.encode(shaped).decode())
    else:
        mean = options.answer_tokens
        length = draws.between(f"length{index}", (mean + 1) // 2, mean + mean // 2)
        choice.tokens = tokens_from(draws.data(f"text{index}", length))
        _stop_at(choice, call.body.get("stop"))
    if call.prefix:
        choice.reasoning, choice.tokens = [], tokens_after(choice.tokens, call.prefix)
    if call.max_tokens is not None and say is None:
        _limit(choice, call.max_tokens)
    return choice


def _asks_for_reasoning(body: Mapping[str, Any]) -> bool:
    reasoning = body.get("reasoning")
    effort = body.get("reasoning_effort") or (reasoning.get("effort") if isinstance(reasoning, dict) else None)
    return effort not in {None, "none"} if isinstance(effort, str | None) else False


def _shaped(body: Mapping[str, Any], draws: Draws) -> Any:
    """Return the value of an answer that must be JSON, None when any text will do."""
    wanted = body.get("response_format")
    text = body.get("text")
    if wanted is None and isinstance(text, dict):
        wanted = text.get("format")
    if not isinstance(wanted, dict) or wanted.get("type") not in {"json_object", "json_schema"}:
        return None
    if wanted["type"] == "json_object":
        return {"answer": "".join(tokens_from(draws.data("text0", 6)))}
    holder = wanted.get("json_schema", wanted)
    return schema_value(holder.get("schema") if isinstance(holder, dict) else None, draws)


def _wanted_tools(call: Call, index: int, draws: Draws) -> list[str]:
    """Return the functions to call: those required, or sometimes one, or none right after a tool's result."""
    names = [name for name, _ in call.tools]
    if not names or call.tool_choice == "none":
        return []
    if call.tool_choice.startswith("="):
        return [call.tool_choice[1:]]
    messages = call.body.get("messages") or call.body.get("input")
    last = messages[-1] if isinstance(messages, list) else {}
    answered = last.get("role") == "tool" or last.get("type") == "function_call_output"
    coin = draws.uniform(f"tools{index}")
    if call.tool_choice != "required" and (answered or coin < 0.5):  # noqa: PLR2004 - every other one
        return []
    first = draws.between(f"tool{index}", 0, len(names) - 1)
    several = len(names) > 1 and call.body.get("parallel_tool_calls") is not False and coin > 0.8  # noqa: PLR2004
    return [names[first], names[(first + 1) % len(names)]] if several else [names[first]]


def _tool_call(call: Call, name: str, index: int, place: int, draws: Draws) -> ToolCall:
    label = f"call{index}.{place}"
    schema = next(schema for tool, schema in call.tools if tool == name)
    arguments = schema_value(schema or {"type": "object"}, Draws(0, draws.data(label, 16)))
    text = msgspec.json.encode(arguments if isinstance(arguments, dict) else {}).decode()
    return ToolCall("call_" + draws.hex(label), name, split_tokens(text))


def _stop_at(choice: Choice, stop: object) -> None:
    """Cut the text before the first stop sequence, as the sequence itself is never returned."""
    if stop is None:
        return
    text = choice.text
    ends = [end for sequence in text_list("stop", stop) if sequence and (end := text.find(sequence)) >= 0]
    if ends:
        choice.tokens = split_tokens(text[: min(ends)])


def _limit(choice: Choice, budget: int) -> None:
    """Spend at most `budget` tokens: reasoning first, then text or arguments."""
    if choice.token_count <= budget:
        return
    choice.finish_reason = "length"
    choice.reasoning = choice.reasoning[:budget]
    left = budget - len(choice.reasoning)
    choice.tokens = choice.tokens[:left]
    kept = []
    for call in choice.tool_calls:
        if left <= 0:
            break
        call.arguments = call.arguments[:left]
        left -= len(call.arguments)
        kept.append(call)
    choice.tool_calls = kept


def tokens_after(tokens: list[str], prefix: str) -> list[str]:
    """Return the tokens behind a text that they begin with; all of them when they begin otherwise."""
    if not "".join(tokens).startswith(prefix):
        return tokens
    length = 0
    for place, token in enumerate(tokens):
        if length + len(token) > len(prefix):
            return [token[len(prefix) - length :], *tokens[place + 1 :]]
        length += len(token)
    return []
