"""Good and bad answers on a raw socket, cut in two at every byte: where the network cuts must make no difference."""

import asyncio
import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.raw_http import CHUNKED, Connection, answer, raw_server
from worker.backends.http.connection import MAX_HEAD_BYTES, MAX_HEADERS
from worker.backends.openai import HttpBackend
from worker.errors import BackendError
from worker.policy.model import Fault
from worker.ports import AttemptResult, BackendRequest
from worker.settings.schema import RouteSettings
from worker.wire.body import RequestBody

OK, LATER = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"
BODY = b'{"a": [1, 2]}'
HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </x>; rel=preload\r\n\r\n"


@dataclass(frozen=True)
class Case:
    """What a server writes, and what it means."""

    data: bytes
    outcome: tuple[int, bytes] | Fault
    keeps: bool = True
    """The connection can be used again."""


def chunks(*pieces: bytes, end: bytes = b"0\r\n\r\n", head: bytes = CHUNKED) -> bytes:
    return head + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + end


GOOD = {
    "a length": Case(answer(BODY), (200, BODY)),
    "no body": Case(answer(b""), (200, b"")),
    "chunks": Case(chunks(BODY[:3], BODY[3:]), (200, BODY)),
    "chunks without any": Case(chunks(), (200, b"")),
    "extensions": Case(CHUNKED + b'd;a=b;c="d e"\r\n%b\r\n0;last\r\n\r\n' % BODY, (200, BODY)),
    "large hexadecimals": Case(CHUNKED + b"00D\r\n%b\r\n000\r\n\r\n" % BODY, (200, BODY)),
    "trailers": Case(chunks(BODY, end=b"0\r\nX-A: 1\r\nX-B: 2\r\n\r\n"), (200, BODY)),
    "padded sizes": Case(CHUNKED + b"d  \r\n%b\r\n0\r\n\r\n" % BODY, (200, BODY)),
    "bare line feeds": Case(b"HTTP/1.1 200 OK\nContent-Length: 13\n\n" + BODY, (200, BODY)),
    "no reason": Case(b"HTTP/1.1 200\r\nContent-Length: 13\r\n\r\n" + BODY, (200, BODY)),
    "continue": Case(LATER + answer(BODY), (200, BODY)),
    "hints": Case(HINTS * 3 + answer(BODY), (200, BODY)),
    "everything before it": Case(LATER + HINTS + chunks(BODY), (200, BODY)),
    "close": Case(answer(BODY, "Connection: close"), (200, BODY), keeps=False),
    "an old version": Case(b"HTTP/1.0 200 OK\r\nContent-Length: 13\r\n\r\n" + BODY, (200, BODY), keeps=False),
    "an old version that keeps": Case(
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 13\r\n\r\n" + BODY, (200, BODY)
    ),
    "until it closes": Case(OK + b"\r\n" + BODY, (200, BODY), keeps=False),
    "204": Case(b"HTTP/1.1 204 No Content\r\n\r\n", (204, b"")),
    "304": Case(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", (304, b"")),
    "an error": Case(answer(BODY, status="503 Busy"), (503, BODY)),
    "an odd status": Case(answer(BODY, status="599 X"), (599, BODY)),
    "gzip": Case(answer(gzip.compress(BODY), "Content-Encoding: gzip"), (200, BODY)),
    "gzip in chunks": Case(
        chunks(gzip.compress(BODY)[:9], gzip.compress(BODY)[9:], head=CHUNKED[:-2] + b"content-encoding: GZIP\r\n\r\n"),
        (200, BODY),
    ),
    "deflate until it closes": Case(
        OK + b"Content-Encoding: deflate\r\n\r\n" + zlib.compress(BODY), (200, BODY), keeps=False
    ),
    "zstd": Case(answer(zstandard.compress(BODY), "Content-Encoding: zstd"), (200, BODY)),
    "an empty gzip": Case(answer(b"", "Content-Encoding: gzip"), (200, b"")),
    "odd headers": Case(OK + b"X:\r\nX-Bytes: \xe9\x01\tz\r\nContent-Length: 13 \r\n\r\n" + BODY, (200, BODY)),
}  # fmt: skip
LOST, UNREADABLE = Fault.CONNECTION_LOST, Fault.DECODING
BAD = {
    "nothing": Case(b"", LOST),
    "half a status line": Case(OK[:9], LOST),
    "half a header": Case(OK + b"Content-Le", LOST),
    "half a body": Case(answer(BODY, length=20), LOST),
    "half a chunk": Case(chunks(BODY)[:-12], LOST),
    "no last chunk": Case(chunks(BODY, end=b""), LOST),
    "no end of trailers": Case(chunks(BODY, end=b"0\r\nX: y\r\n"), LOST),
    "only hints": Case(HINTS, LOST),
    "half a gzip": Case(answer(gzip.compress(BODY)[:-9], "Content-Encoding: gzip"), UNREADABLE),
    "half a gzip until it closes": Case(
        OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(BODY)[:-9], UNREADABLE
    ),
    "no gzip": Case(answer(b"no gzip", "Content-Encoding: gzip"), UNREADABLE),
    "brotli": Case(answer(BODY, "Content-Encoding: br"), UNREADABLE),
    "no HTTP": Case(b"SSH-2.0-OpenSSH_9.6\r\n", UNREADABLE),
    "TLS": Case(b"\x15\x03\x01\x00\x02\x02\x28", UNREADABLE),
    "a page": Case(b"<html>hi</html>", UNREADABLE),
    "a bad status": Case(b"HTTP/1.1 abc OK\r\n\r\n", UNREADABLE),
    "a status of two digits": Case(b"HTTP/1.1 20 OK\r\n\r\n", UNREADABLE),
    "a status of four digits": Case(b"HTTP/1.1 2000 OK\r\n\r\n", UNREADABLE),
    "a bad version": Case(b"HTTP/x.1 200 OK\r\n\r\n", UNREADABLE),
    "a header without a colon": Case(OK + b"no colon\r\n\r\n", UNREADABLE),
    "a header without a name": Case(OK + b": x\r\n\r\n", UNREADABLE),
    "a bad length": Case(OK + b"Content-Length: 1x\r\n\r\n", UNREADABLE),
    "a length below zero": Case(OK + b"Content-Length: -2\r\n\r\n{}", UNREADABLE),
    "a length beyond all": Case(OK + b"Content-Length: 99999999999999999999\r\n\r\n{}", UNREADABLE),
    "two lengths": Case(OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", UNREADABLE),
    "a length and chunks": Case(OK + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}", UNREADABLE),
    "a bad size": Case(CHUNKED + b"zz\r\n", UNREADABLE),
    "a size below zero": Case(CHUNKED + b"-1\r\n", UNREADABLE),
    "a size beyond all": Case(CHUNKED + b"ffffffffffffffffff\r\n", UNREADABLE),
    "a length among trailers": Case(chunks(BODY, end=b"0\r\nContent-Length: 7\r\n\r\n"), UNREADABLE),
    "a bad later size": Case(chunks(BODY, end=b"?\r\n"), UNREADABLE),
    "a chunk that does not end": Case(CHUNKED + b"2\r\n{}xx", UNREADABLE),
    "another protocol": Case(b"HTTP/1.1 101 X\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n", UNREADABLE),
    "another protocol unnamed": Case(b"HTTP/1.1 101 X\r\n\r\n", UNREADABLE),
    "too many headers": Case(OK + b"A: b\r\n" * (MAX_HEADERS + 1) + b"Content-Length: 0\r\n\r\n", UNREADABLE),
}  # fmt: skip
PLAIN = answer(b'{"second": 1}')


async def let_it_read() -> None:
    """Both ends are on this loop: what was written has been read when it has gone round a few times."""
    for _ in range(4):
        await asyncio.sleep(0)


async def outcomes(case: Case, cuts: Iterator[int] | range, *, then: bool) -> set[tuple[object, int]]:
    """Return every outcome of the answer cut so, with the number of connections that two requests took."""
    cut = 0

    async def script(connection: Connection) -> None:
        await connection.read_request()
        for piece in (case.data[:cut], case.data[cut:]):
            if piece:
                await connection.send(piece)
            await let_it_read()
        if then and case.keeps:
            await connection.read_request()
            await connection.send(PLAIN)
            await let_it_read()

    found: set[tuple[object, int]] = set()
    async with raw_server(script) as server:
        for cut in cuts:  # noqa: B007 - read by the script
            backend = HttpBackend(RouteSettings(name="r", base_url=server.url))
            before = server.connections
            found.add((await outcome(backend), server.connections - before))
            if then:
                # On the same connection where the answer allows that, on a fresh one where it does not.
                again = await outcome(backend) if case.keeps else (200, b'{"second": 1}')
                found.add((again, server.connections - before))
            await backend.aclose()
    return found


async def outcome(backend: HttpBackend) -> tuple[int | None, bytes] | str:
    result = AttemptResult()
    try:
        await backend.invoke(BackendRequest(path="/v1/x", body=RequestBody(b"{}")), result)
    except BackendError as error:
        return error.fault if error.detail else "without a word"
    return result.status, result.body


@pytest.mark.parametrize("case", GOOD.values(), ids=GOOD)
async def test_a_good_answer_is_the_same_wherever_it_is_cut(case: Case) -> None:
    """And so is the next one, on the same connection."""
    found = await outcomes(case, range(len(case.data)), then=True)
    assert found == {(case.outcome, 1), ((200, b'{"second": 1}'), 1)}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
async def test_a_bad_answer_is_the_same_wherever_it_is_cut(case: Case) -> None:
    """It ends the attempt, with the same fault; nothing is sent again."""
    assert await outcomes(case, range(len(case.data) or 1), then=False) == {(case.outcome, 1)}


@pytest.mark.parametrize("case", GOOD.values(), ids=GOOD)
async def test_a_good_answer_that_ends_at_any_byte_is_none(case: Case) -> None:
    """Unless it has no end but that of the connection, and is not packed."""
    for end in range(len(case.data)):
        (found,) = await outcomes(Case(case.data[:end], case.outcome), range(1), then=False)
        head = case.data.find(b"\r\n\r\n") + 4
        if case.data.startswith(OK + b"\r\n") and end >= head:
            assert found == ((200, BODY[: end - head]), 1)
        elif case.data.startswith(OK + b"Content-Encoding: deflate") and end == head:
            assert found == ((200, b""), 1)
        else:
            assert found[0] in {LOST, UNREADABLE}


@pytest.mark.parametrize("name", ["X", "X-" + "y" * 100])
@pytest.mark.parametrize(("over", "expected"), [(0, (200, BODY)), (1, UNREADABLE)])
async def test_headers_have_a_size(name: str, over: int, expected: object) -> None:
    """To the byte, however they are cut; the bytes of informational answers count as well."""
    before = HINTS + OK + name.encode() + b": "
    after = b"\r\nContent-Length: 13\r\n\r\n"
    data = before + b"a" * (MAX_HEAD_BYTES - len(before) - len(after) + over) + after + BODY
    edge = MAX_HEAD_BYTES
    cuts = [0, 1, len(before), 30_000, *range(edge - 4, edge + 5), len(data) - 1]
    assert await outcomes(Case(data, (200, BODY)), iter(cuts), then=False) == {(expected, 1)}


@pytest.mark.parametrize("endless", [b"X: y\r\n", b"x", b"HTTP/1.1 103 X\r\n\r\n"], ids=["headers", "a word", "hints"])
async def test_headers_without_an_end_are_given_up(endless: bytes) -> None:
    """And what came of them is not kept."""

    async def script(connection: Connection) -> None:
        await connection.read_request()
        await connection.send(b"" if endless.startswith(b"HTTP") else OK)
        while True:
            await connection.send(endless * (10_000 // len(endless)))

    async with raw_server(script) as server:
        backend = HttpBackend(RouteSettings(name="r", base_url=server.url))
        assert await outcome(backend) == UNREADABLE
        await backend.aclose()


@pytest.mark.parametrize("endless", [b"X: y\r\n", b"x"], ids=["trailers", "an extension"])
async def test_framing_without_an_end_is_given_up(endless: bytes) -> None:
    """It is no sign of life either."""

    async def script(connection: Connection) -> None:
        await connection.read_request()
        await connection.send(chunks(BODY, end=b"0\r\n" if b":" in endless else b"1;"))
        while True:
            await connection.send(endless * (10_000 // len(endless)))

    async with raw_server(script) as server:
        backend = HttpBackend(RouteSettings(name="r", base_url=server.url))
        assert await outcome(backend) == UNREADABLE
        await backend.aclose()


CASES = [case.data for case in [*GOOD.values(), *BAD.values()] if case.data]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
async def test_whatever_comes_the_attempt_ends_and_the_next_one_is_answered(data: st.DataObject) -> None:
    """Mutated and joined answers in any pieces: an answer or a fault, and no trace of it in the next request."""
    stream = bytearray(b"".join(data.draw(st.lists(st.sampled_from(CASES), min_size=1, max_size=3))))
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(stream) - 1))
        stream[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=4)))
    pieces = [bytes(stream[start:end]) for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]

    async def script(connection: Connection) -> None:
        _, body = await connection.read_request()
        if b"second" in body:
            await connection.send(PLAIN)
            return
        for piece in pieces:
            await connection.send(piece)
            await let_it_read()

    async with raw_server(script) as server:
        backend = HttpBackend(RouteSettings(name="r", base_url=server.url))
        assert await outcome(backend) is not None
        result = AttemptResult()
        await backend.invoke(BackendRequest(path="/v1/x", body=RequestBody(b'{"second": 1}')), result)
        assert result.body == b'{"second": 1}'
        await backend.aclose()
