"""What the accumulators of all APIs have in common: ends, errors, partial answers, and what they tell the timers."""

import itertools
import json

import pytest

from tests.support.streams import CHAT, DONE, TEXT, delta, event, feed, feed_all, tool, usage_chunk
from worker.backends.streams.accumulator import MalformedEventError, Progress
from worker.backends.streams.reading import accumulator_for
from worker.backends.streams.sse import Event, SSEParser
from worker.policy.normalise import normalise
from worker.wire.endpoints import endpoint_of

# --- completeness


def test_finish_reason_without_done_is_complete():
    """The answer is accepted, and the missing `[DONE]` is told."""
    accumulator = feed(delta("stop", content="a"))
    assert (accumulator.is_complete(), accumulator.missing_done) == (True, True)
    accumulator.feed(DONE)
    assert (accumulator.is_complete(), accumulator.missing_done, accumulator.done) == (True, False, True)


@pytest.mark.parametrize(
    ("chunks", "options"),
    [
        ([], {}),
        ([DONE], {}),
        ([delta(content="a"), DONE], {}),
        ([delta("", content="a"), DONE], {}),
        ([delta("stop", content="a"), DONE], {"choices": 2}),
        ([delta("stop", index=0), delta(index=1, content="b"), DONE], {}),
        ([usage_chunk(prompt_tokens=1), DONE], {}),
    ],
    ids=[
        "nothing",
        "done alone",
        "no finish reason",
        "an empty one",
        "a choice short",
        "an unfinished one",
        "usage alone",
    ],
)
def test_done_without_every_finish_reason_is_broken(chunks, options):
    """`[DONE]` proves nothing: every choice asked for and every choice seen needs its finish reason."""
    accumulator = feed(*chunks, **options)
    assert not accumulator.is_complete()
    with pytest.raises(RuntimeError):
        accumulator.result()


def test_a_torn_last_event_is_dropped_and_completeness_decides():
    """A stream that ends inside an event: whole if all finish reasons came before, broken if not; never an exception."""
    torn = Event(b'{"choices": [{"index": 0, "del', "", is_terminated=False)
    whole, broken = feed(delta("stop", content="a"), torn), feed(delta(content="a"), torn)
    assert (whole.is_complete(), broken.is_complete()) == (True, False)


# --- partial answers and continuation


def test_partial_has_null_finish_reasons():
    """What came of each choice, with a null where no finish reason came."""
    accumulator = feed(delta("", content="Hel"), delta("stop", index=1, content="b"), choices=2)
    assert [(c["message"]["content"], c["finish_reason"]) for c in accumulator.partial()["choices"]] == [
        ("Hel", None),
        ("b", "stop"),
    ]


@pytest.mark.parametrize("chunks", [[], [delta(role="assistant", content="")], [usage_chunk(prompt_tokens=1)]])
def test_nothing_generated_is_no_partial(chunks):
    """A role, an empty string and a usage are not worth sending."""
    accumulator = feed(*chunks)
    assert (accumulator.has_partial, accumulator.partial()) == (False, None)


def test_partial_keeps_unfinished_tool_arguments():
    """Half a tool call is half a tool call: the requester sees how far it came."""
    call = feed(delta(**tool(0, "a", "f", '{"q": "wea')))
    assert call.partial()["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == '{"q": "wea'


def test_continuation_begins_with_the_prefix():
    """A second attempt that continues the first gives one text; ids and usage are those of the second alone."""
    accumulator = feed(delta(content="lo"), delta("stop"), usage_chunk(prompt_tokens=9), prefix={0: "Hel"})
    body = json.loads(accumulator.result())
    assert body["choices"][0]["message"]["content"] == "Hello"
    assert (body["usage"], accumulator.content_events) == ({"prompt_tokens": 9}, 1)
    text = feed({"choices": [{"index": 0, "text": "lo", "finish_reason": "stop"}]}, path=TEXT, prefix={0: "Hel"})
    assert json.loads(text.result())["choices"][0]["text"] == "Hello"


def test_a_continuation_that_breaks_at_once_keeps_the_prefix():
    """The prefix is a partial answer even when nothing followed it, and never a complete one."""
    accumulator = feed(prefix={0: "Hel"})
    assert (accumulator.has_partial, accumulator.is_complete()) == (True, False)
    assert accumulator.partial()["choices"][0]["message"]["content"] == "Hel"
    assert accumulator.generated_text() == {0: "Hel"}


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ([delta(role="assistant", content="a")], True),
        ([delta(content="a", refusal=None, reasoning="")], True),
        ([delta(content="a", reasoning="hm")], False),
        ([delta(content="a", **tool(0, "a", "f", ""))], False),
        ([delta(refusal="no")], False),
        ([delta(content=[{"type": "text", "text": "a"}])], False),
        ([{"choices": [{"delta": {"content": "a"}, "logprobs": {"content": [{"token": "a"}]}}]}], False),
    ],
)
def test_only_plain_text_can_be_continued(chunks, expected):
    """A server can go on from text; not from reasoning, tools or refusals, nor give the logprobs of what it did not write."""
    assert feed(*chunks).is_text_only is expected


# --- usage


def test_zeros_are_not_a_usage():
    """Ollama's placeholders count nothing: absent, not zero; they do not erase real counts."""
    zeros = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    assert feed({**delta(content="a"), "usage": zeros}).usage is None
    assert feed(usage_chunk(prompt_tokens=4), {**delta("stop"), "usage": zeros}).usage == {"prompt_tokens": 4}


# --- what the timers are told


@pytest.mark.parametrize(
    ("chunk", "expected"),
    [
        (delta(role="assistant", content=""), Progress(data=True)),
        (delta(role="assistant"), Progress(data=True)),
        (delta("stop"), Progress(data=True)),
        (delta(content="a"), Progress(data=True, content=True)),
        (delta(content=" "), Progress(data=True, content=True)),
        (delta(reasoning="a"), Progress(data=True, content=True)),
        (delta(reasoning_content="a"), Progress(data=True, content=True)),
        (delta(refusal="a"), Progress(data=True, content=True)),
        (delta(**tool(0, "a", "f")), Progress(data=True, content=True)),
        (delta(**tool(0, arguments="{")), Progress(data=True, content=True)),
        (delta(**tool(0, "a", arguments="")), Progress(data=True)),
        (delta(function_call={"arguments": "{"}), Progress(data=True, content=True)),
        (delta(tool_calls=[{"index": 0, "custom": {"input": "x"}}]), Progress(data=True, content=True)),
        (usage_chunk(prompt_tokens=1), Progress(data=True)),
        (usage_chunk(prompt_tokens=0), Progress(data=True)),
        ({"error": {"message": "no"}}, Progress(data=True, error=True)),
        (b"[DONE]", Progress(data=True)),
        (b" [DONE] ", Progress(data=True)),
        (b"", Progress()),
        (b" \t", Progress()),
        ({"type": "ping"}, Progress()),
        (b"null", Progress()),
    ],
    ids=lambda value: "" if isinstance(value, Progress) else str(value)[-60:],
)
def test_progress(chunk, expected):
    """The first event with generated text of any kind is the first token; heartbeats do not keep a stream alive."""
    for accumulator in (feed(), feed(delta(role="assistant", content="", reasoning="", reasoning_content=""))):
        assert accumulator.feed(event(chunk)) == expected


def test_progress_of_a_batch_is_that_of_all_its_events():
    """What one network read brought."""
    accumulator = feed()
    batch = [event(delta(role="assistant")), event(delta(content="a")), event(usage_chunk(prompt_tokens=1)), DONE]
    assert feed_all(accumulator, batch) == Progress(data=True, content=True)
    assert feed_all(accumulator, []) == Progress()
    assert accumulator.content_events == 1


# Errors


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
        b"{", b"1", b'"text"', b"[]", b"[1]", b"[{}, {}]", b"<html></html>", b"\xff\xfe", b"{}{}", b'{"a": NaN}',
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
