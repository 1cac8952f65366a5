"""
One body from a stream: what the accumulators of all APIs have in common.

An accumulator takes the events of one stream and assembles the one JSON body that the server would have sent without
`stream: true`.  It is pure; `reading` owns the socket and the timers and learns from the returned `Progress` when to
note the first token and when to restart the idle timer::

    accumulator, parser = accumulator_for(endpoint), SSEParser()
    async for chunk in response:
        for event in parser.feed(chunk):
            progress = accumulator.feed(event)
    body = accumulator.result() if accumulator.is_complete() else accumulator.partial()

The assembled body equals the whole one: they are the same JSON value once nulls and empty lists are dropped, and `id`,
`created` and the like set aside.  Byte equality cannot be had: servers write nulls in one form that they leave out in
the other.  The rules are in `merge` (a message from its deltas), `choices` (chat completions and completions) and
`responses`.

An error event is remembered, never raised: servers go on afterwards (SGLang even ends with `[DONE]`), and the caller
wants what came with it.  What is raised is only what no rule can make sense of: an event that is not JSON or not of the
protocol's shape.
"""

import json
import re
from abc import ABC, abstractmethod
from typing import Any, Final, NoReturn

import msgspec

from worker.backends.streams.merge import ShapeError
from worker.backends.streams.sse import Event
from worker.errors import BackendError
from worker.policy.model import Fault
from worker.wire.body import count_values

DATA: Final = 1
CONTENT: Final = 2
ERROR: Final = 4
"""Bits of a `Progress`."""

_DETAIL_BYTES = 2048  # as much of a strange event as an error envelope may carry
_HEARTBEATS = frozenset({"keepalive", "ping"})
_MAX_DEPTH = 100  # of nesting; house decision, far below where the encoder would give up (about 1,000)
_FEW_BRACKETS = 100
SMALL_BYTES = 64 * 1024
"""An event up to this is decoded without looking at what it holds."""
_MAX_VALUES = 200_000
"""Of one event, decoded in some 20 ms and 20 MB.  Streams come in small events; whole answers and the log probabilities
of long prompts are far below."""
_COUNTED_BYTES = 4 * 1024 * 1024
"""Of a longer event the commas inside its texts are counted as well: telling them apart would take too long."""
_HALF = re.compile("[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]")
"""A half of a surrogate pair without the other one; replacing them one by one in a decoder takes four times as long."""
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"')

_decode = msgspec.json.Decoder().decode


class MalformedEventError(BackendError):
    """
    An event is not JSON, or not of the shape its API promises; the stream is broken, another attempt may work.

    Attributes:
        data: The event's data, at most 2 KiB of it.
    """

    def __init__(self, reason: str, data: bytes) -> None:
        self.data = data[:_DETAIL_BYTES]
        super().__init__(Fault.STREAM_BROKEN, f"{reason}: {self.data[:200].decode('utf-8', 'replace')}")


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """What one event brought."""

    data: bool = False
    """Something of the protocol came: restart the idle timer.  Heartbeats (empty events, `keepalive`) are not that."""
    content: bool = False
    """Generated text came: content, reasoning, refusal, or a part of a tool call.  The first of these is the TTFT."""
    error: bool = False
    """An error event came; see `Accumulator.error`."""


_PROGRESS = [
    Progress(data=bool(bits & DATA), content=bool(bits & CONTENT), error=bool(bits & ERROR)) for bits in range(8)
]


class Accumulator(ABC):
    """
    One stream's accumulator; single use: another attempt takes a new one, so that nothing of a broken one can leak.

    Attributes:
        error: JSON of the first error event as it came, for `response.failed` the response's `error` in the usual
            envelope; once it is set, the stream has failed, whatever follows.
        done: `[DONE]` was seen.
        content_events: Events with generated text so far; servers send about one a token.
        is_reopened: Text came behind a finish reason.  The server's finish reasons prove nothing then: such an answer
            is whole when the stream has ended as well, by `[DONE]` or by the end of the response.
    """

    def __init__(self) -> None:
        self.error: bytes | None = None
        self.done = False
        self.content_events = 0
        self.is_reopened = False
        self._needs_repair = False

    def feed(self, event: Event) -> Progress:
        """
        Merge one event.

        Raises:
            MalformedEventError: Not JSON, or not a chunk of this API; the stream is broken.  What came before stays.
        """
        return _PROGRESS[self._feed(event)]

    def feed_repeated(self, data: bytes) -> bool:  # noqa: ARG002 - where nothing is known of repetitions
        """
        Merge bytes of the stream that are whole events which differ from the last one in their text alone.

        The same as parsing and feeding them, and quicker.  Returns whether they were such events; if not, nothing has
        changed.
        """
        return False

    @property
    def is_over(self) -> bool:
        """Whether the protocol promises nothing more: an error or `[DONE]` came, or the API's last event."""
        return self.error is not None or self.done

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
        """Whether all that was generated is in `generated_text`, so that another attempt can continue from it."""
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
        if not data or data == b"null":  # llama.cpp begins some streams with a null
            return 0
        if data == b"[DONE]":
            self.done = True
            return DATA
        try:
            chunk, has_halves = _decode_event(data)
        except ValueError as error:
            return self._undecodable(event, str(error))
        if _is_error(chunk) or event.name == "error":
            return self._fail(event.data)
        self._needs_repair |= has_halves
        return self._count(chunk, event)

    def _undecodable(self, event: Event, reason: str) -> int:
        if event.name == "error":
            return self._fail(event.data)
        if event.is_terminated:
            raise MalformedEventError(reason, event.data)
        return 0  # the stream ended inside the event

    def _count(self, chunk: dict[str, Any], event: Event) -> int:
        if "choices" not in chunk and kind_of(chunk, event) in _HEARTBEATS:
            return 0
        try:
            bits = self._merge(chunk, event)
        except ShapeError as error:
            raise MalformedEventError(str(error), event.data) from None
        if bits & CONTENT:
            self.content_events += 1
        return bits

    def _fail(self, data: bytes) -> int:
        if self.error is None:
            self.error = data
        return DATA | ERROR

    def _clean(self, value: Any) -> Any:
        return _repair_surrogates(value) if self._needs_repair else value

    def _encoded(self, body: dict[str, Any]) -> bytes:
        if not self.is_complete():
            raise RuntimeError("the stream is not complete: it has a partial, no result")
        return msgspec.json.encode(self._clean(body))


def kind_of(chunk: dict[str, Any], event: Event) -> str:
    """Return the `type` an event gives itself, or else the name it was sent under."""
    kind = chunk.get("type")
    return kind if isinstance(kind, str) else event.name


def _decode_event(data: bytes) -> tuple[dict[str, Any], bool]:
    """
    Return an event's object, and whether it holds halves of surrogate pairs.

    Servers that count UTF-16 units may cut an emoji into two chunks, each with one escaped half of the pair: legal JSON
    that only the standard library reads.  The halves meet again when the strings are joined, see `_repair_surrogates`.
    A list of one object is that object (Gemini's compatibility layer).

    Raises:
        ValueError: Not JSON, not an object, nested more than 100 deep, or with too many values.
    """
    if len(data) > SMALL_BYTES and _holds_more_than(data, _MAX_VALUES):
        raise ValueError("an event holds too many values")
    has_halves = False
    try:
        chunk = _decode(data)
    except RecursionError:
        raise ValueError("an event is nested too deeply") from None
    except (msgspec.MsgspecError, UnicodeDecodeError):
        if b"\\ud" not in data.lower():
            raise ValueError("an event is not JSON") from None
        chunk = _decode_halves(data)
        has_halves = True
    if isinstance(chunk, list) and len(chunk) == 1:
        chunk = chunk[0]
    if not isinstance(chunk, dict):
        raise ValueError("an event is not a JSON object")  # noqa: TRY004 - the event's value is wrong, not ours
    if data.count(b"{") + data.count(b"[") > _FEW_BRACKETS and _is_deeper_than(chunk, _MAX_DEPTH):
        raise ValueError("an event is nested too deeply")
    return chunk, has_halves


def _is_error(chunk: dict[str, Any]) -> bool:
    """
    Whether a decoded event reports a failure.

    Source: `{"error": {...}}` of vLLM, SGLang, LiteLLM, TGI and OpenRouter (there, beside `choices`); the flat one with
    `"object": "error"` of older vLLM and SGLang (https://github.com/block/goose/pull/8031); the flat one with
    `"type": "error"` of https://platform.openai.com/docs/api-reference/responses-streaming/error.
    """
    return bool(chunk.get("error")) or chunk.get("object") == "error" or chunk.get("type") == "error"


def _repair_surrogates(value: Any) -> Any:
    """Return the value with the halves of surrogate pairs joined in every string, and replaced where one is missing."""
    if isinstance(value, str):
        return _HALF.sub("\ufffd", value).encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    if isinstance(value, dict):
        return {_repair_surrogates(key): _repair_surrogates(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_repair_surrogates(item) for item in value]
    return value


def has_counts(usage: dict[str, Any]) -> bool:
    """
    Whether a `usage` object counts anything: no request has zero tokens.

    Source: Ollama's completions put zeros into every chunk and the real counts into the last
    (https://github.com/ollama/ollama/blob/main/middleware/openai.go).
    """
    return any(type(count) is int and count > 0 for count in usage.values())


def _decode_halves(data: bytes) -> Any:
    try:
        return json.loads(data.decode(), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("an event is nested too deeply") from None
    except ValueError:
        raise ValueError("an event is not JSON") from None


def _holds_more_than(data: bytes, limit: int) -> bool:
    """Whether JSON holds more values than so many, by its raw bytes."""
    if count_values(data) <= limit:
        return False
    return len(data) > _COUNTED_BYTES or count_values(_STRING.sub(b"", data)) > limit


def _is_deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        containers = [item for item in level if isinstance(item, (dict, list))]
        level = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return False
    return any(isinstance(item, (dict, list)) for item in level)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
