"""
The server: gRPC around the broker, and one timer that calls `Broker.tick`.

Google's clients reach it unmodified through `PUBSUB_EMULATOR_HOST`: any project name, no credentials, no TLS.  It is
for development and tests only: every client that reaches the port may read and delete everything, so the default
address is loopback.

Everything runs on the event loop that called `start`, in one thread.  A test that blocks its own loop uses
`LocalPubSubThread`.
"""

import asyncio
import errno
import ipaddress
import logging
import math
import socket
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, NoReturn, Self

import grpc
import grpc.aio

from worker.emulators.pubsub.broker import Broker
from worker.emulators.pubsub.clock import Clock
from worker.emulators.pubsub.errors import PubSubError, UnavailableError
from worker.emulators.pubsub.faults import Faults
from worker.emulators.pubsub.pull import PullStream, pull
from worker.emulators.pubsub.rpc import SUBSCRIBER, Answer, abort, unary_methods

_LOGGER = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 20 * 1024 * 1024
"""Largest request that gRPC accepts: above the API's 10 MB, so that the server can refuse it in the API's words."""

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    # With port reuse two servers would share the port, each with half of the clients.
    ("grpc.so_reuseport", 0),
    # Clients ping every 30 s; with the default policy gRPC would close their connections.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),
)

_MAX_PORT = 65_535

_TICK_GRAIN_S = 0.005
"""Shortest time between two ticks; leases that end within it share one tick."""

_MIN_GRACE_S = 0.2
"""Shortest grace of `stop`, in which open streams send their last status to the client."""


class LocalPubSub:
    """
    An embedded Pub/Sub server.  Use it as `async with LocalPubSub() as server`, or call `start` and `stop`.

    Args:
        host: Address to bind.
        port: Port to bind; 0 picks a free one.
        clock: Seconds from any origin, for leases and backoffs.
        wall_clock: Seconds since the Unix epoch, for publish times, retention and seek.

    Attributes:
        faults: The interface for tests; its methods may be called from any thread.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._host = host
        self._port = port
        self._clock = Clock(clock, wall_clock)
        self._broker = Broker(self._clock, self._schedule)
        self._streams: set[PullStream] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread_id = 0
        self._server: grpc.aio.Server | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._methods = unary_methods(self._broker)
        names = [name for methods in self._methods.values() for name in methods]
        self.faults = Faults(
            [*names, "Pull", "StreamingPull"],
            lambda path: self._broker.subscription(path, attached=False).snapshot(),
            self._streams,
            self._run_on_loop,
        )

    @property
    def port(self) -> int:
        """The bound port; before `start` the port given."""
        return self._port

    @property
    def address(self) -> str:
        """`host:port`, the value for `PUBSUB_EMULATOR_HOST`."""
        return f"[{self._host}]:{self._port}" if ":" in self._host else f"{self._host}:{self._port}"

    async def start(self) -> None:
        """
        Bind the port and serve on the running loop; after a `stop`, with all resources and messages of before.

        Raises:
            OSError: The address cannot be bound; permanent while another program uses it.
            RuntimeError: The server is running already.

        Cancellation: may leave the port bound; call `stop`.
        """
        if self._server is not None:
            raise RuntimeError("the server is running already")
        if not _is_loopback(self._host):
            _LOGGER.warning(
                "The embedded Pub/Sub server listens on %s. It has no access control and is for development only.",
                self._host,
            )
        try:
            _try_address(self._host, self._port)
        except OSError as error:
            raise OSError(f"cannot listen on {self.address}: {error.strerror}") from error
        self._loop = asyncio.get_running_loop()
        self._thread_id = threading.get_ident()
        server = grpc.aio.server(options=_OPTIONS)
        server.add_generic_rpc_handlers(self._handlers())
        try:
            self._port = server.add_insecure_port(self.address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self.address}: {error}") from error
        self._server = server
        await server.start()
        self._tick()

    async def stop(self, grace_s: float = 0.0) -> None:
        """
        End all streams as UNAVAILABLE, let running calls finish, and release the port; may be called again.

        Args:
            grace_s: Seconds after which calls that still run are cancelled.

        Cancellation: running calls are cancelled at once.
        """
        server, self._server = self._server, None
        try:
            if server is not None:
                self._broker.close(UnavailableError("The server is stopping."))
                await server.stop(max(grace_s, _MIN_GRACE_S))
        finally:
            self._loop = None
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = math.inf

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def advance(self, seconds: float) -> None:
        """
        Move the clock forward for leases, backoffs, retention and publish times.

        Threads: may be called from any thread.

        Args:
            seconds: At least 0.
        """

        def move() -> None:
            self._clock.advance(seconds)
            self._tick()

        self._run_on_loop(move)

    def _handlers(self) -> "list[grpc.GenericRpcHandler[Any, Any]]":
        unary = grpc.unary_unary_rpc_method_handler
        services = {
            service: {name: unary(self._unary(name, answer)) for name, answer in methods.items()}
            for service, methods in self._methods.items()
        }
        services[SUBSCRIBER]["Pull"] = unary(self._pull)
        services[SUBSCRIBER]["StreamingPull"] = grpc.stream_stream_rpc_method_handler(self._streaming_pull)
        return [grpc.method_handlers_generic_handler(service, methods) for service, methods in services.items()]

    def _unary(self, name: str, answer: Answer) -> Callable[[bytes, Any], Any]:
        async def handle(data: bytes, context: Any) -> bytes:
            async with self._call(name, context):
                return answer(data)

        return handle

    async def _pull(self, data: bytes, context: Any) -> bytes:
        async with self._call("Pull", context):
            return await pull(self._broker, data, context.time_remaining())

    async def _streaming_pull(self, requests: AsyncIterable[bytes], context: Any) -> None:
        stream = PullStream(self._broker, requests)
        self._streams.add(stream)
        try:
            async with self._call("StreamingPull", context):
                await stream.run(context)
        finally:
            self._streams.discard(stream)

    @asynccontextmanager
    async def _call(self, method: str, context: Any) -> AsyncIterator[None]:
        """Wrap the work of one call: its faults before and after it, and errors of the engine as gRPC statuses."""
        faults = self.faults.arrive(method)
        try:
            if faults is not None:
                await faults.before()
            yield
            if faults is not None:
                await faults.after()
        except PubSubError as error:
            await abort(context, error)

    def _schedule(self, at: float) -> None:
        """Plan a tick for clock time `at`, unless an earlier one is planned."""
        if self._loop is None or at >= self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = self._loop.call_later(max(_TICK_GRAIN_S, at - self._clock.now()), self._tick)

    def _tick(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = math.inf
        due = self._broker.tick()
        if due != math.inf:
            self._schedule(due)

    def _run_on_loop(self, function: Callable[[], object]) -> object:
        """Run a function in the thread of the server's loop, or here while the server is stopped."""
        loop = self._loop
        if loop is None or threading.get_ident() == self._thread_id:
            return function()

        async def call() -> object:
            return function()

        return asyncio.run_coroutine_threadsafe(call(), loop).result()


async def serve(
    host: str = "127.0.0.1", port: int = 8085, *, on_ready: Callable[[str], None] | None = None
) -> NoReturn:
    """
    Serve until cancelled.

    Args:
        host: Address to bind.
        port: Port to bind; 8085 is what Google's emulator uses, 0 picks a free one.
        on_ready: Called with the address when the port is open.

    Raises:
        OSError: The address cannot be bound.

    Cancellation: stops the server; the port is free afterwards.
    """
    async with LocalPubSub(host, port) as server:
        if on_ready is not None:
            on_ready(server.address)
        await asyncio.get_running_loop().create_future()
    raise AssertionError("the future is never resolved")


def _is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _try_address(host: str, port: int) -> None:
    """
    Bind the address and release it, so that an error has the reason of the operating system.

    gRPC raises without a reason, prints it to standard error by itself, and takes a port modulo 65536.

    Raises:
        OSError: The address cannot be bound; permanent while another program uses it.
    """
    if not 0 <= port <= _MAX_PORT:
        raise OSError(errno.EINVAL, f"a port is a number from 0 to {_MAX_PORT}")
    if not host:
        raise OSError(errno.EINVAL, "the host is empty")
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignores connections that just ended
        trial.bind(address)
        trial.listen()
