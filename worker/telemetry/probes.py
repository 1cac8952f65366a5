"""
The worker's own HTTP port: /livez, /readyz, /startupz, /metrics.

* `/livez`: the event loop turns.  It asks neither Pub/Sub nor the backend: a restart cures neither and loses work.
* `/readyz`: not draining, and the streaming pull is open.  A backend that is down leaves it ready; the details say so.
* `/startupz`: settings, credentials and the first pull are there, or one line says what is missing.

Answers are JSON, `{"status": "ok" | "failing", …details}`, 200 or 503.
Source: https://kubernetes.io/docs/concepts/configuration/liveness-readiness-startup-probes/
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from worker.errors import SettingsError

HEARTBEAT_S = 1.0
STALE_AFTER_S = 60.0
"""A loop that did not turn for this long is stuck; far above any pause of a busy one."""

Details = Callable[[], dict[str, Any]]


class Probes:
    """
    The HTTP server of probes and metrics.

    Args:
        registry: What `/metrics` shows.
        details: Called for `/readyz`; `ready` in it is the verdict, the rest is shown.
        clock: Monotonic seconds.
        on_scrape: Called before the metrics are shown, to set those that are read only then.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        details: Details,
        clock: Callable[[], float] = time.monotonic,
        *,
        on_scrape: Callable[[], None] = lambda: None,
    ) -> None:
        self._registry = registry
        self._details = details
        self._clock = clock
        self._on_scrape = on_scrape
        self._beat_at = clock()
        self._heart: asyncio.Task[None] | None = None
        self._runner: web.AppRunner | None = None
        self.startup_failure: str | None = "starting"
        """One line for `/startupz`; `None` once started."""

    async def start(self, host: str, port: int) -> int:
        """
        Listen and return the port in use.

        Raises:
            SettingsError: The address is taken or not ours; permanent until an operator acts.

        Cancellation: call `aclose` afterwards.
        """
        app = web.Application()
        app.router.add_get("/livez", self._livez)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/startupz", self._startupz)
        app.router.add_get("/metrics", self._metrics)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError as error:
            await self._runner.cleanup()
            raise SettingsError([f"http.port: cannot listen on {host}:{port}: {error.strerror}"]) from None
        self._heart = asyncio.get_running_loop().create_task(self._beat())
        return int(self._runner.addresses[0][1])

    def succeed(self) -> None:
        """Say that the worker has started."""
        self.startup_failure = None

    async def aclose(self) -> None:
        """
        Stop listening; idempotent.

        Cancellation: the port may stay open; a second call closes it.
        """
        if self._heart is not None:
            self._heart.cancel()
            await asyncio.gather(self._heart, return_exceptions=True)
            self._heart = None
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _beat(self) -> None:
        while True:
            self._beat_at = self._clock()
            await asyncio.sleep(HEARTBEAT_S)

    async def _livez(self, _: web.Request) -> web.Response:
        age = self._clock() - self._beat_at
        return _answer(age < STALE_AFTER_S, {"heartbeat_age_s": round(age, 1)})

    async def _readyz(self, _: web.Request) -> web.Response:
        details = self._details()
        return _answer(bool(details.pop("ready")) and self.startup_failure is None, details)

    async def _startupz(self, _: web.Request) -> web.Response:
        failure = self.startup_failure
        return _answer(failure is None, {} if failure is None else {"reason": failure})

    async def _metrics(self, request: web.Request) -> web.Response:
        self._on_scrape()
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return web.Response(body=encode(self._registry), headers={"content-type": content_type})


def _answer(is_ok: bool, details: dict[str, Any]) -> web.Response:
    body = msgspec.json.encode({"status": "ok" if is_ok else "failing", **details})
    return web.Response(body=body, status=200 if is_ok else 503, content_type="application/json")
