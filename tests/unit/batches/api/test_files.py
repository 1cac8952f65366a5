"""The first record of an upload, and ranges."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.batches.api.errors import ApiError
from worker.batches.api.files import MAX_FIRST_RECORD_BYTES, FirstRecord, read_range

LINE = st.sampled_from(
    [b"", b" \t", b"\r", b'{"a": 1}', b'{"a":\r', b"x", b"[1]", b"1", b"\xff", b"\x0c", b"\xe2\x80\xa8"]
)


def is_taken(data: bytes, size: int) -> bool:
    first = FirstRecord()
    try:
        for start in range(0, len(data), size):
            first.feed(data[start : start + size])
        first.finish()
    except ApiError as error:
        return not (error.status == 400 and "Invalid file format" in error.message)
    return True


@given(lines=st.lists(LINE, max_size=5), size=st.integers(1, 9), has_mark=st.booleans(), has_end=st.booleans())
def test_the_first_record_decides(lines: list[bytes], size: int, has_mark: bool, has_end: bool) -> None:
    """Whatever the pieces: blank lines are none, the lines after it do not matter."""
    data = (b"\xef\xbb\xbf" if has_mark else b"") + b"\n".join(lines) + (b"\n" if has_end else b"")
    first = next((line for line in lines if line.strip()), None)
    try:
        is_json = first is not None and json.loads(first) is not None
    except ValueError:
        is_json = False
    assert is_taken(data, size) is is_json


def test_a_first_record_beyond_any_message_is_left_to_validation() -> None:
    """So no more than that is kept of it."""
    first = FirstRecord()
    for _ in range(2 * MAX_FIRST_RECORD_BYTES // 1_000_000):
        first.feed(b"x" * 1_000_000)
    assert len(first._line) < MAX_FIRST_RECORD_BYTES + 1_000_001
    first.finish()


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 20))
def test_a_range_selects_what_python_would(first: int, last: int, size: int) -> None:
    """First and last byte, both included."""
    data = bytes(range(size))
    if last < first:
        assert read_range(f"bytes={first}-{last}", size) is None
    elif first >= size:
        with pytest.raises(ApiError, match="beyond the end"):
            read_range(f"bytes={first}-{last}", size)
    else:
        span = read_range(f"bytes={first}-{last}", size)
        assert span is not None
        assert data[span[0] : span[1]] == data[first : last + 1]


@pytest.mark.parametrize("size", [0, 5])
def test_the_last_bytes(size: int) -> None:
    """An empty file has none."""
    if size == 0:
        with pytest.raises(ApiError):
            read_range("bytes=-3", size)
    else:
        assert read_range("bytes=-3", size) == (2, 5)
        assert read_range("bytes=-9", size) == (0, 5)
