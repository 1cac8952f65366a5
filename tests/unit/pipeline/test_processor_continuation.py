"""Going on from what a broken stream had generated: when the message is kept for it, and how often."""

import asyncio
import json
from typing import Any

from tests.support.fakes import REFUSED, Answer, FakeBackend
from tests.support.pipeline import Pipeline, message
from tests.support.streams import RESUME_POINT, broken, content, partial
from tests.support.virtual_time import loop_time, settle, virtual_time
from worker.flow.gate import Permit, RouteGate
from worker.flow.queue import AdmissionOrder
from worker.policy.judge import MAX_CONTINUATIONS
from worker.ports import BackendRequest, ResumePoint, Settlement
from worker.settings.schema import BreakerSettings

ACK, NACK = Settlement.ACK, Settlement.NACK


class Continuing(FakeBackend):
    """Goes on from what it is given."""

    def resume_points(self) -> list[ResumePoint | None]:
        return [request.resume_point for request in self.requests]


@virtual_time
async def test_a_broken_stream_is_continued_in_this_process() -> None:
    """The message is kept, though its class would hand it back, and the next try is given what came."""
    good = Answer(result={"salvaged_tokens": 3})
    backend = Continuing(broken(resume_point=RESUME_POINT), good)
    pipeline = Pipeline(backend, include_stats=True)
    assert await pipeline.handle(message(attempt=1)) is ACK
    assert backend.resume_points() == [None, RESUME_POINT]
    stats = pipeline.answer.json["stats"]
    assert (stats["salvaged_tokens"], stats["attempts"]) == (3, 2)
    assert loop_time() < 1.5
    assert pipeline.count("attempts_total", "fake", "stream_broken", "hold") == 1


@virtual_time
async def test_it_counts_against_the_limit_of_its_class() -> None:
    """Three attempts of a stream that breaks, and the last one's partial is the answer."""
    rest = ResumePoint(text="Hello", tokens=5)
    backend = Continuing(
        broken(resume_point=RESUME_POINT), broken(resume_point=rest), broken(text="Hello wor", resume_point=rest)
    )
    pipeline = Pipeline(backend)
    assert await pipeline.handle(message(attempt=1)) is ACK
    assert backend.resume_points() == [None, RESUME_POINT, rest]
    assert content(pipeline.answer.json["body"]) == "Hello wor"


@virtual_time
async def test_the_brokers_count_is_heeded() -> None:
    """A third delivery of a class that has three attempts is its last one: nothing is continued."""
    backend = Continuing(then=broken(resume_point=RESUME_POINT))
    pipeline = Pipeline(backend)
    assert await pipeline.handle(message(attempt=3)) is ACK
    assert len(backend.requests) == 1


@virtual_time
async def test_a_class_without_a_limit_is_continued_a_few_times() -> None:
    """Then it goes elsewhere."""
    aborted = Answer(body=partial().replace(b"null", b'"abort"'), result={"resume_point": RESUME_POINT})
    backend = Continuing(then=aborted)
    pipeline = Pipeline(backend, breaker=BreakerSettings(failures=1000))
    assert await pipeline.handle(message(attempt=1)) is NACK
    assert len(backend.requests) == MAX_CONTINUATIONS + 1


@virtual_time
async def test_nothing_is_continued_in_a_drain() -> None:
    """It is handed back: another pod begins anew."""
    backend = Continuing(then=broken(resume_point=RESUME_POINT, seconds=10.0))
    pipeline = Pipeline(backend)
    handling = pipeline.start(message(attempt=1))
    await asyncio.sleep(5)
    pipeline.processor.begin_drain()
    assert await handling is NACK
    assert len(backend.requests) == 1


@virtual_time
async def test_without_anything_to_go_on_from_it_is_handed_back() -> None:
    """As ever."""
    backend = Continuing(then=broken())
    pipeline = Pipeline(backend)
    assert await pipeline.handle(message(attempt=1)) is NACK
    assert len(backend.requests) == 1


@virtual_time
async def test_an_error_event_before_new_text_is_a_plain_error(logs: list[Any]) -> None:
    """What the try went on from is in its partial, but this stream had not begun: it is held as what it names."""
    busy = {"error": {"message": "busy", "type": "t", "code": 503}}
    first = {"partial": partial(), "resume_point": RESUME_POINT, "in_stream": True, "content_events": 0}
    refused = Answer(body=json.dumps(busy).encode(), result=first)
    pipeline = Pipeline(Continuing(broken(resume_point=RESUME_POINT), refused))
    assert await pipeline.handle(message(attempt=1)) is ACK
    assert [line["error_class"] for line in logs if line["event"] == "attempt_held"] == ["stream_broken", "overloaded"]


class ListeningGate(RouteGate):
    """Remembers of whom it was told that they will report their first token."""

    streamed: list[bool]

    async def admit(self, order: AdmissionOrder, *, streamed: bool = False, **more: Any) -> Permit:
        self.streamed.append(streamed)
        return await super().admit(order, streamed=streamed, **more)


@virtual_time
async def test_the_gate_knows_which_attempts_will_tell_of_their_first_token() -> None:
    """Only of those does silence mean that they wait."""
    pipeline = Pipeline()
    gate = pipeline.target.gate
    gate.__class__, gate.streamed = ListeningGate, []  # type: ignore[assignment,attr-defined]
    for is_streaming in (False, True):
        pipeline.backend.is_streaming = is_streaming
        await pipeline.handle()
    assert gate.streamed == [False, True]  # type: ignore[attr-defined]


@virtual_time
async def test_behind_an_open_breaker_it_waits_and_is_continued_then(logs: list[Any]) -> None:
    """The outage is not the message's fault: held by the rule for outages, and what came is not lost meanwhile."""
    backend = Continuing(*[broken(resume_point=RESUME_POINT)] * 2, then=REFUSED)
    pipeline = Pipeline(backend, breaker=BreakerSettings(failures=2))

    def recovers(request: BackendRequest) -> Answer:
        return Answer(result={"salvaged_tokens": request.resume_point.tokens if request.resume_point else None})

    backend.then = recovers
    other = pipeline.start(message(attempt=1))
    assert await pipeline.handle(message(attempt=1)) is ACK
    assert await other is ACK
    assert RESUME_POINT in backend.resume_points()
    rules = [line["rule"] for line in logs if line["event"] == "attempt_held"]
    assert rules == ["builtin:stream_broken+continuation", "builtin:stream_broken+outage"]


@virtual_time
async def test_the_first_token_frees_a_probing_breaker() -> None:
    """The gate hears of the first text of a stream, not only of its end."""
    backend = FakeBackend(REFUSED, REFUSED, REFUSED, then=Answer(first_token_s=1.0, seconds=1000.0))
    backend.is_streaming = True
    pipeline = Pipeline(backend)
    handling = [pipeline.start() for _ in range(3)]
    await settle()
    assert pipeline.target.is_open()
    await asyncio.sleep(20)
    assert not pipeline.target.is_open()
    assert not any(each.done() for each in handling)
    await asyncio.gather(*handling)
