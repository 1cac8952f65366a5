"""
The ids of lines that have an answer: a set that takes four bytes a line.

Numbers run through a file, so a hash can stand in an array at the place of its number.  What does not fit there (a
second hash for a number, because the input was edited between two runs; a number far beyond the others) goes into a
plain set.
"""

import re
from array import array

_LINE_ID = re.compile(r"(?:batch_req_)?line-([1-9][0-9]{0,17})-([0-9a-f]{8})")
_MAX_GAP = 1_048_576
"""A number further beyond the end of the array than this does not stretch it: 4 MiB.  Answers come out of order by at
most the number of unanswered lines, which is far smaller."""


class AnsweredLines:
    """Grows only; an id is `line-<number>-<hash>`, with or without `batch_req_` before it."""

    def __init__(self) -> None:
        self._hashes = array("I")
        """At number - 1 the hash, 0 for none."""
        self._others: set[tuple[int, int]] = set()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, line_id: object) -> bool:
        key = _key(line_id) if isinstance(line_id, str) else None
        return key is not None and self._has(*key)

    def add(self, line_id: str) -> bool:
        """Add an id and return whether it is one; adding it again changes nothing."""
        key = _key(line_id)
        if key is None:
            return False
        number, digest = key
        if self._has(number, digest):
            return True
        self._count += 1
        missing = number - len(self._hashes)
        if missing > _MAX_GAP or digest == 0 or (missing <= 0 and self._hashes[number - 1]):
            self._others.add(key)
            return True
        if missing > 0:
            self._hashes.frombytes(bytes(self._hashes.itemsize * missing))
        self._hashes[number - 1] = digest
        return True

    def _has(self, number: int, digest: int) -> bool:
        if digest and number <= len(self._hashes) and self._hashes[number - 1] == digest:
            return True
        return (number, digest) in self._others


def line_number(line_id: str) -> int | None:
    """Return the number in a line id, `None` for what is none."""
    key = _key(line_id)
    return None if key is None else key[0]


def _key(line_id: str) -> tuple[int, int] | None:
    match = _LINE_ID.fullmatch(line_id)
    return None if match is None else (int(match[1]), int(match[2], 16))
