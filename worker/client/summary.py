"""
The counts of a run, two frozen views of them, and the table at the end.

`Tally` counts, `Progress` is the view during the run, `Summary` the one at its end.  Memory is constant: latencies go
into a sketch.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.table import Table

from worker.client.io.outputs import Answer
from worker.client.sketch import QuantileSketch


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A run at one moment; counts only grow."""

    lines: int
    """Lines taken up so far, without blank ones."""
    skipped: int
    """Lines of these that an earlier run has answered."""
    answered: int
    """Answers written by this run."""
    errors: int
    """Answers of these that are no success."""
    publish_retries: int
    """Publishes that failed and were repeated."""
    output_tokens: int
    lines_read: int
    """Lines read from the input so far; more than `lines`, which waits for room."""
    bytes_read: int
    """Bytes of the file read so far."""
    bytes_total: int | None
    """Size of the input file; `None` for a pipe."""
    is_input_read: bool
    """The input has ended, so that `lines` is final."""
    duration_s: float

    @property
    def unanswered(self) -> int:
        """Lines taken up that have no answer yet."""
        return self.lines - self.skipped - self.answered

    @property
    def expected_lines(self) -> int | None:
        """Lines of the whole input: known at its end, estimated from bytes before; `None` for a pipe."""
        if self.is_input_read:
            return self.lines
        if not self.bytes_total or not self.bytes_read:
            return None
        return max(self.lines_read, round(self.lines_read * self.bytes_total / self.bytes_read))


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The counts of a finished or an interrupted run."""

    is_complete: bool
    """The input was read to its end and every line has an answer."""
    lines: int
    """Lines of the input that are not blank, as far as it was read."""
    skipped: int
    """Answered by an earlier run."""
    answered: int
    """Answers written by this run, with its errors."""
    unanswered: int
    """Taken up and not answered: 0 unless the run was interrupted."""
    status_classes: Mapping[str, int]
    """Answers by `2xx`, `4xx`, `5xx`; sorted."""
    error_classes: Mapping[str, int]
    """Error answers by class, the most frequent first."""
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
    latency_p50_s: float | None
    """From the publish of a line to its answer, within 1 %; `None` without answers from the broker."""
    latency_p90_s: float | None


class Tally:
    """The counts of one run; not thread-safe, the event loop owns it."""

    def __init__(self) -> None:
        self.lines = 0
        self.skipped = 0
        self.answered = 0
        self.errors = 0
        self.duplicates = 0
        self.unmatched_answers = 0
        self.publish_retries = 0
        self._input_tokens: int | None = None
        self._output_tokens: int | None = None
        self._statuses: Counter[str] = Counter()
        self._classes: Counter[str] = Counter()
        self._latencies = QuantileSketch()

    def count(self, answer: Answer, latency_s: float | None) -> None:
        """Count one written answer; `latency_s` is `None` for a line that was not published."""
        self.answered += 1
        self._statuses[f"{answer.status_code // 100}xx"] += 1
        if answer.is_error:
            self.errors += 1
            self._classes[answer.error_class or "unclassified"] += 1
        if answer.input_tokens is not None:
            self._input_tokens = (self._input_tokens or 0) + answer.input_tokens
        if answer.output_tokens is not None:
            self._output_tokens = (self._output_tokens or 0) + answer.output_tokens
        if latency_s is not None:
            self._latencies.add(latency_s)

    def progress(
        self, *, duration_s: float, lines_read: int, bytes_read: int, bytes_total: int | None, is_input_read: bool
    ) -> Progress:
        """Return a view of the counts during a run."""
        return Progress(
            lines=self.lines,
            skipped=self.skipped,
            answered=self.answered,
            errors=self.errors,
            publish_retries=self.publish_retries,
            output_tokens=self._output_tokens or 0,
            lines_read=lines_read,
            bytes_read=bytes_read,
            bytes_total=bytes_total,
            is_input_read=is_input_read,
            duration_s=duration_s,
        )

    def summary(self, *, duration_s: float, is_input_read: bool) -> Summary:
        """Return the view at the end of a run that took `duration_s` seconds."""
        span = max(duration_s, 1e-9)
        return Summary(
            is_complete=is_input_read and self.lines == self.skipped + self.answered,
            lines=self.lines,
            skipped=self.skipped,
            answered=self.answered,
            unanswered=self.lines - self.skipped - self.answered,
            status_classes=dict(sorted(self._statuses.items())),
            error_classes=dict(sorted(self._classes.items(), key=lambda item: (-item[1], item[0]))),
            duplicates=self.duplicates,
            unmatched_answers=self.unmatched_answers,
            publish_retries=self.publish_retries,
            duration_s=duration_s,
            lines_per_s=self.answered / span,
            input_tokens=self._input_tokens,
            output_tokens=self._output_tokens,
            output_tokens_per_s=None if self._output_tokens is None else self._output_tokens / span,
            latency_p50_s=self._latencies.percentile(50),
            latency_p90_s=self._latencies.percentile(90),
        )


def print_summary(summary: Summary, stream: TextIO) -> None:
    """
    Write the table; colours only on a terminal.

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


def headline(summary: Summary) -> str:
    """Return the first line of the summary: is the run complete, and how many lines are answered."""
    total = summary.skipped + summary.answered
    if not summary.is_complete:
        return f"stopped: {total} lines answered, {summary.unanswered} waiting"
    return "nothing to answer" if total == 0 else f"all {total} lines answered"


def rows(summary: Summary) -> Iterator[tuple[str, str]]:
    """Yield name and value of each row; a count of 0 has no row."""
    yield "lines", f"{summary.lines:,}"
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
    if summary.latency_p50_s is not None and summary.latency_p90_s is not None:
        yield "latency p50", f"{summary.latency_p50_s:,.3f} s"
        yield "latency p90", f"{summary.latency_p90_s:,.3f} s"
    if summary.input_tokens is not None:
        yield "input tokens", f"{summary.input_tokens:,}"
    if summary.output_tokens is not None and summary.output_tokens_per_s is not None:
        yield "output tokens", f"{summary.output_tokens:,} ({summary.output_tokens_per_s:,.1f}/s)"
