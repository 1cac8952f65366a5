"""
The commonest chunks: two short cuts for the nine chunks in ten that only add a little text.

Most of them are the chunk before, byte for byte, but for that text.  Once one was decoded, its bytes before and after
the text are known (`Repeated`); an event that has the same, and between them a JSON string without any escape, means
the same with another text.  Whole packets of them are split at those bytes, and neither parsed nor decoded.

A typed decode costs a fraction of building the tree and walking it.  Every type forbids unknown fields, and allows only
null where something rare may stand, so that a chunk with anything else in it fails to decode and takes the general way.
The fields are those of OpenAI, Azure, vLLM, SGLang, llama.cpp, TGI and Ollama; one that is missing here costs speed,
nothing else.  `benchmarks/sse.py` shows what it is worth.

Log probabilities are most of the bytes where they are asked for, and the worker has no use for them: their entries are
checked for being JSON and kept as they came (`msgspec.Raw`), so that they stand in the answer byte for byte.  The one
thing that msgspec does not check in what it only passes on is UTF-8, so the decoding side has to.
"""

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from worker.backends.streams.merge import Text

_NO_FIELDS: dict[str, Any] = {}
_Entries = list[msgspec.Raw] | None | UnsetType
"""Of one list of log probabilities; unset is not null, since the answer has a null where the stream had one."""


class CommonLogprobs(msgspec.Struct, forbid_unknown_fields=True, gc=False, kw_only=True):
    """Log probabilities of a chat or a completion; lists only."""

    content: _Entries = UNSET
    refusal: _Entries = UNSET
    tokens: _Entries = UNSET
    token_logprobs: _Entries = UNSET
    top_logprobs: _Entries = UNSET
    text_offset: _Entries = UNSET

    def as_dict(self) -> dict[str, Any]:
        """The lists that are there, for the general rules of merging."""
        return {name: value for name in _LISTS if (value := getattr(self, name)) is not UNSET}


_LISTS = CommonLogprobs.__struct_fields__


class CommonChunk(msgspec.Struct, forbid_unknown_fields=True, gc=False, kw_only=True):
    """The top level of the commonest chunk; subclasses add `choices`.  Whatever has another field is not one."""

    choices: list[Any]
    id: str | None = None
    object: str | None = None
    created: int | None = None
    model: str | None = None
    system_fingerprint: str | None = None
    service_tier: str | None = None
    usage: None = None
    obfuscation: str | None = None
    prompt_token_ids: None = None

    def top(self) -> tuple[Any, ...]:
        """What is merged last-wins; the same as that of the chunk before changes nothing.  See `_merge_top`."""
        return (self.id, self.created, self.model, self.system_fingerprint, self.service_tier)


class CommonChoice(msgspec.Struct, forbid_unknown_fields=True, gc=False, kw_only=True):
    """What the commonest choice has beside its text; subclasses add that."""

    index: int = 0
    logprobs: CommonLogprobs | None = None
    token_ids: list[Any] | None = None
    content_filter_results: dict[str, Any] | None = None
    finish_reason: None = None
    stop_reason: None = None
    matched_stop: None = None
    prompt_token_ids: None = None
    prompt_logprobs: None = None

    def fields(self) -> dict[str, Any]:
        """What is to be merged beside the text; hardly ever anything."""
        if self.logprobs is None and self.token_ids is None and self.content_filter_results is None:
            return _NO_FIELDS
        fields: dict[str, Any] = {} if self.logprobs is None else {"logprobs": self.logprobs.as_dict()}
        if self.token_ids is not None:
            fields["token_ids"] = self.token_ids
        if self.content_filter_results is not None:
            fields["content_filter_results"] = self.content_filter_results
        return fields


class CommonArguments(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """More of a tool call's arguments."""

    arguments: str
    name: None = None


class CommonToolCall(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A tool call that has begun already."""

    index: int
    function: CommonArguments
    id: None = None
    type: None = None


class CommonDelta(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A little more of a message."""

    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    role: str | None = None
    refusal: None = None
    tool_calls: list[CommonToolCall] | None = None
    function_call: None = None


class CommonChatChoice(CommonChoice, forbid_unknown_fields=True, gc=False, kw_only=True):
    """A choice of a chat."""

    delta: CommonDelta


class CommonChatChunk(CommonChunk, forbid_unknown_fields=True, gc=False, kw_only=True):
    """A chunk of a chat."""

    choices: list[CommonChatChoice]


class CommonTextChoice(CommonChoice, forbid_unknown_fields=True, gc=False, kw_only=True):
    """A choice of a completion."""

    text: str


class CommonTextChunk(CommonChunk, forbid_unknown_fields=True, gc=False, kw_only=True):
    """A chunk of a completion."""

    choices: list[CommonTextChoice]


class Repeated:
    """
    An event that may come again with another text.

    Args:
        before: The chunk's bytes as far as the quotation mark that begins the text.
        after: Those from the one that ends it.
        text: What it adds to.
    """

    __slots__ = ("_after", "_before", "_begin", "_between", "_end", "_first", "_last", "text")

    def __init__(self, before: bytes, after: bytes, text: Text) -> None:
        self.text = text
        self._before, self._after = before, after
        self._begin = b"data: " + before
        self._end = after + b"\n\n"
        self._between = self._end + self._begin
        self._first, self._last = len(self._begin), len(self._end)

    def fits(self, chunk: bytes) -> bool:
        """Whether a chunk may be this one with another text."""
        return chunk.startswith(self._before) and chunk.endswith(self._after)

    def text_of(self, data: bytes) -> tuple[str, int] | None:
        """
        Return the text in whole events that are this one again, and how many of them have any.

        `None` if there is anything else in the data.
        """
        if not (data.startswith(self._begin) and data.endswith(self._end)) or len(data) < self._first + self._last:
            return None
        raw = data[self._first : -self._last]
        parts = [raw]
        if b'"' in raw:  # several events, or something else
            parts = raw.split(self._between)
            raw = b"".join(parts)
            if b'"' in raw:
                return None
        if b"\\" in raw:
            return None  # an escape
        try:
            if not raw.isascii():
                for part in parts:
                    part.decode()  # no character may be cut by the border of two events
            text = raw.decode()
        except UnicodeDecodeError:
            return None
        # JSON forbids control characters in a string.
        return (text, len(parts) - parts.count(b"")) if text.isprintable() else None


def repeated_by(data: bytes, text: Text, piece: str) -> Repeated | None:
    """
    Return what may come again of a chunk, `None` if it cannot be told where its text stands.

    Args:
        data: The chunk, which is JSON and adds this piece to the text, and nothing else.
        text: What it adds to.
        piece: Not empty.
    """
    raw = b'"%b"' % piece.encode("utf-8", "replace")
    # Without an escape anywhere, every string stands there as it is; and this one stands there once.
    if b"\\" in data or b"\n" in data or data.count(raw) != 1:
        return None
    at = data.index(raw) + 1
    return Repeated(data[:at], data[at + len(raw) - 2 :], text)
