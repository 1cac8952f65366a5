"""
Look at the lines of an input before anything is done about them: how many there are, and what is wrong.

`submit` refuses a file with a fault.  `local` has the worker answer a bad line with an error; it refuses an input of
which no line is a request, and one in which two lines have the same custom_id, whose answers could not be told apart.
It also compares the lines with the answers that its output has (`OutputMatch`).

A file is read once more for this, about 25,000 lines a second.  The lines of a pipe are looked at as they come
(`CheckedLines`).  Memory is constant: the custom_ids go into a temporary database, which SQLite keeps on the disk when
it is large.
"""

import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from worker.client.errors import InputError, OutputError
from worker.client.io.lines import Prepared, RawLine, prepare
from worker.client.ports import LineSource
from worker.client.resume import AnsweredLines
from worker.client.summary import InputCount
from worker.errors import MessageError
from worker.wire.message import decode_request

MAX_FAULTS = 20
"""Faults of lines that are kept; all are counted."""
MAX_MODELS = 100
"""Names of models that are counted; requesters choose them."""
EXPECTED = 'expected {"path": "/v1/chat/completions", "body": {...}} or OpenAI batch lines'
TOO_LARGE = "request_too_large"
"""The refusal of a line that does not fit into a message."""

_decode_id = msgspec.json.Decoder(str | None).decode


@dataclass(frozen=True, slots=True, kw_only=True)
class LineFault:
    """Why a line cannot be published, or what the worker would answer to it."""

    number: int
    field: str | None
    """The key at fault; `None` for the line as a whole."""
    message: str

    def __str__(self) -> str:
        field = f", {self.field}" if self.field else ""
        return f"line {self.number}{field}: {self.message}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """A line that was looked at by itself."""

    number: int
    prepared: Prepared
    """What would be published for it."""
    model: str | None = None
    """That it asks for."""
    fault: LineFault | None = None

    @property
    def custom_id(self) -> str | None:
        """Of a batch line; `None` for any other."""
        return _decode_id(self.prepared.custom_id)


@dataclass(slots=True, kw_only=True)
class ModelUse:
    """The lines that ask for one model."""

    count: int = 0
    first: int
    """Number of the first of these lines."""


@dataclass(slots=True, kw_only=True)
class CheckResult:
    """What is in an input."""

    lines: int = 0
    """Without blank ones."""
    bytes: int = 0
    """Of these lines."""
    bad: int = 0
    """Lines that are no requests."""
    repeated: LineFault | None = None
    """The first line whose custom_id another one has."""
    fault_count: int = 0
    """Of both kinds."""
    faults: list[LineFault] = field(default_factory=list)
    """The first ones, in no order."""
    models: dict[str, ModelUse] = field(default_factory=dict)
    """By name; lines without a model are not in it."""

    def add(self, fault: LineFault) -> None:
        """Count a fault, and keep it if it is one of the first."""
        self.fault_count += 1
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(fault)


def examine(line: RawLine, *, by_reference: bool = False) -> Examined:
    """
    Return what would be published for a line, and why the worker or the broker would refuse it, if they would.

    Args:
        line: Not blank.
        by_reference: A body that is too large for a message can go into object storage: then `prepared` has the data
            besides the refusal.
    """
    prepared = prepare(line)
    refusal = prepared.refusal
    if refusal is not None and by_reference and refusal.code == TOO_LARGE:
        prepared, refusal = replace(prepared, data=line.data), None
    if refusal is not None:
        fault = LineFault(number=line.number, field=refusal.param, message=refusal.message)
        return Examined(number=line.number, prepared=prepared, fault=fault)
    try:
        model = decode_request(prepared.data).model
    except MessageError as error:
        fault = LineFault(number=line.number, field=error.param, message=error.reason)
        return Examined(number=line.number, prepared=prepared, fault=fault)
    return Examined(number=line.number, prepared=prepared, model=model)


class LineCheck:
    """
    Looks at one line after another; use it from one thread at a time, and close it.

    Args:
        by_reference: See `examine`.
    """

    def __init__(self, *, by_reference: bool = False) -> None:
        self._by_reference = by_reference
        self._ids: sqlite3.Connection | None = None
        self.result = CheckResult()

    def see(self, lines: Sequence[RawLine]) -> list[Examined]:
        """Look at the next lines; return those without a fault."""
        result, good = self.result, []
        for line in lines:
            result.lines += 1
            result.bytes += line.size
            examined = examine(line, by_reference=self._by_reference)
            fault = examined.fault
            if fault is not None:
                result.bad += 1
            custom_id = examined.custom_id
            first = None if custom_id is None else self._first_with(custom_id, line.number)
            if first is not None:
                message = f"{custom_id!r} is the custom_id of line {first} too"
                fault = LineFault(number=line.number, field="custom_id", message=message)
                result.repeated = result.repeated or fault
            if fault is None:
                good.append(examined)
                self._note_model(examined.model, line.number)
            else:
                result.add(fault)
        return good

    def _note_model(self, name: str | None, number: int) -> None:
        if name is not None and (name in self.result.models or len(self.result.models) < MAX_MODELS):
            self.result.models.setdefault(name, ModelUse(first=number)).count += 1

    def _first_with(self, custom_id: str, number: int) -> int | None:
        """Note a custom_id; return the number of the line that has it already, if one has."""
        if self._ids is None:
            self._ids = sqlite3.connect("", isolation_level=None, check_same_thread=False)
            self._ids.execute("CREATE TABLE ids (custom_id TEXT PRIMARY KEY, number INTEGER) WITHOUT ROWID")
            self._ids.execute("BEGIN")
        try:
            self._ids.execute("INSERT INTO ids VALUES (?, ?)", (custom_id, number))
        except sqlite3.IntegrityError:
            found = self._ids.execute("SELECT number FROM ids WHERE custom_id = ?", (custom_id,)).fetchone()
            return int(found[0])
        return None

    def close(self) -> None:
        """Remove the temporary database; idempotent."""
        if self._ids is not None:
            self._ids.close()
            self._ids = None


class OutputMatch:
    """
    Compares the lines of an input with the answers that an output has; use it from one thread at a time.

    Args:
        input_name: For messages.
        output_name: For messages.
        answers: Ids of the answers in the output.
        keeps_changed: Lines that changed are no fault: their old answers go.
    """

    def __init__(
        self, input_name: str, output_name: str, answers: AnsweredLines, *, keeps_changed: bool = False
    ) -> None:
        self.input_name = input_name
        self._output = output_name
        self._answers = answers
        self._keeps_changed = keeps_changed
        self._first_changed: int | None = None
        self.answered = 0
        """Lines that the output has an answer to."""
        self.ids = AnsweredLines()
        """Ids of the lines, if lines may change."""

    def see(self, lines: Sequence[RawLine]) -> None:
        """Compare the next lines."""
        if self._keeps_changed:
            for line in lines:
                self.ids.add(line.line_id)
        if not self._answers:
            return
        for line in lines:
            if line.line_id in self._answers:
                self.answered += 1
            elif self._answers.has_other(line.line_id):
                self._first_changed = self._first_changed or line.number

    def refuse_output(self) -> None:
        """
        Compare the answers in the output with all lines.

        Raises:
            OutputError: It has answers to other lines; permanent.
        """
        foreign = len(self._answers) - self.answered
        if not foreign or self._keeps_changed:
            return
        if not self.answered:
            raise OutputError(f"{self._output}: is the output of another input; choose another output")
        which = f"line {self._first_changed} has changed" if self._first_changed else "lines are gone"
        raise OutputError(
            f"{self._output}: {foreign:,} of its {len(self._answers):,} answers are to lines that {self.input_name} "
            f"does not have ({which}); --replace-changed drops these answers, or choose another output"
        )

    def refuse_line(self) -> None:
        """
        Compare the answers in the output with the lines so far, of a pipe.

        Raises:
            InputError: A line differs from the one that has an answer; permanent.
        """
        if self._first_changed is not None:
            raise InputError(
                f"{self.input_name}: line {self._first_changed} is not the one that {self._output} has an answer to; "
                "choose another output"
            )


class CheckedLines:
    """
    The lines of a pipe, looked at as they come; see `ports.LineSource`.

    Args:
        reader: Where they come from.
        check: Looks at them.
        match: Compares them with the output.
    """

    def __init__(self, reader: LineSource, check: LineCheck, match: OutputMatch) -> None:
        self._reader = reader
        self._check = check
        self._match = match
        self._failure: InputError | None = None

    @property
    def lines_read(self) -> int:
        """Lines so far."""
        return self._reader.lines_read

    @property
    def bytes_read(self) -> int:
        """Bytes so far."""
        return self._reader.bytes_read

    @property
    def bytes_total(self) -> int | None:
        """Not known of a pipe."""
        return self._reader.bytes_total

    def read_lines(self) -> Sequence[RawLine]:
        """Return the next lines; see `ports.LineSource.read_lines`.  A fault is raised after the lines before it."""
        if self._failure is not None:
            raise self._failure
        lines = self._reader.read_lines()
        for place, line in enumerate(lines):
            self._check.see([line])
            self._match.see([line])
            try:
                _refuse_repeated(self._match.input_name, self._check.result)
                self._match.refuse_line()
            except InputError as error:
                self._failure = error
                if not place:
                    raise
                return lines[:place]
        return lines


def check_lines(
    reader: LineSource, check: LineCheck, match: OutputMatch, on_progress: Callable[[LineSource], None]
) -> InputCount:
    """
    Look at all lines of an input, and return how many there are; blocks.

    Args:
        reader: The input, from its beginning.
        check: Looks at them.
        match: Compares them with the output.
        on_progress: Called after some hundred lines each.

    Raises:
        InputError: It cannot be read to its end, has a custom_id twice, or no line of it is a request; permanent.
        OutputError: The output has answers to other lines; permanent.
    """
    result = check.result
    while lines := reader.read_lines():
        check.see(lines)
        _refuse_repeated(match.input_name, result)
        match.see(lines)
        on_progress(reader)
    match.refuse_output()
    if result.lines and result.bad == result.lines:
        raise InputError(f"{match.input_name}: no line is a request; {result.faults[0]}; {EXPECTED}")
    return InputCount(lines=result.lines, answered=match.answered)


def _refuse_repeated(input_name: str, result: CheckResult) -> None:
    if result.repeated is not None:
        raise InputError(f"{input_name}: {result.repeated}")
