"""Forms with a file, in pieces of every size."""

from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.batches.api.errors import ApiError
from worker.batches.api.multipart import MAX_FIELD_BYTES, MAX_PARTS, FileEnd, FileStart, FormField, Part, parts

TYPE = "multipart/form-data; boundary=XX"


def form(*fields: tuple[str, bytes, str | None], end: bytes = b"--XX--\r\n") -> bytes:
    body = b""
    for name, value, filename in fields:
        head = f'Content-Disposition: form-data; name="{name}"'
        if filename is not None:
            head += f'; filename="{filename}"\r\nContent-Type: application/octet-stream'
        body += b"--XX\r\n" + head.encode() + b"\r\n\r\n" + value + b"\r\n"
    return body + end


async def pieces(body: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(body), size):
        yield body[start : start + size]


async def read(body: bytes, size: int = 7, content_type: str = TYPE) -> list[Part]:
    """Return the parts, pieces of content joined."""
    found: list[Part] = []
    async for part in parts(pieces(body, size), content_type):
        if isinstance(part, bytes) and found and isinstance(found[-1], bytes):
            found[-1] += part
        else:
            found.append(part)
    return found


@pytest.mark.parametrize("size", [1, 2, 5, 64, 10_000])
async def test_the_parts_come_in_order_whatever_the_pieces(size: int) -> None:
    """Fields with their values, the file with its content, a boundary inside it included."""
    content = b'{"a": 1}\r\n--X\r\n--XY\r\n\n'
    body = form(("purpose", b"batch", None), ("file", content, "in.jsonl"), ("expires_after[seconds]", b"3600", None))
    assert await read(body, size) == [
        FormField("purpose", "batch"),
        FileStart("in.jsonl"),
        content,
        FileEnd(),
        FormField("expires_after[seconds]", "3600"),
    ]


@given(content=st.binary(max_size=200), size=st.integers(1, 50))
async def test_any_content_comes_as_it_was_sent(content: bytes, size: int) -> None:
    """Byte for byte."""
    found = await read(form(("file", content, "f")), size)
    assert b"".join(part for part in found if isinstance(part, bytes)) == content


async def test_a_file_without_a_name_is_a_file() -> None:
    """The part's own name decides."""
    assert await read(form(("file", b"x", None))) == [FileStart(""), b"x", FileEnd()]


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"{}", "application/json"),
        (b"", "multipart/form-data"),
        (b"", f"multipart/form-data; boundary={'x' * 300}"),
        (b"", TYPE),
        (b"nonsense", TYPE),
        (form(("file", b"abc", "f"), end=b""), TYPE),
        (form(("file", b"abc", "f"))[:-8], TYPE),
        (form(("purpose", b"x" * (MAX_FIELD_BYTES + 1), None)), TYPE),
        (form(*[("a", b"", None)] * (MAX_PARTS + 1)), TYPE),
        (b"--XX\r\n" + b"a" * 20_000, TYPE),
        (b"--XX\r\nA: " + b"a" * 200_000, TYPE),
    ],
    ids=[
        "no-form",
        "no-boundary",
        "long-boundary",
        "empty",
        "nonsense",
        "no-end",
        "cut",
        "field",
        "parts",
        "name",
        "header",
    ],
)
async def test_what_is_no_whole_form_is_refused(body: bytes, content_type: str) -> None:
    """A 400 that says why."""
    with pytest.raises(ApiError) as caught:
        await read(body, 1000, content_type)
    assert caught.value.status == 400
    assert "parse the form" in caught.value.message
