"""Behaviour of the Responses API's accumulator: the terminal event is the answer, the rest is for when it never comes."""

import json
import time

import pytest

from tests.support.streams import DONE, event, feed
from worker.backends.streams.accumulator import MalformedEventError, Progress
from worker.backends.streams.responses import ResponsesAccumulator
from worker.backends.streams.sse import Event

PATH = "/v1/responses"
MESSAGE = {"id": "m", "type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hello"}]}


def ev(kind: str, **fields) -> Event:
    """A named event, as the API writes it."""
    return event({"type": kind, "sequence_number": 1, **fields}, kind)


def response(status="completed", **fields) -> dict:
    return {
        "id": "r",
        "object": "response",
        "status": status,
        "error": None,
        "output": [MESSAGE],
        "usage": None,
        **fields,
    }


def end(status="completed", **fields) -> Event:
    return ev(f"response.{status}", response=response(status, **fields))


def text(delta: str, **where) -> Event:
    return ev("response.output_text.delta", **{"output_index": 0, "content_index": 0, **where}, delta=delta)


def stream(*events: Event) -> ResponsesAccumulator:
    created = ev("response.created", response=response("in_progress", output=[]))
    accumulator = feed(created, *events, path=PATH)
    assert isinstance(accumulator, ResponsesAccumulator)
    return accumulator


@pytest.mark.parametrize("status", ["completed", "incomplete"])
def test_the_terminal_response_is_the_answer(status):
    """Byte for byte, numbers and all; no `[DONE]` is waited for."""
    raw = b'{"id":"r","status":"%s","output":[{"a": 1.50}], "big":%d,"usage":{"input_tokens":2}}' % (
        status.encode(),
        2**80,
    )
    accumulator = stream(text("Hel"), Event(b'{"type": "response.%s", "response": %s}' % (status.encode(), raw)))
    assert (accumulator.is_complete(), accumulator.missing_done) == (True, False)
    assert accumulator.result() == raw
    assert accumulator.usage == {"input_tokens": 2}
    accumulator.feed(DONE)
    assert accumulator.result() == raw


def test_without_a_terminal_event_it_is_broken():
    """Finished items and `[DONE]` are no end."""
    accumulator = stream(text("Hello"), ev("response.output_item.done", output_index=0, item=MESSAGE), DONE)
    assert not accumulator.is_complete()
    assert accumulator.usage is None
    with pytest.raises(RuntimeError):
        accumulator.result()


def test_failed_is_an_error_in_the_usual_envelope():
    """The response's own `error` is what the policy judges; what came before is the partial."""
    error = {"code": "rate_limit_exceeded", "message": "slow down"}
    accumulator = stream(text("Hel"), end("failed", error=error, output=[]))
    assert json.loads(accumulator.error) == {"error": error}
    assert (accumulator.error is None, accumulator.is_complete()) == (False, False)
    assert accumulator.partial()["output"][0]["content"][0]["text"] == "Hel"
    assert accumulator.partial()["status"] == "failed"


def test_failed_without_an_error_hands_on_the_event():
    """Nothing is made up."""
    failed = end("failed")
    assert stream(failed).error == failed.data


def test_a_flat_error_event_fails_the_stream():
    """`{"type": "error", code, message, param}` has no `error` key."""
    accumulator = stream(text("Hel"), ev("error", code="server_error", message="m", param=None), end())
    assert (accumulator.error is None, accumulator.is_complete()) == (False, False)


def test_partial_is_put_together_from_what_came():
    """Items, parts and deltas, each in its place; a finished item replaces its pieces; an item may come without its head."""
    accumulator = stream(
        ev("response.output_item.added", output_index=0, item={"id": "rs", "type": "reasoning", "summary": []}),
        ev(
            "response.reasoning_summary_part.added",
            output_index=0,
            summary_index=0,
            part={"type": "summary_text", "text": ""},
        ),
        ev("response.reasoning_summary_text.delta", output_index=0, summary_index=0, delta="hm"),
        ev("response.reasoning_summary_text.delta", output_index=0, summary_index=1, delta="oh"),
        ev(
            "response.output_item.added",
            output_index=2,
            item={"id": "fc", "type": "function_call", "name": "f", "arguments": ""},
        ),
        ev("response.function_call_arguments.delta", output_index=2, delta='{"q"'),
        ev("response.function_call_arguments.delta", output_index=2, delta=": 1"),
        text("gone", output_index=1),
        ev("response.output_item.done", output_index=1, item=MESSAGE),
        ev("response.refusal.delta", output_index=3, content_index=0, delta="no"),
    )
    assert accumulator.partial() == {
        **response("in_progress"),
        "output": [
            {"id": "rs", "type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}, {"text": "oh"}]},
            MESSAGE,
            {"id": "fc", "type": "function_call", "name": "f", "arguments": '{"q": 1'},
            {"content": [{"refusal": "no"}]},
        ],
    }
    assert accumulator.generated_text() == {0: "Hello"}


def test_an_empty_output_is_filled_in_from_the_stream():
    """Gateways end a whole stream with `output: []`; an answer that was sent is not dropped."""
    accumulator = stream(text("Hel"), ev("response.output_item.done", output_index=0, item=MESSAGE), end(output=[]))
    assert json.loads(accumulator.result()) == response()


def test_without_generated_text_there_is_no_partial():
    """Lifecycle events alone are not worth sending."""
    accumulator = stream(ev("response.in_progress", response=response("in_progress")))
    assert (accumulator.has_partial, accumulator.partial()) == (False, None)


def test_generated_text_is_without_reasoning():
    """Reasoning is not a text that could be continued."""
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]}
    accumulator = stream(ev("response.output_item.done", output_index=0, item=thought), text("a", output_index=1))
    assert accumulator.generated_text() == {0: "a"}


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (ev("response.in_progress", response=response("in_progress")), Progress(data=True)),
        (text("a"), Progress(data=True, content=True)),
        (text(""), Progress(data=True)),
        (ev("response.reasoning_text.delta", delta="a"), Progress(data=True, content=True)),
        (ev("response.reasoning_summary_text.delta", delta="a"), Progress(data=True, content=True)),
        (ev("response.refusal.delta", delta="a"), Progress(data=True, content=True)),
        (ev("response.function_call_arguments.delta", delta="{"), Progress(data=True, content=True)),
        (ev("response.custom_tool_call_input.delta", delta="{"), Progress(data=True, content=True)),
        (Event(b'{"delta": "a"}', "response.output_text.delta"), Progress(data=True, content=True)),
        (ev("response.web_search_call.searching", output_index=0), Progress(data=True)),
        (ev("response.something.delta", delta="a"), Progress(data=True)),
        (end(), Progress(data=True)),
        (end(usage={"input_tokens": 1}), Progress(data=True)),
        (end("failed"), Progress(data=True, error=True)),
        (ev("keepalive"), Progress()),
    ],
    ids=lambda value: "" if isinstance(value, Progress) else value.name,
)
def test_progress(sent, expected):
    """Deltas of any kind of text are content; `keepalive` is no sign of life of the generation."""
    assert stream().feed(sent) == expected


@pytest.mark.parametrize(
    "sent",
    [
        ev("response.completed"),
        ev("response.completed", response=[]),
        ev("response.created", response=None),
        ev("response.output_item.added", output_index=0),
        ev("response.output_item.done", output_index="0", item={}),
        ev("response.content_part.added", output_index=0, content_index=0, part=1),
        ev("response.output_text.delta", delta=1),
        ev("response.output_text.delta", delta="a", output_index=None),
    ],
    ids=lambda sent: sent.data.decode()[:60],
)
def test_events_of_another_shape_are_malformed(sent):
    """What the protocol promises and does not send breaks the stream."""
    with pytest.raises(MalformedEventError):
        stream().feed(sent)


def test_halves_of_an_emoji_meet_again():
    """In deltas, and in the terminal event."""
    halves = [
        Event(rb'{"type": "response.output_text.delta", "delta": "\ud83d"}'),
        Event(rb'{"type": "response.output_text.delta", "delta": "\ude00"}'),
    ]
    accumulator = stream(*halves)
    assert accumulator.generated_text() == {0: "😀"}
    accumulator.feed(Event(rb'{"type": "response.completed", "response": {"output": [{"x": "\ud83d"}]}}'))
    assert json.loads(accumulator.result()) == {"output": [{"x": "\ufffd"}]}


def test_a_terminal_event_in_a_list_is_one():
    """The list that some compatibility layers put around an object is taken off."""
    sent = end()
    assert json.loads(stream(Event(b"[" + sent.data + b"]")).result()) == response()


def test_items_and_their_pieces_are_bounded():
    """Eight thousand items are refused while they come; no step takes long."""
    start = time.process_time()
    with pytest.raises(MalformedEventError):
        feed(
            *[{"type": "response.output_text.delta", "output_index": i, "delta": "a"} for i in range(8_000)],
            path="/v1/responses",
        )
    with pytest.raises(MalformedEventError):
        feed(
            *[{"type": "response.output_text.delta", "content_index": i, "delta": "a"} for i in range(20_000)],
            path="/v1/responses",
        )
    assert time.process_time() - start < 5


@pytest.mark.parametrize("kind", ["response.completed", "response.incomplete"])
def test_a_long_terminal_event_is_passed_on_as_it_came(kind):
    """Millions of values in it are bytes; the usage is known all the same."""
    response = b'{"id":"r", "output":[%s{}], "usage":{"input_tokens":3}}' % (b"{}," * 300_000)
    accumulator = feed(b'{"type":"%s","response":%s}' % (kind.encode(), response), path="/v1/responses")
    assert accumulator.is_complete()
    assert accumulator.result() == response
    assert accumulator.usage == {"input_tokens": 3}
