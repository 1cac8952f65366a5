"""A real browser: Chromium without a window, told what to do over its own protocol (DevTools), and looked into."""

import asyncio
import base64
import itertools
import json
import re
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
START_S = 60.0
_FLAGS = (
    "--headless=new",
    "--remote-debugging-port=0",  # any free one, on 127.0.0.1
    "--no-sandbox",  # root in a container has none
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
)


def need_browser() -> str:
    """Return the program's path, or skip with the reason."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium is installed")
    return found


class Page:
    """
    One page of the browser.

    Args:
        socket: To the page's debugger.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self.complaints: list[str] = []
        """What the page wrote to the console, and what it was refused."""

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await self._next()
            if message.get("id") == number:
                assert "error" not in message, message["error"]
                return dict(message["result"])

    async def open(
        self, place: Path | str, *, width: int, height: int = 900, is_phone: bool = False, is_dark: bool = False
    ) -> None:
        """Show a file (its path is absolute) or a URL in a window of this size, and wait until it is there."""
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if is_phone else 1, "mobile": is_phone}
        await self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        await self.call("Page.navigate", url=place.as_uri() if isinstance(place, Path) else place)
        while (await self._next()).get("method") != "Page.loadEventFired":
            continue

    async def evaluate(self, script: str) -> Any:
        """Return the value of an expression of JavaScript in the page."""
        result = await self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, script: str, limit_s: float = 60.0) -> Any:
        """Return the value of an expression once it is true; a page that is just being loaded has none."""
        end = time.monotonic() + limit_s
        while True:
            with suppress(AssertionError):
                if value := await self.evaluate(script):
                    return value
            assert time.monotonic() < end, f"never true: {script}\n{await self.evaluate('document.body.innerText')}"
            await asyncio.sleep(0.1)

    async def choose_file(self, selector: str, file: Path) -> None:
        """Choose a file in the form field that the selector finds."""
        document = await self.call("DOM.getDocument")
        node = await self.call("DOM.querySelector", nodeId=document["root"]["nodeId"], selector=selector)
        await self.call("DOM.setFileInputFiles", nodeId=node["nodeId"], files=[str(file)])

    async def save_downloads(self, folder: Path) -> None:
        """Save what is downloaded in this folder."""
        await self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    async def screenshot(self) -> bytes:
        """Return a picture of the whole page, PNG."""
        taken = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(taken["data"])

    async def _next(self) -> dict[str, Any]:
        """Return the next message, and keep what the page complains about."""
        message = dict(await asyncio.wait_for(self._socket.receive_json(), 60))
        if message.get("method") == "Log.entryAdded":
            self.complaints.append(message["params"]["entry"]["text"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(message["params"]["exceptionDetails"]))
        return message


@asynccontextmanager
async def browser() -> AsyncIterator[Page]:
    """Run a browser with one page; skip where there is none."""
    program = need_browser()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            program,
            *_FLAGS,
            f"--user-data-dir={profile}",
            "about:blank",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with aiohttp.ClientSession() as session:
                address = await asyncio.wait_for(_address(process), START_S)
                async with session.get(f"http://{address}/json/list") as answer:
                    targets = await answer.json(content_type=None)
                page = next(each for each in targets if each["type"] == "page")
                async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    yield Page(socket)
        finally:
            if process.returncode is None:
                process.terminate()
            await process.communicate()


async def _address(process: asyncio.subprocess.Process) -> str:
    """Return host and port of the debugger, which the browser writes to standard error."""
    assert process.stderr is not None
    async for line in process.stderr:
        if found := re.search(rb"ws://([\d.:]+)/", line):
            return found[1].decode()
    pytest.skip("Chromium does not start here")
