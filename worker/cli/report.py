"""`inference-worker report`: statistics of a finished run from the answers it wrote."""

import argparse
import json
import math
import sys
from pathlib import Path

from worker.cli.arguments import at_least_one
from worker.cli.exit_codes import EXIT_FAILED, EXIT_USAGE
from worker.cli.parser import describe
from worker.errors import WorkerError

_STANDARD = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    describe(
        parser,
        "Read the answers of a run and report their number, errors, durations and tokens, for each model and each "
        "error class. docs/report.md has the meaning of every number.",
        examples=[
            "inference-worker report answers.jsonl",
            "inference-worker report answers.jsonl --html report.html",
            "inference-worker report answers.jsonl --json | jq .total.error_rate",
            "inference-worker report answers.jsonl --price 0.15,0.60",
        ],
        exits={
            0: "the report is complete",
            EXIT_FAILED: "the answers cannot be read to their end, or the page cannot be written",
            EXIT_USAGE: "arguments cannot be used",
        },
    )
    parser.add_argument(
        "output", metavar="OUTPUT", help="answers, one per line; - is standard input; .gz and .zst work"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    form.add_argument("--html", metavar="FILE", help="write one page that opens offline; - for standard output")
    parser.add_argument(
        "--price",
        type=_price,
        action="append",
        default=[],
        metavar="[MODEL=]IN,OUT",
        help="price of a million input and output tokens, or IN,CACHED,OUT; repeat it for other models",
    )
    parser.add_argument(
        "--min-tail",
        type=at_least_one,
        default=5,
        metavar="N",
        help="mark percentiles with fewer than N answers beyond them (5)",
    )


def run(namespace: argparse.Namespace) -> int:
    """Print or write the report; return 1 when the answers could not be read to the end."""
    from worker.client.report import Price, read_report, render_page, render_text  # noqa: PLC0415 - a tenth of a second

    prices = {model: Price(**price) for model, price in namespace.price}
    report, failure = read_report(namespace.output, min_tail=namespace.min_tail, prices=prices)
    if namespace.html:
        _write(namespace.html, render_page(report))
    elif namespace.json:
        sys.stdout.write(json.dumps(report.as_dict(), indent=2, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write(render_text(report))
    if failure is not None:
        sys.stdout.flush()
        sys.stderr.write(f"inference-worker: {failure}; the report covers the lines before the fault\n")
        return 1
    return 0


def _price(text: str) -> tuple[str, dict[str, float]]:
    """Return the model, empty for all that have no price of their own, and what a million tokens cost."""
    model, _, numbers = text.rpartition("=")
    try:
        values = [float(number) for number in numbers.split(",")]
    except ValueError:
        values = []
    if len(values) not in {2, 3} or not all(math.isfinite(value) and value >= 0 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 0.15,0.60 or llama=0.15,0.075,0.60")
    return model, {"input": values[0], "cached": values[-2] if len(values) > 2 else values[0], "output": values[-1]}  # noqa: PLR2004


def _write(path: str, page: str) -> None:
    if path == _STANDARD:
        sys.stdout.write(page)
        return
    try:
        Path(path).write_text(page, "utf-8")
    except OSError as error:
        raise WorkerError(f"{path}: {error.strerror}") from None
    sys.stderr.write(f"worker: wrote {path}\n")
