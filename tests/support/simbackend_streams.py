"""Calls, answers and streams of the simulated server without a server: made, written and read back."""

import json
import re
from typing import Any

from worker.emulators.openai.answers import Identity, chunk_events
from worker.emulators.openai.dialects import DIALECTS
from worker.emulators.openai.generation import Generation, generate
from worker.emulators.openai.options import SimOptions
from worker.emulators.openai.seeded import Draws
from worker.emulators.openai.sse import BOM, Event, StreamStep, Write
from worker.emulators.openai.validation import Call, Endpoint, check

ME = Identity("job-1", 1_800_000_000)


def stream_call(endpoint: Endpoint = Endpoint.CHAT, **body: Any) -> Call:
    """Return a streamed call that asks for usage where it can."""
    base: dict[str, Any] = {"model": "m", "stream": True}
    if endpoint is Endpoint.RESPONSES:
        base["input"] = "hi"
    else:
        base["stream_options"] = {"include_usage": True}
        base |= (
            {"messages": [{"role": "user", "content": "hi"}]} if endpoint is Endpoint.CHAT else {"prompt": ["a", "b"]}
        )
    return check(endpoint, {**base, **body}, SimOptions())


def unary_call(endpoint: Endpoint = Endpoint.CHAT, **body: Any) -> Call:
    """Return a checked call."""
    base: dict[Endpoint, dict[str, Any]] = {
        Endpoint.CHAT: {"messages": [{"role": "user", "content": "hello"}]},
        Endpoint.COMPLETIONS: {"prompt": "once"},
        Endpoint.RESPONSES: {"input": "hi"},
        Endpoint.EMBEDDINGS: {"input": "hi"},
    }
    return check(endpoint, {"model": "m", **base[endpoint], **body}, SimOptions())


def generated(call: Call, body: bytes = b"x", *, seed: int = 0, **settings: Any) -> Generation:
    """Return what the model says to a call."""
    return generate(call, Draws(seed, body), SimOptions.of(**settings))


def events_of(call: Call, dialect: str = "openai", **settings: Any) -> list[Event]:
    """Return the events of a whole stream."""
    return chunk_events(call, generated(call, **settings), DIALECTS[dialect], ME)


def read(data: bytes) -> list[Any]:
    """Return the payloads of a stream, by the rules of server-sent events; `[DONE]` as a text."""
    payloads = []
    for block in re.split(rb"(?:\r\n|\n|\r){2}", data.removeprefix(BOM)):
        lines = re.split(rb"\r\n|\n|\r", block)
        parts = [line[6:] for line in lines if line.startswith(b"data: ")]
        if parts:
            text = b"\n".join(parts)
            payloads.append("[DONE]" if text == b"[DONE]" else json.loads(text))
    return payloads


def written(steps: list[StreamStep]) -> bytes:
    """Return the bytes that the steps write."""
    return b"".join(step.data for step in steps if isinstance(step, Write))
