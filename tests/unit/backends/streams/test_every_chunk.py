"""A stream that ends behind each of its chunks, in each way, for each server's shape: what the requester gets."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.pipeline import METADATA, Pipeline, data, message
from tests.support.random_bodies import canon
from tests.support.virtual_time import settle, virtual_time
from worker.backends.openai import HttpBackend
from worker.ports import Settlement
from worker.settings.schema import BreakerSettings, RouteSettings

ACK, NACK = Settlement.ACK, Settlement.NACK
FOLDER = Path(__file__).parents[3] / "streams"
WHOLE = {
    file.stem: (re.split(rb"(?<=\n\n)", file.read_bytes())[:-1], json.loads(file.with_suffix(".json").read_bytes()))
    for file in sorted(FOLDER.glob("*.sse"))
    if "partial" not in json.loads(file.with_suffix(".json").read_bytes())
}
"""Streams of good answers as their blocks (events and comments), and the answers."""
PATHS = {"chat.completion": "/v1/chat/completions", "text_completion": "/v1/completions", "response": "/v1/responses"}
FAILURES = {
    "TimeoutError": (TimeoutError("timed out"), {"stream_idle", "timeout"}),
    "ConnectionError": (ConnectionResetError("reset"), {"stream_broken"}),
    "ReadTimeout": (httpx.ReadTimeout("silent"), {"stream_broken"}),
    "ReadError": (httpx.ReadError("cut"), {"stream_broken"}),
    "EOF": (None, {"stream_broken"}),
}


class Broken(httpx.AsyncBaseTransport, httpx.AsyncByteStream):
    """A transport whose one answer is a stream that ends behind so many blocks: by an exception, cleanly, or never."""

    def __init__(self, blocks: list[bytes], failure: Exception | None, *, hangs: bool = False) -> None:
        self._blocks = blocks
        self._failure = failure
        self._hangs = hangs
        self.hanging = asyncio.Event()
        self.requests = self.released = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests += 1
        return httpx.Response(200, headers={"Content-Type": "text/event-stream"}, stream=self, request=request)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for block in self._blocks:
            yield block
        if self._hangs:
            self.hanging.set()
            await asyncio.sleep(1e6)
        if self._failure is not None:
            raise self._failure

    async def aclose(self) -> None:
        self.released += 1


def a_pipeline(transport: Broken) -> Pipeline:
    route = RouteSettings(name="fake", base_url="http://h", stream="always")
    backend = HttpBackend(route, transport)
    return Pipeline(backend, include_stats=True, breaker=BreakerSettings(failures=1000), outage_detection_s=0.0)


def a_message(answer: dict[str, Any], attempt: int) -> Any:
    body = {"model": "m", "n": len(answer.get("choices", [0]))}
    return message(data(body, path=PATHS[answer["object"]]), attempt=attempt)


def events_of(blocks: list[bytes]) -> list[dict[str, Any]]:
    """The JSON of the events, read without the worker's parser."""
    found = [re.search(rb"^data: ?(\{.*\})$", block, re.MULTILINE) for block in blocks]
    return [json.loads(match[1]) for match in found if match]


def is_whole(blocks: list[bytes], whole: dict[str, Any]) -> bool:
    """Whether the protocol's own end is among them: one for every choice."""
    events = events_of(blocks)
    if "choices" not in whole:
        return any(event.get("type") in {"response.completed", "response.incomplete"} for event in events)
    choices = [choice for event in events for choice in event.get("choices") or []]
    return {each["index"] for each in choices if each.get("finish_reason")} == set(range(len(whole["choices"])))


def text_of(blocks: list[bytes]) -> str:
    """The plain text in them, put together without the worker's accumulator."""
    pieces = []
    for event in events_of(blocks):
        choices = event.get("choices") or []
        pieces += [
            (each["index"], each.get("text") or (each.get("delta") or {}).get("content") or "") for each in choices
        ]
        if event.get("type") == "response.output_text.delta":
            pieces.append((0, event["delta"]))
    return "".join(piece for _, piece in sorted(pieces, key=itemgetter(0)))


def text_of_body(body: dict[str, Any]) -> str:
    if "choices" in body:
        return "".join(each.get("text") or (each.get("message") or {}).get("content") or "" for each in body["choices"])
    parts = [part for item in body["output"] for part in item.get("content") or []]
    return "".join(part.get("text") or "" for part in parts)


def check_truncated(answer: Any, blocks: list[bytes], codes: set[str]) -> None:
    """An error with everything that had come, the metadata, and stats that say what is known."""
    body, stats = answer.json["body"], answer.json["stats"]
    assert answer.json["status_code"] >= 500
    assert answer.json["metadata"] == METADATA
    assert body["error"]["code"] in codes
    assert answer.attributes["error_class"] == stats["error_class"] == body["error"]["code"]
    assert text_of_body(body.get("partial", {"choices": []})) == text_of(blocks)
    has_partial = "partial" in body
    assert has_partial or not text_of(blocks)
    assert (body.get("truncated"), answer.attributes.get("truncated")) == (
        (True, "true") if has_partial else (None, None)
    )
    assert (stats["ttft_s"] is not None) is has_partial
    assert stats["ttlt_s"] >= (stats["ttft_s"] or 0)
    assert stats["streamed"] is True


def check_whole(answer: Any, whole: dict[str, Any]) -> None:
    """A good answer with everything that was generated; usage and the filter's last verdicts may not have come."""
    body = answer.json["body"]
    assert (answer.json["status_code"], answer.json["metadata"]) == (200, METADATA)
    assert answer.json["stats"]["error_class"] is None
    without = {"content_filter_results": None}
    generated = [[{**choice, **without} for choice in each.get("choices", [])] for each in (body, whole)]
    assert canon(generated[0], "choices") == canon(generated[1], "choices")
    assert text_of_body(body) == text_of_body(whole)


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("name", WHOLE)
def test_broken_behind_any_chunk(name: str, failure: str) -> None:
    """Out of attempts: all of the text until then in an error; behind the protocol's end, the whole answer with a 200."""
    blocks, whole = WHOLE[name]
    error, codes = FAILURES[failure]

    @virtual_time
    async def run(count: int) -> None:
        pipeline = a_pipeline(Broken(blocks[:count], error))
        assert await pipeline.handle(a_message(whole, attempt=5)) is ACK
        if is_whole(blocks[:count], whole):
            check_whole(pipeline.answer, whole)
        else:
            check_truncated(pipeline.answer, blocks[:count], codes)

    assert not is_whole(blocks[:1], whole)
    for count in range(len(blocks) + 1):
        run(count)


@pytest.mark.parametrize("attempt", [1, 5])
@pytest.mark.parametrize("name", WHOLE)
def test_cancelled_behind_any_chunk(name: str, attempt: int) -> None:
    """With attempts left the message goes back unanswered; without, what came goes out; a whole answer always does."""
    blocks, whole = WHOLE[name]

    @virtual_time
    async def run(count: int) -> None:
        transport = Broken(blocks[:count], None, hangs=True)
        pipeline = a_pipeline(transport)
        handling = pipeline.start(a_message(whole, attempt))
        await transport.hanging.wait()
        await settle()
        handling.cancel()
        is_answered = attempt == 5 or is_whole(blocks[:count], whole)
        assert await handling is (ACK if is_answered else NACK)
        assert len(pipeline.answers) == is_answered
        if is_whole(blocks[:count], whole):
            check_whole(pipeline.answer, whole)
        elif is_answered:
            check_truncated(pipeline.answer, blocks[:count], {"aborted"})
        assert (transport.requests, transport.released) == (1, 1)
        pipeline.assert_nothing_leaks()

    for count in range(len(blocks) + 1):
        run(count)
