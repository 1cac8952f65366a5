"""
Streams of the Responses API: named events, of which the last one carries the whole answer.

The result is the `response` object of the terminal event, byte for byte.  Everything before it is only collected for
the answer that never comes: a broken stream's partial.  There is no `[DONE]` to wait for.  Of a long terminal event no
objects are built.

Source: https://platform.openai.com/docs/api-reference/responses-streaming; `keepalive` events are undocumented
(https://github.com/openai/openai-node/issues/1964).
"""

from typing import Any, Final

import msgspec

from worker.backends.streams.accumulator import CONTENT, DATA, SMALL_BYTES, Accumulator, MalformedEventError, kind_of
from worker.backends.streams.merge import MAX_ENTRIES, ShapeError, Text
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
    type: str = ""


class _Response(msgspec.Struct, gc=False):
    output: msgspec.Raw
    usage: msgspec.Raw = msgspec.Raw(b"null")


_decode_delta = msgspec.json.Decoder(_Delta).decode
_decode_terminal = msgspec.json.Decoder(_Terminal).decode
_decode_response = msgspec.json.Decoder(_Response).decode

_MAX_HELD = 10_000  # parts and texts of all unfinished items together


class _Item:
    """What came of one output item."""

    __slots__ = ("parts", "texts", "value")

    def __init__(self) -> None:
        self.value: dict[str, Any] = {}
        self.parts: dict[tuple[str, int], dict[str, Any]] = {}  # by list of parts and index in it
        self.texts: dict[tuple[str, int, str], Text] = {}  # likewise, and by the name of the string

    def body(self) -> dict[str, Any]:
        """Return the item as it stands."""
        item = dict(self.value)
        lists: dict[str, dict[int, dict[str, Any]]] = {}
        for place in ("content", "summary"):
            lists[place] = {i: dict(part) for i, part in enumerate(_objects(item.get(place)))}
        for (place, i), part in self.parts.items():
            lists[place][i] = dict(part)
        for (place, i, name), text in self.texts.items():
            target = lists[place].setdefault(i, {}) if place else item
            target[name] = str(text)
        for place, by_index in lists.items():
            if by_index:
                item[place] = [part for _, part in sorted(by_index.items())]
        return item


class ResponsesAccumulator(Accumulator):
    """`/v1/responses`; `failed` is an end too, but an error: see `error`."""

    def __init__(self) -> None:
        """Start before the first event."""
        super().__init__()
        self._response: dict[str, Any] = {"object": "response", "status": "in_progress"}
        self._items: dict[int, _Item] = {}
        self._held = 0  # parts and texts
        self._is_ended = False
        self._usage: Any = None
        self._raw = b""  # the terminal response, if it has an output and can be passed on as it came

    @property
    def usage(self) -> dict[str, Any] | None:
        """See the contract; only the terminal event has it."""
        return self._clean(self._usage) if isinstance(self._usage, dict) else None

    @property
    def is_over(self) -> bool:
        """See the contract: nothing follows a terminal event."""
        return self._is_ended or super().is_over

    @property
    def missing_done(self) -> bool:
        """Never: this API promises no `[DONE]`."""
        return False

    def is_complete(self) -> bool:
        """See the contract: a terminal event came; `response.failed` sets `error` and is not a complete answer."""
        return self.error is None and self._is_ended

    def result(self) -> bytes:
        """See the contract."""
        return self._raw if self._raw and self.is_complete() else self._encoded(self._body())

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
        try:
            bits = self._append(delta)
        except ShapeError as error:
            raise MalformedEventError(str(error), event.data) from None
        self.content_events += 1 if bits & CONTENT else 0
        return bits

    def _feed_any(self, event: Event) -> int:
        is_ended = len(event.data) > SMALL_BYTES and event.name != "error" and self._end_large(event)
        return DATA if is_ended else super()._feed_any(event)

    def _end_large(self, event: Event) -> bool:
        """Take a long terminal event; returns whether it was one with an output."""
        try:
            terminal = _decode_terminal(event.data)
            response = _decode_response(terminal.response)
            event.data.decode()
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return False
        kind = terminal.type or event.name
        if kind not in _TERMINAL or kind == "response.failed" or bytes(response.output) in (b"null", b"[]"):
            return False
        if len(bytes(response.usage)) <= SMALL_BYTES:
            self._usage = msgspec.json.decode(response.usage)
        self._raw, self._is_ended = bytes(terminal.response), True
        return True

    def _append(self, delta: _Delta) -> int:
        place, name = _DELTAS[delta.type]
        index = {"": 0, "content": delta.content_index, "summary": delta.summary_index}[place]
        item = self._item(delta.output_index)
        text = item.texts.get((place, index, name))
        if text is None:
            self._hold()
            item.texts[place, index, name] = text = Text()
        text.append(delta.delta)
        return DATA | CONTENT if delta.delta else DATA

    def _merge(self, chunk: dict[str, Any], event: Event) -> int:
        kind = kind_of(chunk, event)
        if kind in _TERMINAL:
            return self._end(kind, chunk, event)
        if kind in _LIFECYCLE:
            self._response = _object(chunk, "response")
        elif kind in ("response.output_item.added", "response.output_item.done"):
            item = self._item(_index(chunk, "output_index"))
            item.value = _object(chunk, "item")
            if kind.endswith(".done"):  # the item is whole: its pieces are no longer needed
                self._held -= len(item.texts) + len(item.parts)
                item.texts, item.parts = {}, {}
        elif kind in _PARTS:
            place = _PARTS[kind]
            key = place, _index(chunk, "summary_index" if place == "summary" else "content_index")
            item = self._item(_index(chunk, "output_index"))
            if key not in item.parts:
                self._hold()
            item.parts[key] = _object(chunk, "part")
        elif kind in _DELTAS:  # half an emoji, or no `type` but the event's name: the typed decode refused it
            return self._append(_as_delta(kind, chunk))
        return DATA

    def _item(self, index: int) -> _Item:
        item = self._items.get(index)
        if item is None:
            if len(self._items) >= MAX_ENTRIES:
                raise ShapeError(f"more than {MAX_ENTRIES} output items")
            self._items[index] = item = _Item()
        return item

    def _hold(self) -> None:
        self._held += 1
        if self._held > _MAX_HELD:
            raise ShapeError(f"more than {_MAX_HELD} parts")

    def _end(self, kind: str, chunk: dict[str, Any], event: Event) -> int:
        self._response = _object(chunk, "response")
        self._is_ended = True
        self._usage = self._response.get("usage")
        if self._response.get("output") and not self._needs_repair and event.data.lstrip().startswith(b"{"):
            self._raw = bytes(_decode_terminal(event.data).response)
        if kind == "response.failed":
            error = self._response.get("error")
            data = msgspec.json.encode(self._clean({"error": error})) if isinstance(error, dict) else event.data
            return self._fail(data)
        return DATA

    def _body(self) -> dict[str, Any]:
        """Return the latest response, the terminal one if it came; an empty `output` is filled in from the events."""
        # Gateways end a whole stream with an empty `output`: https://github.com/open-webui/open-webui/pull/27800
        response = self._response
        if response.get("output"):
            return response
        return {**response, "output": [item.body() for _, item in sorted(self._items.items())]}


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
