"""Streams of choices: the body, the message, and what real servers do to a stream."""

import json
import time

import pytest

from tests.support.streams import DONE, TEXT, delta, feed, message, result, tool, usage_chunk
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
    body = result(delta(content="a"), {**delta("stop", content="c"), "created": 9, "model": "n"})
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


# What real servers do, and other accumulators get wrong


# --- what other accumulators get wrong


def test_repeated_role_is_one_role():
    """Ollama and TGI send the role in every delta."""
    assert message(*[{"role": "assistant", "content": c} for c in "abc"]) == {"role": "assistant", "content": "abc"}


def test_usage_before_the_last_chunk_stays():
    """A usage chunk need not be the last; later nulls do not erase it."""
    accumulator = feed(
        usage_chunk(prompt_tokens=3), {**delta(content="a"), "usage": None}, {**delta("stop"), "usage": None}
    )
    assert accumulator.usage == {"prompt_tokens": 3}
    assert json.loads(accumulator.result())["usage"] == {"prompt_tokens": 3}


def test_fingerprint_on_one_chunk_only_stays():
    """vLLM puts it on the last chunk only, others on the first."""
    assert result({**delta(content="a"), "system_fingerprint": "fp"}, delta("stop"))["system_fingerprint"] == "fp"


def test_repeated_tool_id_and_name_are_not_concatenated():
    """Some servers send id, type and name with every piece of the arguments."""
    pieces = ['{"a"', ": 1", "}"]
    assert message(*[tool(0, "call_a", "f", piece) for piece in pieces])["tool_calls"] == [
        {"id": "call_a", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    ]


def test_an_empty_name_or_id_later_erases_nothing():
    """Some servers send empty strings where OpenAI sends nothing."""
    call = message(
        tool(0, "a", "f", "{"), {"tool_calls": [{"index": 0, "id": "", "function": {"name": "", "arguments": "}"}}]}
    )
    assert call["tool_calls"] == [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


def test_second_choice_first_after_azures_empty_chunk():
    """Azure's first chunk has no choices at all; the first one that comes may be number 1."""
    first = {
        "id": "",
        "object": "",
        "created": 0,
        "model": "",
        "choices": [],
        "prompt_filter_results": [{"prompt_index": 0}],
    }
    body = result(first, delta("stop", index=1, content="b"), delta("stop", index=0, content="a"), choices=2)
    assert (body["id"], body["created"], body["model"]) == ("c1", 7, "m")
    assert body["prompt_filter_results"] == [{"prompt_index": 0}]
    assert [c["message"]["content"] for c in body["choices"]] == ["a", "b"]


def test_tool_calls_out_of_order_are_sorted_by_index():
    """Index 1 may come before index 0; the result is in the order of the indexes and does not have them."""
    calls = message(tool(1, "b", "g", "{}"), tool(0, "a", "f", "{"), tool(1, arguments=" "), tool(0, arguments="}"))[
        "tool_calls"
    ]
    assert [(call["id"], call["function"]["arguments"]) for call in calls] == [("a", "{}"), ("b", "{} ")]
    assert all("index" not in call for call in calls)


def test_tool_calls_without_an_index():
    """An id begins a call, no id continues the latest, a known id continues its own."""
    calls = message(
        tool(None, "a", "f", "{"), tool(None, arguments="}"), tool(None, "b", "g", "["), tool(None, arguments="1"),
        tool(None, "a", arguments=" "), tool(None, "b", arguments="]"),
    )["tool_calls"]  # fmt: skip
    assert [(call["id"], call["function"]["arguments"]) for call in calls] == [("a", "{} "), ("b", "[1]")]


def test_every_tool_call_numbered_zero_is_still_one_call_each():
    """Ollama numbers every call 0: another id together with a name is another call."""
    calls = message(tool(0, "a", "f", "{}"), tool(0, "b", "f", "[]"))["tool_calls"]
    assert [(call["id"], call["function"]["arguments"]) for call in calls] == [("a", "{}"), ("b", "[]")]


def test_a_new_id_with_every_piece_is_one_call():
    """Old vLLM made up an id for every delta of a call; the name came once."""
    calls = message(tool(0, "a", "f", "{"), tool(0, "b", arguments="}"))["tool_calls"]
    assert calls == [{"id": "b", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


def test_a_name_that_comes_late_is_no_second_call():
    """As long as a call has no name, another id is still its own."""
    calls = message(tool(0, "a", arguments=""), tool(0, "b", "f", "{}"))["tool_calls"]
    assert calls == [{"id": "b", "type": "function", "function": {"arguments": "{}", "name": "f"}}]


def test_a_lone_tool_call_object_counts_as_a_list():
    """Old TGI sent an object where a list belongs."""
    call = {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert message({"tool_calls": call})["tool_calls"] == [{k: v for k, v in call.items() if k != "index"}]


def test_custom_tool_calls_and_the_old_function_call():
    """The same rules hold for a custom tool's input and for `function_call`."""
    custom = [{"index": 0, "id": "a", "type": "custom", "custom": {"name": "f", "input": part}} for part in ("x", "y")]
    made = message(
        *[{"tool_calls": [each]} for each in custom],
        {"function_call": {"name": "f", "arguments": "{"}},
        {"function_call": {"arguments": "}"}},
    )
    assert made["tool_calls"] == [{"id": "a", "type": "custom", "custom": {"name": "f", "input": "xy"}}]
    assert made["function_call"] == {"name": "f", "arguments": "{}"}


def test_a_content_filter_finish_is_an_answer():
    """Azure's `content_filter` finish reason is a complete answer with its verdicts, not an exception."""
    filtered = delta("content_filter", content="a")
    filtered["choices"][0]["content_filter_results"] = {"hate": {"filtered": True, "severity": "high"}}
    choice = result(filtered)["choices"][0]
    assert choice["finish_reason"] == "content_filter"
    assert choice["content_filter_results"]["hate"]["filtered"] is True


THOUGHT = {"type": "thinking", "thinking": "hmm", "signature": "s"}


@pytest.mark.parametrize(
    ("key", "deltas", "whole"),
    [
        (
            "thinking_blocks",
            [
                [{"type": "thinking", "thinking": "h"}],
                [{"type": "thinking", "thinking": "m"}],
                [{"type": "thinking", "thinking": "m"}],
                [{"type": "thinking", "thinking": "", "signature": "s"}],
            ],
            [THOUGHT],
        ),
        ("thinking_blocks", [[THOUGHT], [THOUGHT], [{"type": "redacted_thinking", "data": "x"}]], [THOUGHT, THOUGHT, {"type": "redacted_thinking", "data": "x"}]),
        ("thinking_blocks", [[THOUGHT, THOUGHT]], [THOUGHT, THOUGHT]),
        ("reasoning_details", [[{"text": "a"}], [{"text": "b"}]], [{"text": "ab"}]),
        (
            "reasoning_details",
            [[{"type": "reasoning.text", "text": t, "index": 0, "format": "f"}] for t in "ab"]
            + [[{"type": "reasoning.encrypted", "data": "x", "index": 0}]],
            [
                {"type": "reasoning.text", "text": "ab", "index": 0, "format": "f"},
                {"type": "reasoning.encrypted", "data": "x", "index": 0},
            ],
        ),
        ("parts", [[{"id": "a", "text": "1"}], [{"id": "b", "text": "2"}], [{"id": "a", "text": "3"}]], [{"id": "a", "text": "13"}, {"id": "b", "text": "2"}]),
        ("annotations", [[{"type": "url", "url": "u"}]] * 3, [{"type": "url", "url": "u"}]),
        ("annotations", [[{"url": "u"}], [{"url": "u"}, {"url": "v"}]], [{"url": "u"}, {"url": "v"}]),
        ("annotations", [[{"url": "u"}], [{"url": "v"}]], [{"url": "u"}, {"url": "v"}]),
        ("citations", [["u", "v"]] * 3, ["u", "v"]),
        ("citations", [["u"], ["u", "v"], ["u", "v", "w"]], ["u", "v", "w"]),
        ("citations", [["u"], ["v"]], ["u", "v"]),
        (
            "thinking_blocks",
            [[{"type": "thinking", "thinking": text}] for text in ("h", "mm")] + [[THOUGHT]],
            [THOUGHT],
        ),
        ("thinking_blocks", [[THOUGHT], [{"type": "thinking", "thinking": "x"}], [{"type": "thinking", "signature": "y"}]],
         [THOUGHT, {"type": "thinking", "thinking": "x", "signature": "y"}]),
        ("ids", [[1], [1], [2]], [1, 1, 2]),
        ("content", [[{"type": "thinking", "thinking": [{"type": "text", "text": t}]}] for t in "ab"] + ["c", "d"],
         [{"type": "thinking", "thinking": [{"type": "text", "text": "ab"}]}, {"type": "text", "text": "cd"}]),
        ("provider", ["openai"] * 3, "openai"),
        ("status", ["in_progress", "in_progress", "completed"], "completed"),
        ("content", ["ha", "ha"], "haha"),
    ],
)  # fmt: skip
def test_what_grows_is_one_and_what_is_repeated_is_one(key, deltas, whole):
    """Blocks that come in pieces are whole blocks, and what stands in every delta stands once in the message."""
    assert message(*[{key: each} for each in deltas])[key] == whole


F = {"name": "f", "arguments": '{"a": 1}'}
G = {"name": "g", "arguments": "{}"}
HALVES = [{"name": "f", "arguments": '{"a"'}, {"arguments": ": 1}"}]


@pytest.mark.parametrize(
    ("deltas", "whole"),
    [
        ([[{"function": F}, {"function": G}]], [F, G]),
        ([[{"function": F}], [{"function": G}]], [F, G]),
        ([[{"function": F}, {"function": F}]], [F, F]),
        ([[{"function": HALVES[0]}], [{"function": HALVES[1]}], [{"function": G}]], [F, G]),
        ([[{"function": {"name": "f"}}, {"function": {"name": "g"}}]], [{"name": "f", "arguments": ""}, {"name": "g", "arguments": ""}]),
        ([[{"function": {"name": "f"}}], [{"function": {"name": "f", "arguments": '{"a": 1}'}}]], [F]),
        ([[{"index": 0, "function": F}], [{"index": 0, "function": G}]], [F, G]),
        ([[{"index": 0, "function": {"name": "f", "arguments": piece}}] for piece in ('{"a"', ": ", "1}")], [F]),
        ([[{"index": 0, "id": "a", "function": F}]] * 2, [F]),
        ([[{"id": "a", "function": F}, {"id": "b", "function": G}]], [F, G]),
        ([[{"index": 0, "function": {"name": "f"}}]], [{"name": "f", "arguments": ""}]),
        ([[{"id": "x", "function": F}, {"id": "x", "function": G}]], [F, G]),
        ([[{"id": "x", "function": G}], [{"id": "x", "function": {**G, "name": "h"}}]], [G, {**G, "name": "h"}]),
        ([[{"id": "x", "function": F}, {"id": "x", "function": F}]], [F, F]),
        ([[{"id": "x", "function": half} for half in HALVES]], [F]),
        ([[{"function": HALVES[0]}, {"function": {**HALVES[0], "name": "g"}}], [{"function": HALVES[1]}] * 2], [F, {**F, "name": "g"}]),
        ([[{"index": str(i), "function": HALVES[0]} for i in (0, 1)], [{"index": str(i), "function": HALVES[1]} for i in (1, 0)]], [F, F]),
        ([[{"function": {"name": "f", "arguments": "[1]"}}], [{"function": {"name": "f", "arguments": "[2]"}}]],
         [{"name": "f", "arguments": "[1]"}, {"name": "f", "arguments": "[2]"}]),
        ([[{"function": {"name": "f", "arguments": "null"}}]] * 2, [{"name": "f", "arguments": "null"}] * 2),
        ([[{"index": 0, "function": {"name": "f", "arguments": "1"}}], [{"index": 0, "function": {"arguments": "2"}}]],
         [{"name": "f", "arguments": "12"}]),
    ],
)  # fmt: skip
def test_tool_calls_are_told_apart_without_ids_and_indexes(deltas, whole):
    """As many calls as the whole answer has, each with its own arguments."""
    calls = message(*[{"tool_calls": each} for each in deltas])["tool_calls"]
    assert [call["function"] for call in calls] == whole


def test_empty_strings_of_events_are_dropped():
    """Unless something followed."""
    body = result({**delta(content="a", refusal="", reasoning=""), "system_fingerprint": ""}, delta("stop"))
    assert "system_fingerprint" not in body
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "a"}
    assert (
        result({**delta(content="a"), "system_fingerprint": ""}, {**delta("stop"), "system_fingerprint": "f"})[
            "system_fingerprint"
        ]
        == "f"
    )


@pytest.mark.parametrize("chunk", [
    {"choices": [{"index": index, "delta": {}} for index in range(300_000)]},
    {"choices": [{"index": 0, "delta": {"tool_calls": [{"function": {"name": "f"}}] * 200_000}}]},
    {"choices": [{"index": 0, "delta": {"tool_calls": [{"id": str(i), "function": {"name": "f"}} for i in range(20_000)]}}]},
    {"choices": [{"index": 0, "delta": {"tool_calls": [{"function": {"arguments": "x"}}] * 40_000}}]},
    {"choices": [{"index": 0, "delta": {"thinking_blocks": [{"index": 0, "type": "x"}] * 40_000}}]},
    {"choices": [{"index": 0, "delta": {"thinking_blocks": [{"type": "x"}] * 5_000}}]},
    {"choices": [{"index": 0, "delta": {str(i): "" for i in range(5_000)}}]},
], ids=["choices", "calls", "calls with ids", "pieces of calls", "pieces of parts", "parts", "fields"])  # fmt: skip
def test_an_answer_that_holds_too_much_is_malformed_at_once(chunk):
    """No event makes the event loop wait for seconds."""
    data, start = json.dumps(chunk).encode(), time.process_time()
    with pytest.raises(MalformedEventError):
        feed(data)
    assert time.process_time() - start < 2.0


def test_what_comes_one_by_one_is_bounded_as_well():
    """Tens of thousands of choices, or of calls, are refused while they come, and cost nothing in between."""
    start = time.process_time()
    with pytest.raises(MalformedEventError):
        feed(*[delta(index=index) for index in range(40_000)])
    with pytest.raises(MalformedEventError):
        feed(*[delta(**tool(None, str(number), "f", "{}")) for number in range(20_000)])
    assert time.process_time() - start < 5
    assert feed(*[delta("stop", index=index, content="a") for index in range(2000)], choices=2000).is_complete()


def test_stop_reason_and_token_ids_are_kept():
    """vLLM's fields: the last non-null stop reason, all token ids."""
    chunks = [delta(content="a"), delta(content="b"), delta("stop"), delta()]
    for chunk, ids in zip(chunks, ([1, 2], [3], [], None), strict=True):
        chunk["choices"][0] |= {"token_ids": ids, "stop_reason": 128001 if chunk is chunks[2] else None}
    choice = result(*chunks)["choices"][0]
    assert (choice["token_ids"], choice["stop_reason"], choice["finish_reason"]) == ([1, 2, 3], 128001, "stop")


def test_numbers_in_a_delta_are_not_added():
    """`expires_at` twice is `expires_at` once, beside strings that do grow."""
    audio = message({"audio": {"id": "a", "expires_at": 5, "data": "QU"}}, {"audio": {"expires_at": 5, "data": "JD"}})[
        "audio"
    ]
    assert audio == {"id": "a", "expires_at": 5, "data": "QUJD"}


def test_nothing_is_added_to_the_message():
    """The message has what came, a role and a content; nothing parsed, nothing numbered."""
    assert message({"content": "a"}) == {"role": "assistant", "content": "a"}
    assert message(tool(0, "a", "f", "{}")).keys() == {"role", "content", "tool_calls"}


# --- Azure's asynchronous filter


def annotation(finish_reason=None, **results) -> dict:
    offsets = {"check_offset": 44, "start_offset": 44, "end_offset": 198}
    choice = {
        "index": 0,
        "finish_reason": finish_reason,
        "content_filter_results": results,
        "content_filter_offsets": offsets,
    }
    return {"id": "", "object": "", "created": 0, "model": "", "choices": [choice], "usage": None}


def test_asynchronous_annotations_add_their_verdicts_only():
    """They merge by category, whenever they come, and erase neither id nor model nor finish reason."""
    body = result(
        delta(content="a"),
        annotation(hate={"filtered": False}),
        delta("stop"),
        annotation(violence={"filtered": False}),
    )
    verdicts = {"hate": {"filtered": False}, "violence": {"filtered": False}}
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "a"},
            "finish_reason": "stop",
            "content_filter_results": verdicts,
        }
    ]
    assert (body["id"], body["object"], body["created"], body["model"]) == ("c1", "chat.completion", 7, "m")


def test_an_annotation_may_end_the_stream():
    """A violation found afterwards brings the finish reason itself."""
    choice = result(delta(content="a"), annotation("content_filter", protected_material_text={"filtered": True}))[
        "choices"
    ][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("content_filter", "a")
