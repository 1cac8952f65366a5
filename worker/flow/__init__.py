"""
Admission: who may start an attempt on a route, and when.

Pure rules (`window`, `latency`, `circuit`, `breaker`, `damage`, `dedupe`) and a thin asyncio shell (`gate`, `order`).
Time is handed in; nothing here does I/O, and nothing here knows `policy`: whoever calls translates a decision into an
`AttemptSignal`.
"""

from worker.flow.breaker import Breaker, BreakerEffect, BreakerScope, BreakerStatistics
from worker.flow.circuit import CircuitConfig, CircuitState, CircuitStatistics, ProbeSchedule
from worker.flow.clock import Clock, LoopClock, Now, TimerHandle
from worker.flow.damage import Damage, DamageMeter
from worker.flow.dedupe import Dedupe, DedupeStatistics, MemoryDedupe
from worker.flow.gate import Permit, RouteGate
from worker.flow.gate_types import AttemptSignal, GateStatistics
from worker.flow.order import AdmissionOrder
from worker.flow.window import AdaptiveWindow
from worker.flow.window_types import Outcome, Ticket, WindowStatistics, WindowTuning

__all__ = [
    "AdaptiveWindow",
    "AdmissionOrder",
    "AttemptSignal",
    "Breaker",
    "BreakerEffect",
    "BreakerScope",
    "BreakerStatistics",
    "CircuitConfig",
    "CircuitState",
    "CircuitStatistics",
    "Clock",
    "Damage",
    "DamageMeter",
    "Dedupe",
    "DedupeStatistics",
    "GateStatistics",
    "LoopClock",
    "MemoryDedupe",
    "Now",
    "Outcome",
    "Permit",
    "ProbeSchedule",
    "RouteGate",
    "Ticket",
    "TimerHandle",
    "WindowStatistics",
    "WindowTuning",
]
