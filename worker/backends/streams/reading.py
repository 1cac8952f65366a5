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

import time
from collections.abc import Callable, Mapping

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
    One streamed answer on its way into the result, pushed in as it arrives; single use.

    Until the first generated text the limit of the first byte goes on; from then on data restarts the idle timer, and
    comments do not.

    Args:
        accumulator: Assembles it.
        result: Filled in place.
        timer: Of the attempt.
        max_bytes: Limit of all events together.
        on_first_token: Called once, when the first generated text came.
        resume_point: What an answer that ended as it did leaves for another attempt.
        clock: Monotonic seconds, as of `result.started`.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        result: AttemptResult,
        timer: AttemptTimer,
        *,
        max_bytes: int,
        on_first_token: Callable[[], None] | None = None,
        resume_point: Callable[[Accumulator], ResumePoint | None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._accumulator = accumulator
        self._result = result
        self._timer = timer
        self._max_bytes = max_bytes
        self._on_first_token = on_first_token
        self._resume_point = resume_point
        self._clock = clock
        self._parser = SSEParser()
        self._size = 0
        self._head = b""
        self._has_ended = False
        self._unread: MalformedEventError | None = None

    def feed(self, data: bytes) -> float | None:
        """
        Take what came, as far as the limit of all bytes allows.

        Returns:
            `None` while more is wanted: until the protocol promises nothing more, or an error event comes.  Then, for
            how many seconds the end of the response is awaited.

        Raises:
            BackendError: It was malformed or too long; retryable.
        """
        if len(self._head) < MAX_EVIDENCE_BYTES:
            self._head += data[: MAX_EVIDENCE_BYTES - len(self._head)]
        left = self._max_bytes - self._size
        self._size += len(data)
        if (
            self._result.first_token_at is not None
            and len(data) <= left
            and self._unread is None
            and self._parser.is_between_events
            and self._accumulator.feed_repeated(data)
        ):
            self._timer.restart_idle()
            return None
        try:
            self._merge(self._parser.feed(data if len(data) <= left else data[:left]))
            if self._accumulator.is_over:
                self._timer.stop()
                return LINGER_S
            if len(data) > left:
                raise BackendError(Fault.RESPONSE_TOO_LARGE, f"more than {self._max_bytes} bytes")  # noqa: TRY301
        except BackendError:
            if not self.is_whole():
                raise
            return 0.0
        return None

    def end(self) -> None:
        """
        Take note that the response has ended, or that what may follow was awaited for long enough.

        Raises:
            BackendError: The answer is not whole; retryable.
        """
        if self._accumulator.is_over:
            if self._accumulator.error is None and not self.is_whole():
                raise BackendError(Fault.STREAM_BROKEN, "`[DONE]` came before a finish reason")
            return
        self._merge(self._parser.close())
        self._has_ended = True
        if self._accumulator.error is None and not self.is_whole():
            raise CutStreamError(
                "the stream ended before the answer was whole" if self._head else "the stream is empty"
            )

    def is_whole(self) -> bool:
        """Whether nothing that happens now can spoil the answer."""
        accumulator = self._accumulator
        return accumulator.is_complete() and (not accumulator.is_reopened or accumulator.is_over or self._has_ended)

    def _merge(self, events: list[Event]) -> None:
        """Merge events up to the last one that counts, and note what they brought, also where one of them is broken."""
        accumulator, result = self._accumulator, self._result
        has_data = has_content = False
        try:
            for event in events:
                try:
                    progress = accumulator.feed(event)
                except MalformedEventError as error:
                    if not self.is_whole():
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
                    self._timer.restart_idle()
            elif has_content:
                result.first_token_at = self._clock()
                self._timer.restart_idle()
                if self._on_first_token is not None:
                    self._on_first_token()

    def close(self) -> None:
        """Put what is known into the result."""
        accumulator, result = self._accumulator, self._result
        result.stream_usage = accumulator.usage
        result.content_events = accumulator.content_events
        result.partial, result.resume_point = None, self._resume_point(accumulator)
        result.is_whole = self.is_whole()
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
