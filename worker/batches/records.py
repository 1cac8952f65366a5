"""
The records of an input file: cut out of its bytes, in constant memory for files of any length.

A record is a line that is not blank.  Lines end at LF, and a CR before it is dropped; nothing else ends a line.  A byte
order mark at the start of the file is dropped.  A line over the limit is told by its number, and not kept.
"""

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import NamedTuple

from worker.batches.objects import Objects
from worker.wire.message import MAX_PUBSUB_MESSAGE_BYTES

MAX_RECORD_BYTES = MAX_PUBSUB_MESSAGE_BYTES - 8_192
"""Of one line: it has to fit into a message, with what stands around it."""
_MARK = b"\xef\xbb\xbf"


class Record(NamedTuple):
    """One record."""

    number: int
    """From 1, blank lines not counted."""
    line: int
    """From 1, blank lines counted."""
    end: int
    """Byte of the file after it and its line break."""
    data: bytes | None
    """Without the line break; `None`: it is longer than `MAX_RECORD_BYTES`."""


class RecordCutter:
    """
    Cuts records out of the parts of a file.

    Args:
        offset: Byte of the file at which the first part begins, the beginning of a line.
        record: Records before it.
        line: Lines before it.
        max_bytes: Of one line.
    """

    def __init__(self, *, offset: int = 0, record: int = 0, line: int = 0, max_bytes: int = MAX_RECORD_BYTES) -> None:
        self._end = offset
        self._record = record
        self._line = line
        self._max_bytes = max_bytes
        self._rest = b""
        self._skipped = 0
        """Bytes of the current line that were not kept."""

    def feed(self, part: bytes) -> Iterator[Record]:
        """Yield the records that end in a part of the file."""
        *whole, rest = part.split(b"\n")
        for piece in whole:
            yield from self._line_ended(self._rest + piece if self._rest else piece, 1)
            self._rest = b""
        self._rest += rest
        if self._skipped or len(self._rest) > self._max_bytes + 1:  # a CR may follow
            self._skipped += len(self._rest)
            self._rest = b""

    def finish(self) -> Iterator[Record]:
        """Yield the last record when no line break follows it."""
        if self._rest or self._skipped:
            yield from self._line_ended(self._rest, 0)
            self._rest = b""

    def _line_ended(self, data: bytes, break_bytes: int) -> Iterator[Record]:
        is_first = self._end == 0
        self._end += self._skipped + len(data) + break_bytes
        self._line += 1
        is_long, self._skipped = self._skipped > 0, 0
        if is_first:
            data = data.removeprefix(_MARK)
        data = data.removesuffix(b"\r")
        if not is_long and not data.strip():
            return
        self._record += 1
        is_long = is_long or len(data) > self._max_bytes
        yield Record(self._record, self._line, self._end, None if is_long else data)


async def read_records(
    objects: Objects, key: str, *, offset: int = 0, record: int = 0, line: int = 0
) -> AsyncGenerator[list[Record], None]:
    """
    Yield the records of an object, those of some part of it at a time; no list is empty.

    Args:
        objects: Where it is.
        key: Of the object.
        offset: Where to begin, the beginning of a line.
        record: Records before it.
        line: Lines before it.

    Raises:
        PayloadError: It cannot be read.
    """
    cutter = RecordCutter(offset=offset, record=record, line=line)
    async with aclosing(objects.read(key, start=offset)) as parts:
        async for part in parts:
            if records := list(cutter.feed(part)):
                yield records
    if records := list(cutter.finish()):
        yield records
