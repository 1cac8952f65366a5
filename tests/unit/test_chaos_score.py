"""The scoreboard of the chaos suite: what counts as full rate, and what is complained about."""

from dataclasses import replace

import pytest

from tests.chaos.score import Limits, Score, complaints, full_rate_s

GOOD = Score(
    scenario="s", broker="b", sent=10, answered=10, duplicates=0, malformed=0, error_replies=0, attempts_burned=0,
    backend_calls=12, wasted=0, recovery_s=1.0, full_rate_s=2.0, unsettled=0,
)  # fmt: skip
ANYTHING = Limits(error_replies=True, attempts=True, wasted=None, duplicates=True, recovery_s=100.0)


def _steady(begin: float, end: float, rate: int) -> list[float]:
    return [begin + index / rate for index in range(round((end - begin) * rate))]


def test_full_rate_is_the_first_second_as_good_as_before() -> None:
    """A trickle after the mending is no recovery; the moment counts at which a whole second goes as it went before."""
    times = [*_steady(0, 10, 100), *_steady(20, 23, 10), *_steady(23, 30, 100)]
    found = full_rate_s(times, 10.0, 20.0)
    assert found == pytest.approx(2.8, abs=0.2)  # a fifth less than before still counts as full


def test_without_a_breaking_a_mending_or_work_there_is_no_rate() -> None:
    """What was not measured is not called fast."""
    times = [*_steady(0, 10, 100), *_steady(20, 20.5, 100)]
    assert full_rate_s(times, 10.0, None) is None
    assert full_rate_s(times, None, 20.0) is None
    assert full_rate_s(times, 10.0, 20.0) is None  # half a second of answers was all that was left
    assert full_rate_s(times, 15.0, 20.0) is None  # nothing came before the breaking


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"answered": 9}, "1 lost"),
        ({"malformed": 1}, "1 malformed answers"),
        ({"unsettled": 2}, "2 never acked"),
        ({"unmet": ("not shown: x",)}, "not shown: x"),
    ],
)
def test_some_things_no_scenario_allows(change: dict[str, object], told: str) -> None:
    """Lost, malformed, never acked, not shown: complained about whatever the scenario's limits are."""
    assert complaints(ANYTHING, replace(GOOD, **change)) == [told]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"duplicates": 1}, "1 duplicates"),
        ({"error_replies": 1}, "1 error answers"),
        ({"attempts_burned": 1}, "1 delivery attempts burned"),
        ({"wasted": 1}, "1 generations wasted"),
        ({"recovery_s": 6.0}, "6.0 s to the first answer"),
        ({"full_rate_s": 6.0}, "6.0 s to full rate"),
    ],
)
def test_the_rest_is_the_scenarios_to_allow(change: dict[str, object], told: str) -> None:
    """Nothing of it unless its limits say so."""
    assert complaints(Limits(), GOOD) == []
    assert complaints(Limits(), replace(GOOD, **change)) == [told]
    assert complaints(ANYTHING, replace(GOOD, **change)) == []


def test_a_row_has_a_cell_for_every_heading() -> None:
    """Calls beyond need are those above one a message; what was not measured is a dash."""
    row = replace(GOOD, full_rate_s=None).row()
    assert row == "| s (b) | 10 | 10 | 0 | 0 | 0 | 0 | 2 | 0 | 1.0 | - |"
