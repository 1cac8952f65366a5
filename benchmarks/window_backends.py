"""
The two backends of the simulation.

`SlotBackend` runs up to `capacity` requests at once and queues up to `queue` times as many more, first come first
served; beyond that it refuses.  Running requests share one speed, a function of how many they are, so that a batch
engine that slows down a little (`slowdown`), and a server that shares its processor (`sharing`), are the same few
lines.
`EngineBackend` is the inference engine of `worker/emulators/openai/engine_model.py`.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

from benchmarks.window_model import Phase, Request, Result, Scenario, Size
from worker.emulators.openai.engine_model import Engine, EngineModel, Sequence
from worker.flow.window.adaptive import Outcome

NETWORK_S = 0.001
FIRST_TOKEN_S = {"short": 0.02, "llm": 0.15, "mixed": 0.02}


class World(Protocol):
    """What a backend needs of the simulation."""

    scenario: Scenario
    now: float
    phase: Phase
    result: Result

    def at(self, when: float, action: Callable[[], None]) -> None: ...
    def begin(self, request: Request) -> None: ...
    def answer(self, request: Request, outcome: Outcome) -> None: ...
    def draw(self) -> Size: ...
    def exponential(self, rate: float) -> float: ...


class Backend(Protocol):
    """What the simulation asks of a backend."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def is_full(self) -> bool: ...
    def take(self, request: Request) -> None:
        """Queue a request or run it."""

    def before_change(self) -> None:
        """Account for the phase that ends."""

    def after_change(self) -> list[Request]:
        """Begin the new phase; return the requests that are lost."""

    def proceed(self) -> None:
        """Start what may run."""

    def stop(self) -> None:
        """Account for the last phase."""


class SlotBackend:
    """Slots and a bounded queue."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._count = itertools.count()
        self._queued: deque[Request] = deque()
        self._running: list[tuple[float, int, Request]] = []
        self._progress = 0.0
        self._progress_at = 0.0
        self._epoch = 0

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._queued)

    @property
    def is_full(self) -> bool:
        world = self._world
        busy = len(self._running) >= world.phase.capacity and not world.scenario.sharing
        return busy and len(self._queued) >= world.scenario.queue * world.phase.capacity

    def take(self, request: Request) -> None:
        self._queued.append(request)
        self.proceed()

    def before_change(self) -> None:
        self._advance()

    def stop(self) -> None:
        self._advance()

    def after_change(self) -> list[Request]:
        if self._world.phase.capacity > 0:
            return []
        phases = self._world.result.phases
        lost = [request for _, _, request in self._running] + list(self._queued)
        done = sum(self._progress - target + request.size.seconds for target, _, request in self._running)
        phases[max(0, len(phases) - 2)].work -= done
        self._running.clear()
        self._queued.clear()
        return lost

    def proceed(self) -> None:
        world = self._world
        self._advance()
        while self._queued and (world.scenario.sharing or len(self._running) < world.phase.capacity):
            request = self._queued.popleft()
            world.result.waited_s += world.now - request.sent_at - NETWORK_S
            first = FIRST_TOKEN_S[world.scenario.sizes]
            heapq.heappush(self._running, (self._progress + request.size.seconds + first, next(self._count), request))
            if world.scenario.streamed:
                world.at(world.now + first / self._speed() + NETWORK_S, partial(world.begin, request))
        self._epoch += 1
        if self._running:
            epoch = self._epoch
            left = max(0.0, self._running[0][0] - self._progress) / self._speed()
            world.at(world.now + left, lambda: self._complete(epoch))

    def _speed(self) -> float:
        """Return the seconds of work each running request does in a second."""
        world, n = self._world, len(self._running)
        if world.scenario.sharing:
            return min(1.0, world.phase.capacity / n) if n else 1.0
        return 1.0 / (1.0 + world.scenario.slowdown * max(0, n - 1))

    def _advance(self) -> None:
        """Account for the work done since the last event."""
        world = self._world
        done = (world.now - self._progress_at) * self._speed() if self._running else 0.0
        self._progress += done
        self._progress_at = world.now
        if world.result.phases:
            world.result.phases[-1].work += done * len(self._running)

    def _complete(self, epoch: int) -> None:
        if epoch != self._epoch:
            return
        world = self._world
        self._advance()
        while self._running and self._running[0][0] <= self._progress + 1e-9:
            request = heapq.heappop(self._running)[2]
            world.at(world.now + NETWORK_S, partial(world.answer, request, Outcome.OK))
        self.proceed()


class EngineBackend:
    """An inference engine; other clients ask it too, at random moments, `Phase.others_per_s` times a second."""

    is_full = False

    def __init__(self, world: World, model: EngineModel) -> None:
        self._world = world
        self._engine = Engine(model)
        self._is_busy = False
        self._requests: dict[Sequence, Request] = {}
        self._phase_number = 0

    @property
    def running(self) -> int:
        return self._engine.running

    @property
    def waiting(self) -> int:
        return self._engine.waiting

    def take(self, request: Request) -> None:
        sequence = Sequence(request.size.prompt, int(request.size.tokens))
        self._requests[sequence] = request
        self._engine.add(sequence)
        self.proceed()

    def before_change(self) -> None:
        self._phase_number += 1

    def after_change(self) -> list[Request]:
        self._next_of_others(self._phase_number)
        return []

    def stop(self) -> None:
        self._world.result.phases[-1].work += sum(self._engine.generated(sequence) for sequence in self._requests)

    def proceed(self) -> None:
        if self._is_busy:
            return
        iteration = self._engine.begin()
        if iteration is None:
            return
        world = self._world
        for sequence in iteration.started:
            request = self._requests.get(sequence)
            if request is not None:
                world.result.waited_s += world.now - request.sent_at - NETWORK_S
        self._is_busy = True
        world.at(world.now + iteration.seconds, self._end)

    def _end(self) -> None:
        world = self._world
        self._is_busy = False
        produced = self._engine.end()
        for sequence in produced.first if world.scenario.streamed else []:
            request = self._requests.get(sequence)
            if request is not None:
                world.at(world.now + NETWORK_S, partial(world.begin, request))
        for sequence in produced.finished:
            request = self._requests.pop(sequence, None)
            if request is not None:
                world.result.phases[-1].work += sequence.answer_tokens
                world.at(world.now + NETWORK_S, partial(world.answer, request, Outcome.OK))
        self.proceed()

    def _next_of_others(self, phase_number: int, *, is_due: bool = False) -> None:
        """Add a request of another client, if one is due, and wait for the next, until the phase ends."""
        world = self._world
        if phase_number != self._phase_number or world.phase.others_per_s == 0.0:
            return
        if is_due:
            drawn = world.draw()
            self._engine.add(Sequence(drawn.prompt, int(drawn.tokens)))
            self.proceed()
        wait_s = world.exponential(world.phase.others_per_s)
        world.at(world.now + wait_s, partial(self._next_of_others, phase_number, is_due=True))
