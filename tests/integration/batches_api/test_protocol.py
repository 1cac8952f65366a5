"""What the API answers to anything that reaches its port: always JSON in OpenAI's shape, always with a request id."""

import json
import socket
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from structlog.testing import capture_logs

from tests.support.batches_api import CHAT, ApiThread, error, jsonl, running_api
from tests.support.waiting import until
from worker.batches.api import server
from worker.batches.api.openapi import OPERATIONS
from worker.batches.api.replies import MAX_JSON_BYTES
from worker.emulators.openai import SimBackendThread, SimOptions


def exchange(api: ApiThread, *pieces: bytes) -> tuple[int, dict[str, Any]]:
    """Send bytes on a connection of their own; return status and error of the reply, after which it is closed."""
    with socket.create_connection(("127.0.0.1", api.port), timeout=10) as connection:
        for piece in pieces:
            try:
                connection.sendall(piece)
            except OSError:  # refused meanwhile
                break
        received = b""
        try:
            while chunk := connection.recv(65_536):
                received += chunk
        except ConnectionResetError:  # closed while more was on its way
            pass
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"x-request-id: req_" in head
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/file", "/v1/files/", "/v1/batches/", "/v2/files", "/v1//files"])
def test_an_unknown_route_is_not_found(http: httpx.Client, path: str) -> None:
    """And is repeated in the message."""
    found = error(http.get(path), 404)
    assert found["type"] == "invalid_request_error"
    assert "Invalid URL (GET" in found["message"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/files", "GET, HEAD, POST"),
        ("PATCH", "/v1/batches/batch_1", "GET, HEAD"),
        ("DELETE", "/v1/batches/batch_1", "GET, HEAD"),
        ("GET", "/v1/batches/batch_1/cancel", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("OPTIONS", "/v1/files", "GET, HEAD, POST"),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(http: httpx.Client, method: str, path: str, allowed: str) -> None:
    """A 405 with `Allow`."""
    reply = http.request(method, path)
    assert error(reply, 405)["type"] == "invalid_request_error"
    assert reply.headers["allow"] == allowed


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b"{'a': 1}",
        b'{"a": NaN}',
        b'\xff{"a": 1}',
        b'{"a": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"input_file_id": "\\ud800"}',
    ],
    ids=[
        "empty",
        "cut",
        "array",
        "string",
        "null",
        "quotes",
        "nan",
        "utf8",
        "utf8-inside",
        "deep",
        "deeper",
        "surrogate",
    ],
)
def test_a_body_that_is_no_json_object_is_a_400(http: httpx.Client, body: bytes) -> None:
    """Not a 422, not a 500; the connection goes on."""
    found = error(http.post("/v1/batches", content=body), 400)
    assert found["type"] == "invalid_request_error"
    assert http.get("/v1/batches").status_code == 200


def test_a_long_body_is_refused(http: httpx.Client) -> None:
    """A 413 after the first megabyte."""
    found = error(http.post("/v1/batches", content=b" " * (MAX_JSON_BYTES + 1)), 413)
    assert found["code"] == "request_too_large"


def test_a_number_of_many_digits_is_no_fault_of_ours(http: httpx.Client) -> None:
    """Python refuses to convert more than 4,300 digits."""
    body = b'{"input_file_id": "a", "endpoint": "%s", "completion_window": "24h", "output_expires_after": %s}'
    number = b'{"anchor": "created_at", "seconds": ' + b"9" * 10_000 + b"}"
    error(http.post("/v1/batches", content=body % (CHAT.encode(), number)), 400)


@pytest.mark.parametrize("size", [70_000, 300_000, 3_000_000])
def test_headers_that_are_too_large_are_a_431(api: ApiThread, size: int) -> None:
    """In one piece or in many; the connection is closed."""
    head = b"GET /v1/files HTTP/1.1\r\nHost: x\r\nX-Filler: "
    status, found = exchange(api, head + b"x" * size + b"\r\n\r\n")
    assert (status, found["code"]) == (431, "headers_too_large")


def test_headers_without_end_are_refused(api: ApiThread) -> None:
    """One header after another, and never the empty line."""
    line = b"X-Filler: " + b"x" * 1000 + b"\r\n"
    status, _ = exchange(api, b"GET /v1/files HTTP/1.1\r\nHost: x\r\n", *[line] * 200)
    assert status == 431


def test_a_long_url_is_refused(api: ApiThread) -> None:
    """It counts as the headers do."""
    status, _ = exchange(api, b"GET /v1/files?after=" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    assert status == 431


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET /\xc3\xa4 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET /v1/files HTTP/1.1\r\nHost : x\r\n\r\n",
    ],
    ids=["words", "version", "tls", "path", "two-lengths", "negative", "smuggling", "space"],
)
def test_bytes_that_are_no_http_get_a_json_error(api: ApiThread, data: bytes) -> None:
    """A 400, and the connection is closed."""
    status, found = exchange(api, data)
    assert (status, found["type"]) == (400, "invalid_request_error")


def test_headers_that_do_not_come_end_the_connection(api: ApiThread, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an empty connection nor half a request stays for ever."""
    monkeypatch.setattr(server, "HEADERS_TIMEOUT_S", 0.2)
    for start in (b"", b"GET /v1/files HTTP/1.1\r\nHost:"):
        with socket.create_connection(("127.0.0.1", api.port), timeout=10) as connection:
            connection.sendall(start)
            assert connection.recv(100) == b""


def test_a_slow_body_is_no_slow_header(api: ApiThread, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time for the headers ends with them; an idle connection lives on."""
    monkeypatch.setattr(server, "HEADERS_TIMEOUT_S", 0.2)
    with socket.create_connection(("127.0.0.1", api.port), timeout=10) as connection:
        for _ in range(2):
            connection.sendall(b"POST /v1/batches HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{")
            connection.settimeout(0.5)
            with pytest.raises(TimeoutError):
                connection.recv(1)
            connection.settimeout(10)
            connection.sendall(b"}")
            received = b""
            while not received.endswith(b"}}"):
                received += connection.recv(65_536)
            assert received.startswith(b"HTTP/1.1 400 ")


def test_idle_connections_stay_open_longer_than_pollers_sleep() -> None:
    """75 s, as the contract says."""
    assert server.KEEP_ALIVE_S == 75


def test_a_connection_serves_many_requests_whatever_they_are(api: ApiThread) -> None:
    """An error does not close it: the next request goes over the same one."""
    with api.http(limits=httpx.Limits(max_connections=1)) as http:
        ports = set()
        for path in ["/v1/files", "/nowhere", "/v1/batches/batch_1", "/v1/files?limit=x"] * 3:
            reply = http.get(path)
            ports.add(reply.extensions["network_stream"].get_extra_info("client_addr"))
        reply = http.post("/v1/files", content=b"x" * 500_000)
        assert reply.status_code == 400
        ports.add(reply.extensions["network_stream"].get_extra_info("client_addr"))
    assert len(ports) == 1


def test_two_requests_in_one_packet_are_both_answered(api: ApiThread) -> None:
    """In their order."""
    request = b"GET /v1/batches/batch_%d HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.create_connection(("127.0.0.1", api.port), timeout=10) as connection:
        connection.sendall(request % 1 + request % 2)
        received = b""
        while received.count(b"No batch found") < 2:
            received += connection.recv(65_536)
    assert received.index(b"batch_1") < received.index(b"batch_2")


def test_a_fault_of_ours_is_a_500_that_the_log_explains(api: ApiThread, http: httpx.Client) -> None:
    """The reply has the request's id and nothing of the fault."""

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret detail")

    api.store.list_batches = broken  # type: ignore[method-assign,assignment]
    with capture_logs() as lines:
        reply = http.get("/v1/batches")
        found = error(reply, 500)
        until(lambda: any(line["event"] == "batch_api_request" for line in lines))
    assert found["type"] == "server_error"
    assert reply.headers["x-request-id"] in found["message"]
    assert "secret" not in reply.text
    (line,) = [line for line in lines if line["event"] == "batch_api_failed"]
    assert line["request_id"] == reply.headers["x-request-id"]
    assert line["log_level"] == "error"


def test_every_reply_has_an_id_of_its_own_and_one_line(http: httpx.Client) -> None:
    """The line has the route without the ids in it."""
    with capture_logs() as lines:
        replies = [http.get("/v1/files"), http.get("/v1/batches/batch_1"), http.get("/x")]
        until(lambda: len(lines) == 3)
    assert [line["request_id"] for line in lines] == [reply.headers["x-request-id"] for reply in replies]
    assert len({line["request_id"] for line in lines}) == 3
    assert [(line["route"], line["status_code"]) for line in lines] == [
        ("/v1/files", 200),
        ("/v1/batches/{batch_id}", 404),
        ("other", 404),
    ]


def test_the_document_describes_what_is_served(api: ApiThread, http: httpx.Client) -> None:
    """Every route is in it, real replies fit its schemas, and its page needs nothing from elsewhere."""
    document = http.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert described == {(each.method, each.path) for each in OPERATIONS}
    with api.client() as client:
        file_id = client.files.create(file=jsonl(1), purpose="batch").id
        batch_id = client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h").id
    for path, name in [
        (f"/v1/files/{file_id}", "FileObject"),
        ("/v1/files", "FileList"),
        (f"/v1/batches/{batch_id}", "BatchObject"),
        ("/v1/batches", "BatchList"),
        ("/v1/batches/x", "ErrorObject"),
    ]:
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        jsonschema.validate(http.get(path).json(), schema, cls=jsonschema.Draft202012Validator)
    page = http.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "/v1/batches/{batch_id}/retry" in page.text
    assert "src=" not in page.text


def test_models_are_the_backends_and_asked_for_once(tmp_path: Path) -> None:
    """Passed through as they are; one that is not in the list is not found."""
    with (
        SimBackendThread(SimOptions.of(models="llama,org/mistral")) as backend,
        running_api(tmp_path, backend_url=backend.base_url) as api,
        api.client() as client,
    ):
        for _ in range(5):
            assert {model.id for model in client.models.list()} == {"llama", "org/mistral"}
        assert client.models.retrieve("org/mistral").id == "org/mistral"
        with pytest.raises(openai.NotFoundError, match="gpt"):
            client.models.retrieve("gpt")
        assert backend.snapshot()["by_path"]["/v1/models"] == 1


def test_models_of_a_backend_that_is_away_are_a_503(tmp_path: Path) -> None:
    """With a hint; nothing else is concerned."""
    with running_api(tmp_path, backend_url="http://127.0.0.1:1") as api, api.http() as http:
        reply = http.get("/v1/models")
        assert error(reply, 503)["type"] == "server_error"
        assert int(reply.headers["retry-after"]) <= 120
        assert http.get("/v1/batches").status_code == 200


def test_without_a_backend_the_list_is_empty(http: httpx.Client) -> None:
    """Any model may be asked for then."""
    assert http.get("/v1/models").json() == {"object": "list", "data": []}
