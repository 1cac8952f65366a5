"""
A lane: the attempts on one route that share a fate: those of one model, and of one tenant where tenants are told apart.

Each lane has its own window, circuit, queue and memory of what failed, so that a model that is down, loading or at its
limit stops no other one.  What concerns the whole host (a refused connection, the account) is the route's: a route has
a circuit and a memory of its own beside those of its lanes.

Names come from requesters, so there are at most `MAX_LANES`: a lane that is idle and has nothing to remember
makes room for a new one, and beyond that all further ones share one lane.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum

import msgspec

from worker.flow.answer_times import AnswerTimes
from worker.flow.circuit import Circuit, CircuitState, CircuitStatistics, Pass
from worker.flow.evidence import Evidence
from worker.flow.queue import WaitQueue
from worker.flow.window.adaptive import AdaptiveWindow, WindowStatistics
from worker.policy.blame import PRIOR_SHARE, speaks_against_backend

MAX_LANES = 64
"""House decision: far above the models that one backend serves, and a number of tenants that can be watched."""
LEAST_ROW = 2
"""Messages that must fail in a row for the next one to be chosen at random."""
SHARED = "*"
"""Name of the lane of everything beyond `MAX_LANES`."""


class BreakerEffect(StrEnum):
    """What the end of an attempt says about the backend."""

    SUCCESS = "success"
    """It works: closes the circuit, ends the row of failures."""
    NONE = "none"
    """Nothing."""
    COUNT = "count"
    """One more failure in a row."""
    TRIP = "trip"
    """It cannot work now: two messages that say so open the circuit."""


class BreakerScope(StrEnum):
    """What a failure concerns."""

    ROUTE = "route"
    LANE = "lane"


class BreakerChange(msgspec.Struct, frozen=True, kw_only=True):
    """A circuit that was closed opened, or one that was open closed."""

    lane: str | None
    """`None`: the whole route."""
    error_class: str
    """Why it opened, or last stayed open."""
    open_s: float | None
    """How long it was open, seconds; `None`: it opened."""


class LaneStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """A lane at one instant."""

    window: WindowStatistics
    circuit: CircuitStatistics
    limit: int
    """Attempts that may run at once now: the window's limit, or the part of it that a metric gate leaves."""
    in_flight: int
    """Permits not finished."""
    waiting: int
    """Callers of `admit` that wait, held ones included."""
    held: int
    """How many of these have a message that was attempted before (`AdmissionOrder.held`)."""
    failing_share: float
    """Share of messages whose first attempt failed lately although others were served, 0 to 1."""


class Fate:
    """
    A circuit and the evidence it is judged by: of a lane, or of the route.

    Args:
        name: Of the lane; `None` for the route.
        circuit: Closed.
        on_change: Called when the circuit opens or closes; raises nothing and does not call back.
    """

    def __init__(
        self, name: str | None, circuit: Circuit, on_change: Callable[[BreakerChange], None] | None = None
    ) -> None:
        self.name = name
        self.circuit = circuit
        self.evidence = Evidence()
        self._is_forgiving = False
        self._on_change = on_change

    def record_success(self, token: Pass, now: float, *, began_at: float) -> bool:
        """Report that it works since an attempt that began then; return whether this closed the circuit."""
        error_class, opened_at = self.circuit.error_class, self.circuit.opened_at
        has_closed = self.circuit.record_success(token, began_at=began_at)
        if has_closed:
            self._is_forgiving = True
            if self._on_change is not None and opened_at is not None:
                self._on_change(BreakerChange(lane=self.name, error_class=error_class or "", open_s=now - opened_at))
        return has_closed

    def forgives(self, *, has_failed: bool) -> bool:
        """
        Say, once after the circuit has closed, that messages that failed stand behind others no more.

        An outage explains their failures when one of them is served.  A message that had not failed shows nothing about
        those that had: they may be what always fails, and would go first again.

        Args:
            has_failed: The message that was served now had failed before.
        """
        if not (self._is_forgiving and has_failed):
            return False
        self._is_forgiving = False
        self.evidence.forgive()
        return True

    def is_failing(self) -> bool:
        """Whether so many messages failed since one was served that chance does not explain it."""
        # Of a block of messages that fail the share is large, and says nothing of those behind it.
        share = min(self.evidence.failing_share, PRIOR_SHARE)
        return speaks_against_backend(self.evidence.row, LEAST_ROW, share)

    def record_failure(
        self,
        token: Pass,
        error_class: str,
        *,
        key: str | None,
        trip: bool,
        began_at: float,
        under_way: Sequence[float],
        retry_after_s: float | None,
    ) -> None:
        """
        Report a failure that speaks against it.

        Args:
            token: See `Circuit.record_failure`, like those that are not named here.
            error_class: Of the failure.
            key: The message.
            trip: One that stops everything.
            began_at: When the attempt began, monotonic seconds.
            under_way: When each of the others that share this fate began.
            retry_after_s: The server's hint, seconds.
        """
        was_closed = self.circuit.opened_at is None
        self.circuit.record_failure(
            token,
            error_class,
            key=key,
            trip=trip,
            failing_share=self.evidence.failing_share,
            began_at=began_at,
            under_way=under_way,
            retry_after_s=retry_after_s,
        )
        self._tell_if_opened(was_closed=was_closed)

    def end_doubt(self, under_way: Sequence[float]) -> None:
        """
        End a doubt that has lasted for its time (`Circuit.end_doubt`).

        Args:
            under_way: When each attempt that shares this fate began.
        """
        was_closed = self.circuit.opened_at is None
        self.circuit.end_doubt(under_way)
        self._tell_if_opened(was_closed=was_closed)

    def _tell_if_opened(self, *, was_closed: bool) -> None:
        if was_closed and self._on_change is not None and self.circuit.opened_at is not None:
            error_class = self.circuit.error_class or ""
            self._on_change(BreakerChange(lane=self.name, error_class=error_class, open_s=None))


class Lane(Fate):
    """
    Window, circuit, queue and memory of what shares a fate.

    Args:
        name: See `RequestMessage.lane`; `""` for requests without a model.
        window: Its own.
        circuit: Its own, closed.
        queue: Its own, empty.
        on_change: See `Fate`.
    """

    def __init__(
        self,
        name: str,
        window: AdaptiveWindow,
        circuit: Circuit,
        queue: WaitQueue,
        on_change: Callable[[BreakerChange], None] | None = None,
    ) -> None:
        super().__init__(name, circuit, on_change)
        self.window = window
        self.queue = queue
        self.under_way: dict[int, float] = {}
        """When each attempt under way began, monotonic seconds, by the number of its start."""
        self.times = AnswerTimes()

    @property
    def is_idle(self) -> bool:
        """Whether forgetting the lane would lose no attempt, no waiter and no open circuit."""
        return not self.queue and self.window.in_flight == 0 and self.circuit.is_pristine

    @property
    def is_stopped(self) -> bool:
        """Whether an open circuit or a pause of the window keeps its messages back."""
        return self.circuit.state is not CircuitState.CLOSED or self.window.is_paused

    def may_start(self) -> bool:
        """Whether the lane lets an attempt start now; the route's circuit is not asked."""
        if self.circuit.state is CircuitState.CLOSED:
            return self.circuit.allows() and self.window.has_room()
        # A probe needs no room: attempts that started before the circuit opened, and hang, may fill the window.
        return self.circuit.allows()

    def statistics(self, part: float = 1.0) -> LaneStatistics:
        """Return a snapshot; of the window a part, 0 to 1, may be used."""
        return LaneStatistics(
            window=self.window.statistics(),
            limit=part_of(self.window.limit, part),
            circuit=self.circuit.statistics(),
            in_flight=self.window.in_flight,
            waiting=len(self.queue),
            held=self.queue.held,
            failing_share=self.evidence.failing_share,
        )


def part_of(limit: int, part: float) -> int:
    """Return how many attempts a part of a limit, 0 to 1, allows: at least one unless the part is 0."""
    return limit if part >= 1.0 else math.ceil(limit * part)


class Lanes:
    """
    The lanes of one route.

    Args:
        make: Makes the lane of a name.
        limit: How many there are at most, beside the shared one.
    """

    def __init__(self, make: Callable[[str], Lane], *, limit: int = MAX_LANES) -> None:
        self._make = make
        self._limit = limit
        self._lanes: dict[str, Lane] = {}

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._lanes.values())

    def of(self, name: str | None) -> Lane:
        """Return a lane, made now if there is none; the shared one where no other can be made."""
        name = name or ""
        lane = self._lanes.get(name)
        if lane is None:
            if len(self._lanes) >= self._limit and not self._forget_one():
                name = SHARED
                lane = self._lanes.get(name)
            if lane is None:
                lane = self._lanes[name] = self._make(name)
        return lane

    def find(self, name: str | None) -> Lane | None:
        """Return a lane if there is one, else the shared one if there is that."""
        return self._lanes.get(name or "") or self._lanes.get(SHARED)

    def statistics(self, part: float = 1.0) -> Mapping[str, LaneStatistics]:
        """Return a snapshot of each, by name; of the windows a part, 0 to 1, may be used."""
        return {name: lane.statistics(part) for name, lane in self._lanes.items()}

    def _forget_one(self) -> bool:
        """Forget the oldest lane that is idle."""
        for name, lane in self._lanes.items():
            if lane.is_idle:
                del self._lanes[name]
                return True
        return False
