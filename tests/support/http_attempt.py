"""Attempts against a backend: one that is expected to answer, and one that must fail."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from worker.backends.openai import HttpBackend
from worker.errors import BackendError
from worker.policy.model import Fault, Phase
from worker.ports import AttemptResult, BackendRequest
from worker.settings.schema import RouteSettings
from worker.wire.body import RequestBody

BODY = b'{"model" : "m","n":12345678901234567890, "x":"\\u00e9\xc3\xa9"}\n'
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
SHORT = {"connect_s": 0.1, "idle_s": 0.1, "total_s": 5}

Open = Callable[..., HttpBackend]
"""A base URL and settings of a route to a backend; the fixture `open_backend`."""


async def invoke(backend: HttpBackend, path: str = "/v1/x", body: bytes = BODY, **more: Any) -> AttemptResult:
    result = AttemptResult()
    await backend.invoke(BackendRequest(path=path, body=RequestBody(body), **more), result)
    return result


class Attempt:
    """One attempt, its result, and how it ended."""

    def __init__(self, base_url: str, timeouts: dict[str, Any] | None = None, **route: Any) -> None:
        settings = {"name": "r", "base_url": base_url, "timeouts": {**SHORT, **(timeouts or {})}, **route}
        self.backend = HttpBackend(RouteSettings.model_validate(settings))
        self.result = AttemptResult()
        self.seconds = 0.0

    async def fail(self, body: bytes = b"{}", timeout_s: float | None = None) -> BackendError:
        """Return the error with which it must end."""
        began = time.monotonic()
        with pytest.raises(BackendError) as caught:
            await self.backend.invoke(
                BackendRequest(path="/v1/x", body=RequestBody(body), timeout_s=timeout_s), self.result
            )
        self.seconds = time.monotonic() - began
        await self.backend.aclose()
        assert self.result.ended is not None
        assert isinstance(caught.value.fault, Fault)
        return caught.value

    def outcome(self, error: BackendError) -> tuple[str, Phase, int | None]:
        return error.fault, self.result.phase, self.result.status
