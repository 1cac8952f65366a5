"""Broken streams of the simulated server on a real connection."""

import errno

import aiohttp
import httpx
import pytest

from tests.support.simulated_openai import STREAM, normal, post, raw, unchunked
from worker.emulators.openai import SimBackend


@pytest.mark.parametrize(
    ("kind", "ended", "tail"),
    [
        ("rst", errno.ECONNRESET, b""),
        ("eof", 0, b"0\r\n\r\n"),
        ("close_eof", 0, b""),
        ("chunk_cut", 0, b"\r\n"),
        ("mid_chunk", 0, b": cut\n"),
        ("bad_chunk", 0, b"zz\r\n"),
    ],
)
async def test_streams_break_on_the_wire(sim: SimBackend, kind: str, ended: int, tail: bytes) -> None:
    """Each break has its own ending, after exactly the wanted bytes of the body."""
    whole = unchunked((await raw(sim))[0])
    await sim.control({"mode": "stream", "break": kind, "after_bytes": 300})
    received, how = await raw(sim)
    assert (how, received.endswith(tail)) == (ended, True)
    head, _, body = received.partition(b"\r\n\r\n")
    assert (b"chunked" in head) is (kind != "close_eof")
    sent = body if kind == "close_eof" else unchunked(received)
    assert normal(sent)[:200] == normal(whole)[:200]
    assert len(sent) == 300
    assert sim.stats.by_status["cut"] == 1


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("rst", httpx.ReadError),
        ("chunk_cut", httpx.RemoteProtocolError),
        ("mid_chunk", httpx.RemoteProtocolError),
        ("bad_chunk", httpx.RemoteProtocolError),
    ],
)
async def test_clients_notice_broken_streams(sim: SimBackend, kind: str, error: type[Exception]) -> None:
    """A client reads the beginning and then gets an error; the next request is served."""
    await sim.control({"mode": "stream", "break": kind, "after_events": 3, "count": 1})
    received = b""
    async with httpx.AsyncClient() as client:
        with pytest.raises(error):  # noqa: PT012 - the beginning counts too
            async with client.stream("POST", sim.base_url + "/v1/chat/completions", json=STREAM) as response:
                async for part in response.aiter_raw():
                    received += part
        assert received.count(b"data: {") == 3
        whole = await client.post(sim.base_url + "/v1/chat/completions", json=STREAM)
    assert "[DONE]" in whole.text


async def test_silent_streams(sim: SimBackend, http: aiohttp.ClientSession) -> None:
    """`eof` and `close_eof` end without any error of HTTP, so only the protocol shows that something is missing."""
    for kind in ("eof", "close_eof"):
        await sim.control({"mode": "stream", "break": kind, "after_events": 3})
        status, body, _ = await post(http, sim, STREAM)
        assert (status, body.count(b"data: "), b"[DONE]" in body) == (200, 3, False)


@pytest.mark.parametrize("kind", ["idle", "comments"])
async def test_stalled_streams_wait_for_the_client(sim: SimBackend, http: aiohttp.ClientSession, kind: str) -> None:
    """A stalled stream lasts until the client gives up, with or without comments; its tokens are undelivered."""
    await sim.control({"mode": "stream", "break": kind, "after_events": 3, "comment_every_s": 0.01})
    async with http.post(sim.base_url + "/v1/chat/completions", json=STREAM) as response:
        seen = b""
        while seen.count(b"data: ") < 3 or (kind == "comments" and seen.count(b": keep-alive\n\n") < 3):
            seen += await response.content.readany()
    await sim.stats.wait_for(lambda stats: stats.in_flight == 0)
    assert (sim.stats.client_disconnects, sim.stats.tokens_undelivered) == (1, 2)


async def test_stalled_streams_can_go_on(sim: SimBackend, http: aiohttp.ClientSession) -> None:
    """After `idle_s` the rest of the stream comes and it counts as completed."""
    await sim.control({"mode": "stream", "break": "comments", "idle_s": 0.05, "comment_every_s": 0.01})
    body = (await post(http, sim, STREAM))[1]
    assert (body.count(b": keep-alive") > 1, b"[DONE]" in body) == (True, True)
    assert sim.snapshot()["generations"]["completed"] == 1
