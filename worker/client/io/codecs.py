"""
Compression by file name: `.gz`, `.zst`, or none; bytes in, bytes out, no files.

Both formats are sequences of independent parts (gzip members, zstd frames), and that is how a file is continued: a new
part is appended.  The `Decoder` therefore knows where the current part begins, so that a part that a kill has torn can
be removed and written again.  The `Encoder` can flush, so that everything written can be read back from a torn part.

Memory is bounded in both directions: a decoder returns pieces of at most `MAX_PIECE_BYTES`, also for a few
hostile bytes that expand to gigabytes.

Source: RFC 1952 section 2.2 (members), RFC 8878 section 3 (frames, skippable frames, blocks of at most 128 KiB).
"""

import zlib
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import zstandard

from worker.client.errors import DamagedStreamError

MAX_PIECE_BYTES = 32 * 1024 * 1024
"""Largest piece that a decoder returns."""
_ZSTD_SLICE_BYTES = 1024
"""Compressed bytes given to zstd at once; it has no limit of output, but one block of at least 4 bytes makes at most
128 KiB, so that this slice makes at most 32 MiB (RFC 8878 section 3.1.1.2)."""
_GZIP_WBITS = 31
"""zlib's code for a gzip header and the largest window."""
_GZIP_LEVEL = 6
_ZSTD_LEVEL = 3
"""The tools' own defaults: answers arrive more slowly than either compresses."""


class Codec(StrEnum):
    """How the bytes of a file are compressed."""

    PLAIN = "plain"
    GZIP = "gzip"
    ZSTD = "zstd"


def codec_of(path: str) -> Codec:
    """Return the codec that a file name's ending asks for; `-` and everything else is plain."""
    lowered = path.lower()
    if lowered.endswith(".gz"):
        return Codec.GZIP
    return Codec.ZSTD if lowered.endswith(".zst") else Codec.PLAIN


class Decoder:
    """
    Decompresses the bytes of a file, part by part.

    Args:
        codec: `PLAIN` passes everything through and has no parts.
        max_piece_bytes: Largest piece of a gzip stream; zstd's blocks bound the others.
    """

    def __init__(self, codec: Codec, *, max_piece_bytes: int = MAX_PIECE_BYTES) -> None:
        self._codec = codec
        self._max_piece_bytes = max_piece_bytes
        self._part: Any = None
        self._fed = 0
        self.part_start = 0
        """Offset of the part that is not complete; the end of the input when all are."""

    @property
    def is_torn(self) -> bool:
        """Whether the input so far ends inside a part."""
        return self._part is not None

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """
        Yield the decompressed bytes of a chunk in pieces that are not empty; exhaust it before the next call.

        Raises:
            DamagedStreamError: The bytes are not gzip or zstd data; permanent.
        """
        step = _ZSTD_SLICE_BYTES if self._codec is Codec.ZSTD else len(chunk)
        for start in range(0, len(chunk), max(1, step)):
            yield from self._feed(chunk[start : start + step])

    def _feed(self, data: bytes) -> Iterator[bytes]:
        if self._codec is Codec.PLAIN:
            self._fed += len(data)
            yield data
            return
        while data:
            if self._part is None:
                if self._codec is Codec.GZIP and not (data := self._skip_padding(data)):
                    return
                self._part = self._new_part()
            part = self._part
            try:
                yield from filter(None, self._pieces(data))
            except (zlib.error, zstandard.ZstdError) as error:
                raise DamagedStreamError(self.part_start, str(error)) from None
            rest: bytes = part.unused_data if part.eof else b""
            self._fed += len(data) - len(rest)
            if part.eof:
                self._part = None
                self.part_start = self._fed
            data = rest

    def _new_part(self) -> Any:
        if self._codec is Codec.GZIP:
            return zlib.decompressobj(_GZIP_WBITS)
        return zstandard.ZstdDecompressor().decompressobj()

    def _skip_padding(self, data: bytes) -> bytes:
        """Drop zero bytes between and after members, as gzip does (tapes and block devices pad with them)."""
        rest = data.lstrip(b"\0")
        self._fed += len(data) - len(rest)
        self.part_start = self._fed
        return rest

    def _pieces(self, data: bytes) -> Iterator[bytes]:
        part = self._part
        if self._codec is Codec.ZSTD:
            yield part.decompress(data)
            return
        while True:
            piece = part.decompress(data, self._max_piece_bytes)
            yield piece
            data = part.unconsumed_tail
            if part.eof or (not data and len(piece) < self._max_piece_bytes):
                return


class Encoder:
    """
    Compresses pieces as one part, which can be read up to the last complete piece even when it is torn.

    Args:
        codec: `PLAIN` passes everything through.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._part: Any = None

    def encode(self, data: bytes) -> bytes:
        """Return the bytes from which everything given so far can be decompressed, together with those before."""
        if self._codec is Codec.PLAIN:
            return data
        if self._codec is Codec.GZIP:
            if self._part is None:
                self._part = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP_WBITS)
            return bytes(self._part.compress(data) + self._part.flush(zlib.Z_SYNC_FLUSH))
        if self._part is None:
            self._part = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compressobj()
        return bytes(self._part.compress(data) + self._part.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))

    def end(self) -> bytes:
        """Return the end of the part, nothing when there is none; the next piece begins a new one."""
        part, self._part = self._part, None
        return b"" if part is None else bytes(part.flush())
