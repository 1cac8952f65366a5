"""How many messages may be leased beyond the limit while a backend is stopped."""

import pytest

from worker.flow.shares import MAX_EXTRA, MAX_EXTRA_ALONE, RouteLoad, extra_leases

LIMIT = 10


def working(waiting: int = 0) -> RouteLoad:
    return RouteLoad(waiting=waiting, has_working_lane=True)


def stopped(waiting: int) -> RouteLoad:
    return RouteLoad(waiting=waiting, has_working_lane=False)


@pytest.mark.parametrize(
    ("loads", "extra"),
    [
        ([working()], 0),
        ([working(7)], 7),
        ([working(), stopped(7)], 7),
        ([working(3), stopped(4), stopped(5)], 12),
        ([working(1000)], MAX_EXTRA * LIMIT),
        ([working(7), RouteLoad(waiting=0, has_working_lane=True, many_fail=True)], 7 + LIMIT),
        ([RouteLoad(waiting=1000, has_working_lane=True, many_fail=True)], MAX_EXTRA * LIMIT),
        ([stopped(7)], MAX_EXTRA_ALONE * LIMIT),
        ([stopped(1000)], MAX_EXTRA_ALONE * LIMIT),
        ([stopped(0), stopped(1000)], MAX_EXTRA_ALONE * LIMIT),
        ([], 0),
    ],
)
def test_what_waits_for_a_stopped_backend_does_not_count_while_others_may_be_served(
    loads: list[RouteLoad], extra: int
) -> None:
    """Up to a bound, which is large where others are known to work."""
    assert extra_leases(loads, LIMIT) == extra
