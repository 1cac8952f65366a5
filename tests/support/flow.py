"""A gate with the tasks that wait for it, and a window under load."""

import asyncio
import random

from tests.support.fakeclock import FakeClock, settle
from worker.flow.circuit import CircuitConfig
from worker.flow.gate import AttemptSignal, Permit, RouteGate
from worker.flow.lane import BreakerEffect, BreakerScope
from worker.flow.queue import AdmissionOrder
from worker.flow.window.adaptive import AdaptiveWindow, Outcome, Ticket

OK = AttemptSignal(breaker=BreakerEffect.SUCCESS)
REFUSED = AttemptSignal(breaker=BreakerEffect.COUNT, error_class="connect", scope=BreakerScope.ROUTE)
AUTH = AttemptSignal(breaker=BreakerEffect.TRIP, error_class="auth", scope=BreakerScope.ROUTE)
LOADING = AttemptSignal(breaker=BreakerEffect.TRIP, error_class="not_ready")
SERVER_ERROR = AttemptSignal(breaker=BreakerEffect.COUNT, error_class="server_error")
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


async def admit_after(gate: RouteGate, clock: FakeClock, seconds: float, **options: object) -> Permit:
    task = waiting(gate, **options)
    await settle()
    clock.advance(seconds)
    return await task


class Driver:
    """A window under a load without end, one flight after another."""

    def __init__(self, clock: FakeClock, initial: int = 8, maximum: int = 64) -> None:
        self.clock = clock
        self.window = AdaptiveWindow(initial, 1, maximum, now=clock.now)

    def start(self, count: int | None = None, *, streamed: bool = False) -> list[Ticket]:
        """Start so many, or as many as there is room for."""
        tickets = []
        while self.window.has_room() if count is None else len(tickets) < count:
            tickets.append(self.window.start(streamed=streamed))
        return tickets

    def serve(self, tickets: list[Ticket], seconds: float, work: float | None = None) -> None:
        """Answer all of them after this time, starting another for each as a worker does."""
        self.clock.advance(seconds)
        for ticket in tickets:
            self.window.finish(ticket, Outcome.OK, work=work)

    def flights(self, count: int, seconds: float, work: float | None = None) -> list[int]:
        """Run so many full flights; return the limits after each."""
        limits = []
        for _ in range(count):
            self.serve(self.start(), seconds, work)
            self.clock.advance(1.0)  # growth takes effect
            limits.append(self.window.limit)
        return limits

    def set_limit(self, limit: int) -> None:
        """Put the window at a limit, whatever it has learned."""
        self.window._limit.set(limit)

    def refuse(self, ticket: Ticket, pause_s: float | None = None) -> bool:
        """Refuse it; return whether that was news."""
        is_fresh = self.window.is_refusal_fresh(ticket)
        self.window.finish(ticket, Outcome.OVERLOAD, pause_s=pause_s)
        return is_fresh
