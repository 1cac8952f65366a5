"""Forms of a request, from the best one down to what a server takes, and what is remembered of that."""

import json
from typing import Any

import pytest

from tests.support.streams import delta, event, feed, feed_all
from worker.backends.request.negotiation import MAX_REMEMBERED, Negotiator, Plan
from worker.backends.request.stream import Form
from worker.backends.streams.reading import CutStreamError
from worker.errors import BackendError
from worker.policy.model import Fault
from worker.ports import AttemptResult, BackendRequest, ResumePoint
from worker.wire.body import RequestBody
from worker.wire.endpoints import endpoint_of

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
GOOD = b'{"choices":[{"index":0,"message":{"content":"a"},"finish_reason":"stop"}],"usage":{"prompt_tokens":1}}'
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
RESUME_POINT = ResumePoint(text="Hel", tokens=1)


def a_request(
    path: str = CHAT, *, resume_point: ResumePoint | None = None, message_id: str = "", **body: Any
) -> BackendRequest:
    data = RequestBody(json.dumps({**BODY, **body}).encode())
    return BackendRequest(path=path, body=data, resume_point=resume_point, message_id=message_id)


def form(known: Negotiator, request: BackendRequest) -> Form:
    return known.form(endpoint_of(request.path), request.body)


def negotiator(stream: Any = "auto", continuation: Any = "off") -> Negotiator:
    return Negotiator("r", stream, continuation)


def answered(status: int, message: str = "", *, param: str | None = None, **result: Any) -> AttemptResult:
    """How a server answered a call."""
    if status == 200:
        return AttemptResult(status=200, body=GOOD, **result)
    body = {"error": {"message": message, "type": "t", "param": param, "code": None}}
    return AttemptResult(status=status, body=json.dumps(body).encode(), **result)


def sent(plan: Plan) -> dict[str, Any]:
    """What is sent beside the request's own keys."""
    body = json.loads(plan.call.body)
    return {key: value for key, value in body.items() if key not in BODY}


REFUSES_STREAMS = [
    answered(400, "Your organization must be verified to stream this model.", param="stream"),
    answered(400, "Streaming is not supported for this model"),
    answered(422, "stream: Input should be false"),
    answered(501, "streaming is not implemented"),
    AttemptResult(status=422, body=b'{"detail":[{"loc":["body","stream"],"msg":"extra fields not permitted"}]}'),
]
REFUSES_OPTIONS = [
    answered(400, "Unrecognized request argument supplied: stream_options"),
    answered(400, "Unknown parameter", param="stream_options.include_usage"),
    AttemptResult(
        status=422, body=b'{"detail":[{"loc":["body","stream_options"],"msg":"extra fields not permitted"}]}'
    ),
]


@pytest.mark.parametrize("refusal", REFUSES_STREAMS)
def test_a_server_that_refuses_streams_is_asked_for_a_whole_answer(refusal: AttemptResult, logs: list[Any]) -> None:
    """In the same attempt; when it takes that, it is remembered and told once."""
    known = negotiator()
    plan = known.plan(a_request())
    assert sent(plan) == STREAMED
    assert plan.fall_back(refusal)
    assert sent(plan) == {}
    assert not plan.fall_back(answered(200))
    for _ in range(2):
        later = known.plan(a_request())
        assert sent(later) == {}
        assert not later.fall_back(answered(200))
    assert [line["refused"] for line in logs] == ["stream"]
    assert form(known, a_request()) is Form.UNARY


@pytest.mark.parametrize("refusal", REFUSES_OPTIONS)
@pytest.mark.parametrize("mode", ["auto", "always"])
def test_a_server_that_refuses_stream_options_streams_without(
    refusal: AttemptResult, mode: str, logs: list[Any]
) -> None:
    """The tokens are then unknown, the rest is as good."""
    known = negotiator(mode)
    plan = known.plan(a_request())
    assert plan.fall_back(refusal)
    assert sent(plan) == {"stream": True}
    assert not plan.fall_back(answered(200, streamed=True))
    assert sent(known.plan(a_request())) == {"stream": True}
    assert [line["refused"] for line in logs] == ["stream_options"]
    assert form(known, a_request()) is Form.STREAM


def test_one_refusal_after_the_other() -> None:
    """First the options, then the stream: the third request is the plain one."""
    plan = negotiator().plan(a_request(stream=True))
    assert plan.fall_back(REFUSES_OPTIONS[0])
    assert plan.fall_back(REFUSES_STREAMS[0])
    assert sent(plan) == {}
    assert not plan.fall_back(REFUSES_STREAMS[0])


def test_always_takes_the_refusal_for_the_answer() -> None:
    """The operator wants streams or nothing."""
    plan = negotiator("always").plan(a_request())
    assert not plan.fall_back(REFUSES_STREAMS[0])
    assert sent(plan) == STREAMED


FAILED_ALONE = [
    *[answered(status, "no") for status in (400, 401, 403, 404, 405, 422, 500, 501, 503)],
    answered(500, "cannot stream"),
    AttemptResult(status=200, body=b'{"error": {"message": "no"}}'),
    AttemptResult(status=200, body=b"<html>"),
    AttemptResult(status=200, body=b'{"error": {"message": "no", "code": 403}}', streamed=True, in_stream=True),
]


@pytest.mark.parametrize("failed", FAILED_ALONE)
def test_what_only_the_stream_may_have_is_asked_for_as_a_whole(failed: AttemptResult) -> None:
    """In the same attempt, before anything is decided; remembered once that worked."""
    known = negotiator()
    plan = known.plan(a_request())
    assert plan.fall_back(failed)
    assert sent(plan) == {}
    assert not plan.fall_back(answered(200))
    assert sent(known.plan(a_request())) == {}
    again = negotiator()
    plan = again.plan(a_request())
    assert plan.fall_back(failed)
    assert not plan.fall_back(failed)
    assert sent(again.plan(a_request())) == STREAMED


def test_a_refusal_for_another_reason_is_the_answer() -> None:
    """What says "later", what comes with text, and where the request asks for the stream or the operator for nothing else."""
    for result in [
        answered(429),
        answered(504),
        answered(408),
        AttemptResult(status=503, headers={"retry-after": "1"}),
    ]:
        assert not negotiator().plan(a_request()).fall_back(result)
    for result in [
        answered(400, "temperature must be below 2", param="temperature"),
        answered(401, "stream"),
        answered(403),
    ]:
        assert not negotiator("as_requested").plan(a_request(stream=True)).fall_back(result)
    for result in FAILED_ALONE:
        assert not negotiator("always").plan(a_request()).fall_back(result)
    text = AttemptResult(status=200, streamed=True, in_stream=True, content_events=1, body=b'{"error": "no"}')
    assert not negotiator().plan(a_request()).fall_back(text)


BROKEN = BackendError(Fault.STREAM_BROKEN, "no finish reason")


def test_a_stream_that_broke_by_its_own_fault_is_asked_for_as_a_whole() -> None:
    """Without text always; with text as long as no stream of this model was whole."""
    for events in (0, 3):
        known = negotiator("as_requested")
        plan = known.plan(a_request(stream=True))
        assert plan.fall_back(AttemptResult(status=200, streamed=True, content_events=events), BROKEN)
        assert sent(plan) == {}
        assert plan.broken is not None
        assert (plan.broken.fault, plan.broken.detail) == (BROKEN.fault, BROKEN.detail)
        assert not plan.fall_back(answered(200))
        assert sent(known.plan(a_request(stream=True))) == {}
    known = negotiator()
    whole = answered(200, streamed=True, is_whole=True, stream_usage={"prompt_tokens": 1})
    assert not known.plan(a_request()).fall_back(whole)
    assert not known.plan(a_request()).fall_back(AttemptResult(status=200, streamed=True, content_events=3), BROKEN)
    plan = known.plan(a_request())
    assert plan.fall_back(AttemptResult(status=200, streamed=True), BROKEN)
    assert not plan.fall_back(answered(200))
    assert sent(known.plan(a_request())) == STREAMED  # the others are streamed well


def test_a_stream_that_is_cut_off_again_and_again_has_no_end() -> None:
    """Once it may be the connection; a server that never names a finish reason is asked for whole answers."""
    known, cut = negotiator(), CutStreamError("cut")
    assert not known.plan(a_request()).fall_back(AttemptResult(status=200, streamed=True, content_events=3), cut)
    plan = known.plan(a_request())
    assert plan.fall_back(AttemptResult(status=200, streamed=True, content_events=3), cut)
    assert not plan.fall_back(answered(200))
    assert sent(known.plan(a_request())) == {}


def test_a_stream_without_usage_is_asked_for_as_a_whole() -> None:
    """Once: the model is then asked unstreamed, or its whole answers lack the usage as well."""
    lacking = answered(200, streamed=True, is_whole=True)
    known = negotiator()
    plan = known.plan(a_request())
    assert plan.fall_back(lacking)
    assert not plan.fall_back(answered(200))
    assert sent(known.plan(a_request())) == {}
    known = negotiator()
    plan = known.plan(a_request())
    assert plan.fall_back(lacking)
    assert not plan.fall_back(AttemptResult(status=200, body=GOOD.replace(b"usage", b"other")))
    plan = known.plan(a_request())
    assert sent(plan) == STREAMED
    assert not plan.fall_back(lacking)


@pytest.mark.parametrize("failure", [answered(500), answered(429), AttemptResult()])
def test_a_whole_answer_without_usage_is_better_than_none(failure: AttemptResult) -> None:
    """What was generated is not thrown away because the second request fails."""
    plan = negotiator().plan(a_request())
    assert plan.fall_back(answered(200, streamed=True, is_whole=True))
    result = failure
    assert not plan.fall_back(result)
    assert (result.status, result.body, result.is_whole) == (200, GOOD, True)


def test_log_probabilities_that_a_stream_lacks_are_asked_for() -> None:
    """Of a request that asks for a stream and for them."""
    usage = {"prompt_tokens": 1}
    plan = negotiator("as_requested").plan(a_request(stream=True, logprobs=True))
    assert plan.fall_back(answered(200, streamed=True, is_whole=True, stream_usage=usage))
    plan = negotiator("as_requested").plan(a_request(stream=True, logprobs=True))
    has = AttemptResult(status=200, body=b'{"choices":[{"logprobs":{"content":[]}}]}', streamed=True, is_whole=True)
    assert not plan.fall_back(has)


def test_a_wrong_guess_is_not_remembered(logs: list[Any]) -> None:
    """An error that only mentions streams, a prompt echoed in it for example, comes again for the whole answer."""
    known = negotiator()
    plan = known.plan(a_request())
    assert plan.fall_back(answered(400, "bad input: 'how do I stream a film?'"))
    assert not plan.fall_back(answered(400, "bad input: 'how do I stream a film?'"))
    assert sent(known.plan(a_request())) == STREAMED
    assert logs == []


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_then_fails_has_not_taken_anything(status: int) -> None:
    """It is asked for a stream the next time."""
    known = negotiator()
    plan = known.plan(a_request())
    assert plan.fall_back(REFUSES_STREAMS[0])
    assert not plan.fall_back(answered(status))
    assert sent(known.plan(a_request())) == STREAMED


def test_models_and_apis_are_remembered_apart() -> None:
    """Behind one gateway one model may stream and another one not."""
    known = negotiator()
    plan = known.plan(a_request())
    plan.fall_back(REFUSES_STREAMS[0])
    plan.fall_back(answered(200))
    assert sent(known.plan(a_request(model="other")))["stream"] is True
    assert sent(known.plan(a_request("/v1/completions", prompt="x")))["stream"] is True


def test_what_is_remembered_is_bounded() -> None:
    """Models are the requesters' to choose."""
    known = negotiator()
    for number in range(MAX_REMEMBERED + 10):
        plan = known.plan(a_request(model=f"m{number}"))
        plan.fall_back(REFUSES_STREAMS[0])
        plan.fall_back(answered(200))
    assert len(known._best) <= MAX_REMEMBERED


def test_the_form_is_what_a_plan_would_send() -> None:
    """Before an attempt the gate asks whether it will be streamed."""
    for mode in ("auto", "always", "never", "as_requested"):
        known = negotiator(mode)
        for body in ({}, {"n": 2}, {"stream": True}, {"best_of": 3}):
            for path in (CHAT, "/v1/embeddings"):
                request = a_request(path, **body)
                assert form(known, request) is known.plan(request).call.form
    assert form(negotiator(), BackendRequest(path=CHAT, body=RequestBody(b"nonsense"))) is Form.UNARY


def test_a_body_that_is_no_object_is_sent_as_it_is() -> None:
    """The server will say what is wrong with it; there is nothing to retreat to."""
    plan = negotiator().plan(BackendRequest(path=CHAT, body=RequestBody(b"nonsense")))
    assert plan.call.body == b"nonsense"
    assert not plan.fall_back(REFUSES_STREAMS[0])


# Going on from a text


def test_a_continuation_is_sent_and_its_text_is_safe_before_anything_comes() -> None:
    """A connection that is refused must not cost what was salvaged."""
    plan = negotiator("auto", "vllm").plan(a_request(resume_point=RESUME_POINT))
    assert sent(plan)["continue_final_message"] is True
    result = AttemptResult(status=503, headers={"a": "b"}, body=b"old")
    plan.reset(result)
    assert (result.status, result.headers, result.body, result.resume_point) == (None, {}, b"", RESUME_POINT)
    assert json.loads(result.partial or b"")["choices"][0]["message"]["content"] == "Hel"


@pytest.mark.parametrize("refusal", [answered(400, "unknown key"), answered(422), answered(413), answered(501)])
def test_a_server_that_refuses_to_go_on_is_asked_anew(refusal: AttemptResult, logs: list[Any]) -> None:
    """Nothing of the text stays; it is told once and asked again the next time."""
    known = negotiator("auto", "vllm")
    for _ in range(2):
        plan = known.plan(a_request(resume_point=RESUME_POINT))
        assert plan.fall_back(refusal)
        assert (sent(plan), plan.call.salvaged_tokens) == (STREAMED, None)
        result = AttemptResult()
        plan.reset(result)
        assert (result.partial, result.resume_point) == (None, None)
        accumulator = plan.call.new_accumulator()
        assert accumulator is not None
        feed_all(accumulator, [event(delta(content="New")), event(delta("stop"))])
        assert json.loads(accumulator.result())["choices"][0]["message"]["content"] == "New"
        assert not plan.fall_back(answered(200, streamed=True))
    assert [line["event"] for line in logs] == ["continuation_refused"]


def test_a_whole_answer_to_a_continuation_is_none() -> None:
    """It would be the rest without its beginning: the request starts anew."""
    plan = negotiator("auto", "vllm").plan(a_request(resume_point=RESUME_POINT))
    assert plan.fall_back(answered(200, streamed=False))
    assert sent(plan) == STREAMED


@pytest.mark.parametrize("result", [answered(503), answered(429), answered(401), answered(200, streamed=True)])
def test_other_ends_of_a_continuation_are_its_end(result: AttemptResult) -> None:
    """What fails for another reason is continued the next time."""
    plan = negotiator("auto", "vllm").plan(a_request(resume_point=RESUME_POINT))
    assert not plan.fall_back(result)
    assert plan.call.salvaged_tokens == 1


def test_what_cannot_be_continued_starts_anew() -> None:
    """A resume point that the request does not allow to use is left."""
    plan = negotiator("auto", "vllm").plan(a_request(resume_point=RESUME_POINT, tools=[{"type": "function"}]))
    assert plan.call.salvaged_tokens is None


def test_only_what_broke_is_salvaged() -> None:
    """A good answer leaves nothing to go on from; one that its server aborted in the middle does."""
    plan = negotiator("auto", "vllm").plan(a_request())
    assert plan.resume_point(feed(delta(content="Hel"))) == RESUME_POINT
    assert plan.resume_point(feed(delta(content="Hel"), delta("stop"))) is None
    assert plan.resume_point(feed(delta(content="Hel"), delta("abort"))) == RESUME_POINT
    assert plan.resume_point(feed(delta(role="assistant"))) is None
    assert negotiator("auto", "off").plan(a_request()).resume_point(feed(delta(content="Hel"))) is None
    tools = negotiator("auto", "vllm").plan(a_request(tools=[{"type": "function"}]))
    assert tools.resume_point(feed(delta(content="Hel"))) is None


# The next attempt


def fails_silently(known: Negotiator, request: BackendRequest, how: Fault | AttemptResult) -> None:
    """One attempt that ends without text."""
    plan = known.plan(request)
    if isinstance(how, AttemptResult):
        assert not plan.fall_back(how)
    else:
        plan.note_failure(AttemptResult(), how)


SILENCES: list[Fault | AttemptResult] = [
    Fault.CONNECTION_LOST,
    Fault.DECODING,
    Fault.IDLE_TIMEOUT,
    answered(429, "slow down"),
    answered(504, "no answer"),
    answered(408, "too late"),
]


@pytest.mark.parametrize("silence", SILENCES)
@pytest.mark.parametrize(("mode", "asks"), [("auto", {}), ("auto", STREAMED), ("as_requested", STREAMED)])
def test_what_failed_without_text_is_asked_for_unstreamed(
    silence: Fault | AttemptResult, mode: str, asks: dict[str, Any]
) -> None:
    """By the next attempt at the same message; the second message that is answered so teaches the form."""
    known = negotiator(mode)
    for message_id in ("a", "b"):
        fails_silently(known, a_request(message_id=message_id, **asks), silence)
        assert sent(known.plan(a_request(message_id="other", **asks))) == STREAMED
        plan = known.plan(a_request(message_id=message_id, **asks))
        assert sent(plan) == {}
        assert not plan.fall_back(answered(200))
    assert form(known, a_request(**asks)) is Form.UNARY


def test_where_streams_work_one_message_teaches_nothing() -> None:
    """It is answered unstreamed all the same."""
    known = negotiator()
    assert not known.plan(a_request()).fall_back(answered(200, streamed=True, is_whole=True, stream_usage={"a": 1}))
    for message_id in ("a", "b", "c"):
        fails_silently(known, a_request(message_id=message_id), Fault.CONNECTION_LOST)
        plan = known.plan(a_request(message_id=message_id))
        assert sent(plan) == {}
        assert not plan.fall_back(answered(200))
    assert form(known, a_request()) is Form.STREAM_WITH_USAGE


@pytest.mark.parametrize(
    ("how", "mode"),
    [
        (Fault.CONNECT, "auto"),
        (Fault.FIRST_BYTE_TIMEOUT, "auto"),
        (Fault.TOTAL_TIMEOUT, "auto"),
        (Fault.CONNECTION_LOST, "always"),
    ],
)
def test_what_a_whole_answer_would_not_mend_stays_a_stream(how: Fault, mode: str) -> None:
    """A server that is away or slow, and an operator who wants streams."""
    known = negotiator(mode)
    fails_silently(known, a_request(message_id="a"), how)
    assert sent(known.plan(a_request(message_id="a"))) == STREAMED


def test_what_failed_behind_some_text_stays_a_stream() -> None:
    """The stream works."""
    known = negotiator()
    known.plan(a_request(message_id="a")).note_failure(AttemptResult(content_events=1), Fault.CONNECTION_LOST)
    assert sent(known.plan(a_request(message_id="a"))) == STREAMED


def test_messages_that_failed_are_bounded() -> None:
    """As many as APIs and models."""
    known = negotiator()
    for number in range(2 * MAX_REMEMBERED + 1):
        known.note_silent(str(number))
    assert sum(known.is_silent(str(number)) for number in range(2 * MAX_REMEMBERED + 1)) <= MAX_REMEMBERED
