"""
Hostile and broken streams: only the declared error, readable state afterwards, bounded memory.

`FUZZ_CASES=10000` makes it long.
"""

import json
import os
import random
import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.dialect_streams import responses_events, stream_of, to_sse
from tests.support.random_bodies import DIALECTS, random_chat_body, random_responses_body
from tests.support.streams import CHAT, TEXT, delta, feed, feed_all
from worker.backends.streams.accumulator import Accumulator, MalformedEventError
from worker.backends.streams.reading import accumulator_for
from worker.backends.streams.sse import Event, SSEParser
from worker.wire.endpoints import endpoint_of

CASES = int(os.environ.get("FUZZ_CASES", "300"))
PATHS = [CHAT, TEXT, "/v1/responses"]
WORDS = [
    "choices", "delta", "index", "content", "tool_calls", "function", "custom", "name", "arguments", "input", "id",
    "type", "error", "code", "usage", "finish_reason", "logprobs", "text", "message", "role", "reasoning",
    "refusal", "object", "created", "model", "token_ids", "content_filter_results", "prompt_tokens", "response",
    "output", "output_index", "content_index", "summary_index", "item", "part", "summary", "status", "function_call",
]  # fmt: skip
KINDS = [
    "response.created", "response.completed", "response.failed", "response.output_item.added", "response.output_item.done",
    "response.content_part.added", "response.output_text.delta", "response.reasoning_summary_text.delta", "keepalive", "function",
]  # fmt: skip


def nonsense(rng: random.Random, depth: int = 5) -> Any:
    """A JSON value made of the protocols' words, hardly ever in the right place."""
    kind = rng.random()
    if depth and kind < 0.55:
        keys = rng.sample(WORDS, rng.randint(0, 6))
        return {key: rng.choice(KINDS) if key == "type" else nonsense(rng, depth - 1) for key in keys}
    if depth and kind < 0.75:
        return [nonsense(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    return rng.choice([None, True, 0, 1, -1, 2**70, 1.5, "", "a", "\u2028", "\ud83d", "stop", "error"])


def plausible(rng: random.Random) -> Any:
    """Nonsense inside a frame that gets past the first checks."""
    kind = rng.choice(KINDS)
    return rng.choice(
        [
            {"choices": [nonsense(rng, 3) for _ in range(rng.randint(0, 2))], rng.choice(WORDS): nonsense(rng, 2)},
            {"choices": [{"index": rng.choice([0, 1]), "delta": {rng.choice(WORDS): nonsense(rng, 3)}}]},
            {"choices": [{"index": 0, rng.choice(WORDS): nonsense(rng, 3), "finish_reason": "stop"}]},
            {
                "type": kind,
                "response": {"output": nonsense(rng, 3), "error": nonsense(rng, 1), "usage": nonsense(rng, 1)},
            },
            {
                "type": kind,
                "output_index": rng.choice([0, 10**9]),
                "item": {"content": nonsense(rng, 3)},
                "part": nonsense(rng, 1),
            },
            {"type": kind, "delta": nonsense(rng, 1), "output_index": 0, "content_index": rng.choice([0, -1, 10**9])},
        ]
    )


def check(accumulator: Accumulator, events: list[Event]) -> None:
    """Feed events; whatever they are, every question about the accumulator has an answer that is JSON."""
    for event in events:
        try:
            accumulator.feed(event)
        except MalformedEventError:
            break
    msgspec.json.encode([accumulator.partial(), accumulator.usage])
    "".join(accumulator.generated_text().values()).encode()
    assert accumulator.has_partial or accumulator.partial() is None
    assert isinstance(accumulator.is_text_only, bool)
    if accumulator.is_complete():
        msgspec.json.decode(accumulator.result())


@pytest.mark.parametrize("path", PATHS)
def test_json_that_makes_no_sense_raises_only_the_declared_error(path):
    """Known words in unknown places, and half-sensible chunks: merged or refused, never another exception."""
    for seed in range(CASES):
        rng = random.Random(seed)
        chunks = [nonsense(rng) if rng.random() < 0.3 else plausible(rng) for _ in range(rng.randint(1, 6))]
        check(
            accumulator_for(endpoint_of(path)),
            [Event(json.dumps(chunk).encode(), rng.choice(["", "x"])) for chunk in chunks],
        )


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=30), st.sampled_from(["", "error", "x"]), st.booleans()), max_size=5))
def test_random_bytes_raise_only_the_declared_error(path, events):
    """Data that is no JSON at all, under any name, torn or not."""
    check(
        accumulator_for(endpoint_of(path)), [Event(data, name, is_terminated) for data, name, is_terminated in events]
    )


def test_streams_with_broken_bytes_raise_only_the_declared_error():
    """Real streams with bytes changed, dropped and doubled on the way, from the parser to the answer."""
    for seed in range(CASES // 2):
        rng = random.Random(seed)
        if seed % 4:
            dialect = rng.choice(list(DIALECTS.values()))
            path, stream = CHAT, bytearray(stream_of(random_chat_body(rng, dialect), dialect, rng))
        else:
            path, stream = (
                "/v1/responses",
                bytearray(to_sse(responses_events(random_responses_body(rng), rng), rng, names=True)),
            )
        for _ in range(rng.randint(1, 8)):
            at = rng.randrange(len(stream))
            stream[at : at + rng.randint(0, 3)] = bytes(rng.choices(range(256), k=rng.randint(0, 2)))
        parser = SSEParser()
        check(accumulator_for(endpoint_of(path)), parser.feed(bytes(stream)) + parser.close())


@pytest.mark.parametrize("path", PATHS)
def test_a_far_index_costs_nothing(path):
    """An index of a billion is one entry, not a billion."""
    far = 10**9
    chunks = [
        delta(index=far, content="a", tool_calls=[{"index": far, "id": "x"}]),
        {"choices": [{"index": far, "text": "a"}]},
        {"type": "response.output_text.delta", "output_index": far, "content_index": far, "delta": "a"},
    ]
    chunk = dict(zip(PATHS, chunks, strict=True))[path]
    assert "a" in json.dumps(feed(chunk, path=path).partial())


def test_memory_is_that_of_the_text():
    """Fifteen thousand tokens of four characters are kept as text, not as as many strings."""
    accumulator = feed(delta(role="assistant", content="", reasoning=""))
    token = Event(json.dumps(delta(content="word"), separators=(",", ":")).encode())
    feed_all(accumulator, [token] * 10)
    tracemalloc.start()
    try:
        feed_all(accumulator, [token] * 15_000)
        assert tracemalloc.get_traced_memory()[0] < 450_000
    finally:
        tracemalloc.stop()
    assert accumulator.generated_text() == {0: "word" * 15_010}
