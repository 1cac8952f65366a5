"""
The simulated server: two listeners, the control API below `/sim/`, one lifecycle.

`SimBackend` belongs to the event loop it was started on; `SimBackendThread` gives it a loop of its own.  Both listeners
serve `/sim/`; only the second stays reachable while the first refuses connections.
"""

import asyncio
import json
import time
from collections.abc import Callable, Collection, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Self

import msgspec
from aiohttp import web
from aiohttp.web_request import BaseRequest

from worker.emulators.openai.control import ControlError, Controls
from worker.emulators.openai.dataplane import DataPlane
from worker.emulators.openai.options import SimOptions, as_json
from worker.emulators.openai.serving import Slots
from worker.emulators.openai.stats import Stats
from worker.emulators.openai.transport import Listener
from worker.emulators.thread import EmulatorThread

if TYPE_CHECKING:
    from aiohttp.abc import AbstractStreamWriter
    from aiohttp.http_parser import RawRequestMessage
    from aiohttp.streams import StreamReader
    from aiohttp.web_protocol import RequestHandler


MAX_REQUEST_BYTES = 64 << 20
"""Six times the largest message Pub/Sub carries; a larger body gets a 413."""
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

    Cancellation: a control document is applied wholly or not at all; the listener may change a moment later.
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
            await backend.control(await _document(request), kept=request.protocol)
    except ControlError as error:
        return _error(HTTPStatus.BAD_REQUEST, str(error))
    response = _json(backend.state())
    if not backend.is_listening:
        response.force_close()
    return response


class SimBackend:
    """
    A simulated OpenAI-compatible server.

    Use it as an async context manager, or call `start` and `stop`.
    """

    def __init__(self, options: SimOptions | None = None, host: str = "127.0.0.1", port: int = 0) -> None:
        """
        Prepare a server; nothing listens yet.

        Args:
            options: How it behaves; None is fast and faultless.
            host: Address to listen on.
            port: Port to listen on; 0 is any free one.
        """
        self.options = options or SimOptions()
        self._host = host
        self._port = port
        self._controls = Controls(self.options, time.monotonic)
        self.stats = Stats()
        """Live counters; `snapshot` gives them as JSON."""
        self._slots = Slots(self.options.max_concurrency)
        self._data: Listener | None = None
        self._control: Listener | None = None
        self._plane: DataPlane | None = None
        self._applying = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """
        Listen on both ports.

        Raises:
            OSError: a port is taken or the address is not this machine's.

        Cancellation: call `stop`.
        """
        self._plane = DataPlane(self._controls, self.stats, self._slots)
        self._data = Listener(self._server(self._route), self._host, self._port)
        await self._data.open()
        wanted = self.options.control_port
        port = wanted if wanted is not None else (self._port + 1 if self._port else 0)
        try:
            self._control = Listener(self._server(self._route_control), self._host, port)
            try:
                await self._control.open()
            except (OSError, OverflowError):
                if wanted is not None:
                    raise
                self._control = Listener(self._server(self._route_control), self._host, 0)
                await self._control.open()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """
        Stop listening and reset every connection; may be called twice.

        Cancellation: connections may stay open until the process ends.
        """
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.gather(*self._tasks)
        if self._plane is not None:
            self._plane.drops += 1
        for listener in (self._data, self._control):
            if listener is not None:
                await listener.aclose()
        self._data = self._control = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def _server(self, handler: Callable[[BaseRequest], Any]) -> web.Server:
        def make_request(
            message: "RawRequestMessage",
            payload: "StreamReader",
            protocol: "RequestHandler",
            writer: "AbstractStreamWriter",
            task: "asyncio.Task[None]",
        ) -> BaseRequest:
            return BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=MAX_REQUEST_BYTES)

        loop = asyncio.get_running_loop()
        return web.Server(handler, request_factory=make_request, handler_cancellation=True, access_log=None)

    async def _route(self, request: BaseRequest) -> web.StreamResponse:
        assert self._plane is not None
        if request.path.startswith(PREFIX):
            return await handle_control(self, request)
        return await self._plane.handle(request)

    async def _route_control(self, request: BaseRequest) -> web.StreamResponse:
        return await handle_control(self, request)

    def _url(self, listener: Listener | None) -> str:
        if listener is None:
            raise RuntimeError("the simulated server is not running")
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{listener.port}"

    @property
    def base_url(self) -> str:
        """URL of the server, without `/v1`; raises RuntimeError when it is not running."""
        return self._url(self._data)

    @property
    def control_url(self) -> str:
        """URL below which `/sim/control`, `/sim/stats` and `/sim/reset` always answer; raises as `base_url`."""
        return self._url(self._control)

    @property
    def is_listening(self) -> bool:
        """Whether the server accepts connections; False while a `refuse` is in force."""
        return self._data is not None and self._data.is_open

    def snapshot(self, *, series: bool = False) -> dict[str, Any]:
        """Return what `GET /sim/stats` answers."""
        service = {"in_service": self._slots.in_service, "waiting": self._slots.waiting}
        counted = {**self.stats.snapshot(series=series), **service, "listening": self.is_listening}
        engine = self._plane.engine if self._plane is not None else None
        if engine is not None:
            counted["engine"] = {
                "running": engine.running,
                "waiting": engine.waiting,
                "kv_usage": round(engine.kv_usage, 4),
                "preemptions": engine.preemptions,
            }
        return counted

    def state(self) -> dict[str, Any]:
        """Return what `GET /sim/control` answers: behaviours, settings and whether it listens."""
        now_s = time.monotonic()
        return {
            "behaviours": [behaviour.as_json(now_s) for behaviour in self._controls.behaviours],
            "settings": as_json(self._controls.options),
            "listening": self.is_listening,
        }

    async def control(self, document: object, *, kept: "RequestHandler | None" = None) -> dict[str, Any]:
        """
        Apply a control document, as `POST /sim/control` does, and return the state after it.

        When it returns, a `refuse` without `after_s` is in force.

        Args:
            document: The JSON, as Python values.
            kept: The connection that a refusal does not reset, because the answer goes out on it.

        Raises:
            ControlError: it is not understood; nothing was changed.

        Cancellation: the behaviours are set, the listener may not have changed.
        """
        self._controls.apply(document)
        await self._apply_controls(kept)
        return self.state()

    async def reset(self, parts: Collection[str] = RESET_PARTS) -> None:
        """
        Go back to the beginning: zero the counters, forget the behaviours, restore the settings; hanging requests end.

        Args:
            parts: Which of `stats`, `behaviours`, `settings`.

        Cancellation: the listener may not have changed.
        """
        self._controls.reset(behaviours="behaviours" in parts, settings="settings" in parts)
        if "stats" in parts:
            self.stats.reset()
            if self._plane is not None:
                self._plane.reset_counters()
        if "behaviours" in parts and self._plane is not None:
            self._plane.end_hangs.set()
            self._plane.end_hangs = asyncio.Event()
        await self._apply_controls()

    async def _apply_controls(self, kept: "RequestHandler | None" = None) -> None:
        """Make the slots and the listener agree with the controls, now and when the controls change next."""
        async with self._applying:
            self._slots.set_limit(self._controls.options.max_concurrency)
            refusal, change_in_s = self._controls.refusal()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._data is None:
                return
            if change_in_s is not None:
                self._timer = asyncio.get_running_loop().call_later(change_in_s, self._apply_controls_later)
            if refusal is None:
                await self._data.open()
            elif self._data.is_open:
                refusal.hits += 1
                await self._data.refuse()
                if refusal.params["connections"] == "drop" and self._plane is not None:
                    self._plane.drops += 1
                    self._data.drop(kept)

    def _apply_controls_later(self) -> None:
        task = asyncio.get_running_loop().create_task(self._apply_controls())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def serve(
    options: SimOptions,
    host: str = "127.0.0.1",
    port: int = 8000,
    on_ready: Callable[[SimBackend], None] | None = None,
) -> None:
    """
    Run a simulated server until cancelled.

    Args:
        options: How it behaves.
        host: Address to listen on.
        port: Port to listen on; 0 is any free one.
        on_ready: Called once both ports listen.

    Raises:
        OSError: a port is taken or the address is not this machine's; permanent.

    Cancellation: the normal end; every connection is reset.
    """
    async with SimBackend(options, host, port) as backend:
        if on_ready is not None:
            on_ready(backend)
        await asyncio.Event().wait()


class SimBackendThread(EmulatorThread):
    """
    A `SimBackend` in its own thread.  Use it as `with SimBackendThread() as sim`, or call `start` and `stop`.

    Threads: every method may be called from any thread but the server's own.
    """

    def __init__(self, options: SimOptions | None = None, host: str = "127.0.0.1", port: int = 0) -> None:
        """Take the arguments of `SimBackend`; nothing runs yet."""
        super().__init__("simbackend")
        self._backend = SimBackend(options, host, port)

    @property
    def base_url(self) -> str:
        """As `SimBackend.base_url`."""
        return self._backend.base_url

    @property
    def control_url(self) -> str:
        """As `SimBackend.control_url`."""
        return self._backend.control_url

    def control(self, document: object) -> dict[str, Any]:
        """Set behaviours and settings as `SimBackend.control` does."""
        return self._call(lambda: self._backend.control(document))

    def reset(self, parts: Collection[str] = RESET_PARTS) -> None:
        """Zero the counters and restore the settings as `SimBackend.reset` does."""
        self._call(lambda: self._backend.reset(parts))

    def snapshot(self, *, series: bool = False) -> dict[str, Any]:
        """Return the counters as `SimBackend.snapshot` does."""

        async def read() -> dict[str, Any]:
            return self._backend.snapshot(series=series)

        return self._call(read)

    async def _open(self) -> None:
        await self._backend.start()

    async def _close(self) -> None:
        await self._backend.stop()
