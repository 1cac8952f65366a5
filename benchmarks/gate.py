"""
What an admission costs while others wait: one route's gate on a real event loop, without a backend.

So many callers wait at a gate with a window of 64, each with a longest wait as in the worker.  Each admitted caller
finishes its attempt at once, which admits the next one, and asks again.  Printed are microseconds for each admission,
the best of several rounds.  `python -m benchmarks.gate [--admissions N]`.
"""

import argparse
import asyncio
import time

from worker.flow.circuit import CircuitConfig
from worker.flow.clock import LoopClock
from worker.flow.gate import AttemptSignal, RouteGate
from worker.flow.lane import BreakerEffect
from worker.flow.queue import AdmissionOrder
from worker.flow.window.adaptive import AdaptiveWindow

WINDOW = 64
LONGEST_WAIT_S = 3600.0
SERVED = AttemptSignal(breaker=BreakerEffect.SUCCESS)


async def measure(callers: int, admissions: int) -> float:
    """Return the seconds of one admission with so many callers."""
    clock = LoopClock()
    gate = RouteGate(lambda: AdaptiveWindow(WINDOW, WINDOW, WINDOW, now=clock.now), CircuitConfig(), clock)
    left = admissions

    async def call(publish_time: float) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            order = AdmissionOrder(publish_time=publish_time)
            with await gate.admit(order, lane_name="m", give_up_s=LONGEST_WAIT_S) as permit:
                await asyncio.sleep(0)
                permit.finish(SERVED)

    began = time.perf_counter()
    await asyncio.gather(*(call(float(caller)) for caller in range(callers)))
    return (time.perf_counter() - began) / admissions


def main() -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("  ", maxsplit=1)[0])
    parser.add_argument("--admissions", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print("| callers | µs for each admission |\n|---|---|")
    for callers in (32, 256, 1000, 10_000):
        best = min(asyncio.run(measure(callers, arguments.admissions)) for _ in range(arguments.rounds))
        print(f"| {callers:,} | {1e6 * best:.1f} |", flush=True)


if __name__ == "__main__":
    main()
