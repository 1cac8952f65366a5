"""
Look at the lines of an input before anything is done about them: how many there are, and what is wrong.

Found here, with the number of the line, before a request is sent: two lines with the same custom_id, whose answers
could not be told apart; lines that changed since the output has an answer to them, and outputs of another input; an
input of which no line is a request.  A single bad line is no fault: the worker answers it with an error.

A file is read once more for this, about 25,000 lines a second.  The lines of a pipe are looked at as they come
(`CheckedLines`).  Memory is constant: the custom_ids go into a temporary database, which SQLite keeps on the disk when
it is large.
"""

import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from worker.client.errors import InputError, OutputError
from worker.client.io.lines import Prepared, RawLine, Shape, prepare
from worker.client.ports import LineSource
from worker.client.resume import AnsweredLines
from worker.client.summary import InputCount
from worker.errors import MessageError
from worker.wire.message import decode_request

MAX_MODELS = 100
"""Names of models that are counted; requesters choose them."""
EXPECTED = 'expected {"path": "/v1/chat/completions", "body": {...}} or OpenAI batch lines'


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
    answered: int = 0
    """Lines that the output has an answer to."""
    bad: int = 0
    """Lines that are no requests."""
    first_bad: str | None = None
    """Number of the first of these lines, and what is wrong with it."""
    models: dict[str, ModelUse] = field(default_factory=dict)
    """By name; lines without a model are not in it."""

    @property
    def count(self) -> InputCount:
        """What a run needs of it."""
        return InputCount(lines=self.lines, answered=self.answered)


class LineCheck:
    """
    Looks at one line after another; use it from one thread at a time.

    Args:
        input_name: For messages.
        output_name: For messages.
        answered: Ids of the answers in the output.
        keeps_changed: Lines that changed are no fault: their old answers go.
    """

    def __init__(
        self, input_name: str, output_name: str, answered: AnsweredLines, *, keeps_changed: bool = False
    ) -> None:
        self.input_name = input_name
        self._output = output_name
        self._answered = answered
        self._keeps_changed = keeps_changed
        self._ids: sqlite3.Connection | None = None
        self._first_changed: int | None = None
        self.result = CheckResult()
        self.ids = AnsweredLines()
        """Ids of the lines, if lines may change."""

    def see(self, lines: Sequence[RawLine]) -> None:
        """
        Look at the next lines.

        Raises:
            InputError: A custom_id stands twice; permanent.
        """
        batch: list[tuple[str, int]] = []
        for line in lines:
            self.result.lines += 1
            if self._keeps_changed:
                self.ids.add(line.line_id)
            if self._answered:
                self._compare(line)
            prepared = prepare(line)
            if prepared.shape is Shape.BATCH and prepared.custom_id != b"null":
                batch.append((msgspec.json.decode(prepared.custom_id, type=str), line.number))
            self._judge(prepared, line.number)
        if batch:
            self._note_ids(batch)

    def _compare(self, line: RawLine) -> None:
        if line.line_id in self._answered:
            self.result.answered += 1
        elif self._answered.has_other(line.line_id):
            self._first_changed = self._first_changed or line.number

    def _judge(self, prepared: Prepared, number: int) -> None:
        fault = None if prepared.refusal is None else prepared.refusal.message
        if fault is None:
            try:
                self._note_model(decode_request(prepared.data).model, number)
            except MessageError as error:
                fault = error.reason
        if fault is not None:
            self.result.bad += 1
            self.result.first_bad = self.result.first_bad or f"line {number}: {fault}"

    def _note_model(self, name: str | None, number: int) -> None:
        if name is not None and (name in self.result.models or len(self.result.models) < MAX_MODELS):
            self.result.models.setdefault(name, ModelUse(first=number)).count += 1

    def _note_ids(self, batch: Sequence[tuple[str, int]]) -> None:
        if self._ids is None:
            self._ids = sqlite3.connect("", isolation_level=None, check_same_thread=False)
            self._ids.execute("CREATE TABLE ids (custom_id TEXT PRIMARY KEY, number INTEGER) WITHOUT ROWID")
            self._ids.execute("BEGIN")
        for custom_id, number in batch:
            try:
                self._ids.execute("INSERT INTO ids VALUES (?, ?)", (custom_id, number))
            except sqlite3.IntegrityError:
                query = "SELECT number FROM ids WHERE custom_id = ?"
                (first,) = self._ids.execute(query, (custom_id,)).fetchone()
                raise InputError(
                    f"{self.input_name}: line {number}: custom_id {custom_id!r} is that of line {first} too"
                ) from None

    def check_output(self) -> None:
        """
        Compare the answers in the output with all lines.

        Raises:
            OutputError: It has answers to other lines; permanent.
        """
        foreign = len(self._answered) - self.result.answered
        if not foreign or self._keeps_changed:
            return
        if not self.result.answered:
            raise OutputError(f"{self._output}: is the output of another input; choose another output")
        which = f"line {self._first_changed} has changed" if self._first_changed else "lines are gone"
        raise OutputError(
            f"{self._output}: {foreign:,} of its {len(self._answered):,} answers are to lines that {self.input_name} "
            f"does not have ({which}); --replace-changed drops these answers, or choose another output"
        )

    def check_pipe(self) -> None:
        """
        Compare the answers in the output with the lines so far.

        Raises:
            InputError: A line differs from the one that has an answer; permanent.
        """
        if self._first_changed is not None:
            raise InputError(
                f"{self.input_name}: line {self._first_changed} is not the one that {self._output} has an answer to; "
                "choose another output"
            )

    def close(self) -> None:
        """Remove the temporary database; idempotent."""
        if self._ids is not None:
            self._ids.close()
            self._ids = None


class CheckedLines:
    """
    The lines of a pipe, looked at as they come; see `ports.LineSource`.

    Args:
        reader: Where they come from.
        check: Looks at them.
    """

    def __init__(self, reader: LineSource, check: LineCheck) -> None:
        self._reader = reader
        self._check = check
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
            try:
                self._check.see([line])
                self._check.check_pipe()
            except InputError as error:
                self._failure = error
                if not place:
                    raise
                return lines[:place]
        return lines


def check_lines(reader: LineSource, check: LineCheck, on_progress: Callable[[LineSource], None]) -> None:
    """
    Look at all lines of an input; blocks.

    Args:
        reader: The input, from its beginning.
        check: Looks at them.
        on_progress: Called after some hundred lines each.

    Raises:
        InputError: It cannot be read to its end, has a custom_id twice, or no line of it is a request; permanent.
        OutputError: The output has answers to other lines; permanent.
    """
    while lines := reader.read_lines():
        check.see(lines)
        on_progress(reader)
    check.check_output()
    result = check.result
    if result.lines and result.bad == result.lines:
        raise InputError(f"{check.input_name}: no line is a request; {result.first_bad}; {EXPECTED}")
