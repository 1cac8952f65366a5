"""The window and refusals: one decrease for each flight, Retry-After, storms, and what comes after."""

from worker.flow.window.adaptive import Outcome


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
    """A backend that queues and then refuses is judged by its queue: growth costs no credit there."""
    driver.flights(4, 1.0)
    driver.flights(3, 1.5)
    driver.refuse(driver.start()[-1])
    assert driver.window._refusals.allowed(10.0, 64.0) == 64.0


def test_a_flight_of_refusals_decreases_once(driver):
    """Only the first of them is fresh."""
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


def test_a_pause_closes_the_window_for_exactly_its_time(driver):
    """The window believes what it is told; a limit of the pause is set by the caller."""
    for pause_s in (3.0, 86400.0):
        tickets = driver.start(1)
        driver.refuse(tickets[0], pause_s)
        assert driver.window.opens_at() == driver.clock.now() + pause_s
        assert not driver.window.has_room()
        driver.clock.advance(pause_s)
        assert driver.window.has_room()


def test_after_a_pause_the_window_ramps_up(driver):
    """The end of a pause causes no burst."""
    driver.flights(4, 1.0)
    tickets = driver.start()
    driver.refuse(tickets[0], 5.0)
    for ticket in tickets[1:]:
        driver.window.finish(ticket, Outcome.NEUTRAL)
    driver.clock.advance(5.0)
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


def test_a_window_at_the_floor_still_lets_one_try(driver):
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
