"""
Continue a stopped run: find the lines that have answers, and repair the output so that it can be appended to.

The output is its own journal: each of its lines names the input line by number and hash, so that an input line that was
edited since is noticed.  A killed run leaves at most one torn line, and in a compressed file a part without its
end.  `resume_output` removes the torn line (or completes it when only its newline is missing) and rewrites the readable
bytes of a torn part into a new file, which replaces the old one only when it is complete.  `resume_output` refuses and
does not touch a file that holds anything but answers: it may be other data.
"""

import os
import shutil
import stat
import sys
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from worker.client.errors import DamagedStreamError, OutputError, describe_os_error
from worker.client.io.codecs import Codec, Decoder, Encoder, codec_of
from worker.client.io.files import CHUNK_BYTES, STANDARD, LineWriter, open_output
from worker.client.io.lines import parse_line_id
from worker.client.io.splitter import LineSplitter

if sys.platform != "win32":
    import fcntl

RECOVERING_SUFFIX = ".recovering"
"""Suffix of the file that a torn compressed output is rewritten into; an old one is overwritten."""
_HEADS = (b'{"id":"line-', b'{"id":"batch_req_line-')
"""The first bytes of a line that `outputs` writes."""
_MAX_GAP = 1_048_576
"""A number further beyond the end of the array of `AnsweredLines` does not extend it: 4 MiB.  Answers come out of order
by at most the number of unanswered lines, which is far smaller."""


class _Id(msgspec.Struct):
    id: str


_decode_id = msgspec.json.Decoder(_Id).decode


class AnsweredLines:
    """
    The ids of lines that have an answer: a set that only grows and takes four bytes a line.

    The numbers of lines run through a file, so a hash can stand in an array at the place of its number.  Other ids go
    into a plain set: a second hash for a number, because the input was edited between two runs, and a number far beyond
    the others.
    """

    def __init__(self) -> None:
        self._hashes = array("I")
        """At number - 1 the hash, 0 for none."""
        self._others: set[tuple[int, int]] = set()
        self._other_numbers: set[int] = set()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, line_id: object) -> bool:
        key = parse_line_id(line_id) if isinstance(line_id, str) else None
        return key is not None and self._has(*key)

    def has_other(self, line_id: str) -> bool:
        """Whether another line of this number has an answer, and this one has none."""
        key = parse_line_id(line_id)
        if key is None or self._has(*key):
            return False
        number = key[0]
        return (number <= len(self._hashes) and self._hashes[number - 1] != 0) or number in self._other_numbers

    def add(self, line_id: str) -> bool:
        """Add an id and return whether the text is one; adding it again changes nothing."""
        key = parse_line_id(line_id)
        if key is None:
            return False
        number, digest = key
        if self._has(number, digest):
            return True
        self._count += 1
        missing = number - len(self._hashes)
        if missing > _MAX_GAP or digest == 0 or (missing <= 0 and self._hashes[number - 1]):
            self._others.add(key)
            self._other_numbers.add(number)
            return True
        if missing > 0:
            self._hashes.frombytes(bytes(self._hashes.itemsize * missing))
        self._hashes[number - 1] = digest
        return True

    def _has(self, number: int, digest: int) -> bool:
        if digest and number <= len(self._hashes) and self._hashes[number - 1] == digest:
            return True
        return (number, digest) in self._others


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """An output file that may be appended to."""

    writer: LineWriter
    """Holds a lock on the file until it is closed."""
    answered: AnsweredLines
    """Ids of the lines that have an answer."""
    dropped_bytes: int = 0
    """Length of the torn line that was removed; 0 for none."""


@dataclass(slots=True)
class _Scan:
    answered: AnsweredLines
    size: int
    """Bytes of the file."""
    part_start: int
    """Where the torn part begins."""
    is_torn: bool
    """The last compressed part has no end."""
    tail_bytes: int
    """Bytes, decompressed, behind the last newline."""
    is_tail_whole: bool
    """These bytes are a complete answer without its newline."""


def answered_id(line: bytes) -> str | None:
    """Return the id of the line that an output line answers, in either shape; `None` when it is no output line."""
    try:
        return _decode_id(line).id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def resume_output(path: str) -> Resumed:
    """
    Open the output, repair a torn end, and find the lines that have answers.

    Blocks while it reads the whole file, about as fast as it can be decompressed.

    Args:
        path: `-`, pipes and devices are only written to, not read; a missing file is created.

    Raises:
        OutputError: Cannot be opened, is being written by another process, is damaged, or holds lines that are no
            answers; permanent, and the file is as it was.
    """
    writer = open_output(path)
    try:
        if path == STANDARD or not stat.S_ISREG(os.fstat(writer.descriptor).st_mode):
            return Resumed(writer=writer, answered=AnsweredLines())
        _lock(path, writer)
        scan = _scan(path)
        if scan.is_torn:
            _rewrite(Path(path).resolve(), scan)
            writer.close()
            writer = open_output(path)
            _lock(path, writer)
        elif scan.is_tail_whole:
            writer.write(b"\n")
        elif scan.tail_bytes:
            os.ftruncate(writer.descriptor, scan.size - scan.tail_bytes)
        dropped = 0 if scan.is_tail_whole else scan.tail_bytes
        return Resumed(writer=writer, answered=scan.answered, dropped_bytes=dropped)
    except OSError as error:
        writer.close()
        raise OutputError(f"{path}: {describe_os_error(error)}") from None
    except BaseException:
        writer.close()
        raise


def output_lines(path: str) -> Iterator[tuple[str, bytes]]:
    """
    Yield id and bytes, without the newline, of each line of an output that `resume_output` has read; blocks.

    Raises:
        OutputError: It cannot be read.
    """
    decoder, splitter = Decoder(codec_of(path)), LineSplitter()
    try:
        with Path(path).open("rb") as file:
            for chunk in _chunks(file):
                for piece in decoder.feed(chunk):
                    for line in splitter.feed(piece):
                        line_id = answered_id(line.data)
                        assert line_id is not None  # `resume_output` has read it
                        yield line_id, line.data
    except (OSError, DamagedStreamError) as error:
        raise OutputError(f"{path}: {error}") from None


def number_of(line_id: str) -> int:
    """Return the number of the line that an id of `output_lines` names."""
    key = parse_line_id(line_id)
    assert key is not None  # `resume_output` has read it
    return key[0]


def drop_answers(path: str, is_dropped: Callable[[str, bytes], bool]) -> int:
    """
    Take answers out of an output; return how many; blocks.

    The file is replaced when the new one is complete: a kill on the way leaves it as it was.

    Args:
        path: An output that no process is writing.
        is_dropped: Whether an answer goes, by the id of its line and its bytes.

    Raises:
        OutputError: It cannot be read or replaced; it is as it was.
    """
    resumed = resume_output(path)
    target = Path(path).resolve()
    temporary = target.with_name(f"{target.name}{RECOVERING_SUFFIX}")
    codec, dropped = codec_of(path), 0
    encoder = Encoder(codec)
    try:
        with temporary.open("wb") as file:
            kept: list[bytes] = []
            size = 0
            for line_id, line in output_lines(path):
                if is_dropped(line_id, line):
                    dropped += 1
                    continue
                kept.append(line + b"\n")
                size += len(line)
                if size >= CHUNK_BYTES:
                    file.write(encoder.encode(b"".join(kept)))
                    kept.clear()
                    size = 0
            if kept:
                file.write(encoder.encode(b"".join(kept)))
            file.write(encoder.end())
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(path, temporary)
        temporary.replace(target)
    except OSError as error:
        raise OutputError(f"{path}: {describe_os_error(error)}") from None
    finally:
        resumed.writer.close()
        temporary.unlink(missing_ok=True)
    return dropped


def refuse_same_file(input_path: str, output_path: str) -> None:
    """
    Refuse an output that is the input.

    Raises:
        OutputError: It is; permanent.
    """
    output = Path(output_path)
    if STANDARD not in (input_path, output_path) and output.is_file() and output.samefile(input_path):
        raise OutputError(f"{output_path}: is the input")


def _lock(path: str, writer: LineWriter) -> None:
    """Lock the file for this process; two runs into one file would answer every line twice."""
    if sys.platform != "win32":
        try:
            fcntl.flock(writer.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{path}: is being written by another run") from None


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _scan(path: str) -> _Scan:
    codec = codec_of(path)
    decoder, splitter, answered = Decoder(codec), LineSplitter(), AnsweredLines()
    size = 0
    with Path(path).open("rb") as file:
        for chunk in _chunks(file):
            size += len(chunk)
            try:
                for piece in decoder.feed(chunk):
                    for line in splitter.feed(piece):
                        _note(path, answered, line.data, line.number)
            except DamagedStreamError as error:
                raise OutputError(f"{path}: {error}; move it away to begin anew") from None
    tail = splitter.rest()
    line_id = answered_id(tail) if tail else None
    is_whole = line_id is not None and answered.add(line_id)
    may_be_cut = codec is Codec.PLAIN or decoder.is_torn
    if splitter.pending_bytes and not is_whole and not (may_be_cut and _is_torn_answer(tail)):
        raise OutputError(f"{path}: its last line is not an answer of a run; choose another output")
    return _Scan(
        answered=answered,
        size=size,
        part_start=decoder.part_start,
        is_torn=decoder.is_torn,
        tail_bytes=splitter.pending_bytes,
        is_tail_whole=is_whole,
    )


def _note(path: str, answered: AnsweredLines, line: bytes, number: int) -> None:
    line_id = answered_id(line)
    if line_id is None or not answered.add(line_id):
        raise OutputError(f"{path}: line {number} is not an answer of a run; choose another output")


def _is_torn_answer(tail: bytes) -> bool:
    """Whether these bytes may be the start of an answer; other bytes must not be removed."""
    return any(tail.startswith(head) or head.startswith(tail) for head in _HEADS) and bool(tail)


def _rewrite(path: Path, scan: _Scan) -> None:
    """Replace the torn file by one whose last part ends behind the last complete line."""
    codec = codec_of(path.name)
    decoder, encoder = Decoder(codec), Encoder(codec)
    temporary = path.with_name(path.name + RECOVERING_SUFFIX)
    with path.open("rb") as torn, temporary.open("wb") as whole:
        left = scan.part_start
        while left and (chunk := torn.read(min(CHUNK_BYTES, left))):
            whole.write(chunk)
            left -= len(chunk)
        lines, held = bytearray(), bytearray()
        for chunk in _chunks(torn):
            for piece in decoder.feed(chunk):
                end = piece.rfind(b"\n") + 1
                if end:
                    lines += held
                    held.clear()
                lines += piece[:end]
                held += piece[end:]
                if len(lines) >= CHUNK_BYTES:
                    whole.write(encoder.encode(bytes(lines)))
                    lines.clear()
        if scan.is_tail_whole:
            lines += held + b"\n"
        if lines:
            whole.write(encoder.encode(bytes(lines)))
        whole.write(encoder.end())
        whole.flush()
        os.fsync(whole.fileno())
    shutil.copymode(path, temporary)
    temporary.replace(path)
