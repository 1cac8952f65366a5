"""
How well the adaptive window finds a hidden, changing capacity, beside other projects' rules.

::

    python -m benchmarks.window                      # everything, five seeds: a few minutes, one core, virtual time
    python -m benchmarks.window --seeds 2 --only "chat, streamed"
    python -m benchmarks.window --long               # a table for each scenario, with every number of every rule
    python -m benchmarks.window --without sizes      # the worker does not know how long the answers are
    python -m benchmarks.window --trace "chat, streamed, queue of C"      # second by second, our rule

For each scenario a sweep first finds the best fixed window of each phase; a rule that switches between those at the
very instant of the change is the 100 % of the table.  Printed are medians over the seeds:

* goodput: work done, of what that rule does;
* refused: share of the attempts that got a 429;
* found: seconds until a new capacity was found: nine tenths of a larger one in use; of a smaller one, counted from when
  the backend itself has come down to it, the window at most half as large again.  `-` when it was not found at all.
  In front of an engine the capacity is the smallest of the best fixed windows;
* wait: mean seconds a request stood in the backend's queue.
"""

import argparse
import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from benchmarks.window_model import Phase, Result, Rule, Scenario
from benchmarks.window_rules import OTHER_RULES, Fixed
from benchmarks.window_sim import Simulation
from worker.emulators.openai.engine_model import LLAMA_8B_H100, LLAMA_70B_2_H100
from worker.flow.clock import Now
from worker.flow.window.adaptive import AdaptiveWindow

OURS = "this window"
FACTORS = (0.75, 1.0, 1.125, 1.25, 1.5, 2.0)
ENGINE_WINDOWS = (16, 32, 64, 96, 128, 192, 256, 384, 512)
MAXIMUM = 128
ENGINE_MAXIMUM = 512
"""Largest window of every rule that has one."""
KINDS = {
    "short": ("0.2 s", 60.0, False, True),
    "mixed": ("mixed", 300.0, False, True),
    "mixed, sizes unknown": ("mixed", 300.0, False, False),
    "mixed, streamed": ("mixed", 300.0, True, True),
    "chat": ("chat", 300.0, False, True),
    "chat, streamed": ("chat", 300.0, True, True),
}
SIZES = {"0.2 s": "short", "mixed": "mixed", "chat": "llm"}
WITHOUT: dict[str, dict[str, Any]] = {"sizes": {"tokens": False}, "connections": {"connections": False}}
BACKENDS = {
    "queue of C": (1.0, None),
    "no queue": (0.0, None),
    "no queue, Retry-After 1 s": (0.0, 1.0),
    "queue without end": (math.inf, None),
}


def steps(seconds: float, *capacities: int) -> tuple[Phase, ...]:
    """Return phases of equal length."""
    return tuple(Phase(seconds=seconds, capacity=capacity) for capacity in capacities)


def scenarios() -> Iterable[Scenario]:
    """Yield every scenario of the table."""
    for (kind, (sizes, seconds, streamed, tokens)), (backend, (queue, retry_after_s)) in itertools.product(
        KINDS.items(), BACKENDS.items()
    ):
        yield Scenario(
            name=f"{kind}, {backend}",
            sizes=SIZES[sizes],
            phases=steps(seconds, 32, 8, 64),
            queue=queue,
            retry_after_s=retry_after_s,
            streamed=streamed,
            tokens=tokens,
        )
    chat: dict[str, Any] = {"sizes": "llm", "streamed": True}
    short_steps, chat_steps = steps(60.0, 32, 8, 64), steps(300.0, 32, 8, 64)
    yield Scenario(name="short, 2 % slower for each other", sizes="short", phases=short_steps, slowdown=0.02)
    yield Scenario(name="chat, 2 % slower for each other", sizes="llm", phases=chat_steps, slowdown=0.02)
    yield Scenario(name="chat, streamed, 2 % slower for each other", phases=chat_steps, slowdown=0.02, **chat)
    yield Scenario(name="short, shared processor", sizes="short", phases=short_steps, sharing=True)
    yield Scenario(name="chat, streamed, shared processor", phases=chat_steps, sharing=True, **chat)
    yield Scenario(name="short, refuses connections 60 s", sizes="short", phases=steps(60.0, 32, 0, 32), queue=1.0)
    yield Scenario(name="chat, refuses connections 60 s", sizes="llm", phases=_gap(0), queue=1.0)
    yield Scenario(name="chat, streamed, refuses connections 60 s", phases=_gap(0), queue=1.0, **chat)
    yield Scenario(name="chat, streamed, 429 for all 60 s", phases=_gap(32), queue=1.0, retry_after_s=2.0, **chat)
    for queue, backend in ((1.0, "queue of C"), (math.inf, "queue without end")):
        yield Scenario(name=f"short, then chat, then short, {backend}", sizes="short", phases=_shift(), queue=queue)
    yield Scenario(name="short, 4 workers", sizes="short", phases=steps(60.0, 64, 32, 128), queue=1.0, workers=4)
    yield Scenario(name="chat, streamed, 4 workers", phases=steps(300.0, 64, 32, 128), queue=1.0, workers=4, **chat)
    yield from engine_scenarios()


def engine_scenarios() -> Iterable[Scenario]:
    """Yield the scenarios in front of an inference engine; `compare` finds the capacity of their phases."""
    few = dataclasses.replace(LLAMA_8B_H100, max_sequences=256)
    kinds = {
        "chat": ("engine chat", LLAMA_8B_H100, 600.0, True, True),
        "chat, 256 sequences": ("engine chat", few, 600.0, True, True),
        "long prompts": ("engine long prompts", LLAMA_70B_2_H100, 900.0, True, True),
        "short answers": ("engine answers", LLAMA_8B_H100, 120.0, True, True),
        "embeddings": ("engine embeddings", LLAMA_8B_H100, 120.0, False, False),
    }
    for kind, (sizes, engine, seconds, is_text, tokens) in kinds.items():
        for streamed in (True, False) if is_text else (False,):
            yield Scenario(
                name=f"engine, {kind}{', streamed' if streamed else ''}",
                sizes=sizes,
                phases=(Phase(seconds=seconds, capacity=1),),
                engine=engine,
                streamed=streamed,
                tokens=tokens,
                leased=1024,
            )
    for streamed in (True, False):
        name = f"engine, chat, 256 sequences{', streamed' if streamed else ''}"
        engine: dict[str, Any] = {"sizes": "engine chat", "engine": few, "streamed": streamed, "leased": 1024}
        alone, beside = Phase(seconds=300.0, capacity=1), Phase(seconds=300.0, capacity=1, others_per_s=15.0)
        yield Scenario(name=f"{name}, others come and go", phases=(alone, beside, alone), **engine)
        yield Scenario(name=f"{name}, 4 workers", phases=(Phase(seconds=600.0, capacity=1),), workers=4, **engine)


def _shift() -> tuple[Phase, ...]:
    return (
        Phase(seconds=60.0, capacity=32),
        Phase(seconds=300.0, capacity=32, sizes="llm"),
        Phase(seconds=60.0, capacity=32),
    )


def _gap(capacity: int) -> tuple[Phase, ...]:
    return (
        Phase(seconds=300.0, capacity=32),
        Phase(seconds=60.0, capacity=capacity, storm=capacity > 0),
        Phase(seconds=300.0, capacity=32),
    )


def ours(now: Now, maximum: int) -> Rule:
    """Build our rule, with bounds that are no help."""
    return AdaptiveWindow(8, 1, maximum, now=now)


def best_fixed(scenario: Scenario) -> dict[float, int]:
    """Sweep fixed windows through each phase alone; return the best for each phase's start."""
    schedule: dict[float, int] = {}
    at = 0.0
    for phase in scenario.phases:
        schedule[at] = max(1, _best(scenario, phase)) if phase.capacity and not phase.storm else 1
        at += phase.seconds
    return schedule


def _best(scenario: Scenario, phase: Phase) -> int:
    share = phase.capacity / scenario.workers
    candidates = {max(1, round(share * factor)) for factor in FACTORS} | {64 // scenario.workers}
    if scenario.engine is not None:
        candidates = {max(1, window // scenario.workers) for window in ENGINE_WINDOWS}
    alone = dataclasses.replace(scenario, phases=(phase,))
    results = [(Simulation(alone, partial(Fixed, limit=n), 0).run(), n) for n in sorted(candidates)]
    most = max(result.work for result, _ in results)
    # Among those that do as much within half a per cent, the one that is refused least.
    return min((result.rejected_share, n) for result, n in results if result.work >= 0.995 * most)[1]


@dataclasses.dataclass(frozen=True)
class Row:
    """One rule in one scenario; medians over the seeds."""

    goodput: float
    refused: float
    found: str
    wait_s: float

    @staticmethod
    def of(results: list[Result], best: list[Result]) -> "Row":
        """Summarise runs beside those of the best fixed windows."""
        found = []
        for index in range(len(results[0].phases)):
            times = sorted(math.inf if (t := result.phases[index].found_s) is None else t for result in results)
            middle = times[len(times) // 2]
            found.append(f"{middle:.1f}" if middle < math.inf else "-")
        return Row(
            goodput=statistics.median(result.work / other.work for result, other in zip(results, best, strict=True)),
            refused=statistics.median(result.rejected_share for result in results),
            found=" / ".join(found),
            wait_s=statistics.median(max(0.0, result.mean_wait_s) for result in results),
        )


def compare(scenario: Scenario, seeds: range) -> dict[str, Row]:
    """Run every rule; the best fixed windows come last, with the sweep's result as their name."""
    schedule = best_fixed(scenario)
    if scenario.engine is not None:
        windows = [window * scenario.workers for window in schedule.values()]
        phases = zip(scenario.phases, windows, strict=True)
        scenario = dataclasses.replace(
            scenario, phases=tuple(dataclasses.replace(phase, capacity=window) for phase, window in phases)
        )
    best = [Simulation(scenario, lambda now: Fixed(now, 1, schedule), seed).run() for seed in seeds]
    rules: dict[str, Callable[[Now, int], Rule]] = {OURS: ours, **OTHER_RULES}
    rows = {
        name: Row.of(
            [
                Simulation(scenario, lambda now, build=build: build(now, _maximum(scenario)), seed).run()
                for seed in seeds
            ],
            best,
        )
        for name, build in rules.items()
    }
    return rows | {f"best fixed: {', '.join(str(window) for window in schedule.values())}": Row.of(best, best)}


def _maximum(scenario: Scenario) -> int:
    return MAXIMUM if scenario.engine is None else ENGINE_MAXIMUM


def print_long(scenario: Scenario, rows: dict[str, Row]) -> None:
    """Print one table for the scenario."""
    print(f"\n{scenario.name} ({_describe(scenario)})\n")
    print("| rule | goodput | refused | found (s) | wait (s) |\n|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row.goodput:.1%} | {row.refused:.2%} | {row.found} | {row.wait_s:.2f} |", flush=True)


def print_short(scenario: Scenario, rows: dict[str, Row]) -> None:
    """Print one line for the scenario: ours in full, goodput and refusals of the others."""
    us = rows[OURS]
    others = " | ".join(f"{rows[name].goodput:.0%}, {rows[name].refused:.0%}" for name in OTHER_RULES)
    line = f"| {scenario.name} | {us.goodput:.1%} | {us.refused:.2%} | {us.found} | {us.wait_s:.2f} | {others} |"
    print(line, flush=True)


def _describe(scenario: Scenario) -> str:
    capacities = " → ".join("429" if phase.storm else str(phase.capacity) for phase in scenario.phases)
    return f"C {capacities}, {scenario.phases[0].seconds:.0f} s each"


def trace(scenario: Scenario) -> None:
    """Print one run of our rule second by second."""
    print("time limit running queued capacity")
    for time_s, limit, running, queued, capacity in (
        Simulation(scenario, partial(ours, maximum=_maximum(scenario)), 0).run().trace
    ):
        print(f"{time_s:6.1f} {limit:5d} {running:7d} {queued:6d} {capacity:8d}")


def main() -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("::", maxsplit=1)[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="", help="part of the scenario's name")
    parser.add_argument("--without", choices=WITHOUT, help="what the worker does not see")
    parser.add_argument("--long", action="store_true", help="a table for each scenario")
    parser.add_argument("--trace", help="a scenario's name")
    arguments = parser.parse_args()
    without = WITHOUT.get(arguments.without, {})
    chosen = [dataclasses.replace(each, **without) for each in scenarios() if arguments.only in each.name]
    if arguments.trace is not None:
        trace(next(scenario for scenario in scenarios() if scenario.name == arguments.trace))
        return
    if not arguments.long:
        print(f"| requests, backend | goodput | refused | found (s) | wait (s) | {' | '.join(OTHER_RULES)} |")
        print("|---|---|---|---|---" + "|---" * len(OTHER_RULES) + "|")
    for scenario in chosen:
        (print_long if arguments.long else print_short)(scenario, compare(scenario, range(arguments.seeds)))


if __name__ == "__main__":
    main()
