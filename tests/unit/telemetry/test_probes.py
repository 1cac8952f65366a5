"""The worker's HTTP port, asked over real sockets."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from prometheus_client import CollectorRegistry

from tests.support.raw_http import until
from worker.errors import SettingsError
from worker.telemetry.metrics import Metrics
from worker.telemetry.probes import MAX_HEAD_BYTES, STALE_AFTER_S, Probes


class Party:
    """Probes on a free port, with what they look at."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.details: dict[str, Any] = {"ready": True}
        self.now = 1000.0
        self.scrapes = 0
        self.probes = Probes(
            registry or CollectorRegistry(), lambda: dict(self.details), lambda: self.now, on_scrape=self._count
        )
        self.url = ""
        self.session: aiohttp.ClientSession | None = None

    def _count(self) -> None:
        self.scrapes += 1

    async def get(self, path: str, **headers: str) -> tuple[int, str, str]:
        assert self.session is not None
        async with self.session.get(self.url + path, headers=headers) as response:
            return response.status, response.headers["content-type"], await response.text()

    async def get_json(self, path: str) -> tuple[int, Any]:
        status, content_type, text = await self.get(path)
        assert content_type.startswith("application/json")
        return status, json.loads(text)


@pytest.fixture
async def party() -> AsyncIterator[Party]:
    """Started probes that consider themselves started."""
    found = Party(Metrics().registry)
    found.url = f"http://127.0.0.1:{await found.probes.start('127.0.0.1', 0)}"
    found.probes.startup_failure = None
    async with aiohttp.ClientSession() as found.session:
        yield found
    await found.probes.aclose()


async def test_a_healthy_worker_answers_ok(party: Party) -> None:
    """Every probe is 200 with status ok; readiness shows the details it was given."""
    party.details = {"ready": True, "subscription_open": True, "backends": {"default": "closed"}}
    assert await party.get_json("/livez") == (200, {"status": "ok", "heartbeat_age_s": 0.0})
    assert await party.get_json("/readyz") == (
        200,
        {"status": "ok", "subscription_open": True, "backends": {"default": "closed"}},
    )
    assert await party.get_json("/startupz") == (200, {"status": "ok"})


async def test_before_it_has_started_it_is_alive_but_not_ready(party: Party) -> None:
    """Startup says in one line what is missing; liveness does not care."""
    party.probes.startup_failure = "the topic projects/p/topics/t does not exist"
    assert await party.get_json("/startupz") == (
        503,
        {"status": "failing", "reason": "the topic projects/p/topics/t does not exist"},
    )
    assert (await party.get_json("/readyz"))[0] == 503
    assert (await party.get_json("/livez"))[0] == 200


def test_it_begins_as_starting() -> None:
    """It is not reported as started before it has."""
    assert Party().probes.startup_failure == "starting"


async def test_not_ready_is_503_with_its_details(party: Party) -> None:
    """Draining or without a stream; liveness and startup stay."""
    party.details = {"ready": False, "draining": True}
    assert await party.get_json("/readyz") == (503, {"status": "failing", "draining": True})
    assert (await party.get_json("/startupz"))[0] == 200
    assert (await party.get_json("/livez"))[0] == 200


async def test_a_loop_that_did_not_turn_is_not_alive(party: Party) -> None:
    """The heart beats on the loop; without a beat for a minute it counts as stuck."""
    assert party.probes._heart is not None
    party.probes._heart.cancel()
    party.now += STALE_AFTER_S - 1
    assert (await party.get_json("/livez"))[0] == 200
    party.now += 1
    assert await party.get_json("/livez") == (503, {"status": "failing", "heartbeat_age_s": STALE_AFTER_S})


async def test_the_heart_beats(party: Party, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turning loop renews the beat."""
    monkeypatch.setattr("worker.telemetry.probes.HEARTBEAT_S", 0.0)
    await party.probes.aclose()
    await party.probes.start("127.0.0.1", 0)
    party.now += 3600
    await until(lambda: party.probes._beat_at == party.now)


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [("", "text/plain"), ("application/openmetrics-text; version=1.0.0", "application/openmetrics-text")],
)
async def test_metrics_come_in_the_format_asked_for(party: Party, accept: str, content_type: str) -> None:
    """Prometheus' text format, or OpenMetrics for who asks."""
    status, found, text = await party.get("/metrics", accept=accept)
    assert (status, found.startswith(content_type)) == (200, True)
    assert "inference_worker_in_flight 0.0" in text
    assert party.scrapes == 1
    assert text.endswith("# EOF\n") is (content_type != "text/plain")


async def test_details_that_fail_are_500_not_ready(party: Party) -> None:
    """A fault of our own in the details never looks like readiness."""
    party.details = {}
    assert (await party.get("/readyz"))[0] == 500


@pytest.mark.parametrize("path", ["/", "/live", "/livez/", "/metrics/x"])
async def test_other_paths_do_not_exist(party: Party, path: str) -> None:
    """Four paths, no more."""
    assert (await party.get(path))[0] == 404


async def test_writing_is_not_allowed(party: Party) -> None:
    """Probes only answer."""
    assert party.session is not None
    async with party.session.post(party.url + "/livez") as response:
        assert response.status == 405


async def exchange(party: Party, sent: bytes) -> bytes:
    """Send bytes and return all that comes until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(party.url.rsplit(":", 1)[1]))
    writer.write(sent)
    try:
        return await reader.read()
    finally:
        writer.close()


async def test_a_query_and_the_headers_case_change_nothing(party: Party) -> None:
    """Scrapers add parameters; HTTP knows no case of header names."""
    answer = await exchange(party, b"GET /metrics?name=x HTTP/1.1\r\nHost: h\r\nACCEPT:text/plain\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"inference_worker_in_flight 0.0" in answer


async def test_a_head_request_gets_the_head_alone(party: Party) -> None:
    """With the length of what GET would bring."""
    whole, head = [await exchange(party, b"%s /livez HTTP/1.1\r\n\r\n" % method) for method in (b"GET", b"HEAD")]
    assert head == whole[: len(head)]
    assert head.endswith(b"\r\nconnection: close\r\n\r\n")


async def test_one_request_a_connection(party: Party) -> None:
    """The response says so, and what follows the request is not answered."""
    answer = await exchange(party, b"GET /livez HTTP/1.1\r\n\r\n" * 2)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in answer


@pytest.mark.parametrize(
    "sent", [b"", b"GET /livez HTTP/1.1\r\n", b"a" * 2 * MAX_HEAD_BYTES], ids=["nothing", "half", "too much"]
)
async def test_what_is_no_request_is_not_answered(party: Party, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection ends, and the others are served."""
    monkeypatch.setattr("worker.telemetry.probes.REQUEST_S", 0.05)
    try:
        assert await exchange(party, sent) == b""
    except ConnectionResetError:  # closed with bytes that were not read
        assert len(sent) > MAX_HEAD_BYTES
    assert (await party.get_json("/livez"))[0] == 200


async def test_closing_ends_connections_that_say_nothing(party: Party) -> None:
    """A client that only connects does not keep the process."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(party.url.rsplit(":", 1)[1]))
    assert (await party.get_json("/livez"))[0] == 200  # and so the first connection was accepted
    await party.probes.aclose()
    assert await reader.read() == b""
    writer.close()


async def test_many_scrapes_at_once(party: Party) -> None:
    """Probes and scrapers come together."""
    answers = await asyncio.gather(*(party.get("/metrics") for _ in range(50)))
    assert {status for status, *_ in answers} == {200}


async def test_a_port_in_use_is_an_unusable_setting(party: Party) -> None:
    """The operator is told which address; nothing is left open."""
    other = Party()
    port = int(party.url.rsplit(":", 1)[1])
    with pytest.raises(SettingsError, match=rf"http.port: cannot listen on 127.0.0.1:{port}: .*[Aa]ddress") as caught:
        await other.probes.start("127.0.0.1", port)
    assert len(caught.value.faults) == 1
    await other.probes.aclose()


async def test_an_unknown_host_is_an_unusable_setting() -> None:
    """A name that does not resolve is no address to listen on."""
    other = Party()
    with pytest.raises(SettingsError, match=r"cannot listen on nowhere\.invalid:0: \S+"):
        await other.probes.start("nowhere.invalid", 0)
    await other.probes.aclose()


async def test_closing_ends_listening_and_may_be_repeated(party: Party) -> None:
    """After closing no server answers, and no task is left."""
    await party.probes.aclose()
    await party.probes.aclose()
    with pytest.raises(aiohttp.ClientConnectionError):
        await party.get("/livez")
    assert party.probes._heart is None


async def test_closing_before_starting_is_harmless() -> None:
    """A start that failed earlier elsewhere still closes everything."""
    await Party().probes.aclose()
