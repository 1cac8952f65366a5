"""
Tenants: whose part of the window a request uses, and how long the tenant's limits make it wait.

Limits are kept in this process, or in Redis for all workers of a fleet.  A Redis that cannot be reached keeps no
message waiting: the limits of this process apply meanwhile, which let a fleet of n workers have n times as much.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from worker.delivery import Delivery
from worker.errors import SettingsError
from worker.flow.queue import ALONE, Share
from worker.flow.rates import BURST_S, MeanTokens, Rate, Reservations
from worker.settings.schema import TenantSettings
from worker.telemetry.logs import get_logger
from worker.telemetry.metrics import Metrics
from worker.wire.message import RequestMessage

REDIS_TIMEOUT_S = 2.0
REDIS_RETRY_S = 15.0
"""How long Redis is not asked after a failure, as for `dedupe`."""
_RESERVE = """
local time = redis.call('TIME')
local now, wait = time[1] + time[2] / 1e6, 0
for place, key in ipairs(KEYS) do
  local earned = math.max(tonumber(redis.call('GET', key) or now), now)
  wait = math.max(wait, earned - now - tonumber(ARGV[#KEYS + 1]))
  earned = math.max(earned + tonumber(ARGV[place]), now)
  redis.call('SET', key, string.format('%.6f', earned), 'PX', math.ceil((earned - now) * 1000) + 1000)
end
return tostring(wait)
"""
"""`Reservations.reserve` on the clock of Redis."""

_log = get_logger("tenants")


class LimitStore(Protocol):
    """Where reservations are kept."""

    async def reserve(self, tenant: str, costs_s: Mapping[str, float]) -> float:
        """
        Reserve what a request costs and return its wait in seconds; see `flow.rates.Reservations.reserve`.

        Cancellation: it may or may not be reserved.
        """

    async def aclose(self) -> None:
        """
        Close connections; idempotent.

        Cancellation: connections may stay open until the process ends.
        """


class MemoryLimits:
    """
    The limits of this process alone.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._reservations = Reservations()
        self._clock = clock

    async def reserve(self, tenant: str, costs_s: Mapping[str, float]) -> float:
        """See `LimitStore.reserve`."""
        return self._reservations.reserve(tenant, costs_s, self._clock())

    async def aclose(self) -> None:
        """See `LimitStore.aclose`; there is nothing to close."""


class RedisLimits:
    """
    The limits of all workers that share the Redis server; needs the extra `redis`.

    Args:
        settings: Address.
        metrics: Counts the reservations that were made in this process instead.
        clock: Monotonic seconds.

    Raises:
        SettingsError: The extra is not installed, or the URL is none; permanent.
    """

    def __init__(self, settings: TenantSettings, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        try:
            from redis import asyncio as redis  # noqa: PLC0415 - an extra
        except ImportError:
            raise SettingsError(["tenants.store: redis needs the extra `redis` to be installed"]) from None
        assert settings.redis_url is not None
        self._errors: Any = (redis.RedisError, OSError, TimeoutError)
        self._own = MemoryLimits(clock)
        self._metrics = metrics
        self._clock = clock
        self._retry_at: float | None = None
        """Monotonic seconds; `None` while Redis answers."""
        try:
            self._redis: Any = redis.from_url(
                settings.redis_url.get_secret_value(),
                socket_timeout=REDIS_TIMEOUT_S,
                socket_connect_timeout=REDIS_TIMEOUT_S,
            )
        except ValueError:  # its text holds the URL, and that a password
            raise SettingsError(["tenants.redis_url: is not a URL that Redis can be reached by"]) from None
        self._script = self._redis.register_script(_RESERVE)

    async def reserve(self, tenant: str, costs_s: Mapping[str, float]) -> float:
        """See `LimitStore.reserve`; in this process while Redis cannot be reached."""
        now = self._clock()
        if self._retry_at is not None:
            if now < self._retry_at:
                return await self._reserve_here(tenant, costs_s)
            self._retry_at = now + REDIS_RETRY_S  # this call finds out; the others do not wait for it
        try:
            async with asyncio.timeout(REDIS_TIMEOUT_S):
                wait_s = float(
                    await self._script(
                        keys=[f"inference-worker:limit:{kind}:{tenant}" for kind in costs_s],
                        args=[*costs_s.values(), BURST_S],
                    )
                )
        except self._errors as error:
            if self._retry_at is None:
                _log.error("limit_store_unreachable", error=str(error))
            self._retry_at = self._clock() + REDIS_RETRY_S
            return await self._reserve_here(tenant, costs_s)
        if self._retry_at is not None:
            self._retry_at = None
            _log.info("limit_store_recovered")
        return wait_s

    async def _reserve_here(self, tenant: str, costs_s: Mapping[str, float]) -> float:
        self._metrics.limit_store_skipped_total.inc()
        return await self._own.reserve(tenant, costs_s)

    async def aclose(self) -> None:
        """See `LimitStore.aclose`."""
        await self._redis.aclose()


def build_limits(settings: TenantSettings, metrics: Metrics) -> LimitStore | None:
    """
    Return the store of the settings, `None` where no tenant has a limit.

    Raises:
        SettingsError: As `RedisLimits`.
    """
    if not settings.has_limits:
        return None
    return RedisLimits(settings, metrics) if settings.store == "redis" else MemoryLimits()


class Tenants:
    """
    What a tenant gets.

    Args:
        settings: Weights and limits.
        sources: The part of the window that each of several subscriptions has, by source.
        store: Keeps reservations; `None` where no tenant has a limit.
        metrics: Is told how long requests wait for limits.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        settings: TenantSettings,
        sources: Mapping[str, Share],
        store: LimitStore | None,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sources = sources
        self._has_shares = settings.windows == "shared"
        self._weights = settings.weights
        self._default_weight = settings.default_weight
        self._store = store
        self._metrics = metrics
        self._clock = clock
        self._mean_tokens = MeanTokens()
        self._rate = Rate(
            requests_per_minute=settings.requests_per_minute, tokens_per_minute=settings.tokens_per_minute
        )
        self._rates = {
            each.tenant: Rate(requests_per_minute=each.requests_per_minute, tokens_per_minute=each.tokens_per_minute)
            for each in settings.limits
        }

    @property
    def is_used(self) -> bool:
        """Whether requests are not all alike."""
        return bool(self._sources) or self._has_shares or self._store is not None

    def share(self, source: str, tenant: str | None) -> Share:
        """Return whose part of the window a request uses."""
        share = self._sources.get(source, ALONE) if self._sources else ALONE
        if not self._has_shares:
            return share
        weight = self._weights.get(tenant or "", self._default_weight)
        return Share(share.level, f"{share.name}/{tenant or ''}", share.weight * weight)

    async def reserve(self, delivery: Delivery, request: RequestMessage) -> None:
        """
        Reserve what a request costs its tenant, and note in the delivery until when it has to wait; once a delivery.

        Cancellation: it may or may not be reserved.
        """
        if self._store is None:
            return
        tenant = request.tenant or ""
        rate = self._rates.get(tenant, self._rate)
        tokens = self._mean_tokens.of(tenant)
        costs_s = rate.costs_s(tokens)
        if not costs_s:
            return
        delivery.reserved_tokens = tokens
        wait_s = await self._store.reserve(tenant, costs_s)
        if wait_s > 0.0:
            delivery.limited_until = self._clock() + wait_s
            self._metrics.tenant_limited_seconds.observe(wait_s)

    async def settle(self, delivery: Delivery) -> None:
        """
        Correct the reservation of a delivery that has ended by what it used; one that was never sent gets all back.

        Cancellation: it may or may not be corrected.
        """
        reserved, request = delivery.reserved_tokens, delivery.request
        if self._store is None or reserved is None or request is None:
            return
        delivery.reserved_tokens = None
        tenant = request.tenant or ""
        rate = self._rates.get(tenant, self._rate)
        if delivery.attempts == 0:
            await self._store.reserve(tenant, rate.costs_s(-reserved, -1.0))
            return
        usage = delivery.result.usage if delivery.result is not None else None
        used = 0 if usage is None else (usage.input or 0) + (usage.output or 0)
        if used:
            self._mean_tokens.add(tenant, used)
        if used != reserved:
            await self._store.reserve(tenant, rate.costs_s(used - reserved, 0.0))

    async def aclose(self) -> None:
        """
        Close the store; idempotent.

        Cancellation: connections may stay open until the process ends.
        """
        if self._store is not None:
            await self._store.aclose()
