"""Each way an attempt can break, provoked on a real socket, and the fault and phase it must have."""

import asyncio
import contextlib
import gc
import random
import socket
import weakref
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.support.raw_http import CHUNKED, Attempt, Connection, Script, answer, raw_server, until
from worker.backends.openai import HttpBackend
from worker.errors import BackendError
from worker.policy.model import Fault, Phase
from worker.ports import AttemptResult, BackendRequest
from worker.settings.schema import RouteSettings
from worker.wire.body import RequestBody

# Not sent


@contextlib.asynccontextmanager
async def full_backlog() -> AsyncIterator[str]:
    """An address where the kernel drops every further SYN: nothing accepts and the queue is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)  # noqa: FBT003
            with contextlib.suppress(BlockingIOError):
                filler.connect(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_refused_connection_was_not_sent(scheme: str) -> None:
    """Nothing listens."""
    attempt = Attempt(f"{scheme}://127.0.0.1:{free_port()}")
    error = await attempt.fail()
    assert attempt.outcome(error) == (Fault.CONNECT, Phase.CONNECT, None)
    assert "Connect call failed" in error.detail


async def test_an_unknown_name_was_not_sent() -> None:
    """DNS knows no such host."""
    attempt = Attempt("http://nowhere.invalid:8000")
    assert attempt.outcome(await attempt.fail()) == (Fault.CONNECT, Phase.CONNECT, None)


async def test_a_connection_that_does_not_come_about_was_not_sent() -> None:
    """Silence while connecting ends after `connect_s`, not after the attempt's own limit."""
    async with full_backlog() as url:
        attempt = Attempt(url)
        assert attempt.outcome(await attempt.fail()) == (Fault.CONNECT_TIMEOUT, Phase.CONNECT, None)
    assert attempt.seconds < 2


async def test_no_tls_was_not_sent() -> None:
    """A server that speaks something else in the handshake has seen no request."""

    async def plain(connection: Connection) -> None:
        await connection.reader.read(1)
        await connection.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        await connection.wait_closed_by_peer()

    async with raw_server(plain) as server:
        attempt = Attempt(server.url.replace("http:", "https:"))
        assert attempt.outcome(await attempt.fail()) == (Fault.CONNECT, Phase.CONNECT, None)


async def test_a_silent_tls_handshake_was_not_sent() -> None:
    """The handshake belongs to connecting and to its limit."""

    async def silent(connection: Connection) -> None:
        await connection.wait_closed_by_peer()

    async with raw_server(silent) as server:
        attempt = Attempt(server.url.replace("http:", "https:"))
        assert attempt.outcome(await attempt.fail()) == (Fault.CONNECT_TIMEOUT, Phase.CONNECT, None)


# Sent, no response


async def closes(connection: Connection) -> None:
    await connection.read_request()


async def resets(connection: Connection) -> None:
    await connection.read_request()
    connection.reset()


def says(*pieces: bytes) -> Script:
    async def script(connection: Connection) -> None:
        await connection.read_request()
        for piece in pieces:
            await connection.send(piece)

    return script


NO_RESPONSE: dict[str, Script] = {
    "closed": closes,
    "reset": resets,
    "cut in the status line": says(b"HTTP/1.1 2"),
    "cut in the headers": says(b"HTTP/1.1 200 OK\r\nX: "),
}
UNREADABLE: dict[str, Script] = {
    "no HTTP": says(b"SSH-2.0-OpenSSH\r\n"),
    "a page without headers": says(b"<html>hi</html>"),
    "a bad status": says(b"HTTP/1.1 abc OK\r\n\r\n"),
    "a bad header": says(b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n"),
    "a bad length": says(b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"),
    "two lengths": says(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}"),
    "a header too long": says(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\n\r\n"),
    "too many headers": says(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n{}"),
    "a length below zero": says(b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\n{}"),
    "a length and chunks": says(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}"),
}
BROKEN_BODIES: dict[str, Script] = {
    "an illegal chunk size": says(CHUNKED + b"zz\r\n"),
    "a chunk size below zero": says(CHUNKED + b"-1\r\n"),
    "a chunk without its line end": says(CHUNKED + b"2\r\n{}XX"),
    "an illegal later chunk": says(CHUNKED + b"1\r\n{\r\n", b"zz\r\n"),
    "no gzip": says(answer(b"no gzip", "Content-Encoding: gzip")),
    "no deflate": says(answer(b"\xff\xff\xff", "Content-Encoding: deflate")),
}


@pytest.mark.parametrize("script", NO_RESPONSE.values(), ids=NO_RESPONSE)
async def test_no_response_is_a_lost_connection(script: Script) -> None:
    """The request was sent and no usable headers came: a GPU may have worked."""
    async with raw_server(script) as server:
        attempt = Attempt(server.url)
        assert attempt.outcome(await attempt.fail()) == (Fault.CONNECTION_LOST, Phase.HEADERS, None)
        assert server.connections == 1  # nothing below the backend sends it again


@pytest.mark.parametrize("script", UNREADABLE.values(), ids=UNREADABLE)
async def test_what_is_no_response_is_unreadable_and_said_so(script: Script) -> None:
    """The server is there and speaks something else: not an outage.  The parser's words are in the detail."""
    async with raw_server(script) as server:
        attempt = Attempt(server.url)
        error = await attempt.fail()
        assert attempt.outcome(error) == (Fault.DECODING, Phase.HEADERS, None)
        assert 20 < len(error.detail) < 600
        assert "\n" not in error.detail
        assert server.connections == 1


@pytest.mark.parametrize("script", BROKEN_BODIES.values(), ids=BROKEN_BODIES)
async def test_a_body_that_cannot_be_read_is_unreadable(script: Script) -> None:
    """Whatever its framing or its packing lacks; the attempt ends when it is seen, not at a limit."""
    async with raw_server(script) as server:
        attempt = Attempt(server.url)
        error = await attempt.fail()
        assert error.fault is Fault.DECODING
        assert attempt.outcome(error)[1:] in {(Phase.BODY, 200), (Phase.HEADERS, None)}  # as the packets came
        assert attempt.seconds < 1
        assert len(error.detail) > 20


async def hangs(connection: Connection) -> None:
    await connection.read_request()
    await connection.wait_closed_by_peer()


async def never_reads(connection: Connection) -> None:
    connection.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await asyncio.get_running_loop().create_future()


@pytest.mark.parametrize(("script", "phase"), [(hangs, Phase.HEADERS), (never_reads, Phase.SEND)])
@pytest.mark.parametrize(
    ("timeouts", "timeout_s", "fault"),
    [
        ({"first_byte_s": 0.1}, None, Fault.FIRST_BYTE_TIMEOUT),
        ({"first_byte_s": 0.1}, 4.0, Fault.FIRST_BYTE_TIMEOUT),
        ({"total_s": 0.1}, None, Fault.TOTAL_TIMEOUT),
        ({"total_s": 0.1, "first_byte_s": 0.1}, 4.0, Fault.TOTAL_TIMEOUT),
        ({}, 0.1, Fault.TOTAL_TIMEOUT),
        ({"first_byte_s": 4}, 0.1, Fault.TOTAL_TIMEOUT),
    ],
)
async def test_silence_ends_at_the_first_limit(
    script: Script, phase: Phase, timeouts: dict[str, float], timeout_s: float | None, fault: Fault
) -> None:
    """The first byte's limit, the whole attempt's, or what is left until the deadline; also while sending."""
    async with raw_server(script) as server:
        attempt = Attempt(server.url, timeouts)
        assert attempt.outcome(await attempt.fail(b"x" * 5_000_000, timeout_s)) == (fault, phase, None)
    assert 0.09 < attempt.seconds < 2


async def resets_while_it_reads(connection: Connection) -> None:
    await connection.reader.readuntil(b"\r\n\r\n")
    connection.reset()


async def resets_when_it_has_read(connection: Connection) -> None:
    await connection.read_request()
    connection.reset()


@pytest.mark.parametrize(
    ("script", "phase"), [(resets_while_it_reads, Phase.SEND), (resets_when_it_has_read, Phase.HEADERS)]
)
async def test_a_request_that_was_not_sent_to_its_end_is_told_apart(script: Script, phase: Phase) -> None:
    """A server that has not read it all cannot have begun to generate."""
    async with raw_server(script) as server:
        attempt = Attempt(server.url)
        assert attempt.outcome(await attempt.fail(b"x" * 5_000_000)) == (Fault.CONNECTION_LOST, phase, None)


async def test_a_timeout_closes_the_connection() -> None:
    """An attempt that ended leaves no connection that the server could notice."""
    async with raw_server(hangs) as server:
        await Attempt(server.url, {"first_byte_s": 0.05}).fail()
        await until(lambda: server.closed_by_peer)


async def test_a_deadline_that_has_passed_ends_at_once() -> None:
    """Nothing left is no time."""
    async with raw_server(hangs) as server:
        attempt = Attempt(server.url)
        assert (await attempt.fail(timeout_s=0.0)).fault is Fault.TOTAL_TIMEOUT
    assert attempt.seconds < 1


@pytest.mark.slow
def test_the_limit_is_named_rightly_on_uvloop() -> None:
    """Its clock has milliseconds and its timers fire up to one early: the kind of timeout must not depend on that."""
    uvloop = pytest.importorskip("uvloop")
    limits = random.Random(7)

    async def kinds() -> set[str]:
        async with raw_server(hangs) as server:
            backend = HttpBackend(RouteSettings(name="r", base_url=server.url))

            async def one() -> str:
                request = BackendRequest(path="/v1/x", body=RequestBody(b"{}"), timeout_s=limits.uniform(0.05, 0.1))
                with pytest.raises(BackendError) as caught:
                    await backend.invoke(request, AttemptResult())
                return caught.value.fault

            found = set(await asyncio.gather(*(one() for _ in range(60))))
            await backend.aclose()
            return found

    assert uvloop.run(kinds()) == {Fault.TOTAL_TIMEOUT}


# What is left


BROKEN = b"data: {no JSON\n\n"
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n%s" % (len(BROKEN), BROKEN)


class Watched(RequestBody):
    """A body whose end can be seen."""

    __slots__ = ("__weakref__",)


async def _fail(url: str, body: RequestBody, stream: str) -> str:
    settings = {"name": "b", "base_url": url, "stream": stream, "timeouts": {"first_byte_s": 0.05, "connect_s": 1.0}}
    backend = HttpBackend(RouteSettings.model_validate(settings))
    try:
        await backend.invoke(BackendRequest(path="/v1/chat/completions", body=body), AttemptResult())
    except BackendError as error:
        return error.fault
    finally:
        await backend.aclose()
    raise AssertionError("the attempt did not fail")


@pytest.fixture
def _no_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collection")
@pytest.mark.parametrize(
    ("fault", "stream"),
    [
        (Fault.CONNECT, "never"),
        (Fault.CONNECTION_LOST, "never"),
        (Fault.DECODING, "never"),
        (Fault.FIRST_BYTE_TIMEOUT, "never"),
        (Fault.STREAM_BROKEN, "always"),
        (Fault.STREAM_BROKEN, "auto"),  # the whole answer, which is asked for then, is a broken stream as well
    ],
)
async def test_a_failure_keeps_no_request_for_the_collector(fault: Fault, stream: str) -> None:
    """The garbage collector runs seldom, and a body may have ten megabytes: it is freed with the attempt's last frame."""

    async def script(connection: Connection) -> None:
        await connection.read_request()
        match fault:
            case Fault.STREAM_BROKEN:
                await connection.send(EVENTS)
                await connection.read_request()
                await connection.send(EVENTS)
            case Fault.CONNECTION_LOST:
                connection.writer.close()
            case Fault.DECODING:
                await connection.send(b"nonsense\r\n\r\n")
        await connection.wait_closed_by_peer()

    body = Watched(b"{}")
    ref = weakref.ref(body)
    async with raw_server(script) as server:
        url = f"http://127.0.0.1:{free_port()}" if fault is Fault.CONNECT else server.url
        assert await _fail(url, body, stream) == fault
    del body
    assert ref() is None
