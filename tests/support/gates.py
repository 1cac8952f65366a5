"""A gate and the tasks that wait for it, for its tests."""

import asyncio
import random

from tests.support.fakeclock import FakeClock, settle
from worker.flow.circuit import CircuitConfig
from worker.flow.gate import AttemptSignal, Permit, RouteGate
from worker.flow.lane import BreakerEffect, BreakerScope
from worker.flow.queue import AdmissionOrder
from worker.flow.window.adaptive import AdaptiveWindow

OK = AttemptSignal(breaker=BreakerEffect.SUCCESS)
REFUSED = AttemptSignal(breaker=BreakerEffect.COUNT, error_class="connect", scope=BreakerScope.ROUTE)
AUTH = AttemptSignal(breaker=BreakerEffect.TRIP, error_class="auth", scope=BreakerScope.ROUTE)
LOADING = AttemptSignal(breaker=BreakerEffect.TRIP, error_class="not_ready")
ONE_IS_ENOUGH = CircuitConfig(trip_failures=1)
"""So that a test need not send a second message to open a circuit."""


def a_gate(clock: FakeClock, *, room: int = 1, aging_every: int = 0, config: CircuitConfig | None = None) -> RouteGate:
    """Build a gate whose windows stay at `room`; the circuit opens at one `TRIP` unless `config` says otherwise."""
    return RouteGate(
        lambda: AdaptiveWindow(room, room, room, now=clock.now),
        config or ONE_IS_ENOUGH,
        clock,
        aging_every=aging_every,
        rng=NoJitter(),
    )


class NoJitter(random.Random):
    """Waits are as computed, and the first of several is chosen."""

    def random(self) -> float:
        return 0.0

    def choice(self, seq):  # type: ignore[no-untyped-def]
        return seq[0]

    def shuffle(self, x: object) -> None:
        """Keep the order."""


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
