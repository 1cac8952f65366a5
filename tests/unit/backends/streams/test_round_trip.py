"""
Round trips: a random answer, streamed in a server's dialect, cut anywhere, accumulated, is the answer again.

Ten thousand of them in every full run, and a few hundred quick ones before; `-m "not slow"` leaves it at those.
`ROUND_TRIPS=100000` makes more, `ROUND_TRIPS_SEED` moves it to other cases.  A failing case names its seed.
"""

import json
import math
import os
import random
from collections.abc import Iterable

import pytest

from tests.support.dialect_streams import cut, responses_events, stream_of, to_sse
from tests.support.random_bodies import (
    DIALECTS,
    Body,
    canon,
    random_chat_body,
    random_completion_body,
    random_responses_body,
)
from tests.support.streams import feed_all
from worker.backends.streams.accumulator import Accumulator
from worker.backends.streams.reading import accumulator_for
from worker.backends.streams.sse import Event, SSEParser
from worker.wire.endpoints import endpoint_of

ROUND_TRIPS = int(os.environ.get("ROUND_TRIPS", "10000"))
FIRST_SEED = int(os.environ.get("ROUND_TRIPS_SEED", "0"))
QUICK = range(FIRST_SEED, FIRST_SEED + 30)
ALL = range(QUICK.stop, QUICK.stop + math.ceil(ROUND_TRIPS / len(DIALECTS)))
"""Seeds for each dialect."""
RESPONSES = range(FIRST_SEED, FIRST_SEED + 80)


def accumulate(path: str, pieces: Iterable[bytes], **options) -> Accumulator:
    """Feed a stream to its end."""
    accumulator, parser = accumulator_for(endpoint_of(path), **options), SSEParser()
    for piece in pieces:
        feed_all(accumulator, parser.feed(piece))
    feed_all(accumulator, parser.close())
    return accumulator


def a_case(name: str, seed: int) -> tuple[str, Body, bytes, random.Random]:
    """One random answer of a dialect and its stream; a third of them legacy completions."""
    rng = random.Random(f"{name} {seed}")
    is_chat = rng.random() < 0.7
    body = (random_chat_body if is_chat else random_completion_body)(rng, DIALECTS[name])
    return "/v1/chat/completions" if is_chat else "/v1/completions", body, stream_of(body, DIALECTS[name], rng), rng


def round_trip(dialect: str, seed: int) -> None:
    """Stream a random answer, cut the stream anywhere, and have the answer back."""
    path, body, stream, rng = a_case(dialect, seed)
    accumulator = accumulate(path, cut(stream, rng), choices=len(body["choices"]))
    assert accumulator.is_complete(), seed
    assert canon(json.loads(accumulator.result())) == canon(body), seed
    assert accumulator.usage == body["usage"], seed
    assert (accumulator.done, accumulator.missing_done, accumulator.error) == (True, False, None), seed


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_stream_becomes_the_unstreamed_answer(dialect):
    """Whatever the dialect, the line ends, the comments and the cuts: the body equals the one of `stream: false`."""
    for seed in QUICK:
        round_trip(dialect, seed)


@pytest.mark.slow
@pytest.mark.parametrize("dialect", DIALECTS)
def test_ten_thousand_streams_become_the_unstreamed_answers(dialect):
    """The same for this dialect's share of ten thousand other answers."""
    for seed in ALL:
        round_trip(dialect, seed)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_cut_stream_is_never_taken_for_a_whole_one(dialect):
    """Cut at any byte, a stream raises nothing, and is either complete with every character or a true prefix."""
    for seed in QUICK:
        path, body, stream, rng = a_case(dialect, seed)
        end = rng.randint(0, len(stream))
        accumulator = accumulate(path, [stream[:end]], choices=len(body["choices"]))
        whole = {choice["index"]: choice for choice in body["choices"]}
        if accumulator.is_complete():
            for choice in json.loads(accumulator.result())["choices"]:
                generated = ("message", "text", "logprobs", "finish_reason", "token_ids")
                assert canon([{k: choice.get(k) for k in generated}], "choices") == canon(
                    [{k: whole[choice["index"]].get(k) for k in generated}], "choices"
                ), seed
        for index, text in accumulator.generated_text().items():
            full = whole[index].get("text", (whole[index].get("message") or {}).get("content")) or ""
            assert full.startswith(text), seed
        for choice in (accumulator.partial() or {"choices": []})["choices"]:
            assert choice["finish_reason"] in (None, whole[choice["index"]]["finish_reason"]), seed


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_short_cut_changes_nothing(dialect):
    """The typed path for the commonest chunk gives the same answer as the general rules (which named events take)."""
    for seed in QUICK:
        path, body, stream, _ = a_case(dialect, seed)
        events = (parser := SSEParser()).feed(stream) + parser.close()
        results = []
        for name in ("", "chunk"):
            accumulator = accumulator_for(endpoint_of(path), choices=len(body["choices"]))
            progress = [accumulator.feed(Event(event.data, name)) for event in events]
            results.append((json.loads(accumulator.result()), progress, accumulator.content_events))
        assert results[0] == results[1], seed


def test_a_responses_stream_becomes_the_unstreamed_answer():
    """The Responses API, cut anywhere: the body is the terminal event's `response`, big integers and floats included."""
    for seed in RESPONSES:
        rng = random.Random(seed)
        body = random_responses_body(rng)
        stream = to_sse(responses_events(body, rng), rng, names=True, done=rng.random() < 0.2)
        accumulator = accumulate("/v1/responses", cut(stream, rng))
        assert json.loads(accumulator.result()) == body, seed
        assert accumulator.usage == body["usage"], seed


def test_a_cut_responses_stream_has_a_partial_of_what_came():
    """Cut before its terminal event, a Responses stream is incomplete; its partial items are prefixes of the whole ones."""
    for seed in RESPONSES:
        rng = random.Random(seed)
        body = random_responses_body(rng)
        stream = to_sse(responses_events(body, rng), rng, names=True, done=False, tidy=True)
        before_end = stream.rindex(b"event: response.")
        accumulator = accumulate("/v1/responses", [stream[: rng.randint(0, before_end)]])
        assert not accumulator.is_complete(), seed
        partial = accumulator.partial() or {"output": []}
        for item, whole in zip(partial["output"], body["output"], strict=False):
            assert item["id"] == whole["id"], seed
            assert whole.get("arguments", "").startswith(item.get("arguments", "")), seed
            for place in ("content", "summary"):
                for part, whole_part in zip(item.get(place, []), whole.get(place, []), strict=False):
                    field = "refusal" if whole_part["type"] == "refusal" else "text"
                    assert part["type"] == whole_part["type"], seed
                    assert whole_part[field].startswith(part[field]), seed
