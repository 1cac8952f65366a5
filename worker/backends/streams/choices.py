"""
Streams of `choices`: chat completions, where a choice grows a message, and completions, where it grows a text.

Each chunk is a copy of the top level with a little of one choice in it.  The top level is merged last-non-empty-wins,
each choice by its `index`.  The commonest chunk, one choice with a few characters of text and nothing else that is new,
is recognised by a typed decode and appended without building its tree (`shortcut`); any other takes the general way,
with the same result.

Source: https://platform.openai.com/docs/api-reference/chat-streaming,
https://platform.openai.com/docs/api-reference/completions; Azure's annotation chunks:
https://learn.microsoft.com/azure/ai-foundry/openai/concepts/content-streaming.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec

from worker.backends.streams.accumulator import CONTENT, DATA, SMALL_BYTES, Accumulator, has_counts
from worker.backends.streams.merge import MAX_ENTRIES, Parts, ShapeError, Text, ToolCalls, extend_lists, finished, merge
from worker.backends.streams.shortcut import (
    CommonChatChoice,
    CommonChatChunk,
    CommonTextChoice,
    CommonTextChunk,
    Repeated,
    repeated_by,
)
from worker.backends.streams.sse import Event

_LEADING = ("id", "object", "created", "model")
_NOT_MERGED = frozenset({"choices", "object", "obfuscation", "usage"})
_NOT_IN_UNARY = frozenset(
    {"content_filter_offsets", "content_filter_raw"}
)  # how far Azure's filter has come in the text
_MAX_CALLS = 10_000  # tool calls of all choices together
_MAX_GUESSES = 16  # texts in a row of which none came again in the same frame
_NEW = (None, "")  # a text that is none yet
_GIVE_UP_AFTER = 8  # uncommon chunks in a row: the stream is of another kind, so stop trying
_INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "refusal", "reasoning", "reasoning_content")
_GENERATED = {
    "content",
    "reasoning",  # vLLM, Ollama, OpenRouter
    "reasoning_content",  # DeepSeek, SGLang, llama.cpp, older vLLM
    "refusal",
    "reasoning_details",
    "thinking_blocks",
    "audio",
}


class Choice:
    """
    One choice under construction.

    Attributes:
        message: The message, see `merge`; in completions, its `content` is the choice's `text`.
        fields: Everything else of the choice, `finish_reason` and `logprobs` among it.
        is_finished: A finish reason came, and no text behind it; some servers send an empty one until then.
    """

    __slots__ = ("fields", "index", "is_finished", "message")

    def __init__(self, index: int, prefix: str = "") -> None:
        self.index = index
        self.fields: dict[str, Any] = {}
        self.message: dict[str, Any] = {"content": Text(prefix)} if prefix else {}
        self.is_finished = False

    @property
    def is_text_only(self) -> bool:
        """Whether the choice has nothing but text: no tool calls, reasoning, refusal, logprobs or token ids."""
        return (
            isinstance(self.message.get("content"), Text | None)
            and not (self.fields.get("logprobs") or self.fields.get("token_ids"))
            and not any(_is_filled(value) for key, value in self.message.items() if key not in ("role", "content"))
        )


class ChoicesAccumulator(Accumulator):
    """What both APIs have in common; single use."""

    _object: ClassVar[str]
    _common: ClassVar[msgspec.json.Decoder[Any]]
    _message_keys: ClassVar[frozenset[str]]

    def __init__(self, *, choices: int = 1, prefix: Mapping[int, str] | None = None) -> None:
        """
        Start before the first event.

        Args:
            choices: How many choices the request asks for; fewer are not a complete answer.
            prefix: Text by choice index that an earlier attempt generated and this one continues.
        """
        super().__init__()
        self._expected = choices
        self._top: dict[str, Any] = {}
        self._usage: dict[str, Any] | None = None
        self._choices = {index: Choice(index, text) for index, text in (prefix or {}).items()}
        self._open = len(self._choices)  # without a finish reason
        self._calls = 0
        self._has_prefix = any((prefix or {}).values())
        self._last_top: tuple[Any, ...] | None = None
        self._misses = 0
        self._repeated: Repeated | None = None
        self._guesses = 0

    @property
    def usage(self) -> dict[str, Any] | None:
        """See the contract."""
        return self._clean(self._usage) if self._usage is not None and has_counts(self._usage) else None

    @property
    def has_partial(self) -> bool:
        """See the contract; the prefix counts."""
        return self._has_prefix or self.content_events > 0

    @property
    def is_text_only(self) -> bool:
        """See the contract."""
        return all(choice.is_text_only for choice in self._choices.values())

    def is_complete(self) -> bool:
        """See the contract: every choice asked for has a finish reason; `[DONE]` proves nothing and is not needed."""
        return self._open == 0 and len(self._choices) >= self._expected and self.error is None

    def feed_repeated(self, data: bytes) -> bool:
        """See the contract."""
        repeated = self._repeated
        if repeated is None or (found := repeated.text_of(data)) is None:
            return False
        self._guesses = 0
        text, events = found
        if text:
            repeated.text.append(text)
            self.content_events += events
        return True

    def result(self) -> bytes:
        """See the contract."""
        return self._encoded(self._body(self._usage))

    def partial(self) -> dict[str, Any] | None:
        """See the contract; a choice that was not finished has a `finish_reason` of null."""
        if not self.has_partial:
            return None
        body: dict[str, Any] = self._clean(self._body(self.usage))
        return body

    def generated_text(self) -> dict[int, str]:
        """See the contract; the prefix is included."""
        contents = {index: choice.message.get("content") for index, choice in sorted(self._choices.items())}
        return {i: self._clean(str(text)) if isinstance(text, Text) else "" for i, text in contents.items()}

    def _merge_common(self, event: Event) -> int:
        if self._misses >= _GIVE_UP_AFTER or event.name or len(event.data) > SMALL_BYTES:
            return -1
        try:
            chunk = self._common.decode(event.data)
            if not event.data.isascii():
                event.data.decode()  # log probabilities are kept as they came, unread
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self._misses += 1
            return -1
        if len(chunk.choices) != 1 or chunk.top() != self._last_top:
            return -1
        part = chunk.choices[0]
        choice = self._choices.get(part.index)
        growing = [_NEW] if choice is None else self._growing(choice, part)
        bits = _append_all(growing)
        if choice is None or bits < 0:
            return -1
        fields = part.fields()
        if fields:
            self._merge_fields(choice.fields, fields)
        elif self._guesses < _MAX_GUESSES and len(growing) == 1:
            self._expect_again(event, *growing[0])
        self._misses = 0
        if bits & CONTENT:
            self.content_events += 1
            if choice.is_finished:
                self._reopen(choice)
        return bits

    def _expect_again(self, event: Event, text: Text, piece: str) -> None:
        """Note that this event may come again with another text."""
        if piece and (self._repeated is None or not self._repeated.fits(event.data)):
            self._guesses += 1
            self._repeated = repeated_by(event.data, text, piece) or self._repeated

    @abstractmethod
    def _growing(self, choice: Choice, part: Any) -> list[tuple[Any, str]]:
        """Return the texts that a typed choice adds to, with what it adds; not of type `Text` where one is new."""

    @abstractmethod
    def _merge_message(self, choice: Choice, part: dict[str, Any]) -> bool:
        """Merge the keys in `_message_keys`; returns whether generated text came."""

    @abstractmethod
    def _choice_body(self, choice: Choice) -> dict[str, Any]:
        """Return the choice as it stands in an unstreamed answer."""

    def _merge(self, chunk: dict[str, Any], event: Event) -> int:  # noqa: ARG002 - chunks have no names
        parts = chunk.get("choices")
        if parts is None:
            parts = []
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise ShapeError("`choices` is not a list of objects")
        self._repeated = None  # what a chunk that looks the same would mean may change now
        self._merge_top(chunk)
        bits = DATA
        for part in parts:
            choice = self._choice_of(part)
            if self._merge_message(choice, part):
                bits |= CONTENT
                if choice.is_finished and not isinstance(part.get("message"), dict):
                    self._reopen(choice)
            self._merge_fields(choice.fields, part)
            if not choice.is_finished and choice.fields.get("finish_reason"):
                choice.is_finished = True
                self._open -= 1
        return bits

    def _reopen(self, choice: Choice) -> None:
        """Take a finish reason back: text came behind it."""
        choice.is_finished = False
        choice.fields["finish_reason"] = None
        self._open += 1
        self.is_reopened = True

    def _merge_top(self, chunk: dict[str, Any]) -> None:
        top = self._top
        for key, value in chunk.items():
            if key in _NOT_MERGED:
                continue
            # Null, an empty string and a `created` of 0 (Azure's annotations) take nothing away from what is known.
            if value == "" and key != "id":
                continue
            says_nothing = value is None or value == "" or (key == "created" and not value)
            if not says_nothing or top.get(key) is None:
                top[key] = value
        if len(top) > MAX_ENTRIES:
            raise ShapeError(f"a chunk has more than {MAX_ENTRIES} fields")
        get = chunk.get
        self._last_top = (get("id"), get("created"), get("model"), get("system_fingerprint"), get("service_tier"))
        usage = chunk.get("usage")
        if isinstance(usage, dict) and (not self._usage or has_counts(usage)):
            self._usage = usage

    def _choice_of(self, part: dict[str, Any]) -> Choice:
        index = part.get("index")
        if index is None:
            index = 0
        if type(index) is not int:
            raise ShapeError("a choice's `index` is not a number")
        choice = self._choices.get(index)
        if choice is None:
            if len(self._choices) >= max(MAX_ENTRIES, self._expected):
                raise ShapeError(f"more than {len(self._choices)} choices")
            self._choices[index] = choice = Choice(index)
            self._open += 1
        return choice

    def _merge_fields(self, fields: dict[str, Any], part: dict[str, Any]) -> None:
        for key, value in part.items():
            known = fields.get(key)
            if key == "index" or key in self._message_keys or key in _NOT_IN_UNARY:
                continue
            if value is None:
                fields.setdefault(key, None)
            elif value == "":
                continue
            elif key == "logprobs" and isinstance(value, dict):
                if not isinstance(known, dict):
                    fields[key] = known = {}
                extend_lists(known, value)
            elif key == "token_ids" and isinstance(value, list) and isinstance(known, list):
                known.extend(value)
            elif key == "content_filter_results" and isinstance(value, dict):
                # By category: Azure sends some of them at a time, and none with the finish reason.
                fields[key] = {**known, **value} if isinstance(known, dict) else value
            else:
                fields[key] = value
        if len(fields) > MAX_ENTRIES:
            raise ShapeError(f"a choice has more than {MAX_ENTRIES} fields")

    def _body(self, usage: dict[str, Any] | None) -> dict[str, Any]:
        body = {key: self._top.get(key) for key in _LEADING if key in self._top or key == "object"}
        body["object"] = self._object
        body["choices"] = [self._choice_body(choice) for _, choice in sorted(self._choices.items())]
        body.update((key, value) for key, value in self._top.items() if key not in body)
        if usage is not None:
            body["usage"] = usage
        return body


def _append_all(growing: list[tuple[Any, str]]) -> int:
    """Append pieces to their texts and return the bits of that; -1, and nothing changed, if one has not begun yet."""
    for text, _ in growing:
        if type(text) is not Text:
            return -1
    bits = DATA
    for text, piece in growing:
        if piece:
            text.append(piece)
            bits = DATA | CONTENT
    return bits


class ChatAccumulator(ChoicesAccumulator):
    """`/v1/chat/completions`: `choices[].delta` becomes `choices[].message`."""

    _object = "chat.completion"
    _common = msgspec.json.Decoder(CommonChatChunk)
    _message_keys = frozenset({"delta", "message"})

    def _growing(self, choice: Choice, part: CommonChatChoice) -> list[tuple[Any, str]]:
        delta = part.delta
        message = choice.message
        if delta.role is not None and delta.role != message.get("role"):
            return [_NEW]
        growing: list[tuple[Any, str]] = []
        if delta.content is not None:
            growing.append((message.get("content"), delta.content))
        if delta.reasoning is not None:
            growing.append((message.get("reasoning"), delta.reasoning))
        if delta.reasoning_content is not None:
            growing.append((message.get("reasoning_content"), delta.reasoning_content))
        for call in delta.tool_calls or ():
            calls = message.get("tool_calls")
            text = calls.arguments_of(call.index) if type(calls) is ToolCalls else None
            growing.append((text, call.function.arguments))
        return growing

    def _merge_message(self, choice: Choice, part: dict[str, Any]) -> bool:
        delta = part.get("delta")
        if delta is None and isinstance(part.get("message"), dict):
            # A whole message in a stream (gateways that only pretend to stream): it stands for all that came before it.
            delta = part["message"]
            choice.message.clear()
        if delta is None:
            return False
        if not isinstance(delta, dict):
            raise ShapeError("a choice's `delta` is not an object")
        before = _calls_of(choice)
        merge(choice.message, delta)
        self._calls += _calls_of(choice) - before
        if self._calls > _MAX_CALLS:
            raise ShapeError(f"more than {_MAX_CALLS} tool calls")
        return _is_generated(delta)

    def _choice_body(self, choice: Choice) -> dict[str, Any]:
        message = {key: value for key, value in finished(choice.message).items() if value != "" or key == "content"}
        message["role"] = message.get("role") or "assistant"
        if not message.get("content") and any(message.get(key) for key in _INSTEAD_OF_CONTENT):
            message["content"] = None  # most streams begin with an empty string; unstreamed, nothing stands there
        message.setdefault("content", None)
        call = message.get("function_call")
        if isinstance(call, dict) and call.get("arguments") is None:
            message["function_call"] = {**call, "arguments": ""}
        return _with_fields({"index": choice.index, "message": message}, choice)


class CompletionAccumulator(ChoicesAccumulator):
    """`/v1/completions`: `choices[].text` is concatenated, the arrays of `logprobs` are extended."""

    _object = "text_completion"
    _common = msgspec.json.Decoder(CommonTextChunk)
    _message_keys = frozenset({"text"})

    def _growing(self, choice: Choice, part: CommonTextChoice) -> list[tuple[Any, str]]:
        return [(choice.message.get("content"), part.text)]

    def _merge_message(self, choice: Choice, part: dict[str, Any]) -> bool:
        text = part.get("text")
        if text is None:
            return False
        if not isinstance(text, str):
            raise ShapeError("a choice's `text` is not a string")
        merge(choice.message, {"content": text})
        return bool(text)

    def _choice_body(self, choice: Choice) -> dict[str, Any]:
        return _with_fields({"index": choice.index, "text": str(choice.message.get("content", ""))}, choice)


def _with_fields(body: dict[str, Any], choice: Choice) -> dict[str, Any]:
    fields = finished(choice.fields)
    body["finish_reason"] = fields.pop("finish_reason", None) or None
    return body | fields


def _is_generated(delta: dict[str, Any]) -> bool:
    """Whether a delta holds generated text; a role, an id or an empty string is none."""
    for key, value in delta.items():
        if not value:
            continue
        if key in _GENERATED:
            return True
        if key == "tool_calls":
            for call in value if isinstance(value, list) else [value]:
                if _is_generated_call(call.get("function")) or _is_generated_call(call.get("custom")):
                    return True
        elif key == "function_call" and _is_generated_call(value):
            return True
    return False


def _calls_of(choice: Choice) -> int:
    calls = choice.message.get("tool_calls")
    return len(calls) if type(calls) is ToolCalls else 0


def _is_generated_call(function: Any) -> bool:
    return isinstance(function, dict) and bool(
        function.get("arguments") or function.get("name") or function.get("input")
    )


def _is_filled(value: Any) -> bool:
    if isinstance(value, (ToolCalls, Parts)):
        return len(value) > 0
    return bool(str(value)) if isinstance(value, Text) else bool(value)
