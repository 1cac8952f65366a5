"""Builders of single chunks and accumulators that were fed some, for tests that say exactly what comes."""

import json
from collections.abc import Iterable

from worker.backends.streams.accumulator import Accumulator, Progress
from worker.backends.streams.reading import accumulator_for
from worker.backends.streams.sse import Event
from worker.wire.endpoints import endpoint_of

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
DONE = Event(b"[DONE]")


def event(chunk, name="") -> Event:
    return Event(chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode(), name)


def delta(finish_reason=None, index=0, **fields) -> dict:
    """A chunk with one choice."""
    return {
        "id": "c1",
        "object": "chat.completion.chunk",
        "created": 7,
        "model": "m",
        "choices": [{"index": index, "delta": fields, "finish_reason": finish_reason}],
    }


def usage_chunk(**usage) -> dict:
    return {"id": "c1", "object": "chat.completion.chunk", "created": 7, "model": "m", "choices": [], "usage": usage}


def feed(*chunks, path=CHAT, **options) -> Accumulator:
    accumulator = accumulator_for(endpoint_of(path), **options)
    for chunk in chunks:
        accumulator.feed(chunk if isinstance(chunk, Event) else event(chunk))
    return accumulator


def feed_all(accumulator: Accumulator, events: Iterable[Event]) -> Progress:
    """Feed events and return what all of them brought together."""
    brought = [accumulator.feed(each) for each in events]
    return Progress(
        data=any(each.data for each in brought),
        content=any(each.content for each in brought),
        error=any(each.error for each in brought),
    )


def result(*chunks, **options) -> dict:
    return json.loads(feed(*chunks, **options).result())


def message(*deltas, finish_reason="stop") -> dict:
    """The message that deltas make."""
    chunks = [delta(**each) for each in deltas]
    return result(*chunks, delta(finish_reason))["choices"][0]["message"]


def tool(index=None, call_id=None, name=None, arguments=None) -> dict:
    """The delta of one tool call."""
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    call = {"index": index, "id": call_id, "type": "function" if call_id else None, "function": function}
    return {"tool_calls": [{key: value for key, value in call.items() if value is not None}]}
