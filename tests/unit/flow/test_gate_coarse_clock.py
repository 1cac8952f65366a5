"""The gate on a clock like uvloop's: whole milliseconds, timers that fire slightly early, and time that always passes."""

import asyncio
import heapq
import itertools
import random
from collections.abc import Callable

import pytest

from tests.support.fakeclock import FakeTimer, settle
from tests.support.flow import AUTH, OK, REFUSED, waiting
from worker.flow.circuit import CircuitConfig, CircuitState
from worker.flow.gate import AttemptSignal, Permit, RouteGate
from worker.flow.queue import AdmissionOrder
from worker.flow.window.adaptive import AdaptiveWindow

COUNT = 24
LONGEST_WAIT_S = 10_000.0


class CoarseClock:
    """Reading it takes some microseconds; it shows whole milliseconds and rounds a timer's wait to the nearest."""

    def __init__(self, look_us: int) -> None:
        self._us = 1_000_000_400
        self._look_us = look_us
        self._timers: list[tuple[int, int, FakeTimer]] = []
        self._count = itertools.count()

    def now(self) -> float:
        self._us += self._look_us
        return self._us // 1000 / 1000

    def call_at(self, when: float, callback: Callable[[], None]) -> FakeTimer:
        due_us = self._us + 1000 * round(1000 * max(0.0, when - self.now()))
        timer = FakeTimer(callback)
        heapq.heappush(self._timers, (due_us, next(self._count), timer))
        return timer

    async def run(self, seconds: float) -> None:
        """Run every timer that is due within this time."""
        end_us = self._us + round(1e6 * seconds)
        while self._timers and self._timers[0][0] <= end_us:
            due_us, _, timer = heapq.heappop(self._timers)
            self._us = max(self._us, due_us)
            callback, timer.callback = timer.callback, None
            if callback is not None:
                callback()
                await settle()
        self._us = max(self._us, end_us)
        await settle()


@pytest.fixture(params=range(1, 200, 14), ids=lambda look_us: f"{look_us} us")
def clock(request: pytest.FixtureRequest) -> CoarseClock:
    return CoarseClock(request.param)


class FixedJitter(random.Random):
    """The same odd share for every wait."""

    def random(self) -> float:
        return 0.37


def a_gate(clock: CoarseClock) -> RouteGate:
    return RouteGate(
        lambda: AdaptiveWindow(COUNT, 1, COUNT, now=clock.now), CircuitConfig(trip_failures=1), clock, rng=FixedJitter()
    )


def a_crowd(gate: RouteGate) -> "list[asyncio.Task[Permit]]":
    return [waiting(gate, give_up_s=LONGEST_WAIT_S) for _ in range(COUNT)]


def started(crowd: "list[asyncio.Task[Permit]]") -> "list[asyncio.Task[Permit]]":
    return [task for task in crowd if task.done()]


async def leave(crowd: "list[asyncio.Task[Permit]]") -> None:
    for task in crowd:
        task.cancel()
    await asyncio.gather(*crowd, return_exceptions=True)


async def test_a_window_that_ramps_up_does_not_stop_halfway(clock: CoarseClock) -> None:
    """After a breaker closed every waiter starts within a second or so, although no attempt ends meanwhile."""
    gate = a_gate(clock)
    permit = await gate.admit(AdmissionOrder())
    await clock.run(4.0)
    permit.finish(OK)
    (await gate.admit(AdmissionOrder())).finish(AUTH)
    crowd = a_crowd(gate)
    await settle()
    await clock.run(11.0)
    (probe,) = started(crowd)
    probe.result().finish(OK)
    await settle()
    assert len(started(crowd)) < COUNT
    await clock.run(2.0)
    assert len(started(crowd)) == COUNT
    await leave(crowd)


async def test_no_probe_is_forgotten(clock: CoarseClock) -> None:
    """However many probes fail, another one starts without any further caller."""
    gate = a_gate(clock)
    while gate.statistics().circuit.state is CircuitState.CLOSED:
        (await gate.admit(AdmissionOrder())).finish(REFUSED)
    crowd = a_crowd(gate)
    await settle()
    for _ in range(10):
        before = len(started(crowd))
        await clock.run(5.0)
        probes = started(crowd)[before:]
        assert probes
        for probe in started(crowd):
            probe.result().finish(REFUSED)
    await leave(crowd)


async def test_a_pause_ends(clock: CoarseClock) -> None:
    """At its instant, without any other event."""
    gate = a_gate(clock)
    (await gate.admit(AdmissionOrder())).finish(AttemptSignal(overload=True, pause_s=0.7777))
    crowd = a_crowd(gate)
    await settle()
    assert not started(crowd)
    await clock.run(2.0)
    assert len(started(crowd)) == gate.statistics().limit > 1
    await leave(crowd)
