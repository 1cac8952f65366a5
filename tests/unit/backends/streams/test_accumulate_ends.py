"""When an answer is whole, what is left of one that is not, and what the timers are told."""

import json

import pytest

from tests.support.streaming_chunks import DONE, TEXT, delta, event, feed, result, tool, usage_chunk
from worker.backends.streams.accumulator import Progress
from worker.backends.streams.sse import Event

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
    """A second try that continues the first gives one text; ids and usage are those of the second alone."""
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


def test_usage_is_removed_from_the_result_only_when_nobody_asked():
    """The statistics have it all the same."""
    chunks = (delta("stop", content="a"), usage_chunk(prompt_tokens=1))
    assert "usage" not in result(*chunks, keep_usage=False)
    assert feed(*chunks, keep_usage=False).usage == {"prompt_tokens": 1}


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
    assert accumulator.feed_all(batch) == Progress(data=True, content=True)
    assert accumulator.feed_all([]) == Progress()
    assert accumulator.content_events == 1
