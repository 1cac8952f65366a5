"""
Deadlines, tenants, people beside a batch, and documents, on virtual time but for one table.

The real pipeline, over a scripted server with a fixed window or over the simulated backend's model of an engine; the
baseline of an order serves the same requests as they came.  `python -m benchmarks.traffic [NAME...] [--seeds N]`.

* **deadlines met**: of 400 requests that come at once, with deadlines that leave a tenth more time than all of them
  take if the urgent ones go first.  *Wasted* is the part of the server's time that went into answers that came late.
* **fairness**: Jain's index of the server's time by tenant while all of them wait, 1 for perfectly even
  (https://www.cse.wustl.edu/~jain/papers/ftp/fairness.pdf).  One of four tenants sends four times as much as any other,
  and its answers take three times as long.
* **interactive**: 20 people a second for 40 s of each minute, 2 in the rest, ask an engine by themselves while a batch
  without end drains there.  Seconds until the first token and until the whole answer, and tokens a second of the batch.
* **processes**: the same with processes and the simulated backend's own server, against the clock (`traffic_real`).
* **documents**: a batch of questions about long documents at an engine with a cache of prefixes, started by age or
  grouped by prefix.  The share of prompt tokens that the cache had, the seconds of the engine that this saved, and
  how long the batch took.
"""

import argparse
import asyncio
import logging
import random
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import structlog

from benchmarks.traffic_engine import BATCHES, PROTECTIONS, Latency, Reuse, documents, interactive
from benchmarks.traffic_real import PROTECTIONS as REAL_PROTECTIONS
from benchmarks.traffic_real import interactive_real
from tests.support.fakes import Answer, FakeBackend
from tests.support.pipeline import Pipeline, data, message
from tests.support.virtual_time import unix_time, until, virtual_time
from worker.ports import BackendRequest
from worker.settings.schema import RequestSettings

WINDOW = 8
ROUTE = {"name": "r", "window": {"initial": WINDOW, "min": WINDOW, "max": WINDOW}}
REQUESTS = 400
TENANTS = ("heavy", "a", "b", "c")
MEASURED_S = 300.0
"""Server time after which fairness is computed; all tenants have more to send."""


class Score(NamedTuple):
    """What one run gave, as shares."""

    met: float
    wasted: float


def jain(parts: list[float]) -> float:
    """Return Jain's fairness index of what each got."""
    return sum(parts) ** 2 / (len(parts) * sum(part * part for part in parts))


def deadlines(seed: int, *, by_age: bool) -> Score:
    """Serve requests by deadline as the worker does, or by age."""
    dice = random.Random(seed)
    times = {f"m{number}": dice.lognormvariate(0.0, 0.6) for number in range(REQUESTS)}
    limits = {name: dice.uniform(0.1, 1.1) * sum(times.values()) / WINDOW for name in times}
    met: set[str] = set()
    sent: set[str] = set()

    @virtual_time
    async def run() -> None:
        def answer(request: BackendRequest) -> Answer:
            sent.add(request.message_id)
            return Answer(seconds=times[request.message_id])

        pipeline = Pipeline(FakeBackend(then=answer, name="r"), routes=[ROUTE])

        async def send(name: str) -> None:
            limit = unix_time() + limits[name]
            await pipeline.handle(message(data() if by_age else data(deadline=limit), message_id=name))
            (published,) = pipeline.publisher.of(name)
            if published.attributes["status_code"] == "200" and unix_time() <= limit:
                met.add(name)

        await asyncio.gather(*(send(name) for name in times))

    run()
    late_s = sum(times[name] for name in sent - met)
    return Score(len(met) / REQUESTS, late_s / sum(times[name] for name in sent))


def fairness(seed: int, *, shared: bool) -> float:
    """Return the index of four tenants that all have more to send."""
    dice = random.Random(seed)
    spent: Counter[str] = Counter()

    @virtual_time
    async def run() -> None:
        def answer(request: BackendRequest) -> Answer:
            tenant = request.headers["x-tenant"]
            seconds = dice.lognormvariate(0.0, 0.4) * (3.0 if tenant == "heavy" else 1.0)
            spent[tenant] += seconds  # type: ignore[assignment]
            return Answer(seconds=seconds)

        pipeline = Pipeline(
            FakeBackend(then=answer, name="r"),
            request=RequestSettings(tenant_attribute="tenant" if shared else None),
            routes=[{**ROUTE, "header_rules": {"from_attributes": {"x-tenant": "tenant"}}}],
            tenants={"windows": "shared"} if shared else {},
        )
        senders = [*["heavy"] * 800, *["a", "b", "c"] * 200]
        dice.shuffle(senders)
        tasks = [pipeline.start(message(attributes={"tenant": tenant})) for tenant in senders]
        await until(lambda: sum(spent.values()) >= MEASURED_S)
        pipeline.processor.begin_drain()
        await asyncio.gather(*tasks)

    run()
    return jain([float(spent[tenant]) for tenant in TENANTS])


def order_rows(seeds: Sequence[int]) -> None:
    """Print what the order of requests gives."""
    mean = statistics.mean
    aged, ours = ([deadlines(seed, by_age=by_age) for seed in seeds] for by_age in (True, False))
    alike, shares = (mean(fairness(seed, shared=shared) for seed in seeds) for shared in (False, True))
    print("| what | by age | the worker |\n|---|---|---|")
    print(f"| deadlines met | {mean(s.met for s in aged):.1%} | {mean(s.met for s in ours):.1%} |")
    print(f"| time wasted on late answers | {mean(s.wasted for s in aged):.1%} | {mean(s.wasted for s in ours):.1%} |")
    print(f"| fairness of four tenants, Jain's index | {alike:.3f} | {shares:.3f} |")


def interactive_rows(seeds: Sequence[int]) -> None:
    """Print what people get beside a batch."""
    print_latencies(seeds, PROTECTIONS, interactive)


def process_rows(_: Sequence[int]) -> None:
    """Print the same of processes and of one run, against the clock."""
    print_latencies(range(1), REAL_PROTECTIONS, interactive_real)


def print_latencies(
    seeds: Sequence[int],
    protections: Mapping[str, Mapping[str, Any] | None],
    measure: Callable[[int, Mapping[str, Any] | None], Latency],
) -> None:
    """Print a row for each protection."""
    print("| batch through | first token: median, p99 | whole answer: median, p99 | batch, tokens/s |")
    print("|---|---|---|---|")
    for name, protection in protections.items():
        runs = [measure(seed, protection) for seed in seeds]
        first, first_99, whole, whole_99, tokens = (statistics.mean(column) for column in zip(*runs, strict=True))
        people = f"{first:.2f} s, {first_99:.2f} s | {whole:.1f} s, {whole_99:.1f} s"
        print(f"| {name} | {people} | {tokens:,.0f} |", flush=True)


def document_rows(seeds: Sequence[int]) -> None:
    """Print what grouping by prefix gives."""
    print("| documents, published, leased | by age: cached, took | grouped: cached, took | saved |\n|---|---|---|---|")
    for batch in BATCHES:
        shown = []
        for group_by in (0, 2000):
            runs = [documents(seed, batch, group_by=group_by) for seed in seeds]
            shown.append(Reuse(*(statistics.mean(column) for column in zip(*runs, strict=True))))
        aged, grouped = shown
        name = f"{batch.count} of {batch.tokens:,} tokens, {batch.questions} questions, {batch.order}, {batch.leased}"
        cells = " | ".join(f"{each.found:.0%}, {each.seconds:.0f} s" for each in shown)
        print(f"| {name} | {cells} | {grouped.saved_s - aged.saved_s:.0f} s of prompts |", flush=True)


TABLES = {"order": order_rows, "interactive": interactive_rows, "processes": process_rows, "documents": document_rows}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"only these: {', '.join(TABLES)}")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    if unknown := set(options.names) - TABLES.keys():
        parser.error(f"no table is called {', '.join(sorted(unknown))}")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    for number, name in enumerate(options.names or TABLES):
        print("\n" * (number > 0), end="")
        TABLES[name](range(options.seeds))


if __name__ == "__main__":
    main()
