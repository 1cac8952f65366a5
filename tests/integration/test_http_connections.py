"""Kept connections: whose answer the bytes are, and what a connection that has ended costs."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tests.support.raw_http import Connection, Open, answer, invoke, pause, raw_server, until
from worker.backends.http.connection import Headers, Request, StaleConnectionError
from worker.backends.http.pool import REST_S, Pool
from worker.errors import BackendError
from worker.policy.model import Fault, Phase
from worker.ports import AttemptResult, BackendRequest
from worker.wire.body import RequestBody

STRAYS: dict[str, bytes] = {
    "a second answer": answer(b'{"a": "stray"}'),
    "a timeout's answer": answer(b"{}", status="408 Request Timeout"),
    "half an answer": answer(b'{"a": "stray"}')[:25],
    "a line": b"\r\n",
    "several": answer(b'{"a": "stray"}') * 3,
}


class Silent:
    """Receives nothing."""

    def connected(self) -> None:
        raise AssertionError

    def sent(self) -> None:
        raise AssertionError

    def head(self, status: int, headers: Headers) -> None:
        raise AssertionError

    def feed(self, data: bytes) -> float | None:
        raise AssertionError


def echo(body: bytes) -> bytes:
    return answer(b'{"echo": %s}' % body)


async def ask(ask_backend: Callable[[bytes], Awaitable[AttemptResult]], count: int) -> list[bytes]:
    return [(await ask_backend(b'{"n": %d}' % number)).body for number in range(count)]


def expected(count: int) -> list[bytes]:
    return [b'{"echo": {"n": %d}}' % number for number in range(count)]


@pytest.mark.parametrize("stray", STRAYS.values(), ids=STRAYS)
@pytest.mark.parametrize("how", ["in the same write", "in the next write", "a millisecond later"])
async def test_bytes_after_an_answer_are_nobodys(stray: bytes, how: str, open_backend: Open) -> None:
    """Each request gets its own answer, and every one of them reaches the server whole and once."""

    async def talkative(connection: Connection) -> None:
        while True:
            _, body = await connection.read_request()
            if how == "in the same write":
                await connection.send(echo(body) + stray)
                continue
            await connection.send(echo(body))
            if how == "a millisecond later":
                await pause(0.001)
            await connection.send(stray)

    async with raw_server(talkative) as server:
        backend = open_backend(server.url)
        assert await ask(lambda body: invoke(backend, body=body), 20) == expected(20)
        assert [body for _, body in server.requests] == [b'{"n": %d}' % number for number in range(20)]


@pytest.mark.parametrize("stray", STRAYS.values(), ids=STRAYS)
async def test_bytes_after_an_answer_in_pieces_are_nobodys(stray: bytes, open_backend: Open) -> None:
    """The answer's end comes together with them, in a write of its own."""

    async def talkative(connection: Connection) -> None:
        while True:
            _, body = await connection.read_request()
            whole = echo(body)
            await connection.send(whole[:-3])
            await pause(0.001)
            await connection.send(whole[-3:] + stray)

    async with raw_server(talkative) as server:
        backend = open_backend(server.url)
        assert await ask(lambda body: invoke(backend, body=body), 10) == expected(10)


async def test_many_at_a_time_get_their_own_answers(open_backend: Open) -> None:
    """Under load connections are reused at once; still nothing is taken from another request."""

    async def talkative(connection: Connection) -> None:
        while True:
            _, body = await connection.read_request()
            await connection.send(echo(body))
            await asyncio.sleep(0)  # not a time: server and client share this loop, and both wait where it is slow
            await connection.send(answer(b'{"a": "stray"}'))

    async with raw_server(talkative) as server:
        backend = open_backend(server.url)

        async def one(first: int) -> None:
            for number in range(first, first + 10):
                body = b'{"n": %d}' % number
                assert (await invoke(backend, body=body)).body == b'{"echo": %s}' % body

        await asyncio.gather(*(one(first) for first in range(0, 160, 10)))
        assert len(server.requests) == 160


@pytest.mark.parametrize("is_read", [False, True], ids=["in the kernel", "read by the loop"])
async def test_a_server_that_speaks_first_has_not_been_asked(is_read: bool) -> None:
    """An answer that comes before its request is none; the request counts as not sent."""
    spoken = asyncio.Event()

    async def first(connection: Connection) -> None:
        await connection.send(answer(b'{"a": 1}'))
        spoken.set()
        await connection.wait_closed_by_peer()

    async with raw_server(first) as server:
        pool = Pool(server.url)
        made = await pool.connect(1.0)
        if is_read:
            await until(lambda: not made.is_open)
        else:
            made.pause()  # what has come lies in the kernel, as behind a step that takes long
            await spoken.wait()
        with pytest.raises(StaleConnectionError) as caught:
            await made.exchange(Request(b"GET / HTTP/1.1\r\n\r\n"), Silent())
        assert (caught.value.fault, caught.value.is_sent) == (Fault.CONNECT, False)
        await until(lambda: server.closed_by_peer)
        assert server.requests == []
        await pool.aclose()


async def test_informational_answers_are_part_of_the_answer(open_backend: Open) -> None:
    """100, 102 and 103 come before it, in any packets."""

    async def script(connection: Connection) -> None:
        while True:
            _, body = await connection.read_request()
            await connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            await pause(0.001)
            await connection.send(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + echo(body))

    async with raw_server(script) as server:
        backend = open_backend(server.url)
        assert await ask(lambda body: invoke(backend, body=body), 3) == expected(3)
        assert server.connections == 1


ENDS: dict[str, Callable[[Connection], None]] = {
    "closes": lambda connection: connection.writer.close(),
    "resets": lambda connection: connection.reset(),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("when", ["at once", "later", "when it is asked"])
@pytest.mark.parametrize("size", [2, 2_000_000])
async def test_a_kept_connection_that_has_ended_costs_nothing(
    end: Callable[[Connection], None], when: str, size: int, open_backend: Open
) -> None:
    """The request is asked again on a fresh connection, inside the attempt."""

    async def once(connection: Connection) -> None:
        await connection.read_request()
        await connection.send(answer(b"{}"))
        if when == "later":
            await pause(4 * REST_S)
        if when == "when it is asked":
            await connection.reader.read(1)
        end(connection)

    async with raw_server(once) as server:
        backend = open_backend(server.url)
        for _ in range(10):
            assert (await invoke(backend, body=b"x" * size)).body == b"{}"
        assert len(server.requests) == 10


IDLE = answer(b"", "Connection: close", status="408 Request Timeout")


@pytest.mark.parametrize("body", [b"", b"<html><h1>408 Request Time-out</h1></html>"])
async def test_a_timeout_of_an_idle_connection_is_no_answer(body: bytes, open_backend: Open) -> None:
    """It crossed the request; proxies say so before they close a kept connection."""

    async def script(connection: Connection) -> None:
        _, asked = await connection.read_request()
        await connection.send(echo(asked))
        await connection.reader.read(1)
        await connection.send(answer(body, "Connection: close", status="408 Request Timeout"))

    async with raw_server(script) as server:
        backend = open_backend(server.url)
        assert await ask(lambda body: invoke(backend, body=body), 10) == expected(10)
        assert len(server.requests) == 10


@pytest.mark.parametrize(
    ("is_reused", "late"),
    [
        (False, IDLE),
        (True, answer(b"", status="408 Request Timeout")),
    ],
)
async def test_another_timeout_is_the_answer(is_reused: bool, late: bytes, open_backend: Open) -> None:
    """On a fresh connection, or from a server that keeps it, the request itself was too slow."""

    async def script(connection: Connection) -> None:
        while True:
            _, asked = await connection.read_request()
            await connection.send(echo(asked) if is_reused and len(server.requests) == 1 else late)

    async with raw_server(script) as server:
        backend = open_backend(server.url)
        if is_reused:
            await invoke(backend)
        assert (await invoke(backend)).status == 408
        assert len(server.requests) == 1 + is_reused


async def test_a_fresh_connection_that_ends_as_well_counts(open_backend: Open) -> None:
    """A request may kill its server: it is asked a second time and not a third."""

    async def answers_once(connection: Connection) -> None:
        await connection.read_request()
        if len(server.requests) == 1:
            await connection.send(answer(b"{}"))
            await connection.read_request()

    async with raw_server(answers_once) as server:
        backend = open_backend(server.url)
        await invoke(backend)
        result = AttemptResult()
        with pytest.raises(BackendError) as caught:
            await backend.invoke(BackendRequest(path="/v1/x", body=RequestBody(b"{}")), result)
        assert (caught.value.fault, result.phase) == (Fault.CONNECTION_LOST, Phase.HEADERS)
        assert (server.connections, len(server.requests)) == (2, 3)


@pytest.mark.parametrize("pieces", [b"H", b"HTTP/1.1 200 OK\r\n", answer(b"{", length=10)])
async def test_a_kept_connection_that_ends_inside_its_answer_counts(pieces: bytes, open_backend: Open) -> None:
    """One byte is a sign that the request was worked on."""

    async def script(connection: Connection) -> None:
        await connection.read_request()
        await connection.send(answer(b"{}"))
        await connection.read_request()
        await connection.send(pieces)

    async with raw_server(script) as server:
        backend = open_backend(server.url)
        await invoke(backend)
        with pytest.raises(BackendError) as caught:
            await invoke(backend)
        assert caught.value.fault is Fault.CONNECTION_LOST
        assert (server.connections, len(server.requests)) == (1, 2)


async def test_a_server_that_has_gone_was_not_asked(open_backend: Open) -> None:
    """Its kept connection has ended and no other is accepted: an outage, which costs no message an attempt."""

    async def script(connection: Connection) -> None:
        await connection.read_request()
        await connection.send(answer(b"{}"))

    async with raw_server(script) as server:
        backend = open_backend(server.url)
        await invoke(backend)
    result = AttemptResult()
    with pytest.raises(BackendError) as caught:
        await backend.invoke(BackendRequest(path="/v1/x", body=RequestBody(b"{}")), result)
    assert (caught.value.fault, result.phase) == (Fault.CONNECT, Phase.CONNECT)


async def test_one_at_a_time_keeps_one_connection(open_backend: Open) -> None:
    """A server that serves one connection after the other must not wait for an idle one to be closed."""

    async def script(connection: Connection) -> None:
        while True:
            await connection.read_request()
            await connection.send(answer(b"{}"))

    async with raw_server(script) as server:
        backend = open_backend(server.url)
        for _ in range(20):
            await invoke(backend)
        assert server.connections == 1
