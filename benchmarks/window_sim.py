"""
Workers in front of a backend with hidden, changing capacity, in virtual time.

Discrete events, no sleeping, deterministic by seed.  The backends are in `window_backends`.  A worker always has
messages, leases at most `Scenario.leased` of them, keeps refused ones for a backoff with full jitter, or for the
backend's Retry-After, and sends those first.  The breaker is the worker's own, for every rule.
"""

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable
from functools import partial

from benchmarks.window_backends import NETWORK_S, Backend, EngineBackend, SlotBackend
from benchmarks.window_model import Phase, PhaseResult, Request, Result, Rule, Scenario, Size
from worker.flow.circuit import CONNECT, Circuit, CircuitConfig, CircuitState
from worker.flow.clock import Now
from worker.flow.window.adaptive import Outcome

REFUSAL_S = 0.005
SECONDS_PER_TOKEN = 0.02
NOISE = 0.15
"""Sigma of what the number of tokens does not explain of the work."""


def size(kind: str, rng: random.Random) -> Size:
    """Draw the size of a request; for the engine, tokens of prompt and answer and no seconds."""
    match kind:
        case "engine chat":
            return Size(prompt=_tokens(rng, 300, 0.7, 4_000), tokens=_tokens(rng, 200, 0.8, 2_000))
        case "engine answers":
            return Size(prompt=_tokens(rng, 300, 0.5, 4_000), tokens=_tokens(rng, 12, 0.5, 100))
        case "engine long prompts":
            return Size(prompt=_tokens(rng, 3_000, 0.5, 16_000), tokens=_tokens(rng, 300, 0.8, 2_000))
        case "engine embeddings":
            return Size(prompt=_tokens(rng, 200, 0.7, 4_000), tokens=1)
    if kind == "short" or (kind == "mixed" and rng.random() < 0.8):
        work = 0.2 * math.exp(rng.gauss(0, 0.3))
    else:
        work = 5.0 * math.exp(rng.gauss(0, 1.0))
    return Size(seconds=work, tokens=work / SECONDS_PER_TOKEN * math.exp(rng.gauss(0, NOISE)))


def _tokens(rng: random.Random, median: float, sigma: float, most: int) -> int:
    return min(most, max(1, round(median * math.exp(rng.gauss(0.0, sigma)))))


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
            elif self._leased < simulation.scenario.leased:
                self._leased += 1
                request = Request(self, simulation.draw())
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
        tokens = request.size.tokens if outcome is Outcome.OK and scenario.tokens else None
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
        self.phase = Phase(seconds=0.0, capacity=0)
        self.workers = [Worker(self, build_rule(lambda: self.now)) for _ in range(scenario.workers)]
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._grew = True
        self._changed_at = 0.0
        self._backend: Backend = SlotBackend(self) if scenario.engine is None else EngineBackend(self, scenario.engine)

    def draw(self) -> Size:
        """Draw the size of a request that starts now."""
        return size(self.phase.sizes or self.scenario.sizes, self.rng)

    def exponential(self, rate: float) -> float:
        """Draw the seconds until the next of events that come so many times a second."""
        return self.rng.expovariate(rate)

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
        self._backend.stop()
        self.result.served_by = [worker.served for worker in self.workers]
        return self.result

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Do something later."""
        heapq.heappush(self._events, (when, next(self._count), action))

    def arrive(self, request: Request) -> None:
        """Let a request reach the backend: it is connected, and refused at once or taken."""
        if self.phase.capacity == 0:
            self.answer(request, Outcome.NEUTRAL)
            return
        if self.scenario.connections:
            request.owner.connect(request)
            request.owner.fill()
        if self.phase.storm or self._backend.is_full:
            self.result.rejected += 1
            self.at(self.now + REFUSAL_S, lambda: self.answer(request, Outcome.OVERLOAD))
        else:
            self._backend.take(request)

    def answer(self, request: Request, outcome: Outcome) -> None:
        """Let a worker see the end of an attempt."""
        retry_after_s = self.scenario.retry_after_s if outcome is Outcome.OVERLOAD else None
        request.owner.end(request, outcome, retry_after_s)
        request.owner.fill()

    def begin(self, request: Request) -> None:
        """Let a worker see the first byte of an answer."""
        request.owner.begin(request)
        request.owner.fill()

    def _change(self, phase: Phase) -> None:
        self._grew = self.phase.storm or phase.capacity > self.phase.capacity
        self._backend.before_change()
        self.phase, self._changed_at = phase, self.now
        self.result.phases.append(PhaseResult())
        for request in self._backend.after_change():
            request.owner.end(request, Outcome.NEUTRAL)
        self._backend.proceed()
        for worker in self.workers:
            worker.fill()

    def _watch(self) -> None:
        """Note when a new capacity was found: nine tenths used when it grew, at most half as much waits when not."""
        phase, capacity = self.result.phases[-1], self.phase.capacity
        if phase.found_s is not None or capacity == 0 or self.phase.storm:
            return
        running = self._backend.running
        if not self._grew and running > capacity:
            self._changed_at = self.now  # The backend itself has not come down yet.
        limit = sum(worker.rule.limit for worker in self.workers)
        if running >= 0.9 * capacity if self._grew else limit <= 1.5 * capacity:
            phase.found_s = self.now - self._changed_at

    def _sample(self) -> None:
        limit = sum(worker.rule.limit for worker in self.workers)
        backend = self._backend
        self.result.trace.append((self.now, limit, backend.running, backend.waiting, self.phase.capacity))
