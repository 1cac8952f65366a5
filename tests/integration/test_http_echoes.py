"""A backend that repeats the credentials it was sent: none of them is passed on or logged."""

import pytest

from tests.support.raw_http import Connection, Open, answer, raw_server
from worker.errors import BackendError
from worker.policy.engine import ErrorPolicy
from worker.policy.model import ErrorEvent
from worker.ports import AttemptResult, BackendRequest
from worker.wire.body import RequestBody

KEY, HEADER = "sk-operator-123", "tenant-secret-456789"
BOTH = f"{KEY} {HEADER}".encode()
RESPONSES = {
    "a field of an error": answer(b'{"error":{"type":"expired_key","param":"%s"}}' % BOTH, status="400 Bad"),
    "a message": answer(b'{"error":{"message":"bad key Bearer %s"}}' % BOTH, status="403 No"),
    "a page under 200": answer(b"<html>%s" % BOTH),
    "a good answer": answer(b'{"choices":[{"message":{"content":"%s"}}]}' % BOTH),
    "a header": answer(b"{}", f"X-Request-Id: {KEY}", f"X-Echo: {HEADER}", status="500 Oh"),
    "what is no HTTP": BOTH + b"\r\n\r\n",
    "a bad header": b"HTTP/1.1 200 OK\r\n%s\r\n\r\n" % BOTH,
    "an event": b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    b'data: {"error": {"message": "%s"}}\n\n' % BOTH,
}


@pytest.mark.parametrize("response", RESPONSES.values(), ids=RESPONSES)
async def test_no_credential_is_in_what_an_attempt_leaves(response: bytes, open_backend: Open) -> None:
    """Body, headers, request id, partial answer and the words of an exception."""

    async def script(connection: Connection) -> None:
        await connection.read_request()
        await connection.send(response)

    result, detail = AttemptResult(), ""
    async with raw_server(script) as server:
        backend = open_backend(server.url, api_key=KEY, headers={"x-tenant": HEADER})
        request = BackendRequest(path="/v1/chat/completions", body=RequestBody(b'{"model":"m","stream":true}'))
        try:
            await backend.invoke(request, result)
        except BackendError as error:
            detail = f"{error} {error.detail}"
    left = f"{result.body!r} {result.headers} {result.backend_request_id} {result.partial!r} {detail}"
    assert KEY not in left
    assert HEADER not in left
    assert "[redacted]" in left


async def test_a_redirect_names_its_place(open_backend: Open) -> None:
    """A base URL with the wrong scheme: the place it should name is in the words for the log."""

    async def script(connection: Connection) -> None:
        await connection.read_request()
        await connection.send(answer(b"", "Location: https://h/v1/x", status="308 Permanent Redirect"))

    result = AttemptResult()
    async with raw_server(script) as server:
        await open_backend(server.url).invoke(BackendRequest(path="/v1/x", body=RequestBody(b"{}")), result)
    event = ErrorEvent(backend="r", path="/v1/x", phase=result.phase, status=result.status, headers=result.headers)
    assert "https://h/v1/x" in ErrorPolicy().decide(event).message
