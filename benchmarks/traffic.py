"""
Deadlines and tenants on virtual time: how many deadlines are met, and how evenly a window is shared.

The real pipeline over a scripted server with a fixed window, so that only the order of the requests differs; the
baseline serves the same requests in the order in which they came.  `python -m benchmarks.traffic [--seeds N]`.

* **deadlines met**: of 400 requests that come at once, with deadlines that leave a tenth more time than all of them
  take if the urgent ones go first.  *Wasted* is the part of the server's time that went into answers that came late.
* **fairness**: Jain's index of the server's time by tenant while all of them wait, 1 for perfectly even
  (https://www.cse.wustl.edu/~jain/papers/ftp/fairness.pdf).  One of four tenants sends four times as much as any other,
  and its answers take three times as long.
"""

import argparse
import asyncio
import logging
import random
import statistics
from collections import Counter
from typing import NamedTuple

import structlog

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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    mean = statistics.mean
    aged, ours = ([deadlines(seed, by_age=by_age) for seed in seeds] for by_age in (True, False))
    alike, shares = (mean(fairness(seed, shared=shared) for seed in seeds) for shared in (False, True))
    print("| what | by age | the worker |\n|---|---|---|")
    print(f"| deadlines met | {mean(s.met for s in aged):.1%} | {mean(s.met for s in ours):.1%} |")
    print(f"| time wasted on late answers | {mean(s.wasted for s in aged):.1%} | {mean(s.wasted for s in ours):.1%} |")
    print(f"| fairness of four tenants, Jain's index | {alike:.3f} | {shares:.3f} |")


if __name__ == "__main__":
    main()
