"""
Cuts a stream of bytes into lines; pure, in constant memory for lines of any length.

A line ends at LF, and one CR before it is dropped; nothing else ends a line (U+2028, U+0085, VT and FF do not, although
Python's `splitlines` splits there).  The last line needs no end.  A byte order mark before the first line is dropped.
Blank lines are left out but counted.  Of a line over the limit only number, length and hash are kept.
"""

from hashlib import sha256

from worker.client.io.lines import MAX_LINE_BYTES, RawLine

_BOM = b"\xef\xbb\xbf"


class LineSplitter:
    """
    Takes pieces of any size and returns the lines that they complete.

    Args:
        limit_bytes: Longest line whose bytes are kept.
    """

    def __init__(self, limit_bytes: int = MAX_LINE_BYTES) -> None:
        self._limit = limit_bytes
        self._number = 0
        self._parts: list[bytes] = []
        self._size = 0
        self._hash = sha256()
        self._is_over = False

    @property
    def pending_bytes(self) -> int:
        """Bytes of the line that is not complete."""
        return self._size

    def feed(self, piece: bytes) -> list[RawLine]:
        """Return the lines that a piece completes."""
        first, *others = piece.split(b"\n")
        self._keep(first)
        lines: list[RawLine] = []
        for part in others:
            self._complete(lines)
            self._keep(part)
        return lines

    def finish(self) -> list[RawLine]:
        """Return the last line when it had no end; at most one."""
        lines: list[RawLine] = []
        if self._size:
            self._complete(lines)
        return lines

    def rest(self) -> bytes:
        """Return the bytes of the line that is not complete; empty when it is over the limit."""
        return b"".join(self._parts)

    def _keep(self, part: bytes) -> None:
        if not part:
            return
        self._size += len(part)
        if not self._is_over and self._size > self._limit:
            self._is_over = True
            for kept in self._parts:
                self._hash.update(kept)
            self._parts.clear()
        if self._is_over:
            self._hash.update(part)
        else:
            self._parts.append(part)

    def _complete(self, lines: list[RawLine]) -> None:
        self._number += 1
        if self._is_over:
            # A CR before the LF counts in size and hash here: it cannot be told apart until the next piece.
            lines.append(RawLine(self._number, b"", self._size, self._hash.hexdigest()[:8]))
            self._hash = sha256()
            self._is_over = False
        else:
            data = b"".join(self._parts).removesuffix(b"\r")
            if self._number == 1:
                data = data.removeprefix(_BOM)
            if data and not data.isspace():
                lines.append(RawLine.of(self._number, data))
            self._parts.clear()
        self._size = 0
