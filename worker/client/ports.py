"""
What this package asks of the outside: a way to publish, a stream of answers, a source and a sink of lines.

The broker is handed in as two plain callables, so that `local`, `submit` and `collect` run against any broker and the
tests against none.  Each docstring is the whole agreement.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from worker.client.io.lines import RawLine

AnswerHandler = Callable[[bytes, Mapping[str, str], str], Awaitable[None]]
"""
`await handler(data, attributes, message_id)`: one answer from the response topic.

Returns once the line of the answer is with the operating system, or the answer was a duplicate: only then may it be
acked.  Raises OutputError when the line could not be written: do not ack, the run is ending anyway.
Cancellation: the line may or may not be written; a redelivery is dropped as a duplicate.
"""


class Publish(Protocol):
    """Puts one message on the request topic."""

    async def __call__(self, data: bytes, attributes: Mapping[str, str], /) -> str:
        """
        Publish once and return the broker's id of the message; the caller owns retries.

        Raises:
            PublishRetryableError: Unavailable or timed out; the message may be there all the same.
            PublishRefusedError: Topic gone or permission refused; ends the run.
            ReplyRejectedError: Too large or invalid for the broker; the line is answered with a 413.

        Cancellation: the message may or may not be published.
        """


class Answers(Protocol):
    """Delivers what arrives on the response topic."""

    async def __call__(self, handler: AnswerHandler, /) -> None:
        """
        Call the handler for every answer, many at once, until cancelled.

        At least once per answer; order does not matter.  Returning early is an error: somebody still waits.

        Cancellation: stops delivering, sends the acks that are due, returns.
        """


class LineSource(Protocol):
    """Where input lines come from; called from one thread at a time, not the event loop's."""

    @property
    def lines_read(self) -> int:
        """Lines given out so far, blank ones left out; safe to read from any thread."""

    @property
    def bytes_read(self) -> int:
        """Bytes taken so far, as they stand in the file; safe to read from any thread."""

    @property
    def bytes_total(self) -> int | None:
        """Size of the file in bytes, `None` when it has none (a pipe)."""

    def read_lines(self) -> Sequence[RawLine]:
        """
        Return the next lines, at least one; nothing means the end.

        Blocks until there is one, and returns what there is rather than waiting for more.

        Raises:
            InputError: Unreadable from here on; permanent.
        """


class LineSink(Protocol):
    """Where answer lines go; called from one thread at a time, not the event loop's."""

    def write(self, data: bytes) -> None:
        """
        Append whole lines, each with its newline, and hand them to the operating system.

        After it returned, ending the process by SIGKILL does not lose them (a power failure may).

        Raises:
            OutputError: Not all of it was written.
        """
