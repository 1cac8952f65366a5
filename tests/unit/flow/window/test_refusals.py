"""What a refusal says about the limit: once for each flight, in proportion, and never for free."""

import pytest

from tests.support.fakeclock import FakeClock
from worker.flow.window.refusals import SOON, Refusals


class Flight:
    """Refusals with the bookkeeping of a window around them."""

    def __init__(self, clock: FakeClock, limit: float = 32.0) -> None:
        self.refusals = Refusals(clock.now)
        self.limit = limit
        self.number = 0

    def next_number(self) -> int:
        self.number += 1
        return self.number

    def refuse(self, number: int | None = None, in_flight: int = 32, *, warned: bool = False) -> float | None:
        """Refuse one attempt, and another one where the first of a row only raises a suspicion."""
        new = self.refuse_one(number, in_flight, warned=warned)
        return self.refuse_one(None, in_flight, warned=warned) if new is None and number is None else new

    def refuse_one(self, number: int | None = None, in_flight: int = 32, *, warned: bool = False) -> float | None:
        number = self.next_number() if number is None else number
        new = self.refusals.refused(number, in_flight, limit=self.limit, next_number=self.number + 1, warned=warned)
        if new is not None:
            self.limit = new
        return new

    def serve(self, times: int = 1, in_flight: int = 32) -> float | None:
        restored = None
        for _ in range(times):
            self.refusals.served()
            restored = self.refusals.accepted(self.next_number(), in_flight, limit=self.limit) or restored
        return restored


def test_a_row_of_refusals_takes_a_tenth_a_quarter_then_halves(clock):
    """Each is of an attempt begun after the decrease before."""
    flight = Flight(clock, 100.0)
    assert flight.refuse(in_flight=100) == pytest.approx(90.0)
    assert flight.refuse(in_flight=90) == pytest.approx(67.5)
    assert flight.refuse(in_flight=67) == pytest.approx(33.5)
    assert flight.refuse(in_flight=33) == pytest.approx(16.5)


def test_a_flight_decreases_once(clock):
    """However many of the attempts that were under way together are refused; the second refusal confirms the first."""
    flight = Flight(clock)
    numbers = [flight.next_number() for _ in range(32)]
    assert flight.refuse(numbers[20]) is None
    assert flight.refuse(numbers[21]) is not None
    assert [flight.refuse(number) for number in numbers] == [None] * 32


def test_one_refusal_among_accepted_attempts_changes_nothing(clock):
    """It may be about its message: an attempt that started later beside as many was accepted."""
    flight = Flight(clock)
    for _ in range(50):
        flight.serve(in_flight=20)
        assert flight.refuse_one(in_flight=20) is None
    assert flight.limit == 32.0
    assert flight.refusals.are_of_messages


def test_a_second_refusal_beside_as_many_confirms_the_first(clock):
    """One beside more says nothing about it."""
    flight = Flight(clock)
    flight.serve(in_flight=32)
    assert flight.refuse_one(in_flight=20) is None
    assert flight.refuse_one(in_flight=10) is None
    assert flight.refuse_one(in_flight=20) is not None


def test_while_refusals_are_about_messages_growth_is_free(clock):
    """Neither a decrease nor a ceiling follows from them."""
    flight = Flight(clock)
    for _ in range(10):
        flight.refuse_one(in_flight=20)
        flight.serve(in_flight=20)
    assert flight.refuse_one(in_flight=20) is flight.refuse_one(in_flight=20) is None
    assert flight.refusals.allowed(32.0, 64.0) == 64.0


def test_refusals_are_about_the_number_again_when_no_such_attempt_is_accepted(clock):
    """What was found out about messages does not hide a backend that is full now."""
    flight = Flight(clock, 64.0)
    for _ in range(10):
        flight.refuse_one(in_flight=20)
        flight.serve(in_flight=20)
    assert flight.refusals.are_of_messages
    refused = 0
    while flight.refuse_one(in_flight=40) is None:
        flight.serve(in_flight=16)
        refused += 1
    assert refused < 25


def test_a_step_is_refused_or_served_by_chance_at_the_edge(clock):
    """One more than was served may pass when another ends within the same millisecond: no refusal is excused by that."""
    flight = Flight(clock, 33.0)
    flight.serve(in_flight=32)
    for _ in range(20):
        flight.limit = 33.0
        lucky = flight.next_number()
        assert flight.refuse_one(in_flight=33) == 32.0
        flight.refusals.accepted(lucky, 33, limit=flight.limit)
    assert not flight.refusals.are_of_messages


def test_a_step_is_about_its_message_if_one_beside_more_is_served(clock):
    """The edge is higher then."""
    flight = Flight(clock, 64.0)
    for beside in range(20, 40, 2):
        flight.serve(in_flight=beside)
        flight.refuse_one(in_flight=beside + 1)
    flight.serve(in_flight=40)
    assert flight.refusals.are_of_messages


def test_an_attempt_much_later_settles_nothing(clock):
    """The capacity may be another one by then."""
    flight = Flight(clock)
    for _ in range(10):
        flight.refuse_one(in_flight=20)
        flight.serve(SOON, in_flight=5)
        flight.serve(in_flight=32)
    assert not flight.refusals.are_of_messages


def test_a_decrease_for_another_reason_answers_the_flight_too(clock):
    """After waiting has shrunk the window, refusals of the same flight say nothing new."""
    flight = Flight(clock)
    number = flight.next_number()
    flight.refusals.decreased(flight.number + 1)
    assert flight.refuse(number) is None


def test_a_served_attempt_ends_the_row(clock):
    """The next refusal is a first one again."""
    flight = Flight(clock, 100.0)
    flight.refuse(in_flight=100)
    flight.refuse(in_flight=90)
    flight.serve(in_flight=60)
    assert flight.refuse(in_flight=60) == pytest.approx(54.0)


def test_an_old_answer_does_not_end_the_row(clock):
    """Only an attempt that started after the refusal is evidence against it."""
    flight = Flight(clock, 100.0)
    old = flight.next_number()
    flight.refuse(in_flight=100)
    flight.refusals.accepted(old, 100, limit=flight.limit)
    assert flight.refuse(in_flight=90) == pytest.approx(67.5)


def test_the_decrease_starts_from_what_was_in_use(clock):
    """A limit that was not in use does not soften it."""
    assert Flight(clock, 100.0).refuse(in_flight=60) == pytest.approx(54.0)


def test_one_event_takes_no_more_than_about_half(clock):
    """A refusal far below the limit is the load of others: no ceiling, and no fall to the floor."""
    flight = Flight(clock, 100.0)
    assert flight.refuse(in_flight=10) == pytest.approx(45.0)
    assert flight.refusals.allowed(45.0, 90.0) == 90.0


def test_a_refused_step_takes_back_the_step_only(clock):
    """Above what was just served the window goes back to what was served."""
    flight = Flight(clock, 33.0)
    flight.serve(in_flight=32)
    assert flight.refusals.is_above_proven(33)
    assert flight.refuse(in_flight=33) == 32.0


def test_nothing_is_proven_before_the_first_answer(clock):
    """Without any answer no refusal is a mere step."""
    assert not Flight(clock).refusals.is_above_proven(1)


def test_growth_above_a_refused_level_costs_credit(clock):
    """One refusal for each 1/0.0065 good answers; up to the level growth is free."""
    flight = Flight(clock, 33.0)
    flight.serve(in_flight=32)
    flight.refuse(in_flight=33)
    allowed = flight.refusals.allowed
    assert allowed(20.0, 64.0) == 32.0
    assert allowed(32.0, 64.0) == 32.0
    flight.serve(153)
    assert allowed(32.0, 64.0) == 32.0
    flight.serve(1)
    assert allowed(32.0, 64.0) == 33.0


def test_credit_does_not_pile_up(clock):
    """A day of good answers buys one refusal, not a thousand."""
    flight = Flight(clock, 33.0)
    flight.serve(10_000)
    flight.refuse(in_flight=33)
    assert flight.refusals.allowed(32.0, 64.0) == 32.0


def test_a_refusal_is_risked_now_and_then_without_credit(clock):
    """With few answers the limit must not stay low for hours."""
    flight = Flight(clock, 33.0)
    flight.serve(in_flight=32)
    flight.refuse(in_flight=33)
    clock.advance(29.9)
    assert flight.refusals.allowed(32.0, 64.0) == 32.0
    clock.advance(0.1)
    assert flight.refusals.allowed(32.0, 64.0) == 33.0


def test_a_served_step_lifts_the_ceiling(clock):
    """One answer from above the refused level, and growth is free again."""
    flight = Flight(clock, 33.0)
    flight.serve(in_flight=32)
    flight.refuse(in_flight=33)
    flight.serve(in_flight=33)
    assert flight.refusals.allowed(33.0, 64.0) == 64.0


def test_where_waiting_warns_there_is_no_ceiling(clock):
    """A backend that queues before it refuses is judged by the waiting."""
    flight = Flight(clock)
    flight.refuse(warned=True)
    assert flight.refusals.allowed(20.0, 64.0) == 64.0


def test_a_storm_is_forgotten_when_it_is_over(clock):
    """A row in which even a lone attempt was refused was not caused by their number: the limit before it is restored."""
    flight = Flight(clock, 40.0)
    flight.serve(in_flight=40)
    for in_flight in (40, 30, 12, 4, 1, 1):
        flight.refuse(in_flight=in_flight)
    assert flight.serve(in_flight=1) == 40.0
    assert flight.refusals.allowed(40.0, 64.0) == 64.0


def test_a_row_that_did_not_come_far_down_is_remembered(clock):
    """Capacity that fell stays fallen."""
    flight = Flight(clock, 40.0)
    flight.serve(in_flight=40)
    for in_flight in (40, 30, 12):
        flight.refuse(in_flight=in_flight)
    assert flight.serve(in_flight=5) is None
    assert flight.refusals.allowed(6.0, 64.0) == 11.0


def test_a_limit_restored_by_mistake_costs_one_refusal(clock):
    """A capacity that really fell to less than an eighth is refused above what was served then, and found at once."""
    flight = Flight(clock, 64.0)
    flight.serve(in_flight=64)
    for in_flight in (64, 48, 24, 8):
        flight.refuse(in_flight=in_flight)
    flight.limit = flight.serve(in_flight=4) or flight.limit
    assert flight.limit == 64.0
    assert flight.refuse(in_flight=6) == 5.0
    assert flight.serve(in_flight=5) is None
