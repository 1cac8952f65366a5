"""
What every accumulator of a stream has in common: `[DONE]`, error events, and what it tells its caller.

An accumulator takes the events of one stream and assembles the one JSON body that the server would have sent without
`stream: true`.  It is pure; the HTTP backend owns the socket and the timers and learns from the returned `Progress`
when to note the first token and when to restart the idle timer.  The merge rules of each API are in a subclass.

An error event is remembered, never raised: servers go on afterwards (SGLang even ends with `[DONE]`), and the caller
wants what came with it.  What is raised is only what no rule can make sense of: an event that is not JSON or not of the
protocol's shape.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from worker.backends.streams.merge import ShapeError
from worker.backends.streams.sse import Event
from worker.backends.streams.values import decode_event, is_error, repair_surrogates, status_hint
from worker.errors import BackendError
from worker.policy.model import Fault

DATA: Final = 1
CONTENT: Final = 2
USAGE: Final = 4
ERROR: Final = 8
DONE: Final = 16

_DETAIL_BYTES = 2048  # as much of a strange event as an error envelope may carry
_HEARTBEATS = frozenset({"keepalive", "ping"})


class MalformedEventError(BackendError):
    """
    An event is not JSON, or not of the shape its API promises; the stream is broken, another try may work.

    Attributes:
        data: The event's data, at most 2 KiB of it.
    """

    def __init__(self, reason: str, data: bytes) -> None:
        self.data = data[:_DETAIL_BYTES]
        super().__init__(Fault.STREAM_BROKEN, f"{reason}: {self.data[:200].decode('utf-8', 'replace')}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What one event, or one batch of events, brought."""

    data: bool = False
    """Something of the protocol came: restart the idle timer.  Heartbeats (empty events, `keepalive`) are not that."""
    content: bool = False
    """Generated text came: content, reasoning, refusal, or a part of a tool call.  The first of these is the TTFT."""
    usage: bool = False
    """Token counts came."""
    error: bool = False
    """An error event came; see `Accumulator.error`."""
    done: bool = False
    """`[DONE]` came; a promise of nothing, see `Accumulator.is_complete`."""


_PROGRESS = [
    Progress(
        data=bool(bits & DATA),
        content=bool(bits & CONTENT),
        usage=bool(bits & USAGE),
        error=bool(bits & ERROR),
        done=bool(bits & DONE),
    )
    for bits in range(32)
]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamErrorEvent:
    """The first error event of a stream."""

    data: bytes
    """Its JSON as it came; for `response.failed`, the response's `error` in the usual envelope."""
    status_hint: int | None
    """The HTTP status its `code` stands for, if it names one."""
    is_first: bool
    """No chunk came before it: it is a plain HTTP error that happens to have been sent as an event."""


class Accumulator(ABC):
    """
    One stream's accumulator; single use: a retry takes a new one, so that nothing of a broken try can leak.

    Attributes:
        error: The first error event; once it is set, the stream has failed, whatever follows.
        done: `[DONE]` was seen.
        chunks: Events of the protocol so far, error events and `[DONE]` not counted.
        content_events: Those of them with generated text; servers send about one a token.
        has_torn_event: The stream ended inside an event, which was dropped.
    """

    def __init__(self) -> None:
        self.error: StreamErrorEvent | None = None
        self.done = False
        self.chunks = 0
        self.content_events = 0
        self.has_torn_event = False
        self._needs_repair = False

    def feed(self, event: Event) -> Progress:
        """
        Merge one event.

        Raises:
            MalformedEventError: Not JSON, or not a chunk of this API; the stream is broken.  What came before stays.
        """
        return _PROGRESS[self._feed(event)]

    def feed_all(self, events: Iterable[Event]) -> Progress:
        """
        Merge a batch, such as the events of one network read, and return what all of them brought together.

        Raises:
            MalformedEventError: As in `feed`; the events before it are merged.
        """
        bits = 0
        feed = self._feed
        for event in events:
            bits |= feed(event)
        return _PROGRESS[bits]

    @abstractmethod
    def is_complete(self) -> bool:
        """Whether the protocol itself says that the answer is whole, and no error event was seen."""

    @abstractmethod
    def result(self) -> bytes:
        """
        Return the body the server would have sent unstreamed, as JSON.

        Raises:
            RuntimeError: Not `is_complete`: a partial answer must never pass for a whole one.
        """

    @abstractmethod
    def partial(self) -> dict[str, Any] | None:
        """
        Return what came of the body so far, for the error envelope; `None` when nothing was generated.

        For msgspec's encoder: parts of it may be JSON already (`msgspec.Raw`).
        """

    @abstractmethod
    def generated_text(self) -> dict[int, str]:
        """Return the plain text so far by choice index, without reasoning, refusals and tool calls."""

    @property
    @abstractmethod
    def usage(self) -> dict[str, Any] | None:
        """The server's token counts, in its own shape; `None` when it sent none, or zeros only."""

    @property
    def has_partial(self) -> bool:
        """Whether anything generated came."""
        return self.content_events > 0

    @property
    def is_text_only(self) -> bool:
        """Whether all that was generated is in `generated_text`, so that another try can continue from it."""
        return False

    @property
    def missing_done(self) -> bool:
        """The answer is whole, but the `[DONE]` its API promises did not come."""
        return self.is_complete() and not self.done

    def _feed(self, event: Event) -> int:
        bits = self._merge_common(event)
        return bits if bits >= 0 else self._feed_any(event)

    @abstractmethod
    def _merge_common(self, event: Event) -> int:
        """Merge the commonest kind of chunk without building its tree; -1, and nothing changed, for any other kind."""

    @abstractmethod
    def _merge(self, chunk: dict[str, Any], event: Event) -> int:
        """Merge one decoded chunk and return its bits."""

    def _feed_any(self, event: Event) -> int:
        data = event.data.strip()
        if not data:
            return 0
        if data == b"[DONE]":
            self.done = True
            return DATA | DONE
        try:
            chunk, has_halves = decode_event(data)
        except ValueError as error:
            return self._undecodable(event, str(error))
        if is_error(chunk) or event.name == "error":
            return self._fail(event.data, chunk)
        self._needs_repair |= has_halves
        return self._count(chunk, event)

    def _undecodable(self, event: Event, reason: str) -> int:
        if event.name == "error":
            return self._fail(event.data, {})
        if event.is_terminated:
            raise MalformedEventError(reason, event.data)
        self.has_torn_event = True
        return 0

    def _count(self, chunk: dict[str, Any], event: Event) -> int:
        if "choices" not in chunk and kind_of(chunk, event) in _HEARTBEATS:
            return 0
        try:
            bits = self._merge(chunk, event)
        except ShapeError as error:
            raise MalformedEventError(str(error), event.data) from None
        self.chunks += 1
        if bits & CONTENT:
            self.content_events += 1
        return bits

    def _fail(self, data: bytes, body: dict[str, Any]) -> int:
        if self.error is None:
            self.error = StreamErrorEvent(data=data, status_hint=status_hint(body), is_first=self.chunks == 0)
        return DATA | ERROR

    def _clean(self, value: Any) -> Any:
        return repair_surrogates(value) if self._needs_repair else value

    def _encoded(self, body: dict[str, Any]) -> bytes:
        if not self.is_complete():
            raise RuntimeError("the stream is not complete: it has a partial, no result")
        return msgspec.json.encode(self._clean(body))


def kind_of(chunk: dict[str, Any], event: Event) -> str:
    """Return the `type` an event gives itself, or else the name it was sent under."""
    kind = chunk.get("type")
    return kind if isinstance(kind, str) else event.name
