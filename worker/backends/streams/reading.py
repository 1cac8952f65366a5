"""
Reading one streamed answer: events in, the result filled, one body out.

The accumulator decides what the events mean and when the answer is whole; this file owns the order of things around
it: what restarts a timer, when the first token came, when to stop reading, and what survives of an answer that is not
whole.  Whatever ends the reading, an error, a cancellation or the end of the stream, the result knows what had come.

An answer is whole when its protocol says so, never because the connection ended well; so once it is whole, nothing that
happens to the connection can spoil it, and no event that cannot be read.  What follows is read all the same, with the
limits of the rest of the stream, until the server says that this was all: the usage may follow, verdicts of a filter,
an error, or more text, which makes the answer unfinished again.

Events are taken one by one: where the network cut them makes no difference.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress

import httpx
import msgspec

from worker.backends.http.attempt_timer import AttemptTimer
from worker.backends.streams.accumulator import Accumulator, MalformedEventError
from worker.backends.streams.choices import ChatAccumulator, CompletionAccumulator
from worker.backends.streams.responses import ResponsesAccumulator
from worker.backends.streams.sse import Event, SSEParser
from worker.errors import BackendError
from worker.policy.model import Fault
from worker.ports import AttemptResult, ResumePoint
from worker.wire.endpoints import CHAT, COMPLETIONS, RESPONSES, Endpoint
from worker.wire.http import is_success

LINGER_S = 1.0
"""How long the end of the response is waited for behind the stream's last event, without which the connection cannot be
used again."""
MAX_EVIDENCE_BYTES = 2048
"""As much of the beginning of a stream that broke as an error envelope may carry."""

_FIELDS = (b"data:", b"event:", b"id:", b"retry:", b":")
BOM = b"\xef\xbb\xbf"
"""A byte order mark, which some servers write before JSON although it is no part of it (RFC 8259, section 8.1)."""
_BLANK = BOM + b"\r\n\t "


def accumulator_for(
    endpoint: Endpoint, *, choices: int = 1, prefix: Mapping[int, str] | None = None
) -> Accumulator | None:
    """
    Return a new accumulator for a request to an API, or `None` when its answers cannot be streamed.

    Args:
        endpoint: The API.
        choices: How many choices the request asks for; fewer are not a complete answer.
        prefix: Text by choice index which an earlier attempt generated and this one is asked to continue; the result
            begins with it.  Not for the Responses API.
    """
    if endpoint is CHAT:
        return ChatAccumulator(choices=choices, prefix=prefix)
    if endpoint is COMPLETIONS:
        return CompletionAccumulator(choices=choices, prefix=prefix)
    return ResponsesAccumulator() if endpoint is RESPONSES else None


class CutStreamError(BackendError):
    """The response ended before the stream did: the server never says more, or something cut it off."""

    def __init__(self, detail: str) -> None:
        super().__init__(Fault.STREAM_BROKEN, detail)


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
        self._head = b""
        self._has_ended = False
        self._unread: MalformedEventError | None = None

    async def read(
        self,
        head: bytes,
        chunks: AsyncIterator[bytes],
        timer: AttemptTimer,
        on_first_token: Callable[[], None] | None = None,
    ) -> None:
        """
        Read the stream until the protocol promises nothing more, an error event comes, or the response ends.

        Until the first generated text the limit of the first byte goes on; from then on data restarts the idle timer,
        and comments do not.

        Args:
            head: Bytes of the stream that were read already.
            chunks: The rest of it.
            timer: Of the attempt.
            on_first_token: Called once, when the first generated text came.

        Raises:
            BackendError: It ended without its end, was malformed or too long; retryable.
            Exception: What the iterator raises.

        Cancellation: what had come is in the result, which `is_whole` when the cancellation only cut off what follows.
        """
        accumulator = self._accumulator
        try:
            self._take(head, timer, on_first_token)
            while not accumulator.is_over:
                chunk = await anext(chunks, None)
                if chunk is None:
                    self._end(timer, on_first_token)
                    return
                self._take(chunk, timer, on_first_token)
            timer.stop()
            await self._linger(chunks)
            self._check_done()
        except (BackendError, httpx.HTTPError, OSError):
            if not self._is_whole():
                raise
        finally:
            self._note()

    def _is_whole(self) -> bool:
        accumulator = self._accumulator
        return accumulator.is_complete() and (not accumulator.is_reopened or accumulator.is_over or self._has_ended)

    def _take(self, chunk: bytes, timer: AttemptTimer, on_first_token: Callable[[], None] | None) -> None:
        """Take what came, as far as the limit of all bytes allows."""
        if len(self._head) < MAX_EVIDENCE_BYTES:
            self._head += chunk[: MAX_EVIDENCE_BYTES - len(self._head)]
        left = self._max_bytes - self._size
        self._size += len(chunk)
        self._feed(self._parser.feed(chunk if len(chunk) <= left else chunk[:left]), timer, on_first_token)
        if len(chunk) > left and not self._accumulator.is_over:
            raise BackendError(Fault.RESPONSE_TOO_LARGE, f"more than {self._max_bytes} bytes")

    def _end(self, timer: AttemptTimer, on_first_token: Callable[[], None] | None) -> None:
        """The response has ended."""
        self._feed(self._parser.close(), timer, on_first_token)
        self._has_ended = True
        if self._accumulator.error is None and not self._is_whole():
            raise CutStreamError(
                "the stream ended before the answer was whole" if self._head else "the stream is empty"
            )

    def _check_done(self) -> None:
        if self._accumulator.error is None and not self._is_whole():
            raise BackendError(Fault.STREAM_BROKEN, "`[DONE]` came before a finish reason")

    def _feed(self, events: list[Event], timer: AttemptTimer, on_first_token: Callable[[], None] | None) -> None:
        """Merge events up to the last one that counts, and note what they brought, also where one of them is broken."""
        accumulator, result = self._accumulator, self._result
        has_data = has_content = False
        try:
            for event in events:
                try:
                    progress = accumulator.feed(event)
                except MalformedEventError as error:
                    if not self._is_whole():
                        result.body = error.data
                        raise
                    self._unread = error
                    continue
                if self._unread is not None and accumulator.is_reopened:  # it was in the middle of the answer
                    result.body = self._unread.data
                    raise self._unread
                has_data |= progress.data
                has_content |= progress.content
                if accumulator.is_over:
                    break
        finally:
            if result.first_token_at is not None:
                if has_data:
                    timer.restart_idle()
            elif has_content:
                result.first_token_at = self._clock()
                timer.restart_idle()
                if on_first_token is not None:
                    on_first_token()

    async def _linger(self, chunks: AsyncIterator[bytes]) -> None:
        """Read on to the end of the response, for a short time; what comes and what goes wrong now is no matter."""
        with suppress(BackendError, httpx.HTTPError, OSError):  # a TimeoutError is an OSError
            async with asyncio.timeout(LINGER_S):
                left = self._max_bytes - self._size
                async for chunk in chunks:
                    left -= len(chunk)
                    if left < 0:
                        break

    def _note(self) -> None:
        """Put what is known into the result."""
        accumulator, result = self._accumulator, self._result
        result.stream_usage = accumulator.usage
        result.content_events = accumulator.content_events
        result.partial, result.resume_point = None, self._resume_point(accumulator)
        result.is_whole = self._is_whole()
        if result.is_whole:
            result.body = accumulator.result()
            result.missing_done = accumulator.missing_done
            return
        if accumulator.error is not None:
            result.in_stream = True
            result.body = accumulator.error
        elif not result.body:
            result.body = self._head
        result.partial = encode_partial(accumulator)


def encode_partial(accumulator: Accumulator) -> bytes | None:
    """Return what came of an answer as JSON, `None` when nothing did."""
    partial = accumulator.partial()
    return None if partial is None else msgspec.json.encode(partial)


def is_labelled_stream(result: AttemptResult) -> bool:
    """Whether the response's headers announce a good answer as a stream."""
    return is_success(result.status) and result.headers.get("content-type", "").lower().startswith("text/event-stream")


def holds_events(head: bytes, *, is_labelled: bool) -> bool | None:
    """
    Say by its first bytes whether a body is a stream of events; `None` if more of them have to be seen.

    The label decides only about what is neither a field of an event stream nor JSON nor HTML.

    Args:
        head: The body as far as it came.
        is_labelled: The response's headers announce a stream.
    """
    start = head.lstrip(_BLANK)[:16]
    if not start:
        return None
    if start[0] in b"{[<":
        return False
    if start.startswith(_FIELDS):
        return True
    return None if any(field.startswith(start) for field in _FIELDS) else is_labelled
