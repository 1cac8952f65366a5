"""
`/v1/files`: upload, list, retrieve, content, delete.

An upload goes from the socket to the storage piece by piece, and is not visible until it is whole.  Its first record
is looked at on the way: a file that is no JSONL at all is refused here, everything else is left to the validation of
the batch, which names every line at fault.
"""

import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from http import HTTPStatus
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from worker.batches.api.errors import ApiError, invalid_value, missing, no_file, wrong_type
from worker.batches.api.limits import RateLimit
from worker.batches.api.multipart import FileEnd, FileStart, FormField, Part, parts
from worker.batches.api.replies import json_reply, page_ends, read_after, read_limit
from worker.batches.api.schemas import FileDeleted, FileList, FileObject, read_expiry
from worker.batches.api.storage import Storage
from worker.batches.ids import FILE, is_id
from worker.batches.store import File
from worker.settings.schema import BatchesSettings

PURPOSES = ("batch",)
"""Purposes of uploads that something here needs."""
LISTED_PURPOSES = (*PURPOSES, "batch_output")
MAX_LIMIT = 10_000
FORM_BYTES = 65_536
"""What a form may have around its file."""
MAX_FIRST_RECORD_BYTES = 10_000_000
"""A longer first record is left to the validation, which names it: no message carries it."""
MAX_NAME_CHARS = 255
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_BOM = b"\xef\xbb\xbf"


class FileRoutes:
    """
    Handlers of the routes.

    Args:
        storage: Store and files.
        settings: Limits.
        uploads: How many uploads a tenant may begin.
    """

    def __init__(self, storage: Storage, settings: BatchesSettings, uploads: RateLimit) -> None:
        self._storage = storage
        self._settings = settings
        self._uploads = uploads

    async def create(self, request: Request, tenant: str) -> Response:
        """
        Take an upload.

        Cancellation: nothing is kept.
        """
        self._uploads.take(tenant)
        limit = self._settings.max_file_bytes
        if int(request.headers.get("content-length") or 0) > limit + FORM_BYTES:
            raise _too_large(limit)
        content_type = request.headers.get("content-type", "")
        async with aclosing(_Upload(parts(request.stream(), content_type), limit)) as upload:
            filename = await upload.find_file()
            written = await self._storage.write_file(
                tenant,
                upload.content(),
                filename=filename,
                purpose=PURPOSES[0],
                keep_s=self._settings.file_retention_s,
                check=upload.finish,
            )
        return json_reply(describe(written))

    async def list(self, request: Request, tenant: str) -> Response:
        """Describe a page of files.  Cancellation: nothing was changed."""
        limit = read_limit(request, MAX_LIMIT, MAX_LIMIT)
        after = read_after(request, FILE)
        purpose = request.query_params.get("purpose") or None
        if purpose is not None and not purpose.isprintable():  # PostgreSQL takes no NUL, not even to find nothing
            raise invalid_value("purpose", purpose, LISTED_PURPOSES)
        order = _read_order(request.query_params.get("order") or "desc")
        store = self._storage.store
        page = await self._storage.call(
            lambda: store.list_files(tenant, purpose=purpose, after=after, limit=limit, order=order)
        )
        data = [describe(file) for file in page.items]
        first_id, last_id = page_ends(data)
        return json_reply(FileList(data=data, has_more=page.has_more, first_id=first_id, last_id=last_id))

    async def retrieve(self, request: Request, tenant: str) -> Response:
        """Describe a file.  Cancellation: nothing was changed."""
        return json_reply(describe(await self._find(request, tenant)))

    async def delete(self, request: Request, tenant: str) -> Response:
        """Delete a file; batches made of it go on.  Cancellation: it may be deleted."""
        file_id = request.path_params["file_id"]
        store = self._storage.store
        if not is_id(file_id, FILE) or not await self._storage.call(lambda: store.delete_file(tenant, file_id)):
            raise no_file(file_id)
        return json_reply(FileDeleted(id=file_id))

    async def content(self, request: Request, tenant: str) -> Response:
        """
        Return a file's bytes, or a range of them.

        Cancellation: closes the connection; the client sees that bytes are missing.
        """
        file = await self._find(request, tenant)
        headers = {
            "accept-ranges": "bytes",
            "content-type": "application/octet-stream",
            "content-disposition": f'attachment; filename="{file.id}.jsonl"',
            "etag": f'"{file.id}"',
        }
        start, end, status = 0, file.bytes, HTTPStatus.OK
        wanted = request.headers.get("range")
        if wanted is not None and request.headers.get("if-range", headers["etag"]) == headers["etag"]:
            span = read_range(wanted, file.bytes)
            if span is not None:
                (start, end), status = span, HTTPStatus.PARTIAL_CONTENT
                headers["content-range"] = f"bytes {start}-{end - 1}/{file.bytes}"
        headers["content-length"] = str(end - start)
        if request.method == "HEAD":
            return Response(status_code=status, headers=headers)
        chunks = self._storage.objects.read(file.object_key, start=start, length=end - start)
        # The first piece now: while no header was sent, an error can still be told.
        first = await anext(chunks, b"")
        return StreamingResponse(_after(first, chunks), status, headers)

    async def _find(self, request: Request, tenant: str) -> File:
        file_id = request.path_params["file_id"]
        found = None
        if is_id(file_id, FILE):
            found = await self._storage.call(lambda: self._storage.store.get_file(tenant, file_id))
        if found is None:
            raise no_file(file_id)
        return found


def _read_order(text: str) -> Literal["asc", "desc"]:
    match text:
        case "asc" | "desc":
            return text
    raise invalid_value("order", text, ("asc", "desc"))


def describe(file: File) -> FileObject:
    """Return a file as the API shows it."""
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=file.created_at,
        expires_at=file.expires_at,
        filename=file.filename,
        purpose=file.purpose,
    )


def read_range(header: str, size: int) -> tuple[int, int] | None:
    """
    Return the bytes that a `Range` header asks for, as first and behind the last.

    Args:
        header: Its value.
        size: Bytes of the file.

    Returns:
        `None`: several ranges, or none that this server understands, for which the whole file is the answer.

    Raises:
        ApiError: 416; it lies beyond the end.

    Source: https://www.rfc-editor.org/rfc/rfc9110#section-14.2.
    """
    match = _RANGE.fullmatch(header.strip())
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match[1], match[2]
    if not first:  # the last so many
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(int(last) + 1 if last else size, size)
        if last and int(last) < int(first):
            return None
    if start >= end:
        raise ApiError(
            HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
            f"The range is beyond the end of the file, which has {size:,} bytes.",
            headers={"content-range": f"bytes */{size}"},
        )
    return start, end


async def _after(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    async with aclosing(rest):
        yield first
        async for chunk in rest:
            yield chunk


class _Upload:
    """
    A form with a file, on its way.

    The fields may stand before the file and after it: the official client sends them before.

    Args:
        form: Its parts.
        limit: Bytes of the file at most.
    """

    def __init__(self, form: AsyncGenerator[Part, None], limit: int) -> None:
        self._form = form
        self._limit = limit
        self._fields: dict[str, str] = {}

    async def aclose(self) -> None:
        """Read no further."""
        await self._form.aclose()

    async def find_file(self) -> str:
        """
        Read up to the file; return its name.

        Raises:
            ApiError: 400; there is none, or the fields before it cannot be used.
        """
        async for part in self._form:
            match part:
                case FormField():
                    self._take(part)
                case FileStart():
                    return _shown_name(part.filename)
                case _:
                    raise AssertionError(part)
        raise missing("file")

    async def content(self) -> AsyncGenerator[bytes, None]:
        """
        Yield the file.

        Raises:
            ApiError: 400; it is too large, no JSONL, or cut.
        """
        first = FirstRecord()
        size = 0
        async for part in self._form:
            if isinstance(part, FileEnd):
                first.finish()
                return
            assert isinstance(part, bytes)
            size += len(part)
            if size > self._limit:
                raise _too_large(self._limit)
            first.feed(part)
            yield part

    async def finish(self) -> int | None:
        """
        Read what follows the file; return the seconds after which it expires, `None` for the default.

        Raises:
            ApiError: 400; a field is absent or cannot be used, or there is a second file.
        """
        async for part in self._form:
            if not isinstance(part, FormField):
                raise ApiError(HTTPStatus.BAD_REQUEST, "Only one file can be uploaded at a time.", param="file")
            self._take(part)
        if "purpose" not in self._fields:
            raise missing("purpose")
        anchor = self._fields.get("expires_after[anchor]")
        text = self._fields.get("expires_after[seconds]")
        if anchor is None and text is None:
            return None
        seconds: object = text
        if text is not None and re.fullmatch(r"-?\d{1,18}", text, re.ASCII):
            seconds = int(text)
        return read_expiry(anchor, seconds, "expires_after").seconds

    def _take(self, field: FormField) -> None:
        self._fields[field.name] = field.value
        if field.name == "purpose" and field.value not in PURPOSES:
            raise invalid_value("purpose", field.value, PURPOSES)
        if field.name == "expires_after":
            expected = "the fields expires_after[anchor] and expires_after[seconds]"
            raise wrong_type("expires_after", expected, field.value)


class FirstRecord:
    """Whether a file begins as JSONL: its first line that is not blank is JSON.  Keeps no more than that line."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._is_known = False
        self._is_begin = True

    def feed(self, chunk: bytes) -> None:
        """
        Look at the next piece.

        Raises:
            ApiError: 400; the first record is no JSON.
        """
        start = 0
        while not self._is_known:
            end = chunk.find(b"\n", start)
            self._line += chunk[start : end if end >= 0 else len(chunk)]
            if end < 0:
                self._is_known = len(self._line) > MAX_FIRST_RECORD_BYTES
                return
            self._judge()
            start = end + 1

    def finish(self) -> None:
        """
        The file ends here.

        Raises:
            ApiError: 400; it has no record, or the only one is no JSON.
        """
        if not self._is_known:
            self._judge()
        if not self._is_known:
            raise _no_jsonl("it has no line with a request")

    def _judge(self) -> None:
        line = bytes(self._line)
        self._line.clear()
        if self._is_begin:
            line, self._is_begin = line.removeprefix(_BOM), False
        if not line.strip():
            return
        try:
            msgspec.json.decode(line)
        except (msgspec.DecodeError, RecursionError, ValueError):
            raise _no_jsonl("its first line is not valid JSON") from None
        self._is_known = True


def _no_jsonl(reason: str) -> ApiError:
    return ApiError(
        HTTPStatus.BAD_REQUEST, f"Invalid file format for Batch API: {reason}. The file must be a .jsonl file."
    )


def _too_large(limit: int) -> ApiError:
    message = f"The file is too large: at most {limit:,} bytes are allowed."
    return ApiError(HTTPStatus.BAD_REQUEST, message, param="file")


def _shown_name(name: str) -> str:
    """Return a file's name without folders and without what no name holds."""
    name = re.split(r"[/\\]", name)[-1]
    name = "".join(character for character in name if character.isprintable())
    return name[-MAX_NAME_CHARS:] or "upload"
