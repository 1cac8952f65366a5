"""Every fault of the simulated server as a client sees it, and the control plane that orders them."""

import asyncio
import errno
import json
import socket
from typing import Any

import aiohttp
import pytest

from tests.support.simulated_openai import CHAT, STREAM, post, raw
from tests.support.waiting import eventually
from worker.emulators.openai import SimBackend


@pytest.mark.parametrize(
    ("document", "status", "part"),
    [
        ({"mode": "outage_5xx"}, 500, b'"error"'),
        ({"mode": "outage_5xx", "status": 504, "message": "late"}, 504, b'"late"'),
        ({"mode": "html_502"}, 502, b"<html>"),
        ({"mode": "html_502", "status": 504}, 504, b"Gateway Time-out"),
        ({"mode": "empty_200"}, 200, b""),
        ({"mode": "not_ready"}, 503, b"Loading model"),
        ({"mode": "overloaded"}, 503, b"overloaded"),
        ({"mode": "rate_limit"}, 429, b"rate_limit_exceeded"),
        ({"mode": "quota"}, 429, b"insufficient_quota"),
        ({"mode": "quota", "status": 402}, 402, b"insufficient_quota"),
        ({"mode": "unauthorized"}, 401, b"invalid_api_key"),
        ({"mode": "forbidden"}, 403, b"error"),
        ({"mode": "model_not_found"}, 404, b"The model `m` does not exist."),
        ({"mode": "content_filter"}, 400, b"content_policy_violation"),
        ({"mode": "context_length"}, 400, b"context_length_exceeded"),
        ({"mode": "raw", "status": 418, "body": "tea", "content_type": "text/plain"}, 418, b"tea"),
        ({"mode": "half_json"}, 200, b"chat.completion"),
        ({"mode": "nan_json"}, 200, b'"score":NaN'),
        ({"mode": "json_array"}, 200, b"[{"),
        ({"mode": "empty_choices"}, 200, b'"choices":[]'),
        ({"mode": "abort"}, 200, b'"finish_reason":"abort"'),
        ({"mode": "say", "text": "insufficient_quota\u2028"}, 200, "insufficient_quota\u2028".encode()),
        ({"mode": "slow_first_byte", "delay_s": 0.02}, 200, b"chat.completion"),
        ({"mode": "slow_body", "delay_s": 0.02}, 200, b"chat.completion"),
    ],
)
async def test_answers_of_the_modes(
    sim: SimBackend, http: aiohttp.ClientSession, document: dict[str, Any], status: int, part: bytes
) -> None:
    """Each mode sends its status and body over a working connection, once if it is told so, and is counted."""
    await sim.control({**document, "count": 1})
    found, body, _ = await post(http, sim)
    assert (found, part in body) == (status, True)
    assert sim.stats.by_mode == {document["mode"]: 1}
    assert (await post(http, sim))[0] == 200


@pytest.mark.parametrize("document", [{"mode": "half_json"}, {"mode": "nan_json"}, {"mode": "empty_200"}])
async def test_spoilt_bodies_are_whole_http_and_no_json(
    sim: SimBackend, http: aiohttp.ClientSession, document: dict[str, Any]
) -> None:
    """The HTTP of these answers is right; a strict JSON parser refuses them."""
    await sim.control(document)
    _, body, _ = await post(http, sim)
    with pytest.raises(ValueError, match=r"NaN|Expecting|Unterminated"):
        json.loads(body, parse_constant=lambda name: pytest.fail(name) if name == "x" else float(name + "!"))


async def test_hints_are_sent_in_the_wanted_form(sim: SimBackend, http: aiohttp.ClientSession) -> None:
    """429 comes with seconds, a date, milliseconds or nothing."""
    seen = []
    for hint in (3, "date:30s", "ms:1500ms", None):
        await sim.control({"mode": "rate_limit", "retry_after": hint})
        headers = (await post(http, sim))[2]
        seen.append((headers.get("Retry-After", ""), headers.get("retry-after-ms")))
    assert seen[0] == ("3", None)
    assert seen[1][0].endswith("GMT")
    assert seen[2:] == [("", "1500"), ("", None)]


async def test_bodies_cut_below_their_length(sim: SimBackend, http: aiohttp.ClientSession) -> None:
    """`truncated_json` announces the whole length and closes early; the answer counts as not delivered."""
    await sim.control({"mode": "truncated_json", "after_bytes": 20})
    with pytest.raises(aiohttp.ClientPayloadError):
        await post(http, sim)
    received, ended = await raw(sim, CHAT)
    assert (len(received.partition(b"\r\n\r\n")[2]), ended) == (20, 0)
    assert sim.snapshot()["generations"]["completed"] == 0
    assert (sim.stats.by_status["cut"], sim.stats.tokens_undelivered > 0) == (2, True)


async def test_lies_about_gzip(sim: SimBackend, http: aiohttp.ClientSession) -> None:
    """`bad_gzip` cannot be unpacked."""
    await sim.control({"mode": "bad_gzip"})
    with pytest.raises(aiohttp.ClientPayloadError, match="gzip"):
        await post(http, sim)


async def test_oversize_answers(sim: SimBackend, http: aiohttp.ClientSession) -> None:
    """Answers can be larger than any broker carries, streamed and not, for embeddings too."""
    await sim.control({"mode": "oversize", "bytes": 11_000_000})
    for body in (CHAT, STREAM):
        assert len((await post(http, sim, body))[1]) > 11_000_000
    embed = {"model": "m", "input": "x"}
    async with http.post(sim.base_url + "/v1/embeddings", json=embed) as response:
        assert len(await response.read()) > 11_000_000


@pytest.mark.parametrize(("mode", "ended"), [("reset", errno.ECONNRESET), ("close", 0)])
async def test_connections_end_without_an_answer(sim: SimBackend, mode: str, ended: int) -> None:
    """`reset` is a TCP reset, `close` an orderly end, both without a byte."""
    await sim.control({"mode": mode})
    assert await raw(sim) == (b"", ended)


async def test_a_hanging_request_waits_for_its_client(sim: SimBackend, http: aiohttp.ClientSession) -> None:
    """`hang` never answers; a client that gives up is counted, a reset of the server ends the rest."""
    await sim.control({"mode": "hang"})
    tasks = [asyncio.ensure_future(post(http, sim)) for _ in range(2)]
    await sim.stats.wait_for(lambda stats: stats.in_flight == 2)
    tasks[0].cancel()
    await sim.stats.wait_for(lambda stats: stats.in_flight == 1)
    await sim.reset(["behaviours"])
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await tasks[1]
    assert (sim.stats.client_disconnects, dict(sim.stats.by_status)) == (1, {"disconnected": 1, "hung": 1})
    assert (await post(http, sim))[0] == 200


async def test_a_hang_can_end_by_itself(sim: SimBackend, http: aiohttp.ClientSession) -> None:
    """After `hang_s` the connection closes without an answer."""
    await sim.control({"mode": "hang", "hang_s": 0.01})
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await post(http, sim)


async def test_the_port_refuses_and_comes_back(sim: SimBackend, http: aiohttp.ClientSession) -> None:
    """While it refuses, connections fail, requests in flight are reset, control still answers, the port stays the same."""
    url = sim.base_url
    await sim.control({"mode": "hang"})
    caught = asyncio.ensure_future(post(http, sim))
    await sim.stats.wait_for(lambda stats: stats.in_flight == 1)
    async with http.post(sim.control_url + "/sim/control", json={"mode": "refuse"}) as response:
        assert (response.status, (await response.json())["listening"]) == (200, False)
    with pytest.raises(aiohttp.ClientError):
        await caught
    for _ in range(3):
        with pytest.raises(aiohttp.ClientConnectorError) as raised:
            await post(http, sim)
        assert raised.value.os_error.errno == errno.ECONNREFUSED
    with socket.socket() as thief, pytest.raises(OSError, match="in use"):
        thief.bind(("127.0.0.1", int(url.rsplit(":", 1)[1])))
    async with http.get(sim.control_url + "/sim/stats") as response:
        assert (await response.json())["listening"] is False
    async with http.post(sim.control_url + "/sim/control", json={"mode": "ok"}) as response:
        assert response.status == 200
    assert (await post(http, sim))[0] == 200
    assert (sim.base_url, dict(sim.stats.by_status)) == (url, {"reset": 1, "200": 1})


async def test_a_refusal_ordered_through_the_refused_port(sim: SimBackend, http: aiohttp.ClientSession) -> None:
    """The order is answered before its own connection ends, and the end of `for_s` opens the port again."""
    async with http.post(sim.base_url + "/sim/control", json={"mode": "refuse", "for_s": 0.2}) as response:
        assert (response.status, (await response.json())["listening"]) == (200, False)
    with pytest.raises(aiohttp.ClientConnectorError):
        await post(http, sim)
    await eventually(lambda: sim.is_listening)
    assert (await post(http, sim))[0] == 200


async def test_a_refusal_can_spare_connections(sim: SimBackend, http: aiohttp.ClientSession) -> None:
    """With `keep` an open connection is served on while new ones are refused."""
    await post(http, sim)
    await sim.control({"mode": "refuse", "connections": "keep"})
    assert (await post(http, sim))[0] == 200
    with pytest.raises(OSError, match=r"refused|Connect call failed"):
        await asyncio.open_connection(*sim.base_url.removeprefix("http://").split(":"))


async def test_filters_choose_the_victims(sim: SimBackend, http: aiohttp.ClientSession) -> None:
    """A behaviour hits only the requests its filters name."""
    await sim.control({"mode": "outage_5xx", "match": {"model": "bad-*", "metadata": {"batch": "7"}}})
    victims = [{}, {"model": "bad-1"}, {"model": "bad-1", "metadata": {"batch": "17"}}]
    assert [(await post(http, sim, {**CHAT, **change}))[0] for change in victims] == [200, 200, 500]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "part"),
    [
        ("GET", "/sim/control", None, 200, "behaviours"),
        ("POST", "/sim/control", b'{"mode": "hang", "countt": 3}', 400, "countt"),
        ("POST", "/sim/control", b"{", 400, "not JSON"),
        ("POST", "/sim/control", b"", 400, "JSON object"),
        ("DELETE", "/sim/control", None, 405, "GET or POST"),
        ("POST", "/sim/stats", b"{}", 405, "GET"),
        ("GET", "/sim/stats", None, 200, "requests"),
        ("POST", "/sim/reset", b"", 200, "listening"),
        ("POST", "/sim/reset", b'{"only": ["stats"]}', 200, "listening"),
        ("POST", "/sim/reset", b'{"only": ["everything"]}', 400, "everything"),
        ("POST", "/sim/reset", b'{"all": true}', 400, "all"),
        ("GET", "/sim/unknown", None, 404, "/sim/control"),
        ("GET", "/v1/models", None, 404, "/sim/control"),
    ],
)
async def test_the_control_plane(  # noqa: PLR0917
    sim: SimBackend, http: aiohttp.ClientSession, method: str, path: str, body: bytes | None, status: int, part: str
) -> None:
    """Orders are checked and answered with JSON on both ports; the control port serves nothing else."""
    for url in (sim.control_url, sim.base_url):
        if url == sim.base_url and not path.startswith("/sim/"):
            continue
        async with http.request(method, url + path, data=body) as response:
            text = await response.text()
            assert (response.status, part in text) == (status, True)
            json.loads(text)
    assert sim.state()["behaviours"] == []


async def test_a_reset_can_leave_parts_alone(sim: SimBackend, http: aiohttp.ClientSession) -> None:
    """`only` resets what it names; without it everything is as at the start."""
    await sim.control({"mode": "rate_limit", "settings": {"seed": 5}})
    await post(http, sim)
    await sim.reset(["stats"])
    assert (sim.stats.requests, len(sim.state()["behaviours"])) == (0, 1)
    await sim.reset(["behaviours"])
    assert (sim.state()["behaviours"], sim.state()["settings"]["seed"]) == ([], 5)
    await sim.reset()
    assert sim.state()["settings"]["seed"] == 0
