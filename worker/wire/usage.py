"""
Token usage as an answer reports it.

Absent is `None`, never 0.  Source: the `usage` objects of chat completions (`prompt_tokens`, …) and of the Responses
API (`input_tokens`, …), https://platform.openai.com/docs/api-reference.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import msgspec

_MAX = 2**53
"""Beyond it a count is nonsense, and no float (Prometheus) or 64-bit integer (`stats`) could hold every one."""
Count = Annotated[int, msgspec.Meta(ge=-_MAX, le=_MAX)]
"""As a backend sends it: some say -1 for what they do not know."""


class _Details(msgspec.Struct):
    cached_tokens: Count | None = None
    reasoning_tokens: Count | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    input_tokens: Count | None = None
    output_tokens: Count | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None


class _Body(msgspec.Struct):
    usage: _Usage | None = None


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one answer; `None` where the backend did not say."""

    input: int | None = None
    output: int | None = None
    input_cached: int | None = None
    output_reasoning: int | None = None

    def kinds(self) -> Iterator[tuple[str, int]]:
        """Yield the kinds that are known, named as the metric's label."""
        for kind in self.__struct_fields__:
            count = getattr(self, kind)
            if count is not None:
                yield kind, count


NO_USAGE = Usage()
"""Of an answer that tells none."""

_NO_DETAILS = _Details()
_decode = msgspec.json.Decoder(_Body).decode


def read_usage(body: bytes) -> Usage | None:
    """Return the usage of an answer's body, `None` when it has none that can be read."""
    try:
        usage = _decode(body).usage
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return None if usage is None else _read(usage)


def usage_of(counts: Mapping[str, Any]) -> Usage | None:
    """Return the usage that a `usage` object holds, `None` when it cannot be read."""
    try:
        return _read(msgspec.convert(counts, _Usage))
    except (msgspec.ValidationError, RecursionError):
        return None


def _read(usage: _Usage) -> Usage:
    of_input = usage.prompt_tokens_details or usage.input_tokens_details or _NO_DETAILS
    of_output = usage.completion_tokens_details or usage.output_tokens_details or _NO_DETAILS
    return Usage(
        input=_known(usage.prompt_tokens, usage.input_tokens),
        output=_known(usage.completion_tokens, usage.output_tokens),
        input_cached=_known(of_input.cached_tokens),
        output_reasoning=_known(of_output.reasoning_tokens),
    )


def _known(count: int | None, otherwise: int | None = None) -> int | None:
    """Return the first count that is one."""
    if count is not None and count >= 0:
        return count
    return otherwise if otherwise is not None and otherwise >= 0 else None
