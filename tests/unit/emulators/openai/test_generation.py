"""What the simulated model says, and the bodies made of it."""

import json
from base64 import b64decode
from struct import unpack
from typing import Any

import pytest

from worker.emulators.openai.answers import Identity, chat_body, completion_body, embedding_body
from worker.emulators.openai.dialects import DIALECTS
from worker.emulators.openai.generation import Generation, generate, subject
from worker.emulators.openai.options import SimOptions
from worker.emulators.openai.responses import response_body
from worker.emulators.openai.seeded import WORDS, Draws, schema_value, split_tokens, tokens_from
from worker.emulators.openai.validation import Call, Endpoint, check

ME = Identity("job-1", 1_800_000_000)
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


def call_of(endpoint: Endpoint = Endpoint.CHAT, **body: Any) -> Call:
    """Return a checked call."""
    base: dict[Endpoint, dict[str, Any]] = {
        Endpoint.CHAT: {"messages": [USER]},
        Endpoint.COMPLETIONS: {"prompt": "once"},
        Endpoint.RESPONSES: {"input": "hi"},
        Endpoint.EMBEDDINGS: {"input": "hi"},
    }
    return check(endpoint, {"model": "m", **base[endpoint], **body}, SimOptions())


def generated(call: Call, *, seed: int = 0, body: bytes = b"body", **settings: Any) -> Generation:
    """Return what the model says to a call."""
    return generate(call, Draws(seed, body), SimOptions.of(**settings))


def test_the_vocabulary_is_one_word_per_byte() -> None:
    """256 different words; a sixteenth of them is not ASCII, up to four UTF-8 bytes a character."""
    assert len(WORDS) == len(set(WORDS)) == 256
    assert {len(char.encode()) for word in WORDS for char in word} == {1, 2, 3, 4}
    assert sum(not word.isascii() for word in WORDS) == 16


@pytest.mark.parametrize("text", ["", "one", "Two words.", '{"a": [1, "ß"]}', "a\n\n  b 🙂!", "\u2028x"])
def test_any_text_is_cut_into_tokens_without_loss(text: str) -> None:
    """Tokens joined are the text again."""
    assert "".join(split_tokens(text)) == text


def test_same_seed_and_body_same_answer() -> None:
    """The answer depends on the seed and the body, on nothing else."""
    call = call_of(n=2)
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
    lengths = {generated(call_of(), body=bytes([n])).completion_tokens for n in range(200)}
    assert min(lengths) == 12
    assert max(lengths) == 36
    assert generated(call_of(), answer_tokens=1).completion_tokens == 1


def test_max_tokens_is_honoured() -> None:
    """An answer that is cut says `length`, one that fits says `stop`."""
    cut_off = generated(call_of(max_tokens=3)).choices[0]
    assert (len(cut_off.tokens), cut_off.finish_reason) == (3, "length")
    whole = generated(call_of(max_tokens=500)).choices[0]
    assert whole.finish_reason == "stop"
    assert whole.text.startswith(cut_off.text)
    assert generated(call_of(Endpoint.COMPLETIONS, max_tokens=2)).completion_tokens == 2
    assert generated(call_of(Endpoint.RESPONSES, max_output_tokens=2)).completion_tokens == 2


def test_reasoning_comes_first_and_counts() -> None:
    """Reasoning tokens are part of the completion tokens and of the budget."""
    asked = generated(call_of(reasoning_effort="low", max_tokens=14))
    assert (asked.reasoning_tokens, asked.completion_tokens) == (12, 14)
    assert generated(call_of(), reasoning_tokens=5).reasoning_tokens == 5
    assert generated(call_of(reasoning_effort="none")).reasoning_tokens == 0
    assert generated(call_of(Endpoint.RESPONSES, reasoning={"effort": "high"})).reasoning_tokens == 12


def test_stop_sequences_end_the_text() -> None:
    """The text ends before the first stop sequence, which is not returned."""
    text = generated(call_of()).choices[0].text
    stop = text[10:14]
    stopped = generated(call_of(stop=[stop, "never"])).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.find(stop)], "stop")


def test_required_tools_are_called_with_fitting_arguments() -> None:
    """`required` and a named function always give a call whose arguments fit the schema."""
    for number in range(30):
        choice = generated(call_of(tools=TOOLS, tool_choice="required"), body=bytes([number])).choices[0]
        assert choice.finish_reason == "tool_calls"
        assert {one.name for one in choice.tool_calls} <= {"weather", "news"}
    named = call_of(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "weather"}})
    arguments = json.loads("".join(generated(named).choices[0].tool_calls[0].arguments))
    assert arguments.keys() == SCHEMA["properties"].keys()  # type: ignore[attr-defined]
    assert isinstance(arguments["city"], str)
    assert 1 <= arguments["days"] <= 7
    assert (arguments["unit"] in {"C", "F"}, arguments["when"]) == (True, "2026-03-14")


def test_offered_tools_are_called_sometimes() -> None:
    """With `auto` some answers call a tool, some two, and most speak; with `none` and after a result all speak."""
    counts = [len(generated(call_of(tools=TOOLS), body=bytes([n])).choices[0].tool_calls) for n in range(100)]
    assert set(counts) == {0, 1, 2}
    assert 30 < counts.count(0) < 70
    result = {"role": "tool", "tool_call_id": "1", "content": "rain"}
    for body in ({"tool_choice": "none"}, {"messages": [USER, result]}):
        call = call_of(tools=TOOLS, **body)
        assert not any(generated(call, body=bytes([n])).choices[0].tool_calls for n in range(30))
    serial = call_of(tools=TOOLS, parallel_tool_calls=False, tool_choice="required")
    assert {len(generated(serial, body=bytes([n])).choices[0].tool_calls) for n in range(50)} == {1}


@pytest.mark.parametrize("budget", range(1, 14))
def test_tool_arguments_are_cut_by_max_tokens(budget: int) -> None:
    """Calls that do not fit their budget end with `length` and half their arguments, as real ones do."""
    bodies = [bytes([n]) for n in range(60)]
    two = next(body for body in bodies if len(generated(call_of(tools=TOOLS), body=body).choices[0].tool_calls) == 2)
    whole = generated(call_of(tools=TOOLS), body=two).completion_tokens
    choice = generated(call_of(tools=TOOLS, max_tokens=min(budget, whole - 1)), body=two).choices[0]
    assert (choice.finish_reason, choice.token_count) == ("length", min(budget, whole - 1))


def test_json_answers_are_json() -> None:
    """`json_object` gives an object, `json_schema` a value that fits."""
    assert isinstance(json.loads(generated(call_of(response_format={"type": "json_object"})).choices[0].text), dict)
    wanted = {"type": "json_schema", "json_schema": {"name": "w", "schema": SCHEMA}}
    assert json.loads(generated(call_of(response_format=wanted)).choices[0].text)["unit"] in {"C", "F"}
    text = {"format": {"type": "json_schema", "name": "w", "schema": SCHEMA}}
    assert json.loads(generated(call_of(Endpoint.RESPONSES, text=text)).choices[0].text)["days"] <= 7


def test_recursive_and_odd_schemas_end() -> None:
    """A schema that refers to itself, or is none at all, still gives a value."""
    tree = {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}}}}
    assert json.dumps(schema_value(tree, Draws(0))).count("next") > 3
    odd: list[Any] = [True, None, {"type": "what"}, {"enum": []}, {"type": ["null", "boolean"]}, {"anyOf": [{"const": 1}]},
                      {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 2}, "minItems": 2}]  # fmt: skip
    values = [schema_value(schema, Draws(0)) for schema in odd]
    assert isinstance(values[4], bool)
    assert values[5:] == [1, [1.0, 1.0]]


def test_a_chat_body_has_openais_shape() -> None:
    """Ids, usage, logprobs and nulls stand where OpenAI's clients look for them."""
    call = call_of(logprobs=True, max_tokens=2)
    body = chat_body(call, generated(call), DIALECTS["openai"], ME)
    choice = body["choices"][0]
    assert (body["id"], body["object"], body["created"]) == ("chatcmpl-job-1", "chat.completion", ME.created)
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == split_tokens(choice["message"]["content"])
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + 2


def test_dialects_put_reasoning_where_they_do() -> None:
    """vLLM and Ollama say `reasoning`, SGLang and llama.cpp `reasoning_content`, OpenAI only counts it."""
    call = call_of()
    bodies = {name: chat_body(call, generated(call, reasoning_tokens=3), row, ME) for name, row in DIALECTS.items()}
    found = {
        name: body["choices"][0]["message"].keys() & {"reasoning", "reasoning_content"} for name, body in bodies.items()
    }
    assert found["vllm"] == found["ollama"] == {"reasoning"}
    assert found["sglang"] == found["llamacpp"] == {"reasoning_content"}
    assert found["openai"] == set()
    assert bodies["openai"]["usage"]["completion_tokens_details"]["reasoning_tokens"] == 3
    assert bodies["azure"]["prompt_filter_results"]


def test_completions_of_several_prompts_are_in_order() -> None:
    """Each prompt has its n choices, and `echo` repeats it before each."""
    call = call_of(Endpoint.COMPLETIONS, prompt=["one", "two"], n=2, echo=True, logprobs=1, max_tokens=3)
    body = completion_body(call, generated(call), DIALECTS["openai"], ME)
    texts = [choice["text"] for choice in body["choices"]]
    assert [text[:3] for text in texts] == ["one", "one", "two", "two"]
    assert body["choices"][0]["logprobs"]["text_offset"][0] == 0


def test_a_response_that_was_cut_is_incomplete() -> None:
    """The Responses API says why it stopped in its status."""
    call = call_of(Endpoint.RESPONSES, max_output_tokens=2)
    body = response_body(call, generated(call), DIALECTS["openai"], ME)
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    whole = response_body(call, generated(call_of(Endpoint.RESPONSES)), DIALECTS["openai"], ME)
    assert (whole["status"], whole["incomplete_details"]) == ("completed", None)


def test_embeddings_are_unit_vectors_of_the_text() -> None:
    """The same text has the same vector in any request, in both encodings, with the wanted length."""
    one = embedding_body(call_of(Endpoint.EMBEDDINGS, input=["cat", "dog"], dimensions=64), 0)
    two = embedding_body(call_of(Endpoint.EMBEDDINGS, input="cat", dimensions=64, encoding_format="base64"), 0)
    vector = one["data"][0]["embedding"]
    assert len(vector) == 64
    assert sum(number * number for number in vector) == pytest.approx(1, abs=1e-4)
    assert unpack("<64f", b64decode(two["data"][0]["embedding"])) == pytest.approx(vector, abs=1e-6)
    assert one["data"][1]["embedding"] != vector
    assert embedding_body(call_of(Endpoint.EMBEDDINGS, dimensions=64), 1) != embedding_body(
        call_of(Endpoint.EMBEDDINGS, dimensions=64), 0
    )


def test_words_make_sentences() -> None:
    """Capitals and full stops stand where sentences begin and end."""
    text = "".join(tokens_from(bytes(range(20))))
    assert (text[0].isupper(), text.endswith("."), text.count(".")) == (True, True, 3)
