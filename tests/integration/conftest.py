"""Fixtures of the tests against real sockets."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.http_attempt import Open
from worker.backends.openai import HttpBackend
from worker.settings import RouteSettings


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
