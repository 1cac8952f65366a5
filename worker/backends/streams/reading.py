"""
Reading one streamed answer: events in, the result filled, one body out.

The accumulator decides what the events mean and when the answer is whole; this file owns the order of things around
it: what restarts a timer, when the first token came, when to stop reading, and what survives of an answer that is not
whole.  Whatever ends the reading, an error, a cancellation or the end of the stream, the result knows what had come.

An answer is whole when its protocol says so, never because the connection ended well; so once it is whole, nothing that
happens to the connection can spoil it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress

import httpx
import msgspec

from worker.backends.http.attempt_timer import AttemptTimer
from worker.backends.streams.accumulator import Accumulator, MalformedEventError, Progress
from worker.backends.streams.choices import ChatAccumulator, CompletionAccumulator
from worker.backends.streams.responses import ResponsesAccumulator
from worker.backends.streams.sse import Event, SSEParser
from worker.errors import BackendError
from worker.policy.model import Fault
from worker.policy.normalise import looks_like_events
from worker.ports import AttemptResult, ResumePoint
from worker.wire.endpoints import CHAT, COMPLETIONS, RESPONSES, Endpoint
from worker.wire.http import is_success

LINGER_S = 5.0
"""How long an answer that is whole waits for what usually follows at once: the usage, the last verdicts of a filter,
`[DONE]`.  House decision: they need no generation, so seconds are plenty."""
LINGER_AFTER_DONE_S = 1.0
"""... and how long after `[DONE]` for the end of the response, without which the connection cannot be used again."""


def accumulator_for(
    endpoint: Endpoint, *, choices: int = 1, keep_usage: bool = True, prefix: Mapping[int, str] | None = None
) -> Accumulator | None:
    """
    Return a new accumulator for a request to an API, or `None` when its answers cannot be streamed.

    Args:
        endpoint: The API.
        choices: How many choices the request asks for; fewer are not a complete answer.
        keep_usage: `False` removes `usage` from the result: the request itself asked for a stream, and not for usage.
        prefix: Text by choice index which an earlier attempt generated and this one is asked to continue; the result
            begins with it.  Not for the Responses API.
    """
    if endpoint is CHAT:
        return ChatAccumulator(choices=choices, keep_usage=keep_usage, prefix=prefix)
    if endpoint is COMPLETIONS:
        return CompletionAccumulator(choices=choices, keep_usage=keep_usage, prefix=prefix)
    return ResponsesAccumulator() if endpoint is RESPONSES else None


class StreamedAnswer:
    """
    One streamed answer on its way into the result; single use.

    Args:
        accumulator: Assembles it.
        result: Filled in place.
        max_bytes: Limit of all events together.
        resume_point: What an answer that ended as it did leaves for another attempt.
        clock: Monotonic seconds, as of `result.started`.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        result: AttemptResult,
        *,
        max_bytes: int,
        resume_point: Callable[[Accumulator], ResumePoint | None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._accumulator = accumulator
        self._result = result
        self._max_bytes = max_bytes
        self._resume_point = resume_point
        self._clock = clock
        self._parser = SSEParser()
        self._size = 0

    async def read(
        self, chunks: AsyncIterator[bytes], timer: AttemptTimer, on_first_token: Callable[[], None] | None = None
    ) -> None:
        """
        Read the stream until the answer is whole or an error event comes; then the result has it.

        Until the first generated text the limit of the first byte goes on; from then on data restarts the idle timer,
        and comments do not.

        Raises:
            BackendError: It ended without its end, was malformed or too long; retryable.
            Exception: What the iterator raises.

        Cancellation: what had come is in the result, which `is_whole` when the cancellation only cut off what follows.
        """
        result = self._result
        try:
            async for chunk in chunks:
                progress = self._take(chunk)
                if result.first_token_at is not None:
                    if progress.data:
                        timer.restart_idle()
                elif progress.content:
                    result.first_token_at = self._clock()
                    timer.restart_idle()
                    if on_first_token is not None:
                        on_first_token()
                if progress.error or self._accumulator.is_complete():
                    timer.stop()
                    await self._linger(chunks)
                    return
            self._feed(self._parser.close())
            self._check_end()
        finally:
            self._note()

    def assemble(self, body: bytes) -> None:
        """
        Take a whole stream that came as something else: the text of its events under another content type.

        Raises:
            BackendError: As in `read`.
        """
        try:
            self._take(body)
            self._feed(self._parser.close())
            self._check_end()
        finally:
            self._note()

    def _check_end(self) -> None:
        if self._accumulator.error is None and not self._accumulator.is_complete():
            raise BackendError(Fault.STREAM_BROKEN, "the stream ended before the answer was whole")

    def _take(self, chunk: bytes) -> Progress:
        self._size += len(chunk)
        if self._size > self._max_bytes:
            raise BackendError(Fault.RESPONSE_TOO_LARGE, f"more than {self._max_bytes} bytes")
        return self._feed(self._parser.feed(chunk))

    def _feed(self, events: list[Event]) -> Progress:
        try:
            return self._accumulator.feed_all(events)
        except MalformedEventError as error:
            self._result.body = error.data
            raise

    async def _linger(self, chunks: AsyncIterator[bytes]) -> None:
        """Read what follows a whole answer or an error, for a short time; what goes wrong with it now is no matter."""
        accumulator = self._accumulator
        limit_s = LINGER_AFTER_DONE_S if _is_over(accumulator) else LINGER_S
        with suppress(BackendError, httpx.HTTPError, OSError):  # a TimeoutError is an OSError
            async with asyncio.timeout(limit_s) as timeout:
                async for chunk in chunks:
                    was_over = _is_over(accumulator)
                    self._take(chunk)
                    if _is_over(accumulator) and not was_over:
                        timeout.reschedule(asyncio.get_running_loop().time() + LINGER_AFTER_DONE_S)
                self._feed(self._parser.close())

    def _note(self) -> None:
        """Put what is known into the result."""
        accumulator, result = self._accumulator, self._result
        result.stream_usage = accumulator.usage
        result.content_events = accumulator.content_events
        result.partial, result.resume_point = None, self._resume_point(accumulator)
        result.is_whole = accumulator.is_complete()
        if result.is_whole:
            result.body = accumulator.result()
            result.missing_done = accumulator.missing_done
            return
        if accumulator.error is not None:
            result.in_stream = True
            result.body = accumulator.error
        result.partial = encode_partial(accumulator)


def encode_partial(accumulator: Accumulator) -> bytes | None:
    """Return what came of an answer as JSON, `None` when nothing did."""
    partial = accumulator.partial()
    return None if partial is None else msgspec.json.encode(partial)


def is_event_stream(result: AttemptResult) -> bool:
    """Whether the response's headers announce a good answer as a stream."""
    return is_success(result.status) and result.headers.get("content-type", "").lower().startswith("text/event-stream")


def holds_events(result: AttemptResult) -> bool:
    """Whether a good answer that was read as a whole is the text of a stream after all."""
    return is_success(result.status) and looks_like_events({}, result.body[:256])


def _is_over(accumulator: Accumulator) -> bool:
    """Whether nothing more is promised: `[DONE]` or an error came, or the API has no `[DONE]`."""
    return accumulator.done or not accumulator.missing_done
