"""Rows of tables as request lines."""

import csv
import gzip
import io
import json
import os
import sys
from datetime import datetime

import pyarrow as pa
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from worker.client.errors import InputError
from worker.client.io import tables
from worker.client.io.codecs import Codec
from worker.client.io.files import ByteReader
from worker.client.io.lines import RawLine
from worker.client.io.tables import BATCH_ROWS, Form, form_of, open_source, read_template
from worker.client.io.template import Template

TEMPLATE = '{"path": "/v1/x", "metadata": {}, "body": {"a": "{a}", "b": "{b}"}}'


def read(path, template=TEMPLATE, **options):
    """Return the bodies by the number of their row, and the fault that ended the reading."""
    source = open_source(str(path), template=Template(template), **options)
    bodies, fault = {}, None
    try:
        while lines := source.read_lines():
            for line in lines:
                assert line == RawLine.of(line.number, line.data)
                bodies[line.number] = json.loads(line.data)["body"]
        assert source.lines_read == len(bodies)
    except InputError as error:
        fault = str(error)
    finally:
        source.close()
    return bodies, fault


@pytest.mark.parametrize(
    ("path", "form"),
    [
        ("a.csv", Form.CSV), ("a.CSV.gz", Form.CSV), ("a.tsv.zst", Form.TSV), ("a.parquet", Form.PARQUET),
        ("a.jsonl", Form.JSONL), ("a.gz", Form.JSONL), ("-", Form.JSONL), ("csv", Form.JSONL),
    ],
)  # fmt: skip
def test_the_name_says_what_the_rows_are(path, form):
    """By its ending, before that of a compression."""
    assert form_of(path) is form


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", 'a,b\n1,x\n2,"y, ""z""\nw"\n'),
        ("t.csv", 'a;b\r\n1;x\r\n2;"y, ""z""\nw"\r\n'),
        ("t.csv", '\ufeffa\tb\n1\tx\n\n2\t"y, ""z""\nw"'),
        ("t.tsv", 'a\tb\n1\tx\n2\t"y, ""z""\nw"\n'),
    ],
    ids=["commas", "semicolons", "tabs", "tsv"],
)
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_rows_of_csv(tmp_path, name, text, suffix):
    """Delimiters, quotes, line breaks, byte order mark, blank lines, no end of the last line; compressed or not."""
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(pack(text.encode()))
    assert read(path) == ({1: {"a": "1", "b": "x"}, 2: {"a": "2", "b": 'y, "z"\nw'}}, None)


cells = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=8)


@given(st.lists(st.tuples(cells, cells), max_size=30), st.integers(1, 9))
def test_any_csv_of_the_standard_library_is_read_back(tmp_path_factory, rows, chunk):
    """Whatever stands in the cells, and wherever the reads cut them."""
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerows([("a", "b"), *rows])
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    path.write_bytes(text.getvalue().encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worker.client.io.files.CHUNK_BYTES", chunk)
        bodies, fault = read(path)
    assert fault is None
    assert list(bodies.values()) == [{"a": a, "b": b} for a, b in rows]


@pytest.mark.parametrize(
    ("text", "count", "told"),
    [
        ("a,b\n1,2\n3\n", 1, "row 2: has 1 fields, the header has 2"),
        ("a,b\n1,2,3\n", 0, "row 1: has 3 fields"),
        ("a,c\n1,2\n", 0, "has no column 'b'"),
        ("a,b,a\n1,2,3\n", 0, "has the column 'a' twice"),
        ("", 0, "has no column 'a', which the template asks for; it has none"),
        ('a,b\n1,2\n3,"4\n', 1, "is not CSV (unexpected end of data)"),
        ('a,b\n1,2\n3,"4"5\n', 1, "line 3: is not CSV"),
        (b"a,b\n1,2\n3,\xff\n", 0, "is not UTF-8 (near row 1)"),
        (b"a,b\n1,2\n3,4\xc3", 1, "is not UTF-8 (near row 2)"),
    ],
)
def test_what_is_wrong_with_a_csv_is_told(tmp_path, text, count, told):
    """With its row; the rows before it are given out."""
    path = tmp_path / "t.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    bodies, fault = read(path)
    assert len(bodies) == count
    assert fault.startswith(f"{path}: ")
    assert told in fault


def test_a_line_without_an_end_takes_no_endless_memory(tmp_path, monkeypatch):
    """A file that is no CSV at all."""
    monkeypatch.setattr(tables, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "t.csv"
    path.write_bytes(b"a,b\n" + b"x" * 1_000_000)
    assert "a line has more than 1,000 characters" in read(path)[1]


def test_a_pipe_gives_its_rows_as_they_come():
    """No row waits for a later one."""
    reading, writing = os.pipe()
    reader = ByteReader("standard input", reading, Codec.PLAIN)
    source = tables._CsvRows(reader, Template(TEMPLATE), None)
    os.write(writing, b"a,b\n1,2\n3,4\n")
    assert [line.number for line in source.read_lines()] == [1, 2]
    os.write(writing, b"5,6\n")
    assert [line.number for line in source.read_lines()] == [3]
    os.close(writing)
    assert source.read_lines() == []
    assert source.bytes_total is None
    source.close()


def test_rows_of_parquet(tmp_path):
    """With their types; only the columns of the template are read; in batches."""
    path, count = tmp_path / "t.parquet", BATCH_ROWS + 5
    columns = {"a": range(count), "b": [["x"], None] + [[]] * (count - 2), "unused": [datetime(2020, 1, 1)] * count}  # noqa: DTZ001
    parquet.write_table(pa.table({name: list(values) for name, values in columns.items()}), path)
    bodies, fault = read(path)
    assert fault is None
    assert len(bodies) == count
    assert (bodies[1], bodies[2]) == ({"a": 0, "b": ["x"]}, {"a": 1, "b": None})
    assert list(bodies) == list(range(1, count + 1))
    source = open_source(str(path), template=Template(TEMPLATE))
    source.read_lines()
    assert 0 < source.bytes_read < source.bytes_total == path.stat().st_size
    source.close()
    times, fault = read(path, '{"path":"/v1/x","body":{"at":"{unused}"}}')
    assert (times[1], fault) == ({"at": "2020-01-01T00:00:00"}, None)
    nothing, fault = read(path, '{"path":"/v1/x","body":{"n":1}}')
    assert (len(nothing), fault) == (count, None)


def test_what_is_wrong_with_a_parquet_file_is_told(tmp_path, monkeypatch):
    """Missing, no Parquet, a missing column, standard input, the missing extra."""
    path = tmp_path / "t.parquet"
    with pytest.raises(InputError, match="does not exist"):
        read(path)
    path.write_bytes(b"a,b\n1,2\n")
    with pytest.raises(InputError, match=r"t\.parquet: is not Parquet"):
        read(path)
    parquet.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(InputError, match="has no column 'b'"):
        read(path)
    with pytest.raises(InputError, match="it must be a file"):
        read("-", form=Form.PARQUET)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        InputError, match=r"the extra `parquet` is not installed; in a checkout: .* --editable '\.\[parquet\]'"
    ):
        read(path)


def test_rows_of_json_lines(tmp_path):
    """Any objects; a line that is none, or lacks a column, is told."""
    path = tmp_path / "t.jsonl"
    path.write_text('{"a":1,"b":[2],"c":3}\n\n{"b":"x","a":null}\n')
    assert read(path) == ({1: {"a": 1, "b": [2]}, 3: {"a": None, "b": "x"}}, None)
    path.write_text('{"a":1,"b":2}\n{"a":1}\n')
    bodies, fault = read(path)
    assert len(bodies) == 1
    assert "row 2: has no column 'b'" in fault
    path.write_text("[1]\n")
    assert "row 1: is no JSON object" in read(path)[1]


def test_without_a_template_the_lines_are_requests(tmp_path):
    """Byte for byte."""
    path = tmp_path / "t.jsonl"
    path.write_text("a,b\n")
    source = open_source(str(path))
    assert [line.data for line in source.read_lines()] == [b"a,b"]
    source.close()


def test_a_template_may_stand_in_a_file(tmp_path):
    """What does not begin with a brace is the name of one."""
    path = tmp_path / "template.json"
    path.write_text(TEMPLATE)
    assert list(read_template(str(path)).columns) == list(read_template(f" {TEMPLATE}").columns) == ["a", "b"]
    with pytest.raises(InputError, match="the template cannot be read"):
        read_template(str(tmp_path / "none.json"))
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match="is not UTF-8"):
        read_template(str(path))
