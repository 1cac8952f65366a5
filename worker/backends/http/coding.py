"""
Unpacking of compressed bodies, piece by piece: what a few bytes may become is never in memory at once.

Every request says `Accept-Encoding: identity`; some proxies compress all the same.  gzip and deflate come out in pieces
of at most `PIECE_BYTES`.  zstd has no such limit of its own, so it is given `_ZSTD_SLICE` bytes at a time: one block
takes at least four bytes and makes at most 128 KiB (https://www.rfc-editor.org/rfc/rfc8878#section-3.1.1.2).
"""

import zlib
from collections.abc import Iterator
from typing import Any, Protocol

from worker.errors import BackendError
from worker.policy.model import Fault

PIECE_BYTES = 64 * 1024
MAX_ZSTD_WINDOW = 8 * 1024 * 1024
"""What a decoder of HTTP has to support (https://www.rfc-editor.org/rfc/rfc9659)."""
_ZSTD_SLICE = 64
_UNREADABLE = {"br", "compress", "x-compress", "dcb", "dcz"}
_GZIP_OR_ZLIB = {"gzip": 31, "x-gzip": 31, "deflate": 15}
_RAW_DEFLATE = -15
_ZLIB_METHOD = 8
"""Low half of the first byte of deflate's wrapper, without which many servers send it
(https://www.rfc-editor.org/rfc/rfc9110#section-8.4.1.2)."""


class Decoder(Protocol):
    """Unpacks one body."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """
        Return what some bytes become; read it to its end before the next call.

        Raises:
            BackendError: It cannot be unpacked; `DECODING`.
        """

    def close(self) -> None:
        """
        Say that the body has ended.

        Raises:
            BackendError: It ended in the middle; `DECODING`.
        """


def decoder_for(coding: str) -> Decoder | None:
    """
    Return a decoder for the value of `Content-Encoding`, `None` for one that changes nothing or is no coding at all.

    Raises:
        BackendError: It is a coding that cannot be unpacked; `DECODING`.
    """
    coding = coding.strip().lower()
    if coding in _GZIP_OR_ZLIB:
        return _Zlib(coding)
    if coding == "zstd":
        return _Zstd()
    if coding in _UNREADABLE or "," in coding:
        raise BackendError(Fault.DECODING, f"Content-Encoding {coding}: was not asked for and cannot be unpacked")
    return None


def _ended_early(coding: str) -> BackendError:
    return BackendError(Fault.DECODING, f"Content-Encoding {coding}: the packed data ended early")


class _Zlib:
    """gzip, also several members behind each other, and deflate."""

    def __init__(self, coding: str) -> None:
        self._coding = coding
        self._bits: int | None = None
        self._inflate: Any = None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """See `Decoder.feed`."""
        piece = b""
        while data or len(piece) == PIECE_BYTES:
            if self._inflate is None or (self._inflate.eof and data):
                data = data.lstrip(b"\0") if self._inflate is not None else data  # padding behind a member
                if not data:
                    return
                self._open(data)
            try:
                piece = self._inflate.decompress(data, PIECE_BYTES)
            except zlib.error as error:
                raise BackendError(Fault.DECODING, f"Content-Encoding {self._coding}: {error}") from error
            data = self._inflate.unused_data if self._inflate.eof else self._inflate.unconsumed_tail
            if piece:
                yield piece

    def _open(self, data: bytes) -> None:
        if self._bits is None:
            self._bits = _GZIP_OR_ZLIB[self._coding]
            if self._coding == "deflate" and data[0] & 15 != _ZLIB_METHOD:
                self._bits = _RAW_DEFLATE
        self._inflate = zlib.decompressobj(self._bits)

    def close(self) -> None:
        """See `Decoder.close`."""
        if self._inflate is not None and not self._inflate.eof:
            raise _ended_early(self._coding)


class _Zstd:
    """zstd, also several frames behind each other."""

    def __init__(self) -> None:
        import zstandard  # noqa: PLC0415 - no server of a healthy deployment sends it unasked

        self._error = zstandard.ZstdError
        self._open = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW).decompressobj
        self._frame: Any = None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """See `Decoder.feed`."""
        for start in range(0, len(data), _ZSTD_SLICE):
            rest = data[start : start + _ZSTD_SLICE]
            while rest:
                if self._frame is None or self._frame.eof:
                    self._frame = self._open()
                try:
                    piece = self._frame.decompress(rest)
                except self._error as error:
                    raise BackendError(Fault.DECODING, f"Content-Encoding zstd: {error}") from error
                rest = self._frame.unused_data if self._frame.eof else b""
                if piece:
                    yield piece

    def close(self) -> None:
        """See `Decoder.close`."""
        if self._frame is not None and not self._frame.eof:
            raise _ended_early("zstd")
