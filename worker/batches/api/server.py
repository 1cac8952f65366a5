"""
The HTTP server: uvicorn, with its own errors in OpenAI's shape and its lifecycle in this program's verbs.

uvicorn answers bytes that are no HTTP with plain text, takes headers of any size with the parser httptools, and handles
signals by itself; these three are replaced.  Idle connections stay open for `KEEP_ALIVE_S`: a client that polls every
minute would otherwise meet a server that closes at the same moment.
"""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from worker.batches.api.errors import ApiError, error_body, headers_too_large, new_request_id

KEEP_ALIVE_S = 75
"""Longer than a poller sleeps, and than the idle timeout of usual load balancers (60 s)."""
MAX_HEADER_BYTES = 65_536
"""Request line and headers together."""
HEADERS_TIMEOUT_S = 30.0
"""From the first byte of a request, or the start of a connection, to the end of its headers."""
_BACKLOG = 2048


class Protocol(HttpToolsProtocol):
    """One connection."""

    _head_bytes = 0
    _chunk_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time that the first request's headers may take."""
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Refuse headers that never end: the parser itself keeps any amount of them."""
        if self.transport.is_closing():
            return
        self._chunk_bytes = len(data)
        self._head_bytes += self._chunk_bytes
        super().data_received(data)
        if self._head_timer is not None and self._head_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self._refuse(headers_too_large(MAX_HEADER_BYTES))

    def on_message_begin(self) -> None:
        """Start the time again for a further request of the connection."""
        super().on_message_begin()
        self._head_bytes = self._chunk_bytes
        if self._head_timer is None:
            self._await_headers()

    def on_headers_complete(self) -> None:
        """The headers are all there; the application reads the body in its own time."""
        self._stop_timer()
        super().on_headers_complete()
        self._head_bytes = 0

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP, and close."""
        is_too_large = self._head_bytes > MAX_HEADER_BYTES  # the parser of URLs refuses long ones
        self._refuse(headers_too_large(MAX_HEADER_BYTES) if is_too_large else ApiError(HTTPStatus.BAD_REQUEST, msg))

    def _refuse(self, error: ApiError) -> None:
        self._stop_timer()
        body = error_body(error.status, error.message, code=error.code)
        head = (
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"x-request-id: {new_request_id()}\r\nconnection: close\r\n\r\n"
        ).encode()
        self.transport.write(STATUS_LINE[error.status] + head + body)
        self.transport.close()

    def _await_headers(self) -> None:
        self._head_timer = self.loop.call_later(HEADERS_TIMEOUT_S, self._close_slow)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close_slow(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.close()


class _Uvicorn(uvicorn.Server):
    """uvicorn without signal handlers: the process has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class ApiServer:
    """
    The API on an address.

    Args:
        app: The ASGI application.
        host: Address to listen on.
        port: 0 is any free one.

    Raises:
        OSError: It cannot listen there.
    """

    def __init__(self, app: ASGIApp, host: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        self._socket.setblocking(False)  # noqa: FBT003 - of the standard library
        options: dict[str, Any] = {"http": Protocol, "ws": "none", "lifespan": "off", "log_config": None}
        self._server = _Uvicorn(
            uvicorn.Config(
                app,
                **options,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                proxy_headers=False,
            )
        )
        self._ended = asyncio.Event()
        self._is_started = False

    @property
    def port(self) -> int:
        """Port it listens on."""
        port: int = self._socket.getsockname()[1]
        return port

    async def run(self) -> None:
        """
        Serve until `drain`.

        Cancellation: connections are closed at once.
        """
        self._is_started = True
        try:
            await self._server.serve(sockets=[self._socket])
        finally:
            self._ended.set()
            self._socket.close()

    async def drain(self, grace_s: float) -> None:
        """
        Take no more connections, let running requests end for so many seconds, close the rest.

        Cancellation: the drain goes on; only this wait is given up.
        """
        self._server.config.timeout_graceful_shutdown = max(0, int(grace_s))
        self._server.should_exit = True
        if self._is_started:
            await self._ended.wait()
        else:
            self._socket.close()
