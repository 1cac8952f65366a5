"""
Frames of AWS's event streams, cut anywhere, as messages of few kinds; botocore's buffer reads them and checks the sums.

What a frame carries has nothing to do with where the events inside it begin: payloads are parts of one text.  A
response that ends inside a frame looks complete to HTTP, and botocore does not notice it either; so the bytes that came
have to be those of whole frames.

Source: https://smithy.io/2.0/aws/amazon-eventstream.html.
"""

import json
import struct
from collections.abc import Iterator

import msgspec
from botocore.eventstream import EventStreamBuffer, EventStreamMessage, ParserError

from worker.backends.streams.reading import CutStreamError
from worker.errors import BackendError
from worker.policy.model import Fault
from worker.policy.normalise import bounded_bytes

PRELUDE_BYTES = 12
MAX_MESSAGE_BYTES = 2048
"""Of a service's words about an error."""


class Part(msgspec.Struct, frozen=True):
    """A part of the answer."""

    payload: bytes


class ServiceError(msgspec.Struct, frozen=True, kw_only=True):
    """An error in place of the rest of the answer."""

    name: str
    """Of the exception, or the code of an error message."""
    body: bytes
    """`{"ErrorCode": ..., "Message": ...}`, as `policy.normalise` reads it."""


class FrameReader:
    """Reads the frames of one response; single use."""

    def __init__(self) -> None:
        self._buffer = EventStreamBuffer()
        self._fed = 0
        self._framed = 0

    def feed(self, data: bytes) -> Iterator[Part | ServiceError]:
        """
        Yield what the frames hold that are complete by now; must be read to its end, or no more be fed.

        Raises:
            BackendError: A sum is wrong, or a frame makes no sense: `STREAM_BROKEN`; retryable.
        """
        self._buffer.add_data(data)
        self._fed += len(data)
        while True:
            try:
                message = next(self._buffer)
            except StopIteration:
                return
            except (ParserError, KeyError, ValueError, struct.error) as error:
                # KeyError: a type of headers that does not exist; ValueError: no UTF-8; struct: lengths that are wrong
                raise BackendError(Fault.STREAM_BROKEN, f"event stream: {type(error).__name__}: {error}") from error
            self._framed += message.prelude.total_length
            found = _understood(message)
            if found is not None:
                yield found

    def close(self) -> None:
        """
        Take note that the response has ended.

        Raises:
            CutStreamError: Inside a frame; retryable.
        """
        if self._fed != self._framed:
            raise CutStreamError(
                f"the response ended inside a frame, {self._fed - self._framed} bytes behind its start"
            )


def _understood(message: EventStreamMessage) -> Part | ServiceError | None:
    """Return what a message says; `None` for an event of a kind that is not known, as for one without payload."""
    headers = message.headers
    match headers.get(":message-type"):
        case "exception":
            name = str(headers.get(":exception-type") or "UnknownException")
            fields = _fields(message.payload)
            return _error(name, code=fields.get("ErrorCode") or name, words=_words(fields, message.payload))
        case "error":
            name = str(headers.get(":error-code") or "UnknownError")
            return _error(name, code=name, words=str(headers.get(":error-message") or ""))
        case _:
            is_part = headers.get(":event-type", "PayloadPart") == "PayloadPart" and message.payload
            return Part(message.payload) if is_part else None


def _fields(payload: bytes) -> dict[str, object]:
    try:
        document = json.loads(payload)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _words(fields: dict[str, object], payload: bytes) -> str:
    words = fields.get("Message") or fields.get("message")
    return words if isinstance(words, str) else bounded_bytes(payload, MAX_MESSAGE_BYTES)


def _error(name: str, *, code: object, words: str) -> ServiceError:
    return ServiceError(name=name, body=msgspec.json.encode({"ErrorCode": code, "Message": words}))
