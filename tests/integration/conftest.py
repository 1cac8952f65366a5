"""Fixtures of the tests against real sockets."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import aiohttp
import pytest
import uvloop

from tests.support.raw_http import Open
from worker.backends.openai import HttpBackend
from worker.emulators.openai import SimBackend, SimOptions
from worker.settings.schema import RouteSettings


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Let the tests of our own HTTP connections run on both loops: the worker's own is uvloop."""
    if item.path.name.startswith("test_http"):
        return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}


@pytest.fixture
async def open_backend() -> AsyncIterator[Open]:
    """A factory of backends, closed at the end of the test."""
    opened: list[HttpBackend] = []

    def build(base_url: str, **route: Any) -> HttpBackend:
        backend = HttpBackend(RouteSettings.model_validate({"name": "r", "base_url": base_url, **route}))
        opened.append(backend)
        return backend

    yield build
    for backend in opened:
        await backend.aclose()
        await backend.aclose()


@pytest.fixture
async def sim() -> AsyncIterator[SimBackend]:
    """A server without latency."""
    async with SimBackend(SimOptions()) as backend:
        yield backend


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A client that keeps connections and does not unpack answers by itself."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
        yield session
