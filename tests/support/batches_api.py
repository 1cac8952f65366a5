"""The batches API on a port of this machine, in a thread of its own, with a database and a folder for files."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai

from worker.batches.api.app import build_app
from worker.batches.api.server import ApiServer
from worker.batches.api.storage import Storage
from worker.batches.migrate import migrate
from worker.batches.models import Models
from worker.batches.objects import open_objects
from worker.batches.store import Store, open_engine
from worker.settings.schema import BatchesSettings, PayloadSettings, RouteSettings


class ApiThread:
    """
    The API alone: nothing validates or runs its batches.

    Args:
        folder: For database and files.
        backend_url: Whose models are listed; `None`: there is no backend.
        settings: Of the section `batches`.
    """

    def __init__(self, folder: Path, *, backend_url: str | None = None, **settings: Any) -> None:
        self.settings = BatchesSettings(**{"auth": "none", **settings})
        self.engine = open_engine(f"sqlite:///{folder / 'batches.db'}")
        migrate(self.engine)
        self.store = Store(self.engine)
        self.objects = open_objects(str(folder / "files"), PayloadSettings())
        self.storage = Storage(self.store, self.objects)
        self.route = None if backend_url is None else RouteSettings(name="default", base_url=backend_url)
        self.port = 0
        self.failure: BaseException | None = None
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: ApiServer | None = None
        self._thread = threading.Thread(target=self._run, name="batches-api", daemon=True)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def client(self, **options: Any) -> openai.OpenAI:
        """Return the official client, which checks every reply strictly."""
        return openai.OpenAI(
            **{"base_url": self.base_url, "api_key": "none", "max_retries": 0, "_strict_response_validation": True}
            | options
        )

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", **{"timeout": 30} | options)

    def start(self) -> None:
        self._thread.start()
        self._ready.wait()
        if self.failure is not None:
            raise self.failure

    def stop(self) -> None:
        loop, server = self._loop, self._server
        if loop is not None and server is not None and self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(server.drain(5), loop)
        self._thread.join(20)
        assert not self._thread.is_alive()
        self.store.close()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as failure:  # noqa: BLE001 - raised in the thread that called `start`
            self.failure = failure
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        models = Models(self.route, time.monotonic)
        self._server = ApiServer(build_app(self.storage, models, self.settings), "127.0.0.1", 0)
        self._loop, self.port = asyncio.get_running_loop(), self._server.port
        self._ready.set()
        try:
            await self._server.run()
        finally:
            await models.aclose()
            self.storage.close()


@contextmanager
def running_api(folder: Path, **options: Any) -> Iterator[ApiThread]:
    """Start the API; stop it at the end."""
    api = ApiThread(folder, **options)
    api.start()
    try:
        yield api
    finally:
        api.stop()


CHAT = "/v1/chat/completions"


def record(number: int, **changes: Any) -> dict[str, Any]:
    """Return a line of an input file; every number has a body of its own."""
    body = {"model": "m", "messages": [{"role": "user", "content": f"hello {number}"}]}
    return {"custom_id": f"line-{number}", "method": "POST", "url": CHAT, "body": body} | changes


def jsonl(count: int) -> bytes:
    """Return an input file with so many good lines."""
    return b"".join(json.dumps(record(number)).encode() + b"\n" for number in range(1, count + 1))


def error(reply: httpx.Response, status: int) -> dict[str, Any]:
    """Return the error of a reply, which is JSON with all of its keys and a request id."""
    assert reply.status_code == status, reply.text
    assert reply.headers["x-request-id"].startswith("req_")
    assert reply.headers["content-type"] == "application/json"
    found: dict[str, Any] = reply.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found
