"""
Server-sent events from bytes, as they arrive.

The HTTP backend feeds what the socket gave it and gets whole events back; where the bytes were cut makes no
difference.  The parser knows nothing of JSON, of `[DONE]` or of any server's dialect: that is `accumulator`.  Pure: no
I/O, no clock.

Lines end with CR, LF or CRLF and with nothing else: `str.splitlines` would also split at U+2028, U+0085 and form feed,
all of which may stand inside a JSON string.  Data stays bytes, so a character cut by a packet border is whole again
before it is decoded.  Comments are skipped, so that an idle timer which is restarted for each returned event does not
take a keep-alive comment for a sign of life.

Two deviations from the specification, both towards keeping what a server meant: an event without its final blank line
is returned at the end of the stream (marked, since it may be torn), and `id` and `retry` are ignored, since a client
cannot reconnect to a generation.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

import msgspec

from worker.errors import BackendError
from worker.policy.model import Fault

MAX_EVENT_BYTES = 32 * 1024 * 1024
"""
Default limit of one event: the Responses API repeats the whole answer in its last one, and three times Pub/Sub's 10 MB
message is more than can be published.
"""

_BOM = b"\xef\xbb\xbf"
_LF = 0x0A


class EventTooLargeError(BackendError):
    """One event is over the limit; permanent for this answer."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(Fault.RESPONSE_TOO_LARGE, f"one event of the stream is over {limit_bytes} bytes")


class Event(msgspec.Struct, frozen=True, gc=False):
    """One dispatched event."""

    data: bytes
    """The `data` lines joined with LF, undecoded; may be empty."""
    name: str = ""
    """The `event` field, empty when there was none; bytes that are not UTF-8 are replaced."""
    is_terminated: bool = True
    """`False` when the stream ended before the event's blank line: it may be torn."""


class SSEParser:
    """One stream's parser; single use."""

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        """
        Start before the first byte of a stream.

        Args:
            max_event_bytes: Limit of one event, names and unfinished lines included, in bytes; what the parser keeps
                between two calls is bounded by it.
        """
        self._max_event_bytes = max_event_bytes
        self._tail = bytearray()  # the unfinished line; grows in place, however small the pieces
        self._data: list[bytes] = []  # the data lines of the unfinished event
        self._name = ""
        self._event_bytes = 0
        self._skip_lf = False  # the last byte was a CR: an LF that comes next belongs to it
        self._at_start = True
        self._is_too_large = False

    @property
    def is_between_events(self) -> bool:
        """Whether nothing of an event has come that is not whole: what is fed next begins a line and an event."""
        return not (self._tail or self._data or self._name or self._skip_lf or self._at_start or self._is_too_large)

    def feed(self, chunk: bytes) -> list[Event]:
        """
        Take what the network gave and return the events it completed, in order; often none.

        Raises:
            EventTooLargeError: The unfinished event is over the limit.  The stream is of no further use.  Where the
                same bytes completed events before it, these are returned and the next call raises.
        """
        if self._is_too_large:
            raise EventTooLargeError(self._max_event_bytes)
        if self._skip_lf and chunk:
            self._skip_lf = False
            if chunk[0] == _LF:
                chunk = chunk[1:]
        if chunk.endswith(b"\n") and not self._tail and b"\r" not in chunk:
            complete, rest = chunk, b""  # whole lines, as nearly always: nothing to join, replace or keep
        else:
            cut = max(chunk.rfind(b"\n"), chunk.rfind(b"\r")) + 1
            complete, rest = self._whole_lines(chunk, cut), chunk[cut:]
        events: list[Event] = []
        if complete:
            lines = complete.split(b"\n")
            lines.pop()  # what follows the last line end: nothing
            events = self._lines(lines)
        if rest:
            self._tail += rest
            if self._event_bytes + len(self._tail) > self._max_event_bytes:
                self._is_too_large = True
        if self._is_too_large and not events:
            raise EventTooLargeError(self._max_event_bytes)
        return events

    def close(self) -> list[Event]:
        """
        Say that the stream has ended; returns the event it left unfinished, if it has data.  Idempotent.

        Raises:
            EventTooLargeError: As in `feed`.
        """
        if self._is_too_large:
            raise EventTooLargeError(self._max_event_bytes)
        line = bytes(self._tail)
        self._tail.clear()
        events = self._lines([line]) if line else []
        if self._is_too_large:
            raise EventTooLargeError(self._max_event_bytes)
        if self._data:
            events.append(Event(b"\n".join(self._data), self._name, is_terminated=False))
            self._data.clear()
            self._name = ""
            self._event_bytes = 0
        return events

    def _whole_lines(self, chunk: bytes, cut: int) -> bytes:
        """Return what is complete with the chunk's first `cut` bytes (0: nothing), every line ending with LF."""
        if cut == 0:
            return b""
        self._skip_lf = chunk.endswith(b"\r")
        self._tail += chunk[:cut]
        complete = bytes(self._tail)
        self._tail.clear()
        # No byte loop: search, replace and split run in C.  A CR at the end is whole: it claims the next LF.
        return complete.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in complete else complete

    def _lines(self, lines: list[bytes]) -> list[Event]:
        if self._at_start:
            self._at_start = False
            lines[0] = lines[0].removeprefix(_BOM)
        events: list[Event] = []
        data = self._data
        size = self._event_bytes
        for line in lines:
            if not line:
                if data:
                    events.append(Event(data[0] if len(data) == 1 else b"\n".join(data), self._name))
                    data.clear()
                self._name = ""
                size = 0
                continue
            if line.startswith(b"data: "):
                data.append(line[6:])
            elif line.startswith(b":"):
                continue  # not kept, so not counted: comments may go on for hours
            else:
                self._field(line)
            size += len(line)
            if size > self._max_event_bytes:
                self._is_too_large = True
                break
        self._event_bytes = size
        return events

    def _field(self, line: bytes) -> None:
        if line.startswith(b"event:"):
            self._name = line[6:].removeprefix(b" ").decode("utf-8", "replace")
        elif line.startswith(b"data:"):
            self._data.append(line[5:])
        elif line == b"data":
            self._data.append(b"")
        elif line == b"event":
            self._name = ""
