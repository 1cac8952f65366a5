"""
How much a tenant may ask for in a time, pure but for the clock that is passed in.

A bucket for each tenant: it holds the requests of one period, and fills evenly.  The count is kept in memory, so each
replica of the API allows the rate for itself; what must hold over all of them (enqueued tokens) is counted in the
database.
"""

from collections.abc import Callable

from worker.batches.api.errors import ApiError, too_many


class RateLimit:
    """
    So many requests in a period, for each tenant alone.

    Args:
        what: Subject of the message, for example `requests`.
        limit: Requests in a period; 0 is no limit.
        period_s: Seconds.
        clock: Monotonic seconds.
    """

    def __init__(self, what: str, limit: int, period_s: float, clock: Callable[[], float]) -> None:
        self._what = what
        self._limit = limit
        self._period_s = period_s
        self._clock = clock
        self._full_at: dict[str, float] = {}
        """When each tenant's bucket is full again; there are as many as tenants."""

    def take(self, tenant: str) -> None:
        """
        Count one request.

        Raises:
            ApiError: 429 with Retry-After; the request is not counted.
        """
        if not self._limit:
            return
        now = self._clock()
        cost = self._period_s / self._limit
        full_at = max(now, self._full_at.get(tenant, now)) + cost
        wait_s = full_at - now - self._period_s
        if wait_s > 1e-9:  # noqa: PLR2004 - the rounding of sums of floats
            raise self._refusal(wait_s)
        self._full_at[tenant] = full_at

    def _refusal(self, wait_s: float) -> ApiError:
        period = {60.0: "a minute", 3600.0: "an hour"}.get(self._period_s, f"{self._period_s:g} s")
        return too_many(f"Rate limit reached: {self._limit:,} {self._what} {period}.", wait_s)
