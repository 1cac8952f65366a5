"""Error events: first, in the middle, at the end; what they hold; what is done with what is no event at all."""

import itertools
import json

import pytest

from tests.support.streaming_chunks import CHAT, DONE, TEXT, delta, event, feed
from worker.backends.streams.accumulator import MalformedEventError
from worker.backends.streams.reading import accumulator_for
from worker.backends.streams.sse import Event, SSEParser
from worker.policy.normalise import normalise
from worker.wire.endpoints import endpoint_of

ERROR = {"error": {"message": "engine is dead", "type": "InternalServerError", "param": None, "code": 500}}


@pytest.mark.parametrize("path", [CHAT, TEXT, "/v1/responses"])
def test_an_error_first_is_a_plain_error(path):
    """Before any chunk it stands for an HTTP error: its bytes, nothing partial, whatever follows."""
    accumulator = feed(ERROR, DONE, path=path)
    assert accumulator.error == json.dumps(ERROR).encode()
    assert (accumulator.is_complete(), accumulator.partial()) == (False, None)


def test_an_error_in_the_middle_leaves_the_partial():
    """SGLang goes on to `[DONE]`, others to a finish reason: the stream has failed all the same."""
    accumulator = feed(delta(content="Hel"), ERROR, delta("stop", content="lo"), DONE)
    assert accumulator.error is not None
    assert not accumulator.is_complete()
    assert not accumulator.missing_done
    assert accumulator.partial()["choices"][0]["message"]["content"] == "Hello"
    with pytest.raises(RuntimeError):
        accumulator.result()


def test_an_error_after_done_undoes_it():
    """A complete answer followed by an error event is a failed one."""
    accumulator = feed(delta("stop", content="a"), DONE)
    assert accumulator.is_complete()
    accumulator.feed(event(ERROR))
    assert not accumulator.is_complete()


def test_the_first_error_stays():
    """Later ones are consequences."""
    accumulator = feed(ERROR, {"error": {"message": "second", "code": 503}})
    assert accumulator.error == json.dumps(ERROR).encode()


@pytest.mark.parametrize(
    ("body", "hint"),
    [
        ({"error": {"message": "m", "code": 429}}, 429),
        ({"error": {"message": "m", "code": "429"}}, 429),
        ({"error": {"message": "m", "code": "rate_limit_exceeded"}}, None),
        ({"error": {"message": "m", "code": None}}, None),
        ({"error": {"message": "m", "code": 200}}, None),
        ({"error": {"message": "m", "code": True}}, None),
        ({"error": {"message": "m", "status": 503}}, 503),
        ({"error": {"message": "m", "http_status_code": 422}}, None),
        ({"error": {"message": "m", "http_status_code": 503}}, 503),
        ({"error": "text", "error_type": "generation"}, None),
        ({"error": "text", "code": 503}, 503),
        ({"object": "error", "message": "m", "type": "BadRequestError", "code": 400}, 400),
        ({"type": "error", "code": "server_error", "message": "m", "param": None}, None),
        ([{"error": {"code": 400, "message": "m", "status": "INVALID_ARGUMENT"}}], 400),
        ({"id": "g", "choices": [{"delta": {"content": ""}, "finish_reason": "error"}], "error": {"code": 502}}, 502),
    ],
    ids=lambda value: json.dumps(value)[:40] if not isinstance(value, int | None) else "",
)
def test_shapes_of_errors(body, hint):
    """Nested, flat, text, in a list, beside choices; `code` as number or text; TGI's constant 422 says nothing."""
    accumulator = feed(body)
    assert accumulator.error == json.dumps(body).encode()
    assert normalise(None, {}, accumulator.error).status_hint == hint


def test_an_event_named_error_is_one_whatever_it_holds():
    """The name is enough; its data need not be JSON."""
    for data in (b"{}", b"upstream timed out", b"\xff", json.dumps(delta(content="a")).encode()):
        accumulator = feed(delta(role="assistant", content="a"), Event(data, "error"))
        assert accumulator.error == data
        assert accumulator.generated_text() == {0: "a"}


@pytest.mark.parametrize("body", [{"error": None}, {"error": {}}, {"error": ""}])
def test_no_error_in_an_error_field(body):
    """Some servers have the field in every chunk."""
    accumulator = feed({**delta("stop", content="a"), **body})
    assert accumulator.error is None
    assert accumulator.is_complete()


@pytest.mark.parametrize(
    "data",
    [
        b"{", b"null", b"1", b'"text"', b"[]", b"[1]", b"[{}, {}]", b"<html></html>", b"\xff\xfe", b"{}{}", b'{"a": NaN}',
        b'{"choices": 1}', b'{"choices": [1]}', b'{"choices": [{"delta": "x"}]}', b'{"choices": [{"index": "0"}]}',
        b'{"choices": [{"delta": {"tool_calls": [1]}}]}', b'{"choices": [{"delta": {"a": NaN, "b": "\\ud83d"}}]}',
        b'{"a": ' + b"[" * 101 + b"]" * 101 + b"}", b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"a": "\\ud83d", "b": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
    ids=lambda data: data[:24].decode("latin-1"),
)  # fmt: skip
def test_what_is_no_chunk_is_malformed(data):
    """Never skipped: what was lost with it could be the middle of the answer."""
    accumulator = feed(delta(content="a"))
    with pytest.raises(MalformedEventError):
        accumulator.feed(Event(data))
    assert accumulator.generated_text() == {0: "a"}


@pytest.mark.parametrize("data", [b'{"choices": [{"text": 1}]}', b'{"choices": [{"index": 1.5, "text": ""}]}'])
def test_what_is_no_completion_chunk_is_malformed(data):
    """A text that is none."""
    with pytest.raises(MalformedEventError):
        feed(data, path=TEXT)


def test_one_hundred_levels_are_not_too_deep():
    """The limit of nesting is far above what servers send."""
    accumulator = feed({**delta("stop"), "extra": None})
    accumulator.feed(Event(b'{"choices": [], "extra": ' + b"[" * 99 + b"]" * 99 + b"}"))
    assert b"[" * 99 in accumulator.result()


def test_an_error_frame_of_a_proxy_is_found_through_the_parser():
    """From bytes: LiteLLM's frame with a text code, cut at every byte."""
    stream = b': ok\r\n\r\ndata: {"error": {"message": "slow down", "code": "429"}}\r\n\r\ndata: [DONE]\r\n\r\n'
    for cut in range(len(stream)):
        accumulator, parser = accumulator_for(endpoint_of(CHAT)), SSEParser()
        for event_ in itertools.chain(parser.feed(stream[:cut]), parser.feed(stream[cut:]), parser.close()):
            accumulator.feed(event_)
        assert accumulator.error == b'{"error": {"message": "slow down", "code": "429"}}'
