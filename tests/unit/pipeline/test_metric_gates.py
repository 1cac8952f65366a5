"""The loop around a metric gate: readings, their failures, what the windows get, and what is told of it."""

import asyncio
from collections.abc import Sequence
from typing import Any

from tests.support.fakes import FakeBackend
from tests.support.pipeline import Pipeline, message
from tests.support.virtual_time import loop_time, settle, virtual_time
from worker.errors import MetricSourceError
from worker.flow.metric_gate import MetricGate, MetricSignal
from worker.pipeline.metric_gates import MetricGateLoop, build_metric_gates
from worker.settings.schema import Settings

UNREACHABLE = MetricSourceError("unreachable", "http://m/metrics: connect: refused")


class FakeSource:
    """Gives one number for its only signal, or raises; see `worker.ports.MetricSource`."""

    def __init__(self, answer: float | Exception = 0.0) -> None:
        self.answer = answer
        self.reads = 0

    async def read(self) -> Sequence[float]:
        self.reads += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return [self.answer]

    async def aclose(self) -> None:
        """Hold nothing."""


def a_loop(
    pipeline: Pipeline, source: FakeSource, *, is_open: bool = False, rise_s: float = 0.0, without_own: bool = False
) -> MetricGateLoop:
    signal = MetricSignal(name="waiting", whole_at=0.0, closed_at=4.0, is_without_own=without_own)
    gate = MetricGate([signal], is_open_without=is_open, stale_after_s=15.0, rise_s=rise_s, now=loop_time)
    return MetricGateLoop(source, gate, pipeline.targets, pipeline.metrics, interval_s=1.0, is_open_without=is_open)


async def _stop(*tasks: "asyncio.Task[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def events(logs: list[dict[str, Any]]) -> list[str]:
    return [line["event"] for line in logs if line["event"].startswith("metric_gate")]


@virtual_time
async def test_nothing_starts_before_the_first_reading_of_a_gate_that_is_closed_without() -> None:
    """From the moment it is made; the first good reading lets what waits start, and costs no attempt."""
    pipeline = Pipeline()
    source = FakeSource()
    loop = a_loop(pipeline, source)
    task = pipeline.start(message(attempt=1))
    await settle()
    assert (task.done(), pipeline.backend.requests) == (False, [])
    assert pipeline.count("metric_gate_stale", "fake") == 1
    running = asyncio.ensure_future(loop.run())
    await task
    assert pipeline.answer.attributes["status_code"] == "200"
    assert pipeline.answer.attributes.get("delivery_attempt", "1") == "1"
    assert pipeline.count("metric_gate_stale", "fake") == 0
    await _stop(running)


@virtual_time
async def test_a_busy_server_gets_nothing_new_and_finishes_what_runs() -> None:
    """A reading beyond `closed_at` starts nothing; the one under way is answered, and the rest once others are gone."""
    backend = FakeBackend()
    pipeline = Pipeline(backend, window=4)
    source = FakeSource()
    loop = a_loop(pipeline, source)
    await loop.read()
    backend.hold()
    first = pipeline.start()
    await settle()
    source.answer = 5.0
    await loop.read()
    later = [pipeline.start() for _ in range(3)]
    backend.let_go()
    await first
    await asyncio.sleep(3600.0)
    assert len(pipeline.answers) == 1
    assert pipeline.gate.waiting == 3
    source.answer = 0.0
    await loop.read()
    await asyncio.gather(*later)
    assert len(pipeline.answers) == 4


@virtual_time
async def test_a_message_is_not_kept_for_ever_behind_a_closed_gate() -> None:
    """Like one for a stopped model it is nacked when its lease ends, and not before."""
    pipeline = Pipeline(lease_s=600.0)
    a_loop(pipeline, FakeSource())
    began = loop_time()
    assert await pipeline.handle(message(attempt=1)) == "nack"
    assert 540.0 <= loop_time() - began <= 600.0
    assert pipeline.answers == []


@virtual_time
async def test_failed_readings_change_nothing_until_the_last_good_one_is_too_old(logs: list[dict[str, Any]]) -> None:
    """Then the configured side holds, which is told once; the next good reading is told as well."""
    pipeline = Pipeline(window=4)
    source = FakeSource(2.0)
    running = asyncio.ensure_future(a_loop(pipeline, source).run())
    await asyncio.sleep(0.5)
    assert pipeline.gate.limit == 0  # no lane yet
    assert pipeline.target.gate.part == 0.5
    source.answer = UNREACHABLE
    await asyncio.sleep(14.0)
    assert pipeline.target.gate.part == 0.5
    assert pipeline.count("metric_gate_failures_total", "fake", "unreachable") == 14
    await asyncio.sleep(5.0)
    assert pipeline.target.gate.part == 0.0
    assert pipeline.count("metric_gate_stale", "fake") == 1
    source.answer = 0.0
    await asyncio.sleep(1.0)
    assert pipeline.target.gate.part == 1.0
    await _stop(running)
    assert events(logs) == [
        "metric_gate_opened",
        "metric_gate_read_failed",
        "metric_gate_stale",
        "metric_gate_closed",
        "metric_gate_recovered",
        "metric_gate_opened",
    ]
    (stale,) = [line for line in logs if line["event"] == "metric_gate_stale"]
    assert (stale["log_level"], stale["backend"], stale["gate"]) == ("error", "fake", "closed")
    assert stale["error"] == "http://m/metrics: connect: refused"


@virtual_time
async def test_a_source_that_never_answers_is_told_at_once(logs: list[dict[str, Any]]) -> None:
    """Its first failure is the whole story: the configured side holds already."""
    pipeline = Pipeline()
    loop = a_loop(pipeline, FakeSource(UNREACHABLE), is_open=True)
    for _ in range(3):
        await loop.read()
    assert events(logs) == ["metric_gate_stale"]
    assert pipeline.target.gate.part == 1.0
    assert await pipeline.handle() == "ack"


@virtual_time
async def test_another_reason_is_told_again(logs: list[dict[str, Any]]) -> None:
    """Prometheus that has come up and cannot read the query is another fault than one that is away."""
    source = FakeSource(UNREACHABLE)
    loop = a_loop(Pipeline(), source)
    await loop.read()
    source.answer = MetricSourceError("refused", "status 400: parse error")
    for _ in range(3):
        await loop.read()
    stale = [line["error"] for line in logs if line["event"] == "metric_gate_stale"]
    assert stale == ["http://m/metrics: connect: refused", "status 400: parse error"]


@virtual_time
async def test_a_fault_of_our_own_is_a_failed_reading(logs: list[dict[str, Any]]) -> None:
    """The loop goes on, the exception is told with its traceback, and the configured side holds."""
    pipeline = Pipeline()
    source = FakeSource(RuntimeError("bug"))
    running = asyncio.ensure_future(a_loop(pipeline, source).run())
    await asyncio.sleep(2.5)
    assert source.reads == 3
    assert pipeline.count("metric_gate_failures_total", "fake", "internal") == 3
    assert pipeline.count("internal_errors_total") == 3
    await _stop(running)
    assert "metric_gate_broken" in events(logs)


@virtual_time
async def test_own_requests_that_run_are_subtracted() -> None:
    """Five run at the server, three of them are ours: two others leave half of the window."""
    backend = FakeBackend()
    pipeline = Pipeline(backend, window=8)
    source = FakeSource()
    loop = a_loop(pipeline, source, without_own=True)
    await loop.read()
    backend.hold()
    tasks = [pipeline.start() for _ in range(3)]
    await settle()
    source.answer = 5.0
    await loop.read()
    assert pipeline.target.gate.part == 0.5
    backend.let_go()
    await asyncio.gather(*tasks)


@virtual_time
async def test_readiness_shows_the_gate() -> None:
    """Part, numbers, age, and the last error."""
    pipeline = Pipeline()
    source = FakeSource(1.0)
    loop = a_loop(pipeline, source)
    assert loop.details() == {"part": 0.0, "is_stale": True, "age_s": None, "values": {}, "error": None}
    await loop.read()
    await asyncio.sleep(2.0)
    source.answer = UNREACHABLE
    await loop.read()
    assert loop.details() == {
        "part": 0.75,
        "is_stale": False,
        "age_s": 2.0,
        "values": {"waiting": 1.0},
        "error": "http://m/metrics: connect: refused",
    }
    assert pipeline.count("metric_gate_value", "fake", "waiting") == 1
    assert pipeline.count("metric_gate_part", "fake") == 0.75


def gate_settings(*routes: dict[str, Any]) -> Settings:
    return Settings.model_validate({"routes": list(routes)})


@virtual_time
async def test_servers_with_pages_of_their_own_have_gates_of_their_own() -> None:
    """A busy one gets nothing, the other all; with one address for the route both get the same."""
    backends = [FakeBackend(name="r/1"), FakeBackend(name="r/2")]
    route = {"name": "r", "base_urls": ["http://a", "http://b"]}
    pipeline = Pipeline(*backends, routes=[route])
    settings = gate_settings({**route, "metric_gate": {"type": "vllm", "rise_s": 0}})
    sources = {"r/1": FakeSource(), "r/2": FakeSource()}
    for source in sources.values():
        source.answer = MetricSourceError("unusable", "no number")
    loops = build_metric_gates(settings, sources, pipeline.targets, pipeline.metrics, now=loop_time)
    assert [[target.name for target in loop.targets] for loop in loops] == [["r/1"], ["r/2"]]
    shared = build_metric_gates(settings, {"r": FakeSource()}, pipeline.targets, pipeline.metrics, now=loop_time)
    assert [[target.name for target in loop.targets] for loop in shared] == [["r/1", "r/2"]]


@virtual_time
async def test_a_route_without_a_gate_has_none() -> None:
    """Nothing is read, and its windows are whole."""
    pipeline = Pipeline()
    settings = gate_settings({"name": "fake", "base_url": "http://a"})
    assert build_metric_gates(settings, {}, pipeline.targets, pipeline.metrics, now=loop_time) == []
    assert pipeline.target.gate.part == 1.0


@virtual_time
async def test_what_failed_goes_to_no_server_whose_gate_is_closed() -> None:
    """It would wait there while the first one may serve it again."""
    backends = [FakeBackend(name="r/1"), FakeBackend(name="r/2")]
    pipeline = Pipeline(*backends, routes=[{"name": "r", "base_urls": ["http://a", "http://b"]}])
    route = pipeline.router.routes[0]
    assert [each.name for each in route.candidates("m", "m", ("r/1",))] == ["r/2"]
    pipeline.targets[1].gate.set_part(0.0)
    assert [each.name for each in route.candidates("m", "m", ("r/1",))] == ["r/1", "r/2"]
