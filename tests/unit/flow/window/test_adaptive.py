"""The rule: it grows while no request waits, shrinks once for each overload, and takes nothing else for congestion."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.support.fakeclock import FakeClock
from tests.support.flow import Driver
from worker.flow.window.adaptive import FIRST_PAUSE_S, AdaptiveWindow, DecreaseCheck, Outcome, Ticket
from worker.flow.window.latency import BATCH_S
from worker.flow.window.refusals import DOUBT_S


def test_it_starts_small(driver):
    """`initial` attempts may start, and no more."""
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


def test_growth_takes_effect_over_time(driver):
    """New requests do not start all at once; the next start is announced."""
    driver.serve(driver.start(), 1.0)
    assert driver.window.limit == 8
    driver.start()
    at = driver.window.opens_at()
    assert at is not None
    driver.clock.advance(at - driver.clock.now())
    assert driver.window.has_room()


def test_the_first_sign_of_waiting_ends_slow_start(driver):
    """The window shrinks to what runs and a small share more."""
    driver.flights(4, 1.0)
    driver.flights(1, 4.0)
    statistics = driver.window.statistics()
    assert not statistics.slow_start
    # Three seconds of four were waiting, so a quarter of 64 ran; the mean time is a little behind.
    assert 16 < statistics.limit < 25
    assert statistics.waiting_share == pytest.approx(0.75, abs=0.08)
    assert statistics.wait_s == pytest.approx(3.0 - BATCH_S)


def test_a_little_waiting_stops_growth(driver):
    """Between a tenth and a quarter the window stays."""
    driver.flights(4, 1.0)
    driver.set_limit(32)
    assert set(driver.flights(3, 1.2 + BATCH_S)) == {32}
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
    """Their first bytes arrive as early as before."""
    for seconds in (1.0, 1.0, 1.0, 1.0, 600.0, 600.0, 600.0):
        tickets = driver.start(streamed=True)
        driver.clock.advance(0.1)
        for ticket in tickets:
            driver.window.first_byte(ticket)
        driver.serve(tickets, seconds)
        driver.clock.advance(1.0)
    assert driver.window.limit == 64
    assert driver.window.statistics().decreases == 0


def test_ineffective_decreases_are_undone(driver):
    """Requests that became longer without a known size cost two rounds, then their times are the normal ones."""
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


def test_overdue_first_bytes_shrink_before_anything_has_ended(driver):
    """Streamed requests whose first bytes are overdue wait in a queue; the next event is enough to see it."""
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
    # Until fewer are under way than the new limit, the same overdue first bytes cause no second decrease.
    driver.serve(tickets[:16], 0.0)
    assert driver.window.statistics().decreases == 1


def test_requests_that_are_not_streamed_are_never_overdue(driver):
    """Only first bytes that will be reported can be overdue."""
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


def test_first_bytes_from_before_the_last_decision_are_no_evidence(driver):
    """They are not counted in the round that began with it."""
    tickets = driver.start(streamed=True)
    driver.refuse(tickets.pop())
    for ticket in tickets:
        driver.window.first_byte(ticket)
    assert driver.window._meter.collected() == 0


def test_much_waiting_needs_few_answers(driver):
    """Eight of 64 are enough when more than half of the window waits."""
    driver.flights(4, 1.0)
    tickets = driver.start()
    driver.serve(tickets[:7], 4.0)
    assert driver.window.limit == 64
    driver.serve(tickets[7:8], 0.0)
    assert driver.window.limit < 32


def test_growth_of_long_requests_does_not_wait_for_whole_rounds(clock):
    """Growth also listens to attempts that started one step earlier."""

    def answers_to_the_top(seconds: float) -> int:
        driver = Driver(clock)
        driver.flights(4, seconds)
        driver.flights(1, 4.0 * seconds)
        count, tickets = 0, driver.start()
        while driver.window.limit < 64:
            # They are answered one after another, and another one starts each time.
            clock.advance(seconds / len(tickets))
            driver.window.finish(tickets.pop(0), Outcome.OK)
            tickets += driver.start()
            count += 1
        return count

    assert answers_to_the_top(10.0) < 0.8 * answers_to_the_top(2.0)


def test_it_probes_down_for_the_times_without_a_queue(driver):
    """From time to time, for one round, below what waits; then back."""
    driver.flights(4, 1.0)
    driver.set_limit(32)
    limits = driver.flights(30, 1.2 + BATCH_S)
    assert min(limits) < 32
    assert limits.count(min(limits)) < len(limits) / 4
    assert limits[-1] == 32 or limits[-2] == 32


def test_a_ticket_ends_once(driver):
    """The second end is an error of the caller and changes nothing."""
    ticket = driver.start(1)[0]
    driver.window.finish(ticket, Outcome.NEUTRAL)
    with pytest.raises(RuntimeError):
        driver.window.finish(ticket, Outcome.OK)
    driver.window.first_byte(ticket)
    assert driver.window.in_flight == 0


# Decreases that shorten no wait.


def test_two_ineffective_decreases_are_undone():
    """The limit goes back to what it was before the first of them."""
    check = DecreaseCheck()
    check.decreased(9.0, 64.0)
    assert check.judge(9.0) is None
    check.decreased(9.0, 30.0)
    assert check.judge(9.5) == 64.0


@pytest.mark.parametrize("wait_s", [6.2, 11.8, 0.0, -1.0])
def test_a_wait_that_changed_ends_the_row(wait_s):
    """A shorter wait shows that it was effective; a longer one is a queue that is still growing."""
    check = DecreaseCheck()
    check.decreased(9.0, 64.0)
    assert check.judge(9.0) is None
    assert check.judge(wait_s) is None
    check.decreased(9.0, 20.0)
    assert check.judge(9.0) is None


def test_after_an_undone_row_a_new_one_begins():
    """Decreases that were ineffective once may be effective the next time."""
    check = DecreaseCheck()
    for _ in range(2):
        check.decreased(9.0, 64.0)
        assert [check.judge(9.0), check.judge(9.0)] == [None, 64.0]


def test_without_a_decrease_nothing_is_undone():
    """A decrease for another reason ends the row."""
    check = DecreaseCheck()
    assert check.judge(9.0) is None
    check.decreased(9.0, 64.0)
    assert check.judge(9.0) is None
    check.reset()
    assert check.judge(9.0) is None


# Refusals: one decrease for each set of requests under way, pauses, and what comes after.


def test_a_flight_that_waited_and_is_refused_decreases_once(driver):
    """After waiting has shrunk the window, a refusal from the same flight is not fresh."""
    driver.flights(4, 1.0)
    tickets = driver.start()
    refused = tickets.pop(0)
    driver.serve(tickets, 4.0)
    limit = driver.window.limit
    assert driver.window.statistics().decreases == 1
    assert not driver.refuse(refused)
    assert driver.window.limit == limit


def test_where_waiting_came_first_a_refused_level_is_no_ceiling(driver):
    """A backend that queues and then refuses is judged by its queue, so growth needs no credit there."""
    driver.flights(4, 1.0)
    driver.flights(3, 1.5)
    driver.refuse(driver.start()[-1])
    assert driver.window._refusals.allowed(10.0, 64.0) == 64.0


def test_a_flight_of_refusals_decreases_once(driver):
    """The second of them confirms the first; the others are of the same flight."""
    tickets = driver.start()
    assert [driver.refuse(ticket) for ticket in tickets] == [True, True] + [False] * 6
    statistics = driver.window.statistics()
    assert (statistics.rejected, statistics.decreases) == (8, 1)
    assert statistics.limit < 8


def test_other_failures_change_nothing(driver):
    """A backend that is down is left to the breaker."""
    for _ in range(20):
        for ticket in driver.start():
            driver.window.finish(ticket, Outcome.NEUTRAL)
    assert driver.window.limit == 8


def test_a_pause_may_be_twice_as_long_as_the_last_one_while_nothing_is_served(driver):
    """A wrong hint is found out soon, and one that is true costs few calls."""
    for pause_s in (2.0, 4.0, 8.0, 16.0):
        driver.refuse(driver.start(1)[0], 60.0)
        assert driver.window.opens_at() == driver.clock.now() + pause_s
        assert not driver.window.has_room()
        driver.clock.advance(pause_s)
        assert driver.window.has_room()
    driver.serve(driver.start(1), 1.0)
    driver.refuse(driver.start(1)[0], 60.0)
    assert driver.window.opens_at() == driver.clock.now() + FIRST_PAUSE_S


def test_a_pause_is_no_longer_than_the_hint(driver):
    """The backend knows best when it is sooner."""
    driver.refuse(driver.start(1)[0], 0.5)
    assert driver.window.opens_at() == driver.clock.now() + 0.5


def test_those_that_are_refused_together_make_no_pause_longer(driver):
    """They heard one hint, however many they are."""
    for ticket in driver.start():
        driver.refuse(ticket, 60.0)
    assert driver.window.opens_at() == driver.clock.now() + FIRST_PAUSE_S
    assert driver.window.pauses == 1


def test_a_pause_ends_when_an_attempt_that_started_later_is_accepted(driver):
    """The hint was about the other message; one that had started before tells nothing."""
    before, refused, after = driver.start(3)
    driver.refuse(refused, 60.0)
    driver.clock.advance(1.0)
    driver.window.finish(before, Outcome.OK)
    assert driver.window.is_paused
    driver.window.finish(after, Outcome.OK)
    assert not driver.window.is_paused


def test_before_any_congestion_those_under_way_tell_what_refusals_were_about(driver):
    """Nothing starts until one that started later is accepted; then the limit is what it was, and goes on doubling."""
    tickets = driver.start()
    driver.refuse(tickets[0])
    for ticket in tickets[1:3]:
        driver.refuse(ticket, 60.0)
    assert (driver.window.limit, driver.window.has_room(), driver.window.is_paused) == (8, False, False)
    driver.window.finish(tickets[5], Outcome.OK)
    assert (driver.window.limit, driver.window.has_room(), driver.window.is_paused) == (8, True, False)
    assert driver.window.statistics().slow_start


def test_when_all_under_way_are_refused_the_limit_falls_and_the_hint_counts(driver):
    """The doubt is over with the last of them."""
    tickets = driver.start()
    driver.refuse(tickets[0])
    for ticket in tickets[1:-1]:
        driver.refuse(ticket, 60.0)
    assert not driver.window.is_paused
    driver.refuse(tickets[-1], 60.0)
    assert driver.window.is_paused
    assert driver.window.limit < 8


def test_a_doubt_ends_by_itself(driver):
    """Attempts that hang are no reason to wait longer."""
    tickets = driver.start()
    for ticket in tickets[:2]:
        driver.refuse(ticket)
    ends_at = driver.window.opens_at()
    assert ends_at == driver.clock.now() + DOUBT_S
    driver.clock.advance(DOUBT_S)
    driver.window.has_room()
    assert driver.window.limit < 8


def test_the_instant_from_which_one_more_may_start_is_never_over(driver):
    """Also where `has_room` is not asked, as behind an open circuit."""
    tickets = driver.start()
    for ticket in tickets[:2]:
        driver.refuse(ticket)
    driver.clock.advance(DOUBT_S)
    assert driver.window.opens_at() is None
    assert driver.window.limit < 8


def test_a_limit_that_was_lowered_for_messages_goes_on_doubling_afterwards(driver):
    """Even one at a time was refused: the number was not the cause, and the search goes on as if nothing had been."""
    for ticket in driver.start():
        driver.refuse(ticket)
    assert driver.window.limit < 8
    driver.serve(driver.start(1), 0.5)
    assert driver.window.statistics().slow_start
    driver.clock.advance(1.0)
    assert driver.window.limit == 8


def test_after_a_pause_the_window_ramps_up(driver):
    """The end of a pause causes no burst."""
    driver.flights(4, 1.0)
    tickets = driver.start()
    driver.refuse(tickets[0], 5.0)
    for ticket in tickets[1:]:
        driver.window.finish(ticket, Outcome.NEUTRAL)
    driver.clock.advance(FIRST_PAUSE_S)
    assert len(driver.start()) == 1
    driver.clock.advance(1.0)
    assert len(driver.start()) > 20


def test_a_pause_for_a_step_above_what_is_served_closes_that_step(driver):
    """The others, served as before, go on."""
    driver.flights(1, 1.0)
    tickets = driver.start()
    driver.serve(tickets[:-1], 1.0)
    above = driver.start()[-1]
    driver.refuse(above, 30.0)
    assert driver.window.statistics().closed_until is None


def test_at_the_minimum_one_attempt_may_start(driver):
    """Whatever is refused, an attempt must be able to show when capacity is back."""
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
    """The end of a generation need not be awaited to know that requests are accepted again."""
    driver.flights(4, 1.0)
    for _ in range(20):
        for ticket in driver.start():
            driver.refuse(ticket)
    driver.window.first_byte(driver.start(1, streamed=True)[0])
    driver.clock.advance(1.0)
    assert driver.window.limit == 64


def test_a_reopened_window_ramps_up(driver):
    """After an outage not everything starts in the same instant."""
    driver.flights(4, 1.0)
    driver.window.reopen()
    assert len(driver.start()) == 1
    driver.clock.advance(1.0)
    assert len(driver.start()) == 63


# Whatever ends how and when.


LONGEST_PAUSE_S = 60.0


class WindowMachine(RuleBasedStateMachine):
    """Whatever ends how and when, the window stays within its bounds, never stops for good, and counts right."""

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
        may_decrease = self.window.is_refusal_fresh(ticket) or self.window._refusals.is_in_doubt
        self.window.finish(ticket, outcome, work=work, pause_s=pause_s)
        if outcome is Outcome.OVERLOAD:
            assert self.window._limit.target <= limit
            assert may_decrease or self.window._limit.target == limit

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
