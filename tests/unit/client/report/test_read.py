"""Output files as they are found: compressed, torn, still written."""

import gzip

import pytest
import zstandard

from tests.unit.client.report.answers import a_line, a_run
from worker.client.errors import InputError
from worker.client.report import read_report

DATA = b"\n".join(a_run()[:-1]) + b"\n"


@pytest.mark.parametrize(
    ("name", "pack"),
    [("out.jsonl", bytes), ("out.jsonl.gz", gzip.compress), ("out.jsonl.zst", zstandard.compress)],
)
def test_files_are_read_by_their_names(tmp_path, name, pack):
    """Plain, gzip and zstd give the same report."""
    path = tmp_path / name
    path.write_bytes(pack(DATA))
    report, failure = read_report(str(path))
    assert (report.total.answers, report.total.errors, report.unreadable, failure) == (400, 20, 0, None)


def test_a_torn_file_is_counted_up_to_the_tear(tmp_path):
    """Also while a run is going on; what is wrong is told beside the report."""
    path = tmp_path / "out.jsonl.gz"
    path.write_bytes(gzip.compress(DATA[:-1000])[:-20])
    report, failure = read_report(str(path))
    assert 300 < report.total.answers < 400
    assert isinstance(failure, InputError)
    assert "ends in the middle" in str(failure)


def test_a_line_that_is_no_answer_is_named_by_its_number(tmp_path):
    """The first of them, with the reason; the others are counted."""
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"\n".join([a_line(1), b"", b"nonsense", a_line(2), b'{"id":']))
    report, failure = read_report(str(path))
    assert (report.total.answers, report.unreadable, failure) == (2, 2, None)
    assert report.first_unreadable[0] == 3
    assert report.first_unreadable[1]


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    """There is nothing to report about."""
    with pytest.raises(InputError, match=r"none\.jsonl: does not exist"):
        read_report(str(tmp_path / "none.jsonl"))
