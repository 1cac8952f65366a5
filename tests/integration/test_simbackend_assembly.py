"""The worker's assembly of streams and the simulated server's streams, written apart, agree on every dialect."""

import json
from typing import Any

import pytest

from tests.support.simulated_openai import ME, generated, stream_call, written
from tests.support.streams import feed_all
from worker.backends.streams.reading import accumulator_for
from worker.backends.streams.sse import SSEParser
from worker.emulators.openai.answers import chat_body, chunk_events, completion_body
from worker.emulators.openai.dialects import DIALECTS
from worker.emulators.openai.responses import response_body, response_events
from worker.emulators.openai.sse import PLAIN, StreamFault, stream_steps
from worker.emulators.openai.validation import Endpoint
from worker.wire.endpoints import endpoint_of

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"properties": {"q": {"type": "string"}}}}}
    for name in ("find", "open")
]
REQUESTS: list[tuple[Endpoint, dict[str, Any]]] = [
    (Endpoint.CHAT, {}),
    (Endpoint.CHAT, {"n": 3, "max_tokens": 5}),
    (Endpoint.CHAT, {"logprobs": True}),
    (Endpoint.CHAT, {"tools": TOOLS, "tool_choice": "required"}),
    (Endpoint.CHAT, {"reasoning_effort": "low", "n": 2}),
    (Endpoint.COMPLETIONS, {"n": 2}),
    (Endpoint.COMPLETIONS, {"logprobs": 2}),
    (Endpoint.RESPONSES, {}),
    (Endpoint.RESPONSES, {"tools": TOOLS, "tool_choice": "required"}),
]
FAULTS = [
    PLAIN,
    StreamFault(line_ending="cr", bom=True, split_bytes=3, multiline=True),
    StreamFault(line_ending="crlf", split_bytes=7, missing_last_blank=True, usage_on="first_chunk"),
    StreamFault(missing_done=True, usage_on="finish_chunk"),
]


def canon(value: Any) -> Any:
    """Return JSON without what a stream need not repeat: nulls, empty values, indexes of tool calls."""
    if isinstance(value, dict):
        kept = {key: canon(inner) for key, inner in value.items() if key != "index"}
        return {key: inner for key, inner in kept.items() if inner not in (None, "", [], {})}
    return [canon(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(("endpoint", "extra"), REQUESTS)
def test_streams_assemble_to_the_unary_body(dialect: str, endpoint: Endpoint, extra: dict[str, Any]) -> None:
    """Whatever the dialect, the line endings and the cuts, the assembled body is the one sent without a stream."""
    row = DIALECTS[dialect]
    call = stream_call(endpoint, **extra)
    generation = generated(call)
    make = {Endpoint.CHAT: chat_body, Endpoint.COMPLETIONS: completion_body, Endpoint.RESPONSES: response_body}[
        endpoint
    ]
    whole = make(call, generation, row, ME)
    for fault in FAULTS:
        if endpoint is Endpoint.RESPONSES:
            events = response_events(call, generation, row, ME)
        else:
            events = chunk_events(call, generation, row, ME, fault.usage_on)
        accumulator = accumulator_for(endpoint_of(endpoint), choices=call.body.get("n", 1))
        assert accumulator is not None
        parser = SSEParser()
        data = written(stream_steps(events, fault, dialect))
        size = fault.split_bytes or len(data)
        for start in range(0, len(data), size):
            feed_all(accumulator, parser.feed(data[start : start + size]))
        feed_all(accumulator, parser.close())
        assert accumulator.is_complete()
        assert canon(json.loads(accumulator.result())) == canon(whole)
