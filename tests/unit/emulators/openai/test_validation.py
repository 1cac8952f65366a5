"""What the simulated server accepts, and the 400s and 404s it answers otherwise."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.emulators.openai.dialects import Kind, SimError
from worker.emulators.openai.options import SimOptions
from worker.emulators.openai.validation import Call, Endpoint, check, decode, deployment_of, endpoint_of

PIXEL = "data:image/png;base64,iVBORw0KGgo="
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "hello"}


def checked(body: dict[str, Any], endpoint: Endpoint = Endpoint.CHAT, **options: Any) -> Call:
    """Return the call of a body that names a model."""
    return check(endpoint, {"model": "m", **body}, SimOptions.of(**options))


def chat(**body: Any) -> dict[str, Any]:
    """Return a chat body."""
    return {"messages": [USER], **body}


@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        [{"role": "system", "content": "be brief"}, USER],
        [{"role": "user", "content": [{"type": "text", "text": "what is this"}, {"type": "image_url", "image_url": {"url": PIXEL}}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.com/a.png", "detail": "low"}}]}],
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]}],
        [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
         {"role": "tool", "tool_call_id": "1", "content": "42"}],
        [{"role": "developer", "content": "x"}, {"role": "assistant", "content": "", "refusal": "no"}],
    ],
)  # fmt: skip
def test_real_conversations_are_accepted(messages: list[Any]) -> None:
    """Text, images, audio, tool calls and their results pass and are counted."""
    assert checked({"messages": messages}).prompt_tokens > 3


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "messages", "missing_required_parameter"),
        ({"messages": "hi"}, "messages", "invalid_type"),
        ({"messages": []}, "messages", "empty_array"),
        ({"messages": ["hi"]}, "messages[0]", "invalid_type"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [USER, {"role": "user"}]}, "messages[1].content", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "invalid_value"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, "messages[0].content[0].type", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "invalid_type"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}]},
         "messages[0].content[0].image_url.url", "invalid_image_url"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,@@"}}]}]},
         "messages[0].content[0].image_url.url", "invalid_base64"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "missing_required_parameter"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function", "invalid_type"),
        (chat(temperature=3), "temperature", "decimal_above_max_value"),
        (chat(temperature=-0.1), "temperature", "decimal_below_min_value"),
        (chat(temperature="hot"), "temperature", "invalid_type"),
        (chat(temperature=True), "temperature", "invalid_type"),
        (chat(top_p=1.5), "top_p", "decimal_above_max_value"),
        (chat(n=0), "n", "integer_below_min_value"),
        (chat(n=1.5), "n", "invalid_type"),
        (chat(max_tokens=0), "max_tokens", "integer_below_min_value"),
        (chat(max_completion_tokens="9"), "max_completion_tokens", "invalid_type"),
        (chat(stream="yes"), "stream", "invalid_type"),
        (chat(stream_options={"include_usage": True}), "stream_options", "invalid_value"),
        (chat(stream=True, stream_options=1), "stream_options", "invalid_type"),
        (chat(stop=["a"] * 5), "stop", "invalid_value"),
        (chat(stop=[1]), "stop", "invalid_type"),
        (chat(tools={}), "tools", "invalid_type"),
        (chat(tools=[{"type": "function", "function": {}}]), "tools[0].function.name", "missing_required_parameter"),
        (chat(tool_choice="required"), "tool_choice", "invalid_value"),
        (chat(tools=[TOOL], tool_choice="maybe"), "tool_choice", "invalid_value"),
        (chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "x"}}), "tool_choice", "invalid_value"),
        (chat(response_format="json"), "response_format", "invalid_type"),
        (chat(response_format={"type": "xml"}), "response_format.type", "invalid_value"),
        (chat(logprobs=1), "logprobs", "invalid_type"),
    ],
)  # fmt: skip
def test_bad_chats_are_refused_as_openai_does(body: dict[str, Any], param: str, code: str) -> None:
    """Each fault is a 400 that names the parameter and OpenAI's code for it."""
    with pytest.raises(SimError) as raised:
        checked(body)
    fields = raised.value.in_dialect("openai")
    assert (fields.status, fields.param, fields.code, fields.type) == (400, param, code, "invalid_request_error")


@pytest.mark.parametrize(
    ("endpoint", "body", "param"),
    [
        (Endpoint.COMPLETIONS, {}, "prompt"),
        (Endpoint.COMPLETIONS, {"prompt": {}}, "prompt"),
        (Endpoint.COMPLETIONS, {"prompt": []}, "prompt"),
        (Endpoint.COMPLETIONS, {"prompt": "x", "logprobs": 9}, "logprobs"),
        (Endpoint.RESPONSES, {}, "input"),
        (Endpoint.RESPONSES, {"input": []}, "input"),
        (Endpoint.RESPONSES, {"input": [{"content": "x"}]}, "input[0].role"),
        (Endpoint.RESPONSES, {"input": [{"type": "song"}]}, "input[0].type"),
        (Endpoint.RESPONSES, {"input": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, "input[0].content[0].type"),
        (Endpoint.EMBEDDINGS, {}, "input"),
        (Endpoint.EMBEDDINGS, {"input": [""]}, "input"),
        (Endpoint.EMBEDDINGS, {"input": [["a"]]}, "input"),
        (Endpoint.EMBEDDINGS, {"input": "x", "dimensions": 0}, "dimensions"),
        (Endpoint.EMBEDDINGS, {"input": "x", "encoding_format": "hex"}, "encoding_format"),
        (Endpoint.EMBEDDINGS, {"input": ["x"] * 2049}, "input"),
        (Endpoint.MODERATIONS, {}, "input"),
        (Endpoint.MODERATIONS, {"input": [7]}, "input"),
        (Endpoint.MODERATIONS, {"input": [{"type": "song"}]}, "input[0].type"),
        (Endpoint.IMAGES, {}, "prompt"),
        (Endpoint.IMAGES, {"prompt": ["x"]}, "prompt"),
        (Endpoint.IMAGES, {"prompt": "x", "n": 11}, "n"),
        (Endpoint.IMAGES, {"prompt": "x", "size": "huge"}, "size"),
        (Endpoint.IMAGES, {"prompt": "x", "stream": True}, "stream"),
        (Endpoint.EDITS, {"prompt": "x"}, "images"),
        (Endpoint.EDITS, {"prompt": "x", "images": []}, "images"),
        (Endpoint.EDITS, {"prompt": "x", "images": "x"}, "images"),
        (Endpoint.EDITS, {"prompt": "x", "images": ["x"]}, "images[0]"),
        (Endpoint.EDITS, {"prompt": "x", "images": [{"image_url": "x"}]}, "images[0].image_url"),
    ],
)  # fmt: skip
def test_bad_requests_of_the_other_endpoints_are_refused(endpoint: Endpoint, body: dict[str, Any], param: str) -> None:
    """Completions, responses and embeddings name the parameter too."""
    with pytest.raises(SimError) as raised:
        checked(body, endpoint)
    assert (raised.value.kind, raised.value.param) == (Kind.INVALID_REQUEST, param)


@pytest.mark.parametrize(
    ("given_input", "texts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], ["1 2"]), ([[1], [2, 3]], ["1", "2 3"])],
)
def test_prompts_and_inputs_come_in_four_forms(given_input: Any, texts: list[str]) -> None:
    """A text, texts, a token array and token arrays are all inputs."""
    assert checked({"input": given_input}, Endpoint.EMBEDDINGS).inputs == texts
    assert checked({"prompt": given_input}, Endpoint.COMPLETIONS).inputs == texts


def test_a_missing_model_is_refused_and_an_unknown_one_not_found() -> None:
    """Without a model the answer is 400, with one that is not listed 404, without a list every name exists."""
    for model in ("", None):
        with pytest.raises(SimError, match="must provide a model"):
            check(Endpoint.CHAT, chat(model=model), SimOptions())
    with pytest.raises(SimError, match="model_not_found"):
        checked(chat(), models="a,b")
    assert check(Endpoint.CHAT, chat(model="b"), SimOptions.of(models="a,b")).model == "b"


def test_a_prompt_above_the_window_is_a_context_length_error() -> None:
    """Prompt and max_tokens together must fit the context window."""
    text = {"messages": [{"role": "user", "content": "x" * 400}]}
    assert checked({**text, "max_tokens": 20}, context_window=126).prompt_tokens == 106
    with pytest.raises(SimError) as raised:
        checked({**text, "max_tokens": 21}, context_window=126)
    assert "maximum context length is 126 tokens" in raised.value.in_dialect("openai").message


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"null", b'{"a": NaN}', b"\xff\xfe", b"[" * 100_000])
def test_what_is_not_a_json_object_is_refused(data: bytes) -> None:
    """Broken JSON, other JSON, invalid UTF-8 and absurd nesting are a 400, not a crash."""
    with pytest.raises(SimError) as raised:
        decode(data)
    assert raised.value.kind is Kind.INVALID_REQUEST


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
KEYS = ["messages", "prompt", "input", "tools", "tool_choice", "stop", "n", "stream", "stream_options", "model",
        "response_format", "temperature", "max_tokens", "dimensions", "logprobs", "instructions", "encoding_format"]  # fmt: skip


@given(st.sampled_from(Endpoint), st.dictionaries(st.sampled_from(KEYS), JSON))
def test_any_json_is_accepted_or_refused(endpoint: Endpoint, body: dict[str, Any]) -> None:
    """Whatever stands in a body, the result is a call or an error answer."""
    outcome: int | str
    try:
        outcome = check(endpoint, {"model": "m", **body}, SimOptions()).endpoint
    except SimError as error:
        outcome = error.in_dialect("openai").status
    assert outcome in {400, endpoint}


def test_azure_paths_lead_to_the_same_endpoints() -> None:
    """Azure's deployment and v1 paths are inference paths, and the deployment stands for the model."""
    path = "/openai/deployments/gpt-mini/chat/completions"
    assert endpoint_of(path) is Endpoint.CHAT
    assert endpoint_of("/openai/v1/embeddings") is Endpoint.EMBEDDINGS
    assert check(Endpoint.CHAT, chat(), SimOptions(), deployment=deployment_of(path)).model == "gpt-mini"
    assert [endpoint_of(other) for other in ("/openai/x", "/v1/other", "/v1/chat/completions/")] == [None] * 3
