"""
Reading input lines and writing answer lines: plain, `.gz`, `.zst`, or `-` for standard input and output.

Everything here blocks and belongs on a `BlockingThread`.  Both directions use constant memory: pieces of a quarter of a
megabyte, lines of at most `MAX_LINE_BYTES`.  A write passes its bytes to the operating system before it returns, so
that SIGKILL leaves at most a torn last line; `resume` repairs that.  Compressed output is flushed with every write for
the same reason: it is a few percent larger than in one piece.
"""

import os
import select
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from worker.client.errors import DamagedStreamError, InputError, OutputError, describe_os_error
from worker.client.io.codecs import Codec, Decoder, Encoder, codec_of
from worker.client.io.lines import MAX_LINE_BYTES, RawLine
from worker.client.io.splitter import LineSplitter
from worker.errors import did_you_mean_file

STANDARD = "-"
"""Standard input or output."""
CHUNK_BYTES = 256 * 1024
"""Bytes of one read: 4 to 16 pipe buffers, some hundred lines."""

_FOREIGN = (
    (b"\x1f\x8b", "is gzip-compressed; let its name end in .gz"),
    (b"\x28\xb5\x2f\xfd", "is zstd-compressed; let its name end in .zst"),
    (b"\xff\xfe", "is UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16; save it as UTF-8"),
)
"""First bytes of files that are not JSON lines, so that there is one error for the file and not one for each line."""


class ByteReader:
    """
    The decompressed bytes of a file descriptor.

    Args:
        name: For messages.
        descriptor: Open for reading; closed by `close` when owned.
        codec: How the bytes are compressed.
        owned: `False` for standard input.
    """

    def __init__(self, name: str, descriptor: int, codec: Codec, *, owned: bool = True) -> None:
        self.name = name
        self._descriptor = descriptor
        self._codec = codec
        self._is_owned = owned
        self._decoder = Decoder(codec)
        status = os.fstat(descriptor)
        self.is_ended = False
        self.bytes_read = 0
        """Before decompression; safe to read from any thread."""
        self.bytes_total = status.st_size if stat.S_ISREG(status.st_mode) else None
        """Size of the file; `None` for a pipe."""

    def read(self) -> Iterator[bytes]:
        """
        Yield the pieces of the next chunk, which may be none; blocks for one chunk.

        Raises:
            InputError: The rest cannot be read, after the pieces before the fault; permanent.
        """
        try:
            chunk = os.read(self._descriptor, CHUNK_BYTES)
            if not self.bytes_read:
                self._refuse_foreign(chunk)
            self.bytes_read += len(chunk)
            yield from self._decoder.feed(chunk)
        except OSError as error:
            raise InputError(f"{self.name}: {describe_os_error(error)}") from None
        except DamagedStreamError as error:
            raise InputError(f"{self.name}: {error}") from None
        self.is_ended = not chunk
        if self.is_ended and self._decoder.is_torn:
            raise InputError(f"{self.name}: ends in the middle; it is not complete")

    def _refuse_foreign(self, head: bytes) -> None:
        if self._codec is not Codec.PLAIN:
            return
        for magic, complaint in _FOREIGN:
            if head.startswith(magic):
                raise InputError(f"{self.name}: {complaint}")

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._is_owned:
            self._is_owned = False
            os.close(self._descriptor)


class LineReader:
    """
    A `ports.LineSource` over bytes.

    Args:
        source: Where the bytes come from; closed by `close`.
        limit_bytes: Longest line that is read.
    """

    def __init__(self, source: ByteReader, *, limit_bytes: int = MAX_LINE_BYTES) -> None:
        self._source = source
        self._splitter = LineSplitter(limit_bytes)
        self._failure: InputError | None = None
        self.lines_read = 0

    @property
    def name(self) -> str:
        """Of the file, for messages."""
        return self._source.name

    @property
    def bytes_read(self) -> int:
        """See `ports.LineSource.bytes_read`."""
        return self._source.bytes_read

    @property
    def bytes_total(self) -> int | None:
        """See `ports.LineSource.bytes_total`."""
        return self._source.bytes_total

    def read_lines(self) -> Sequence[RawLine]:
        """Return the next lines; see `ports.LineSource.read_lines`."""
        while not self._source.is_ended and self._failure is None:
            lines = self._read_chunk()
            if lines:
                self.lines_read += len(lines)
                return lines
        if self._failure is not None:
            raise self._failure
        return []

    def _read_chunk(self) -> list[RawLine]:
        """Return the lines of one chunk; a failure is raised after them."""
        lines: list[RawLine] = []
        try:
            for piece in self._source.read():
                lines += self._splitter.feed(piece)
            if self._source.is_ended:
                lines += self._splitter.finish()
        except InputError as error:
            self._failure = error
        return lines

    def close(self) -> None:
        """Close the file; idempotent."""
        self._source.close()


class LineWriter:
    """
    A `ports.LineSink` over a file descriptor, which it appends to.

    Args:
        name: For messages.
        descriptor: Open for writing at its end; closed by `close` when owned.
        codec: How the bytes are compressed; what is written becomes one part of its own.
        owned: `False` for standard output.
    """

    def __init__(self, name: str, descriptor: int, codec: Codec, *, owned: bool = True) -> None:
        self._name = name
        self._descriptor = descriptor
        self._is_owned = owned
        self._encoder = Encoder(codec)
        self._is_broken = False

    @property
    def descriptor(self) -> int:
        """The open file descriptor."""
        return self._descriptor

    def write(self, data: bytes) -> None:
        """Append whole lines; see `ports.LineSink.write`."""
        if self._is_broken:
            raise OutputError(f"{self._name}: an earlier write failed")
        if data:
            self._write(self._encoder.encode(data))

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                try:
                    rest = rest[os.write(self._descriptor, rest) :]
                except BlockingIOError:  # a pipe or terminal that another process has made non-blocking
                    select.select([], [self._descriptor], [])
        except OSError as error:
            self._is_broken = True
            raise OutputError(f"{self._name}: {describe_os_error(error)}") from None

    def close(self) -> None:
        """
        End the compressed part and close the file; idempotent.

        Raises:
            OutputError: The last bytes could not be written; everything before is complete.
        """
        try:
            end = self._encoder.end()
            if end and not self._is_broken:
                self._write(end)
        finally:
            if self._is_owned:
                self._is_owned = False
                os.close(self._descriptor)


def open_bytes(path: str) -> ByteReader:
    """
    Open an input.

    Args:
        path: A file, a named pipe, or `-` for standard input; its suffix selects the compression.

    Raises:
        InputError: Missing, a directory, or not permitted; permanent.
    """
    if path == STANDARD:
        return ByteReader("standard input", sys.stdin.fileno(), Codec.PLAIN, owned=False)
    descriptor = _open(path, os.O_RDONLY, lambda text: InputError(f"{path}: {text}"))
    return ByteReader(path, descriptor, codec_of(path))


def open_input(path: str, *, limit_bytes: int = MAX_LINE_BYTES) -> LineReader:
    """
    Open input lines; see `open_bytes`.

    Args:
        path: As there.
        limit_bytes: Longest line that is read, in bytes.

    Raises:
        InputError: As there.
    """
    return LineReader(open_bytes(path), limit_bytes=limit_bytes)


def open_output(path: str) -> LineWriter:
    """
    Open answer lines for appending; a missing file is created.

    Use `resume.resume_output` for a file that may already hold answers: this function does not read it.

    Args:
        path: A file, a named pipe or a device, or `-` for standard output; its suffix selects the compression.

    Raises:
        OutputError: A directory, below a missing one, or not permitted; permanent.
    """
    if path == STANDARD:
        sys.stdout.flush()
        return LineWriter("standard output", sys.stdout.fileno(), Codec.PLAIN, owned=False)
    descriptor = _open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, lambda text: OutputError(f"{path}: {text}"))
    return LineWriter(path, descriptor, codec_of(path))


def check_creatable(path: str) -> None:
    """
    Look whether a missing output could be made, without making it.

    Raises:
        OutputError: Below a missing directory, or not permitted; permanent.
    """
    folder = Path(path).parent
    if not folder.is_dir():
        raise OutputError(f"{path}: its directory does not exist")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{path}: may not be made (permission denied)")


def _open(path: str, flags: int, failure: Callable[[str], InputError | OutputError]) -> int:
    try:
        descriptor = os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o666)
    except FileNotFoundError as error:
        is_new = flags & os.O_CREAT
        what = "its directory does not exist" if is_new else describe_os_error(error) + did_you_mean_file(path)
        raise failure(what) from None
    except OSError as error:
        raise failure(describe_os_error(error)) from None
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):  # a directory opens for reading and fails only at the read
        os.close(descriptor)
        raise failure("is a directory")
    return descriptor
