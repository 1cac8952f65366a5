"""The simulated server over real HTTP: answers, identities, limits, lifecycle."""

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from worker.emulators.openai import SimBackend, SimBackendThread, SimOptions
from worker.emulators.openai.transport import Sender

USER = {"role": "user", "content": "hello"}
CHAT = {"model": "m", "messages": [USER]}


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A client that keeps connections."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
        yield session


def a_server(**settings: Any) -> SimBackend:
    """Return a server with settings as people write them."""
    return SimBackend(SimOptions.of(**settings))


async def post(
    http: aiohttp.ClientSession, sim: SimBackend, body: Any = CHAT, path: str = "/v1/chat/completions", **headers: str
) -> tuple[int, Any, Any]:
    """Return status, decoded JSON and headers of one request."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    sent = {"data": body} if isinstance(body, io.BytesIO) else {"json": body}
    async with http.post(sim.base_url + path, **sent, headers=named) as response:
        text = await response.text()
        return response.status, json.loads(text) if text else None, response.headers


@pytest.mark.parametrize(
    ("path", "body", "prefix"),
    [
        ("/v1/chat/completions", CHAT, "chatcmpl-"),
        ("/v1/completions", {"model": "m", "prompt": "x"}, "cmpl-"),
        ("/v1/responses", {"model": "m", "input": "x"}, "resp_"),
    ],
)
async def test_the_request_id_becomes_the_answers_id(
    http: aiohttp.ClientSession, path: str, body: dict[str, Any], prefix: str
) -> None:
    """`X-Request-Id` is the id of the answer and comes back as a header; without one the server makes one."""
    async with a_server() as sim:
        status, answer, headers = await post(http, sim, body, path, X_Request_Id='job-7"1')
        assert (status, answer["id"], headers["x-request-id"]) == (200, prefix + 'job-7"1', 'job-7"1')
        _, answer, headers = await post(http, sim, body, path)
        assert answer["id"] == prefix + headers["x-request-id"]


async def test_the_answer_depends_on_seed_and_body(http: aiohttp.ClientSession) -> None:
    """Two servers with one seed give the same text, another seed or another body another."""
    texts = []
    for seed, content in ((1, "a"), (1, "a"), (2, "a"), (1, "b")):
        async with a_server(seed=seed) as sim:
            _, answer, _ = await post(http, sim, {"model": "m", "messages": [{"role": "user", "content": content}]})
            texts.append(answer["choices"][0]["message"]["content"])
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


async def test_paths_and_methods(http: aiohttp.ClientSession) -> None:
    """Health and models answer GET, inference paths POST; others are 405 and 404."""
    async with a_server(models="a,b") as sim:
        found = {}
        for method, path in [("GET", "/health"), ("GET", "/v1/models"), ("GET", "/v1/models/b"), ("GET", "/v1/models/c"),
                             ("GET", "/v1/completions"), ("POST", "/v1/models"), ("POST", "/v1/images")]:  # fmt: skip
            async with http.request(method, sim.base_url + path) as response:
                found[path, method] = (
                    response.status,
                    (await response.json()).get("object"),
                    response.headers.get("Allow"),
                )
    assert list(found.values()) == [
        (200, None, None), (200, "list", None), (200, "model", None), (404, None, None),
        (405, None, "POST"), (405, None, "GET"), (404, None, None),
    ]  # fmt: skip


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff"])
async def test_bodies_that_are_not_json_objects(http: aiohttp.ClientSession, data: bytes) -> None:
    """They get a 400 in OpenAI's shape and the connection stays usable."""
    async with a_server() as sim:
        async with http.post(sim.base_url + "/v1/completions", data=data) as response:
            assert (response.status, "error" in await response.json()) == (400, True)
        assert (await post(http, sim))[0] == 200


async def test_bodies_of_ten_megabytes(http: aiohttp.ClientSession) -> None:
    """The largest message Pub/Sub carries is read; its prompt does not fit the window unless that is as large."""
    body = {"model": "m", "messages": [{"role": "user", "content": "x" * 10_000_000}]}
    data = json.dumps(body).encode()
    async with a_server() as sim:
        status, answer, _ = await post(http, sim, io.BytesIO(data))
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        await sim.control({"settings": {"context_window": 3_000_000}})
        assert (await post(http, sim, io.BytesIO(data)))[1]["usage"]["prompt_tokens"] > 2_000_000


async def test_too_large_bodies_are_refused(http: aiohttp.ClientSession) -> None:
    """Above 64 MiB the answer is 413 in the dialect's shape."""
    async with a_server() as sim:
        status, answer, _ = await post(http, sim, io.BytesIO(b"x" * (65 << 20)))
        assert (status, "error" in answer) == (413, True)


async def test_a_client_that_is_gone_when_the_answer_is_ready_leaves_no_traceback(
    http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is counted, and the person at the terminal reads nothing about it."""
    write = Sender._write

    def to_a_client_that_left(sender: Sender, data: bytes) -> None:
        transport = sender._request.transport
        assert transport is not None
        transport.abort()
        write(sender, data)

    monkeypatch.setattr(Sender, "_write", to_a_client_that_left)
    async with a_server() as sim:
        with pytest.raises(aiohttp.ClientConnectionError):
            await post(http, sim)
        await sim.stats.wait_for(lambda stats: stats.in_flight == 0)
        assert sim.stats.client_disconnects == 1
    assert not caplog.records


async def test_above_max_concurrency_requests_are_rejected(http: aiohttp.ClientSession) -> None:
    """With `reject` the surplus gets the chosen status and hint at once; those in service are not disturbed."""
    async with a_server(max_concurrency=2, latency="60s", overload_status=503, retry_after="7") as sim:
        held = [asyncio.ensure_future(post(http, sim)) for _ in range(2)]
        await sim.stats.wait_for(lambda stats: stats.in_flight == 2)
        status, _, headers = await post(http, sim)
        assert (status, headers["Retry-After"], sim.stats.in_flight) == (503, "7", 2)
        for task in held:
            task.cancel()
        await sim.stats.wait_for(lambda stats: stats.in_flight == 0)
        assert (sim.stats.client_disconnects, sim.stats.peak_in_flight) == (2, 3)
        await sim.control({"settings": {"latency": "0", "error_rate": 1}})
        assert [(await post(http, sim))[0] for _ in range(3)] == [500] * 3
        assert sim.snapshot()["in_service"] == 0


async def test_above_max_concurrency_requests_wait(http: aiohttp.ClientSession) -> None:
    """With `queue` the surplus waits, a full queue rejects, and a higher limit lets the waiting ones in."""
    async with a_server(max_concurrency=1, overload="queue", max_queue=2, latency="60s") as sim:
        tasks = [asyncio.ensure_future(post(http, sim)) for _ in range(3)]
        await sim.stats.wait_for(lambda stats: stats.in_flight == 3)
        assert (sim.snapshot()["in_service"], sim.snapshot()["waiting"]) == (1, 2)
        assert (await post(http, sim))[0] == 429
        await sim.control({"settings": {"latency": "0", "max_concurrency": 3}})
        assert (sim.snapshot()["in_service"], sim.snapshot()["waiting"]) == (3, 0)
        for task in tasks:
            task.cancel()


async def test_the_rate_limit_says_when_to_come_back(http: aiohttp.ClientSession) -> None:
    """Above the rate the answer is 429 with the real wait; other limits are not consulted."""
    async with a_server(rate="0.5/s", retry_after="auto") as sim:
        assert (await post(http, sim))[0] == 200
        status, answer, headers = await post(http, sim)
        assert (status, answer["error"]["code"], headers["Retry-After"]) == (429, "rate_limit_exceeded", "2")


async def test_the_hidden_capacity_slows_and_refuses(http: aiohttp.ClientSession) -> None:
    """Above the knee answers take longer in proportion, above the limit they are refused."""
    async with a_server(capacity="1/3", latency="60ms") as sim:
        begun_s = time.monotonic()
        results = await asyncio.gather(*(post(http, sim, {**CHAT, "user": str(n)}) for n in range(4)))
        assert sorted(status for status, _, _ in results) == [200, 200, 200, 429]
        assert 0.175 < time.monotonic() - begun_s < 2


async def test_keys_are_required_and_rotated(http: aiohttp.ClientSession) -> None:
    """A wrong key is a 401 until it is the right one; health needs none; both header forms count."""
    async with a_server(api_key="old") as sim:
        assert (await post(http, sim))[0] == 401
        assert (await post(http, sim, Authorization="Bearer old"))[0] == 200
        await sim.control({"settings": {"api_key": "new"}})
        statuses = [(await post(http, sim, Authorization=f"Bearer {key}"))[0] for key in ("old", "new")]
        assert statuses == [401, 200]
        assert (await post(http, sim, api_key="new"))[0] == 200
        async with http.get(sim.base_url + "/health") as response:
            assert response.status == 200


async def test_errors_by_chance_can_succeed_when_repeated(http: aiohttp.ClientSession) -> None:
    """The share of errors is as set, and each repeat of a body is drawn anew."""
    async with a_server(error_rate=0.5) as sim:
        statuses = [(await post(http, sim))[0] for _ in range(60)]
    assert set(statuses) == {200, 500}
    assert 15 < statuses.count(500) < 45


async def test_azures_paths_are_served(http: aiohttp.ClientSession) -> None:
    """A deployment's path with a version behind it reaches the model of that name."""
    async with a_server(dialect="azure") as sim:
        path = "/openai/deployments/gpt-mini/chat/completions?api-version=2026-01-01"
        status, answer, _ = await post(http, sim, {"messages": [USER]}, path)
        assert (status, answer["model"], "prompt_filter_results" in answer) == (200, "gpt-mini", True)


async def test_latency_is_waited_for_and_paced(http: aiohttp.ClientSession) -> None:
    """A stream's first event comes at `ttft`, its last when the tokens are generated; a unary answer as late as that."""
    settings = {"ttft": "50ms", "tokens_per_s": 200, "answer_tokens": 20}
    async with a_server(**settings) as sim:
        begun_s = time.monotonic()
        await post(http, sim)
        assert time.monotonic() - begun_s >= 0.1
        begun_s = time.monotonic()
        moments: list[float] = []
        async with http.post(sim.base_url + "/v1/chat/completions", json={**CHAT, "stream": True}) as response:
            moments += [time.monotonic() - begun_s async for line in response.content if line.startswith(b"data: ")]
    assert moments[0] >= 0.05
    assert moments[-1] >= 0.1
    assert len({round(moment, 3) for moment in moments}) > 5


async def test_repeats_are_counted(http: aiohttp.ClientSession) -> None:
    """The same request id and the same body are counted as repeats, and the second generation as wasted."""
    async with a_server() as sim:
        for request_id in ("a", "a", "b"):
            await post(http, sim, X_Request_Id=request_id)
        async with http.get(sim.control_url + "/sim/stats?series=1") as response:
            stats = await response.json()
    assert stats["request_ids"]["most_repeated"] == {"a": 2}
    assert (stats["bodies"]["repeats"], stats["generations"]["wasted"]) == (2, 2)
    assert sum(second.get("200", 0) for second in stats["series"]) == 3


async def test_zero_cost_answers_every_path(http: aiohttp.ClientSession) -> None:
    """Prepared answers have the request's id and a right length, and the counters still count."""
    async with a_server(zero_cost=True) as sim:
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"):
            status, answer, _ = await post(http, sim, {"anything": 1}, path, X_Request_Id="job-9")
            assert (status, answer.get("id", "job-9").endswith("job-9")) == (200, True)
        assert (sim.stats.requests, sim.stats.by_status["200"]) == (4, 4)
        await sim.control({"mode": "outage_5xx"})
        assert (await post(http, sim))[0] == 500


async def test_stop_lets_go_of_everything(http: aiohttp.ClientSession) -> None:
    """Stopping resets requests in flight, frees both ports, may be repeated, and the server may start again."""
    sim = a_server(latency="60s")
    await sim.start()
    url = sim.base_url
    task = asyncio.ensure_future(post(http, sim))
    await sim.stats.wait_for(lambda stats: stats.in_flight == 1)
    await sim.stop()
    await sim.stop()
    with pytest.raises(aiohttp.ClientError):
        await task
    assert (sim.stats.in_flight, sim.stats.client_disconnects, sim.is_listening) == (0, 0, False)
    with pytest.raises(aiohttp.ClientConnectorError):
        await http.get(url)
    with pytest.raises(RuntimeError, match="not running"):
        _ = sim.base_url
    await sim.start()
    await sim.stop()


async def test_ports_that_are_taken() -> None:
    """A taken port is an error; a taken control port is one only if it was asked for."""
    async with a_server() as first:
        port = int(first.base_url.rsplit(":", 1)[1])
        with pytest.raises(OSError, match="in use"):
            await SimBackend(SimOptions(), port=port).start()
        with pytest.raises(OSError, match="in use"):
            await a_server(control_port=port).start()
        with pytest.raises(OSError, match="in use"), SimBackendThread(port=port):
            pass


def test_a_server_on_a_thread_needs_no_loop_of_its_caller() -> None:
    """A caller without an event loop directs, asks and resets the server."""
    with SimBackendThread(SimOptions.of(seed=3)) as sim:
        assert sim.control({"mode": "hang"})["behaviours"][0]["mode"] == "hang"
        sim.reset()
        assert (sim.snapshot()["requests"], sim.base_url.startswith("http://127.0.0.1:")) == (0, True)
    with pytest.raises(RuntimeError, match="not running"):
        sim.snapshot()


async def test_a_cached_prefix_is_not_computed_again(http: aiohttp.ClientSession) -> None:
    """It stands in the usage, in the statistics and on the page of metrics, and saves the time of its tokens."""
    text = "one document " * 400

    def about(question: str) -> dict[str, Any]:
        return {"model": "m", "messages": [{"role": "user", "content": text + question}]}

    async with a_server(prefix_cache=10_000, prompt_tokens_per_s=4000) as sim:
        began = time.monotonic()
        _, first, _ = await post(http, sim, about("one"))
        first_s = time.monotonic() - began
        began = time.monotonic()
        _, second, _ = await post(http, sim, about("two"))
        second_s = time.monotonic() - began
        tokens = first["usage"]["prompt_tokens"]
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert tokens - 32 < cached < tokens
        assert second_s < first_s
        assert first_s > tokens / 4000
        prompts = sim.snapshot()["prompts"]
        assert prompts == {"tokens": tokens + second["usage"]["prompt_tokens"], "cached": cached}
        async with http.get(sim.base_url + "/metrics") as response:
            page = await response.text()
        assert f'vllm:prefix_cache_hits_total{{model_name="simulated"}} {cached}\n' in page


async def test_the_page_of_metrics_is_prometheus_text(http: aiohttp.ClientSession) -> None:
    """Without a key, as engines have it, and with a name that needs quoting."""
    name = 'a "b"'
    async with a_server(api_key="k", models=name) as sim, http.get(sim.base_url + "/metrics") as response:
        assert (response.status, response.headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
        families = list(text_string_to_metric_families(await response.text()))
        assert {sample.labels["model_name"] for family in families for sample in family.samples} == {name}
        assert "vllm:num_requests_waiting" in {family.name for family in families}
