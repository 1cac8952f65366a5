"""
HTTP/1.1 as bytes: heads, chunks and the ways to send them wrongly.

The server writes its own bytes because rehearsals need what a framework refuses to send: a Content-Length that lies, a
chunk that stops half-way, an illegal chunk header.  RFC 9112 is the format.
"""

from collections.abc import Mapping
from http import HTTPStatus

LAST_CHUNK = b"0\r\n\r\n"
ILLEGAL_CHUNK = b"zz\r\n"
"""A chunk header that is not hexadecimal."""

_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


def head(
    status: int,
    content_type: str,
    headers: Mapping[str, str],
    *,
    length: int | None,
    chunked: bool = False,
    close: bool = False,
) -> bytes:
    """
    Return a response's head with its blank line.

    Args:
        status: Any number; one without a known phrase has none.
        content_type: Without it an empty text leaves the header out.
        headers: Further headers; values are sent as UTF-8.
        length: Content-Length; None leaves it out.
        chunked: Whether chunks follow.
        close: Whether the connection ends after the body.
    """
    lines = [_LINES.get(status) or f"HTTP/1.1 {status} \r\n".encode()]
    if content_type:
        lines.append(b"Content-Type: %b\r\n" % content_type.encode())
    if length is not None:
        lines.append(b"Content-Length: %d\r\n" % length)
    if chunked:
        lines.append(b"Transfer-Encoding: chunked\r\n")
    if close:
        lines.append(b"Connection: close\r\n")
    lines += [f"{name}: {value}\r\n".encode("utf-8", "surrogateescape") for name, value in headers.items()]
    lines.append(b"\r\n")
    return b"".join(lines)


def chunk(data: bytes) -> bytes:
    """Return data as one chunk; empty data gives nothing, because an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def cut_chunk(data: bytes) -> bytes:
    """Return a chunk that announces 16 bytes more than it has."""
    return b"%x\r\n%b" % (len(data) + 16, data)
