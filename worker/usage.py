"""
Token usage as an answer reports it.

Absent is `None`, never 0.  Source: the `usage` objects of chat completions (`prompt_tokens`, …) and of the Responses
API (`input_tokens`, …), https://platform.openai.com/docs/api-reference.
"""

from collections.abc import Iterator

import msgspec


class _Details(msgspec.Struct):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
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
            if count is not None and count >= 0:
                yield kind, count


_decode = msgspec.json.Decoder(_Body).decode


def read_usage(body: bytes) -> Usage | None:
    """Return the usage of an answer's body, `None` when it has none that can be read."""
    try:
        usage = _decode(body).usage
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if usage is None:
        return None
    of_input = usage.prompt_tokens_details or usage.input_tokens_details or _Details()
    of_output = usage.completion_tokens_details or usage.output_tokens_details or _Details()
    return Usage(
        input=usage.prompt_tokens if usage.prompt_tokens is not None else usage.input_tokens,
        output=usage.completion_tokens if usage.completion_tokens is not None else usage.output_tokens,
        input_cached=of_input.cached_tokens,
        output_reasoning=of_output.reasoning_tokens,
    )
