"""Response bodies that break, provoked on a real socket, and the fault each must have."""

import asyncio
import gzip
from collections.abc import Callable

import pytest

from tests.support.raw_http import CHUNKED, Attempt, Connection, Script, answer, raw_server, until
from worker.backends.openai import MAX_BLANK_BYTES, HttpBackend
from worker.errors import BackendError
from worker.policy.model import Fault, Phase
from worker.ports import AttemptResult, BackendRequest
from worker.settings.schema import RouteSettings
from worker.wire.body import RequestBody


def after_headers(head: bytes, *, then: bytes = b"", end: str = "close") -> Callable[[AttemptResult], Script]:
    """Send the head, wait until the client has it, send the rest, and end."""

    def build(result: AttemptResult) -> Script:
        async def script(connection: Connection) -> None:
            await connection.read_request()
            await connection.send(head)
            await until(lambda: result.status)
            if then:
                await connection.send(then)
            if end == "reset":
                connection.reset()
            elif end == "hang":
                await connection.wait_closed_by_peer()

        return script

    return build


BROKEN_BODY = {
    "closed before its length": (after_headers(answer(b'{"a":', length=100)), Fault.CONNECTION_LOST),
    "reset before its length": (after_headers(answer(b'{"a":', length=100), end="reset"), Fault.CONNECTION_LOST),
    "closed between chunks": (after_headers(CHUNKED + b"2\r\n{}\r\n"), Fault.CONNECTION_LOST),
    "closed inside a chunk": (after_headers(CHUNKED + b"50\r\n{"), Fault.CONNECTION_LOST),
    "reset between chunks": (after_headers(CHUNKED + b"2\r\n{}\r\n", end="reset"), Fault.CONNECTION_LOST),
    "illegal chunk header": (after_headers(CHUNKED, then=b"zz\r\n"), Fault.DECODING),
    "illegal chunk header later": (after_headers(CHUNKED + b"2\r\n{}\r\n", then=b"zz\r\n"), Fault.DECODING),
    "illegal chunk end": (after_headers(CHUNKED, then=b"2\r\n{}xx0\r\n\r\n"), Fault.DECODING),
    "silent in a chunked body": (after_headers(CHUNKED + b"1\r\n{\r\n", end="hang"), Fault.IDLE_TIMEOUT),
    "silent in a body of known length": (after_headers(answer(b"{", length=9), end="hang"), Fault.IDLE_TIMEOUT),
    "silent before the body": (after_headers(answer(b"", length=9), end="hang"), Fault.IDLE_TIMEOUT),
    "not gzip": (after_headers(answer(b'{"a":1}', "Content-Encoding: gzip")), Fault.DECODING),
    "gzip cut and closed": (
        after_headers(answer(gzip.compress(b"{}" * 99)[:-9], "Content-Encoding: gzip", length=999)),
        Fault.CONNECTION_LOST,
    ),
    "too large": (after_headers(answer(b"a" * 1001), end="hang"), Fault.RESPONSE_TOO_LARGE),
    "too large in chunks": (
        after_headers(CHUNKED, then=b"1f4\r\n" + b"a" * 500 + b"\r\n1f5\r\n" + b"a" * 501 + b"\r\n", end="hang"),
        Fault.RESPONSE_TOO_LARGE,
    ),
    "too large once decompressed": (
        after_headers(answer(gzip.compress(b"a" * 5_000_000), "Content-Encoding: gzip"), end="hang"),
        Fault.RESPONSE_TOO_LARGE,
    ),
}


@pytest.mark.parametrize(("build", "fault"), BROKEN_BODY.values(), ids=BROKEN_BODY)
async def test_a_broken_body_keeps_what_is_known(build: Callable[[AttemptResult], Script], fault: Fault) -> None:
    """Status and headers came, the body did not: each cause by its name, in the body's phase."""
    result = AttemptResult()
    async with raw_server(build(result)) as server:
        attempt = Attempt(server.url, max_response_bytes=1000)
        attempt.result = result
        assert attempt.outcome(await attempt.fail()) == (fault, Phase.BODY, 200)
    assert result.headers
    assert attempt.seconds < 2


async def test_every_byte_resets_the_idle_limit_but_not_the_total() -> None:
    """A body that trickles is not idle; the whole attempt ends all the same."""

    async def trickle(connection: Connection) -> None:
        await connection.read_request()
        await connection.send(CHUNKED)
        while True:
            await connection.send(b"1\r\n \r\n")
            await asyncio.sleep(0.02)

    async with raw_server(trickle) as server:
        attempt = Attempt(server.url, {"idle_s": 1.5, "total_s": 2.0})
        assert attempt.outcome(await attempt.fail()) == (Fault.TOTAL_TIMEOUT, Phase.BODY, 200)
    assert attempt.seconds > 1.9


@pytest.mark.parametrize("path", ["/v1/x", "/v1/chat/completions"])
@pytest.mark.parametrize("blanks", [1, 10 * MAX_BLANK_BYTES])
async def test_blanks_before_an_answer_belong_to_it(path: str, blanks: int) -> None:
    """They say nothing about what comes, however many they are, and are passed on like every other byte."""
    body = b" " * blanks + b'{"choices":[]}'
    pieces = b"".join(b"1\r\n \r\n" for _ in range(blanks)) + b"e\r\n" + body.lstrip() + b"\r\n0\r\n\r\n"
    async with raw_server(after_headers(CHUNKED + pieces)(AttemptResult())) as server:
        backend = HttpBackend(RouteSettings(name="r", base_url=server.url))
        result = AttemptResult()
        await backend.invoke(BackendRequest(path=path, body=RequestBody(b"{}")), result)
        await backend.aclose()
    assert (result.status, result.body, result.streamed) == (200, body, False)


async def test_a_deadline_ends_a_body() -> None:
    """What is left until the deadline bounds reading as well."""
    async with raw_server(after_headers(answer(b"{", length=9), end="hang")(result := AttemptResult())) as server:
        attempt = Attempt(server.url, {"idle_s": 4})
        attempt.result = result
        assert attempt.outcome(await attempt.fail(timeout_s=0.1)) == (Fault.TOTAL_TIMEOUT, Phase.BODY, 200)


async def test_a_connection_with_an_unread_rest_is_not_used_again() -> None:
    """The rest of an answer that was cut off is not taken for the next one."""

    async def large(connection: Connection) -> None:
        await connection.read_request()
        await connection.send(answer(b"a" * 4000, length=5000))
        await connection.wait_closed_by_peer()

    async with raw_server(large) as server:
        backend = HttpBackend(RouteSettings(name="r", base_url=server.url, max_response_bytes=1000))
        for _ in range(2):
            with pytest.raises(BackendError, match="response_too_large"):
                await backend.invoke(BackendRequest(path="/v1/x", body=RequestBody(b"{}")), AttemptResult())
        assert server.connections == 2
        await backend.aclose()


async def test_broken_framing_is_noticed_on_a_kept_connection_as_well() -> None:
    """One connection, two answers in pieces, the second one broken: it fails at once, not after the idle limit."""
    results = AttemptResult(), AttemptResult()

    async def script(connection: Connection) -> None:
        for result, rest in zip(results, (b"2\r\n{}\r\n0\r\n\r\n", b"zz\r\n"), strict=True):
            await connection.read_request()
            await connection.send(CHUNKED)
            await until(lambda result=result: result.status)
            await connection.send(rest)
        await connection.wait_closed_by_peer()

    async with raw_server(script) as server:
        attempt = Attempt(server.url, {"idle_s": 4})
        await attempt.backend.invoke(BackendRequest(path="/v1/x", body=RequestBody(b"{}")), results[0])
        attempt.result = results[1]
        assert attempt.outcome(await attempt.fail()) == (Fault.DECODING, Phase.BODY, 200)
        assert server.connections == 1
    assert (results[0].body, attempt.seconds < 2) == (b"{}", True)
