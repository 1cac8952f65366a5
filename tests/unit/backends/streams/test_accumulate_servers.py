"""What real servers do to a stream, and other accumulators get wrong."""

import json

from tests.support.streaming_chunks import delta, feed, message, result, tool, usage_chunk

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


def test_reasoning_details_without_an_index_are_extended():
    """A list in a delta grows by what comes."""
    assert message({"reasoning_details": [{"text": "a"}]}, {"reasoning_details": [{"text": "b"}]})[
        "reasoning_details"
    ] == [
        {"text": "a"},
        {"text": "b"},
    ]


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
