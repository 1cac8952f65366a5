"""
What a run needs from its caller: a way to publish, a stream of answers, a source and a sink of lines.

The caller passes the broker as two plain callables, so that a run works with any broker and the tests need none.  Each
docstring is the whole contract.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from worker.client.io.lines import RawLine

AnswerHandler = Callable[[bytes, Mapping[str, str], str], Awaitable[None]]
"""
`await handler(data, attributes, message_id)`: one answer from the response topic.

Returns when the operating system has the line of the answer, or the answer was a duplicate: only then may it be acked.
Raises OutputError when the line could not be written: do not ack; the run is ending.
Cancellation: the line may or may not be written; a redelivery is dropped as a duplicate.
"""


class Publish(Protocol):
    """Publishes one message to the request topic."""

    async def __call__(self, data: bytes, attributes: Mapping[str, str], /) -> str:
        """
        Publish once and return the broker's id of the message; the caller repeats a failed publish.

        Raises:
            PublishRetryableError: Unavailable or timed out; the message may still have been published.
            PublishRefusedError: The topic does not exist or permission is refused; ends the run.
            MessageRejectedError: Too large or invalid for the broker; the line is answered with an error.

        Cancellation: the message may or may not be published.
        """


class Answers(Protocol):
    """Delivers the messages of the response topic."""

    async def __call__(self, handler: AnswerHandler, /) -> None:
        """
        Call the handler for every answer, many at once, until cancelled.

        Delivers each answer at least once, in any order.  To return before the run is over is an error.

        Cancellation: stops the delivery, sends the due acks and returns.
        """


class LineSource(Protocol):
    """A source of input lines; called from one thread at a time, not from the event loop's."""

    @property
    def lines_read(self) -> int:
        """Lines returned so far, without blank ones; safe to read from any thread."""

    @property
    def bytes_read(self) -> int:
        """Bytes of the file read so far, before decompression; safe to read from any thread."""

    @property
    def bytes_total(self) -> int | None:
        """Size of the file in bytes, `None` for a pipe."""

    def read_lines(self) -> Sequence[RawLine]:
        """
        Return the next lines; an empty sequence means the end.

        Blocks until there is a line, and does not wait for more than one.

        Raises:
            InputError: The rest cannot be read; permanent.
        """


class LineSink(Protocol):
    """A sink of answer lines; called from one thread at a time, not from the event loop's."""

    def write(self, data: bytes) -> None:
        """
        Append whole lines, each with its newline, and pass them to the operating system.

        After the return a SIGKILL of the process does not lose them (a power failure may).

        Raises:
            OutputError: Some of the bytes were not written.
        """
