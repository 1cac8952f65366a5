"""
All benchmarks: `make bench`, or `python -m benchmarks [NAME...] [--short] [--write docs/performance.md]`.

Each runs in a process of its own, one after the other, and prints its own table.  Figures count only on a machine that
does nothing else; rates drift by a third on virtual machines, ratios do not.
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark; its own module has more options."""

    title: str
    command: list[str]
    short: list[str]
    """Options of a form that only shows that it runs."""
    has_figures: bool = True
    """Its table belongs to the page of figures."""


BENCHMARKS = {
    "pipeline": Benchmark(
        title="The whole pipeline",
        command=["-m", "benchmarks.pipeline"],
        short=["--messages", "3000", "--rounds", "1"],
    ),
    "start": Benchmark(title="The start", command=["-m", "benchmarks.start"], short=["--rounds", "1"]),
    "attempt": Benchmark(
        title="One HTTP attempt", command=["-m", "benchmarks.attempt"], short=["--requests", "1000", "--rounds", "1"]
    ),
    "localpubsub": Benchmark(
        title="The embedded Pub/Sub server",
        command=["benchmarks/localpubsub.py"],
        short=["--messages", "10000", "--rounds", "1"],
    ),
    "simbackend": Benchmark(
        title="The simulated backend", command=["benchmarks/simbackend.py"], short=["--requests", "2000"]
    ),
    "sse": Benchmark(title="Server-sent events", command=["benchmarks/sse.py"], short=["--repeat", "2"]),
    "scaling": Benchmark(title="Scaling, a model", command=["-m", "benchmarks.scaling"], short=[]),
    "gate": Benchmark(
        title="The gate", command=["-m", "benchmarks.gate"], short=["--admissions", "5000", "--rounds", "1"]
    ),
    "window": Benchmark(
        title="The adaptive window", command=["benchmarks/window.py"], short=["--seeds", "1", "--only", "short"]
    ),
    "batches": Benchmark(
        title="Files and batches",
        command=["-m", "benchmarks.batches"],
        short=["--lines", "2000", "--batches", "2000", "--requests", "50", "--fair-lines", "2000"],
    ),
    "traffic": Benchmark(
        title="Deadlines, tenants, people beside a batch, documents, on virtual time",
        command=["-m", "benchmarks.traffic"],
        short=["order", "--seeds", "1"],
        has_figures=False,
    ),
    "mixed": Benchmark(
        title="Messages that always fail beside healthy ones",
        command=["-m", "benchmarks.mixed", "--attempts", "5", "--scenario", "fresh"],
        short=["--short"],
        has_figures=False,
    ),
}


def main() -> int:
    """Run them until one fails; return its exit code.  That of `mixed`, the last one, says that a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"only these: {', '.join(BENCHMARKS)}")
    parser.add_argument("--short", action="store_true", help="a quick form that only shows that they run")
    parser.add_argument("--write", type=Path, help="put the figures into this document, between its marks")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}")
    sections: list[str] = []
    failed = 0
    for name in options.names or BENCHMARKS:
        benchmark = BENCHMARKS[name]
        line = [*benchmark.command, *(benchmark.short if options.short else [])]
        print(f"## {benchmark.title}: python {' '.join(line)}", flush=True)
        done = subprocess.run([sys.executable, *line], capture_output=True, text=True, check=False)
        print(done.stdout, done.stderr, flush=True)
        if done.returncode:
            failed = failed or done.returncode
            if benchmark.has_figures:
                return failed
        elif benchmark.has_figures:
            table = "\n".join(row for row in done.stdout.splitlines() if row.startswith("|"))
            text = table or f"```\n{done.stdout.strip()}\n```"
            sections.append(f"## {benchmark.title}\n\n`python {' '.join(line)}`\n\n{text}\n")
    if options.write is not None:
        head, rest = options.write.read_text("utf-8").split(BEGIN)
        figures = "\n".join(sections)
        options.write.write_text(f"{head}{BEGIN}\n\n{figures}\n{END}{rest.split(END)[1]}", "utf-8")
    return failed


if __name__ == "__main__":
    sys.exit(main())
