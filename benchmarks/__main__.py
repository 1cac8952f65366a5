"""
All benchmarks: `make bench`, or `python -m benchmarks [--short] [--write docs/performance.md]`.

Each runs in a process of its own, one after the other, and prints its own table.  Figures count only on a machine that
does nothing else; rates drift by a third on virtual machines, ratios do not.
"""

import argparse
import subprocess
import sys
from pathlib import Path

BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
BENCHMARKS: dict[str, tuple[list[str], list[str]]] = {
    "The whole pipeline": (["-m", "benchmarks.pipeline"], ["--messages", "3000", "--rounds", "1"]),
    "The embedded Pub/Sub server": (["benchmarks/localpubsub.py"], ["--messages", "10000", "--rounds", "1"]),
    "The simulated backend": (["benchmarks/simbackend.py"], ["--requests", "2000"]),
    "Server-sent events": (["benchmarks/sse.py"], ["--repeat", "2"]),
    "Scaling, a model": (["-m", "benchmarks.scaling"], []),
    "The gate": (["-m", "benchmarks.gate"], ["--admissions", "5000", "--rounds", "1"]),
    "The adaptive window": (["benchmarks/window.py"], ["--seeds", "1", "--only", "short"]),
}


def main() -> int:
    """Run them; return the exit code of the first that failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--short", action="store_true", help="a quick form that only shows that they run")
    parser.add_argument("--only", default="", help="benchmarks whose name holds this text")
    parser.add_argument("--write", type=Path, help="put the figures into this document, between its marks")
    options = parser.parse_args()
    sections: list[str] = []
    for name, (command, short) in BENCHMARKS.items():
        if options.only not in name:
            continue
        line = [*command, *(short if options.short else [])]
        print(f"## {name}: python {' '.join(line)}", flush=True)
        done = subprocess.run([sys.executable, *line], capture_output=True, text=True, check=False)
        print(done.stdout, done.stderr, flush=True)
        if done.returncode:
            return done.returncode
        table = "\n".join(row for row in done.stdout.splitlines() if row.startswith("|"))
        text = table or f"```\n{done.stdout.strip()}\n```"
        sections.append(f"### {name}\n\n`python {' '.join(line)}`\n\n{text}\n")
    if options.write is not None:
        head, rest = options.write.read_text("utf-8").split(BEGIN)
        figures = "\n".join(sections)
        options.write.write_text(f"{head}{BEGIN}\n\n{figures}\n{END}{rest.split(END)[1]}", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
