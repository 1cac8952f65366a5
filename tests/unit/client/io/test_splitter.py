"""Lines out of bytes."""

from hashlib import sha256

from hypothesis import given
from hypothesis import strategies as st

from worker.client.io.lines import RawLine
from worker.client.io.splitter import LineSplitter

pieces = st.lists(st.binary(max_size=8) | st.sampled_from([b"\n", b"\r\n", b"a\n", b"\xef\xbb\xbf", b" \n", b"\r"]))


def split(parts, limit=1 << 20):
    splitter = LineSplitter(limit)
    lines = []
    for part in parts:
        lines += splitter.feed(part)
    return lines + splitter.finish()


@given(pieces)
def test_lines_do_not_depend_on_the_cuts(parts):
    """However the stream is cut, lines end at LF, lose one CR, blank ones are counted and left out."""
    raw = b"".join(parts).split(b"\n")
    raw = [line.removesuffix(b"\r") for line in raw]
    raw[0] = raw[0].removeprefix(b"\xef\xbb\xbf")
    expected = [RawLine.of(number, line) for number, line in enumerate(raw, 1) if line.strip()]
    assert split(parts) == expected


@given(pieces, st.integers(1, 12))
def test_long_lines_keep_number_and_hash(parts, limit):
    """A line over the limit is given out without its bytes, with a hash that does not depend on the cuts."""
    cut, whole = split(parts, limit), split([b"".join(parts)], limit)
    assert cut == whole
    for line in cut:
        assert len(line.data) <= limit
        if line.size > limit:
            raw = b"".join(parts).split(b"\n")[line.number - 1]
            assert line.digest == sha256(raw).hexdigest()[:8]


def test_only_lf_ends_a_line():
    """U+2028, U+0085, vertical tab and form feed stand inside lines."""
    text = "a\u2028b\u0085c\x0bd\x0ce".encode()
    assert [line.data for line in split([text + b"\nf"])] == [text, b"f"]


def test_memory_is_bounded_inside_a_long_line():
    """While a line over the limit goes by, none of it is kept."""
    splitter = LineSplitter(10)
    for _ in range(1000):
        assert splitter.feed(b"x" * 100) == []
    assert splitter.rest() == b""
    assert splitter.pending_bytes == 100_000
    (line,) = splitter.feed(b"\n")
    assert (line.data, line.size) == (b"", 100_000)
    assert [line.data for line in splitter.feed(b"next\n")] == [b"next"]
