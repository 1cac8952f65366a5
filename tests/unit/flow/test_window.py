"""The window: it grows while nobody waits, shrinks once for each event, and takes nothing else for congestion."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.unit.flow.fakeclock import FakeClock
from worker.flow.window import AdaptiveWindow
from worker.flow.window_types import Outcome, Ticket


class Driver:
    """A window under a load without end, one flight after another."""

    def __init__(self, clock: FakeClock, initial: int = 8, maximum: int = 64, **options) -> None:
        self.clock = clock
        self.window = AdaptiveWindow(initial, 1, maximum, now=clock.now, **options)

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
            self.clock.advance(1.0)  # growth is poured out
            limits.append(self.window.limit)
        return limits

    def refuse(self, ticket: Ticket, retry_after_s: float | None = None) -> bool:
        return self.window.finish(ticket, Outcome.OVERLOAD, retry_after_s=retry_after_s)


@pytest.fixture
def driver(clock):
    return Driver(clock)


def test_it_starts_small(driver):
    """As many as `initial`, no more."""
    assert len(driver.start()) == 8
    assert not driver.window.has_room()
    assert driver.window.opens_at() is None


def test_slow_start_at_least_doubles_with_every_flight(driver):
    """Until the maximum; a flight has more than one round."""
    limits = driver.flights(4, 1.0)
    assert limits[0] >= 16
    assert limits[-1] == 64
    assert driver.window.statistics().slow_start


def test_a_window_that_is_not_in_use_never_grows(driver):
    """Good answers with room to spare say nothing about more."""
    for _ in range(100):
        driver.serve(driver.start(4), 1.0)
    assert driver.window.limit == 8


def test_growth_is_poured_out(driver):
    """What is new does not start all at once; the next place is announced."""
    driver.serve(driver.start(), 1.0)
    assert driver.window.limit == 8
    driver.start()
    at = driver.window.opens_at()
    assert at is not None
    driver.clock.advance(at - driver.clock.now())
    assert driver.window.has_room()


def test_the_first_sign_of_waiting_ends_slow_start(driver):
    """And the window shrinks to what runs and a little."""
    driver.flights(4, 1.0)
    driver.flights(1, 4.0)
    statistics = driver.window.statistics()
    assert not statistics.slow_start
    # Three seconds of four were waiting, so a quarter of 64 ran; the mean time is a little behind.
    assert 16 < statistics.limit < 25
    assert statistics.waiting_share == pytest.approx(0.75, abs=0.07)
    assert statistics.wait_s == pytest.approx(3.0)


def test_a_little_waiting_stops_growth(driver):
    """Between a tenth and a quarter the window stays."""
    driver.flights(4, 1.0)
    driver.window.set_bounds(1, 32)
    driver.window.set_bounds(1, 64)
    assert set(driver.flights(3, 1.2)) == {32}
    assert driver.window.statistics().waiting_share == pytest.approx(0.17, abs=0.02)


def test_capacity_that_came_back_is_found_ever_faster(driver):
    """After a limit growth adds one, then half, then doubles while it meets none."""
    driver.flights(4, 1.0)
    driver.flights(1, 4.0)
    low = driver.window.limit
    limits = driver.flights(6, 1.0)
    assert limits[0] > low
    assert limits[-1] == 64
    assert not driver.window.statistics().slow_start


def test_one_odd_answer_changes_nothing(driver):
    """A hung request among good ones is an outlier, not a queue."""
    driver.flights(4, 1.0)
    tickets = driver.start()
    driver.clock.advance(600.0)
    driver.window.finish(tickets[0], Outcome.OK)
    for ticket in tickets[1:]:
        driver.window.finish(ticket, Outcome.NEUTRAL)
    driver.flights(2, 1.0)
    assert driver.window.limit == 64


def test_long_requests_are_not_congestion_when_their_size_is_known(driver):
    """From embeddings to hour-long generations at once: the size explains the time."""
    for _ in range(4):
        for work in (10.0, 20.0):
            driver.flights(1, work / 50.0, work)
    assert driver.flights(4, 60.0, 3000.0)[-1] == 64
    assert driver.window.statistics().decreases == 0


def test_long_requests_are_not_congestion_when_they_are_streamed(driver):
    """Their first bytes come as soon as ever."""
    for seconds in (1.0, 1.0, 1.0, 1.0, 600.0, 600.0, 600.0):
        tickets = driver.start(streamed=True)
        driver.clock.advance(0.1)
        for ticket in tickets:
            driver.window.first_byte(ticket)
        driver.serve(tickets, seconds)
        driver.clock.advance(1.0)
    assert driver.window.limit == 64
    assert driver.window.statistics().decreases == 0


def test_decreases_that_shorten_no_wait_are_taken_back(driver):
    """Requests that became longer without a known size cost two rounds, then their time is normal."""
    driver.flights(4, 1.0)
    limits = driver.flights(6, 10.0)
    assert min(limits) < 64
    assert limits[-1] == 64


def test_a_real_queue_is_not_taken_for_longer_requests(driver):
    """Where fewer at once wait less, the window stays small."""
    driver.flights(4, 1.0)
    for _ in range(12):
        # Eight run at once, one second each: what is beyond waits its turn.
        driver.flights(1, max(1.0, driver.window.limit / 8.0))
    assert driver.window.limit <= 16


def test_silence_shrinks_before_anything_has_ended(driver):
    """Streamed requests that have not begun to answer wait in a queue; the next event tells."""
    for _ in range(4):
        tickets = driver.start(streamed=True)
        driver.clock.advance(0.1)
        for ticket in tickets:
            driver.window.first_byte(ticket)
        driver.serve(tickets, 1.0)
        driver.clock.advance(1.0)
    tickets = driver.start(streamed=True)
    driver.clock.advance(0.1)
    for ticket in tickets[:32]:
        driver.window.first_byte(ticket)
    assert driver.window.limit == 64
    driver.clock.advance(10.0)
    driver.window.first_byte(tickets[32])
    assert driver.window.limit == pytest.approx(64 * (1 - 31 / 64) / 0.85, abs=1)
    driver.window.first_byte(tickets[33])
    assert driver.window.statistics().decreases == 1


def test_requests_that_are_not_streamed_are_not_silent(driver):
    """Only who promised first bytes is missed."""
    for _ in range(4):
        tickets = driver.start(streamed=True)
        driver.clock.advance(0.1)
        for ticket in tickets:
            driver.window.first_byte(ticket)
        driver.serve(tickets, 1.0)
        driver.clock.advance(1.0)
    plain = driver.start()
    driver.clock.advance(10.0)
    driver.window.finish(plain[0], Outcome.NEUTRAL)
    assert driver.window.statistics().decreases == 0


def test_a_flight_of_refusals_decreases_once(driver):
    """And only the first of them is fresh."""
    tickets = driver.start()
    assert [driver.refuse(ticket) for ticket in reversed(tickets)] == [True] + [False] * 7
    statistics = driver.window.statistics()
    assert (statistics.limit, statistics.rejected, statistics.decreases) == (7, 8, 1)


def test_other_failures_change_nothing(driver):
    """A dead backend is the breaker's affair."""
    for _ in range(20):
        for ticket in driver.start():
            driver.window.finish(ticket, Outcome.NEUTRAL)
    assert driver.window.limit == 8


def test_retry_after_closes_the_window_and_is_capped(driver):
    """To the second; a wish of a day is a minute."""
    for wish, closed in ((3.0, 3.0), (86400.0, 60.0)):
        tickets = driver.start(1)
        driver.refuse(tickets[0], wish)
        assert driver.window.opens_at() == driver.clock.now() + closed
        assert not driver.window.has_room()
        driver.clock.advance(closed)
        assert driver.window.has_room()


def test_retry_after_on_a_step_above_what_is_served_closes_that_step(driver):
    """The others, served as before, go on."""
    driver.flights(1, 1.0)
    tickets = driver.start()
    driver.serve(tickets[:-1], 1.0)
    above = driver.start()[-1]
    driver.refuse(above, 30.0)
    assert driver.window.statistics().closed_until is None


def test_a_window_at_the_floor_still_lets_one_try(driver):
    """Whatever is refused, something must tell when capacity is back."""
    for _ in range(50):
        for ticket in driver.start():
            driver.refuse(ticket)
    assert driver.window.limit == 1
    assert driver.window.has_room()


def test_after_a_storm_it_is_back_at_once(driver):
    """One served attempt restores what was known before everything was refused."""
    driver.flights(4, 1.0)
    for _ in range(20):
        for ticket in driver.start():
            driver.refuse(ticket)
    assert driver.window.limit == 1
    driver.serve(driver.start(), 1.0)
    driver.clock.advance(1.0)
    assert driver.window.limit == 64


def test_the_first_byte_after_a_storm_is_enough(driver):
    """Nobody waits for the end of a generation to know that requests are accepted again."""
    driver.flights(4, 1.0)
    for _ in range(20):
        for ticket in driver.start():
            driver.refuse(ticket)
    driver.window.first_byte(driver.start(1, streamed=True)[0])
    driver.clock.advance(1.0)
    assert driver.window.limit == 64


def test_dips_look_for_the_times_without_a_queue(driver):
    """Now and then, for one round, below what waits; then back."""
    driver.flights(4, 1.0)
    driver.window.set_bounds(1, 32)
    driver.window.set_bounds(1, 64)
    limits = driver.flights(30, 1.2)
    assert min(limits) < 32
    assert limits.count(min(limits)) < len(limits) / 4
    assert limits[-1] == 32 or limits[-2] == 32


def test_reopening_pours_the_window_out(driver):
    """After an outage not everything starts in the same instant."""
    driver.flights(4, 1.0)
    driver.window.reopen()
    assert len(driver.start()) == 1
    driver.clock.advance(1.0)
    assert len(driver.start()) == 63


def test_bounds_change_in_place(driver):
    """Attempts under way are untouched."""
    tickets = driver.start()
    driver.window.set_bounds(1, 4)
    assert (driver.window.limit, driver.window.in_flight) == (4, 8)
    driver.serve(tickets, 1.0)
    assert driver.window.in_flight == 0
    statistics = driver.window.statistics()
    assert (statistics.minimum, statistics.maximum, statistics.served) == (1, 4, 8)


def test_a_ticket_ends_once(driver):
    """The second end is an error of the caller and changes nothing."""
    ticket = driver.start(1)[0]
    driver.window.finish(ticket, Outcome.NEUTRAL)
    with pytest.raises(RuntimeError):
        driver.window.finish(ticket, Outcome.OK)
    driver.window.first_byte(ticket)
    assert driver.window.in_flight == 0


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
    @rule(data=st.data(), outcome=st.sampled_from(Outcome), wish=st.none() | st.floats(-1, 1e6))
    def end(self, data: st.DataObject, outcome: Outcome, wish: float | None) -> None:
        index = data.draw(st.integers(0, len(self.tickets) - 1))
        work = data.draw(st.none() | st.floats(0, 1e6))
        limit = self.window._room.limit
        fresh = self.window.finish(self.tickets.pop(index), outcome, work=work, retry_after_s=wish)
        assert not fresh or outcome is Outcome.OVERLOAD
        if outcome is Outcome.OVERLOAD:
            assert self.window._room.limit <= limit

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
        """Without anything under way there is room now, or at an instant that is announced and at most a minute off."""
        if self.window.in_flight == 0 and not self.window.has_room():
            at = self.window.opens_at()
            assert at is not None
            assert 0 < at - self.clock.now() <= 60.001


WindowMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
test_window_laws = WindowMachine.TestCase
