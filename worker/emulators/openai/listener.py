"""
A listening socket that can stop listening and come back on the same port.

While it refuses, the port stays bound by a socket that does not listen: the kernel answers connection attempts with a
reset, which clients see as "connection refused", and no other program can take the port meanwhile.
"""

import asyncio
import errno
import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiohttp.web import Server
    from aiohttp.web_protocol import RequestHandler

_MAX_PORT = 65_535
BACKLOG = 1024
"""Connections the kernel holds ready: rehearsals open hundreds at once after an outage."""
_BIND_TRIES = 200
_BIND_PAUSE_S = 0.01
"""Together two seconds for a closed socket to let go of its port; an event loop closes it a turn later."""
_NO_LINGER = struct.pack("ii", 1, 0)


def reset(transport: asyncio.Transport | None) -> None:
    """Close a connection with a TCP reset: what was not sent is dropped, the other side sees an error."""
    if transport is None or transport.is_closing():
        return
    connection = transport.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    transport.abort()


def _bound(host: str, port: int) -> socket.socket:
    if not 0 <= port <= _MAX_PORT:  # the C library would take it modulo 65536
        raise OSError(errno.EINVAL, f"a port is a number from 0 to {_MAX_PORT}")
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setblocking(False)  # noqa: FBT003 - the standard library's signature
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock


class Listener:
    """One address of a server."""

    def __init__(self, server: "Server", host: str, port: int) -> None:
        """Serve connections at `host` and `port` (0 is any) with aiohttp's low-level `server`; opens nothing yet."""
        self._server = server
        self._host = host
        self.port = port
        """The real port once it is open."""
        self._listening: asyncio.Server | None = None
        self._reserved: socket.socket | None = None

    @property
    def is_open(self) -> bool:
        """Whether connections are accepted."""
        return self._listening is not None

    async def open(self) -> None:
        """
        Accept connections; does nothing if it already does.

        Raises:
            OSError: the address cannot be bound; permanent for this port.

        Cancellation: the socket may stay closed; call it again.
        """
        if self._listening is not None:
            return
        sock, self._reserved = self._reserved or _bound(self._host, self.port), None
        self.port = sock.getsockname()[1]
        self._listening = await asyncio.get_running_loop().create_server(self._server, sock=sock, backlog=BACKLOG)

    async def refuse(self) -> None:
        """
        Stop accepting and keep the port; open connections stay.

        Raises:
            OSError: another program took the port in the moment between; `open` will try again.

        Cancellation: accepts nothing; the port may be free for others.
        """
        if self._listening is None:
            return
        self._listening.close()
        self._listening = None
        for left in reversed(range(_BIND_TRIES)):
            try:
                self._reserved = _bound(self._host, self.port)
            except OSError:
                if not left:
                    raise
                await asyncio.sleep(_BIND_PAUSE_S)
            else:
                return

    def drop(self, spared: "RequestHandler | None" = None) -> None:
        """Reset every open connection but one."""
        for connection in self._server.connections:
            if connection is not spared:
                reset(connection.transport)

    async def aclose(self) -> None:
        """Stop for good: close the socket and every connection. Cancellation: connections may be left open."""
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None
        self.drop()
        await self._server.shutdown(0.05)
