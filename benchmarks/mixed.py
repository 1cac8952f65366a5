"""
What a few messages that always fail cost the others: `python -m benchmarks.mixed [--short] [--kind 429] [--share 5]`.

Every cell sends healthy and failing messages through the worker's pipeline on virtual time (`mixed_model.py`) and
compares the healthy ones with a run in which they are alone.  The targets, each named in the verdict when it is missed:

* `rate`: 95 % of the healthy messages are answered within 1/0.95 of the time that takes them alone, plus what nothing
  can avoid (`bounds`);
* `p99`: of the healthy messages, at most twice what it is alone, plus the same;
* `healthy`: none of them is without an answer, answered with an error, called twice or nacked;
* `unanswered`: every failing message is answered within the waits of the retry policy, half as much again and ten
  minutes;
* `own error`: its answer is its own error, not another's;
* `calls`: at most three calls of the backend for each delivery attempt that a message may have; of one whose model is
  away, which waits for its return, at most as many as its backoff allows in that time;
* `outage`: while the whole backend is away no message is answered with an error and none is nacked; the same for
  messages that are alone and all fail in a way that nothing tells from an outage;
* `recovery`: the first answer comes within 7 s of the end of an outage.

The exit code is 1 when a target is missed.  `--real` runs a part of the table with the worker's own process against the
embedded Pub/Sub server and the simulated backend (`mixed_real.py`), and judges nothing.
"""

import argparse
import functools
import logging
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from benchmarks import mixed_real
from benchmarks.mixed_model import (
    CALLS_PER_ATTEMPT,
    HEALTHY_MODEL,
    KINDS,
    MEAN_S,
    OUTAGES,
    WINDOW,
    WINDOW_MAX,
    Kind,
    Message,
    Plan,
    Run,
    Send,
    healthy_s,
    play,
    quantile,
)
from worker.flow.circuit import PROBE_BACKOFF
from worker.flow.window.adaptive import FIRST_PAUSE_S

MIN_RATE, MAX_P99 = 0.95, 2.0
AGING_EVERY = 8
"""One admission in so many goes to the message that has waited longest (`flow.queue`)."""
PROBE_S = PROBE_BACKOFF.base_s
"""Until the first probe of a breaker."""
SHARES = (1, 5, 20)
RATE_PER_S = 20.0
TRAFFIC_S = 120.0
BACKLOG = 1200
HELD_S = 600.0
"""For so long messages are watched that wait for the backend."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One line of the table."""

    scenario: str
    kind: str
    share: int | None = None
    """Percent of the messages that fail, where that is what differs."""
    attempts: int = 5
    is_streamed: bool = False
    is_short: bool = False
    """Part of the short form."""

    @property
    def name(self) -> str:
        share = "" if self.share is None else f", {self.share} %"
        return f"{self.scenario}{share}, {self.kind}, {self.attempts} attempts{', streamed' * self.is_streamed}"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a cell gave."""

    cell: Cell
    run: Run
    alone: Run
    missed: tuple[str, ...]
    took_s: float


def _named(times: Iterable[tuple[float, bool]]) -> tuple[Send, ...]:
    return tuple(Send(at_s, f"{'f' if fails else 'h'}{number}") for number, (at_s, fails) in enumerate(times))


def _failing(count: int, share: int) -> frozenset[int]:
    """Return which of so many messages fail."""
    return frozenset(random.Random(share).sample(range(count), round(count * share / 100)))


def fresh(share: int, seconds: float = TRAFFIC_S) -> Plan:
    """Twenty messages a second."""
    count = round(seconds * RATE_PER_S)
    failing = _failing(count, share)
    return Plan(name="fresh", sends=_named((n / RATE_PER_S, n in failing) for n in range(count)))


def backlog(share: int) -> Plan:
    """All messages wait when the worker starts."""
    failing = _failing(BACKLOG, share)
    return Plan(name="backlog", sends=_named((0.0, n in failing) for n in range(BACKLOG)))


def block(share: int) -> Plan:
    """The same, and the failing ones come first."""
    failing = round(BACKLOG * share / 100)
    return Plan(name="block", sends=_named((0.0, n < failing) for n in range(BACKLOG)))


def one_message(_: int) -> Plan:
    """One failing message, then ten healthy ones a second for a minute and a half."""
    return Plan(name="one message", sends=_named(((0.0, True), *((0.05 + n / 10, False) for n in range(900)))))


def queued(_: int) -> Plan:
    """Forty failing messages that wait when the worker starts, then twenty healthy ones a second for two minutes."""
    healthy = ((0.05 + n / RATE_PER_S, False) for n in range(round(TRAFFIC_S * RATE_PER_S)))
    return Plan(name="queued", sends=_named((*((0.0, True) for _ in range(40)), *healthy)))


def six_alone(_: int) -> Plan:
    """Six failing messages and nothing else."""
    return Plan(name="six alone", sends=_named((0.0, True) for _ in range(6)))


def _starving(name: str, *, first: bool, routes: int) -> Plan:
    """Two hundred messages for a model that is away for ten minutes, and a thousand for another one."""
    failing = frozenset(range(200)) if first else _failing(1200, 200 * 100 // 1200 + 1)
    sends = _named((0.0, n in failing) for n in range(1200))
    return Plan(name=name, sends=sends, routes=routes, fails_until_s=600.0)


def outage(_: int) -> Plan:
    """Ten messages a second for five minutes; the backend is away in the middle three."""
    return Plan(
        name="outage",
        sends=_named((n / 10, False) for n in range(3000)),
        outage=(60.0, 240.0),
    )


def long_outage(_: int) -> Plan:
    """Eight messages and ten minutes without a backend."""
    return Plan(name="long outage", sends=_named((0.0, False) for _ in range(8)), outage=(0.0, 600.0))


PLANS: dict[str, Callable[[int], Plan]] = {
    "fresh": fresh,
    "backlog": backlog,
    "block": block,
    "one message": one_message,
    "queued": queued,
    "six alone": six_alone,
    "recovery": lambda share: fresh(share, 720.0),
    "model away, mixed": lambda _: _starving("model away, mixed", first=False, routes=1),
    "model away, first": lambda _: _starving("model away, first", first=True, routes=1),
    "route away, mixed": lambda _: _starving("route away, mixed", first=False, routes=2),
    "route away, first": lambda _: _starving("route away, first", first=True, routes=2),
    "outage": outage,
    "long outage": long_outage,
}
REAL = ("fresh", "one message", "model away, mixed", "model away, first")
"""What `--real` runs."""
BEGIN, END = "<!-- mixed trouble -->", "<!-- end of mixed trouble -->"
_MODEL_KINDS = ("503", "loading", "503 gateway")
_STREAMED_TOO = ("429", "500", "503", "reset", "hang 5 s")


def cells() -> Iterator[Cell]:
    """Return the whole matrix, in the order of the table."""
    for kind in KINDS:
        yield Cell(scenario="one message", kind=kind, is_short=kind in {"429", "401", "500", "loading"})
    for scenario in ("queued", "six alone"):
        for kind in KINDS:
            yield Cell(scenario=scenario, kind=kind)
    for scenario in ("fresh", "backlog", "block"):
        for kind in KINDS:
            yield from _shares(scenario, kind)
    for share in (2, 5):
        yield Cell(scenario="recovery", kind="500", share=share)
    for place in ("mixed", "first"):
        for kind in _MODEL_KINDS:
            yield Cell(scenario=f"model away, {place}", kind=kind, is_short=kind == "503" and place == "mixed")
            yield Cell(scenario=f"route away, {place}", kind=kind)
    for kind in OUTAGES:
        yield Cell(scenario="outage", kind=kind, is_short=kind == "500")
    yield Cell(scenario="long outage", kind="500", attempts=20, is_short=True)


def _shares(scenario: str, kind: str) -> Iterator[Cell]:
    for share in SHARES:
        is_short = scenario == "fresh" and share == 5 and kind in {"429", "500", "reset"}
        yield Cell(scenario=scenario, kind=kind, share=share, attempts=5, is_short=is_short)
        if kind in _STREAMED_TOO and share == 5:
            yield Cell(scenario=scenario, kind=kind, share=share, attempts=5, is_streamed=True)
        yield Cell(scenario=scenario, kind=kind, share=share, attempts=20)


def plan_of(cell: Cell) -> Plan:
    """Return what a cell sends."""
    return PLANS[cell.scenario](cell.share or 0)


def kind_of(cell: Cell) -> Kind:
    """Return how the cell's messages fail; while the whole model is away they name that model."""
    kind = KINDS.get(cell.kind, KINDS["500"])  # an outage has no failing messages
    return replace(kind, model="other") if "away" in cell.scenario else kind


@functools.cache
def alone(scenario: str, share: int | None, *, is_streamed: bool) -> Run:
    """Run a scenario's healthy messages without the others."""
    plan = PLANS[scenario](share or 0)
    if plan.outage is not None or not plan.healthy().sends:
        return Run(plan, [])
    plan = plan.healthy()
    return play(plan, KINDS["500"], 5, is_streamed=is_streamed)


def measure(cell: Cell) -> Result:
    """Run a cell and compare it with its healthy messages alone."""
    began = time.perf_counter()
    without = alone(cell.scenario, cell.share, is_streamed=cell.is_streamed or kind_of(cell).streamed)
    run = play(
        plan_of(cell),
        kind_of(cell),
        cell.attempts,
        is_streamed=cell.is_streamed,
        outage=OUTAGES.get(cell.kind, OUTAGES["connect"]),
        until_s=HELD_S if _is_held(cell) else None,
    )
    if run.plan.outage is not None:
        missed = tuple(_missed_in_outage(run))
    elif _is_held(cell):
        missed = tuple(_missed_while_held(run.messages))
    else:
        missed = tuple(_missed(cell, run, without))
    return Result(cell=cell, run=run, alone=without, missed=missed, took_s=time.perf_counter() - began)


def rate(run: Run, without: Run, allowed_s: float) -> float:
    """Return how fast the healthy messages were answered; 1 is as fast as alone, and what may be added."""
    if not run.healthy or run.plan.outage is not None:
        return math.nan
    return (without.healthy_done_s() + allowed_s) / run.healthy_done_s()


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Seconds that the failing messages of a cell take from the healthy ones, whatever is done, and why."""

    seconds: float
    reason: str


def bounds(cell: Cell, plan: Plan) -> Iterator[Bound]:
    """Return what is added to the targets of a cell because nothing can avoid it."""
    kind = kind_of(cell)
    failing, healthy = ([send for send in plan.sends if send.fails is fails] for fails in (True, False))
    if not failing or not healthy:
        return
    took_s = kind.answer.seconds
    waiting = sum(send.at_s == 0.0 for send in failing)
    yield Bound(
        seconds=took_s * max(1.0, waiting / WINDOW),
        reason=f"the first attempts of {max(1, waiting)} failing messages, {took_s:g} s each, on {WINDOW} slots: "
        "nothing tells them from the others before",
    )
    repeats = min(len(failing), len(plan.sends) // (AGING_EVERY - 1))
    work_s = (len(failing) + repeats) * took_s + sum(healthy_s(send.name) for send in healthy)
    missing_s = work_s / WINDOW_MAX - plan.sent_s
    if plan.sent_s and missing_s > 0.0:
        yield Bound(
            seconds=missing_s,
            reason=f"the first attempts of all, and one repeat in {AGING_EVERY} admissions so that none starves, "
            f"take {work_s:.0f} s of a slot; {WINDOW_MAX} slots have {plan.sent_s * WINDOW_MAX:.0f} s meanwhile",
        )
    if kind.model != HEALTHY_MODEL or not kind.row:
        return
    first = min(send.at_s for send in healthy)
    ahead = sum(send.at_s <= first for send in failing if _number(send) < _number(healthy[0]))
    if ahead >= (WINDOW if failing[0].at_s == first else kind.row):
        look_s = FIRST_PAUSE_S if kind.hint_s else PROBE_S
        meanwhile = sum(first < send.at_s <= first + look_s + MEAN_S for send in healthy)
        yield Bound(
            seconds=look_s + MEAN_S + meanwhile * MEAN_S / WINDOW,
            reason=f"{ahead} that fail come before all others: nothing tells that from an outage before an attempt "
            f"after the first {'pause' if kind.hint_s else 'probe'}, {look_s:g} s later, is answered; {meanwhile} that "
            f"are sent meanwhile run on {WINDOW} slots afterwards",
        )


def _number(send: Send) -> int:
    return int(send.name[1:])


def allowed_s(cell: Cell, run: Run) -> float:
    """Return the sum of the bounds, seconds."""
    return sum(bound.seconds for bound in bounds(cell, run.plan))


def max_calls(cell: Cell, run: Run) -> float:
    """
    Return how often a failing message may be called at most.

    A message that is held because its model is away cannot be told from one for a model that loads.  It is called as
    its backoff says, 30 s apart in the mean after the first six, or as one of the probes of its lane, and some chance.
    """
    kind = kind_of(cell)
    if kind.is_held and kind.model != HEALTHY_MODEL:
        return 10.0 + 1.5 * run.ended_s / 30.0
    return CALLS_PER_ATTEMPT * cell.attempts


def _missed(cell: Cell, run: Run, without: Run) -> Iterator[str]:
    if rate(run, without, allowed_s(cell, run)) < MIN_RATE:
        yield "rate"
    if run.healthy_wait_s(0.99) > MAX_P99 * without.healthy_wait_s(0.99) + allowed_s(cell, run):
        yield "p99"
    if any(m.status != 200 or m.calls > 1 or m.nacks or m.answers > 1 for m in run.healthy):
        yield "healthy"
    kind = kind_of(cell)
    if kind.is_held and kind.model != HEALTHY_MODEL and math.isinf(run.plan.fails_until_s):
        yield from _missed_while_held(run.failing)  # their model is away: they wait for its return
    elif any(m.answered_at is None for m in run.failing):
        yield "unanswered"
    own = {(kind.status, kind.error_class)}
    if math.isfinite(run.plan.fails_until_s):
        own.add((200, None))
    if any(m.answered_at is not None and (m.status, m.error_class) not in own for m in run.failing):
        yield "own error"
    if any(m.calls > max_calls(cell, run) for m in run.failing):
        yield "calls"


def _is_held(cell: Cell) -> bool:
    return cell.scenario == "six alone" and kind_of(cell).is_held


def _missed_while_held(messages: Sequence[Message]) -> Iterator[str]:
    if any(m.nacks or m.answered_at is not None for m in messages):
        yield "outage"


def _missed_in_outage(run: Run) -> Iterator[str]:
    if any(m.answered_at is None for m in run.messages):
        yield "unanswered"
    if any(m.nacks or m.answers > 1 or m.status not in (200, None) for m in run.messages):
        yield "outage"
    assert run.plan.outage is not None
    end_s = run.plan.outage[1]
    if not any(m.answered_at is not None and end_s < m.answered_at <= end_s + 7.0 for m in run.messages):
        yield "recovery"


HEADER = (
    "scenario", "kind", "share", "attempts", "healthy answered", "rate", "p50 s (alone)", "p99 s (alone)",
    "not closed s", "window", "failing answered", "with", "after s p50/last", "calls most (bound)",
    "healthy: errors/calls/nacks", "missed",
)  # fmt: skip


def row(result: Result) -> str:
    """Return a line of the table."""
    cell, run, without = result.cell, result.run, result.alone
    answered = [m for m in run.failing if m.answered_at is not None]
    ends = Counter((m.status, m.error_class) for m in answered)
    columns = (
        cell.scenario + ", streamed" * cell.is_streamed,
        cell.kind,
        "" if cell.share is None else f"{cell.share} %",
        str(cell.attempts),
        f"{sum(m.status == 200 for m in run.healthy)}/{len(run.healthy)}",
        _figure(rate(run, without, allowed_s(cell, run)), 2),
        _compared(run.healthy_wait_s(0.5), without.healthy_wait_s(0.5)),
        _compared(run.healthy_wait_s(0.99), without.healthy_wait_s(0.99)),
        f"{run.open_s:.0f}",
        _figure(run.window, 0),
        f"{len(answered)}/{len(run.failing)}",
        ", ".join(f"{count} {status} {name or 'ok'}" for (status, name), count in ends.most_common()) or "-",
        "/".join(_figure(quantile((m.waited_s for m in run.failing), share), 0) for share in (0.5, 1.0)),
        f"{max((m.calls for m in run.messages if m.send.fails), default=0)} ({max_calls(cell, run):.0f})",
        "/".join(
            str(count)
            for count in (
                sum(m.status not in (200, None) for m in run.healthy),
                sum(max(0, m.calls - 1) for m in run.healthy),
                sum(m.nacks for m in run.healthy),
            )
        ),
        ", ".join(result.missed) or "ok",
    )
    return "| " + " | ".join(columns) + " |"


def _compared(value: float, alone_s: float) -> str:
    return f"{_figure(value, 2)} ({_figure(alone_s, 2)})"


def _figure(value: float, digits: int) -> str:
    if math.isnan(value):
        return "-"
    return "never" if math.isinf(value) else f"{value:.{digits}f}"


def chosen(options: argparse.Namespace) -> Iterator[Cell]:
    """Return the cells that the options ask for."""
    for cell in cells():
        if options.short and not cell.is_short:
            continue
        if options.kind and cell.kind not in options.kind:
            continue
        if options.share and cell.share not in options.share:
            continue
        if options.attempts and cell.attempts not in options.attempts:
            continue
        if options.scenario and not any(name in cell.scenario for name in options.scenario):
            continue
        yield cell


def silence() -> None:
    """Write no log lines."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


def main() -> int:
    """Print the table; return 1 when a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixed")
    parser.add_argument("--short", action="store_true", help="some cells of each sort")
    parser.add_argument("--kind", action="append", choices=[*KINDS, *OUTAGES], help="only these")
    parser.add_argument("--share", action="append", type=int, help="only these, percent")
    parser.add_argument("--attempts", action="append", type=int, choices=(5, 20), help="only these")
    parser.add_argument("--scenario", action="append", help="only those whose name holds this text")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--real", action="store_true", help="some scenarios with processes, in real time")
    parser.add_argument("--write", type=Path, help="put the table of --real into this document, between its marks")
    options = parser.parse_args()
    return _print_real(options) if options.real else _print_virtual(options)


def _print_virtual(options: argparse.Namespace) -> int:
    print(_head(HEADER))
    results = []
    with ProcessPoolExecutor(options.jobs, initializer=silence) as pool:
        for result in pool.map(measure, chosen(options)):
            results.append(result)
            print(row(result), flush=True)
    missed = [result for result in results if result.missed]
    took_s = sum(result.took_s for result in results)
    print(f"\n{len(results) - len(missed)} of {len(results)} cells meet every target; {took_s:.0f} s")
    return 1 if missed else 0


def _print_real(options: argparse.Namespace) -> int:
    wanted = [cell for cell in chosen(options) if cell.scenario in REAL and cell.attempts == 5 and not cell.is_streamed]
    if not options.share:
        wanted = [cell for cell in wanted if cell.share in (None, 5)]
    lines = [_head(mixed_real.HEADER)]
    print(lines[0], flush=True)
    scenarios = [name for name in REAL if any(cell.scenario == name for cell in wanted)]
    with ProcessPoolExecutor(options.jobs) as pool:
        for line in pool.map(_real_row, [*(Cell(scenario=name, kind="") for name in scenarios), *wanted]):
            lines.append(line)
            print(line, flush=True)
    if options.write is not None:
        head, rest = options.write.read_text("utf-8").split(BEGIN)
        table = "\n".join(lines)
        options.write.write_text(f"{head}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}", "utf-8")
    return 0


def _real_row(cell: Cell) -> str:
    plan = PLANS[cell.scenario](cell.share or 0)
    if not cell.kind:
        result = mixed_real.play_real(plan.healthy(), KINDS["400"], cell.attempts)
        return mixed_real.row_real(cell.scenario, None, None, result)
    result = mixed_real.play_real(plan, kind_of(cell), cell.attempts)
    return mixed_real.row_real(cell.scenario, cell.kind, cell.share, result)


def _head(names: Sequence[str]) -> str:
    return f"| {' | '.join(names)} |\n{'|---' * len(names)}|"


if __name__ == "__main__":
    sys.exit(main())
