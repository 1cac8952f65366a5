"""
`/sim/`: how a rehearsal is directed and observed over HTTP.

Served by both listeners; only the second stays reachable while the first refuses connections.
"""

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web
from aiohttp.web_request import BaseRequest

from worker.emulators.openai.control import ControlError

if TYPE_CHECKING:
    from worker.emulators.openai.server import SimBackend

PREFIX = "/sim/"
_METHODS: Mapping[str, tuple[str, ...]] = {
    "/sim/control": ("GET", "POST"),
    "/sim/stats": ("GET",),
    "/sim/reset": ("POST",),
}
RESET_PARTS = ("stats", "behaviours", "settings")


def _json(value: Any, status: int = 200) -> web.Response:
    body = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return web.Response(text=body, status=status, content_type="application/json")


def _error(status: int, message: str) -> web.Response:
    return _json({"error": {"message": message, "type": "control_error", "param": None, "code": None}}, status)


async def _document(request: BaseRequest) -> Any:
    """Return the JSON of the body, None for an empty one; raises ControlError."""
    data = await request.read()
    if not data.strip():
        return None
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ControlError(f"the body is not JSON: {error}") from None


def reset_parts(document: object) -> set[str]:
    """
    Return what a reset concerns: everything, or the list under `only`.

    Raises:
        ControlError: other keys, or unknown parts.
    """
    if document is None:
        return set(RESET_PARTS)
    if not isinstance(document, Mapping) or (unknown := sorted(document.keys() - {"only"})):
        given = document if not isinstance(document, Mapping) else ", ".join(unknown)
        raise ControlError(f'a reset takes nothing or {{"only": [...]}}; unknown: {given!r}')
    parts = document.get("only", list(RESET_PARTS))
    if not isinstance(parts, list) or not parts or not set(map(str, parts)) <= set(RESET_PARTS):
        raise ControlError(f"only: must be a list of {', '.join(RESET_PARTS)}, not {parts!r}")
    return set(parts)


async def handle_control(backend: "SimBackend", request: BaseRequest) -> web.Response:
    """
    Answer one request under `/sim/`.

    Cancellation: a control document is taken in wholly or not at all; the listener may follow a moment later.
    """
    path = request.path
    methods = _METHODS.get(path)
    if methods is None:
        return _error(HTTPStatus.NOT_FOUND, f"there are {', '.join(_METHODS)}")
    if request.method not in methods:
        return _error(HTTPStatus.METHOD_NOT_ALLOWED, f"{path} takes {' or '.join(methods)}")
    try:
        if path == "/sim/stats":
            return _json(backend.snapshot(series=request.query.get("series", "0") not in {"0", "", "false"}))
        if path == "/sim/reset":
            await backend.reset(reset_parts(await _document(request)))
        elif request.method == "POST":
            await backend.control(await _document(request), spared=request.protocol)
    except ControlError as error:
        return _error(HTTPStatus.BAD_REQUEST, str(error))
    response = _json(backend.state())
    if not backend.is_listening:
        response.force_close()
    return response
