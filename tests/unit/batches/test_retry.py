"""The failed lines of an input."""

from collections.abc import AsyncIterator

from hypothesis import given
from hypothesis import strategies as st

from worker.batches.retry import failed_lines

LINES = st.lists(st.sampled_from([b"", b" ", b"\r", b"a", b"b\r", b" c", b"\xc2\x85", b"d\xe2\x80\xa8d"]), max_size=12)


async def pieces(data: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


@given(lines=LINES, bits=st.binary(max_size=2), size=st.integers(1, 5), has_mark=st.booleans(), has_end=st.booleans())
async def test_every_record_without_its_bit_is_repeated(
    lines: list[bytes], bits: bytes, size: int, has_mark: bool, has_end: bool
) -> None:
    """Byte for byte, in order, each with its end; blank lines are no records, and the byte order mark is dropped."""
    data = (b"\xef\xbb\xbf" if has_mark else b"") + b"\n".join(lines) + (b"\n" if has_end else b"")
    records = [line for line in lines if line.strip(b" \t\r")]
    wanted = [
        line + b"\n"
        for number, line in enumerate(records)
        if number // 8 >= len(bits) or not bits[number // 8] & 1 << number % 8
    ]
    assert [line async for line in failed_lines(pieces(data, size), bits)] == wanted
