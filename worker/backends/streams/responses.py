"""
Streams of the Responses API: named events, of which the last one carries the whole answer.

The result is the `response` object of the terminal event, byte for byte.  Everything before it is only collected for
the answer that never comes: a broken stream's partial.  There is no `[DONE]` to wait for.

Source: https://platform.openai.com/docs/api-reference/responses-streaming; `keepalive` events are undocumented
(https://github.com/openai/openai-node/issues/1964).
"""

from typing import Any, Final

import msgspec

from worker.backends.streams.accumulator import CONTENT, DATA, Accumulator, kind_of
from worker.backends.streams.merge import ShapeError, Text
from worker.backends.streams.sse import Event

_TERMINAL: Final = frozenset({"response.completed", "response.incomplete", "response.failed"})
_LIFECYCLE: Final = frozenset({"response.created", "response.queued", "response.in_progress"})

_DELTAS: Final[dict[str, tuple[str, str]]] = {
    # event type: (list of parts inside the output item, or "" for the item itself; the string that grows)
    "response.output_text.delta": ("content", "text"),
    "response.refusal.delta": ("content", "refusal"),
    "response.reasoning_text.delta": ("content", "text"),
    "response.reasoning_summary_text.delta": ("summary", "text"),
    "response.function_call_arguments.delta": ("", "arguments"),
    "response.custom_tool_call_input.delta": ("", "input"),
    "response.mcp_call_arguments.delta": ("", "arguments"),
    "response.code_interpreter_call_code.delta": ("", "code"),
}
_PARTS: Final[dict[str, str]] = {
    "response.content_part.added": "content",
    "response.content_part.done": "content",
    "response.reasoning_part.added": "content",
    "response.reasoning_part.done": "content",
    "response.reasoning_summary_part.added": "summary",
    "response.reasoning_summary_part.done": "summary",
}


class _Delta(msgspec.Struct, gc=False):
    """The commonest event; fields it does not name are not needed, since the terminal event repeats everything."""

    type: str
    delta: str
    output_index: int = 0
    content_index: int = 0
    summary_index: int = 0


class _Terminal(msgspec.Struct, gc=False):
    response: msgspec.Raw


_decode_delta = msgspec.json.Decoder(_Delta).decode
_decode_terminal = msgspec.json.Decoder(_Terminal).decode

_TextKey = tuple[int, str, int, str]  # output index, list of parts, index in it, name of the string


class ResponsesAccumulator(Accumulator):
    """`/v1/responses`; `failed` is an end too, but an error: see `error`."""

    def __init__(self) -> None:
        """Start before the first event."""
        super().__init__()
        self._response: dict[str, Any] = {"object": "response", "status": "in_progress"}
        self._items: dict[int, dict[str, Any]] = {}
        self._parts: dict[tuple[int, str, int], dict[str, Any]] = {}
        self._texts: dict[_TextKey, Text] = {}
        self._terminal: dict[str, Any] | None = None
        self._raw = b""

    @property
    def usage(self) -> dict[str, Any] | None:
        """See the contract; only the terminal event has it."""
        usage = (self._terminal or {}).get("usage")
        return self._clean(usage) if isinstance(usage, dict) else None

    @property
    def missing_done(self) -> bool:
        """Never: this API promises no `[DONE]`."""
        return False

    def is_complete(self) -> bool:
        """See the contract: a terminal event came; `response.failed` sets `error` and is not a complete answer."""
        return self.error is None and self._terminal is not None

    def result(self) -> bytes:
        """See the contract."""
        body = self._encoded(self._body())
        is_whole = self._terminal is not None and self._terminal.get("output")
        return self._raw if self._raw and is_whole else body

    def partial(self) -> dict[str, Any] | None:
        """See the contract; the `status` is the last one the server told."""
        if not self.has_partial:
            return None
        body: dict[str, Any] = self._clean(self._body())
        return body

    def generated_text(self) -> dict[int, str]:
        """See the contract; there is one choice, 0."""
        texts = [
            part["text"]
            for item in _objects(self._body()["output"])
            if item.get("type") != "reasoning"
            for part in _objects(item.get("content"))
            if isinstance(part.get("text"), str)
        ]
        return {0: self._clean("".join(texts))}

    def _merge_common(self, event: Event) -> int:
        try:
            delta = _decode_delta(event.data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return -1
        if delta.type not in _DELTAS or event.name == "error":
            return -1
        bits = self._append(delta)
        self.content_events += 1 if bits & CONTENT else 0
        return bits

    def _append(self, delta: _Delta) -> int:
        place, name = _DELTAS[delta.type]
        index = {"": 0, "content": delta.content_index, "summary": delta.summary_index}[place]
        key = (delta.output_index, place, index, name)
        text = self._texts.get(key)
        if text is None:
            self._texts[key] = text = Text()
        text.append(delta.delta)
        return DATA | CONTENT if delta.delta else DATA

    def _merge(self, chunk: dict[str, Any], event: Event) -> int:
        kind = kind_of(chunk, event)
        if kind in _TERMINAL:
            return self._end(kind, chunk, event)
        if kind in _LIFECYCLE:
            self._response = _object(chunk, "response")
        elif kind in ("response.output_item.added", "response.output_item.done"):
            index = _index(chunk, "output_index")
            self._items[index] = _object(chunk, "item")
            if kind.endswith(".done"):  # the item is whole: its pieces are no longer needed
                self._texts = {key: text for key, text in self._texts.items() if key[0] != index}
                self._parts = {key: part for key, part in self._parts.items() if key[0] != index}
        elif kind in _PARTS:
            place = _PARTS[kind]
            part_index = _index(chunk, "summary_index" if place == "summary" else "content_index")
            self._parts[_index(chunk, "output_index"), place, part_index] = _object(chunk, "part")
        elif kind in _DELTAS:  # half an emoji, or no `type` but the event's name: the typed decode refused it
            return self._append(_as_delta(kind, chunk))
        return DATA

    def _end(self, kind: str, chunk: dict[str, Any], event: Event) -> int:
        self._terminal = _object(chunk, "response")
        if not self._needs_repair and event.data.lstrip().startswith(b"{"):
            self._raw = bytes(_decode_terminal(event.data).response)
        if kind == "response.failed":
            error = self._terminal.get("error")
            data = msgspec.json.encode(self._clean({"error": error})) if isinstance(error, dict) else event.data
            return self._fail(data)
        return DATA

    def _body(self) -> dict[str, Any]:
        """Return the terminal response, or what was collected; an empty `output` is filled in from that, too."""
        # Gateways end a whole stream with an empty `output`: https://github.com/open-webui/open-webui/pull/27800
        response = self._terminal if self._terminal is not None else self._response
        return response if response.get("output") else {**response, "output": self._output()}

    def _output(self) -> list[dict[str, Any]]:
        indexes = {*self._items, *(key[0] for key in self._parts), *(key[0] for key in self._texts)}
        return [self._item(index) for index in sorted(indexes)]

    def _item(self, output_index: int) -> dict[str, Any]:
        item = dict(self._items.get(output_index, {}))
        parts: dict[str, dict[int, dict[str, Any]]] = {}
        for place in ("content", "summary"):
            known = item.get(place)
            parts[place] = {i: dict(part) for i, part in enumerate(_objects(known))}
        for (index, place, i), part in self._parts.items():
            if index == output_index:
                parts[place][i] = dict(part)
        for (index, place, i, name), text in self._texts.items():
            if index == output_index:
                target = parts[place].setdefault(i, {}) if place else item
                target[name] = str(text)
        for place, by_index in parts.items():
            if by_index:
                item[place] = [part for _, part in sorted(by_index.items())]
        return item


def _object(chunk: dict[str, Any], key: str) -> dict[str, Any]:
    value = chunk.get(key)
    if not isinstance(value, dict):
        raise ShapeError(f"an event's `{key}` is not an object")
    return value


def _objects(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _index(chunk: dict[str, Any], key: str) -> int:
    value = chunk.get(key, 0)
    if type(value) is not int:
        raise ShapeError(f"an event's `{key}` is not a number")
    return value


def _as_delta(kind: str, chunk: dict[str, Any]) -> _Delta:
    delta = chunk.get("delta")
    if not isinstance(delta, str):
        raise ShapeError("an event's `delta` is not a string")
    indexes = {key: _index(chunk, key) for key in ("output_index", "content_index", "summary_index")}
    return _Delta(type=kind, delta=delta, **indexes)
