"""
What a burst costs, by the targets of the autoscaler: `python -m benchmarks.scaling --burst 3000 --seconds 20`.

Plays the model of scaling_model.py and prints, for each target, when the queue was empty, what it cost in pod-hours and
how many requests a scale-down cut.  The row marked * is the target that the formula gives for the wait you accept.
`--write docs/scaling.md` renews the tables there.  The model is deterministic: the same options, the same table.
"""

import argparse
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.scaling_model import Arrivals, Plant, Result, Scaler, burst, formula, simulate, steady

BEGIN, END = "<!-- figures: {} -->", "<!-- end of figures -->"
WAIT_S = 180.0
"""The metric's own lag: no shorter wait can be had by the backlog alone."""
LOAD_SHARE = 0.8


def targets(window: int, wait_s: float, seconds: float) -> list[float]:
    """Return the targets that a table compares: powers of two of the window, and the formula's."""
    return sorted({*(float(window * times) for times in (1, 4, 8, 16)), formula(window, wait_s, seconds)})


def rows(arrivals: list[tuple[float, int]], plant: Plant, scaler: Scaler, wait_s: float) -> Iterator[str]:
    """Yield the lines of a table: every target, with and without the workers' own gauge."""
    chosen = formula(plant.window, wait_s, plant.seconds)
    yield "| target | empty after | 95 % began within | most pods | pod-hours | cut | without the load trigger |"
    yield "|---:|---:|---:|---:|---:|---:|---|"
    for target in targets(plant.window, wait_s, plant.seconds):
        both = simulate(arrivals, plant, replace(scaler, target=target))
        alone = simulate(arrivals, plant, replace(scaler, target=target, load_target=None))
        mark = " *" if target == chosen else ""
        yield f"| {target:g}{mark} | {_costs(both)} | {_short(alone)} |"


def _costs(result: Result) -> str:
    hours = _hours(result.pod_hours)
    return f"{result.drained_s:,.0f} s | {result.wait_s:,.0f} s | {result.peak} | {hours} | {result.cut:,}"


def _hours(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _short(result: Result) -> str:
    cut = f", {result.cut:,} cut" if result.cut else ""
    return f"{result.drained_s:,.0f} s, {_hours(result.pod_hours)} pod-hours{cut}"


def formula_rows(waits: Iterable[float], plant: Plant, per_s: float, duration_s: float) -> Iterator[str]:
    """Yield a table of what the formula promises and what the model gives, for a steady stream of requests."""
    arrivals = list(steady(per_s, duration_s))
    yield "| W accepted | target | 95 % began within | pod-hours | with the load trigger |"
    yield "|---:|---:|---:|---:|---|"
    for wait_s in waits:
        target = formula(plant.window, wait_s, plant.seconds)
        alone = simulate(arrivals, plant, Scaler(target=target, load_target=None))
        both = simulate(arrivals, plant, Scaler(target=target))
        yield (
            f"| {wait_s:,.0f} s | {target:g} | {alone.wait_s:,.0f} s | {alone.pod_hours:.1f} "
            f"| {both.wait_s:,.0f} s, {both.pod_hours:.1f} pod-hours |"
        )


def figures() -> dict[str, list[str]]:
    """Return every table of docs/scaling.md by its name."""
    spot, plain = Plant(seconds=60, drain_s=8), Plant()
    return {
        "3,000 of 20 s": list(rows(burst(3_000), plain, Scaler(), WAIT_S)),
        "20,000 of 60 s": list(rows(burst(20_000), replace(plain, seconds=60), Scaler(), WAIT_S)),
        "20,000 of 60 s, Spot": list(rows(burst(20_000), spot, Scaler(), WAIT_S)),
        "1,000 of 2 s": list(rows(burst(1_000), replace(plain, seconds=2), Scaler(), WAIT_S)),
        "3,000 of 20 s, from zero": list(rows(burst(3_000), plain, Scaler(minimum=0), WAIT_S)),
        "steady": list(formula_rows((180, 300, 600, 1_200), plain, per_s=5, duration_s=2 * 3_600)),
    }


def renew(text: str, tables: dict[str, list[str]]) -> str:
    """Return the document with the tables between their marks."""
    for name, lines in tables.items():
        begin, body = re.escape(BEGIN.format(name)), "\n".join(lines)
        text, count = re.subn(
            rf"({begin}\n).*?({re.escape(END)})", lambda m, b=body: f"{m[1]}\n{b}\n\n{m[2]}", text, flags=re.DOTALL
        )
        if count != 1:
            raise SystemExit(f"the document has {count} places for {name}")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--burst", type=int, default=3_000, metavar="MESSAGES")
    parser.add_argument(
        "--per-second", type=float, metavar="R", help="instead of a burst: so many a second for an hour"
    )
    parser.add_argument("--seconds", type=float, default=20, metavar="S", help="mean time of a request (20)")
    parser.add_argument("--window", type=int, default=16, metavar="N", help="requests that a pod runs at once (16)")
    parser.add_argument("--wait", type=float, default=WAIT_S, metavar="W", help="the wait you accept (180)")
    parser.add_argument("--minimum", type=int, default=1, metavar="PODS")
    parser.add_argument("--maximum", type=int, default=50, metavar="PODS")
    parser.add_argument("--start", type=float, default=30, metavar="S", help="until a new pod pulls (30)")
    parser.add_argument("--drain", type=float, default=540, metavar="S", help="drain.grace_s (540; Spot: 8)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="renew the tables of a document instead")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Print a table, or renew a document's."""
    given = _parser().parse_args(arguments)
    if given.write is not None:
        given.write.write_text(renew(given.write.read_text("utf-8"), figures()), "utf-8")
        return
    plant = Plant(window=given.window, seconds=given.seconds, start_s=given.start, drain_s=given.drain)
    load = float(round(LOAD_SHARE * given.window))
    scaler = Scaler(load_target=load, minimum=given.minimum, maximum=given.maximum)
    arrivals: Arrivals = burst(given.burst) if given.per_second is None else steady(given.per_second, 3_600)
    print("\n".join(rows(list(arrivals), plant, scaler, given.wait)))


if __name__ == "__main__":
    main()
