"""Whatever ends how and when, the window keeps its laws."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.support.fakeclock import FakeClock
from worker.flow.window.adaptive import AdaptiveWindow, Outcome, Ticket

LONGEST_PAUSE_S = 60.0


class WindowMachine(RuleBasedStateMachine):
    """Whatever ends how and when, the window stays within its bounds, open to trial, and counts right."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.window = AdaptiveWindow(5, 2, 40, now=self.clock.now)
        self.tickets: list[Ticket] = []

    @rule(count=st.integers(1, 50), streamed=st.booleans())
    def start(self, count: int, streamed: bool) -> None:
        for _ in range(count):
            if self.window.has_room():
                self.tickets.append(self.window.start(streamed=streamed))

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), outcome=st.sampled_from(Outcome), pause_s=st.none() | st.floats(0, LONGEST_PAUSE_S))
    def end(self, data: st.DataObject, outcome: Outcome, pause_s: float | None) -> None:
        index = data.draw(st.integers(0, len(self.tickets) - 1))
        work = data.draw(st.none() | st.floats(0, 1e6))
        limit = self.window._limit.target
        ticket = self.tickets.pop(index)
        is_fresh = self.window.is_refusal_fresh(ticket)
        self.window.finish(ticket, outcome, work=work, pause_s=pause_s)
        if outcome is Outcome.OVERLOAD:
            assert self.window._limit.target <= limit
            assert is_fresh or self.window._limit.target == limit

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.window.first_byte(self.tickets[data.draw(st.integers(0, len(self.tickets) - 1))])

    @rule()
    def serve_all(self) -> None:
        for ticket in self.tickets:
            self.window.finish(ticket, Outcome.OK)
        self.tickets.clear()

    @rule(seconds=st.floats(0, 100))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def reopen(self) -> None:
        self.window.reopen()

    @invariant()
    def within_bounds(self) -> None:
        assert 2 <= self.window.limit <= 40
        assert self.window.in_flight == len(self.tickets)

    @invariant()
    def never_stuck(self) -> None:
        """Without anything under way there is room now, or at an instant that is announced and no pause away."""
        if self.window.in_flight == 0 and not self.window.has_room():
            at = self.window.opens_at()
            assert at is not None
            assert 0 < at - self.clock.now() <= LONGEST_PAUSE_S + 0.001


WindowMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
test_window_laws = WindowMachine.TestCase
