"""Which backend a request goes to, and what pauses all of them."""

import asyncio
from typing import Any

import msgspec
import pytest

from tests.support.fakes import FakeBackend
from tests.support.pipeline import Pipeline
from tests.support.virtual_time import settle, virtual_time
from worker.errors import MessageError
from worker.flow.clock import LoopClock
from worker.flow.gate import AttemptSignal
from worker.flow.queue import AdmissionOrder
from worker.pipeline.routes import RequestReader, build_route
from worker.settings.schema import BreakerSettings, RequestSettings, RouteMatch, RouteSettings, WindowSettings
from worker.wire.body import RequestBody
from worker.wire.message import ReceivedMessage, RequestMessage, encode_request


def a_request(model: str | None = "m", path: str = "/v1/x", metadata: Any = None, **more: Any) -> RequestMessage:
    return RequestMessage(
        path=path, body=RequestBody(b"{}"), model=model, metadata=msgspec.json.encode(metadata or {}), **more
    )


@pytest.mark.parametrize(
    ("match", "request_", "attributes", "takes"),
    [
        ({}, a_request(None), {}, True),
        ({"models": ["llama-*", "qwen"]}, a_request("llama-3"), {}, True),
        ({"models": ["llama-*", "qwen"]}, a_request("qwen"), {}, True),
        ({"models": ["llama-*"]}, a_request("Llama-3"), {}, False),
        ({"models": ["llama-*"]}, a_request(None), {}, False),
        ({"models": ["*"]}, a_request(None), {}, True),
        ({"paths": ["/v1/emb*"]}, a_request(path="/v1/embeddings"), {}, True),
        ({"paths": ["/v1/emb*"]}, a_request(path="/v1/completions"), {}, False),
        ({"models": ["m"], "paths": ["/v1/emb*"]}, a_request(path="/v1/completions"), {}, False),
        ({"models": ["m"], "paths": ["/v1/emb*"]}, a_request(path="/v1/embeddings"), {}, True),
        ({"attributes": {"team": ["a*", "b"]}}, a_request(), {"team": "abc"}, True),
        ({"attributes": {"team": ["a*", "b"]}}, a_request(), {"team": "c"}, False),
        ({"attributes": {"team": ["*"]}}, a_request(), {}, False),
        ({"attributes": {"team": []}}, a_request(), {"team": ""}, True),
        ({"metadata": {"tier": ["gold"]}}, a_request(metadata={"tier": "gold"}), {}, True),
        ({"metadata": {"tier": ["gold"]}}, a_request(metadata={"tier": ["gold"]}), {}, False),
        ({"metadata": {"tier": ["[0-9]"]}}, a_request(metadata={"tier": 3}), {}, True),
        ({"metadata": {"tier": []}}, a_request(metadata={"tier": None}), {}, False),
        ({"metadata": {"a": ["1"], "b": ["true"]}}, a_request(metadata={"a": 1, "b": True}), {}, True),
        ({"metadata": {"a": ["1"]}, "attributes": {"a": ["1"]}}, a_request(metadata={"a": 1}), {}, False),
    ],
)
def test_a_route_takes_what_all_its_patterns_match(
    match: dict[str, Any], request_: RequestMessage, attributes: dict[str, str], takes: bool
) -> None:
    """Every list that is given must match, by shell pattern and case; an empty one asks for the key alone."""

    @virtual_time
    async def run() -> None:
        router = Pipeline(FakeBackend(), matches=[RouteMatch(**match)]).router
        assert router.routes[0].takes(request_, attributes) is takes
        assert (router.find(request_, attributes) is not None) is takes

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
    route = build_route(settings, [FakeBackend()], LoopClock())
    (target,) = route.targets
    await target.gate.admit(AdmissionOrder(), lane_name="m")
    window = target.gate.statistics().lanes["m"].window
    assert (window.limit, window.minimum, window.maximum) == (3, 2, 9)
    assert (route.name, target.name, target.is_open(), route.is_plain) == ("r", "r", False, True)


@virtual_time
async def test_any_reason_pauses_and_the_last_one_gone_resumes() -> None:
    """Two reasons are two: nothing starts before both are gone, and what waited then starts by itself."""
    pipeline = Pipeline()
    intake, gate = pipeline.intake, pipeline.target.gate
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
    permit = await pipeline.targets[0].gate.admit(AdmissionOrder())
    pipeline.intake.set("publish", holds=True)
    assert [route.gate.statistics().paused for route in pipeline.targets] == [True, True]
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
