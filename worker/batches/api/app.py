"""
The ASGI application: routes, and around each of them key, rate, request id, errors and one log line.

Nothing leaves as anything but JSON in OpenAI's shape, whatever goes wrong and wherever.  A fault of ours is a 500 with
the request's id, and the log says under the same id what it was; bodies, keys and headers are never logged.
"""

import time
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from worker.batches.api.auth import FindTenant, KeyCheck
from worker.batches.api.batches import BatchRoutes
from worker.batches.api.errors import (
    ApiError,
    headers_too_large,
    models_away,
    new_request_id,
    no_model,
    unavailable,
    unexpected,
    unknown_route,
    wrong_method,
)
from worker.batches.api.files import FileRoutes
from worker.batches.api.limits import RateLimit
from worker.batches.api.openapi import OPERATIONS, build_document, build_page
from worker.batches.api.replies import json_reply
from worker.batches.api.server import MAX_HEADER_BYTES
from worker.batches.api.storage import Storage
from worker.batches.models import Models, ModelsUnavailableError
from worker.batches.page.routes import PageRoutes
from worker.batches.store import StoreUnavailableError
from worker.errors import PayloadError
from worker.settings.schema import BatchesSettings
from worker.telemetry.logs import get_logger

REQUEST_ID = "request_id"
"""Key of the id in a request's state."""
Handler = Callable[[Request, str], Awaitable[Response]]
"""Answers a request of a tenant."""
_MINUTE_S = 60.0

_log = get_logger("batches.api")


def build_app(
    storage: Storage,
    models: Models,
    settings: BatchesSettings,
    *,
    clock: Callable[[], float] = time.monotonic,
    on_request: Callable[[str, str, int, float], None] = lambda _method, _route, _status, _duration_s: None,
) -> ASGIApp:
    """
    Return the application.

    Args:
        storage: Store and files.
        models: The backend's list.
        settings: Limits, endpoints, whether keys are needed.
        clock: Monotonic seconds.
        on_request: Told method, route, status and seconds of each request that was answered; must not raise.
    """
    keys = KeyCheck(_key_finder(storage), clock, is_required=settings.auth == "keys")
    requests = RateLimit("requests", settings.requests_per_minute, _MINUTE_S, clock)
    uploads = RateLimit("uploads", settings.uploads_per_minute, _MINUTE_S, clock)
    files = FileRoutes(storage, settings, uploads)
    batches = BatchRoutes(storage, settings)
    handlers: dict[str, Handler] = {
        "create_file": files.create,
        "list_files": files.list,
        "retrieve_file": files.retrieve,
        "delete_file": files.delete,
        "retrieve_file_content": files.content,
        "create_batch": batches.create,
        "list_batches": batches.list,
        "retrieve_batch": batches.retrieve,
        "cancel_batch": batches.cancel,
        "retry_batch": batches.retry,
        "list_models": _list_models(models),
        "retrieve_model": _retrieve_model(models),
    }
    document = build_document(endpoints=settings.endpoints, needs_key=settings.auth == "keys")
    texts = {
        "/openapi.json": (msgspec.json.encode(document), "application/json"),
        "/docs": (build_page(document).encode(), "text/html; charset=utf-8"),
    }
    by_path: dict[str, dict[str, Handler]] = {}
    for each in OPERATIONS:
        by_path.setdefault(_path(each.path), {})[each.method] = handlers[each.name]
    routes: list[BaseRoute] = [
        Route(path, _with_tenant(methods, keys, requests), methods=list(methods)) for path, methods in by_path.items()
    ]
    routes += [Route(path, _fixed(body, kind)) for path, (body, kind) in texts.items()]
    pages = PageRoutes(storage, files, batches, keys, needs_key=settings.auth == "keys")
    return _Outside(Router([*routes, *pages.routes()], redirect_slashes=False), clock, on_request)


def _key_finder(storage: Storage) -> FindTenant:
    async def find(key_hash: str) -> str | None:
        found = await storage.call(lambda: storage.store.find_key(key_hash))
        return None if found is None else found.tenant

    return find


def _path(path: str) -> str:
    """Return a path for the router: names of models contain slashes."""
    return path.replace("{model}", "{model:path}")


def _with_tenant(
    methods: Mapping[str, Handler], keys: KeyCheck, requests: RateLimit
) -> Callable[[Request], Awaitable[Response]]:
    """Return what answers the methods of a path: for the tenant of the key, within its rate."""

    async def answer(request: Request) -> Response:
        tenant = await keys.tenant_of(request.headers.get("authorization"))
        request.state.tenant = tenant
        requests.take(tenant)
        return await methods["GET" if request.method == "HEAD" else request.method](request, tenant)

    return answer


def _fixed(body: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    async def answer(_: Request) -> Response:
        return Response(body, headers={"content-type": kind})

    return answer


def _list_models(models: Models) -> Handler:
    async def answer(_request: Request, _tenant: str) -> Response:
        return json_reply((await models.get()).document)

    return answer


def _retrieve_model(models: Models) -> Handler:
    async def answer(request: Request, _tenant: str) -> Response:
        name = request.path_params["model"]
        found = (await models.get()).find(name)
        if found is None:
            raise no_model(name)
        return json_reply(found)

    return answer


def _refused_by_router(error: HTTPException, scope: Scope) -> ApiError:
    method, path = scope["method"], scope["path"]
    if error.status_code == HTTPStatus.NOT_FOUND:
        return unknown_route(method, path)
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        return wrong_method(method, path, ", ".join(sorted((error.headers or {}).get("Allow", "").split(", "))))
    return ApiError(error.status_code, error.detail)


def _error_reply(error: ApiError) -> Response:
    return Response(error.body, error.status, headers={"content-type": "application/json", **error.headers})


class _Outside:
    """
    Everything around the routes: request id, size of the headers, errors, log.

    Args:
        app: The routes.
        clock: Monotonic seconds.
        on_request: See `build_app`.
    """

    def __init__(
        self, app: ASGIApp, clock: Callable[[], float], on_request: Callable[[str, str, int, float], None]
    ) -> None:
        self._app = app
        self._clock = clock
        self._on_request = on_request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; cancellation closes the connection."""
        assert scope["type"] == "http"
        started = self._clock()
        reply = _Reply(send, new_request_id())
        state = scope.setdefault("state", {})
        state[REQUEST_ID] = reply.request_id
        try:
            _check_headers(scope)
            scope["app"] = self  # has the router raise its refusals instead of answering them with plain text
            await self._app(scope, receive, reply.send)
        except ClientDisconnect:
            _log.info("batch_api_client_left", request_id=reply.request_id, method=scope["method"], route=_route(scope))
            return
        except Exception as error:  # noqa: BLE001 - every fault is answered
            await self._refuse(error, reply, scope, receive)
        duration_s = self._clock() - started
        self._on_request(scope["method"], _route(scope), reply.status, duration_s)
        _log.info(
            "batch_api_request",
            request_id=reply.request_id,
            method=scope["method"],
            route=_route(scope),
            status_code=reply.status,
            tenant=state.get("tenant"),
            duration_s=round(duration_s, 4),
        )

    async def _refuse(self, error: Exception, reply: "_Reply", scope: Scope, receive: Receive) -> None:
        match error:
            case ApiError():
                refusal = error
            case HTTPException():
                refusal = _refused_by_router(error, scope)
            case StoreUnavailableError():
                _log.warning("batch_api_store_away", request_id=reply.request_id, error=str(error))
                refusal = unavailable("The database is not available.")
            case PayloadError():
                _log.warning("batch_api_files_away", request_id=reply.request_id, error=str(error))
                refusal = unavailable("The storage of files is not available.")
            case ModelsUnavailableError():
                _log.warning("batch_api_models_away", request_id=reply.request_id, error=str(error))
                refusal = models_away()
            case _:
                _log.exception("batch_api_failed", request_id=reply.request_id, exc_info=error)
                refusal = unexpected(reply.request_id)
        if not reply.status:  # else the server closes the connection of a reply that is not whole
            await _error_reply(refusal)(scope, receive, reply.send)


class _Reply:
    """Sends a reply with its request id, and notes its status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self.request_id = request_id
        self.status = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = int(message["status"])
            message["headers"] = [*message["headers"], (b"x-request-id", self.request_id.encode())]
        await self._send(message)


def _check_headers(scope: Scope) -> None:
    size = len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
    size += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    if size > MAX_HEADER_BYTES:
        raise headers_too_large(MAX_HEADER_BYTES)


def _route(scope: Scope) -> str:
    """Return the path with the names of its parameters, so that the log has few values of it."""
    route: Any = scope.get("route")
    return getattr(route, "path", "other")
