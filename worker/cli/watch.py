"""`inference-worker watch`: a live view of a run from its ledger, until it is complete or Ctrl-C."""

import argparse
import json
import sys
import time
from collections import deque
from typing import Any

from worker.cli.exit_codes import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE
from worker.cli.parser import describe
from worker.cli.runs import duration, failure_lines
from worker.client.ledger import Ledger, Totals

EVERY_S = 0.5
PLAIN_EVERY_S = 5.0
"""Between two lines where standard output is no terminal."""
RATE_OVER_S = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    describe(
        parser,
        "Show how far a submitted file is: published, in flight, "
        "answered, failed with an example of each error, tokens, rate and time left.",
        examples=[
            "inference-worker watch in.jsonl.run",
            "inference-worker watch in.jsonl.run --json | jq .answered",
        ],
        exits={
            0: "every line has an answer",
            EXIT_FAILED: "answers are missing, or the ledger cannot be read",
            EXIT_USAGE: "arguments cannot be used",
            EXIT_INTERRUPTED: "interrupted",
        },
    )
    parser.add_argument("run_file", metavar="RUN", help="the ledger that `submit` made")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--once", action="store_true", help="print the state now and end")
    form.add_argument("--json", action="store_true", help="print the state now as one JSON object and end")


def run(namespace: argparse.Namespace) -> int:
    """Show the run; return the exit code: 0 when it is complete, 1 when it is not."""
    with Ledger(namespace.run_file) as ledger:
        if namespace.json:
            sys.stdout.write(json.dumps(as_dict(ledger), ensure_ascii=False) + "\n")
        elif namespace.once:
            sys.stdout.write("\n".join(view(ledger, None)) + "\n")
        else:
            _follow(ledger)
        return 0 if ledger.totals().is_complete else 1


class Rates:
    """Rates over the last `RATE_OVER_S` seconds."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, Totals]] = deque()

    def add(self, now: float, totals: Totals) -> None:
        """Note the counts at a moment; monotonic seconds."""
        self._samples.append((now, totals))
        while now - self._samples[0][0] > RATE_OVER_S:
            self._samples.popleft()

    def per_s(self, name: str) -> float | None:
        """Return how fast a count grows; `None` until two moments are known."""
        (began, first), (ended, last) = self._samples[0], self._samples[-1]
        if ended - began <= 0:
            return None
        return float(getattr(last, name) - getattr(first, name)) / (ended - began)


def view(ledger: Ledger, rates: Rates | None) -> list[str]:
    """Return the view, line by line, each of at most 79 characters."""
    totals, failures = ledger.totals(), ledger.failures()
    share = totals.answered / totals.lines if totals.lines else 0.0
    width = 40
    bar = "#" * int(width * share)
    answers_per_s = rates.per_s("answered") if rates is not None else None
    tokens_per_s = rates.per_s("output_tokens") if rates is not None else None
    left_s = (totals.lines - totals.answered) / answers_per_s if answers_per_s else None
    state = "complete" if totals.is_complete else "running" if totals.is_input_read else "being submitted"
    rows = [
        f"run {ledger.run.run_id}  {state}",
        f"[{bar.ljust(width, '.')}] {100 * share:.1f} %",
        f"lines      {totals.lines:>12,}",
        f"published  {totals.published:>12,}",
        f"in flight  {totals.published - totals.answered:>12,}",
        f"answered   {totals.answered:>12,}" + (f"   {answers_per_s:,.1f}/s" if answers_per_s is not None else ""),
        f"failed     {totals.failed:>12,}",
        f"tokens in  {totals.input_tokens:>12,}",
        f"tokens out {totals.output_tokens:>12,}" + (f"   {tokens_per_s:,.1f}/s" if tokens_per_s is not None else ""),
    ]
    if rates is not None:
        rows.append(f"time left  {duration(left_s):>12}")
    for failure in failures:
        rows += failure_lines(failure)
    return [row[:79] for row in rows]


def as_dict(ledger: Ledger) -> dict[str, Any]:
    """Return the state of a run as plain values."""
    totals = ledger.totals()
    return {
        "run_id": ledger.run.run_id,
        "input": ledger.run.input_path,
        "topic": ledger.run.topic,
        "is_complete": totals.is_complete,
        "is_input_read": totals.is_input_read,
        "lines": totals.lines,
        "published": totals.published,
        "answered": totals.answered,
        "failed": totals.failed,
        "input_tokens": totals.input_tokens,
        "output_tokens": totals.output_tokens,
        "failures": [
            {"error_class": each.error_class, "count": each.count, "line": each.number, "message": each.message}
            for each in ledger.failures()
        ],
    }


def _follow(ledger: Ledger) -> None:
    rates, is_live, height = Rates(), sys.stdout.isatty(), 0
    while True:
        totals = ledger.totals()
        rates.add(time.monotonic(), totals)
        rows = view(ledger, rates)
        if is_live:
            up = f"\x1b[{height}A" if height else ""
            sys.stdout.write(up + "".join(f"\x1b[2K{row}\n" for row in rows) + "\x1b[J")
            height = len(rows)
        else:
            share = 100 * totals.answered / totals.lines if totals.lines else 0.0
            sys.stdout.write(
                f"{totals.answered}/{totals.lines} answered ({share:.1f} %), {totals.failed} failed, "
                f"{totals.published - totals.answered} in flight\n"
            )
        sys.stdout.flush()
        if totals.is_complete:
            return
        time.sleep(EVERY_S if is_live else PLAIN_EVERY_S)
