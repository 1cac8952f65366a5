"""
The worker's own HTTP port: /livez, /readyz, /startupz, /metrics.

* `/livez`: the event loop turns.  It asks neither Pub/Sub nor the backend: a restart cures neither and loses work.
* `/readyz`: not draining, and the streaming pull is open.  A backend that is down leaves it ready; the details say so.
* `/startupz`: settings, credentials and the first pull are there, or one line says what is missing.

Answers are JSON, `{"status": "ok" | "failing", …details}`, 200 or 503; metrics are Prometheus' text.

The server is a few lines of its own: a request has no body, and a connection carries one of them.  A library's server
costs a tenth of a second of CPU at each start of a worker (aiohttp's, for one).
Source: https://kubernetes.io/docs/concepts/configuration/liveness-readiness-startup-probes/
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, NamedTuple

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from worker.errors import SettingsError
from worker.telemetry.logs import get_logger

HEARTBEAT_S = 1.0
STALE_AFTER_S = 60.0
"""A loop that did not turn for this long is stuck; far above any pause of a busy one."""

REQUEST_S = 10.0
"""A connection is closed when it took longer, from its beginning to the last byte of the answer."""
MAX_HEAD_BYTES = 16_384
_JSON = "application/json"
_TEXT = "text/plain; charset=utf-8"

Details = Callable[[], dict[str, Any]]

_log = get_logger("probes")


class _Answer(NamedTuple):
    status: HTTPStatus
    body: bytes = b""
    content_type: str = _TEXT


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
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._paths: Mapping[str, Callable[[Mapping[str, str]], _Answer]] = {
            "/livez": self._livez,
            "/readyz": self._readyz,
            "/startupz": self._startupz,
            "/metrics": self._metrics,
        }
        self.startup_failure: str | None = "starting"
        """One line for `/startupz`; `None` once started."""

    async def start(self, host: str, port: int) -> int:
        """
        Listen and return the port in use.

        Raises:
            SettingsError: The address is taken or not ours; permanent until an operator acts.

        Cancellation: call `aclose` afterwards.
        """
        try:
            self._server = await asyncio.start_server(self._accept, host, port, limit=MAX_HEAD_BYTES)
        except OSError as error:
            raise SettingsError([f"http.port: cannot listen on {host}:{port}: {error.strerror}"]) from None
        self._heart = asyncio.get_running_loop().create_task(self._beat())
        return int(self._server.sockets[0].getsockname()[1])

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
        if self._server is not None:
            self._server.close()
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)
            await self._server.wait_closed()
            self._server = None

    async def _beat(self) -> None:
        while True:
            self._beat_at = self._clock()
            await asyncio.sleep(HEARTBEAT_S)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the one request of a connection."""
        try:
            async with asyncio.timeout(REQUEST_S):
                writer.write(self._answer(await reader.readuntil(b"\r\n\r\n")))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return  # it went away, took too long (`TimeoutError`) or sent what is no request
        finally:
            writer.transport.abort()  # after `wait_closed` there is nothing left to abort

    def _answer(self, head: bytes) -> bytes:
        """Return the response to a request's head."""
        request, *lines = head.decode("latin-1").split("\r\n")
        method, _, target = request.partition(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        answer = self._route(method, target.partition(" ")[0].partition("?")[0], headers)
        start = (
            f"HTTP/1.1 {answer.status.value} {answer.status.phrase}\r\ncontent-type: {answer.content_type}\r\n"
            f"content-length: {len(answer.body)}\r\nconnection: close\r\n\r\n"
        )
        return start.encode() + (answer.body if method != "HEAD" else b"")

    def _route(self, method: str, path: str, headers: Mapping[str, str]) -> _Answer:
        show = self._paths.get(path)
        if show is None:
            return _Answer(HTTPStatus.NOT_FOUND)
        if method not in {"GET", "HEAD"}:
            return _Answer(HTTPStatus.METHOD_NOT_ALLOWED)
        try:
            return show(headers)
        except Exception:  # noqa: BLE001 - a fault of our own, in what is shown: the port goes on
            _log.exception("probe_failed", path=path)
            return _Answer(HTTPStatus.INTERNAL_SERVER_ERROR)

    def _livez(self, _: Mapping[str, str]) -> _Answer:
        age = self._clock() - self._beat_at
        return _verdict(age < STALE_AFTER_S, {"heartbeat_age_s": round(age, 1)})

    def _readyz(self, _: Mapping[str, str]) -> _Answer:
        details = self._details()
        return _verdict(bool(details.pop("ready")) and self.startup_failure is None, details)

    def _startupz(self, _: Mapping[str, str]) -> _Answer:
        failure = self.startup_failure
        return _verdict(failure is None, {} if failure is None else {"reason": failure})

    def _metrics(self, headers: Mapping[str, str]) -> _Answer:
        self._on_scrape()
        encode, content_type = choose_encoder(headers.get("accept", ""))
        return _Answer(HTTPStatus.OK, encode(self._registry), content_type)


def _verdict(is_ok: bool, details: dict[str, Any]) -> _Answer:
    body = msgspec.json.encode({"status": "ok" if is_ok else "failing", **details})
    return _Answer(HTTPStatus.OK if is_ok else HTTPStatus.SERVICE_UNAVAILABLE, body, _JSON)
