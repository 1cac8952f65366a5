"""
The counts of a run, two frozen views of them, and the table at the end.

`Tally` counts, `Progress` is the view during the run, `Summary` the one at its end.  Memory is constant: durations go
into a sketch, and each error class keeps one example.
"""

import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.table import Table

from worker.client.io.outputs import Answer, error_message
from worker.client.sketch import QuantileSketch

_MAX_EXAMPLE_CHARS = 300
"""Of a server's message in an example: four lines of a terminal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputCount:
    """What is known of an input before the run, because every line was looked at."""

    lines: int
    """Without blank ones."""
    answered: int
    """Lines of these that the output has an answer to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorExample:
    """One answer of an error class."""

    number: int
    """Of the line, from 1."""
    message: str
    """The server's, on one line and without control characters."""
    url: str | None
    """Where the request was posted; `None` when no server was asked."""

    def as_dict(self) -> dict[str, int | str | None]:
        """Return plain values for JSON."""
        return {"line": self.number, "message": self.message, "url": self.url}

    def __str__(self) -> str:
        return f"line {self.number}: {self.message}{f' ({self.url})' if self.url else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A run at one moment; counts only grow."""

    expected_lines: int | None
    """Lines of the whole input; `None` for a pipe that has not ended."""
    skipped: int
    """Lines of these that an earlier run has answered."""
    answered: int
    """Answers written by this run."""
    errors: int
    """Answers of these that are no success."""
    waiting: int
    """Lines that were taken up and have no answer yet."""
    publish_retries: int
    """Publishes that failed and were repeated."""
    output_tokens: int
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The counts of a finished or an interrupted run."""

    is_complete: bool
    """The input was read to its end and every line has an answer."""
    lines: int
    """Lines of the input that are not blank, also those that were not read."""
    is_all_lines: bool
    """`lines` is the number in the whole input: not so of a pipe that was not read to its end."""
    skipped: int
    """Answered by an earlier run."""
    answered: int
    """Answers written by this run, with its errors."""
    unanswered: int
    """0 unless the run was interrupted."""
    status_classes: Mapping[str, int]
    """Answers by `2xx`, `4xx`, `5xx`; sorted."""
    error_classes: Mapping[str, int]
    """Error answers by class, the most frequent first."""
    examples: Mapping[str, ErrorExample]
    """One for each error class."""
    duplicates: int
    """Answers dropped because their line already had one."""
    unmatched_answers: int
    """Answers dropped because no line of this input has their id."""
    publish_retries: int
    """Publishes that failed and were repeated."""
    duration_s: float
    lines_per_s: float
    """Answers a second."""
    input_tokens: int | None
    """Sum over the answers that reported usage; `None` when none did."""
    output_tokens: int | None
    output_tokens_per_s: float | None
    backend_p50_s: float | None
    """What the backend took for the attempt that gave a good answer, within 1 %, without any time in a queue; `None`
    without such answers."""
    backend_p90_s: float | None


class Tally:
    """
    The counts of one run; not thread-safe, the event loop owns it.

    Args:
        known: What is known of the input; `None` for a pipe.
    """

    def __init__(self, known: InputCount | None = None) -> None:
        self._known = known
        self.lines = 0
        """Taken up."""
        self.skipped = 0
        self.answered = 0
        self.errors = 0
        self.duplicates = 0
        self.unmatched_answers = 0
        self.is_input_read = False
        self.examples: dict[str, ErrorExample] = {}
        self._input_tokens: int | None = None
        self._output_tokens: int | None = None
        self._statuses: Counter[str] = Counter()
        self._classes: Counter[str] = Counter()
        self._durations = QuantileSketch()

    def count(self, answer: Answer, number: int) -> ErrorExample | None:
        """Count one written answer to the line of this number; return the example if it is the first of its class."""
        example = None
        self.answered += 1
        self._statuses[f"{answer.status_code // 100}xx"] += 1
        if answer.is_error:
            self.errors += 1
            error_class = answer.error_class or "unclassified"
            self._classes[error_class] += 1
            if error_class not in self.examples:
                example = self.examples[error_class] = example_of(answer, number)
        elif answer.attempt_s is not None:
            self._durations.add(answer.attempt_s)
        if answer.input_tokens is not None:
            self._input_tokens = (self._input_tokens or 0) + answer.input_tokens
        if answer.output_tokens is not None:
            self._output_tokens = (self._output_tokens or 0) + answer.output_tokens
        return example

    def progress(self, *, duration_s: float, publish_retries: int = 0) -> Progress:
        """Return a view of the counts during a run."""
        is_known = self.is_input_read or self._known is not None
        return Progress(
            expected_lines=self._all_lines if is_known else None,
            skipped=self._all_skipped,
            answered=self.answered,
            errors=self.errors,
            waiting=self.lines - self.skipped - self.answered,
            publish_retries=publish_retries,
            output_tokens=self._output_tokens or 0,
            duration_s=duration_s,
        )

    @property
    def _all_lines(self) -> int:
        """Lines of the input; what was read in the end counts, should the file have changed meanwhile."""
        return self.lines if self.is_input_read or self._known is None else max(self.lines, self._known.lines)

    @property
    def _all_skipped(self) -> int:
        return self.skipped if self.is_input_read or self._known is None else max(self.skipped, self._known.answered)

    def summary(self, *, duration_s: float, publish_retries: int = 0) -> Summary:
        """Return the view at the end of a run that took `duration_s` seconds."""
        span = max(duration_s, 1e-9)
        return Summary(
            is_complete=self.is_input_read and self.lines == self.skipped + self.answered,
            lines=self._all_lines,
            is_all_lines=self.is_input_read or self._known is not None,
            skipped=self._all_skipped,
            answered=self.answered,
            unanswered=self._all_lines - self._all_skipped - self.answered,
            status_classes=dict(sorted(self._statuses.items())),
            error_classes=dict(sorted(self._classes.items(), key=lambda item: (-item[1], item[0]))),
            examples=dict(self.examples),
            duplicates=self.duplicates,
            unmatched_answers=self.unmatched_answers,
            publish_retries=publish_retries,
            duration_s=duration_s,
            lines_per_s=self.answered / span,
            input_tokens=self._input_tokens,
            output_tokens=self._output_tokens,
            output_tokens_per_s=None if self._output_tokens is None else self._output_tokens / span,
            backend_p50_s=self._durations.percentile(50),
            backend_p90_s=self._durations.percentile(90),
        )


def example_of(answer: Answer, number: int) -> ErrorExample:
    """Return an error answer as an example of its class."""
    return ErrorExample(number=number, message=one_line(error_message(answer)), url=answer.url)


def one_line(text: str) -> str:
    """Return a server's words for a terminal: bounded, on one line, without characters that a terminal would obey."""
    words = " ".join(text[: 4 * _MAX_EXAMPLE_CHARS].split())
    shown = "".join(char if char.isprintable() else "\ufffd" for char in words)
    return shown if len(shown) <= _MAX_EXAMPLE_CHARS else shown[: _MAX_EXAMPLE_CHARS - 1] + "…"


def say(text: str) -> None:
    """Write lines to standard error; for a terminal of 80 columns they are broken between words."""
    if sys.stderr.isatty():
        text = "\n".join(
            textwrap.fill(line, 79, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
            for line in text.split("\n")
        )
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def print_summary(summary: Summary, stream: TextIO) -> None:
    """
    Write the table, and one example of each error class; colours only on a terminal.

    Args:
        summary: Of a finished or an interrupted run.
        stream: Standard error, so that answers on standard output stay clean.
    """
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in rows(summary):
        table.add_row(name, value)
    console = Console(file=stream, highlight=False)
    console.print(headline(summary), style="bold", soft_wrap=True)
    console.print(table)
    if summary.examples:
        console.print("one example of each error:", style="bold")
        for error_class in summary.error_classes:
            console.print(f"  {error_class}, {summary.examples[error_class]}", markup=False)


def headline(summary: Summary) -> str:
    """Return the first line of the summary: is the run complete, and how many lines are answered."""
    total = summary.skipped + summary.answered
    if not summary.is_complete:
        of_all = f" of {summary.lines:,}" if summary.is_all_lines else ""
        return f"stopped: {total:,}{of_all} lines answered"
    if total == 0:
        return "nothing to answer"
    errors = sum(summary.error_classes.values())
    return f"all {total:,} lines answered" + (f", {errors:,} with an error" if errors else "")


def rows(summary: Summary) -> Iterator[tuple[str, str]]:
    """Yield name and value of each row; a count of 0 has no row."""
    yield "lines", f"{summary.lines:,}" + ("" if summary.is_all_lines else " read so far")
    yield "answered", f"{summary.answered:,}"
    counts = {
        "answered before": summary.skipped,
        "not answered": summary.unanswered,
        **{f"status {name}": count for name, count in summary.status_classes.items()},
        **{f"error {name}": count for name, count in summary.error_classes.items()},
        "duplicates dropped": summary.duplicates,
        "unmatched answers dropped": summary.unmatched_answers,
        "publishes repeated": summary.publish_retries,
    }
    yield from ((name, f"{count:,}") for name, count in counts.items() if count)
    yield "duration", f"{summary.duration_s:,.2f} s"
    yield "rate", f"{summary.lines_per_s:,.1f} lines/s"
    if summary.backend_p50_s is not None and summary.backend_p90_s is not None:
        yield "backend time p50", f"{summary.backend_p50_s:,.3f} s"
        yield "backend time p90", f"{summary.backend_p90_s:,.3f} s"
    if summary.input_tokens is not None:
        yield "input tokens", f"{summary.input_tokens:,}"
    if summary.output_tokens is not None and summary.output_tokens_per_s is not None:
        yield "output tokens", f"{summary.output_tokens:,} ({summary.output_tokens_per_s:,.1f}/s)"
