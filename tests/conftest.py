"""
What every test gets without asking: a clean environment, a network that ends at this machine, logs that are kept.

Loops of `asyncio` and Python's own sockets are guarded.  gRPC's C core and uvloop open sockets past Python, so their
tests must bind to 127.0.0.1 by themselves.
"""

import ipaddress
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import settings as hypothesis_settings
from structlog.testing import capture_logs

TESTS = Path(__file__).parent

hypothesis_settings.register_profile("house", deadline=None, print_blob=True)  # deadlines are flaky on shared cores
hypothesis_settings.load_profile("house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run what is cheap first and the chaos tests last, so that a simple fault is told before the long waits."""
    order = ["unit", "integration", "conformance", "deploy", "e2e", "chaos"]
    items.sort(key=lambda item: order.index(item.path.relative_to(TESTS).parts[0]))


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the developer's shell or pod reaches a test, nor a subprocess it starts."""
    for name in os.environ:
        prefixes = ("WORKER_", "GOOGLE_", "PUBSUB_", "CLOUDSDK_", "OPENAI_", "AWS_", "AZURE_")
        if name.startswith(prefixes) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


def _is_local(address: Any) -> bool:
    if not isinstance(address, tuple):  # a Unix socket's path
        return True
    host = str(address[0])
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@pytest.fixture(autouse=True)
def network_violations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Connecting or asking for a name beyond this machine fails the test, even when the code swallows the error."""
    violations: list[str] = []
    connect, connect_ex, resolve = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def refuse(what: object) -> None:
        violations.append(str(what))
        raise ConnectionRefusedError(f"tests stay on this machine: {what}")

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if not _is_local(address):
            refuse(address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        if not _is_local(address):
            refuse(address)
        return connect_ex(self, address)

    def guarded_resolve(host: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name is not None and name.endswith(".invalid"):  # exists nowhere: RFC 6761, section 6.4
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        if name not in {None, "", "0.0.0.0", "::", socket.gethostname()} and not _is_local((name,)):
            refuse(name)
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_resolve)
    yield violations
    if violations:
        pytest.fail(f"connected beyond this machine: {violations}")


@pytest.fixture(autouse=True)
def logs() -> Iterator[list[Any]]:
    """Every structlog line of the test as a dictionary, in order."""
    structlog.reset_defaults()
    with capture_logs() as entries:
        yield entries
    structlog.reset_defaults()
