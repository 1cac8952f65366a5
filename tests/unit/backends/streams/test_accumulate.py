"""Behaviour of the accumulators of `choices`: the body, the message, who is asked for."""

import json

import pytest

from tests.support.streaming_chunks import DONE, TEXT, delta, feed, message, result, tool, usage_chunk
from worker.backends.streams.accumulator import MalformedEventError
from worker.errors import BackendError
from worker.policy.model import Fault

# --- the whole body


def test_a_plain_chat_becomes_its_unstreamed_body():
    """The top level, the message, the finish reason and the usage, in the order OpenAI has them."""
    body = result(
        {**delta(role="assistant", content=""), "obfuscation": "xx"},
        delta(content="Hel"),
        delta(content="lo"),
        delta("stop"),
        usage_chunk(prompt_tokens=1, completion_tokens=2),
        DONE,
    )
    assert body == {
        "id": "c1",
        "object": "chat.completion",
        "created": 7,
        "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2},
    }
    assert list(body) == ["id", "object", "created", "model", "choices", "usage"]


def test_a_plain_completion_becomes_its_unstreamed_body():
    """`text` is concatenated and the arrays of `logprobs` are extended."""
    logprobs = [
        {"tokens": [t], "token_logprobs": [p], "top_logprobs": None, "text_offset": [o]}
        for t, p, o in (("a", -1, 0), ("b", -2.5, 1))
    ]
    top = {"id": "x", "object": "text_completion", "created": 1, "model": "m"}
    body = result(
        {**top, "choices": [{"index": 0, "text": "a", "logprobs": logprobs[0], "finish_reason": None}]},
        {**top, "choices": [{"index": 0, "text": "b", "logprobs": logprobs[1], "finish_reason": None}]},
        {
            **top,
            "choices": [{"index": 0, "text": "", "logprobs": None, "finish_reason": "length", "stop_reason": None}],
        },
        path=TEXT,
    )
    whole = {"tokens": ["a", "b"], "token_logprobs": [-1, -2.5], "top_logprobs": None, "text_offset": [0, 1]}
    choice = {"index": 0, "text": "ab", "logprobs": whole, "finish_reason": "length", "stop_reason": None}
    assert body == {**top, "choices": [choice]}


def test_numbers_survive_exactly():
    """Integers of any size and floats come out as they went in."""
    numbers = {"big": 2**80 + 1, "negative": -(2**64), "float": 0.1, "tiny": 5e-324, "huge": 1.7976931348623157e308}
    body = result({**delta("stop", content="x"), **numbers})
    assert {key: body[key] for key in numbers} == numbers
    assert isinstance(body["big"], int)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([None, "a", None], "a"),
        (["a", ""], "a"),
        (["a", "b"], "b"),
        ([0, 5, 0], 0),
        ([True, False], False),
        ([None], None),
    ],
    ids=repr,
)
def test_top_level_last_word_wins_and_nothing_erases(values, expected):
    """The last non-null value stands; a null or an empty string later on takes nothing away."""
    chunks = [{**delta(content="x"), "extra": value} for value in values]
    assert result(*chunks, delta("stop"))["extra"] == expected


def test_a_chunk_with_another_top_level_is_not_taken_for_a_repetition():
    """What the top level says last stands, also where the chunk is otherwise of the commonest kind."""
    body = result(
        delta(content="a"), delta(content="b"), {**delta(content="c"), "created": 9, "model": "n"}, delta("stop")
    )
    assert (body["created"], body["model"]) == (7, "m")
    body = result(delta(content="a"), delta("stop"), {**delta(content="c"), "created": 9, "model": "n"})
    assert (body["created"], body["model"], body["choices"][0]["message"]["content"]) == (9, "n", "ac")


def test_choices_are_told_apart_and_sorted():
    """Interleaved choices, the higher index first, come out complete and in order."""
    body = result(
        delta(index=1, role="assistant", content="b"),
        delta(index=0, role="assistant", content="a"),
        delta(index=1, content="B"),
        delta(index=0, content="A"),
        delta("stop", index=1),
        delta("length", index=0),
        choices=2,
    )
    texts = [(c["index"], c["message"]["content"], c["finish_reason"]) for c in body["choices"]]
    assert texts == [(0, "aA", "length"), (1, "bB", "stop")]


def test_several_choices_in_one_chunk():
    """A chunk may have a part of every choice."""
    chunk = delta()
    chunk["choices"] = [{"index": i, "delta": {"content": str(i)}, "finish_reason": "stop"} for i in range(3)]
    assert feed(chunk, choices=3).generated_text() == {0: "0", 1: "1", 2: "2"}
    for choice in chunk["choices"]:
        choice["finish_reason"] = None
    assert feed(chunk, chunk, chunk).generated_text() == {0: "000", 1: "111", 2: "222"}


def test_a_choice_without_an_index_is_the_first():
    """`index` defaults to 0."""
    assert result({"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]})["choices"][0]["index"] == 0


# --- messages


def test_the_last_role_stands():
    """Also where the chunk is otherwise of the commonest kind."""
    assert message({"role": "assistant", "content": "a"}, {"role": "model", "content": "b"}) == {
        "role": "model",
        "content": "ab",
    }


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_keeps_the_name_it_came_under(name):
    """vLLM and Ollama say `reasoning`, DeepSeek, SGLang and llama.cpp `reasoning_content`."""
    made = message({"role": "assistant", "content": ""}, {name: "thi"}, {name: "nk"}, {"content": "a"})
    assert made == {"role": "assistant", name: "think", "content": "a"}


@pytest.mark.parametrize(
    ("other", "content"),
    [
        (tool(0, "a", "f", "{}"), None),
        ({"refusal": "no"}, None),
        ({"reasoning": "hm"}, None),
        ({"annotations": []}, ""),
    ],
    ids=["tools", "refusal", "reasoning", "nothing"],
)
def test_an_empty_content_beside_something_else_is_null(other, content):
    """Streams begin with an empty string where an unstreamed answer has null; alone, it is an empty answer."""
    assert message({"role": "assistant", "content": ""}, other)["content"] == content


def test_refusal_and_its_logprobs():
    """A refusal grows like content, its logprobs beside those of content."""
    chunks = [delta(refusal="n"), delta(refusal="o"), delta("stop")]
    for chunk, token in zip(chunks, "no", strict=False):
        chunk["choices"][0]["logprobs"] = {"content": None, "refusal": [{"token": token, "logprob": -0.5}]}
    choice = result(*chunks)["choices"][0]
    assert choice["message"]["refusal"] == "no"
    assert [entry["token"] for entry in choice["logprobs"]["refusal"]] == ["n", "o"]
    assert choice["logprobs"]["content"] is None


def test_content_that_is_text_and_parts_loses_nothing():
    """Mistral's reasoning models send parts and then text, or the other way round."""
    part = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    a = {"type": "text", "text": "a"}
    assert message({"content": ""}, {"content": [part]}, {"content": "a"})["content"] == [part, a]
    assert message({"content": "a"}, {"content": [part]})["content"] == [a, part]


def test_a_whole_message_in_a_chunk_stands_for_all_before():
    """Gateways that only pretend to stream send `message` instead of `delta`."""
    chunk = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "whole"}, "finish_reason": "stop"}]}
    assert result(delta(content="who"), chunk)["choices"][0]["message"]["content"] == "whole"


def test_halves_of_an_emoji_meet_again():
    """A server that cuts at UTF-16 units sends each half of a pair as an escape; a missing half is replaced."""
    accumulator = feed(
        delta(content="a"), delta(content="b"),
        rb'{"choices":[{"index":0,"delta":{"content":"\ud83d"}}]}', rb'{"choices":[{"index":0,"delta":{"content":"\uDE00"}}]}',
        rb'{"choices":[{"index":0,"delta":{"content":"\ud83d"},"finish_reason":"stop"}]}',
    )  # fmt: skip
    assert json.loads(accumulator.result())["choices"][0]["message"]["content"] == "ab😀\ufffd"
    assert accumulator.generated_text() == {0: "ab😀\ufffd"}
    assert accumulator.partial()["choices"][0]["message"]["content"] == "ab😀\ufffd"


def test_long_texts_are_joined_in_order():
    """More pieces than are kept apart at once."""
    pieces = [f"{i} " for i in range(10_000)]
    assert message(*[{"content": piece} for piece in pieces])["content"] == "".join(pieces)


# --- the front door


def test_malformed_events_are_backend_errors():
    """An event that is not JSON breaks the stream, as the policy's `stream_broken`, with a bounded piece of it."""
    with pytest.raises(MalformedEventError) as raised:
        feed(delta(content="a"), b"<html>" + b"x" * 5000)
    assert isinstance(raised.value, BackendError)
    assert raised.value.fault == Fault.STREAM_BROKEN
    assert len(raised.value.data) == 2048
