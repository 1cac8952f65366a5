"""
The rules the window is compared with, written anew from their published descriptions.

* llm-d batch-gateway: additive increase, and every rejection halves again.
  https://github.com/llm-d/llm-d-batch-gateway
* llm-d-async's feedback gate (proposal 379): slow start to a threshold, +1 for a window of accepts, one halving per
  flight, Retry-After closes it.  https://github.com/llm-d/llm-d-async
* AIBrix's batch controller: cohorts, 0.9 on overload, 0.8 on slow answers, exponential pauses.
  https://github.com/vllm-project/aibrix (`python/aibrix/aibrix/batch/client/concurrency.py`)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from worker.flow.clock import Now
from worker.flow.window.adaptive import Outcome


@dataclass(eq=False)
class Attempt:
    """One attempt under way."""

    number: int
    started_at: float
    first_byte_at: float | None = None


@dataclass(frozen=True)
class End:
    """How an attempt ended."""

    attempt: Attempt
    outcome: Outcome
    work: float | None
    pause_s: float | None


class Fixed:
    """A constant number of requests at once; with `schedule`, one number for each phase of a scenario."""

    def __init__(self, now: Now, limit: int, schedule: Mapping[float, int] | None = None) -> None:
        self.now = now
        self._limit = limit
        self._schedule = schedule or {}
        self.in_flight = 0
        """Attempts under way."""
        self.numbers = 0

    @property
    def limit(self) -> int:
        begun = [start for start in self._schedule if start <= self.now()]
        return self._schedule[max(begun)] if begun else self._limit

    def has_room(self) -> bool:
        return self.in_flight < self.limit and self.opens_at() is None

    def opens_at(self) -> float | None:
        return None

    def start(self, *, streamed: bool) -> Attempt:  # noqa: ARG002 - the window's signature
        self.in_flight += 1
        self.numbers += 1
        return Attempt(self.numbers, self.now())

    def reopen(self) -> None:
        """Do nothing: the described rules know no breaker."""

    def first_byte(self, ticket: Attempt) -> None:
        ticket.first_byte_at = self.now()

    def is_refusal_fresh(self, ticket: Attempt) -> bool:  # noqa: ARG002 - the window's signature
        """Return false: the described rules tell a breaker nothing of refusals."""
        return False

    def finish(self, ticket: Attempt, outcome: Outcome, *, work: float | None, pause_s: float | None) -> None:
        self.in_flight -= 1
        self.learn(End(ticket, outcome, work, pause_s))

    def learn(self, end: End) -> None:
        """Change nothing."""


class BatchGateway(Fixed):
    """Additive increase by one for a window of good answers; each rejection halves."""

    def __init__(self, now: Now, initial: int = 10, maximum: int = 10) -> None:
        super().__init__(now, initial)
        self.window = float(initial)
        self.maximum = maximum

    @property
    def limit(self) -> int:
        return int(self.window)

    def learn(self, end: End) -> None:
        if end.outcome is Outcome.OK:
            self.window = min(self.maximum, self.window + 1.0 / self.window)
        elif end.outcome is Outcome.OVERLOAD:
            self.window = max(1.0, self.window / 2.0)


class FeedbackGate(BatchGateway):
    """Slow start, additive increase, one halving for each flight, Retry-After closes."""

    def __init__(self, now: Now, initial: int = 8, maximum: int = 128) -> None:
        super().__init__(now, initial, maximum)
        self.threshold = float(maximum)
        self.decreased_at = 0
        self.closed_until = 0.0

    def opens_at(self) -> float | None:
        return self.closed_until if self.closed_until > self.now() else None

    def learn(self, end: End) -> None:
        fresh = end.attempt.number > self.decreased_at
        if end.outcome is Outcome.OK and fresh:
            grow = 1.0 if self.window < self.threshold else 1.0 / self.window
            self.window = min(self.maximum, self.window + grow)
        elif end.outcome is Outcome.OVERLOAD:
            if end.pause_s is not None:
                self.closed_until = max(self.closed_until, self.now() + end.pause_s)
            if fresh:
                self.window = self.threshold = max(1.0, self.window / 2.0)
                self.decreased_at = self.numbers


class AIBrix(Fixed):
    """Growth every 8 good answers, one judgement for each cohort, slow answers against a moving average, pauses."""

    def __init__(self, now: Now, initial: int = 8, maximum: int = 128) -> None:
        super().__init__(now, initial)
        self.window = initial
        self.maximum = maximum
        self.probing = True
        self.healthy = self.cohort = self.errors = 0
        self.paused_until = 0.0
        self.pause_s = 0.0
        self.averages: dict[str, tuple[int, float]] = {}

    @property
    def limit(self) -> int:
        return self.window

    def opens_at(self) -> float | None:
        return self.paused_until if self.paused_until > self.now() else None

    def learn(self, end: End) -> None:
        self.cohort += 1
        if end.outcome is Outcome.OK:
            self.pause_s = self.paused_until = 0.0
            if self._is_slow(end.attempt, end.work):
                self._decrease(0.8)
            else:
                self.healthy += 1
                if self.healthy >= 8:
                    self.healthy = 0
                    self.window = min(self.maximum, self.window + (max(1, self.window // 4) if self.probing else 1))
        else:
            self.errors += 1
            if self.pause_s:
                self._pause()
        if self.cohort >= max(8, self.window):
            if self.errors >= 2 and self.errors >= 0.1 * self.cohort:
                self._decrease(0.9)
                self._pause()
            self.cohort = self.errors = 0

    def _decrease(self, keep: float) -> None:
        self.probing = False
        self.healthy = 0
        self.window = max(1, min(self.window - 1, int(self.window * keep)))

    def _pause(self) -> None:
        self.pause_s = min(10.0, 2.0 * self.pause_s or 0.5)
        self.paused_until = self.now() + self.pause_s

    def _is_slow(self, ticket: Attempt, work: float | None) -> bool:
        """Compare time to first byte, and time for each later unit of work, with 1.75 x their moving averages."""
        if ticket.first_byte_at is None:
            return False
        signals = {"first": ticket.first_byte_at - ticket.started_at}
        if work is not None and work > 1.0:
            signals["each"] = (self.now() - ticket.first_byte_at) / (work - 1.0)
        slow = False
        for name, value in signals.items():
            count, average = self.averages.get(name, (0, value))
            slow |= count >= 8 and value > 1.75 * average
            self.averages[name] = (count + 1, average + 0.2 * (value - average))
        return slow


OTHER_RULES: Mapping[str, Callable[[Now, int], Fixed]] = {
    "llm-d batch-gateway": lambda now, _: BatchGateway(now),
    "llm-d feedback gate": lambda now, maximum: FeedbackGate(now, maximum=maximum),
    "AIBrix": lambda now, maximum: AIBrix(now, maximum=maximum),
    "fixed 64": lambda now, _: Fixed(now, 64),
}
"""Built with the largest window that they are configured with."""
