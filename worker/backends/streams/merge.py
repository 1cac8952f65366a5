"""
The merge rules: how the pieces of a streamed chat message become the message.

A message under construction is a plain dict in which a growing string is a `Text` and the tool calls are `ToolCalls`;
`finished` turns it into JSON values.  This file knows no events, no choices and no completeness.

======================  ========================================================================
in the delta            in the message
======================  ========================================================================
string                  appended, except `id`, `type`, `name`, `role`: the last non-empty one wins
number, boolean         the last one wins; a number is never added to another
object                  merged by the same rules
list                    extended
`tool_calls`            merged call by call, see `ToolCalls`
null                    changes nothing
======================  ========================================================================

Source: https://platform.openai.com/docs/api-reference/chat-streaming for the shape; the exceptions are what servers do:
Ollama repeats the role in every delta (https://github.com/ollama/ollama/blob/main/openai/openai.go), some repeat the
tool's id and name; OpenAI's own accumulator concatenates those and adds numbers
(https://github.com/openai/openai-python/blob/main/src/openai/lib/streaming/_deltas.py).
"""

from typing import Any

_IDENTITY = frozenset({"role", "id", "type", "name"})
_COMPACT_AT = 4096  # pieces; four-byte tokens as separate strings would take fifteen times their text


class ShapeError(ValueError):
    """A chunk is JSON but not of its API's shape; the accumulator makes a `MalformedEventError` of it."""


class Text:
    """A string that grows at its end; linear in time and, up to a constant, in memory."""

    __slots__ = ("_blocks", "_pieces")

    def __init__(self, first: str = "") -> None:
        self._blocks: list[str] = []
        self._pieces: list[str] = [first]

    def append(self, piece: str) -> None:
        """Add a piece."""
        self._pieces.append(piece)
        if len(self._pieces) >= _COMPACT_AT:
            self._blocks.append("".join(self._pieces))
            self._pieces.clear()

    def __str__(self) -> str:
        return "".join(self._blocks) + "".join(self._pieces)


class ToolCalls:
    """
    The tool calls of one message, told apart although servers disagree about how.

    * A call is known by its `index`; the result is in that order and has no `index`, as in an unstreamed answer.
    * Without an index, a new `id` begins a call, a known one continues its call, and no id continues the latest.
    * An index that comes again with another id *and* a name is another call: Ollama and gateways to Gemini number every
      call 0 (https://github.com/ollama/ollama/issues/15457).  Another id alone is not enough: old vLLM made up a new
      one for every delta of a call, but gave the name only once.
    """

    __slots__ = ("_by_index", "_calls")

    def __init__(self) -> None:
        self._calls: list[tuple[int, dict[str, Any]]] = []
        self._by_index: dict[int, dict[str, Any]] = {}

    def add(self, deltas: Any) -> None:
        """Merge the `tool_calls` of one delta; a lone object counts as a list of one (TGI before 3.0)."""
        for delta in deltas if isinstance(deltas, list) else [deltas]:
            if not isinstance(delta, dict):
                raise ShapeError("a tool call is not an object")
            call = self._call_of(delta)
            merge(call, delta)
            call.pop("index", None)

    def arguments_of(self, index: int) -> Any:
        """Return the growing arguments of the function call with an index; not a `Text` when it has none yet."""
        function = self._by_index.get(index, {}).get("function")
        return function.get("arguments") if type(function) is dict else None

    def finished(self) -> list[dict[str, Any]]:
        """Return the calls in order, as JSON values."""
        return [finished(call) for _, call in sorted(self._calls, key=lambda item: item[0])]

    def __len__(self) -> int:
        return len(self._calls)

    def _call_of(self, delta: dict[str, Any]) -> dict[str, Any]:
        index = delta.get("index")
        if type(index) is int:
            known = self._by_index.get(index)
            if known is None or _is_other_call(known, delta):
                self._by_index[index] = known = self._begin(index)
            return known
        if delta.get("id"):
            for _, call in self._calls:
                if call.get("id") == delta["id"]:
                    return call
        elif self._calls:
            return self._calls[-1][1]
        return self._begin(len(self._calls))

    def _begin(self, position: int) -> dict[str, Any]:
        call: dict[str, Any] = {}
        self._calls.append((position, call))
        return call


def merge(target: dict[str, Any], source: dict[str, Any]) -> None:
    """
    Merge one delta into a message under construction.

    Raises:
        ShapeError: The delta's `tool_calls` are not objects.
    """
    for key, value in source.items():
        kind = type(value)
        if value is None:
            target.setdefault(key, None)
        elif key == "tool_calls":
            _tool_calls(target).add(value)
        elif kind is str:
            _merge_string(target, key, value)
        elif kind is list:
            _merge_list(target, key, value)
        elif kind is dict:
            known = target.get(key)
            if type(known) is not dict:
                target[key] = known = {}
            merge(known, value)
        else:
            target[key] = value


def finished(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a message under construction as JSON values; the message can go on growing afterwards."""
    return {key: _finished_value(value) for key, value in fields.items()}


def _finished_value(value: Any) -> Any:
    if isinstance(value, Text):
        return str(value)
    if isinstance(value, ToolCalls):
        return value.finished()
    if isinstance(value, dict):
        return finished(value)
    return list(value) if isinstance(value, list) else value


def _tool_calls(target: dict[str, Any]) -> ToolCalls:
    calls = target.get("tool_calls")
    if not isinstance(calls, ToolCalls):
        target["tool_calls"] = calls = ToolCalls()
    return calls


def _merge_string(target: dict[str, Any], key: str, value: str) -> None:
    known = target.get(key)
    if key in _IDENTITY:
        if value or known is None:
            target[key] = value
    elif type(known) is Text:
        known.append(value)
    elif type(known) is list and key == "content":
        known.extend(_as_parts(value))
    else:
        target[key] = Text(value)


def _merge_list(target: dict[str, Any], key: str, value: list[Any]) -> None:
    known = target.get(key)
    if type(known) is list:
        known.extend(value)
    elif type(known) is Text and key == "content":
        target[key] = [*_as_parts(str(known)), *value]
    else:
        target[key] = list(value)


def _as_parts(text: str) -> list[Any]:
    """
    Return text as content parts, so that a `content` which is now text and now parts loses nothing.

    Source: Mistral's reasoning models (https://docs.mistral.ai/capabilities/reasoning/).
    """
    return [{"type": "text", "text": text}] if text else []


def _is_other_call(known: dict[str, Any], delta: dict[str, Any]) -> bool:
    return bool(
        known.get("id") and delta.get("id") and delta["id"] != known["id"] and _name_of(known) and _name_of(delta),
    )


def _name_of(call: dict[str, Any]) -> Any:
    function = call.get("function")
    return function.get("name") if isinstance(function, dict) else None
