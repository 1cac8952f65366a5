"""Which backend a request goes to, and what pauses all of them."""

import asyncio

import pytest

from tests.support.fakes import FakeBackend
from tests.support.pipeline import Pipeline
from tests.support.virtual_time import settle, virtual_time
from worker.errors import MessageError
from worker.flow.clock import LoopClock
from worker.flow.gate import AttemptSignal
from worker.flow.queue import AdmissionOrder
from worker.pipeline.routes import RequestReader, Router, build_route
from worker.settings.schema import BreakerSettings, RequestSettings, RouteMatch, RouteSettings, WindowSettings
from worker.wire.message import ReceivedMessage, encode_request


@pytest.mark.parametrize(
    ("match", "model", "path", "takes"),
    [
        (RouteMatch(), None, "/v1/x", True),
        (RouteMatch(models=["llama-*", "qwen"]), "llama-3", "/v1/x", True),
        (RouteMatch(models=["llama-*", "qwen"]), "qwen", "/v1/x", True),
        (RouteMatch(models=["llama-*"]), "Llama-3", "/v1/x", False),
        (RouteMatch(models=["llama-*"]), None, "/v1/x", False),
        (RouteMatch(models=["*"]), None, "/v1/x", True),
        (RouteMatch(paths=["/v1/emb*"]), "m", "/v1/embeddings", True),
        (RouteMatch(paths=["/v1/emb*"]), "m", "/v1/completions", False),
        (RouteMatch(models=["m"], paths=["/v1/emb*"]), "m", "/v1/completions", False),
        (RouteMatch(models=["m"], paths=["/v1/emb*"]), "m", "/v1/embeddings", True),
    ],
)
def test_a_route_takes_what_all_its_patterns_match(match: RouteMatch, model: str, path: str, takes: bool) -> None:
    """Every list that is given must match, by shell pattern and case."""

    @virtual_time
    async def run() -> None:
        pipeline = Pipeline(FakeBackend(), matches=[match])
        assert pipeline.route.takes(model, path) is takes
        assert (Router(pipeline.routes).find(model, path) is pipeline.route) is takes

    run()


@virtual_time
async def test_a_route_is_built_as_its_settings_say() -> None:
    """Window and breaker stand behind the gate with the bounds of the settings."""
    settings = RouteSettings(
        name="r",
        base_url="http://b",
        window=WindowSettings(initial=3, min=2, max=9),
        breaker=BreakerSettings(failures=2, probe_interval_s=7.0, max_probe_interval_s=7.0),
    )
    route = build_route(settings, FakeBackend(), LoopClock())
    await route.gate.admit(AdmissionOrder(), lane_name="m")
    window = route.gate.statistics().lanes["m"].window
    assert (window.limit, window.minimum, window.maximum) == (3, 2, 9)
    assert (route.name, route.is_open()) == ("r", False)


@virtual_time
async def test_any_reason_pauses_and_the_last_one_gone_resumes() -> None:
    """Two reasons are two: nothing starts before both are gone, and what waited then starts by itself."""
    pipeline = Pipeline()
    intake, gate = pipeline.intake, pipeline.route.gate
    intake.set("publish", holds=True)
    intake.set("errors", holds=True)
    waiting = asyncio.ensure_future(gate.admit(AdmissionOrder()))
    intake.set("publish", holds=False)
    await settle()
    assert intake.reasons == ("errors",)
    assert not waiting.done()
    intake.set("errors", holds=False)
    (await waiting).finish(AttemptSignal())
    assert intake.reasons == ()


@virtual_time
async def test_a_reason_is_told_when_it_changes_and_only_then() -> None:
    """Setting what is set already is nothing new."""
    pipeline = Pipeline()
    for holds in (False, True, True, False, False):
        pipeline.intake.set("publish", holds=holds)
    assert pipeline.pauses == [("publish", True), ("publish", False)]


@virtual_time
async def test_a_pause_reaches_every_route_and_leaves_attempts_alone() -> None:
    """What runs goes on; nothing new starts anywhere."""
    pipeline = Pipeline(FakeBackend(name="a"), FakeBackend(name="b"))
    permit = await pipeline.routes[0].gate.admit(AdmissionOrder())
    pipeline.intake.set("publish", holds=True)
    assert [route.gate.statistics().paused for route in pipeline.routes] == [True, True]
    assert permit.finish(AttemptSignal())


def test_a_mistyped_path_gets_a_suggestion() -> None:
    """The refusal of a path names the nearest of the usual ones; one that is near to none gets no suggestion."""

    def refusal(path: str) -> str:
        data = encode_request(path=path, body=b"{}")
        with pytest.raises(MessageError) as caught:
            RequestReader(RequestSettings()).read(ReceivedMessage(message_id="1", data=data))
        return caught.value.reason

    assert refusal("/chat/completion") == "path /chat/completion is not allowed; did you mean /v1/chat/completions?"
    assert refusal("/metrics") == "path /metrics is not allowed"
