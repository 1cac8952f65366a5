"""The guards of `tests/conftest.py` hold."""

import asyncio
import os
import socket

import pytest

from worker.telemetry.logs import get_logger

_log = get_logger("bound at import", answer=42)


def test_the_environment_is_clean() -> None:
    """No variable of ours or of Google's reaches a test."""
    assert [name for name in os.environ if name.startswith(("WORKER_", "GOOGLE_", "PUBSUB_"))] == []


async def test_connecting_beyond_this_machine_is_refused_and_remembered(network_violations: list[str]) -> None:
    """Neither plain sockets nor asyncio's reach another address; the guard fails the test at its end."""
    with socket.socket() as plain, pytest.raises(ConnectionRefusedError, match="stay on this machine"):
        plain.connect(("192.0.2.1", 80))
    with pytest.raises(ConnectionRefusedError, match="stay on this machine"):
        await asyncio.open_connection("192.0.2.1", 80)
    with pytest.raises(ConnectionRefusedError, match="stay on this machine"):
        socket.getaddrinfo("example.com", 80)
    assert len(network_violations) == 3
    network_violations.clear()


async def test_loopback_is_open() -> None:
    """A server of the test itself can be reached, by address and by name."""
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    for host in ("127.0.0.1", "localhost"):
        reader, writer = await asyncio.open_connection(host, port)
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
    server.close()
    await server.wait_closed()


def test_logs_are_captured(logs: list[dict[str, object]]) -> None:
    """A logger made when a module was imported writes where the configuration of the moment says."""
    _log.info("hello")
    assert logs == [{"logger_name": "bound at import", "answer": 42, "event": "hello", "log_level": "info"}]
