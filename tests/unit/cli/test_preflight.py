"""What a server says before a run starts."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from worker.cli import preflight
from worker.cli.preflight import PreflightError, Server, ask, describe, missing
from worker.client.check import ModelUse
from worker.settings.schema import RouteSettings

Answer = Callable[[BaseHTTPRequestHandler], None]


def reply(status: int, body: bytes = b"", **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


@contextmanager
def serving(answer: Answer) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Serve one answer to every GET; yield the address and what was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append({"path": self.path, **{name.lower(): value for name, value in self.headers.items()}})
            answer(self)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def a_route(base_url: str, **fields: Any) -> RouteSettings:
    return RouteSettings(name="default", base_url=base_url, **fields)


MODELS = json.dumps({"object": "list", "data": [{"id": "b"}, {"id": "a"}]}).encode()


@pytest.mark.parametrize("prefix", ["", "/v1", "/proxy"])
async def test_a_server_with_a_list_names_its_models(prefix: str, tmp_path: Path) -> None:
    """It is asked where requests will go, with the key and headers that they will have."""
    key = tmp_path / "key"
    key.write_text("sk-1\n")
    with serving(reply(200, MODELS)) as (address, asked):
        server = await ask(a_route(address + prefix, api_key_file=str(key), headers={"x-team": "blue"}))
    assert server.models == ("a", "b")
    assert describe(server) == f"server: {address}{prefix}; it has a, b"
    (request,) = asked
    assert request["path"] == ("/proxy/v1/models" if prefix == "/proxy" else "/v1/models")
    assert (request["authorization"], request["x-team"]) == ("Bearer sk-1", "blue")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (
            reply(401, b'{"error":{"message":"Incorrect API key"}}'),
            r"refuses the credentials \(401 .*Incorrect API key; ",
        ),
        (reply(403, b"<b>no</b>\x1b[31m"), r"refuses the credentials \(403 .*<b>no</b>.\[31m; "),
        (reply(407), "no reason given"),
        (reply(308, Location="https://elsewhere/v1/models"), "redirects to https://elsewhere/v1/models"),
    ],
    ids=["key", "html", "proxy", "redirect"],
)
async def test_a_server_that_refuses_ends_the_command(answer: Answer, told: str) -> None:
    """In the server's words, without what a terminal would obey."""
    with serving(answer) as (address, _), pytest.raises(PreflightError, match=told) as raised:
        await ask(a_route(address))
    assert "\x1b" not in str(raised.value)


@pytest.mark.parametrize(
    ("answer", "remark"),
    [
        (reply(404), ""),
        (reply(405), ""),
        (reply(501), ""),
        (reply(503, b"loading"), "has status 503: loading"),
        (reply(429), "has status 429: no reason given"),
        (reply(200, b"<html>hello"), "is no list of models; is this the API?"),
        (reply(200, b'{"data":[1]}'), "is no list of models"),
        (reply(200, b"[" * 100_000), "is no list of models"),
    ],
)
async def test_a_server_without_a_list_decides_nothing(answer: Answer, remark: str) -> None:
    """Where it has none nothing is said, where that is odd it is."""
    with serving(answer) as (address, _):
        server = await ask(a_route(address))
    assert server.models is None
    assert server.remark.endswith(remark) if not remark else remark in server.remark
    assert missing([server], {"m": ModelUse(count=1, first=1)}) == []


async def test_a_server_that_cannot_be_reached_ends_the_command() -> None:
    """Refused, no such host, no HTTP: the reason is the system's."""
    with serving(reply(200)) as (address, _):
        pass
    with pytest.raises(PreflightError, match="cannot be reached: Connection refused"):
        await ask(a_route(address))
    with pytest.raises(PreflightError, match="cannot be reached: Name or service not known"):
        await ask(a_route("http://nowhere.invalid"))
    other = serving(lambda handler: handler.wfile.write(b"SSH-2\r\n"))
    with other as (address, _), pytest.raises(PreflightError, match="cannot be reached: "):
        await ask(a_route(address))


async def test_a_slow_server_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be loading a model."""
    monkeypatch.setattr(preflight, "TIMEOUT_S", 0.05)
    release = threading.Event()

    def answer(_: BaseHTTPRequestHandler) -> None:
        release.wait()

    with serving(answer) as (address, _):
        server = await ask(a_route(address))
        release.set()
    assert "was not answered" in server.remark


def test_models_that_no_server_has_are_named() -> None:
    """With the number of their lines; a model with Ollama's tag is there without it."""
    one = Server(base_url="http://1", models=("a", "llama3:latest"))
    two = Server(base_url="http://2", models=("b",))
    use = ModelUse(count=1200, first=7)
    assert missing([one, two], {"a": use, "b": use, "llama3": use}) == []
    (warning,) = missing([one, two], {"c": use})
    assert warning == "warning: 1,200 lines ask for the model 'c' (first line 7), which is not among them"
    assert missing([one, Server(base_url="http://3", models=None)], {"c": use}) == []


def test_many_models_are_not_all_listed() -> None:
    """A router has thousands."""
    server = Server(base_url="http://r", models=tuple(f"m{n:04}" for n in range(2000)))
    assert describe(server).endswith("m0006, m0007 and 1,992 more")
    assert describe(Server(base_url="http://r", models=())).endswith("it has no models")


async def test_an_endpoint_of_sagemaker_is_not_asked() -> None:
    """It has no list of models, and nothing may be sent to it unsigned."""
    route = RouteSettings.model_validate(
        {"name": "r", "base_url": "http://127.0.0.1:9", "sagemaker": {"endpoint": "e"}}
    )
    assert describe(await ask(route)) == "server: the SageMaker endpoint e"
