"""What is checked once a second: gauges, a backend's recovery, and too many errors."""

import asyncio
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.fakes import GOOD, FakeBackend, FakeSubscriber, status
from tests.support.pipeline import Pipeline, a_delivery, data, message
from tests.support.virtual_time import loop_time, settle, virtual_time
from worker.flow.circuit import CircuitState
from worker.flow.gate import AttemptSignal, RouteGate
from worker.flow.lane import MAX_LANES, SHARED, BreakerEffect
from worker.flow.queue import AdmissionOrder
from worker.policy.engine import ErrorPolicy
from worker.policy.rules.load import parse_rules
from worker.ports import Settlement
from worker.telemetry.metrics import MAX_LABEL, OTHER
from worker.telemetry.series import PREFIX
from worker.wire.body import RequestBody
from worker.wire.message import RequestMessage

UNAUTHORIZED = status(401)


async def _stop(*tasks: "asyncio.Task[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@virtual_time
async def test_messages_for_a_stopped_model_do_not_count_against_the_limit_of_leases() -> None:
    """As many more are leased as wait behind the open breaker; none once it has closed."""
    backend = FakeBackend(then=UNAUTHORIZED)
    other = FakeBackend(name="other")
    pipeline = Pipeline(backend, other)
    subscriber = FakeSubscriber(max_in_flight=4)
    supervisor = pipeline.supervisor(subscriber)
    await supervisor.check()
    assert subscriber.extra == 0
    handling = [pipeline.start(message(attempt=1)) for _ in range(5)]
    await asyncio.sleep(0.5)
    await supervisor.check()
    assert subscriber.extra == 5
    await _stop(*handling)
    await supervisor.check()
    assert subscriber.extra == 0


@virtual_time
async def test_gauges_show_window_breaker_and_holding() -> None:
    """The window, what is held, and for how long the breaker was open."""
    pipeline = Pipeline(FakeBackend(then=UNAUTHORIZED), window=7)
    supervisor = pipeline.supervisor()
    await supervisor.check()
    supervisor.set_gauges()
    assert pipeline.count("breaker_state", "fake") == 0
    handling = [pipeline.start(message(attempt=1)) for _ in range(2)]
    await asyncio.sleep(1)
    await supervisor.check()
    await asyncio.sleep(5)
    await supervisor.check()
    supervisor.set_gauges()
    assert pipeline.count("held_messages", "fake") == 2
    assert pipeline.count("window_limit", "fake") == 7
    assert pipeline.count("breaker_state", "fake") == 2
    assert pipeline.count("paused_seconds_total", "fake") == 6
    await _stop(*handling)


def _scraped(pipeline: Pipeline) -> dict[str, dict[str, float]]:
    """Return the gauges of models as a scraper reads them, by the name of the model."""
    models: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(generate_latest(pipeline.metrics.registry).decode()):
        for sample in family.samples:
            if family.name.startswith(PREFIX + "model_"):
                values = models.setdefault(sample.labels["model"], {})
                assert family.name not in values, "a scraper refuses a series that comes twice"
                values[family.name.removeprefix(PREFIX + "model_")] = sample.value
    return models


@virtual_time
async def test_gauges_show_each_model_by_itself() -> None:
    """Breaker, window, what runs, waits and is held, of the model that fails and of the one that is served."""
    pipeline = Pipeline(FakeBackend(), window=3)
    supervisor = pipeline.supervisor()
    gate = pipeline.target.gate
    for key in ("a", "b"):
        await _fail_in_lane(gate, "down", key)
    served = await gate.admit(AdmissionOrder(), lane_name="up")
    served.finish(AttemptSignal(breaker=BreakerEffect.SUCCESS))
    running = [await gate.admit(AdmissionOrder(), lane_name="up") for _ in range(3)]
    waiting = [
        asyncio.ensure_future(gate.admit(AdmissionOrder(held=held), lane_name=model))
        for model, held in (("up", True), ("up", False), ("down", False))
    ]
    await settle()
    supervisor.set_gauges()
    assert _scraped(pipeline) == {
        "down": {
            "breaker_state": 2,
            "window_limit": 3,
            "in_flight": 0,
            "waiting_messages": 1,
            "held_messages": 0,
            "failing_share": 0,
        },
        "up": {
            "breaker_state": 0,
            "window_limit": 3,
            "in_flight": 3,
            "waiting_messages": 2,
            "held_messages": 1,
            "failing_share": 0,
        },
    }
    assert supervisor.details()["backends"]["fake"]["models"].keys() == {"down", "up"}
    await _stop(*waiting)
    for permit in running:
        permit.finish(AttemptSignal())


async def _fail_in_lane(gate: RouteGate, model: str | None, key: str) -> None:
    permit = await gate.admit(AdmissionOrder(), key=key, lane_name=model)
    permit.record_failure()
    permit.finish(AttemptSignal(breaker=BreakerEffect.TRIP, error_class="not_ready"))


HOSTILE = [
    'a"b',
    "a\\",
    "a\nb",
    "a\r\x00",
    "\u2028",
    'x"} 1\nup 1',
    "m" * 129,
    "é{}",
    " ",
    OTHER,
    "none",
    SHARED,
    "",
    None,
]


@virtual_time
async def test_names_of_models_neither_break_a_scrape_nor_make_it_large() -> None:
    """Whatever requesters call their models, and however many names they make up over time."""
    pipeline = Pipeline()
    supervisor = pipeline.supervisor()
    gate = pipeline.target.gate
    names = [*HOSTILE, *(f"made-up-{number}" for number in range(3 * MAX_LANES))]
    seen: set[str] = set()
    for first in range(0, len(names), 16):
        permits = [await gate.admit(AdmissionOrder(), lane_name=name) for name in names[first : first + 16]]
        supervisor.set_gauges()
        shown = _scraped(pipeline)
        assert supervisor.details()["backends"]["fake"]["models"].keys() == shown.keys()
        assert sum(model["in_flight"] for model in shown.values()) == len(permits)
        seen |= shown.keys()
        for permit in permits:
            permit.finish(AttemptSignal(breaker=BreakerEffect.SUCCESS))
    assert len(seen) <= MAX_LANES + 2
    assert {"none", OTHER, 'a"b', "é{}"} <= seen
    assert all(name.isprintable() and len(name) <= MAX_LABEL for name in seen)


@virtual_time
async def test_the_models_beyond_the_bound_are_shown_together() -> None:
    """The shared lane has one fixed name, and shows the breaker that is open."""
    pipeline = Pipeline()
    supervisor = pipeline.supervisor()
    gate = pipeline.target.gate
    permits = [await gate.admit(AdmissionOrder(), lane_name=f"m{number}") for number in range(MAX_LANES)]
    for key in ("a", "b"):
        await _fail_in_lane(gate, f"one-too-many-{key}", key)
    supervisor.set_gauges()
    shown = _scraped(pipeline)
    assert shown.keys() == {OTHER, *(f"m{number}" for number in range(MAX_LANES))}
    assert shown[OTHER]["breaker_state"] == 2
    assert supervisor.details()["backends"]["fake"]["models"][OTHER]["error_class"] == "not_ready"
    for permit in permits:
        permit.finish(AttemptSignal())


@virtual_time
async def test_names_that_a_backend_refuses_use_up_no_label() -> None:
    """A model that exists is shown by its name, after however many that do not."""
    pipeline = Pipeline()
    supervisor = pipeline.supervisor()
    gate = pipeline.target.gate
    for number in range(3 * MAX_LANES):
        (await gate.admit(AdmissionOrder(), lane_name=f"none-such-{number}")).finish(AttemptSignal())
        supervisor.set_gauges()
    permit = await gate.admit(AdmissionOrder(), lane_name="real")
    supervisor.set_gauges()
    assert _scraped(pipeline).keys() == {"real"}
    permit.finish(AttemptSignal())


@virtual_time
async def test_a_rotated_key_closes_an_auth_breaker_by_itself() -> None:
    """Refused credentials are probed seldom; a new key is tried within the second."""
    pipeline = Pipeline(FakeBackend(then=UNAUTHORIZED))
    running = asyncio.ensure_future(pipeline.supervisor().run())
    handling = [pipeline.start(message(attempt=1)) for _ in range(2)]
    await asyncio.sleep(4)
    pipeline.backend.then = GOOD
    pipeline.backend.has_new_key = True
    await asyncio.gather(*handling)
    assert loop_time() <= 5.1
    assert pipeline.circuit.state is CircuitState.CLOSED
    await _stop(running)


@virtual_time
async def test_a_rotated_key_is_told_once_though_no_message_comes(logs: list[Any]) -> None:
    """Until a message can try the key nothing is repeated; the next change is told again."""
    pipeline = Pipeline(FakeBackend(then=UNAUTHORIZED))
    supervisor = pipeline.supervisor()
    handling = [pipeline.start(message(attempt=1)) for _ in range(2)]
    await settle()
    await _stop(*handling)

    def told() -> int:
        return len([line for line in logs if line["event"] == "credentials_changed"])

    pipeline.backend.has_new_key = True
    for _ in range(5):
        await supervisor.check()
    assert told() == 1
    pipeline.backend.has_new_key = False
    await supervisor.check()
    pipeline.backend.has_new_key = True
    await supervisor.check()
    assert told() == 2


@virtual_time
async def test_a_health_path_that_answers_again_lets_one_message_through() -> None:
    """Not earlier and not again and again: one probe each time it begins to answer."""
    pipeline = Pipeline(FakeBackend(then=status(401)))
    pipeline.backend.healthy = False
    supervisor = pipeline.supervisor()
    handling = [pipeline.start(message(attempt=1)) for _ in range(2)]
    await settle()
    for _ in range(3):
        await supervisor.check()
        await settle()
    assert len(pipeline.backend.requests) == 2
    pipeline.backend.healthy = True
    for _ in range(3):
        await supervisor.check()
        await settle()
    assert len(pipeline.backend.requests) == 3
    pipeline.backend.healthy = False
    await supervisor.check()
    pipeline.backend.healthy = True
    pipeline.backend.then = GOOD
    await supervisor.check()
    await asyncio.gather(*handling)
    assert loop_time() < 1


@virtual_time
async def test_a_closed_breaker_asks_no_health_path() -> None:
    """While the backend works nothing is asked but requests."""
    pipeline = Pipeline()
    pipeline.backend.healthy = True
    await pipeline.supervisor().check()
    assert pipeline.backend.probes == 0


class _Hanging(FakeBackend):
    async def probe(self) -> bool | None:
        await asyncio.sleep(5)
        return False


class _Broken(FakeBackend):
    async def probe(self) -> bool | None:
        raise RuntimeError("bug")


@pytest.mark.parametrize("kind", [_Hanging, _Broken])
def test_one_sick_route_does_not_hide_another(kind: type[FakeBackend]) -> None:
    """A health path that hangs, or a bug in asking it, keeps no other route from its recovery."""

    @virtual_time
    async def run() -> None:
        sick, other = kind(then=UNAUTHORIZED, name="sick"), FakeBackend(UNAUTHORIZED, UNAUTHORIZED, name="other")
        pipeline = Pipeline(sick, other)
        for route in pipeline.targets:
            await _fail(pipeline, route)
        other.has_new_key = True
        supervisor = pipeline.supervisor()
        running = asyncio.ensure_future(supervisor.run())
        await asyncio.sleep(0.5)
        next_probe = pipeline.targets[1].gate.statistics().circuit.next_probe_at
        assert next_probe is not None
        assert next_probe <= loop_time()
        await asyncio.sleep(10)
        assert not running.done()
        await _stop(running)

    run()


async def _fail(pipeline: Pipeline, route: Any) -> None:
    """Have two messages refused, which opens the route's breaker."""
    request = RequestMessage(path="/v1/completions", body=RequestBody(b"{}"))
    for _ in range(2):
        with await route.gate.admit(AdmissionOrder()) as permit:
            await pipeline.processor._attempt(a_delivery(request), request, route, permit)
    assert route.is_open()


@virtual_time
async def test_a_bug_does_not_end_the_checks(logs: list[Any]) -> None:
    """What fails in one second is logged, and the next second checks again."""
    pipeline = Pipeline()
    supervisor = pipeline.supervisor()
    pipeline.error_share.dominant = _raise
    running = asyncio.ensure_future(supervisor.run())
    await asyncio.sleep(3.5)
    assert pipeline.count("internal_errors_total") == 4
    assert [line for line in logs if line["event"] == "supervisor_failed"]
    await _stop(running)


def _raise() -> None:
    raise RuntimeError("bug")


@virtual_time
async def test_many_errors_of_one_class_are_told_once_and_shown(logs: list[Any]) -> None:
    """One error line when it begins, a gauge and a detail as long as it lasts, and again when it begins again."""
    pipeline = Pipeline()
    supervisor = pipeline.supervisor(min_answers=10)
    for _ in range(9):
        pipeline.error_share.add("auth")
    await supervisor.check()
    assert next(pipeline.metrics.error_answer_share.collect()).samples == []
    for _ in range(3):
        pipeline.error_share.add(None)
        await supervisor.check()
    told = [line for line in logs if line["event"] == "error_share_high"]
    assert [(line["error_class"], line["log_level"]) for line in told] == [("auth", "error")]
    assert pipeline.count("error_answer_share", "auth") == 0.75
    assert supervisor.details()["errors"] == {"error_class": "auth", "share": 0.75, "answers": 9}
    assert pipeline.intake.reasons == ()


@virtual_time
async def test_the_intake_pauses_on_errors_only_if_wanted_and_opens_by_itself() -> None:
    """With `pause_share` nothing is started until the errors are out of the window."""
    pipeline = Pipeline()
    supervisor = pipeline.supervisor(min_answers=10, pause_share=0.9)
    running = asyncio.ensure_future(supervisor.run())
    for _ in range(20):
        pipeline.error_share.add("invalid_request")
    await asyncio.sleep(2)
    assert pipeline.intake.reasons == ("errors",)
    handling = pipeline.start()
    await asyncio.sleep(200)
    assert not handling.done()
    await handling
    assert loop_time() < 320
    assert pipeline.intake.reasons == ()
    await _stop(running)


@virtual_time
async def test_details_name_every_backend_and_why_nothing_starts() -> None:
    """What `/readyz` shows: breaker, class, window, what runs and waits, and the reasons of a pause."""
    pipeline = Pipeline(FakeBackend(then=UNAUTHORIZED), window=5)
    handling = [pipeline.start(message(attempt=1)) for _ in range(2)]
    await settle()
    pipeline.intake.set("publish", holds=True)
    details = pipeline.supervisor().details()
    assert details == {
        "backends": {
            "fake": {
                "breaker": "open",
                "error_class": "auth",
                "models": {
                    "m": {
                        "breaker": "closed",
                        "error_class": None,
                        "window": 5,
                        "in_flight": 0,
                        "waiting": 2,
                        "held": 2,
                        "failing_share": 0.0,
                    }
                },
                "window": 5,
                "in_flight": 0,
                "waiting": 2,
                "held": 2,
                "failing_share": 0.0,
            }
        },
        "intake_paused_by": ["publish"],
        "errors": None,
    }
    await _stop(*handling)


@virtual_time
async def test_details_name_the_models_that_are_kept_back() -> None:
    """Behind a closed breaker each model with its own, and the class that opened it."""
    rules = parse_rules([{"match": {"class": "model_not_found"}, "do": "hold", "breaker": "trip", "scope": "model"}])
    no_model = status(404, b'{"error":{"message":"none","type":"NotFoundError","param":"model","code":404}}')
    pipeline = Pipeline(FakeBackend(no_model, no_model), policy=ErrorPolicy(rules))
    handling = [pipeline.start(message(attempt=1)) for _ in range(2)]
    await settle()

    def shown() -> tuple[str, str, str | None]:
        backend = pipeline.supervisor().details()["backends"]["fake"]
        model = backend["models"]["m"]
        return backend["breaker"], model["breaker"], model["error_class"]

    assert shown() == ("closed", "open", "model_not_found")
    assert await asyncio.gather(*handling) == [Settlement.ACK] * 2
    assert shown() == ("closed", "closed", None)


@virtual_time
async def test_a_breaker_that_opens_lets_more_be_leased_at_once() -> None:
    """What waits behind it keeps the others back no longer than until the loop's next turn."""
    pipeline = Pipeline(FakeBackend(then=UNAUTHORIZED), window=1)
    subscriber = FakeSubscriber(max_in_flight=4)
    for _ in range(4):
        subscriber.publish(data())
    serving = pipeline.serve(subscriber)
    await asyncio.sleep(0.1)
    assert pipeline.target.is_open()
    assert subscriber.extra == 4
    await _stop(serving)
