"""
The connections to one server: made, kept while they are idle, and used again.

An answer must never reach another request.  `connection` closes a connection on which anything arrives while it is
quiet; what that cannot see are bytes that come a moment later, when the next request has been written: they look like
its answer.  So

* a connection rests for `REST_S` between two exchanges, and the one that has rested the longest is taken first.  Only
  where every one was used a moment ago does a request wait for it; no further connection is opened for that.
* once bytes came within a second after an answer, no connection is used again for `DISTRUST_S`.

A name with several addresses (a headless Service) is several servers.  A new connection goes to the address that has
the fewest, and a connection of which its address has two more than another one is closed at the end of an exchange
instead of kept, so that requests are spread evenly, also over addresses that appear later.  Under load the name is
looked up again every `RESOLVED_S`; a connection to an address that has not been named for `GONE_S` is not kept.  An
address that did not answer is the last choice for `AVOIDED_S`.

A request is sent a second time only where its connection was of no use (`StaleConnectionError`): once, at once, on a
fresh one.  How many connections there are is the caller's business: the window of the route is the limit.

Nothing comes from the environment: proxies are a setting.
"""

import asyncio
import base64
import contextlib
import ipaddress
import math
import socket
import ssl
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any
from urllib.parse import unquote, urlsplit

import idna

from worker.backends.http.connection import Connection, Request, Sink, StaleConnectionError, words_of
from worker.errors import BackendError, SettingsError
from worker.policy.model import Fault

KEEPALIVE_S = 4.0
"""How long an idle connection is kept: below uvicorn's 5 s (vLLM, SGLang), so that a request is not sent into a
connection the server is just closing (https://www.uvicorn.org/settings/#timeouts)."""
REST_S = 0.003
"""What a server sends too much, it sends at once."""
DISTRUST_S = 60.0
RESOLVED_S = 10.0
"""How long the addresses of a name are used."""
GONE_S = 30.0
"""An address that was not among the answers for so long is no longer one: large names give other ones each time."""
AVOIDED_S = 10.0
NEXT_ADDRESS_S = 0.25
"""After this the next address is tried as well (https://www.rfc-editor.org/rfc/rfc8305#section-5)."""
MAX_PROXY_BYTES = 16 * 1024
"""Of a proxy's answer to CONNECT."""
_KEEP_ALIVE_PROBES = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}
"""Long requests are silent: without these a NAT forgets their connection, and the death of a node is not noticed."""

_PORTS = {"http": 80, "https": 443}
Address = tuple[Any, ...]
"""As `getaddrinfo` has it."""
Where = tuple[Any, ...]
"""Its last part: what a socket connects to."""


class Pool:
    """
    Connections to one origin.  Made anywhere; used on one event loop.

    Args:
        base_url: Of the server; its path is of no concern.
        tls: Returns what a new connection to an `https` URL uses.
        proxy: `http://[user:password@]host:port`, by which the server is reached.

    Raises:
        SettingsError: The host is no name.
    """

    def __init__(
        self, base_url: str, *, tls: Callable[[], ssl.SSLContext] | None = None, proxy: str | None = None
    ) -> None:
        parts = urlsplit(base_url)
        assert parts.hostname is not None
        self._host, self._port = _ascii(parts.hostname), parts.port or _PORTS[parts.scheme]
        self._is_tls = parts.scheme == "https"
        assert tls is not None or not self._is_tls
        self._tls = tls if self._is_tls else None
        via = urlsplit(proxy) if proxy is not None else None
        self._dialled = (self._host, self._port)
        self.proxy_credentials = ""
        """What the proxy is told of the worker."""
        self._is_tunnelled = via is not None and self._is_tls
        if via is not None:
            assert via.hostname is not None
            self._dialled = (via.hostname, via.port or _PORTS["http"])
            if via.username is not None:
                pair = f"{unquote(via.username)}:{unquote(via.password or '')}".encode()
                self.proxy_credentials = f"Basic {base64.b64encode(pair).decode()}"
        self._proxy_headers = (
            f"Proxy-Authorization: {self.proxy_credentials}\r\n".encode() if self.proxy_credentials else b""
        )
        named = f"[{self._host}]" if ":" in self._host else self._host
        self.authority = named if parts.port in {None, _PORTS[parts.scheme]} else f"{named}:{self._port}"
        """What the header `Host` names."""
        is_forwarded = via is not None and not self._is_tls
        self.line_prefix = f"http://{self.authority}".encode() if is_forwarded else b""
        """What stands before the path in a request line."""
        self.line_headers = self._proxy_headers if is_forwarded else b""
        """What every request has to carry for the way to the server."""
        self._connections: dict[Connection, Where] = {}
        self._counts: Counter[Where] = Counter()
        """Connections by address; none is 0."""
        self._idle: deque[Connection] = deque()
        self._waiting: deque[asyncio.Future[Connection | None]] = deque()
        """Requests that wait until an idle connection has rested; never more than there are of those."""
        self._rest: asyncio.TimerHandle | None = None
        self._sweep: asyncio.TimerHandle | None = None
        self._distrusted_until = 0.0
        self._is_closed = False
        self._emptied: asyncio.Event | None = None
        """Set when the last connection has ended, once that is waited for."""
        self._resolving: asyncio.Task[None] | None = None
        self._resolved: Sequence[Address] = ()
        self._resolved_until = 0.0
        self._refresh_at = math.inf if _is_literal(self._dialled[0]) else 0.0
        """When the name is looked up again though no new connection needs it."""
        self._family: Sequence[Where] = ()
        """The addresses that connections are spread over: those of the first one's family."""
        self._named_at: dict[Where, float] = {}
        self._avoided_until: dict[Where, float] = {}
        self._turn = 0

    async def exchange(self, request: Request, sink: Sink, connect_s: float) -> None:
        """
        Send a request and push its answer into the sink.

        Args:
            request: As it goes over the wire.
            sink: See `Sink`; a request that is sent a second time is `connected` a second time.
            connect_s: Limit of each attempt to connect, with the lookup of the name and TLS.

        Raises:
            BackendError: `CONNECT` and `CONNECT_TIMEOUT`: certainly not sent; else see `Connection.exchange`.

        Cancellation: closes the connection.
        """
        loop = asyncio.get_running_loop()
        if self._refresh_at <= loop.time():
            self._refresh(loop)
        connection = await self.acquire(connect_s)
        try:
            await connection.exchange(request, sink)
        except StaleConnectionError as stale:
            try:
                connection = await self.connect(connect_s)
                await connection.exchange(request, sink)
            except BackendError as error:
                if stale.is_sent and error.fault in {Fault.CONNECT, Fault.CONNECT_TIMEOUT}:
                    raise BackendError(Fault.CONNECTION_LOST, f"{stale.detail}; then {error.detail}") from error
                raise

    async def acquire(self, connect_s: float) -> Connection:
        """
        Return a connection that carries no request: an idle one that has rested, or a new one.

        Raises:
            BackendError: See `connect`.

        Cancellation: closes it.
        """
        idle, loop = self._idle, asyncio.get_running_loop()
        while idle:
            rested_at = idle[0].idle_since + REST_S
            if rested_at <= loop.time() and not self._waiting:
                connection = idle.popleft()
                if self._is_usable(connection):
                    return connection
                continue
            if len(self._waiting) >= len(idle):
                break
            waiter: asyncio.Future[Connection | None] = loop.create_future()
            self._waiting.append(waiter)
            if self._rest is None:
                self._rest = loop.call_at(rested_at, self._hand_out)
            try:
                rested = await waiter
            except BaseException:
                if waiter in self._waiting:
                    self._waiting.remove(waiter)
                if not waiter.cancelled() and (rested := waiter.result()) is not None:
                    idle.appendleft(rested)
                raise
            if rested is not None:
                return rested
        return await self.connect(connect_s)

    async def connect(self, connect_s: float) -> Connection:
        """
        Return a new connection.

        Raises:
            BackendError: `CONNECT` or `CONNECT_TIMEOUT`, with the system's words.

        Cancellation: leaves nothing behind.
        """
        where = f"{self._dialled[0]}:{self._dialled[1]}"
        try:
            async with asyncio.timeout(connect_s):
                return await self._connect()
        except TimeoutError as error:
            self._resolved_until = 0.0
            words = f": {words_of(error)}" if error.args else ""
            raise BackendError(
                Fault.CONNECT_TIMEOUT, f"{where}: no connection within {connect_s:g} s{words}"
            ) from error
        except OSError as error:  # what TLS and lookups raise, too
            self._resolved_until = 0.0  # the name may mean another address by now
            raise BackendError(Fault.CONNECT, f"{where}: {words_of(error)}") from error

    async def aclose(self) -> None:
        """
        Close every connection; idempotent.

        Cancellation: connections may stay open until the process ends; call it again.
        """
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        if self._resolving is not None:
            self._resolving.cancel()
        self._is_closed = True
        for connection in list(self._connections):
            connection.abort()
        if self._connections:
            if self._emptied is None:
                self._emptied = asyncio.Event()
            await self._emptied.wait()

    # What connections say

    def keep(self, connection: Connection) -> None:
        """See `Keeper.keep`."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._is_closed or now < self._distrusted_until or self._is_surplus(connection, now):
            connection.abort()
            return
        self._idle.append(connection)
        if self._sweep is None:
            self._sweep = loop.call_later(KEEPALIVE_S, self._close_idle)

    def forget(self, connection: Connection) -> None:
        """See `Keeper.forget`."""
        where = self._connections.pop(connection, None)
        if where is not None:
            self._counts[where] -= 1
        if self._emptied is not None and not self._connections:
            self._emptied.set()

    def distrust(self) -> None:
        """See `Keeper.distrust`."""
        self._distrusted_until = asyncio.get_running_loop().time() + DISTRUST_S
        while self._idle:
            self._idle.pop().abort()

    def _is_usable(self, connection: Connection) -> bool:
        """Whether an idle connection is still open and not too old; closes it if not."""
        if connection.is_open and asyncio.get_running_loop().time() - connection.idle_since < KEEPALIVE_S:
            return True
        connection.abort()
        return False

    def _hand_out(self) -> None:
        """Give the connections that have rested to the requests that wait for one: one timer for all of them."""
        idle, waiting, loop = self._idle, self._waiting, asyncio.get_running_loop()
        self._rest = None
        while waiting:
            if idle and (rested_at := idle[0].idle_since + REST_S) > loop.time():
                self._rest = loop.call_at(rested_at, self._hand_out)
                return
            connection = idle.popleft() if idle else None
            if connection is None or self._is_usable(connection):
                waiter = waiting.popleft()
                if not waiter.done():
                    waiter.set_result(connection)
                elif connection is not None:
                    idle.appendleft(connection)

    def _close_idle(self) -> None:
        """Close what has been idle for too long, and look again when the next one will have been."""
        loop = asyncio.get_running_loop()
        idle = self._idle
        while idle and (not idle[0].is_open or loop.time() - idle[0].idle_since >= KEEPALIVE_S):
            idle.popleft().abort()
        self._sweep = loop.call_at(idle[0].idle_since + KEEPALIVE_S, self._close_idle) if idle else None

    # A new connection

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        sock, where = await self._dial()
        try:
            if self._is_tunnelled:
                await self._ask_for_tunnel(sock)
            make = partial(Connection, self, loop, is_tls=self._is_tls)
            if self._tls is None:
                _, connection = await loop.create_connection(make, sock=sock)
            else:
                _, connection = await loop.create_connection(
                    make, sock=sock, ssl=self._tls(), server_hostname=self._host
                )
        except BaseException:
            sock.close()
            raise
        if connection.is_open:
            self._connections[connection] = where
            self._counts[where] += 1
        return connection

    async def _dial(self) -> tuple[socket.socket, Where]:
        """Connect to the first address that answers, each a moment after the one before it."""
        waiting = deque(await self._addresses())
        if len(waiting) == 1:
            return await _open(waiting[0]), waiting[0][4]
        running: dict[asyncio.Task[socket.socket], Where] = {}
        failures: list[BaseException] = []
        try:
            while waiting or running:
                if waiting:
                    address = waiting.popleft()
                    running[asyncio.ensure_future(_open(address))] = address[4]
                limit = NEXT_ADDRESS_S if waiting else None
                done, _ = await asyncio.wait(running, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    error = task.exception()
                    if error is None:
                        where = running.pop(task)
                        self._avoided_until.pop(where, None)
                        self._avoid(running.values())
                        return task.result(), where
                    self._avoid([running.pop(task)])
                    failures.append(error)
        finally:
            for task in running:
                task.cancel()
                task.add_done_callback(_close_result)
        raise failures[0]

    async def _addresses(self) -> Sequence[Address]:
        """Return the addresses of the server, or of the proxy: one with the fewest connections first."""
        loop = asyncio.get_running_loop()
        if self._resolved_until < loop.time():
            await asyncio.shield(self._refresh(loop))
        found, now = self._resolved, loop.time()
        if len(found) == 1:
            return found
        family = [address for address in found if address[0] == found[0][0]]
        self._turn = (self._turn + 1) % len(family)
        family = [*family[self._turn :], *family[: self._turn]]  # equal ones take turns
        family.sort(key=lambda each: (self._avoided_until.get(each[4], 0.0) > now, self._counts[each[4]]))
        return [*family, *(each for each in found if each[0] != found[0][0])]

    def _refresh(self, loop: asyncio.AbstractEventLoop) -> "asyncio.Task[None]":
        """Begin to look the name up, unless that is under way."""
        if self._resolving is None or self._resolving.done():
            self._resolving = loop.create_task(self._resolve())
            self._resolving.add_done_callback(_retrieve)
        self._refresh_at = max(self._refresh_at, loop.time() + RESOLVED_S)
        return self._resolving

    async def _resolve(self) -> None:
        loop = asyncio.get_running_loop()
        host, port = self._dialled
        self._resolved = found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        now = loop.time()
        self._resolved_until = now + RESOLVED_S
        self._family = [address[4] for address in found if address[0] == found[0][0]]
        named = dict.fromkeys((address[4] for address in found), now)
        self._named_at = {each: at for each, at in self._named_at.items() if now - at < GONE_S} | named
        self._avoided_until = {each: until for each, until in self._avoided_until.items() if until > now}

    def _avoid(self, addresses: Iterable[Where]) -> None:
        self._avoided_until |= dict.fromkeys(addresses, asyncio.get_running_loop().time() + AVOIDED_S)

    def _is_surplus(self, connection: Connection, now: float) -> bool:
        """Whether a connection that has become free is not kept: another address has fewer, or this one is gone."""
        where = self._connections.get(connection)
        if where not in self._named_at:
            return where is not None
        if len(self._family) == 1 or where not in self._family:
            return False
        counts = [self._counts[each] for each in self._family if self._avoided_until.get(each, 0.0) <= now]
        return bool(counts) and self._counts[where] - min(counts) > 1

    async def _ask_for_tunnel(self, sock: socket.socket) -> None:
        """Ask the proxy for a connection to the server."""
        loop = asyncio.get_running_loop()
        host = f"[{self._host}]" if ":" in self._host else self._host
        target = f"{host}:{self._port}".encode()
        await loop.sock_sendall(
            sock, b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n%b\r\n" % (target, target, self._proxy_headers)
        )
        answer = b""
        while b"\r\n\r\n" not in answer:
            data = await loop.sock_recv(sock, 4096)
            answer += data
            if not data or len(answer) > MAX_PROXY_BYTES:
                raise ConnectionError(f"the proxy opened no tunnel: {answer[:200]!r}")
        head, _, rest = answer.partition(b"\r\n\r\n")
        line = head.split(b"\r\n", 1)[0]
        if rest or line[:7] != b"HTTP/1." or line[8:10] != b" 2":
            raise ConnectionError(f"the proxy opened no tunnel: {line[:200].decode('latin-1')}")


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _ascii(host: str) -> str:
    """Return a host as it stands in DNS."""
    if host.isascii():
        return host
    try:
        return idna.encode(host, uts46=True).decode()
    except idna.IDNAError as error:
        raise SettingsError([f"base_url: Invalid IDNA hostname: {host!r}: {error}"]) from None


async def _open(address: Address) -> socket.socket:
    family, kind, protocol, _, where = address
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)  # noqa: FBT003 - the library's signature
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE_PROBES.items():
            with contextlib.suppress(AttributeError):  # not every system has them
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        await asyncio.get_running_loop().sock_connect(sock, where)
    except BaseException:
        sock.close()
        raise
    return sock


def _retrieve(task: asyncio.Task[None]) -> None:
    """Look at the failure of a lookup, though each request that waited for it may have given up."""
    if not task.cancelled():
        task.exception()


def _close_result(task: asyncio.Task[socket.socket]) -> None:
    """Close the socket that an address brought after another had won."""
    if not task.cancelled() and task.exception() is None:
        task.result().close()
