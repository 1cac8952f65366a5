"""Limits in requests and tokens a minute."""

import pytest

from worker.flow.rates import BURST_S, MAX_TENANTS, MeanTokens, Rate, Reservations


def test_after_a_burst_requests_come_at_their_rate() -> None:
    """Sixty a minute: eleven at once, then one a second, in the order in which they asked."""
    reservations, costs = Reservations(), Rate(requests_per_minute=60).costs_s(0)
    waits = [reservations.reserve("a", costs, now=5.0) for _ in range(15)]
    assert waits == [0.0] * 11 + [1.0, 2.0, 3.0, 4.0]


def test_in_any_minute_no_more_than_the_limit_and_the_burst_start() -> None:
    """However long it was quiet before."""
    reservations, costs = Reservations(), Rate(requests_per_minute=120).costs_s(0)
    starts = sorted(now + reservations.reserve("a", costs, now) for now in [1000.0] * 500)
    assert sum(start < 1060.0 for start in starts) <= 120 + 120 * BURST_S / 60 + 1


def test_the_stricter_of_two_limits_counts() -> None:
    """Ten requests a minute would do; the tokens do not."""
    rate = Rate(requests_per_minute=1000, tokens_per_minute=600)
    assert dict(rate.costs_s(100)) == pytest.approx({"requests": 0.06, "tokens": 10.0})
    reservations = Reservations()
    waits = [reservations.reserve("a", rate.costs_s(100), now=0.0) for _ in range(4)]
    assert waits == [0.0, 0.0, 10.0, 20.0]


def test_what_was_reserved_too_much_is_given_back() -> None:
    """And never more than that: what is not used is not saved up beyond the burst."""
    reservations, rate = Reservations(), Rate(tokens_per_minute=60)
    reservations.reserve("a", rate.costs_s(100), now=0.0)
    reservations.reserve("a", rate.costs_s(-95, 0.0), now=0.0)
    assert reservations.reserve("a", rate.costs_s(6), now=0.0) == 0.0
    reservations.reserve("a", rate.costs_s(-1000, 0.0), now=0.0)
    assert reservations.reserve("a", rate.costs_s(20), now=0.0) == 0.0
    assert reservations.reserve("a", rate.costs_s(1), now=0.0) == 10.0


def test_tenants_are_apart_and_forgotten() -> None:
    """One that owes nothing any more takes no memory."""
    reservations, costs = Reservations(), Rate(requests_per_minute=1).costs_s(0)
    for number in range(MAX_TENANTS + 5):
        reservations.reserve(f"t{number}", costs, now=float(number * 100))
    assert len(reservations._earned_at) < 10
    assert reservations.reserve("other", costs, now=1e6) == 0.0


def test_no_limit_costs_nothing() -> None:
    """A tenant may have one of the two, or none."""
    assert not Rate().costs_s(5)
    assert set(Rate(tokens_per_minute=1).costs_s(5)) == {"tokens"}


def test_the_mean_of_a_tenants_tokens() -> None:
    """It follows slowly; nothing is expected of one that was never answered."""
    means = MeanTokens()
    assert means.of("a") == 0.0
    means.add("a", 100)
    means.add("a", 200)
    assert means.of("a") == pytest.approx(110)
    for number in range(MAX_TENANTS):
        means.add(f"t{number}", 1)
    assert means.of("a") == 0.0
