"""Times, rates, hints and capacities: how they are written and what they mean."""

from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.emulators.openai.seeded import Draws
from worker.emulators.openai.timing import (
    TokenBucket,
    parse_capacity,
    parse_duration,
    parse_latency,
    parse_rate,
    parse_retry_after,
    show_duration,
)

NOW_S = 1_800_000_000.0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("50ms", 0.05), ("1.5s", 1.5), ("2m", 120.0), ("250us", 0.00025), ("0", 0.0), (".5", 0.5), (3, 3.0), ("1h", 3600)],
)
def test_durations_are_read_in_every_unit(text: str | int, seconds: float) -> None:
    """A duration is seconds, whatever unit it is written in."""
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "fast", "-1s", "5 parsecs", "1e3", True, None, float("nan"), "8000h"])
def test_what_is_not_a_duration_is_refused(text: object) -> None:
    """Anything else is refused instead of read as something."""
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)  # type: ignore[arg-type]


@given(st.floats(min_value=1e-6, max_value=1e5))
def test_shown_durations_read_back(seconds: float) -> None:
    """The text form of a duration is the same duration, to six digits."""
    assert parse_duration(show_duration(seconds)) == pytest.approx(seconds, rel=1e-5)


@pytest.mark.parametrize("text", ["50ms", "uniform:10ms,2s", "lognormal:2s,0.8", "0"])
def test_latencies_read_back(text: str) -> None:
    """The text form of a latency describes the same latency."""
    assert str(parse_latency(text)) == text


def test_a_lognormal_latency_has_its_median() -> None:
    """Half of the draws of a lognormal latency lie below its median, and they spread by its sigma."""
    latency = parse_latency("lognormal:2s,0.5")
    draws = [latency.draw(Draws(1, place).uniform("latency")) for place in range(4000)]
    assert median(draws) == pytest.approx(2.0, rel=0.05)
    assert latency.draw(0.8413) == pytest.approx(2 * 2.71828**0.5, rel=0.01)


def test_a_uniform_latency_stays_between_its_bounds() -> None:
    """A uniform latency begins at its lower bound and ends at its upper."""
    latency = parse_latency("uniform:1s,3s")
    assert [latency.draw(0.0), latency.draw(0.5), latency.draw(1.0)] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("text", ["normal:1,2", "uniform:3s,1s", "lognormal:1s", "lognormal:1s,9", "uniform:a,b"])
def test_impossible_latencies_are_refused(text: str) -> None:
    """Unknown distributions and impossible parameters are refused."""
    with pytest.raises(ValueError, match=r"distribution|bound|values|sigma|duration"):
        parse_latency(text)


@pytest.mark.parametrize(("text", "rate"), [("50/s", 50), ("600/min", 10), ("7200/h", 2), ("5", 5), (0.5, 0.5)])
def test_rates_are_read_per_second(text: str | float, rate: float) -> None:
    """A rate is requests per second, whatever it is written per."""
    assert parse_rate(text) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["0/s", "fast", "-3", "5/day", True, 0])
def test_what_is_not_a_rate_is_refused(text: object) -> None:
    """Zero, negative and unreadable rates are refused."""
    with pytest.raises(ValueError, match="rate"):
        parse_rate(text)  # type: ignore[arg-type]


def test_a_bucket_lets_one_seconds_worth_through_and_then_the_rate() -> None:
    """After an idle time a burst of one second's worth passes, then one request per interval."""
    bucket = TokenBucket(10, now_s=0)
    assert [bucket.take(0) for _ in range(10)] == [0] * 10
    assert bucket.take(0) == pytest.approx(0.1)
    assert bucket.take(0.1) == 0
    assert bucket.take(0.1) == pytest.approx(0.1)
    assert [bucket.take(100) for _ in range(11)][-1] > 0


@pytest.mark.parametrize(
    ("text", "header"),
    [
        ("2", {"Retry-After": "2"}),
        (1.2, {"Retry-After": "2"}),
        ("0", {"Retry-After": "0"}),
        ("auto", {"Retry-After": "4"}),
        ("date:30s", {"Retry-After": "Fri, 15 Jan 2027 08:00:30 GMT"}),
        ("ms:1500ms", {"retry-after-ms": "1500"}),
        ("ms:auto", {"retry-after-ms": "3200"}),
    ],
)
def test_hints_have_three_spellings(text: str | float, header: dict[str, str]) -> None:
    """A hint is whole seconds, an HTTP date or milliseconds; auto is the real wait."""
    hint = parse_retry_after(text)
    assert hint is not None
    assert hint.headers(3.2, NOW_S) == header


def test_no_hint_is_none() -> None:
    """No hint is written as null or none."""
    assert parse_retry_after(None) is None
    assert parse_retry_after("none") is None
    with pytest.raises(ValueError, match="duration"):
        parse_retry_after("soon")


def test_capacity_follows_its_steps() -> None:
    """Each step of a capacity is in force from its second on, and the last one for ever."""
    plan = parse_capacity("0:16/32,30:4/8")
    assert plan is not None
    assert [plan.step(at).knee for at in (0, 29.9, 30, 1e6)] == [16, 16, 4, 4]
    assert [plan.step(at).limit for at in (0, 30)] == [32, 8]
    assert plan.factor(16, 0) == 1
    assert plan.factor(16, 31) == 4
    assert parse_capacity(plan.as_json()) == plan


def test_capacity_repeats() -> None:
    """A plan with `repeat_s` begins again."""
    plan = parse_capacity({"steps": [{"knee": 8}, {"at_s": 10, "knee": 2}], "repeat_s": 20, "exponent": 2})
    assert plan is not None
    assert [plan.step(at).knee for at in (5, 15, 25, 35)] == [8, 2, 8, 2]
    assert plan.factor(4, 15) == 4


@pytest.mark.parametrize(
    "value",
    ["", "x", "0:16,0:4", "5:1..2", {"steps": []}, {"knee": 3}, {"steps": [{"knee": 0}]}, 0, -1, True,
     {"steps": [{"knee": 1, "speed": 2}]}, {"steps": [{"knee": 1, "limit": 0}]}, {"steps": [{"knee": 1}], "repeat_s": 0}],
)  # fmt: skip
def test_impossible_capacities_are_refused(value: object) -> None:
    """Unknown keys, steps out of order and numbers that make no sense are refused."""
    with pytest.raises(ValueError, match="capacity"):
        parse_capacity(value)
