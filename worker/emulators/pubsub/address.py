"""Addresses to listen on: which are everybody's, and which cannot be had."""

import errno
import ipaddress
import socket

_MAX_PORT = 65_535


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def try_address(host: str, port: int) -> None:
    """
    Bind the address for a moment, to have the system's own words when that fails.

    gRPC says only that it failed, writes the reason to standard error by itself, and takes a port modulo 65536.

    Raises:
        OSError: The address cannot be bound; permanent while somebody else has it.
    """
    if not 0 <= port <= _MAX_PORT:
        raise OSError(errno.EINVAL, f"a port is a number from 0 to {_MAX_PORT}")
    if not host:
        raise OSError(errno.EINVAL, "the host is empty")
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that just ended are in nobody's way
        trial.bind(address)
        trial.listen()
