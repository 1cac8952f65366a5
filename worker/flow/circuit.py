"""
One circuit breaker: closed, open, or half-open with one probe.

Theory of operation.  The caller of an attempt asks `allows`, takes a `Pass` with `enter`, and reports the end of the
attempt with exactly one of `record_success`, `record_failure`, `record_ignored`.  A pass carries the generation in
which it was taken; the generation changes with every trip, close and `allow_probe`.  A report from an older generation
is evidence about an earlier state and is ignored.  So a hundred attempts that fail together trip the circuit once, and
the late success of an attempt that started before the trip does not close it.

A success ends the row of failures only as far as they are older than it: an attempt that began before a fault, and is
served long after others have failed, says nothing about the fault.

Failures are often quicker than answers.  So a row of them that is long enough puts the circuit *in doubt* while others
are under way that began no earlier: it is closed, but lets nothing start until one of the others is served (it goes on
as before), all have failed, or `DOUBT_S` is over.  Then it opens, unless so many that began with the row have lasted
longer than its failures that the failures may be chance (`policy.blame.is_outlasted`).

No callback and no timer is used here.  `changes_at` returns the instant at which `allows` may become true without any
report; the gate keeps a timer for it.

Source: the pattern of closed, open and half-open is M. Nygard, "Release It!", chapter 5.
"""

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from itertools import takewhile
from types import MappingProxyType

import msgspec

from worker.flow.clock import Now
from worker.policy.backoff import Backoff
from worker.policy.blame import is_outlasted, speaks_against_backend

CONNECT = "connect"
"""The error class of a connection that was refused or not made: no message's own trouble, whichever it was."""
PROBE_JITTER = 0.1
"""Share of a wait for a probe that is random, so that many workers do not probe in step.  House decision."""
PROBE_BACKOFF = Backoff(base_s=1.0, max_s=4.0, jitter=PROBE_JITTER)
"""4 s at most, so that full rate is back within 5 s of the backend's recovery; a refused probe costs nothing."""
DOUBT_S = 0.5
"""Longest doubt, seconds.  Less than a failure waits for others before it is nacked (`judge.OUTAGE_DETECTION_S`), and
more than most short answers take.  House decision."""
TOGETHER_S = 0.02
"""Attempts that begin within so many seconds begin together: which was first is chance.  House decision."""
MAX_KEPT = 16_384
"""Most failures of a row that are kept: more than `blame.MAX_ROW` and as many under way as a window allows."""
EARLY_PROBES = 3
"""So many probes come with the ordinary backoff before that of a class that seldom ends: where a fifth of the messages
fails, the two that opened the circuit and these all fail once in 3,000 times.  House decision."""


class CircuitState(StrEnum):
    """Whether attempts may start."""

    CLOSED = "closed"
    """Freely."""
    OPEN = "open"
    """None before `next_probe_at`, and one from then on."""
    HALF_OPEN = "half_open"
    """One probe is under way; nothing else starts."""


class CircuitConfig(msgspec.Struct, frozen=True, kw_only=True):
    """When a circuit opens and how the return of the backend is noticed."""

    failures: int = 5
    """Counted failures in a row, of any class, that open it; from 1."""
    class_failures: Mapping[str, int] = msgspec.field(default_factory=lambda: MappingProxyType({CONNECT: 3}))
    """Counted failures in a row of one class that open it.  A refused connection says more than a 500: 3."""
    trip_failures: int = 2
    """Failures in a row that open it where one says that nothing can work now: the word of one message is confirmed by
    a second one."""
    window_s: float = 30.0
    """A row is broken if so many seconds passed between its last failure and the beginning of the next attempt that
    fails.  The time that the attempt itself takes breaks nothing: failures may take minutes."""
    probe: Backoff = PROBE_BACKOFF
    class_probe: Mapping[str, Backoff] = msgspec.field(
        default_factory=lambda: MappingProxyType(
            {
                "auth": Backoff(base_s=10.0, max_s=60.0, jitter=PROBE_JITTER),
                "quota": Backoff(base_s=30.0, max_s=300.0, jitter=PROBE_JITTER),
            }
        )
    )
    """Classes that seldom end by themselves.  Refused credentials are probed seldom, so that the account is not locked;
    new credentials allow a probe at once."""
    probe_patience_s: float = 30.0
    """A probe without any report for so long no longer prevents the next one, seconds: a hung request must not hold a
    circuit half-open for as long as its own timeout, which may be an hour."""
    max_retry_after_s: float = 60.0
    """Longest Retry-After that is obeyed, seconds: an open circuit gets no answers that could correct a wrong hint."""

    def __post_init__(self) -> None:
        if self.failures < 1 or any(limit < 1 for limit in self.class_failures.values()):
            raise ValueError("failures count from 1")
        if self.window_s <= 0 or self.probe_patience_s <= 0 or self.max_retry_after_s < 0:
            raise ValueError("durations must be positive")


class Pass(msgspec.Struct, frozen=True):
    """The right to make one attempt."""

    generation: int
    is_probe: bool


class _Failure(msgspec.Struct, frozen=True):
    """One of a row."""

    at: float
    began_at: float
    error_class: str
    key: str | None
    is_trip: bool


class _Doubt(msgspec.Struct, frozen=True):
    """A row that may be chance, and how the circuit opens if it is not."""

    until: float
    error_class: str
    retry_after_s: float | None
    failing_share: float


class CircuitStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """A circuit at one instant."""

    state: CircuitState
    error_class: str | None
    """Why it last opened; `None` while closed."""
    next_probe_at: float | None
    """Monotonic seconds; `None` while closed or while a probe is under way."""
    failures: int
    """Counted failures in a row, while closed."""
    trips: int
    """Times it went from closed to open, since the start."""


class Circuit:
    """
    Decides whether an attempt may start, from how the last ones ended.

    Args:
        config: The thresholds.
        now: Monotonic seconds.
        jitter: Uniform numbers in [0, 1); shortens a wait of the backoff, and stretches a Retry-After, by up to
            `PROBE_JITTER` of it.
    """

    def __init__(self, config: CircuitConfig, now: Now, *, jitter: Callable[[], float] = random.random) -> None:
        self._config = config
        self._now = now
        self._jitter = jitter
        self._state = CircuitState.CLOSED
        self._generation = 0
        self._free_pass = Pass(0, is_probe=False)
        """Of every attempt that is no probe."""
        self._row: deque[_Failure] = deque(maxlen=MAX_KEPT)
        self._doubt: _Doubt | None = None
        self._last_failed: str | None = None
        self._error_class: str | None = None
        self._opened_at: float | None = None
        self._next_probe_at = 0.0
        self._failed_probes = 0
        self._late_waits = 0  # of the class's own backoff
        self._trips = 0

    @property
    def state(self) -> CircuitState:
        """The state as of the last report; an elapsed wait shows in `allows`."""
        return self._state

    @property
    def error_class(self) -> str | None:
        """Why it last opened; `None` while closed."""
        return self._error_class

    @property
    def last_failed(self) -> str | None:
        """The message that failed last; another one is the next probe."""
        return self._last_failed

    @property
    def failed_probes(self) -> int:
        """Probes that failed since it opened."""
        return self._failed_probes

    @property
    def opened_at(self) -> float | None:
        """When it last went from closed to open, monotonic seconds; `None` while closed."""
        return self._opened_at

    @property
    def is_pristine(self) -> bool:
        """Closed without a failure that a later attempt could add to: forgetting it would change nothing."""
        return self._state is CircuitState.CLOSED and (not self._row or self._is_row_broken(self._now()))

    def allows(self) -> bool:
        """Whether one attempt may start now."""
        if self._state is CircuitState.CLOSED:
            return self._doubt is None
        return self._now() >= self._next_probe_at

    def changes_at(self) -> float | None:
        """
        Return the next instant at which time alone changes something; `None` while closed without a doubt.

        `allows` becomes true then, or `end_doubt` ends a doubt.
        """
        if self._state is CircuitState.CLOSED:
            return None if self._doubt is None else self._doubt.until
        return self._next_probe_at

    def is_doubt_over(self) -> bool:
        """Whether a doubt has lasted for its time, so that `end_doubt` ends it."""
        return self._doubt is not None and self._now() >= self._doubt.until

    def end_doubt(self, under_way: Sequence[float]) -> None:
        """
        End a doubt that has lasted for its time: open, or go on if the row is outlasted or long over.

        Args:
            under_way: When each attempt under way began, monotonic seconds.
        """
        if self._doubt is None or not self.is_doubt_over():
            return
        doubt, now = self._doubt, self._now()
        longest_s = max(each.at - each.began_at for each in self._row)
        outlasting = sum(now - began_at > longest_s for began_at in self._began_with_row(under_way))
        if self._is_row_broken(now) or is_outlasted(len(self._row), doubt.failing_share, outlasting):
            self._row.clear()
            self._doubt = None
        else:
            self._trip(doubt.error_class, doubt.retry_after_s, doubt.failing_share)

    def enter(self) -> Pass:
        """
        Begin an attempt; while not closed it is the probe.

        Raises:
            RuntimeError: `allows` is false; an error of the caller.
        """
        if not self.allows():
            raise RuntimeError("the circuit is open")
        if self._state is CircuitState.CLOSED:
            if self._free_pass.generation != self._generation:
                self._free_pass = Pass(self._generation, is_probe=False)
            return self._free_pass
        self._state = CircuitState.HALF_OPEN
        self._next_probe_at = self._now() + self._config.probe_patience_s
        return Pass(self._generation, is_probe=True)

    def record_success(self, token: Pass, *, began_at: float | None = None) -> bool:
        """
        Report that the backend works; return whether this closed the circuit.

        Args:
            token: The value that `enter` returned.
            began_at: When the attempt began, monotonic seconds; `None`: now.
        """
        if token.generation != self._generation:
            return False
        if self._state is CircuitState.CLOSED:
            self._end_row(self._now() if began_at is None else began_at)
            return False
        self._state = CircuitState.CLOSED
        self._generation += 1
        self._error_class = self._opened_at = None
        self._failed_probes = self._late_waits = 0
        return True

    def record_failure(
        self,
        token: Pass,
        error_class: str,
        *,
        key: str | None = None,
        trip: bool = False,
        failing_share: float = 0.0,
        began_at: float | None = None,
        under_way: Sequence[float] = (),
        retry_after_s: float | None = None,
    ) -> None:
        """
        Report a failure of the backend.

        Args:
            token: The value that `enter` returned.
            error_class: Remembered and shown while open.
            key: The message that failed: a row of failures of one message alone opens nothing.  `None`: a message that
                is not known again.
            trip: The backend said that nothing can work now: `trip_failures` are enough.
            failing_share: Of messages that fail while others are served, 0 to 1; the row has to be longer than that
                explains.
            began_at: When the attempt began, monotonic seconds; `None`: now.
            under_way: When each of the other attempts under way began, monotonic seconds.  Failures that end first are
                no row, and what began no earlier than the row can tell what it is.
            retry_after_s: The server's Retry-After, seconds; replaces the wait of the backoff, up to
                `max_retry_after_s`.
        """
        if token.generation != self._generation:
            return
        self._last_failed = key
        if self._state is CircuitState.CLOSED:
            now = self._now()
            failure = _Failure(now, now if began_at is None else began_at, error_class, key, trip)
            if not self._count(failure, failing_share, len(under_way)):
                return
            if error_class != CONNECT and self._began_with_row(under_way):
                if self._doubt is None:
                    self._doubt = _Doubt(now + DOUBT_S, error_class, retry_after_s, failing_share)
                self.end_doubt(under_way)
            else:
                self._trip(error_class, retry_after_s, failing_share)
        else:
            self._failed_probes += 1
            self._open(error_class, retry_after_s, failing_share)

    def record_ignored(self, token: Pass, *, wait_s: float = 0.0) -> None:
        """Report an end that says nothing about the backend (cancelled, a bad request); another probe may start."""
        if token.generation == self._generation and self._state is CircuitState.HALF_OPEN:
            self._state = CircuitState.OPEN
            self._next_probe_at = self._now() + wait_s

    def allow_probe(self) -> None:
        """
        Allow a probe at once: the cause may be gone (credentials changed, the health path answers).

        A probe under way no longer counts, for it may have started before the change.
        """
        if self._state is CircuitState.CLOSED:
            return
        self._state = CircuitState.OPEN
        self._generation += 1
        self._failed_probes = self._late_waits = 0
        self._next_probe_at = self._now()

    def statistics(self) -> CircuitStatistics:
        """Return a snapshot."""
        return CircuitStatistics(
            state=self._state,
            error_class=self._error_class,
            next_probe_at=self._next_probe_at if self._state is CircuitState.OPEN else None,
            failures=len(self._row),
            trips=self._trips,
        )

    def _count(self, failure: _Failure, failing_share: float, undecided: int) -> bool:
        """Add one to the row; return whether it is long enough to open."""
        if self._row and self._is_row_broken(failure.began_at):
            self._row.clear()
            self._doubt = None
        self._row.append(failure)
        if failure.error_class != CONNECT and failure.key is not None and all(e.key == failure.key for e in self._row):
            return False
        if speaks_against_backend(len(self._row), self._config.failures, failing_share, undecided):
            return True
        limit = self._config.class_failures.get(failure.error_class)
        if limit is not None:
            same = sum(1 for _ in takewhile(lambda each: each.error_class == failure.error_class, reversed(self._row)))
            if speaks_against_backend(same, limit, failing_share, undecided):
                return True
        trips = sum(1 for _ in takewhile(lambda each: each.is_trip, reversed(self._row)))
        return speaks_against_backend(trips, self._config.trip_failures, failing_share, undecided)

    def _is_row_broken(self, began_at: float) -> bool:
        """Return whether the row was over when an attempt began."""
        return self._row[-1].at <= began_at - self._config.window_s

    def _began_with_row(self, under_way: Sequence[float]) -> list[float]:
        """Return those that began no earlier than the first attempt of the row, or together with it."""
        since = min(each.began_at for each in self._row) - TOGETHER_S
        return [began_at for began_at in under_way if began_at >= since]

    def _end_row(self, began_at: float) -> None:
        """Forget the failures of attempts that began no later than one that is served, or together with it."""
        later = [each for each in self._row if each.began_at > began_at + TOGETHER_S]
        if len(later) < len(self._row):
            self._row = deque(later, maxlen=MAX_KEPT)
            self._doubt = None

    def _trip(self, error_class: str, retry_after_s: float | None, failing_share: float) -> None:
        self._doubt = None
        self._trips += 1
        self._generation += 1
        self._opened_at = self._now()
        self._open(error_class, retry_after_s, failing_share)

    def _open(self, error_class: str, retry_after_s: float | None, failing_share: float) -> None:
        jitter = self._jitter()
        if retry_after_s is None:
            backoff = self._config.class_probe.get(error_class)
            # The first probes are early whatever the class: as long as chance explains that they fail.
            if backoff is None or not speaks_against_backend(self._failed_probes, EARLY_PROBES, failing_share):
                wait = self._config.probe.delay_s(self._failed_probes + 1, 1.0 - jitter)
            else:
                self._late_waits += 1
                wait = backoff.delay_s(self._late_waits, 1.0 - jitter)
        else:
            wait = min(max(retry_after_s, 0.0), self._config.max_retry_after_s) * (1.0 + PROBE_JITTER * jitter)
        self._state = CircuitState.OPEN
        self._row.clear()
        self._error_class = error_class
        self._next_probe_at = self._now() + wait
