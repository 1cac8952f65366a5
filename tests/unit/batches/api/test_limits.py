"""Rates of tenants."""

import pytest

from tests.support.fakeclock import FakeClock
from worker.batches.api.errors import ApiError
from worker.batches.api.limits import RateLimit


def refused(limit: RateLimit, tenant: str) -> ApiError:
    with pytest.raises(ApiError) as caught:
        limit.take(tenant)
    return caught.value


def test_a_period_holds_its_limit_and_no_more() -> None:
    """The first requests pass at once; the next one is told when there is room again."""
    limit = RateLimit("requests", 3, 60, FakeClock().now)
    for _ in range(3):
        limit.take("a")
    error = refused(limit, "a")
    assert error.status == 429
    assert error.code == "rate_limit_exceeded"
    assert error.headers["retry-after"] == "20"
    assert "3 requests a minute" in error.message


def test_who_waits_as_told_is_let_in() -> None:
    """A refused request costs nothing, and the hint is true."""
    clock = FakeClock()
    limit = RateLimit("requests", 3, 60, clock.now)
    for _ in range(3):
        limit.take("a")
    for _ in range(5):
        refused(limit, "a")
    clock.advance(float(refused(limit, "a").headers["retry-after"]))
    limit.take("a")
    refused(limit, "a")


def test_tenants_do_not_share_a_limit() -> None:
    """One tenant's requests do not slow another's."""
    limit = RateLimit("requests", 1, 60, FakeClock().now)
    limit.take("a")
    limit.take("b")
    refused(limit, "a")


def test_no_limit_refuses_nothing() -> None:
    """Zero is no limit."""
    limit = RateLimit("requests", 0, 60, FakeClock().now)
    for _ in range(1000):
        limit.take("a")


def test_a_tenth_of_a_large_limit_is_exact() -> None:
    """Sums of fractions do not refuse the last request of a period."""
    clock = FakeClock()
    limit = RateLimit("batches", 2_000, 3600, clock.now)
    for _ in range(2_000):
        limit.take("a")
    refused(limit, "a")
    clock.advance(3600)
    for _ in range(2_000):
        limit.take("a")
    refused(limit, "a")
