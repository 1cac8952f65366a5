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

from worker.backends.streams.chat import ChatAccumulator, CompletionAccumulator
from worker.backends.streams.events import Accumulator, MalformedEventError, Progress, StreamErrorEvent
from worker.backends.streams.responses import ResponsesAccumulator
from worker.wire.endpoints import CHAT, COMPLETIONS, RESPONSES, Endpoint

__all__ = [
    "Accumulator",
    "ChatAccumulator",
    "CompletionAccumulator",
    "MalformedEventError",
    "Progress",
    "ResponsesAccumulator",
    "StreamErrorEvent",
    "accumulator_for",
]


def accumulator_for(
    endpoint: Endpoint, *, choices: int = 1, keep_usage: bool = True, prefix: Mapping[int, str] | None = None
) -> Accumulator | None:
    """
    Return a new accumulator for a request to an API, or `None` when its answers cannot be streamed.

    Args:
        endpoint: The API.
        choices: How many choices the request asks for; fewer are not a complete answer.
        keep_usage: `False` removes `usage` from the result: the request itself asked for a stream, and not for usage.
        prefix: Text by choice index which an earlier attempt generated and this one is asked to continue; the result
            begins with it.  Not for the Responses API.
    """
    if endpoint is CHAT:
        return ChatAccumulator(choices=choices, keep_usage=keep_usage, prefix=prefix)
    if endpoint is COMPLETIONS:
        return CompletionAccumulator(choices=choices, keep_usage=keep_usage, prefix=prefix)
    return ResponsesAccumulator() if endpoint is RESPONSES else None
