"""Streams of one answer: single chunks, a network that brings them on virtual time, and scripted ones that break."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any, cast

import pytest

from tests.support.fakes import Answer
from tests.support.virtual_time import loop_time
from worker.backends.http.attempt_timer import AttemptTimer
from worker.backends.http.connection import Sink
from worker.backends.http.transport import push
from worker.backends.streams.accumulator import Accumulator, Progress
from worker.backends.streams.reading import StreamedAnswer, accumulator_for
from worker.backends.streams.sse import Event
from worker.errors import BackendError
from worker.policy.model import Fault, Phase
from worker.ports import AttemptResult, ResumePoint
from worker.settings.schema import TimeoutSettings
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


DONE_BYTES = b"data: [DONE]\n\n"
USAGE = {"prompt_tokens": 3, "completion_tokens": 2}
LIMITS = {"first_byte_s": 50, "idle_s": 10, "total_s": 100}
Step = bytes | float | Exception
"""What a network does next: bring bytes, wait so many seconds, break."""


def sse(*chunks: dict[str, Any]) -> bytes:
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)


ROLE = sse(delta(role="assistant", content=""))
HEL, LO, STOP = sse(delta(content="Hel")), sse(delta(content="lo")), sse(delta("stop"))
WHOLE = [ROLE, HEL, LO, STOP, sse(usage_chunk(**USAGE)), DONE_BYTES]
ERROR = sse({"error": {"message": "boom", "type": "InternalServerError", "code": 500}})


async def network(steps: list[Step]) -> AsyncIterator[bytes]:
    for step in steps:
        if isinstance(step, Exception):
            raise step
        if isinstance(step, bytes):
            yield step
        else:
            await asyncio.sleep(step)


class Reading:
    """One stream, read with limits in virtual time."""

    def __init__(self, *steps: Step, path: str = CHAT, max_bytes: int = 10_000, **limits: float) -> None:
        accumulator = accumulator_for(endpoint_of(path))
        assert accumulator is not None
        self.result = AttemptResult(started=loop_time())
        self.steps = list(steps)
        self.tokens: list[float] = []
        self.timer = AttemptTimer(TimeoutSettings.model_validate({**LIMITS, **limits}), limits.get("total_s", 100))
        self.answer = StreamedAnswer(
            accumulator,
            self.result,
            self.timer,
            max_bytes=max_bytes,
            on_first_token=lambda: self.tokens.append(loop_time()),
            resume_point=lambda _: ResumePoint(text="x", tokens=1),
            clock=loop_time,
        )

    async def read(self) -> AttemptResult:
        try:
            async with self.timer:
                await push(network(self.steps), cast("Sink", self.answer))  # it never asks for more than `feed`
                self.answer.end()
        except (TimeoutError, BackendError, OSError):
            if not self.answer.is_whole():  # as the backend: what it cut off followed a whole answer
                raise
        finally:
            self.answer.close()
        return self.result

    async def fail(self) -> Fault:
        """The fault with which it must end."""
        try:
            await self.read()
        except TimeoutError:
            return self.timer.fault
        except BackendError as error:
            return Fault(error.fault)
        pytest.fail("it did not break")

    @property
    def text(self) -> str:
        """Of the answer, or of what came of it."""
        body = json.loads(self.result.partial or self.result.body)
        return str(body["choices"][0]["message"]["content"])


RESUME_POINT = ResumePoint(text="Hel", tokens=3)
SSE = {"content-type": "text/event-stream"}


def partial(text: str = "Hel") -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": None}
    return json.dumps({"choices": [choice]}).encode()


def broken(
    fault: Fault | None = Fault.STREAM_BROKEN,
    *,
    text: str = "Hel",
    resume_point: ResumePoint | None = None,
    **more: Any,
) -> Answer:
    """A stream that broke after some text."""
    result = {"partial": partial(text), "content_events": 1, "resume_point": resume_point, **more.pop("result", {})}
    return Answer(**{"body": b"", "phase": Phase.STREAM, "headers": SSE, "fault": fault, "result": result, **more})


def error_event(body: dict[str, Any], *, text: str = "Hel") -> Answer:
    """A stream that ended with an error event, after some text or as its first event."""
    result = {"in_stream": True}
    result |= {} if text else {"partial": None, "content_events": 0}
    return broken(None, text=text, body=json.dumps(body).encode(), result=result)


def content(body: dict[str, Any]) -> str:
    return str(body["partial"]["choices"][0]["message"]["content"])
