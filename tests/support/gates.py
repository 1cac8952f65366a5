"""A gate and the tasks that wait for it, for its tests."""

import asyncio

from tests.support.fakeclock import FakeClock, settle
from worker.flow.breaker import Breaker, BreakerEffect
from worker.flow.circuit import CircuitConfig
from worker.flow.gate import AttemptSignal, Permit, RouteGate
from worker.flow.queue import AdmissionOrder
from worker.flow.window.adaptive import AdaptiveWindow

OK = AttemptSignal(breaker=BreakerEffect.SUCCESS)
REFUSED = AttemptSignal(breaker=BreakerEffect.COUNT, error_class="connect")
AUTH = AttemptSignal(breaker=BreakerEffect.TRIP, error_class="auth")


def a_gate(clock: FakeClock, *, room: int = 1, aging_every: int = 0, config: CircuitConfig | None = None) -> RouteGate:
    """Build a gate with a window that stays at `room`."""
    window = AdaptiveWindow(room, room, room, now=clock.now)
    breaker = Breaker(config, now=clock.now, jitter=lambda: 0.0)
    return RouteGate(window, breaker, clock, aging_every=aging_every)


def waiting(gate: RouteGate, order: AdmissionOrder | None = None, **options: object) -> "asyncio.Task[Permit]":
    return asyncio.ensure_future(gate.admit(order or AdmissionOrder(), **options))  # type: ignore[arg-type]


async def admit(gate: RouteGate, **options: object) -> Permit:
    return await gate.admit(AdmissionOrder(), give_up_s=0, **options)  # type: ignore[arg-type]


def idle(gate: RouteGate, clock: FakeClock) -> bool:
    """Whether nothing is left behind: no slot, no waiter, no timer."""
    statistics = gate.statistics()
    return (statistics.in_flight, statistics.waiting, statistics.held, clock.pending()) == (0, 0, 0, 0)


async def admit_after(gate: RouteGate, clock: FakeClock, seconds: float) -> Permit:
    task = waiting(gate)
    await settle()
    clock.advance(seconds)
    return await task
