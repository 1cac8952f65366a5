"""Our connections against servers that were not made for them: uvicorn, nginx and Go's net/http, where they are there."""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.raw_http import Connection, Open, answer, invoke, pause, raw_server
from worker.backends.http.transport import HttpTransport
from worker.backends.openai import HttpBackend
from worker.errors import BackendError
from worker.policy.model import Fault

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_factories=["uvloop"])]
KEPT_S = 1
"""How long every server here keeps an idle connection."""

UVICORN = """
import asyncio, json, sys
import uvicorn

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    body = b""
    while True:
        event = await receive()
        body += event.get("body", b"")
        if not event.get("more_body"):
            break
    path = scope["path"]
    if path.endswith("/stream"):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        for at in range(0, len(body), 1000):
            await send({"type": "http.response.body", "body": body[at:at + 1000], "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        return
    if path.endswith("/fails"):
        raise RuntimeError("no")
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})

uvicorn.run(app, port=int(sys.argv[1]), log_level="critical", timeout_keep_alive=1)
"""

GO = """
package main

import (
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
)

func main() {
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/refuses") {
			http.Error(w, "too large", http.StatusRequestEntityTooLarge)
			return
		}
		body, _ := io.ReadAll(r.Body)
		if strings.HasSuffix(r.URL.Path, "/fails") {
			panic(http.ErrAbortHandler)
		}
		if strings.HasSuffix(r.URL.Path, "/stream") {
			w.WriteHeader(103)
			w.Header().Set("Trailer", "X-Sum")
			for at := 0; at < len(body); at += 1000 {
				w.Write(body[at:min(at+1000, len(body))])
				w.(http.Flusher).Flush()
			}
			w.Header().Set("X-Sum", strconv.Itoa(len(body)))
			return
		}
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		w.Write(body)
	})
	server := &http.Server{Addr: "127.0.0.1:" + os.Args[1], Handler: handler, IdleTimeout: time.Second}
	server.ListenAndServe()
}
"""

NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 1024; }}
http {{
    access_log off; client_body_temp_path {folder}/a; proxy_temp_path {folder}/b; fastcgi_temp_path {folder}/c;
    uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e; keepalive_timeout 1s; client_max_body_size 20m;
    server {{
        listen 127.0.0.1:{port};
        location / {{ proxy_pass http://127.0.0.1:{behind}; proxy_http_version 1.1; proxy_set_header Connection ""; }}
        location ~ /refuses$ {{ client_max_body_size 1k; proxy_pass http://127.0.0.1:{behind}; }}
        location ~ /fails$ {{ return 444; }}
        location ~ /stream$ {{
            proxy_pass http://127.0.0.1:{behind}; proxy_http_version 1.1; proxy_buffering off;
            gzip on; gzip_proxied any; gzip_types *; gzip_min_length 1; gzip_http_version 1.0;
        }}
    }}
}}
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def running(*command: str) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
        assert process.poll() is None
    finally:
        process.kill()
        process.wait(10)


async def echo(connection: Connection) -> None:
    while True:
        _, body = await connection.read_request()
        await connection.send(answer(body))


@contextlib.asynccontextmanager
async def started(name: str, folder: Path, port: int) -> AsyncIterator[None]:
    """Run a server, or skip the test."""
    if name == "uvicorn":
        pytest.importorskip("uvicorn")
        with running(sys.executable, "-c", UVICORN, str(port)):
            yield
        return
    program = os.environ.get(name.upper()) or shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is not installed ({name.upper()}= names it)")
    if name == "go":
        (folder / "main.go").write_text(GO)
        built = await asyncio.to_thread(
            subprocess.run,
            [program, "build", "-o", str(folder / "server"), str(folder / "main.go")],
            env={**os.environ, "GO111MODULE": "off"},
            capture_output=True,
            check=False,
        )
        assert built.returncode == 0, built.stderr.decode()
        with running(str(folder / "server"), str(port)):
            yield
        return
    async with raw_server(echo) as behind:
        (folder / "nginx.conf").write_text(NGINX.format(folder=folder, port=port, behind=behind.url.rpartition(":")[2]))
        with running(program, "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf")):
            yield


@pytest.mark.timeout(240)  # Go compiles its library the first time
@pytest.mark.parametrize("name", ["uvicorn", "nginx", "go"])
async def test_a_real_server_is_understood(name: str, tmp_path: Path, open_backend: Open) -> None:
    """Echoes of every size and framing, many at once, on connections that the server closes now and then."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    async with started(name, tmp_path, port):
        backend = open_backend(url)
        small = json.dumps({"a": "b" * 100}).encode()
        await answered(backend, small)

        async def ask(number: int) -> None:
            body = json.dumps({"n": number, "x": "y" * (number * 997 % 20_000)}).encode()
            path = ("/v1/plain", "/v1/stream")[number % 2]
            assert (await invoke(backend, path, body)).body == body

        for _ in range(3):
            await asyncio.gather(*(ask(number) for number in range(64)))
        big = json.dumps({"a": "b" * 9_000_000}).encode()
        for path in ("/v1/plain", "/v1/stream"):
            assert (await invoke(backend, path, big)).body == big
        assert len(backend._pool._connections) <= 66

        # Idle for about as long as the server keeps a connection: either side may close it, none of it is a fault.
        for wait in (0.9, 0.99, 1.0, 1.01, 1.1):
            await pause(KEPT_S * wait)
            await asyncio.gather(*(ask(number) for number in range(8)))

        async with httpx.AsyncClient(transport=HttpTransport()) as client:
            for _ in range(2):
                assert (await client.head(url + "/v1/plain")).content == b""
                assert (await client.post(url + "/v1/plain", content=small)).content == small

        assert [await outcome(backend, "/v1/fails", small) for _ in range(3)] == [FAILS[name]] * 3
        if name != "uvicorn":
            assert [await outcome(backend, "/v1/refuses", b"x" * 5_000_000) for _ in range(3)] == [413] * 3
        await ask(1)


FAILS = {"uvicorn": 500, "nginx": Fault.CONNECTION_LOST, "go": Fault.CONNECTION_LOST}
"""What a handler that breaks is on the wire."""


async def outcome(backend: HttpBackend, path: str, body: bytes) -> int | str | None:
    try:
        return (await invoke(backend, path, body)).status
    except BackendError as error:
        return error.fault


async def answered(backend: HttpBackend, body: bytes) -> None:
    """Return when the server has started."""
    while await outcome(backend, "/v1/plain", body) == Fault.CONNECT:
        await pause(0.02)
