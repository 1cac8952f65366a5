"""
What `local` asks a model server before it starts: does it answer, does it take the key, which models has it?

One `GET /v1/models`.  A server that refuses it, redirects or cannot be reached ends the command, since every request
would fare the same.  A server that has no such list, or that is busy, decides nothing: the first answers will
(`worker.client.first_answers`).
"""

import json
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus

from worker.backends.openai import HttpBackend
from worker.client.check import ModelUse
from worker.client.summary import one_line
from worker.errors import BackendError, WorkerError
from worker.settings.schema import RouteSettings
from worker.wire.http import address_of

MODELS = "/v1/models"
TIMEOUT_S = 10.0
MAX_BYTES = 8_000_000
"""Of an answer that is read; lists of routers with thousands of models have some megabytes."""
SHOWN_MODELS = 8
_REFUSED = frozenset({401, 403, 407})
_LATEST = ":latest"
"""Ollama lists a model under its tag, and takes it without this one."""


class PreflightError(WorkerError):
    """The server would answer no request of this command; permanent until the command or the server changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What a route's server said."""

    base_url: str
    models: tuple[str, ...] | None
    """Names, sorted; `None` when it has no list."""
    remark: str = ""
    """Why it has none, if that is unusual."""

    def lacks(self, model: str) -> bool:
        """Whether it has a list, and the model is not in it."""
        return self.models is not None and model not in self.models and model + _LATEST not in self.models


async def ask(route: RouteSettings) -> Server:
    """
    Ask a route's server for its models, as the worker asks it.

    Raises:
        PreflightError: It cannot be reached, redirects, or refuses the key.
        SettingsError: A file of a key or a certificate cannot be read.

    Cancellation: closes the connection.
    """
    if route.is_sagemaker:
        return Server(base_url=f"the SageMaker endpoint {route.sagemaker.endpoint}", models=None)
    backend = HttpBackend(route)
    url = address_of(route.base_url, MODELS)
    try:
        reply = await backend.get(MODELS, timeout_s=TIMEOUT_S, max_bytes=MAX_BYTES)
    except TimeoutError:
        return Server(base_url=route.base_url, models=None, remark=f"GET {url} was not answered in {TIMEOUT_S:g} s")
    except BackendError as error:
        raise PreflightError(f"{route.base_url} cannot be reached: {one_line(_reason(error))}") from None
    finally:
        await backend.aclose()
    headers = {name.lower(): value for name, value in reply.headers}
    location = headers.get(b"location", b"nowhere").decode("latin-1")
    return _understood(route.base_url, url, reply.status or 0, location, bytes(reply.body))


def _reason(error: BackendError) -> str:
    """Return the system's words where it has some, else the library's."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno and not isinstance(cause, ssl.SSLError):
            return os.strerror(cause.errno) if cause.errno > 0 else str(cause.strerror)  # below 0: of a lookup
        cause = cause.__cause__ or cause.__context__
    return error.detail


def _understood(base_url: str, url: str, status: int, location: str, body: bytes) -> Server:
    if status in _REFUSED:
        raise PreflightError(
            f"{base_url} refuses the credentials ({status} for GET {url}): {_words(body)}; "
            "give a key with --api-key-file, OPENAI_API_KEY or --header"
        )
    if 300 <= status <= 399:  # noqa: PLR2004
        raise PreflightError(f"{base_url} redirects to {one_line(location)}; --backend-url must be where that leads")
    if status != HTTPStatus.OK:
        is_usual = status in {HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NOT_IMPLEMENTED}
        return Server(
            base_url=base_url, models=None, remark="" if is_usual else f"GET {url} has status {status}: {_words(body)}"
        )
    models = _models(body)
    if models is None:
        return Server(base_url=base_url, models=None, remark=f"GET {url} is no list of models; is this the API?")
    return Server(base_url=base_url, models=models)


def _models(body: bytes) -> tuple[str, ...] | None:
    try:
        listed = json.loads(body)["data"]
        return tuple(sorted({str(model["id"]) for model in listed}))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _words(body: bytes) -> str:
    """Return what an error says; the text as it stands when it is in no known shape."""
    try:
        error = json.loads(body)["error"]
        text = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError, RecursionError):
        text = body.decode("utf-8", "replace")
    return one_line(str(text)) or "no reason given"


def describe(server: Server) -> str:
    """Return a line about a server: its address and models."""
    if server.models is None:
        return f"server: {server.base_url}{f'; {server.remark}' if server.remark else ''}"
    return f"server: {server.base_url}; it has {_listed(server.models)}"


def missing(servers: list[Server], asked_for: Mapping[str, ModelUse]) -> list[str]:
    """Return a warning for each model that lines ask for and no server lists; none if one server has no list."""
    return [
        f"warning: {use.count:,} lines ask for the model {model!r} (first line {use.first}), which is not among them"
        for model, use in asked_for.items()
        if servers and all(server.lacks(model) for server in servers)
    ]


def _listed(models: tuple[str, ...]) -> str:
    if not models:
        return "no models"
    shown = ", ".join(one_line(model) for model in models[:SHOWN_MODELS])
    return f"{shown} and {len(models) - SHOWN_MODELS:,} more" if len(models) > SHOWN_MODELS else shown
