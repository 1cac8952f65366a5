"""Records are cut out of a file in any parts."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.batches.objects import ObjectWriter
from worker.batches.records import Record, RecordCutter, read_records
from worker.payloads.files import FileStore


def cut(content: bytes, sizes=None, **options) -> list[Record]:
    cutter, found, at = RecordCutter(**options), [], 0
    for size in sizes or [len(content)]:
        found += cutter.feed(content[at : at + size])
        at += size
    found += cutter.feed(content[at:])
    return found + list(cutter.finish())


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", []),
        (b"\n \n\r\n\t\n", []),
        (b"a\nb\n", [(1, 1, b"a"), (2, 2, b"b")]),
        (b"a\nb", [(1, 1, b"a"), (2, 2, b"b")]),
        (b"\n\na\r\n\r\nb\r\n", [(1, 3, b"a"), (2, 5, b"b")]),
        (b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n", [(1, 1, b"a"), (2, 2, b"\xef\xbb\xbfb")]),
        ("a\u2028b\u0085c\n".encode() + b"d\x0be\x0cf\n", [(1, 1, "a\u2028b\u0085c".encode()), (2, 2, b"d\x0be\x0cf")]),
        (b"a\rb\n", [(1, 1, b"a\rb")]),
        (b"a\r\r\n", [(1, 1, b"a\r")]),
    ],
    ids=["nothing", "blank", "two", "no-last-newline", "crlf", "mark", "other-ends", "lone-cr", "two-crs"],
)
def test_lines_end_at_lf_alone(content, wanted):
    assert [(record.number, record.line, record.data) for record in cut(content)] == wanted


@given(
    st.lists(st.sampled_from([b"a", b"bc", b"\r", b"\n", b"\n", b" ", b"\xef\xbb\xbf", b"x" * 9])),
    st.lists(st.integers(1, 7)),
)
def test_the_parts_of_a_file_do_not_matter(pieces, sizes):
    content = b"".join(pieces)
    assert cut(content, sizes, max_bytes=6) == cut(content, max_bytes=6)


@given(st.lists(st.sampled_from([b"a", b"bc", b"\r", b"\n", b"\n", b" ", b"\xef\xbb\xbf", b"x" * 9])))
def test_a_file_can_be_read_on_from_any_record(pieces):
    whole = cut(b"".join(pieces), max_bytes=6)
    for record in whole:
        rest = cut(
            b"".join(pieces)[record.end :], offset=record.end, record=record.number, line=record.line, max_bytes=6
        )
        assert rest == whole[record.number :]


def test_a_long_line_is_not_kept():
    content = b"a\n" + b"x" * 1_000_000 + b"\nb\n"
    assert [(each.number, each.data) for each in cut(content, [7] * 1000, max_bytes=10)] == [
        (1, b"a"),
        (2, None),
        (3, b"b"),
    ]
    assert [each.data for each in cut(b"x" * 10 + b"\r\n" + b"x" * 11 + b"\n", max_bytes=10)] == [b"x" * 10, None]
    assert [each.data for each in cut(b"x" * 50, [5] * 10, max_bytes=10)] == [None]


async def test_an_object_is_read_in_lists(tmp_path):
    objects = FileStore(tmp_path)
    lines = [b"%d" % random.randrange(10**12) * 50 for _ in range(5_000)]
    writer = ObjectWriter(objects, "in")
    for line in lines:
        await writer.write(line + b"\n")
    await writer.commit()
    found = [record async for records in read_records(objects, "in") for record in records]
    assert [record.data for record in found] == lines
    middle = found[2_499]
    rest = [
        record
        async for records in read_records(objects, "in", offset=middle.end, record=middle.number, line=middle.line)
        for record in records
    ]
    assert rest == found[2_500:]
