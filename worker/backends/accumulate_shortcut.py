"""
The commonest chunks, as types: a short cut for the nine chunks in ten that only add a little text.

A typed decode costs a fraction of building the tree and walking it.  Every type forbids unknown fields, and allows only
null where something rare may stand, so that a chunk with anything else in it fails to decode and takes the general way.
The fields are those of OpenAI, Azure, vLLM, SGLang, llama.cpp, TGI and Ollama; one that is missing here costs speed,
nothing else.  `benchmarks/sse.py` shows what it is worth.
"""

from typing import Any

import msgspec

_NO_FIELDS: dict[str, Any] = {}


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
    logprobs: dict[str, Any] | None = None
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
        names = ("logprobs", "token_ids", "content_filter_results")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


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
