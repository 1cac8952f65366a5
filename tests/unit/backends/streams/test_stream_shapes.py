"""The streams in `tests/streams`, one per server and kind: each becomes the unstreamed body beside it, or its failure."""

import json
from pathlib import Path

import pytest

from tests.support.random_bodies import canon
from tests.support.streams import feed_all
from worker.backends.streams.accumulator import Accumulator
from worker.backends.streams.reading import accumulator_for
from worker.backends.streams.sse import SSEParser
from worker.policy.normalise import normalise
from worker.wire.endpoints import endpoint_of

STREAMS = sorted((Path(__file__).parents[3] / "streams").glob("*.sse"))


def accumulate(stream: bytes, size: int) -> Accumulator:
    """Feed the stream in pieces of a size."""
    path = "/v1/responses" if b"event: response" in stream else "/v1/chat/completions"
    path = "/v1/completions" if b'"text_completion"' in stream else path
    accumulator, parser = accumulator_for(endpoint_of(path)), SSEParser()
    for start in range(0, len(stream), size):
        feed_all(accumulator, parser.feed(stream[start : start + size]))
    feed_all(accumulator, parser.close())
    return accumulator


@pytest.mark.parametrize("file", STREAMS, ids=lambda file: file.stem)
def test_shape(file):
    """Cut into pieces of any size, the stream of every server gives the answer, or the failure, that it stands for."""
    expected = json.loads(file.with_suffix(".json").read_bytes())
    for size in (1, 7, 100_000):
        accumulator = accumulate(file.read_bytes(), size)
        if "partial" in expected:
            assert json.loads(accumulator.error) == expected["error"]
            assert normalise(None, {}, accumulator.error).status_hint == expected["status_hint"]
            assert canon(accumulator.partial()) == canon(expected["partial"])
            assert not accumulator.is_complete()
        else:
            assert canon(json.loads(accumulator.result())) == canon(expected)
            assert accumulator.error is None
            assert not accumulator.missing_done


def test_every_dialect_has_a_shape():
    """A dialect without a stream would be a promise that no test checks; every stream names where its shape comes from."""
    names = {file.stem.partition("_")[0] for file in STREAMS}
    assert names >= {"openai", "azure", "vllm", "sglang", "tgi", "llamacpp", "ollama", "litellm", "openrouter"}
    assert all(file.read_bytes().startswith(b": shape: https://") for file in STREAMS)
