"""
Frames of AWS's event streams, written from the specification: a decoder is never tested against frames of its own.

Source: https://smithy.io/2.0/aws/amazon-eventstream.html; `tests/unit/backends/streams/test_eventstream.py` compares
them with the specification's examples.
"""

import json
import struct
from collections.abc import Mapping
from zlib import crc32

HeaderValue = str | bytes | int | bool


def frame(headers: Mapping[str, HeaderValue], payload: bytes = b"") -> bytes:
    """Return one whole frame."""
    block = b"".join(map(_header, headers, headers.values()))
    prelude = struct.pack(">II", 16 + len(block) + len(payload), len(block))
    message = prelude + struct.pack(">I", crc32(prelude)) + block + payload
    return message + struct.pack(">I", crc32(message))


def _header(name: str, value: HeaderValue) -> bytes:
    named = bytes((len(name.encode()),)) + name.encode()
    match value:
        case bool():
            return named + (b"\x00" if value else b"\x01")
        case int():
            return named + b"\x04" + struct.pack(">i", value)
        case bytes():
            return named + b"\x06" + struct.pack(">H", len(value)) + value
        case _:
            return named + b"\x07" + struct.pack(">H", len(value.encode())) + value.encode()


def part(payload: bytes) -> bytes:
    """Return a part of an answer."""
    headers = {":message-type": "event", ":event-type": "PayloadPart", ":content-type": "application/octet-stream"}
    return frame(headers, payload)


def parts(data: bytes, size: int) -> bytes:
    """Return an answer in parts of `size` bytes."""
    return b"".join(part(data[at : at + size]) for at in range(0, len(data), size))


def exception(name: str, **fields: str) -> bytes:
    """Return an exception: `ModelStreamError` with `ErrorCode`, or `InternalStreamFailure`."""
    headers = {":message-type": "exception", ":exception-type": name, ":content-type": "application/json"}
    return frame(headers, json.dumps(fields).encode())


def error(code: str, message: str) -> bytes:
    """Return an error that the service did not model."""
    return frame({":message-type": "error", ":error-code": code, ":error-message": message})
