"""The table at the end of a run, on standard error."""

from collections.abc import Iterator
from typing import TextIO

from rich.console import Console
from rich.table import Table

from worker.client.tally import Summary


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
    """Return what a person wants to know first."""
    total = summary.skipped + summary.answered
    if not summary.is_complete:
        return f"stopped: {total} lines answered, {summary.unanswered} waiting"
    return "nothing to answer" if total == 0 else f"all {total} lines answered"


def rows(summary: Summary) -> Iterator[tuple[str, str]]:
    """Yield name and value of each row; what did not happen has none."""
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
