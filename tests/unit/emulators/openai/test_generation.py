"""What the simulated model says, also when a request begins its answer."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.simulated_openai import generated, unary_call
from worker.emulators.openai.dialects import DIALECTS, SimError
from worker.emulators.openai.generation import generate, subject, tokens_after
from worker.emulators.openai.options import SimOptions
from worker.emulators.openai.seeded import Draws
from worker.emulators.openai.validation import Endpoint, check, split_continuation

USER = {"role": "user", "content": "hello"}
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
        "unit": {"enum": ["C", "F"]},
        "when": {"type": "string", "format": "date"},
    },
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "news"}},
]


def test_same_seed_and_body_same_answer() -> None:
    """The answer depends on the seed and the body, on nothing else."""
    call = unary_call(n=2)
    first = generated(call)
    assert generated(call) == first
    assert first.choices[0].text != first.choices[1].text
    assert generated(call, seed=1) != first
    assert generated(call, body=b"other") != first


def test_the_form_of_a_request_does_not_change_its_subject() -> None:
    """Streaming, key order and spaces change nothing, every other value does, huge integers are no obstacle."""
    plain = subject({"model": "m", "messages": [USER]})
    assert subject({"messages": [USER], "model": "m", "stream": True, "stream_options": {}}) == plain
    assert subject({"model": "m", "messages": [USER], "seed": 1}) != plain
    assert subject({"seed": 2**70}) != subject({"seed": 2**71})


def test_answers_vary_around_the_mean_length() -> None:
    """Lengths lie between half of the mean and one and a half."""
    lengths = {generated(unary_call(), body=bytes([n])).completion_tokens for n in range(200)}
    assert min(lengths) == 12
    assert max(lengths) == 36
    assert generated(unary_call(), answer_tokens=1).completion_tokens == 1


def test_max_tokens_is_honoured() -> None:
    """An answer that is cut says `length`, one that fits says `stop`."""
    cut_off = generated(unary_call(max_tokens=3)).choices[0]
    assert (len(cut_off.tokens), cut_off.finish_reason) == (3, "length")
    whole = generated(unary_call(max_tokens=500)).choices[0]
    assert whole.finish_reason == "stop"
    assert whole.text.startswith(cut_off.text)
    assert generated(unary_call(Endpoint.COMPLETIONS, max_tokens=2)).completion_tokens == 2
    assert generated(unary_call(Endpoint.RESPONSES, max_output_tokens=2)).completion_tokens == 2


def test_reasoning_comes_first_and_counts() -> None:
    """Reasoning tokens are part of the completion tokens and of the budget."""
    asked = generated(unary_call(reasoning_effort="low", max_tokens=14))
    assert (asked.reasoning_tokens, asked.completion_tokens) == (12, 14)
    assert generated(unary_call(), reasoning_tokens=5).reasoning_tokens == 5
    assert generated(unary_call(reasoning_effort="none")).reasoning_tokens == 0
    assert generated(unary_call(Endpoint.RESPONSES, reasoning={"effort": "high"})).reasoning_tokens == 12


def test_stop_sequences_end_the_text() -> None:
    """The text ends before the first stop sequence, which is not returned."""
    text = generated(unary_call()).choices[0].text
    stop = text[10:14]
    stopped = generated(unary_call(stop=[stop, "never"])).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.find(stop)], "stop")


def test_required_tools_are_called_with_fitting_arguments() -> None:
    """`required` and a named function always give a call whose arguments fit the schema."""
    for number in range(30):
        choice = generated(unary_call(tools=TOOLS, tool_choice="required"), body=bytes([number])).choices[0]
        assert choice.finish_reason == "tool_calls"
        assert {one.name for one in choice.tool_calls} <= {"weather", "news"}
    named = unary_call(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "weather"}})
    arguments = json.loads("".join(generated(named).choices[0].tool_calls[0].arguments))
    assert arguments.keys() == SCHEMA["properties"].keys()  # type: ignore[attr-defined]
    assert isinstance(arguments["city"], str)
    assert 1 <= arguments["days"] <= 7
    assert (arguments["unit"] in {"C", "F"}, arguments["when"]) == (True, "2026-03-14")


def test_offered_tools_are_called_sometimes() -> None:
    """With `auto` some answers call a tool, some two, and most speak; with `none` and after a result all speak."""
    counts = [len(generated(unary_call(tools=TOOLS), body=bytes([n])).choices[0].tool_calls) for n in range(100)]
    assert set(counts) == {0, 1, 2}
    assert 30 < counts.count(0) < 70
    result = {"role": "tool", "tool_call_id": "1", "content": "rain"}
    for body in ({"tool_choice": "none"}, {"messages": [USER, result]}):
        call = unary_call(tools=TOOLS, **body)
        assert not any(generated(call, body=bytes([n])).choices[0].tool_calls for n in range(30))
    serial = unary_call(tools=TOOLS, parallel_tool_calls=False, tool_choice="required")
    assert {len(generated(serial, body=bytes([n])).choices[0].tool_calls) for n in range(50)} == {1}


@pytest.mark.parametrize("budget", range(1, 14))
def test_tool_arguments_are_cut_by_max_tokens(budget: int) -> None:
    """Calls that do not fit their budget end with `length` and half their arguments, as real ones do."""
    bodies = [bytes([n]) for n in range(60)]
    two = next(body for body in bodies if len(generated(unary_call(tools=TOOLS), body=body).choices[0].tool_calls) == 2)
    whole = generated(unary_call(tools=TOOLS), body=two).completion_tokens
    choice = generated(unary_call(tools=TOOLS, max_tokens=min(budget, whole - 1)), body=two).choices[0]
    assert (choice.finish_reason, choice.token_count) == ("length", min(budget, whole - 1))


def test_json_answers_are_json() -> None:
    """`json_object` gives an object, `json_schema` a value that fits."""
    assert isinstance(json.loads(generated(unary_call(response_format={"type": "json_object"})).choices[0].text), dict)
    wanted = {"type": "json_schema", "json_schema": {"name": "w", "schema": SCHEMA}}
    assert json.loads(generated(unary_call(response_format=wanted)).choices[0].text)["unit"] in {"C", "F"}
    text = {"format": {"type": "json_schema", "name": "w", "schema": SCHEMA}}
    assert json.loads(generated(unary_call(Endpoint.RESPONSES, text=text)).choices[0].text)["days"] <= 7


BODY: dict[str, Any] = {"model": "m", "messages": [USER]}


FLAGS = {"continue_final_message": True, "add_generation_prompt": False}


def opened(text: str) -> dict[str, Any]:
    return {**BODY, **FLAGS, "messages": [USER, {"role": "assistant", "content": text}]}


def generated_tokens(body: dict[str, Any], dialect: str = "vllm", **options: Any) -> list[str]:
    """The tokens of the answer to a body."""
    settings = SimOptions.of(**options)
    about, prefix = split_continuation(body, DIALECTS[dialect])
    call = check(Endpoint.CHAT, body, settings)
    call.prefix = prefix
    return generate(call, Draws(0, subject(about)), settings).choices[0].tokens


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
@pytest.mark.parametrize("tokens", [1, 5, 9])
def test_a_continuation_is_the_rest_of_the_answer(dialect: str, tokens: int) -> None:
    """The beginning and the rest are the whole answer."""
    whole = generated_tokens(BODY, dialect)
    assert generated_tokens(opened("".join(whole[:tokens])), dialect) == whole[tokens:]


def test_a_limit_of_tokens_cuts_the_rest() -> None:
    """The limit counts tokens of the continuation, and does not change the answer."""
    whole = generated_tokens({**BODY, "max_tokens": 50})
    assert generated_tokens({**opened("".join(whole[:4])), "max_tokens": 2}) == whole[4:6]


def test_another_beginning_is_followed_by_the_whole_answer() -> None:
    """A model continues any text."""
    assert generated_tokens(opened("Something else entirely")) == generated_tokens(BODY)


@given(st.lists(st.text(min_size=1, max_size=4), max_size=6), st.integers(0, 24))
def test_a_beginning_and_its_rest_are_the_whole(tokens: list[str], length: int) -> None:
    """Wherever the cut falls, also inside a token."""
    whole = "".join(tokens)
    assert whole[:length] + "".join(tokens_after(tokens, whole[:length])) == whole


@pytest.mark.parametrize("dialect", ["openai", "azure"])
def test_unknown_arguments_are_refused(dialect: str) -> None:
    """As OpenAI does."""
    with pytest.raises(SimError, match="Unrecognized request argument supplied: continue_final_message"):
        split_continuation(opened("a"), DIALECTS[dialect])


@pytest.mark.parametrize("dialect", ["tgi", "llamacpp", "ollama", "litellm"])
def test_others_ignore_it(dialect: str) -> None:
    """The request is answered as if the keys were absent."""
    body = opened("a")
    assert split_continuation(body, DIALECTS[dialect]) == (body, "")


def test_both_keys_exclude_each_other() -> None:
    """As in vLLM."""
    with pytest.raises(SimError, match="Cannot set both"):
        split_continuation({**opened("a"), "add_generation_prompt": True}, DIALECTS["vllm"])


@pytest.mark.parametrize(
    "body", [BODY, {**BODY, **FLAGS}, {**opened("a"), "continue_final_message": False}, {**opened("a"), "messages": []}]
)
def test_nothing_is_opened_without_a_beginning(body: dict[str, Any]) -> None:
    """Both the key and an assistant's last message are needed."""
    assert split_continuation(body, DIALECTS["vllm"]) == (body, "")
