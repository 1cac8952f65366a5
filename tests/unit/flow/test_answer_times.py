"""How long answers took lately."""

from worker.flow.answer_times import KEPT, LEAST_ANSWERS, RECENT_S, TRY_EVERY, AnswerTimes


def times_of(*seconds: float, now: float = 0.0) -> AnswerTimes:
    times = AnswerTimes()
    for each in seconds:
        times.add(now, each)
    return times


def test_a_tenth_of_the_answers_were_faster() -> None:
    """Of twenty answers, two."""
    times = times_of(*map(float, range(20, 0, -1)))
    assert times.least_s(0.0, 0.1) == 3.0
    assert times.least_s(0.0, 0.0) == 1.0
    assert times.least_s(0.0, 0.5) == 11.0


def test_a_few_answers_say_nothing() -> None:
    """Chance alone would decide."""
    times = times_of(*[1.0] * (LEAST_ANSWERS - 1))
    assert times.least_s(0.0, 0.1) is None
    times.add(0.0, 1.0)
    assert times.least_s(0.0, 0.1) == 1.0


def test_old_answers_say_nothing() -> None:
    """Neither those of another time nor those that many others have followed."""
    times = times_of(*[1.0] * LEAST_ANSWERS)
    assert times.least_s(RECENT_S, 0.1) == 1.0
    assert times.least_s(RECENT_S + 1, 0.1) is None
    for _ in range(KEPT):
        times.add(RECENT_S, 5.0)
    assert times.least_s(RECENT_S, 0.0) == 5.0


def test_one_in_so_many_is_sent() -> None:
    """If none were, nothing would show that the backend has become faster."""
    times = times_of()
    assert [times.is_tried() for _ in range(2 * TRY_EVERY)].count(True) == 2
