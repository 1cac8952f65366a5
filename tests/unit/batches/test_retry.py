"""The failed lines of an input."""

from collections.abc import AsyncGenerator

from hypothesis import given
from hypothesis import strategies as st

from worker.batches.retry import failed_lines

LINES = st.lists(st.sampled_from([b"", b" ", b"\r", b"a", b"b\r", b" c", b"\xc2\x85", b"d\xe2\x80\xa8d"]), max_size=12)


class Pieces:
    """Objects, all of which have the same content, read in pieces."""

    def __init__(self, content: bytes, size: int) -> None:
        self.content = content
        self.size = size

    async def read(self, key: str, *, start: int = 0, length: int | None = None) -> AsyncGenerator[bytes, None]:
        for at in range(start, len(self.content), self.size):
            yield self.content[at : at + self.size]


@given(lines=LINES, bits=st.binary(max_size=2), size=st.integers(1, 5), has_mark=st.booleans(), has_end=st.booleans())
async def test_every_record_without_its_bit_is_repeated(
    lines: list[bytes], bits: bytes, size: int, has_mark: bool, has_end: bool
) -> None:
    """In order, each with a line break; blank lines are no records, and neither mark nor CR comes along."""
    data = (b"\xef\xbb\xbf" if has_mark else b"") + b"\n".join(lines) + (b"\n" if has_end else b"")
    records = [line.removesuffix(b"\r") for line in lines if line.strip()]
    wanted = [
        line + b"\n"
        for number, line in enumerate(records)
        if number // 8 >= len(bits) or not bits[number // 8] & 1 << number % 8
    ]
    assert [line async for line in failed_lines(Pieces(data, size), "key", bits)] == wanted
