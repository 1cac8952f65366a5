"""The parts put together: start, serve, stop, and what is told when it cannot start."""

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.admin import Admin
from tests.support.aws_tokens import use_keys
from tests.support.waiting import eventually
from worker.emulators.openai import SimBackendThread, SimOptions
from worker.emulators.openai.options import EXAMPLE_KEY
from worker.emulators.pubsub import LocalPubSubThread
from worker.errors import BrokerResourceError, SettingsError
from worker.service import Service
from worker.settings.schema import (
    BackendSettings,
    DedupeSettings,
    DrainSettings,
    HttpSettings,
    MetricGateSettings,
    PubSubSettings,
    RouteSettings,
    Settings,
)

REQUEST = b'{"path":"/v1/chat/completions","metadata":{"n":1},"body":{"model":"m","messages":[{"role":"user","content":"hi"}]}}'


@pytest.fixture(scope="module")
def broker() -> Iterator[Admin]:
    """The embedded Pub/Sub server, in a thread of its own."""
    with LocalPubSubThread() as server:
        admin = Admin(server.address)
        yield admin
        admin.close()


@pytest.fixture(scope="module")
def backend() -> Iterator[SimBackendThread]:
    """A server that answers after half a second."""
    with SimBackendThread(SimOptions.of(latency="500ms")) as server:
        yield server


class Bench:
    """Names on the broker and one service at a time."""

    def __init__(self, admin: Admin, backend_url: str) -> None:
        self.admin = admin
        self.requests, self.responses = admin.topic("requests"), admin.topic("responses")
        self.subscription = admin.subscription(self.requests)
        self.answers_subscription = admin.subscription(self.responses)
        self.backend_url = backend_url
        self.running: list[asyncio.Task[int]] = []

    def settings(self, **sections: Any) -> Settings:
        pubsub = {
            "emulator_host": self.admin.address,
            "project_id": self.admin.project,
            "request_subscription": self.subscription,
            "response_topic": self.responses,
            **sections.pop("pubsub", {}),
        }
        return Settings(
            pubsub=PubSubSettings(**pubsub),
            backend=BackendSettings(base_url=self.backend_url),
            http=sections.pop("http", HttpSettings(host="127.0.0.1", port=0)),
            drain=DrainSettings(grace_s=10.0, settle_s=5.0),
            **sections,
        )

    def start(self, service: Service) -> "asyncio.Task[int]":
        self.running.append(asyncio.ensure_future(service.run()))
        return self.running[-1]

    async def publish(self, *messages: bytes) -> None:
        for data in messages:
            await asyncio.to_thread(self.admin.publish, self.requests, data)

    async def answers(self, count: int) -> list[Any]:
        return await asyncio.to_thread(self.admin.take, self.answers_subscription, count)


@pytest.fixture
async def bench(broker: Admin, backend: SimBackendThread) -> AsyncIterator[Bench]:
    """New names for every test; what a test leaves running is ended."""
    bench = Bench(broker, backend.base_url)
    yield bench
    for task in bench.running:
        task.cancel()
    await asyncio.gather(*bench.running, return_exceptions=True)


async def _get(service: Service, path: str) -> tuple[int, dict[str, Any]]:
    async with aiohttp.ClientSession() as session, session.get(_url(service, path)) as response:
        return response.status, json.loads(await response.read())


async def _scrape(service: Service) -> str:
    async with aiohttp.ClientSession() as session, session.get(_url(service, "/metrics")) as response:
        return await response.text()


def _url(service: Service, path: str) -> str:
    assert service._probes._server is not None
    return f"http://127.0.0.1:{service._probes._server.sockets[0].getsockname()[1]}{path}"


@pytest.mark.slow
async def test_a_message_is_answered_and_a_stop_lets_it_finish(bench: Bench) -> None:
    """From topic to topic through every real part; the stop comes in the middle and waits for the answer."""
    service = Service(bench.settings())
    running = bench.start(service)
    await bench.publish(REQUEST)
    await eventually(lambda: service._metrics.in_flight.value == 1)
    assert (await _get(service, "/readyz"))[0] == 200
    scraped = await _scrape(service)
    assert 'inference_worker_model_in_flight{backend="default",model="m"} 1.0' in scraped
    for name in ("cpu_seconds_total", "resident_memory_bytes", "open_fds", "start_time_seconds"):
        assert f"\nprocess_{name} " in scraped
    service.stop()
    assert (await _get(service, "/readyz"))[0] == 503
    assert await running == 0
    (answer,) = await bench.answers(1)
    document = json.loads(answer.data)
    assert (document["status_code"], document["metadata"]) == (200, {"n": 1})
    assert answer.attributes["backend"] == "default"
    assert await asyncio.to_thread(bench.admin.is_empty, bench.subscription, 0.3)


@pytest.mark.slow
async def test_a_second_stop_does_not_wait_for_the_grace(bench: Bench, backend: SimBackendThread) -> None:
    """What runs is handed back at once and comes again."""
    service = Service(bench.settings())
    backend.control({"mode": "hang"})
    try:
        running = bench.start(service)
        await bench.publish(REQUEST)
        await eventually(lambda: service._metrics.in_flight.value == 1)
        service.stop()
        service.stop()
        assert await asyncio.wait_for(running, 8) == 0
    finally:
        backend.reset()
    assert len(await asyncio.to_thread(bench.admin.pull, bench.subscription)) == 1


@pytest.mark.parametrize(
    ("pubsub", "text"),
    [
        (
            {"request_subscription": "projects/exam/subscriptions/gone"},
            "the subscription projects/exam/subscriptions/gone",
        ),
        ({"response_topic": "gone"}, "the topic projects/exam/topics/gone"),
    ],
)
async def test_a_missing_resource_is_one_clear_line(bench: Bench, pubsub: dict[str, str], text: str) -> None:
    """A subscription or topic that is not there is named, on one line, and told to the probes as well."""
    service = Service(bench.settings(pubsub=pubsub))
    with pytest.raises(
        BrokerResourceError, match=rf"^{text} does not exist; create it with `inference-worker setup` or as in deploy/$"
    ):
        await service.run()
    assert text in str(service._probes.startup_failure)


@pytest.mark.slow
async def test_a_subscription_that_is_deleted_ends_the_worker(bench: Bench) -> None:
    """What ran is finished and answered first; the error is the permanent one."""
    service = Service(bench.settings())
    running = bench.start(service)
    await bench.publish(REQUEST)
    await eventually(lambda: service._metrics.in_flight.value == 1)
    await asyncio.to_thread(bench.admin.subscriber.delete_subscription, request={"subscription": bench.subscription})
    with pytest.raises(BrokerResourceError):
        await running
    assert len(await bench.answers(1)) == 1


async def test_a_port_that_is_taken_is_a_fault_of_the_settings(bench: Bench) -> None:
    """The key is named; nothing was leased and nothing stays open."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        service = Service(bench.settings(http=HttpSettings(host="127.0.0.1", port=port)))
        with pytest.raises(SettingsError, match=rf"http\.port: cannot listen on 127\.0\.0\.1:{port}"):
            await service.run()
    assert service._subscriber is None


async def test_a_part_that_cannot_be_built_closes_the_others(bench: Bench) -> None:
    """A key file that is not there is found before anything is leased, and leaves nothing open."""
    settings = bench.settings()
    backend = BackendSettings(base_url=bench.backend_url, api_key_file="/nonexistent/key")
    service = Service(settings.model_copy(update={"backend": backend}))
    with pytest.raises(SettingsError, match=r"api_key_file: /nonexistent/key"):
        await service.run()
    assert service._probes._server is None


async def test_local_faults_are_told_before_the_broker_is_asked(bench: Bench) -> None:
    """A key file that is not there, of any route or gate, and a missing extra: at once, all, though Pub/Sub is away."""
    gate = MetricGateSettings(type="vllm", url="http://m/metrics", api_key_file="/nonexistent/gate")
    settings = bench.settings(
        pubsub={"emulator_host": "127.0.0.1:1"},
        routes=[
            RouteSettings(name="other", base_url=bench.backend_url, api_key_file="/nonexistent/other"),
            RouteSettings(name="gated", base_url=bench.backend_url, metric_gate=gate),
        ],
        dedupe=DedupeSettings(store="redis", redis_url="ftp://r"),
    )
    backend = BackendSettings(base_url=bench.backend_url, api_key_file="/nonexistent/key")
    service = Service(settings.model_copy(update={"backend": backend}))
    with pytest.raises(SettingsError) as caught:
        await asyncio.wait_for(service.run(), 5)
    named = [fault.split(":")[0] for fault in caught.value.faults]
    assert named[:3] == [
        "routes[other].api_key_file",
        "routes[gated].metric_gate.api_key_file",
        "backend.api_key_file",
    ]
    assert named[3].startswith("dedupe.")
    assert service._probes.startup_failure == caught.value.one_line


async def test_redis_without_its_library_is_a_fault_of_the_settings(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An extra that is missing is one line, no traceback."""
    monkeypatch.setitem(sys.modules, "redis", None)
    dedupe = DedupeSettings(store="redis", redis_url="redis://r")
    with pytest.raises(SettingsError, match=r"the extra `.*` is not installed"):
        await Service(bench.settings(dedupe=dedupe)).run()


async def test_sagemaker_without_its_library_is_a_fault_of_the_settings(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Likewise, under the route that needs it."""
    for name in [name for name in sys.modules if name.startswith(("botocore", "worker.backends.sagemaker"))]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("worker.backends.http.aws", "worker.backends.streams.eventstream"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "botocore", None)
    route = RouteSettings.model_validate({"name": "aws", "sagemaker": {"endpoint": "e", "region": "us-east-1"}})
    with pytest.raises(SettingsError, match=r"routes\[aws\]\.sagemaker: the extra `sagemaker` is not installed"):
        await Service(bench.settings(routes=[route])).run()


@pytest.mark.slow
async def test_a_message_is_answered_by_an_endpoint_of_sagemaker(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From topic to topic: with the field that the message may set, and not with another one."""
    use_keys(monkeypatch, tmp_path, *EXAMPLE_KEY.split(":"))
    header = "X-Amzn-SageMaker-Target-Variant"
    with SimBackendThread(SimOptions.of(sagemaker=True, variants="blue,green")) as sim:
        route = RouteSettings.model_validate(
            {
                "name": "aws",
                "base_url": sim.base_url,
                "sagemaker": {
                    "endpoint": "e",
                    "custom_attributes": "n={metadata.n}",
                    "message_fields": ["target_variant"],
                },
            }
        )
        running = bench.start(service := Service(bench.settings(routes=[route])))
        request = json.loads(REQUEST)
        for number, headers in enumerate(({header: "green"}, {"X-Amzn-SageMaker-Session-Id": "s"})):
            message = {**request, "metadata": {"n": number}, "headers": headers}
            await bench.publish(json.dumps(message).encode())
        answers = sorted(await bench.answers(2), key=lambda answer: answer.attributes["status_code"])
        service.stop()
        assert await running == 0
    good, bad = answers
    assert (good.attributes["backend"], good.attributes["sagemaker_variant"]) == ("aws", "green")
    assert good.attributes["sagemaker_custom_attributes"] == "n=0"
    assert json.loads(good.data)["body"]["choices"]
    assert (bad.attributes["error_class"], json.loads(bad.data)["status_code"]) == ("bad_message", 400)
    aws, default = service._processor._router.targets  # type: ignore[union-attr]
    assert (aws.foreign_headers, default.foreign_headers) == (frozenset(), frozenset({header.lower()}))


async def test_a_broker_that_is_away_is_waited_for_and_told(bench: Bench) -> None:
    """`/startupz` says in one line what is missing, and a stop ends the wait with 0."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    service = Service(bench.settings(pubsub={"emulator_host": address}))
    running = bench.start(service)
    await eventually(lambda: "cannot be reached" in str(service._probes.startup_failure))
    status, document = await _get(service, "/startupz")
    assert (status, document["status"]) == (503, "failing")
    assert document["reason"].startswith("Pub/Sub cannot be reached: ")
    assert (await _get(service, "/livez"))[0] == 200
    service.stop()
    assert await running == 0


async def test_stopped_before_it_has_started_it_leases_nothing(bench: Bench) -> None:
    """A SIGTERM during the start ends it with 0 and costs no message a delivery attempt."""
    await bench.publish(REQUEST)
    service = Service(bench.settings())
    limits = service._limits

    async def stopped_meanwhile() -> Any:
        found = await limits()
        service.stop()
        return found

    service._limits = stopped_meanwhile
    assert await service.run() == 0
    assert service._metrics.registry.get_sample_value("inference_worker_leased_messages") == 0
    assert len(await asyncio.to_thread(bench.admin.pull, bench.subscription)) == 1


async def test_a_part_that_fails_to_close_hides_nothing(bench: Bench, logs: list[Any]) -> None:
    """The error that ended the worker is the one that is told; the parts that follow are closed."""

    class Stuck:
        async def aclose(self) -> None:
            raise RuntimeError("bug")

    service = Service(bench.settings(pubsub={"response_topic": "gone"}))
    service._closing.append(Stuck())
    with pytest.raises(BrokerResourceError, match="topics/gone"):
        await service.run()
    assert [line for line in logs if line["event"] == "close_failed"]
    assert service._probes._server is None


async def test_cancelled_it_drains_at_once_and_closes(bench: Bench, backend: SimBackendThread) -> None:
    """Cancelling `run` hands back what runs and leaves no port open."""
    service = Service(bench.settings())
    running = bench.start(service)
    await bench.publish(REQUEST)
    await eventually(lambda: service._metrics.in_flight.value == 1)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert service._probes._server is None
    assert len(await asyncio.to_thread(bench.admin.pull, bench.subscription)) == 1
