"""The connections to one server: how they come about, how long they are kept, and which requests wait for them."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tests.support.raw_http import Connection, RawServer, always, answer, pause, raw_server, until
from worker.backends.http import pool as module
from worker.backends.http.connection import Headers, Request
from worker.backends.http.pool import Pool
from worker.errors import BackendError
from worker.policy.model import Fault

REQUEST = Request(b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n", b"{}")
HANGS = ("192.0.2.1", 80)
REFUSES = ("127.0.0.1", 1)
Dial = Callable[..., Pool]


class Answer:
    """Receives one answer."""

    def __init__(self) -> None:
        self.status = 0
        self.body = b""

    def connected(self) -> None:
        """A request is told of more than once if it is sent again."""

    def sent(self) -> None:
        """Not of interest."""

    def head(self, status: int, headers: Headers) -> None:
        self.status = status

    def feed(self, data: bytes) -> float | None:
        self.body += data
        return None


async def ask(pool: Pool, connect_s: float = 5.0) -> int:
    answer = Answer()
    await pool.exchange(REQUEST, answer, connect_s)
    return answer.status


@pytest.fixture
async def server() -> AsyncIterator[RawServer]:
    async with raw_server(always(answer(b"{}"))) as server:
        yield server


class Network:
    """What names mean, which addresses are tried when, and which sockets are open; addresses of `HANGS` never answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.addresses: list[tuple[str, int]] | Exception = []
        self.real = REFUSES
        """Where addresses of 198.51.100 lead to."""
        self.lookups = 0
        self.tried: list[tuple[str, int]] = []
        self.sockets: list[socket.socket] = []
        self.may_look_up = asyncio.Event()
        self.may_look_up.set()
        loop = asyncio.get_running_loop()
        connect, look_up = loop.sock_connect, loop.getaddrinfo

        async def getaddrinfo(host: str, port: int, **more: Any) -> list[Any]:
            if host != "h":  # uvloop's `sock_connect` takes an address through this, too
                return await look_up(host, port, **more)
            self.lookups += 1
            await self.may_look_up.wait()
            if isinstance(self.addresses, Exception):
                raise self.addresses
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in self.addresses]

        async def sock_connect(sock: socket.socket, address: tuple[str, int]) -> None:
            self.tried.append(address)
            self.sockets.append(sock)
            if address[0] == HANGS[0]:
                await loop.create_future()
            await connect(sock, self.real if address[0].startswith("198.51.100.") else address)

        monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
        monkeypatch.setattr(loop, "sock_connect", sock_connect)


@pytest.fixture
async def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    return Network(monkeypatch)


@pytest.fixture
async def dial(server: RawServer) -> AsyncIterator[Dial]:
    """Pools of the server, or of another address; closed at the end."""
    opened: list[Pool] = []

    def build(url: str = "") -> Pool:
        opened.append(Pool(url or server.url))
        return opened[-1]

    yield build
    for pool in opened:
        await pool.aclose()


def where(server: RawServer) -> tuple[str, int]:
    return ("127.0.0.1", int(server.url.rpartition(":")[2]))


# How they come about


@pytest.mark.parametrize("broken", [[REFUSES], [HANGS], [HANGS, REFUSES], [REFUSES, HANGS, HANGS]])
async def test_one_good_address_is_enough(
    broken: list[tuple[str, int]], server: RawServer, network: Network, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it stands; those that do not answer are given up when another has."""
    monkeypatch.setattr(module, "NEXT_ADDRESS_S", 0.02)
    pool = dial("http://h")
    for _ in range(len(broken) + 1):  # each time another one is the first
        network.addresses = [*broken, where(server)]
        (await pool.connect(5.0)).abort()
    await until(lambda: all(sock.fileno() == -1 for sock in network.sockets))


async def test_addresses_take_turns(server: RawServer, network: Network, dial: Dial) -> None:
    """A name with many addresses is a service of many pods."""
    network.real = where(server)
    network.addresses = [(f"198.51.100.{last}", 80) for last in (1, 2, 3)]
    pool = dial("http://h")
    for _ in range(6):
        await pool.connect(5.0)
    assert [address[0][-1] for address in network.tried] == ["2", "3", "1", "2", "3", "1"]
    assert network.lookups == 1


async def held(pool: Pool, count: int) -> None:
    """Answer so many requests that run at the same time."""
    assert await asyncio.gather(*(ask(pool) for _ in range(count))) == [200] * count


def spread(pool: Pool) -> dict[str, int]:
    """How many connections each address has, by the last part of its name."""
    return {where[0].rpartition(".")[2]: count for where, count in pool._counts.items() if count}


async def test_connections_are_spread_evenly(server: RawServer, network: Network, dial: Dial) -> None:
    """Requests that run at the same time are shared by all pods."""
    network.real = where(server)
    network.addresses = [(f"198.51.100.{last}", 80) for last in (1, 2, 3)]
    pool = dial("http://h")
    await held(pool, 9)
    assert spread(pool) == {"1": 3, "2": 3, "3": 3}


async def test_a_pod_that_appears_gets_its_share(
    server: RawServer, network: Network, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though no new connection is needed: under load the name is looked up again, and surplus ones are not kept."""
    monkeypatch.setattr(module, "RESOLVED_S", 0.02)
    network.real = where(server)
    network.addresses = [("198.51.100.1", 80)]
    pool = dial("http://h")
    await held(pool, 8)
    assert spread(pool) == {"1": 8}
    network.addresses.append(("198.51.100.2", 80))
    while abs(spread(pool).get("1", 0) - spread(pool).get("2", 0)) > 1:
        await held(pool, 8)


async def test_a_pod_that_is_gone_gets_no_further_requests(
    server: RawServer, network: Network, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connections end when they are free: it may be finishing its last requests."""
    monkeypatch.setattr(module, "RESOLVED_S", 0.02)
    monkeypatch.setattr(module, "GONE_S", 0.05)
    network.real = where(server)
    network.addresses = [("198.51.100.1", 80), ("198.51.100.2", 80)]
    pool = dial("http://h")
    await held(pool, 8)
    del network.addresses[0]
    while "1" in spread(pool):
        await held(pool, 8)


async def test_a_pod_that_does_not_answer_is_the_last_choice(server: RawServer, network: Network, dial: Dial) -> None:
    """It has the fewest connections, but no request waits for it each time, and those of others are kept."""
    network.addresses = [REFUSES, where(server)]
    pool = dial("http://h")
    for _ in range(3):
        await held(pool, 4)
    assert network.tried.count(REFUSES) <= 4
    assert server.connections == 4


@pytest.mark.parametrize(
    ("addresses", "words"),
    [
        ([REFUSES], "h:80: ConnectionRefusedError: "),
        ([REFUSES, REFUSES], "h:80: ConnectionRefusedError: "),
        (socket.gaierror(-2, "Name or service not known"), "h:80: gaierror: [Errno -2] Name or service not known"),
    ],
    ids=["refused", "all refused", "no such name"],
)
async def test_what_cannot_be_reached_is_named(addresses: Any, words: str, network: Network, dial: Dial) -> None:
    """In the system's words."""
    network.addresses = addresses
    with pytest.raises(BackendError) as caught:
        await ask(dial("http://h"))
    assert caught.value.fault is Fault.CONNECT
    assert caught.value.detail.startswith(words)
    assert all(sock.fileno() == -1 for sock in network.sockets)


@pytest.mark.parametrize("addresses", [[HANGS], [HANGS, HANGS], [REFUSES, HANGS]])
async def test_silence_ends_with_the_limit(addresses: Any, network: Network, dial: Dial) -> None:
    """Of all addresses together; no socket stays open."""
    network.addresses = addresses
    with pytest.raises(BackendError) as caught:
        await ask(dial("http://h"), 0.05)
    assert (caught.value.fault, caught.value.detail) == (
        Fault.CONNECT_TIMEOUT,
        "h:80: no connection within 0.05 s",
    )
    await until(lambda: all(sock.fileno() == -1 for sock in network.sockets))


async def test_a_lookup_belongs_to_the_limit_and_is_shared(network: Network, dial: Dial, server: RawServer) -> None:
    """Many requests wait for one; those that give up leave it to the others, and it is good for a while."""
    network.may_look_up.clear()
    network.addresses = [where(server)]
    pool = dial("http://h")
    with pytest.raises(BackendError) as caught:
        await ask(pool, 0.01)
    assert caught.value.fault is Fault.CONNECT_TIMEOUT
    others = [asyncio.ensure_future(ask(pool)) for _ in range(9)]
    await pause(0.01)
    network.may_look_up.set()
    assert await asyncio.gather(*others) == [200] * 9
    assert network.lookups == 1


async def test_a_name_that_was_not_found_is_looked_up_again(network: Network, dial: Dial, server: RawServer) -> None:
    """A service may appear any moment."""
    network.addresses = socket.gaierror(-2, "Name or service not known")
    pool = dial("http://h")
    with pytest.raises(BackendError):
        await ask(pool)
    network.addresses = [where(server)]
    assert await ask(pool) == 200
    assert network.lookups == 2


async def test_a_service_that_has_moved_is_looked_up_again(network: Network, dial: Dial, server: RawServer) -> None:
    """Though its old address is good for a while, if nothing listens there any more."""
    network.addresses = [REFUSES]
    pool = dial("http://h")
    with pytest.raises(BackendError):
        await ask(pool)
    network.addresses = [where(server)]
    assert await ask(pool) == 200


@pytest.mark.parametrize("when", ["lookup", "connect", "second address"])
async def test_cancellation_while_connecting_leaves_nothing(
    when: str, network: Network, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No socket, no task."""
    monkeypatch.setattr(module, "NEXT_ADDRESS_S", 0.0)
    before = asyncio.all_tasks()
    network.addresses = [HANGS, HANGS] if when == "second address" else [HANGS]
    if when == "lookup":
        network.may_look_up.clear()
    pool = dial("http://h")
    task = asyncio.ensure_future(ask(pool))
    await until(lambda: network.lookups if when == "lookup" else len(network.tried) == len(network.addresses))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await pool.aclose()
    await until(lambda: asyncio.all_tasks() == before)
    assert all(sock.fileno() == -1 for sock in network.sockets)


# How long they are kept


async def test_an_idle_connection_is_closed(server: RawServer, dial: Dial, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the server does it, though nothing is asked any more."""
    monkeypatch.setattr(module, "KEEPALIVE_S", 0.03)
    pool = dial()
    await asyncio.gather(*(ask(pool) for _ in range(3)))
    assert server.connections == 3
    await until(lambda: not pool._connections)
    assert not pool._idle
    assert await ask(pool) == 200
    assert server.connections == 4


async def test_a_connection_that_rests_is_waited_for(server: RawServer, dial: Dial) -> None:
    """As many requests as connections, again and again: no further one is opened."""
    pool = dial()
    for _ in range(20):
        assert await asyncio.gather(*(ask(pool) for _ in range(8))) == [200] * 8
    assert server.connections == 8
    assert await asyncio.gather(*(ask(pool) for _ in range(9))) == [200] * 9
    assert server.connections == 9


async def test_what_has_rested_is_taken_at_once(server: RawServer, dial: Dial) -> None:
    """The one that has rested the longest."""
    pool = dial()
    await asyncio.gather(*(ask(pool) for _ in range(2)))
    first, second = pool._idle
    await pause(2 * module.REST_S)
    assert await pool.acquire(5.0) is first
    assert await pool.acquire(5.0) is second


@pytest.mark.parametrize("when", ["before it has rested", "when it has rested"])
async def test_a_request_that_gives_up_waiting_takes_nothing_with_it(when: str, server: RawServer, dial: Dial) -> None:
    """The connection is there for the next one."""
    pool = dial()
    await ask(pool)
    waits = asyncio.ensure_future(pool.acquire(5.0))
    await asyncio.sleep(0)
    if when == "when it has rested":
        await until(lambda: not pool._waiting)  # it was handed out, and the request has not run since
    waits.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waits
    assert await ask(pool) == 200
    assert server.connections == 1


async def test_a_connection_that_ends_while_it_rests_is_replaced(dial: Dial) -> None:
    """The request that waited for it gets a fresh one."""

    async def once(connection: Connection) -> None:
        await connection.read_request()
        await connection.send(answer(b"{}"))

    async with raw_server(once) as server:
        pool = dial(server.url)
        for number in range(1, 9):
            assert await ask(pool) == 200
            assert server.connections == number


async def test_connections_that_end_at_once_are_forgotten(dial: Dial) -> None:
    """Whether they ended before they could be used, while they carried a request, or afterwards."""

    async def ends(connection: Connection) -> None:
        if server.connections % 3:
            await connection.read_request()
        if server.connections % 3 == 2:
            await connection.send(answer(b"{}"))

    async with raw_server(ends) as server:
        pool = dial(server.url)
        outcomes = await asyncio.gather(*(ask(pool) for _ in range(30)), return_exceptions=True)
        assert {error.fault for error in outcomes if isinstance(error, BackendError)} <= {
            Fault.CONNECT,
            Fault.CONNECTION_LOST,
        }
        await until(lambda: not pool._connections)
        await pool.aclose()


async def test_after_stray_bytes_none_is_used_again(dial: Dial, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a while; what is idle is closed at once."""
    monkeypatch.setattr(module, "DISTRUST_S", 0.2)
    is_stray = True

    async def script(connection: Connection) -> None:
        while True:
            await connection.read_request()
            await connection.send(answer(b"{}") * (1 + is_stray))

    async with raw_server(script) as server:
        pool = dial(server.url)
        assert await ask(pool) == 200
        is_stray = False
        for _ in range(3):
            assert await ask(pool) == 200
        assert server.connections == 4
        await pause(0.25)
        for _ in range(3):
            assert await ask(pool) == 200
        assert server.connections == 5


async def test_closing_ends_what_runs_and_keeps_nothing(dial: Dial) -> None:
    """Also a connection that comes about, or becomes free, afterwards."""

    async def hangs(connection: Connection) -> None:
        await connection.read_request()
        await connection.wait_closed_by_peer()

    async with raw_server(hangs) as server:
        pool = dial(server.url)
        task = asyncio.ensure_future(ask(pool))
        await until(lambda: server.requests)
        await pool.aclose()
        with pytest.raises(BackendError) as caught:
            await task
        assert caught.value.fault is Fault.CONNECTION_LOST
        await pool.aclose()
    async with raw_server(always(answer(b"{}"))) as server:
        pool = dial(server.url)
        await pool.aclose()
        assert await ask(pool) == 200
        await until(lambda: not pool._connections)
