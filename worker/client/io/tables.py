"""
Tables as input: the rows of CSV, TSV, Parquet and JSON lines, each made a request line by a template.

The number of a line is that of its row, from 1, without the header; its hash is that of the request line, so that a
changed row and a changed template are both noticed.  Everything here blocks and belongs on a `BlockingThread`.  Memory
is constant: rows are read in batches.  Parquet needs the extra `parquet`, and a file: it is read from its end.
"""

import codecs
import csv
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import msgspec

from worker.client.errors import InputError
from worker.client.io.files import STANDARD, ByteReader, LineReader, open_bytes, open_input
from worker.client.io.lines import MAX_LINE_BYTES, RawLine
from worker.client.io.template import Row, Template
from worker.client.ports import LineSource
from worker.errors import how_to_get

BATCH_ROWS = 256
_DELIMITERS = (",", ";", "\t")
_decode = msgspec.json.Decoder(dict[str, Any]).decode


class Form(StrEnum):
    """What the rows of an input are."""

    JSONL = "jsonl"
    CSV = "csv"
    TSV = "tsv"
    PARQUET = "parquet"


class Source(LineSource, Protocol):
    """A `ports.LineSource` that can be closed."""

    def close(self) -> None:
        """Close the file; idempotent."""


def form_of(path: str) -> Form:
    """Return what a file name's ending says, without that of a compression; lines of JSON for everything else."""
    name = path.lower().removesuffix(".gz").removesuffix(".zst")
    return next((form for form in (Form.CSV, Form.TSV, Form.PARQUET) if name.endswith(f".{form}")), Form.JSONL)


def open_source(path: str, *, template: Template | None = None, form: Form | None = None) -> Source:
    """
    Open an input of request lines, or of rows that a template makes such.

    Args:
        path: A file, a named pipe, or `-` for standard input; the ending `.gz` or `.zst` selects the compression.
        template: What each row becomes; `None`: the lines are requests, whatever the name says.
        form: What the rows are; `None`: what the file name says.

    Raises:
        InputError: Missing, not permitted, a template for columns that the table does not have, or Parquet without its
            extra; permanent.
    """
    if template is None:
        return open_input(path)
    match form or form_of(path):
        case Form.JSONL:
            return _JsonRows(open_input(path), template)
        case Form.PARQUET:
            return _ParquetRows(path, template)
    return _CsvRows(open_bytes(path), template, "\t" if form is Form.TSV else None)


def read_template(text: str) -> Template:
    """
    Return a template.

    Args:
        text: The JSON object, or the name of a file that holds it.

    Raises:
        InputError: It cannot be read or used; permanent.
    """
    if not text.lstrip().startswith("{"):
        try:
            text = Path(text).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
            raise InputError(f"{text}: the template cannot be read ({reason})") from None
    return Template(text)


class _Rows(ABC):
    """
    A `Source` that makes request lines of rows.

    Args:
        name: Of the table, for messages.
        template: What each row becomes.
    """

    def __init__(self, name: str, template: Template) -> None:
        self._name = name
        self._template = template
        self._failure: InputError | None = None
        self.lines_read = 0

    def read_lines(self) -> Sequence[RawLine]:
        """Return the next lines; see `ports.LineSource.read_lines`.  A fault is raised after the rows before it."""
        if self._failure is not None:
            raise self._failure
        lines: list[RawLine] = []
        number = 0
        try:
            for number, row in self._next_rows():
                lines.append(RawLine.of(number, self._template.render(row, number)))
        except InputError as error:
            self._failure = error
            if not lines:
                raise
        self.lines_read += len(lines)
        return lines

    def _refused(self, number: int, reason: str) -> InputError:
        return InputError(f"{self._name}: row {number}: {reason}")

    @abstractmethod
    def _next_rows(self) -> Iterator[tuple[int, Row]]:
        """Yield number and values of some more rows, at least one unless the table has ended."""


class _JsonRows(_Rows):
    """Rows that are JSON objects, one on each line."""

    def __init__(self, reader: LineReader, template: Template) -> None:
        super().__init__(reader.name, template)
        self._reader = reader

    @property
    def bytes_read(self) -> int:
        """See `ports.LineSource.bytes_read`."""
        return self._reader.bytes_read

    @property
    def bytes_total(self) -> int | None:
        """See `ports.LineSource.bytes_total`."""
        return self._reader.bytes_total

    def _next_rows(self) -> Iterator[tuple[int, Row]]:
        for line in self._reader.read_lines():
            try:
                row = _decode(line.data)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise self._refused(line.number, f"is no JSON object ({error})") from None
            self._template.require(f"{self._name}: row {line.number}", row)
            yield line.number, row

    def close(self) -> None:
        """Close the file; idempotent."""
        self._reader.close()


class _CsvRows(_Rows):
    """
    Rows of CSV as RFC 4180 has it: a header, commas or semicolons or tabs, quotes that may hold line breaks.

    Args:
        source: The bytes; UTF-8 with or without byte order mark.
        template: What each row becomes.
        delimiter: `None`: the one of `,`, `;` and tab that the header has most of.
    """

    def __init__(self, source: ByteReader, template: Template, delimiter: str | None) -> None:
        super().__init__(source.name, template)
        self._source = source
        self._delimiter = delimiter
        self._ready: deque[str] = deque()
        """Lines that were read and not yet taken."""
        self._rows: Iterator[list[str]] | None = None
        self._header: list[str] = []
        self._number = 0

    @property
    def bytes_read(self) -> int:
        """See `ports.LineSource.bytes_read`."""
        return self._source.bytes_read

    @property
    def bytes_total(self) -> int | None:
        """See `ports.LineSource.bytes_total`."""
        return self._source.bytes_total

    def _next_rows(self) -> Iterator[tuple[int, Row]]:
        if self._rows is None:
            self._rows = self._begin()
        for values in self._rows:
            self._number += 1
            if len(values) != len(self._header):
                raise self._refused(self._number, f"has {len(values)} fields, the header has {len(self._header)}")
            yield self._number, dict(zip(self._header, values, strict=True))
            if not self._ready:
                return

    def _begin(self) -> Iterator[list[str]]:
        """Read the header; return the rows behind it."""
        lines = self._lines()
        first = next(lines, "")
        delimiter = self._delimiter or max(_DELIMITERS, key=first.count)
        rows = self._parsed(chain([first], lines), delimiter)
        self._header = next(rows, [])
        repeated = next((name for name in self._header if self._header.count(name) > 1), None)
        if repeated is not None:
            raise InputError(f"{self._name}: has the column {repeated!r} twice")
        self._template.require(self._name, self._header)
        return rows

    def _parsed(self, lines: Iterator[str], delimiter: str) -> Iterator[list[str]]:
        csv.field_size_limit(MAX_LINE_BYTES)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            yield from (values for values in reader if values)
        except csv.Error as error:
            raise InputError(f"{self._name}: line {reader.line_num}: is not CSV ({error})") from None

    def _lines(self) -> Iterator[str]:
        """Yield lines with their ends, as `csv` wants them; an end inside quotes ends a line too."""
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        rest = ""
        while not self._source.is_ended:
            for piece in chain(self._source.read(), (b"",)):  # the last one comes when the end is known
                try:
                    text = rest + decoder.decode(piece, self._source.is_ended)
                except UnicodeDecodeError:
                    raise InputError(f"{self._name}: is not UTF-8 (near row {self._number + 1})") from None
                *whole, rest = text.split("\n")
                if len(rest) > MAX_LINE_BYTES:
                    raise InputError(f"{self._name}: a line has more than {MAX_LINE_BYTES:,} characters")
                self._ready.extend(f"{line}\n" for line in whole)
                while self._ready:
                    yield self._ready.popleft()
        if rest:
            yield rest

    def close(self) -> None:
        """Close the file; idempotent."""
        self._source.close()


class _ParquetRows(_Rows):
    """
    Rows of a Parquet file, of which only the columns that the template uses are read.

    Args:
        path: Of the file.
        template: What each row becomes.
    """

    def __init__(self, path: str, template: Template) -> None:
        super().__init__(path, template)
        if path == STANDARD:
            raise InputError("standard input: Parquet is read from its end, so it must be a file")
        open_bytes(path).close()  # says what is wrong with the file itself
        try:
            import pyarrow.parquet as parquet  # noqa: PLC0415, PLR0402 - an extra
        except ImportError:
            raise InputError(f"{path}: Parquet: {how_to_get('parquet', is_in_image=False)}") from None
        try:
            self._file = parquet.ParquetFile(path)
        except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
            raise InputError(f"{path}: is not Parquet ({error})") from None
        template.require(path, self._file.schema_arrow.names)
        self._batches = self._file.iter_batches(BATCH_ROWS, columns=list(template.columns))
        self._row_count = int(self._file.metadata.num_rows)
        self.bytes_total: int | None = Path(path).stat().st_size
        self._number = 0

    @property
    def bytes_read(self) -> int:
        """Those of the rows so far, if all had the same size."""
        return (self.bytes_total or 0) * self._number // max(1, self._row_count)

    def _next_rows(self) -> Iterator[tuple[int, Row]]:
        try:
            batch = next(self._batches, None)
        except (OSError, ValueError) as error:
            raise InputError(f"{self._name}: is damaged after row {self._number} ({error})") from None
        if batch is None:
            return
        if not self._template.columns:
            rows: list[dict[str, Any]] = [{} for _ in range(batch.num_rows)]
        else:
            rows = batch.to_pylist()
        for row in rows:
            self._number += 1
            yield self._number, row

    def close(self) -> None:
        """Close the file; idempotent."""
        self._file.close()
