"""Numbers of a metric gate over real HTTP: the simulated engine's page, a real Prometheus, and what goes wrong."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.certificates import Authority
from tests.support.prometheus import prometheus_scraping
from tests.support.raw_http import Connection, always, answer, raw_server
from tests.support.waiting import eventually
from worker.backends.metric_source import MAX_BYTES, HttpMetricSource
from worker.emulators.openai import SimBackend, SimBackendThread, SimOptions
from worker.errors import MetricSourceError, SettingsError
from worker.settings.schema import RouteSettings

PAGE = answer(b"load 3\n", "content-type: text/plain")
LOAD = {"metric": "load", "whole_at": 0, "closed_at": 4}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


@asynccontextmanager
async def a_source(
    base_url: str = "http://127.0.0.1:9", route: Any = None, **gate: Any
) -> AsyncIterator[HttpMetricSource]:
    """The source of a route's gate, closed at the end."""
    document = {"name": "r", "base_url": base_url, "metric_gate": gate, **(route or {})}
    settings = RouteSettings.model_validate(document)
    source = HttpMetricSource(settings, settings.metric_gate)
    try:
        yield source
    finally:
        await source.aclose()


@pytest.mark.parametrize(("engine", "dialect"), [("vllm", "vllm"), ("sglang", "sglang")])
async def test_an_engines_own_page_is_read(engine: str, dialect: str) -> None:
    """Without any address: that of the server, also where its base URL ends in `/v1`."""
    options = SimOptions.of(dialect=dialect, max_concurrency=2, overload="queue", latency="60s")
    async with SimBackend(options) as sim, aiohttp.ClientSession() as http:
        url = f"{sim.base_url}/v1/chat/completions"
        tasks = [asyncio.ensure_future(http.post(url, json=CHAT)) for _ in range(5)]
        await eventually(lambda: sim.snapshot()["waiting"] == 3)
        for suffix in ("", "/v1"):
            async with a_source(sim.base_url + suffix, type=engine) as source:
                assert list(await source.read()) == [3.0, 1.0]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_the_page_is_read_as_requests_are_sent() -> None:
    """With the route's key and headers; another address gets its own and not those of the route."""
    seen: list[bytes] = []

    async def script(connection: Connection) -> None:
        while True:
            seen.append((await connection.read_request())[0].lower())
            await connection.send(PAGE)

    async with raw_server(script) as server:
        route = {"api_key": "route-key", "headers": {"X-Pool": "batch"}}
        async with a_source(server.url, route, type="metrics", signals=[LOAD]) as source:
            assert list(await source.read()) == [3.0]
        assert seen[0].startswith(b"get /metrics http/1.1\r\n")
        assert b"authorization: bearer route-key\r\n" in seen[0]
        assert b"x-pool: batch\r\n" in seen[0]
        async with a_source(
            "http://unused",
            route,
            type="metrics",
            url=f"{server.url}/federate",
            api_key="gate-key",
            headers={"X-Scope-OrgID": "one"},
            signals=[LOAD],
        ) as source:
            assert list(await source.read()) == [3.0]
        assert seen[1].startswith(b"get /federate http/1.1\r\n")
        assert b"authorization: bearer gate-key\r\n" in seen[1]
        assert b"x-scope-orgid: one\r\n" in seen[1]
        assert b"x-pool" not in seen[1]


async def test_a_certificate_is_checked(tmp_path: Path) -> None:
    """One that `tls.ca_file` has signed is trusted; another is not, and the words say why."""
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    async with raw_server(always(PAGE), authority.server("127.0.0.1")) as server:
        gate = {"type": "metrics", "url": f"{server.url}/metrics", "signals": [LOAD]}
        async with a_source(**gate, tls={"ca_file": str(authority.file)}) as source:
            assert list(await source.read()) == [3.0]
        async with a_source(**gate, tls={"ca_file": str(stranger.file)}) as source:
            with pytest.raises(MetricSourceError, match=r"unreachable.*certificate"):
                await source.read()


async def test_a_key_file_is_needed_at_start_and_read_again(tmp_path: Path) -> None:
    """One that is not there is a fault of the settings."""
    with pytest.raises(SettingsError, match=r"api_key_file: .*: No such file"):
        async with a_source(type="metrics", url="http://m", api_key_file=str(tmp_path / "key"), signals=[LOAD]):
            pass


@pytest.mark.parametrize(
    ("sent", "reason", "words"),
    [
        (answer(b"no", status="404 Not Found"), "refused", "/metrics: status 404"),
        (answer(b"{}", status="302 Found"), "refused", "/metrics: status 302"),
        (answer(b"<html></html>"), "unusable", "there is no metric load"),
        (answer(b"load 1\n", length=100), "unreachable", "/metrics did not answer within 2 s"),
        (b"nonsense\r\n\r\n", "unreachable", "/metrics: "),
    ],
    ids=["not found", "redirect", "another page", "half of it", "no HTTP"],
)
async def test_what_is_no_reading(sent: bytes, reason: str, words: str) -> None:
    """The address and the fault are told."""
    async with raw_server(always(sent)) as server, a_source(server.url, type="metrics", signals=[LOAD]) as source:
        with pytest.raises(MetricSourceError) as caught:
            await source.read()
        assert (caught.value.reason, words in caught.value.detail) == (reason, True), caught.value.detail


async def test_a_server_that_is_away_or_silent_is_unreachable() -> None:
    """Within the gate's own time limit, whatever that of requests is."""
    async with a_source("http://127.0.0.1:9", type="metrics", signals=[LOAD]) as source:
        with pytest.raises(MetricSourceError, match="unreachable"):
            await source.read()

    async def silent(connection: Connection) -> None:
        await connection.wait_closed_by_peer()

    async with (
        raw_server(silent) as server,
        a_source(server.url, type="metrics", signals=[LOAD], timeout_s=0.1) as source,
    ):
        with pytest.raises(MetricSourceError, match=r"did not answer within 0\.1 s"):
            await source.read()


async def test_a_page_without_end_is_cut_off() -> None:
    """It must not fill the memory."""
    line = b"# " + b"x" * 998 + b"\n"
    page = answer(line * (MAX_BYTES // len(line) + 1))
    async with raw_server(always(page)) as server, a_source(server.url, type="metrics", signals=[LOAD]) as source:
        with pytest.raises(MetricSourceError, match="more than 16000000 bytes"):
            await source.read()


async def test_prometheus_is_asked(tmp_path: Path) -> None:
    """A real server that scrapes the simulated engine: one number for each query, and its own words for a wrong one."""
    options = SimOptions.of(dialect="vllm", max_concurrency=2, overload="queue", latency="60s")
    with SimBackendThread(options) as sim, prometheus_scraping(sim.base_url.partition("//")[2], tmp_path) as url:
        queries = [
            'sum(vllm:num_requests_waiting{model_name=~"sim.+"}) or vector(0)',
            "vllm:num_requests_running",
            "scalar(vllm:kv_cache_usage_perc)",
        ]
        signals = [{"query": query, "whole_at": 0, "closed_at": 1} for query in queries]
        async with aiohttp.ClientSession() as http, a_source(type="prometheus", url=url, signals=signals) as source:
            assert list(await source.read()) == [0.0, 0.0, 0.0]
            chat = f"{sim.base_url}/v1/chat/completions"
            tasks = [asyncio.ensure_future(http.post(chat, json=CHAT)) for _ in range(5)]
            numbers: list[float] = []
            while numbers != [3.0, 2.0, 1.0]:
                numbers = list(await source.read())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for query, words in (
            ("sum(", "refused: .*status 400: .*parse error"),
            ("no_such_metric", "the query gives no data"),
            ("{job='engine'}", "series, put sum"),
            ("up[1m]", "the query gives a matrix"),
        ):
            wrong = [{"query": query, "whole_at": 0, "closed_at": 1}]
            async with a_source(type="prometheus", url=url, signals=wrong) as source:
                with pytest.raises(MetricSourceError, match=words):
                    await source.read()
