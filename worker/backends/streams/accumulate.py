"""
One body from a stream: the front door of the accumulators.

The HTTP backend asks for an accumulator before it sends, feeds it the events that `sse` finds, and in the end has
`result()`, equal to what the server would have answered unstreamed, or else `error` and `partial()`::

    accumulator = accumulator_for(path, choices=expected_choices(path, body))
    parser = SSEParser()
    async for chunk in response:
        progress = accumulator.feed_all(parser.feed(chunk))
    accumulator.feed_all(parser.close())

Equal means: the same JSON value once nulls and empty lists are dropped, and `id`, `created` and the like set aside.
Byte equality cannot be had: servers write nulls in one form that they leave out in the other.

The rules are in `accumulate_merge` (a message from its deltas), `accumulate_choices` and `accumulate_chat` (chat
completions and completions) and `accumulate_responses`; `[DONE]`, errors and what a timer needs are in
`accumulate_events`, how one event's JSON is read in `accumulate_values`.
"""

from collections.abc import Mapping
from typing import Any

from worker.backends.streams.chat import ChatAccumulator, CompletionAccumulator
from worker.backends.streams.events import Accumulator, MalformedEventError, Progress, StreamErrorEvent
from worker.backends.streams.responses import ResponsesAccumulator

__all__ = [
    "Accumulator",
    "ChatAccumulator",
    "CompletionAccumulator",
    "MalformedEventError",
    "Progress",
    "ResponsesAccumulator",
    "StreamErrorEvent",
    "accumulator_for",
    "expected_choices",
]


def accumulator_for(
    path: str, *, choices: int = 1, keep_usage: bool = True, prefix: Mapping[int, str] | None = None
) -> Accumulator | None:
    """
    Return a new accumulator for a request path, or `None` when nothing on that path can be streamed (embeddings).

    Args:
        path: Of the request, `/v1/chat/completions` or with any other prefix (Azure's deployments); a query is ignored.
        choices: See `expected_choices`.
        keep_usage: `False` removes `usage` from the result: the request itself asked for a stream, and not for usage.
        prefix: Text by choice index which an earlier try generated and this one is asked to continue; the result
            begins with it.  Not for the Responses API.
    """
    path = path.partition("?")[0].rstrip("/")
    if path.endswith("/chat/completions"):
        return ChatAccumulator(choices=choices, keep_usage=keep_usage, prefix=prefix)
    if path.endswith("/completions"):
        return CompletionAccumulator(choices=choices, keep_usage=keep_usage, prefix=prefix)
    return ResponsesAccumulator() if path.endswith("/responses") else None


def expected_choices(path: str, body: Mapping[str, Any]) -> int:
    """
    Return how many choices a request asks for: its `n`, times its prompts in completions; 1 where it makes no sense.

    Source: https://platform.openai.com/docs/api-reference/completions/create; a prompt is a string or a list of tokens.
    """
    n = body.get("n")
    n = n if type(n) is int and n > 0 else 1
    prompt = body.get("prompt")
    is_chat = path.partition("?")[0].rstrip("/").endswith("/chat/completions")
    if is_chat or not isinstance(prompt, list) or not prompt or type(prompt[0]) is int:
        return n
    return n * len(prompt)
