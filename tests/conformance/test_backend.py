"""
The exam that every backend sits: what `worker.ports.Backend` promises, against the simulated server.

A backend is a constructor and what it cannot do; the questions are the same for all.  What concerns one of them alone
(HTTP's framing, SageMaker's frames) is asked in tests/integration.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.attempts import CHAT, HELLO, Ended, attempt
from tests.support.aws_tokens import use_keys
from tests.support.random_bodies import canon
from tests.support.raw_http import until
from worker.backends.openai import HttpBackend
from worker.emulators.openai import SimBackend, SimOptions
from worker.emulators.openai.options import EXAMPLE_KEY
from worker.policy.model import Phase
from worker.ports import AttemptResult, Backend, BackendRequest
from worker.settings.schema import RouteSettings
from worker.wire.body import RequestBody

STREAM = {**HELLO, "stream": True}
KEY = "sk-of-the-exam"


@dataclass(frozen=True)
class Subject:
    """A backend under examination."""

    name: str
    route: dict[str, Any]
    """Settings beside those of the question."""
    rejected_key: dict[str, Any]
    """Settings of the server with which its credentials are refused."""
    sends_request_id: bool = True
    has_responses_api: bool = True
    has_health_path: bool = True

    def open(self, base_url: str, **route: Any) -> Backend:
        """Return the backend for a server."""
        settings = RouteSettings.model_validate({"name": "r", "base_url": base_url, **self.route, **route})
        if not settings.is_sagemaker:
            return HttpBackend(settings)
        from worker.backends.sagemaker import SageMakerBackend

        return SageMakerBackend(settings)


SUBJECTS = (
    Subject("openai", {"api_key": KEY}, {"api_key": "another"}),
    Subject(
        "sagemaker",
        {"sagemaker": {"endpoint": "ep"}},
        {"aws_key": EXAMPLE_KEY[:-1] + "x"},
        sends_request_id=False,
        has_responses_api=False,
        has_health_path=False,
    ),
)


@dataclass
class Exam:
    """One backend's room: a server, and attempts against it."""

    subject: Subject
    sim: SimBackend
    opened: list[Backend] = field(default_factory=list)

    def open(self, **route: Any) -> Backend:
        """Return a backend that is closed at the end."""
        backend = self.subject.open(self.sim.base_url, timeouts={"total_s": 20, **route.pop("timeouts", {})}, **route)
        self.opened.append(backend)
        return backend

    async def ask(self, path: str = CHAT, body: dict[str, Any] | bytes = HELLO, **route: Any) -> Ended:
        """Make one attempt with a backend of its own."""
        return await attempt(self.open(**route), path, body)

    @property
    def requests(self) -> int:
        """How many have come."""
        return int(self.sim.snapshot()["requests"])


@pytest.fixture(params=SUBJECTS, ids=[subject.name for subject in SUBJECTS])
async def exam(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Exam]:
    """Each backend in turn."""
    use_keys(monkeypatch, tmp_path, *EXAMPLE_KEY.split(":"))
    async with SimBackend(SimOptions.of(sagemaker=True, api_key=KEY)) as sim:
        room = Exam(request.param, sim)
        yield room
        for backend in room.opened:
            await backend.aclose()
            await backend.aclose()


# Answers


async def test_a_whole_answer(exam: Exam) -> None:
    """Status, headers, body, times and the server's id of the request are in the result."""
    ended = await exam.ask()
    result = ended.result
    assert ended.body["choices"][0]["message"]["content"]
    assert (result.status, result.phase, result.streamed, result.in_stream) == (200, Phase.PARSE, False, False)
    assert result.headers["content-type"] == "application/json"
    assert result.backend_request_id
    assert result.ended is not None
    assert result.ended >= result.started > 0
    assert result.usage.output


async def test_a_streamed_answer_is_the_whole_one(exam: Exam) -> None:
    """Put together from its events; the first text is told once."""
    calls: list[str] = []
    backend = exam.open()
    whole = await attempt(backend)
    streamed = await attempt(backend, body=STREAM, on_first_token=lambda: calls.append("token"))
    assert canon(streamed.body) | {"usage": 0} == canon(whole.body) | {"usage": 0}
    assert streamed.result.streamed
    assert streamed.result.first_token_at is not None
    assert calls == ["token"]
    assert backend.streams(CHAT, RequestBody(json.dumps(STREAM).encode()))
    assert not backend.streams(CHAT, RequestBody(json.dumps(HELLO).encode()))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "m", "prompt": "p"}),
        ("/v1/completions", {"model": "m", "prompt": ["p", "q"], "stream": True}),
        ("/v1/embeddings", {"model": "m", "input": ["a", "b"]}),
        ("/v1/responses", {"model": "m", "input": "p", "stream": True}),
    ],
)
async def test_every_api(path: str, body: dict[str, Any], exam: Exam) -> None:
    """Those that the server has."""
    ended = await exam.ask(path, body)
    if path == "/v1/responses" and not exam.subject.has_responses_api:
        assert (ended.error_class, exam.requests) == ("invalid_request", 0)
    else:
        assert ended.body


async def test_a_body_reaches_the_server_byte_for_byte(exam: Exam) -> None:
    """Big integers, escapes, the order of keys, white space."""
    body = b'{"z" : 12345678901234567890,\n "model":"m", "messages":[{"role":"user","content":"\\u00e9\xc3\xa9"}]}'
    await exam.sim.control({"mode": "outage_5xx", "match": {"body": body.decode()}})
    assert (await exam.ask(body=body)).result.status in {500, 424}


async def test_the_callbacks_of_a_connection(exam: Exam) -> None:
    """`on_connected` for each request that is sent, not for one that cannot be."""
    calls: list[str] = []
    await attempt(exam.open(), on_connected=lambda: calls.append("connected"))
    assert calls == ["connected"]
    await exam.sim.control({"mode": "refuse"})
    ended = await attempt(exam.open(), on_connected=lambda: calls.append("refused"))
    assert (ended.error_class, calls) == ("connect", ["connected"])


async def test_many_at_once(exam: Exam) -> None:
    """Each gets its own answer."""
    backend = exam.open()
    bodies = [{**HELLO, "messages": [{"role": "user", "content": f"question {number}"}]} for number in range(50)]
    at_once = await asyncio.gather(*(attempt(backend, body=body) for body in bodies))
    for body, ended in zip(bodies, at_once, strict=True):
        assert canon(ended.body) == canon((await attempt(backend, body=body)).body)


# Errors


@pytest.mark.parametrize(
    ("mode", "error_class", "do"),
    [
        ({"mode": "outage_5xx"}, "server_error", "nack"),
        ({"mode": "html_502"}, "server_error", "nack"),
        ({"mode": "not_ready"}, "not_ready", "hold"),
        ({"mode": "overloaded"}, "overloaded", "hold"),
        ({"mode": "rate_limit"}, "rate_limited", "hold"),
        ({"mode": "quota"}, "quota", "hold"),
        ({"mode": "model_not_found"}, "model_not_found", "reply"),
        ({"mode": "content_filter"}, "content_filter", "reply"),
        ({"mode": "context_length"}, "context_length", "reply"),
        ({"mode": "reset"}, "connection_lost", "nack"),
        ({"mode": "close"}, "connection_lost", "nack"),
        ({"mode": "empty_200"}, "malformed", "nack"),
        ({"mode": "half_json"}, "malformed", "nack"),
        ({"mode": "truncated_json"}, "connection_lost", "nack"),
        ({"mode": "empty_choices"}, "empty_answer", "nack"),
        ({"mode": "abort"}, "aborted", "nack"),
    ],
    ids=lambda value: value["mode"] if isinstance(value, dict) else "",
)
async def test_an_error_has_its_class(mode: dict[str, Any], error_class: str, do: str, exam: Exam) -> None:
    """Whatever service is in front of the server; one request each, no retry underneath."""
    await exam.sim.control(mode)
    ended = await exam.ask()
    assert (ended.error_class, ended.decision.disposition.value) == (error_class, do)
    assert exam.requests == 1
    status, body = ended.reply
    assert status >= 400
    assert isinstance(body, dict)


async def test_refused_credentials_are_held(exam: Exam) -> None:
    """The worker's own fault, and nothing of what the server says of it is shown."""
    await exam.sim.control({"settings": exam.subject.rejected_key})
    ended = await exam.ask()
    assert (ended.error_class, ended.decision.disposition, ended.decision.breaker) == ("auth", "hold", "trip")
    assert KEY not in json.dumps(ended.reply[1])


@pytest.mark.parametrize(
    ("fault", "error_class"),
    [
        ({"break": "eof"}, "stream_broken"),
        ({"break": "rst"}, "stream_broken"),
        ({"break": "mid_chunk"}, "stream_broken"),
        ({"break": "bad_chunk"}, "stream_broken"),
        ({"break": "close_eof"}, "stream_broken"),
        ({"break": "error_event"}, "stream_broken"),
        ({"break": "error_event", "error": "context_length"}, "context_length"),
        ({"break": "idle"}, "stream_idle"),
        ({"break": "comments", "comment_every_s": 0.02}, "stream_idle"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
async def test_a_broken_stream_keeps_its_text(fault: dict[str, Any], error_class: str, exam: Exam) -> None:
    """In its class, with what had come as the partial answer."""
    await exam.sim.control({"mode": "stream", "after_events": 6, **fault})
    ended = await exam.ask(body=STREAM, stream="always", timeouts={"idle_s": 0.3})
    assert ended.error_class == error_class
    _, body = ended.reply
    assert body["truncated"] is True
    assert body["partial"]["choices"][0]["message"]["content"]
    assert ended.result.content_events > 0


@pytest.mark.parametrize(
    "shape",
    [
        {"split_bytes": 3},
        {"line_ending": "crlf"},
        {"line_ending": "cr", "split_bytes": 1},
        {"bom": True},
        {"multiline": True},
        {"missing_done": True},
        {"missing_last_blank": True},
    ],
    ids=str,
)
async def test_odd_streams_are_whole_answers(shape: dict[str, Any], exam: Exam) -> None:
    """However they are cut and written."""
    plain = await exam.ask(body=STREAM)
    await exam.sim.control({"mode": "stream", **shape})
    assert canon((await exam.ask(body=STREAM)).body) == canon(plain.body)


# Limits


async def test_the_limits_of_time(exam: Exam) -> None:
    """All of it, the first byte, the request's own deadline."""
    await exam.sim.control({"mode": "hang"})
    assert (await exam.ask(timeouts={"total_s": 0.2, "connect_s": 0.1})).error_class == "timeout"
    assert (await exam.ask(timeouts={"first_byte_s": 0.2})).error_class == "timeout"
    ended = await attempt(exam.open(), timeout_s=0.2)
    assert ended.error_class == "timeout"
    assert ended.result.ended is not None


async def test_an_answer_over_the_limit(exam: Exam) -> None:
    """Is cut off, in one piece or streamed."""
    await exam.sim.control({"mode": "oversize", "bytes": 5_000})
    for body in (HELLO, STREAM):
        assert (await exam.ask(body=body, max_response_bytes=2_000)).error_class == "reply_too_large"


async def test_cancellation_closes_the_connection(exam: Exam) -> None:
    """What had come is in the result."""
    await exam.sim.control({"mode": "stream", "break": "idle", "after_events": 6})
    result = AttemptResult()
    request = BackendRequest(path=CHAT, body=RequestBody(json.dumps(STREAM).encode()))
    task = asyncio.ensure_future(exam.open().invoke(request, result))
    await until(lambda: result.first_token_at is not None)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()
    await exam.sim.stats.wait_for(lambda stats: stats.client_disconnects == 1)
    assert result.partial is not None
    assert result.ended is not None


# What is around attempts


async def test_the_health_path(exam: Exam) -> None:
    """Asked where there is one; `None` where there is none, never an exception."""
    if not exam.subject.has_health_path:
        assert await exam.open().probe() is None
        return
    backend = exam.open(breaker={"health_path": "/health"})
    assert await backend.probe() is True
    await exam.sim.control({"mode": "outage_5xx"})
    assert await backend.probe() is False
    assert await exam.open().probe() is None


async def test_credentials_that_stay_the_same(exam: Exam) -> None:
    """Are not called changed."""
    backend = exam.open()
    await attempt(backend)
    assert not backend.credentials_changed()


async def test_the_servers_view_of_a_request(exam: Exam) -> None:
    """Repeats of a message can be told, by the id that gets through."""
    backend = exam.open()
    for _ in range(2):
        await attempt(backend, message_id="m-1", headers={"x-request-id": "r-1"})
    ids = exam.sim.snapshot()["request_ids"]
    assert ids["repeats"] == 1
