"""
A form with a file, read as it comes from the socket: never the whole of it in memory or in a temporary file.

The parser is python-multipart's; Starlette's own form puts every file into a spool file first.  `parts` turns its
callbacks into values that a coroutine consumes in its own time, so that a slow storage slows the sender down.
"""

from collections.abc import AsyncGenerator, AsyncIterator
from http import HTTPStatus
from typing import Any

import msgspec
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from worker.batches.api.errors import ApiError

MAX_FIELD_BYTES = 4096
"""Of a field that is no file; the longest known has a few dozen bytes."""
MAX_PARTS = 32
FILE = "file"
"""Name of the part whose content is the file, with a file name or without."""


class FormField(msgspec.Struct, frozen=True):
    """A field and its whole value."""

    name: str
    value: str


class FileStart(msgspec.Struct, frozen=True):
    """The file begins; its content follows as bytes, and then a `FileEnd`."""

    filename: str
    """As the sender gave it; empty when it gave none."""


class FileEnd(msgspec.Struct, frozen=True):
    """All of the file has come."""


Part = FormField | FileStart | FileEnd | bytes


async def parts(chunks: AsyncIterator[bytes], content_type: str) -> AsyncGenerator[Part, None]:
    """
    Yield the parts of a form in their order.

    Args:
        chunks: The body of the request.
        content_type: The request's header.

    Raises:
        ApiError: 400; it is no form, or ends before its last boundary.

    Cancellation: what was not read stays in `chunks`.
    """
    form = _Form(content_type)
    async for chunk in chunks:
        for part in form.feed(chunk):
            yield part
    if not form.has_ended:
        raise _refused("the form ends before its last boundary; the upload was cut")


class _Form:
    """The state of a form that is being read."""

    def __init__(self, content_type: str) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise _refused("send the file as multipart/form-data")
        callbacks: Any = {
            "on_part_begin": self._on_part_begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_end": self._on_end,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)
        except FormParserError as error:
            raise _refused(str(error)) from None
        self.has_ended = False
        self._found: list[Part] = []
        self._count = 0
        self._header = (bytearray(), bytearray())
        self._disposition = b""
        self._name = ""
        self._value = bytearray()

    def feed(self, chunk: bytes) -> list[Part]:
        """Return what a piece of the body completes; file content is passed on as it stands in the piece."""
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise _refused(str(error)) from None
        found, self._found = self._found, []
        return found

    def _on_part_begin(self) -> None:
        self._count += 1
        if self._count > MAX_PARTS:
            raise _refused(f"there are more than {MAX_PARTS} parts")
        self._header = (bytearray(), bytearray())
        self._disposition = b""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])

    def _on_header_end(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = bytes(value)
        self._header = (bytearray(), bytearray())

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._value = bytearray()
        if self._name == FILE:
            self._found.append(FileStart(options.get(b"filename", b"").decode("utf-8", "replace")))

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == FILE:
            self._found.append(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > MAX_FIELD_BYTES:
            raise _refused(f"a field is longer than {MAX_FIELD_BYTES:,} bytes")

    def _on_part_end(self) -> None:
        if self._name == FILE:
            self._found.append(FileEnd())
        else:
            self._found.append(FormField(self._name, self._value.decode("utf-8", "replace")))

    def _on_end(self) -> None:
        self.has_ended = True


def _refused(reason: str) -> ApiError:
    return ApiError(HTTPStatus.BAD_REQUEST, f"We could not parse the form of your request: {reason}.")
