"""
The merge rules: how the pieces of a streamed chat message become the message.

A message under construction is a plain dict in which a growing string is a `Text` and the tool calls are `ToolCalls`;
`finished` turns it into JSON values.  This file knows no events, no choices and no completeness.

======================  ========================================================================
in the delta            in the message
======================  ========================================================================
string                  appended, except `id`, `type`, `name`, `role` and the like: the last non-empty
                        one wins; a field that is no text and comes again as it is stays as it is
number, boolean         the last one wins; a number is never added to another
object                  merged by the same rules
list of objects         merged part by part, see `Parts`
other list              extended; texts that begin with those that came are those again
`tool_calls`            merged call by call, see `ToolCalls`
null                    changes nothing
======================  ========================================================================

How much a message may hold is bounded, so that no step of its assembly blocks the event loop.

Source: https://platform.openai.com/docs/api-reference/chat-streaming for the shape; the exceptions are what servers do:
Ollama repeats the role in every delta (https://github.com/ollama/ollama/blob/main/openai/openai.go), some repeat the
tool's id and name; OpenAI's own accumulator concatenates those and adds numbers
(https://github.com/openai/openai-python/blob/main/src/openai/lib/streaming/_deltas.py).
"""

from typing import Any

import msgspec

MAX_ENTRIES = 1000
"""Tool calls or parts of one message, and fields of one object.  House decision: far above what models generate."""
_MAX_CHECKED_BYTES = 16 * 1024 * 1024  # of arguments that are looked at for their end, for each message

_IDENTITY = frozenset({"role", "id", "type", "name", "status", "format", "call_id"})
_GROWING = frozenset(
    {
        "arguments",
        "code",
        "content",
        "data",
        "input",
        "partial_json",
        "reasoning",
        "reasoning_content",
        "refusal",
        "summary",
        "text",
        "thinking",
        "transcript",
    }
)
"""Fields that hold generated text: there a piece that comes twice is two pieces."""
_TEXTS_OF_PARTS = frozenset({"text", "thinking", "summary", "reasoning", "content"})
"""Of these, the ones by which a part of a list is known to grow."""
_COMPACT_AT = 4096  # pieces; four-byte tokens as separate strings would take fifteen times their text

_BEGINNINGS, _ENDS = ("{", "[", "null"), ("}", "]", "l")
"""Of arguments that can be seen to be complete; to a number another digit may come."""

_check_json = msgspec.json.Decoder(msgspec.Raw).decode


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

    @property
    def tail(self) -> str:
        """The latest piece; empty when it is, or when it was joined to the earlier ones."""
        return self._pieces[-1] if self._pieces else ""

    def is_just(self, piece: str) -> bool:
        """Whether the text is this one piece so far."""
        return not self._blocks and len(self._pieces) == 1 and self._pieces[0] == piece

    def __str__(self) -> str:
        return "".join(self._blocks) + "".join(self._pieces)


class ToolCalls:
    """
    The tool calls of one message, told apart although servers disagree about how.

    * A call is known by its `index`; the result is in that order and has no `index`, as in an unstreamed answer.
    * Without an index, a new `id` begins a call, a known one continues its call, and no id continues the latest.  Where
      a delta has several pieces with neither index, id nor name, they continue the latest calls in their order.
    * An index that comes again with another id *and* a name is another call: Ollama and gateways to Gemini number every
      call 0 (https://github.com/ollama/ollama/issues/15457).  Another id alone is not enough: old vLLM made up a new
      one for every delta of a call, but gave the name only once.
    * Where ids do not tell, a piece with a name begins another call if the current one's arguments are complete JSON,
      if the name is another one, or if both pieces stand in the same delta.  The last two also where all calls have the
      same id.
    * A whole call that comes again as it was, in the last chunk for example, is not another one.
    """

    __slots__ = ("_by_id", "_by_index", "_bytes_left", "_calls")

    def __init__(self) -> None:
        self._calls: list[tuple[int, dict[str, Any]]] = []
        self._by_index: dict[int | str, dict[str, Any]] = {}
        self._by_id: dict[str, dict[str, Any]] = {}
        self._bytes_left = _MAX_CHECKED_BYTES

    def add(self, deltas: Any) -> None:
        """
        Merge the `tool_calls` of one delta; a lone object counts as a list of one (TGI before 3.0).

        Raises:
            ShapeError: A call is not an object, or there are too many.
        """
        pieces = deltas if isinstance(deltas, list) else [deltas]
        if not all(isinstance(piece, dict) for piece in pieces):
            raise ShapeError("a tool call is not an object")
        if len(pieces) > MAX_ENTRIES:
            raise ShapeError(f"a delta has more than {MAX_ENTRIES} tool calls")
        in_order: list[dict[str, Any]] = []
        if 1 < len(pieces) <= len(self._calls) and not any(map(_is_named, pieces)):
            in_order = [call for _, call in self._calls[-len(pieces) :]]
        before: dict[str, Any] | None = None
        for position, delta in enumerate(pieces):
            call = in_order[position] if in_order else self._call_of(delta, before)
            if not self._is_repeated(call, delta):
                merge(call, delta)
                call.pop("index", None)
                if isinstance(delta.get("id"), str):
                    self._by_id[delta["id"]] = call
            before = call

    def arguments_of(self, index: int) -> Any:
        """Return the growing arguments of the function call with an index; not a `Text` when it has none yet."""
        function = self._by_index.get(index, {}).get("function")
        return function.get("arguments") if type(function) is dict else None

    def finished(self) -> list[dict[str, Any]]:
        """Return the calls in order, as JSON values; a function call has `arguments`, if only empty ones."""
        return [_with_arguments(finished(call)) for _, call in sorted(self._calls, key=lambda item: item[0])]

    def __len__(self) -> int:
        return len(self._calls)

    def _call_of(self, delta: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
        """Return the call that a piece belongs to; `before` is that of the piece before it in the same delta."""
        index = delta.get("index")
        if type(index) is int or (index and type(index) is str):
            known = self._by_index.get(index)
            if known is None or self._is_other_call(known, delta, before):
                self._by_index[index] = known = self._begin(index if type(index) is int else len(self._calls))
            return known
        call_id = delta.get("id")
        if call_id and isinstance(call_id, str):
            known = self._by_id.get(call_id)
            name = _name_of(delta)
            if known is None or (name and (known is before or name != (_name_of(known) or name))):
                return self._begin(len(self._calls))
            return known
        if not self._calls:
            return self._begin(0)
        latest = self._calls[-1][1]
        name = _name_of(delta)
        if name and (name != (_name_of(latest) or name) or self._is_other_call(latest, delta, before)):
            return self._begin(len(self._calls))
        return latest

    def _is_other_call(self, known: dict[str, Any], delta: dict[str, Any], before: dict[str, Any] | None) -> bool:
        if not _name_of(delta) or not _name_of(known):
            return False
        if known.get("id") and delta.get("id"):
            return bool(delta["id"] != known["id"])
        return known is before or self._is_whole(known)

    def _is_repeated(self, call: dict[str, Any], delta: dict[str, Any]) -> bool:
        """Whether a piece is the whole call once more."""
        function = delta.get("function")
        arguments = function.get("arguments") if _name_of(delta) and isinstance(function, dict) else None
        return (
            isinstance(arguments, str)
            and arguments.startswith("{")
            and _name_of(call) == _name_of(delta)
            and self._is_whole(call)
            and str(call["function"]["arguments"]) == arguments
        )

    def _is_whole(self, call: dict[str, Any]) -> bool:
        """Whether the arguments of a function call are complete JSON: an object, or what gateways put in its place."""
        function = call.get("function")
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if not isinstance(arguments, Text):
            return isinstance(arguments, dict)
        tail = arguments.tail.rstrip()
        if (tail and not tail.endswith(_ENDS)) or self._bytes_left <= 0:
            return False
        text = str(arguments).strip()
        self._bytes_left -= len(text)
        return text.startswith(_BEGINNINGS) and _is_json(text)

    def _begin(self, position: int) -> dict[str, Any]:
        if len(self._calls) >= MAX_ENTRIES:
            raise ShapeError(f"a message has more than {MAX_ENTRIES} tool calls")
        call: dict[str, Any] = {}
        self._calls.append((position, call))
        return call


class Parts:
    """
    A list of objects, such as content parts or blocks of reasoning, that comes in pieces.

    * A part is known by its `index` and `type`, or by its `id`.
    * Without them, the first object of a delta continues the latest part if it has the same `type` and holds text, and
      the latest part is not closed by a `signature`.  What holds no text is a part of its own.
    * Parts without text that are sent again with every delta are listed once.

    Source: `thinking_blocks` of LiteLLM (https://docs.litellm.ai/docs/reasoning_content), `reasoning_details` of
    OpenRouter (https://openrouter.ai/docs/use-cases/reasoning-tokens).
    """

    __slots__ = ("_by_key", "_entries", "_seen")

    def __init__(self) -> None:
        self._entries: list[Any] = []
        self._by_key: dict[Any, dict[str, Any]] = {}
        self._seen: list[Any] = []

    def add(self, values: list[Any]) -> None:
        """
        Merge the list of one delta.

        Raises:
            ShapeError: There are too many parts.
        """
        if len(values) > MAX_ENTRIES:
            raise ShapeError(f"a delta has more than {MAX_ENTRIES} parts")
        if not any(_holds_text(value) or _key_of(value) is not None for value in values):
            is_again = self._seen and values[: len(self._seen)] == self._seen
            values = values[len(self._seen) :] if is_again else values
            self._seen = self._seen + values if is_again else list(values)
        for position, value in enumerate(values):
            if not isinstance(value, dict):
                self._append(value)
                continue
            part = self._part_of(value, is_first=position == 0)
            merge(part, _without_repeated_text(part, value) if value.get("signature") else value)

    def finished(self) -> list[Any]:
        """Return the parts as JSON values."""
        return [finished(entry) if isinstance(entry, dict) else entry for entry in self._entries]

    def __len__(self) -> int:
        return len(self._entries)

    def _part_of(self, value: dict[str, Any], *, is_first: bool) -> dict[str, Any]:
        key = _key_of(value)
        if key is not None and key in self._by_key:
            return self._by_key[key]
        latest = self._entries[-1] if self._entries else None
        if key is None and is_first and isinstance(latest, dict) and _continues(latest, value):
            return latest
        part: dict[str, Any] = {}
        self._append(part)
        if key is not None:
            self._by_key[key] = part
        return part

    def _append(self, entry: Any) -> None:
        if len(self._entries) >= MAX_ENTRIES:
            raise ShapeError(f"a list has more than {MAX_ENTRIES} parts")
        self._entries.append(entry)


def merge(target: dict[str, Any], source: dict[str, Any]) -> None:
    """
    Merge one delta into a message under construction.

    Raises:
        ShapeError: The delta's `tool_calls` are not objects, or the message holds too much.
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
    if len(target) > MAX_ENTRIES:
        raise ShapeError(f"an object has more than {MAX_ENTRIES} fields")


def extend_lists(target: dict[str, Any], source: dict[str, Any]) -> None:
    """Merge log probabilities: lists that run along with the text, in which the same entry may come again."""
    for key, value in source.items():
        known = target.get(key)
        if value is None:
            target.setdefault(key, None)
        elif isinstance(value, list):
            if isinstance(known, list):
                known.extend(value)
            else:
                target[key] = list(value)
        else:
            target[key] = value


def finished(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a message under construction as JSON values; the message can go on growing afterwards."""
    return {key: _finished_value(value) for key, value in fields.items()}


def _finished_value(value: Any) -> Any:
    if isinstance(value, Text):
        return str(value)
    if isinstance(value, (ToolCalls, Parts)):
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
        if key in _GROWING or not known.is_just(value):
            known.append(value)
    elif type(known) is Parts and key == "content":
        known.add(_as_parts(value))
    else:
        target[key] = Text(value)


def _merge_list(target: dict[str, Any], key: str, value: list[Any]) -> None:
    known = target.get(key)
    if type(known) is Text and key == "content":
        target[key] = parts = Parts()
        parts.add(_as_parts(str(known)))
        parts.add(value)
    elif type(known) is Parts:
        known.add(value)
    elif any(type(item) is dict for item in value):
        target[key] = parts = Parts()
        parts.add([*known, *value] if type(known) is list else value)
    elif type(known) is not list:
        target[key] = list(value)
    elif value[: len(known)] == known and all(type(item) is str for item in value):
        known.extend(value[len(known) :])  # the same texts again, with more of them behind
    else:
        known.extend(value)


def _as_parts(text: str) -> list[Any]:
    """
    Return text as content parts, so that a `content` which is now text and now parts loses nothing.

    Source: Mistral's reasoning models (https://docs.mistral.ai/capabilities/reasoning/).
    """
    return [{"type": "text", "text": text}] if text else []


def _name_of(call: dict[str, Any]) -> Any:
    for key in ("function", "custom"):
        inner = call.get(key)
        if isinstance(inner, dict):
            return inner.get("name")
    return None


def _is_named(piece: dict[str, Any]) -> bool:
    """Whether a piece of a tool call says which call it belongs to, or begins one."""
    return piece.get("index") is not None or bool(piece.get("id")) or bool(_name_of(piece))


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """Return a call with the text that clients' types require."""
    function = call.get("function")
    if isinstance(function, dict) and function.get("arguments") is None:
        call["function"] = {**function, "arguments": ""}
    return call


def _key_of(value: Any) -> Any:
    """Return by what a part is known among the others, `None` where nothing tells."""
    if not isinstance(value, dict):
        return None
    index, part_id, kind = value.get("index"), value.get("id"), value.get("type")
    if type(index) is int:
        return index, kind if isinstance(kind, str) else None
    return part_id if part_id and isinstance(part_id, str) else None


def _holds_text(value: Any) -> bool:
    return isinstance(value, dict) and not _TEXTS_OF_PARTS.isdisjoint(value)


def _without_repeated_text(part: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    """Return a piece that closes a part by its signature, without text that is all the part's text once more."""
    return {
        key: piece
        for key, piece in value.items()
        if not (key in _TEXTS_OF_PARTS and piece and isinstance(part.get(key), Text) and str(part[key]) == piece)
    }


def _continues(latest: dict[str, Any], value: dict[str, Any]) -> bool:
    """Whether a piece without index and id is more of the latest part."""
    kind = value.get("type")
    is_same = kind is None or kind == latest.get("type")
    is_closed = isinstance(latest.get("signature"), Text) and bool(str(latest["signature"]))
    if is_closed and set(value) <= {"type", "signature"}:
        return is_same  # a signature in pieces
    is_piece = _holds_text(value) or set(value) <= {"type", "signature"}
    return is_same and is_piece and _holds_text(latest) and not is_closed


def _is_json(text: str) -> bool:
    try:
        _check_json(text.encode("utf-8", "replace"))
    except (msgspec.DecodeError, RecursionError):
        return False
    return True
