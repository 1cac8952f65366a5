"""One streamed answer on virtual time: a network of steps, and what became of the result."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.streaming_chunks import CHAT, delta, usage_chunk
from tests.support.virtual_time import loop_time
from worker.backends.http.attempt_timer import AttemptTimer
from worker.backends.streams.reading import StreamedAnswer, accumulator_for
from worker.errors import BackendError
from worker.policy.model import Fault
from worker.ports import AttemptResult, ResumePoint
from worker.settings.schema import TimeoutSettings
from worker.wire.endpoints import endpoint_of

DONE = b"data: [DONE]\n\n"
USAGE = {"prompt_tokens": 3, "completion_tokens": 2}
LIMITS = {"first_byte_s": 50, "idle_s": 10, "total_s": 100}
Step = bytes | float | Exception
"""What a network does next: bring bytes, wait so many seconds, break."""


def sse(*chunks: dict[str, Any]) -> bytes:
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)


ROLE = sse(delta(role="assistant", content=""))
HEL, LO, STOP = sse(delta(content="Hel")), sse(delta(content="lo")), sse(delta("stop"))
WHOLE = [ROLE, HEL, LO, STOP, sse(usage_chunk(**USAGE)), DONE]
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
            max_bytes=max_bytes,
            resume_point=lambda _: ResumePoint(text="x", tokens=1),
            clock=loop_time,
        )

    async def read(self) -> AttemptResult:
        try:
            async with self.timer:
                await self.answer.read(b"", network(self.steps), self.timer, lambda: self.tokens.append(loop_time()))
        except TimeoutError:
            if not self.result.is_whole:  # as the backend: what it cut off followed a whole answer
                raise
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
