"""
A backend with hidden, changing capacity, and workers in front of it, in virtual time.

Discrete events, no sleeping, deterministic by seed.  The backend runs up to `capacity` requests at once and queues up
to `queue` times as many more, first come first served; beyond that it refuses.  Running requests share one speed, a
function of how many they are, so that a batch engine that slows down a little (`slowdown`), and a server that shares
its processor (`sharing`), are the same few lines.  A worker always has messages, leases at most `LEASED` of them, keeps
refused ones for a backoff with full jitter, or for the backend's Retry-After, and sends those first.  The breaker is
the worker's own, for every rule.
"""

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.window_model import Phase, PhaseResult, Result, Rule, Scenario
from worker.flow.circuit import CONNECT, Circuit, CircuitConfig, CircuitState, Pass
from worker.flow.clock import Now
from worker.flow.window.adaptive import Outcome

LEASED = 256
REFUSAL_S = 0.005
NETWORK_S = 0.001
SECONDS_PER_TOKEN = 0.02
NOISE = 0.15
"""Sigma of what the number of tokens does not explain of the work."""
FIRST_TOKEN_S = {"short": 0.02, "llm": 0.15, "mixed": 0.02}


def size(kind: str, rng: random.Random) -> float:
    """Draw the seconds a request needs alone on an idle backend, after its first byte."""
    if kind == "short" or (kind == "mixed" and rng.random() < 0.8):
        return 0.2 * math.exp(rng.gauss(0, 0.3))
    return 5.0 * math.exp(rng.gauss(0, 1.0))


@dataclass(eq=False)
class Request:
    """One message, through all its attempts."""

    owner: "Worker"
    work: float
    tokens: float
    attempts: int = 0
    sent_at: float = 0.0
    ticket: Any = None
    circuit_pass: Pass | None = None


class Worker:
    """One worker: a rule, a breaker, and messages without end."""

    def __init__(self, simulation: "Simulation", rule: Rule) -> None:
        self.simulation = simulation
        self.rule = rule
        self.circuit = Circuit(CircuitConfig(), lambda: simulation.now, jitter=simulation.rng.random)
        self.served = 0
        self._retries: deque[Request] = deque()
        self._leased = 0
        self._wake_at = math.inf

    def fill(self) -> None:
        """Start whatever may start."""
        simulation = self.simulation
        while self.rule.has_room() if self.circuit.state is CircuitState.CLOSED else self.circuit.allows():
            if self._retries:
                request = self._retries.popleft()
            elif self._leased < LEASED:
                self._leased += 1
                work = size(simulation.sizes, simulation.rng)
                noise = math.exp(simulation.rng.gauss(0, NOISE))
                request = Request(self, work, work / SECONDS_PER_TOKEN * noise)
            else:
                return
            request.sent_at = simulation.now
            request.circuit_pass = self.circuit.enter()
            request.ticket = self.rule.start(streamed=simulation.scenario.streamed)
            simulation.at(simulation.now + NETWORK_S, partial(simulation.arrive, request))
        self._sleep()

    def connect(self, request: Request) -> None:
        """A connection stands and the request is sent."""
        token = request.circuit_pass
        assert token is not None
        if token.is_probe and self.circuit.error_class == CONNECT and self.circuit.record_success(token):
            self.rule.reopen()

    def begin(self, request: Request) -> None:
        """An answer has begun: the window hears it, and a breaker waits for no more."""
        self.rule.first_byte(request.ticket)
        assert request.circuit_pass is not None
        if self.circuit.record_success(request.circuit_pass):
            self.rule.reopen()

    def end(self, request: Request, outcome: Outcome, retry_after_s: float | None = None) -> None:
        """One attempt is over."""
        scenario, now = self.simulation.scenario, self.simulation.now
        tokens = request.tokens if outcome is Outcome.OK and scenario.tokens else None
        is_fresh = self.rule.is_refusal_fresh(request.ticket)
        self.rule.finish(request.ticket, outcome, work=tokens, pause_s=retry_after_s)
        token = request.circuit_pass
        assert token is not None
        if outcome is Outcome.OK:
            if self.circuit.record_success(token):
                self.rule.reopen()
            self._leased -= 1
            self.served += 1
            self.simulation.result.served += 1
            return
        if outcome is Outcome.NEUTRAL:
            self.circuit.record_failure(token, CONNECT)
        elif is_fresh or token.is_probe:
            self.circuit.record_failure(token, "overloaded")
        request.attempts += 1
        delay = self.simulation.rng.uniform(0, min(60.0, 2.0 ** (request.attempts - 1))) + 0.01
        self.simulation.at(now + max(delay, retry_after_s or 0.0), lambda: self._retry(request))

    def _retry(self, request: Request) -> None:
        self._retries.append(request)
        self.fill()

    def _sleep(self) -> None:
        """Wake at the next instant at which something may start by the passing of time."""
        now = self.simulation.now
        instants = [self.rule.opens_at(), self.circuit.changes_at()]
        wake_at = min((each for each in instants if each is not None and each > now), default=math.inf)
        if wake_at < math.inf and not now < self._wake_at <= wake_at:
            self._wake_at = wake_at
            self.simulation.at(wake_at + 1e-6, self.fill)


class Simulation:
    """One run of one rule through one scenario."""

    def __init__(self, scenario: Scenario, build_rule: Callable[[Now], Rule], seed: int) -> None:
        self.scenario = scenario
        self.now = 0.0
        self.rng = random.Random(seed)
        self.result = Result()
        self.workers = [Worker(self, build_rule(lambda: self.now)) for _ in range(scenario.workers)]
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._phase = Phase(seconds=0.0, capacity=0)
        self._grew = True
        self._changed_at = 0.0
        self._queued: deque[Request] = deque()
        self._running: list[tuple[float, int, Request]] = []
        self._progress = 0.0
        self._progress_at = 0.0
        self._epoch = 0

    @property
    def sizes(self) -> str:
        """Which sizes requests have that start now."""
        return self._phase.sizes or self.scenario.sizes

    def run(self) -> Result:
        """Run to the scenario's end."""
        at = 0.0
        for phase in self.scenario.phases:
            self.at(at, partial(self._change, phase))
            at += phase.seconds
        for second in range(int(at)):
            self.at(second + 0.5, self._sample)
        while self._events and self._events[0][0] < at:
            self.now, _, action = heapq.heappop(self._events)
            action()
            self._watch()
        self.now = at
        self._advance()
        self.result.served_by = [worker.served for worker in self.workers]
        return self.result

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Do something later."""
        heapq.heappush(self._events, (when, next(self._count), action))

    def arrive(self, request: Request) -> None:
        """Take a request, queue it, refuse it or be away."""
        full = len(self._running) >= self._phase.capacity and not self.scenario.sharing
        if self._phase.capacity == 0:
            self._answer(request, Outcome.NEUTRAL)
            return
        if self.scenario.connections:
            request.owner.connect(request)
            request.owner.fill()
        if self._phase.storm or (full and len(self._queued) >= self.scenario.queue * self._phase.capacity):
            self.result.rejected += 1
            self.at(self.now + REFUSAL_S, lambda: self._answer(request, Outcome.OVERLOAD))
        else:
            self._queued.append(request)
            self._admit()

    def _answer(self, request: Request, outcome: Outcome) -> None:
        retry_after_s = self.scenario.retry_after_s if outcome is Outcome.OVERLOAD else None
        request.owner.end(request, outcome, retry_after_s)
        request.owner.fill()

    def _change(self, phase: Phase) -> None:
        self._advance()
        self._grew = self._phase.storm or phase.capacity > self._phase.capacity
        self._phase, self._changed_at = phase, self.now
        self.result.phases.append(PhaseResult())
        if phase.capacity == 0:
            lost = [request for _, _, request in self._running] + list(self._queued)
            done = sum(self._progress - target + request.work for target, _, request in self._running)
            self.result.phases[max(0, len(self.result.phases) - 2)].work -= done
            self._running.clear()
            self._queued.clear()
            for request in lost:
                request.owner.end(request, Outcome.NEUTRAL)
        self._admit()
        for worker in self.workers:
            worker.fill()

    def _watch(self) -> None:
        """Note when a new capacity was found: nine tenths used when it grew, at most half as much waits when not."""
        phase, capacity = self.result.phases[-1], self._phase.capacity
        if phase.found_s is not None or capacity == 0 or self._phase.storm:
            return
        if not self._grew and len(self._running) > capacity:
            self._changed_at = self.now  # The backend itself has not come down yet.
        limit = sum(worker.rule.limit for worker in self.workers)
        if len(self._running) >= 0.9 * capacity if self._grew else limit <= 1.5 * capacity:
            phase.found_s = self.now - self._changed_at

    def _sample(self) -> None:
        limit = sum(worker.rule.limit for worker in self.workers)
        self.result.trace.append((self.now, limit, len(self._running), len(self._queued), self._phase.capacity))

    def _admit(self) -> None:
        self._advance()
        while self._queued and (self.scenario.sharing or len(self._running) < self._phase.capacity):
            request = self._queued.popleft()
            self.result.waited_s += self.now - request.sent_at - NETWORK_S
            first = FIRST_TOKEN_S[self.scenario.sizes]
            heapq.heappush(self._running, (self._progress + request.work + first, next(self._count), request))
            if self.scenario.streamed:
                self.at(self.now + first / self._speed() + NETWORK_S, partial(self._begin, request))
        self._epoch += 1
        if self._running:
            epoch = self._epoch
            left = max(0.0, self._running[0][0] - self._progress) / self._speed()
            self.at(self.now + left, lambda: self._complete(epoch))

    def _begin(self, request: Request) -> None:
        request.owner.begin(request)
        request.owner.fill()

    def _speed(self) -> float:
        """Return the seconds of work each running request does in a second."""
        n = len(self._running)
        if self.scenario.sharing:
            return min(1.0, self._phase.capacity / n) if n else 1.0
        return 1.0 / (1.0 + self.scenario.slowdown * max(0, n - 1))

    def _advance(self) -> None:
        """Account for the work done since the last event."""
        done = (self.now - self._progress_at) * self._speed() if self._running else 0.0
        self._progress += done
        self._progress_at = self.now
        if self.result.phases:
            self.result.phases[-1].work += done * len(self._running)

    def _complete(self, epoch: int) -> None:
        if epoch != self._epoch:
            return
        self._advance()
        while self._running and self._running[0][0] <= self._progress + 1e-9:
            request = heapq.heappop(self._running)[2]
            self.at(self.now + NETWORK_S, partial(self._answer, request, Outcome.OK))
        self._admit()
