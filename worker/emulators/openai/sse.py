"""
Events, and the bytes of a server-sent event stream that carries them, whole or broken on purpose.

Pure: `stream_steps` turns events and a `StreamFault` into steps (write these bytes, wait, end like this); the server
performs them.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import msgspec

from worker.emulators.openai.dialects import Kind, SimError, UsageOn, stream_error


@dataclass(slots=True)
class Event:
    """One event: what it says and how much generation it stands for."""

    payload: dict[str, Any] | None
    """The JSON of the data field; None is the literal `[DONE]`."""
    name: str | None = None
    """The event field; None leaves it out."""
    tokens: int = 0
    """Tokens that were generated for it; paces the stream."""
    terminal: bool = False
    """Whether the Responses API ends with it."""


Ending = Literal["done", "rst", "fin", "mid_chunk", "bad_chunk", "unframed"]
"""
How a body ends: as HTTP wants it; TCP reset; connection closed between two chunks; closed inside a chunk; an illegal
chunk header; or closed at the end of a body with neither length nor chunks, which no client can tell from a whole one.
"""
LINE_ENDINGS = {"lf": b"\n", "crlf": b"\r\n", "cr": b"\r"}
BOM = b"\xef\xbb\xbf"


class Break(StrEnum):
    """What happens in the middle of a stream."""

    NONE = "none"
    RST = "rst"
    EOF = "eof"
    """The body ends cleanly, too early."""
    CLOSE_EOF = "close_eof"
    """The same on a `Connection: close` body without chunks."""
    CHUNK_CUT = "chunk_cut"
    MID_CHUNK = "mid_chunk"
    BAD_CHUNK = "bad_chunk"
    IDLE = "idle"
    COMMENTS = "comments"
    ERROR_EVENT = "error_event"
    FAILED_EVENT = "failed_event"
    """`response.failed` of the Responses API; an error event elsewhere."""


_ENDINGS: dict[Break, Ending] = {
    Break.RST: "rst",
    Break.CHUNK_CUT: "fin",
    Break.MID_CHUNK: "mid_chunk",
    Break.BAD_CHUNK: "bad_chunk",
    Break.CLOSE_EOF: "unframed",
}


@dataclass(frozen=True, slots=True)
class StreamFault:
    """How a stream departs from the plain one; the default departs in nothing."""

    break_: Break = Break.NONE
    after_bytes: int | None = None
    """Bytes of the body before the break; None looks at `after_events`."""
    after_events: int | None = None
    """Events before the break; None for both is the middle of the stream."""
    idle_s: float | None = None
    """Seconds that `idle` and `comments` last before the stream continues; None is until the client disconnects."""
    comment_every_s: float = 0.2
    """Seconds between two comments of `comments`."""
    error: Kind = Kind.SERVER_ERROR
    """What an error event says."""
    error_status: int | None = None
    """The status an error event shows, where the dialect shows one; None is the usual one of `error`."""
    missing_done: bool = False
    missing_finish_reason: bool = False
    """No finish_reason; for the Responses API no terminal event."""
    missing_last_blank: bool = False
    """The stream ends right after its last data line."""
    line_ending: Literal["lf", "crlf", "cr"] = "lf"
    bom: bool = False
    split_bytes: int | None = None
    """Size of the writes, cutting UTF-8 characters wherever they fall; None writes whole events."""
    multiline: bool = False
    """JSON over several `data:` lines."""
    usage_on: UsageOn | None = None
    """Where usage stands; None is where the dialect puts it."""


PLAIN = StreamFault()


@dataclass(frozen=True, slots=True)
class Write:
    """Send bytes as soon as `tokens` tokens have been generated since the beginning."""

    data: bytes
    tokens: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Send nothing for `seconds` (None: until the client disconnects), or only comments if there is an interval."""

    seconds: float | None
    comment_every_s: float | None = None


@dataclass(frozen=True, slots=True)
class End:
    """End the body."""

    how: Ending


StreamStep = Write | Wait | End


def frame(event: Event, fault: StreamFault = PLAIN) -> bytes:
    """Return one event as bytes, its blank line included."""
    end = LINE_ENDINGS[fault.line_ending]
    lines = [b"event: " + event.name.encode()] if event.name else []
    data = b"[DONE]" if event.payload is None else msgspec.json.encode(event.payload)
    if fault.multiline and event.payload is not None:
        data = msgspec.json.format(data, indent=1)
    lines += [b"data: " + line for line in data.split(b"\n")]
    return end.join(lines) + end + end


def _without(events: list[Event], fault: StreamFault) -> list[Event]:
    """Return the events less what the fault leaves out."""
    if fault.missing_done:
        events = [event for event in events if event.payload is not None]
    if fault.missing_finish_reason:
        events = [event for event in events if not event.terminal]
        for event in events:
            for choice in (event.payload or {}).get("choices", ()):
                if "finish_reason" in choice:
                    choice["finish_reason"] = None
    return events


def _with_error(events: list[Event], fault: StreamFault, dialect: str, *, done_after: bool) -> list[Event]:
    """Return the events up to the break, then the error in the dialect's form."""
    place = len(events) // 2 if fault.after_events is None else min(fault.after_events, len(events))
    kept = events[:place]
    error = SimError(fault.error, status=fault.error_status)
    fields = error.in_dialect(dialect)
    if any(event.name for event in events):
        payload = {"sequence_number": place, "code": fields.code or fields.type, "message": fields.message}
        if fault.break_ is Break.FAILED_EVENT:
            response: dict[str, Any] = next(
                (e.payload["response"] for e in events if e.payload and "response" in e.payload), {}
            )
            failed = {**response, "status": "failed", "error": {"code": payload["code"], "message": fields.message}}
            body = {"type": "response.failed", "sequence_number": place, "response": failed}
            return [*kept, Event(body, name="response.failed")]
        return [*kept, Event({"type": "error", **payload, "param": None}, name="error")]
    if (shown := stream_error(dialect, error)) is None:
        return kept
    return [*kept, Event(shown), *([Event(None)] if done_after else [])]


def _cut_at(frames: list[bytes], fault: StreamFault) -> int:
    """Return after how many bytes the break comes."""
    total = sum(map(len, frames))
    if fault.after_bytes is not None:
        return min(fault.after_bytes, total)
    if fault.after_events is not None:
        return sum(map(len, frames[: fault.after_events]))
    return total // 2


def _split(steps: list[StreamStep], size: int) -> list[StreamStep]:
    """Return the steps with writes of at most `size` bytes."""
    smaller: list[StreamStep] = []
    for step in steps:
        if isinstance(step, Write):
            smaller += [Write(step.data[at : at + size], step.tokens) for at in range(0, len(step.data), size)]
        else:
            smaller.append(step)
    return smaller


def stream_steps(
    events: list[Event], fault: StreamFault = PLAIN, dialect: str = "openai", *, done_after_error: bool = False
) -> list[StreamStep]:
    """
    Return what the server has to do to send a stream, ending with exactly one `End`.

    Args:
        events: The plain stream; its payloads may be changed.
        fault: How it is to be broken.
        dialect: How an error event is written.
        done_after_error: Whether `[DONE]` follows an error event.
    """
    events = _without(events, fault)
    if fault.break_ in {Break.ERROR_EVENT, Break.FAILED_EVENT}:
        events = _with_error(events, fault, dialect, done_after=done_after_error)
    frames = [frame(event, fault) for event in events]
    if frames and fault.bom:
        frames[0] = BOM + frames[0]
    if frames and fault.missing_last_blank:
        frames[-1] = frames[-1][: -2 * len(LINE_ENDINGS[fault.line_ending])]
    steps: list[StreamStep] = []
    tokens = 0
    for event, data in zip(events, frames, strict=True):
        tokens += event.tokens
        steps.append(Write(data, tokens))
    steps = _broken(steps, frames, fault)
    return _split(steps, fault.split_bytes) if fault.split_bytes else steps


def _broken(steps: list[StreamStep], frames: list[bytes], fault: StreamFault) -> list[StreamStep]:
    """Return the writes with the break put in and an end."""
    if fault.break_ in {Break.NONE, Break.ERROR_EVENT, Break.FAILED_EVENT}:
        return [*steps, End("done")]
    left = _cut_at(frames, fault)
    before: list[StreamStep] = []
    after: list[StreamStep] = []
    for step in steps:
        assert isinstance(step, Write)
        head, tail = step.data[:left], step.data[left:]
        left -= len(head)
        before += [Write(head, step.tokens)] if head else []
        after += [Write(tail, step.tokens)] if tail else []
    match fault.break_:
        case Break.IDLE:
            return [*before, Wait(fault.idle_s), *after, End("done")]
        case Break.COMMENTS:
            return [*before, Wait(fault.idle_s, fault.comment_every_s), *after, End("done")]
    return [*before, End(_ENDINGS.get(fault.break_, "done"))]
