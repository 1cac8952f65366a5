"""
Limits of a tenant in requests and tokens a minute: when a request may start.  Pure; `pipeline.tenants` calls it.

Each limit is a *reservation*: the instant at which everything that was reserved so far has been earned.  A request
moves it on by what it costs, and waits until no more than `BURST_S` of it is still to be earned.  So requests wait in
the order in which they came, none is refused, and after a quiet time as many as `BURST_S` earns start at once.

A request's tokens are known when it is answered: it reserves what the tenant's answers took on average, and the
difference is settled afterwards.

Source: the generic cell rate algorithm (ITU-T I.371), with reservation instead of refusal.
"""

from collections.abc import Mapping

import msgspec

BURST_S = 10.0
"""So many seconds of a limit may be used at once.  House decision: less would make a window of short requests wait
though the minute allows them, more would let the first minute have twice its limit."""
MEAN_STEP = 0.1
"""How far one answer moves the mean of a tenant's tokens."""
MAX_TENANTS = 10_000
"""Tenants that are remembered; their names come from requesters."""


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of one tenant; `None`: none."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None

    def costs_s(self, tokens: float, requests: float = 1.0) -> Mapping[str, float]:
        """Return what requests with so many tokens cost, in seconds of each limit."""
        costs = {}
        if self.requests_per_minute is not None:
            costs["requests"] = 60.0 * requests / self.requests_per_minute
        if self.tokens_per_minute is not None:
            costs["tokens"] = 60.0 * tokens / self.tokens_per_minute
        return costs


class Reservations:
    """The reservations of all tenants in this process."""

    def __init__(self) -> None:
        self._earned_at: dict[tuple[str, str], float] = {}

    def reserve(self, tenant: str, costs_s: Mapping[str, float], now: float) -> float:
        """
        Reserve what a request costs, and return how long it has to wait, seconds.

        Args:
            tenant: Its name.
            costs_s: By kind of limit, seconds of it; below 0 gives back.
            now: On any clock that does not go back.
        """
        if len(self._earned_at) > MAX_TENANTS:
            self._earned_at = {key: at for key, at in self._earned_at.items() if at > now}
        wait_s = 0.0
        for kind, cost_s in costs_s.items():
            earned_at = max(self._earned_at.get((tenant, kind), now), now)
            wait_s = max(wait_s, earned_at - now - BURST_S)
            self._earned_at[tenant, kind] = max(earned_at + cost_s, now)
        return wait_s


class MeanTokens:
    """What the answers of each tenant take on average, tokens."""

    def __init__(self) -> None:
        self._means: dict[str, float] = {}

    def of(self, tenant: str) -> float:
        """Return the mean; 0 before the first answer."""
        return self._means.get(tenant, 0.0)

    def add(self, tenant: str, tokens: float) -> None:
        """Note one answer."""
        mean = self._means.pop(tenant, None)
        if len(self._means) >= MAX_TENANTS:
            del self._means[next(iter(self._means))]  # the one that was answered least lately
        self._means[tenant] = tokens if mean is None else mean + MEAN_STEP * (tokens - mean)
