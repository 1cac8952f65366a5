"""
The law of streams, fuzzed: assembled, an answer is the whole one, whatever the server's shapes and the packets' borders.

A fixed time, `FUZZ_SECONDS` (default 5, in CI at most 60).  What hypothesis finds it makes small.
"""

import json
import os
import random
import time

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.dialect_streams import chunks_of, responses_events, to_sse
from tests.support.random_bodies import (
    DIALECTS,
    canon,
    random_chat_body,
    random_completion_body,
    random_responses_body,
)
from tests.support.streams import Reading
from tests.support.virtual_time import virtual_time
from worker.backends.streams.reading import StreamedAnswer, accumulator_for
from worker.wire.endpoints import CHAT, COMPLETIONS, RESPONSES

SECONDS = float(os.environ.get("FUZZ_SECONDS", "5"))
TAILS = [
    b"",
    b"data: [DONE]\n\n",
    b"data: bye\n\n",
    b"data: null\n\n",
    b"\n\ndata: {\n\n",
    b": x\n\n",
    b"id: 1\n\nretry: 5\n\n",
]


@given(
    dialect=st.sampled_from(sorted(DIALECTS)),
    endpoint=st.sampled_from([CHAT, COMPLETIONS, RESPONSES]),
    seed=st.integers(0, 2**32),
    tail=st.sampled_from(TAILS),
    cuts=st.lists(st.integers(0, 4000), max_size=30),
    is_bytewise=st.booleans(),
    pretends_to_finish=st.booleans(),
)
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), database=None)
def check_one_stream(*, dialect, endpoint, seed, tail, cuts, is_bytewise, pretends_to_finish):
    """Any answer, in any dialect, with any line ends, cut anywhere, with anything behind it that is no part of it."""
    rng = random.Random(seed)
    shape = DIALECTS[dialect]
    if endpoint is RESPONSES:
        body = random_responses_body(rng)
        chunks = responses_events(body, rng)
    else:
        body = (random_chat_body if endpoint is CHAT else random_completion_body)(rng, shape)
        chunks = chunks_of(body, shape, rng)
    if pretends_to_finish and len(body.get("choices", ())) == 1:  # some servers name a finish reason in every chunk
        for choice in (choice for chunk in chunks for choice in chunk["choices"]):
            choice["finish_reason"] = body["choices"][0]["finish_reason"]
    done = pretends_to_finish or not tail.startswith(b"data")
    names = endpoint is RESPONSES
    stream = to_sse(chunks, rng, names=names, done=done and not names, tidy=bool(tail)) + tail
    places = (
        range(1, len(stream)) if is_bytewise and len(stream) < 3000 else sorted({cut % len(stream) for cut in cuts})
    )
    packets = [stream[start:end] for start, end in zip([0, *places], [*places, len(stream)], strict=True)]

    @virtual_time
    async def run() -> None:
        reading = Reading(*packets, max_bytes=10**7)
        accumulator = accumulator_for(endpoint, choices=len(body.get("choices", ())))
        assert accumulator is not None
        reading.answer = StreamedAnswer(accumulator, reading.result, reading.timer, max_bytes=10**7)
        result = await reading.read()
        assert result.is_whole
        assert canon(json.loads(result.body)) == canon(body)
        assert result.stream_usage == body["usage"]

    run()


def test_assembled_equals_whole():
    """As many streams as the time allows."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        check_one_stream()
