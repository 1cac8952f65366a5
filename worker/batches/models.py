"""
The models of the backend: its own list, passed through and kept for a while.

Validation asks the same list, so that a batch is refused for exactly the models that `GET /v1/models` does not show.
A backend that has no such list (404, 405, 501) accepts every model; one that is away says nothing about models, so that
the caller waits.
"""

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import msgspec

from worker.backends.openai import HttpBackend
from worker.errors import BackendError, WorkerError
from worker.settings.schema import RouteSettings

PATH = "/v1/models"
KEEP_S = 30.0
TIMEOUT_S = 10.0
MAX_BYTES = 8_000_000
"""Lists of routers with thousands of models have some megabytes."""
_NO_LIST = frozenset({HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NOT_IMPLEMENTED})
_EMPTY_LIST: dict[str, Any] = {"object": "list", "data": []}
_LATEST = ":latest"
"""Ollama lists a model under its tag, and takes it without this one."""


class ModelsUnavailableError(WorkerError):
    """The backend's list could not be read; retryable."""


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """What the backend said."""

    document: dict[str, Any]
    """As the backend sent it."""
    names: frozenset[str] | None
    """`None`: the backend has no list, any model may be asked for."""

    def has(self, model: str) -> bool:
        """Whether lines may ask for a model."""
        return self.names is None or model in self.names or model + _LATEST in self.names

    def find(self, model: str) -> Any:
        """Return the backend's object of one model, `None` when it is not in the list."""
        return next(
            (each for each in self.document["data"] if isinstance(each, dict) and each.get("id") == model), None
        )


class Models:
    """
    The list of one backend.

    Args:
        route: How the backend is asked; `None`: there is none to ask, so that every model is accepted.
        clock: Monotonic seconds.
    """

    def __init__(self, route: RouteSettings | None, clock: Callable[[], float]) -> None:
        self._backend = HttpBackend(route) if route is not None else None
        self._clock = clock
        self._kept: ModelList | None = None
        self._kept_until = 0.0
        self._lock = asyncio.Lock()

    async def get(self) -> ModelList:
        """
        Return the list, at most `KEEP_S` old; however many ask, the backend is asked once.

        Raises:
            ModelsUnavailableError: The backend is away, busy or answers with something else.

        Cancellation: leaves nothing behind.
        """
        async with self._lock:
            if self._kept is None or self._clock() >= self._kept_until:
                self._kept = await self._ask()
                self._kept_until = self._clock() + KEEP_S
            return self._kept

    async def aclose(self) -> None:
        """Close the connections; idempotent.  Cancellation: they may stay open until the process ends."""
        if self._backend is not None:
            await self._backend.aclose()

    async def _ask(self) -> ModelList:
        if self._backend is None:
            return ModelList(document=_EMPTY_LIST, names=None)
        try:
            reply = await self._backend.get(PATH, timeout_s=TIMEOUT_S, max_bytes=MAX_BYTES)
        except TimeoutError:
            raise ModelsUnavailableError(f"GET {PATH} was not answered in {TIMEOUT_S:g} s") from None
        except BackendError as error:
            raise ModelsUnavailableError(f"GET {PATH}: {error}") from None
        if reply.status in _NO_LIST:
            return ModelList(document=_EMPTY_LIST, names=None)
        if reply.status != HTTPStatus.OK:
            raise ModelsUnavailableError(f"GET {PATH} has status {reply.status}")
        return read_models(bytes(reply.body))


def read_models(body: bytes) -> ModelList:
    """
    Return a backend's list of models.

    Raises:
        ModelsUnavailableError: It is none.
    """
    try:
        document = msgspec.json.decode(body)
        names = frozenset(str(each["id"]) for each in document["data"])
    except (msgspec.DecodeError, ValueError, KeyError, TypeError, RecursionError):
        raise ModelsUnavailableError(f"GET {PATH} is no list of models") from None
    return ModelList(document=document, names=names)
