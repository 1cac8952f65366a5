"""
The routes of the web page: forms and links, no scripts.

The API key of a visitor is kept in a cookie that no script can read and no other site can send (`SameSite=Strict`); a
form is taken only from this site's own pages.  What the page does, it does by the API's own handlers.
"""

import json
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jinja2
import msgspec
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from worker.batches.api.auth import KeyCheck
from worker.batches.api.batches import BatchRoutes
from worker.batches.api.errors import ApiError, no_batch
from worker.batches.api.files import FileRoutes
from worker.batches.api.replies import read_after, read_body
from worker.batches.api.schemas import WINDOW, CreateBatch
from worker.batches.api.storage import Storage
from worker.batches.ids import BATCH, is_id
from worker.batches.page.view import MAX_FAULTS, view_of
from worker.batches.states import FINAL, Status
from worker.batches.store import StoreUnavailableError
from worker.errors import PayloadError

COOKIE = "batches_key"
COOKIE_S = 12 * 3_600
REFRESH_S = 3
"""Between two looks at a batch that has not ended."""
PAGE_SIZE = 25
FIRST_LINE_BYTES = 1_000_000
"""The url of the first line must stand in so much of a file."""
SECURITY = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cache-control": "no-store",
}

Handler = Callable[[Request, str], Awaitable[Response]]
_templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    undefined=jinja2.StrictUndefined,
)


class _FirstLine(msgspec.Struct):
    url: str


class PageRoutes:
    """
    Handlers of the page.

    Args:
        storage: Store and files.
        files: The API's.
        batches: The API's.
        keys: Find the tenant of a visitor.
        needs_key: Whether visitors log in.
    """

    def __init__(
        self, storage: Storage, files: FileRoutes, batches: BatchRoutes, keys: KeyCheck, *, needs_key: bool
    ) -> None:
        self._storage = storage
        self._files = files
        self._batches = batches
        self._keys = keys
        self._needs_key = needs_key

    def routes(self) -> list[BaseRoute]:
        """Return what answers each path."""
        return [
            Route("/", _home),
            Route("/batches", self._guarded(self._list)),
            Route("/batches/login", self._login, methods=["GET", "POST"]),
            Route("/batches/logout", _logout, methods=["POST"]),
            Route("/batches/upload", self._guarded(self._upload), methods=["POST"]),
            Route("/batches/files/{file_id}", self._guarded(self._files.content)),
            Route("/batches/{batch_id}", self._guarded(self._show)),
            Route("/batches/{batch_id}/cancel", self._guarded(self._cancel), methods=["POST"]),
            Route("/batches/{batch_id}/retry", self._guarded(self._retry), methods=["POST"]),
        ]

    def _guarded(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        """Return a handler behind the login, whose errors are pages."""

        async def answer(request: Request) -> Response:
            if request.method == "POST" and not _is_own(request):
                return self._page("error.html", HTTPStatus.FORBIDDEN, message="This form was sent by another site.",
                                  back="/batches")  # fmt: skip
            try:
                tenant = await self._keys.tenant_of(f"Bearer {request.cookies.get(COOKIE, '')}")
                request.state.tenant = tenant
                return await handler(request, tenant)
            except ApiError as error:
                if error.status == HTTPStatus.UNAUTHORIZED:
                    return RedirectResponse("/batches/login", HTTPStatus.SEE_OTHER)
                return self._page("error.html", error.status, message=error.message, back="/batches")
            except (StoreUnavailableError, PayloadError):
                text = "The database or the storage of files is not available. Nothing is lost; try again."
                return self._page("error.html", HTTPStatus.SERVICE_UNAVAILABLE, message=text, back="/batches")

        return answer

    def _page(self, name: str, status: int = HTTPStatus.OK, *, refresh_s: int | None = None, **values: Any) -> Response:
        text = _templates.get_template(name).render(
            refresh_s=refresh_s, can_leave=self._needs_key and name != "login.html", **values
        )
        return Response(text.encode("utf-8"), status, headers={"content-type": "text/html; charset=utf-8", **SECURITY})

    async def _list(self, request: Request, tenant: str) -> Response:
        after = read_after(request, BATCH)
        store = self._storage.store
        page = await self._storage.call(lambda: store.list_batches(tenant, after=after, limit=PAGE_SIZE))
        batches = [view_of(batch) for batch in page.items]
        is_moving = any(not batch.is_final for batch in batches)
        next_after = batches[-1].id if page.has_more else None
        return self._page(
            "list.html", batches=batches, next_after=next_after, refresh_s=REFRESH_S if is_moving else None
        )

    async def _show(self, request: Request, tenant: str) -> Response:
        batch_id = request.path_params["batch_id"]
        store, call = self._storage.store, self._storage.call
        batch = await call(lambda: store.get_batch(tenant, batch_id)) if is_id(batch_id, BATCH) else None
        if batch is None:
            raise no_batch(batch_id)
        failures, faults, all_faults = batch.failures, [], 0
        if batch.status is Status.FAILED:
            faults = await call(lambda: store.errors_of(batch.id, limit=MAX_FAULTS))
            all_faults = await call(lambda: store.count_errors(batch.id))
        elif failures is None and batch.failed:
            failures = await call(lambda: store.failures_of(batch.id))
        view = view_of(batch, failures=failures or [], faults=faults, all_faults=all_faults)
        return self._page("batch.html", batch=view, refresh_s=None if batch.status in FINAL else REFRESH_S)

    async def _upload(self, request: Request, tenant: str) -> Response:
        uploaded = await self._files.create(request, tenant)
        file_id = json.loads(bytes(uploaded.body))["id"]
        wanted = CreateBatch(
            input_file_id=file_id, endpoint=await self._endpoint_of(tenant, file_id), completion_window=WINDOW
        )
        batch = await self._batches.create_wanted(wanted, tenant)
        return RedirectResponse(f"/batches/{batch.id}", HTTPStatus.SEE_OTHER)

    async def _endpoint_of(self, tenant: str, file_id: str) -> str:
        """Return the url of a file's first line; the file is deleted when it has none that is served."""
        store, objects = self._storage.store, self._storage.objects
        file = await self._storage.call(lambda: store.get_file(tenant, file_id))
        assert file is not None
        data = b"".join([chunk async for chunk in objects.read(file.object_key, length=FIRST_LINE_BYTES)])
        try:
            url = msgspec.json.decode(
                data.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")[0], type=_FirstLine
            ).url
            self._batches.check_endpoint(url)
        except (msgspec.DecodeError, ApiError) as error:
            await self._storage.call(lambda: store.delete_file(tenant, file_id))
            if isinstance(error, ApiError):
                raise
            raise ApiError(HTTPStatus.BAD_REQUEST, "The first line of the file has no url.") from None
        return url

    async def _cancel(self, request: Request, tenant: str) -> Response:
        await self._batches.cancel(request, tenant)
        return RedirectResponse(f"/batches/{request.path_params['batch_id']}", HTTPStatus.SEE_OTHER)

    async def _retry(self, request: Request, tenant: str) -> Response:
        made = await self._batches.retry(request, tenant)
        return RedirectResponse(f"/batches/{json.loads(bytes(made.body))['id']}", HTTPStatus.SEE_OTHER)

    async def _login(self, request: Request) -> Response:
        if request.method == "GET":
            return self._page("login.html", message="")
        if not _is_own(request):
            return self._page("login.html", HTTPStatus.FORBIDDEN, message="This form was sent by another site.")
        key = _field(await read_body(request), "key")
        try:
            await self._keys.tenant_of(f"Bearer {key}")
        except ApiError:
            return self._page("login.html", HTTPStatus.UNAUTHORIZED, message="This key is not known.")
        answer = RedirectResponse("/batches", HTTPStatus.SEE_OTHER)
        answer.set_cookie(
            COOKIE,
            key,
            max_age=COOKIE_S,
            path="/batches",
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return answer


async def _home(_: Request) -> Response:
    return RedirectResponse("/batches", HTTPStatus.SEE_OTHER)


async def _logout(_: Request) -> Response:
    answer = RedirectResponse("/batches/login", HTTPStatus.SEE_OTHER)
    answer.delete_cookie(COOKIE, path="/batches")
    return answer


def _is_own(request: Request) -> bool:
    """Whether a form comes from a page of this site, as far as the browser says where it comes from."""
    if request.headers.get("sec-fetch-site") in ("cross-site", "same-site"):
        return False
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == request.headers.get("host")


def _field(body: bytes, name: str) -> str:
    """Return a field of a form that was sent as `application/x-www-form-urlencoded`; empty when it is not there."""
    return parse_qs(body.decode("ascii", "replace")).get(name, [""])[0].strip()
