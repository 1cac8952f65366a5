"""
From the bytes of a request to a `Call`, or to the 400 or 404 that a real server would answer.

Called once per request that gets as far as being answered.  Knows the inference endpoints and their parameters; it
does not know how an answer is made, nor in which dialect an error is written.  Parameters it does not know are
accepted, as most servers do.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import msgspec

from worker.emulators.openai.dialects import Dialect, Kind, SimError
from worker.emulators.openai.fields import (
    MESSAGE_TOKENS,
    boolean,
    content_tokens,
    images_tokens,
    integer,
    item_tokens,
    message_tokens,
    missing,
    number,
    one_of,
    text_list,
    tools_of,
    wrong_type,
    wrong_value,
)
from worker.emulators.openai.options import SimOptions
from worker.emulators.openai.seeded import count_tokens


class Endpoint(StrEnum):
    """The inference paths."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    RESPONSES = "/v1/responses"
    EMBEDDINGS = "/v1/embeddings"
    MODERATIONS = "/v1/moderations"
    IMAGES = "/v1/images/generations"
    EDITS = "/v1/images/edits"


_PATHS: Mapping[str, Endpoint] = {endpoint.value: endpoint for endpoint in Endpoint}
_AZURE = re.compile(r"/openai/(?:v1|deployments/(?P<name>[^/]+))(?P<rest>/.+)")
"""Azure's two forms of path; https://learn.microsoft.com/azure/ai-services/openai/reference."""


def endpoint_of(path: str) -> Endpoint | None:
    """Return the inference endpoint of a path, None for any other path."""
    endpoint = _PATHS.get(path)
    if endpoint is None and (match := _AZURE.fullmatch(path)):
        return _PATHS.get("/v1" + match["rest"])
    return endpoint


def deployment_of(path: str) -> str | None:
    """Return the deployment an Azure path names, which stands for the model."""
    match = _AZURE.fullmatch(path)
    return match["name"] if match else None


@dataclass(slots=True)
class Call:
    """A checked request, ready to be answered."""

    endpoint: Endpoint
    body: dict[str, Any]
    """The decoded request."""
    model: str
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    """`stream_options.continuous_usage_stats`: usage on every chunk, as vLLM offers."""
    n: int = 1
    """Choices per prompt."""
    max_tokens: int | None = None
    prompt_tokens: int = 0
    inputs: list[str] = field(default_factory=list)
    """Prompts of a completion, texts to embed or to moderate; token arrays are shown as the text of their numbers."""
    tools: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    """Name and parameter schema of each function that may be called."""
    prefix: str = ""
    """Beginning of the answer, which the request asks to continue."""
    tool_choice: str = "auto"
    """`none`, `auto`, `required`, or `=NAME` for one function."""


_PENALTY = (-2.0, 2.0)
_NUMBERS: Mapping[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
}
_MAX_CHOICES = 128
_MAX_INPUTS = 2048
"""OpenAI's limit for the `input` array of embeddings; https://platform.openai.com/docs/api-reference/embeddings."""
_MAX_STOPS = 4
_MAX_IMAGES = 10
"""Images of one request; https://platform.openai.com/docs/api-reference/images."""
_IMAGE_SIZE = re.compile(r"auto|[1-9]\d{1,3}x[1-9]\d{1,3}")
DEFAULT_MODEL = "simulated"
_DEFAULT_MODELS = frozenset({Endpoint.MODERATIONS, Endpoint.IMAGES, Endpoint.EDITS})
"""Endpoints that have a model for requests without one."""
_COMPLETION_TOKENS = 16
"""Default of `max_tokens` for completions; https://platform.openai.com/docs/api-reference/completions."""


def decode(data: bytes) -> dict[str, Any]:
    """
    Return the JSON object a body holds.

    Raises:
        SimError: invalid_request: empty, not JSON, not an object.
    """
    try:
        body = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        text = "We could not parse the JSON body of your request. The API expects a JSON payload."
        raise SimError(Kind.INVALID_REQUEST, text) from None
    if not isinstance(body, dict):
        raise SimError(Kind.INVALID_REQUEST, "The JSON body of the request must be an object.", code="invalid_type")
    return body


def check(endpoint: Endpoint, body: dict[str, Any], options: SimOptions, *, deployment: str | None = None) -> Call:
    """
    Return the call a decoded body describes.

    Args:
        endpoint: Which API.
        body: The decoded request.
        options: Models and context window.
        deployment: Azure's name for the model, taken when the body has none.

    Raises:
        SimError: what a real server answers 400 for: missing or ill-typed parameters, numbers out of range, unknown
            roles, a prompt above the context window; or 404 for a model that is not on the list.
    """
    if endpoint in _DEFAULT_MODELS:
        deployment = deployment or (*options.models, DEFAULT_MODEL)[0]
    call = Call(endpoint, body, _model(body, options, deployment))
    for name, (low, high) in _NUMBERS.items():
        if name in body:
            number(body, name, low, high)
    _CHECKS[endpoint](call)
    tokens = call.prompt_tokens + (call.max_tokens or 0)
    if tokens > options.context_window:
        raise SimError(Kind.CONTEXT_LENGTH, window=options.context_window, tokens=tokens)
    return call


def _model(body: dict[str, Any], options: SimOptions, deployment: str | None) -> str:
    model = body.get("model", deployment)
    if model is None or model == "":
        raise SimError(Kind.INVALID_REQUEST, "you must provide a model parameter", param="model")
    if not isinstance(model, str):
        raise wrong_type("model", "a string", model)
    if options.models and model not in options.models:
        raise SimError(Kind.MODEL_NOT_FOUND, model=model)
    return model


def _streaming(call: Call) -> None:
    body = call.body
    call.stream = boolean(body, "stream")
    stream_options = body.get("stream_options")
    if stream_options is None:
        return
    if not isinstance(stream_options, dict):
        raise wrong_type("stream_options", "an object", stream_options)
    if not call.stream:
        text = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
        raise wrong_value("stream_options", text)
    call.include_usage = boolean(stream_options, "include_usage")
    call.continuous_usage = boolean(stream_options, "continuous_usage_stats")


def _choices(call: Call) -> None:
    call.n = integer(call.body, "n", 1, _MAX_CHOICES) or 1
    integer(call.body, "seed", -(2**63))
    stop = call.body.get("stop")
    if stop is not None and len(text_list("stop", stop)) > _MAX_STOPS:
        raise wrong_value("stop", f"Invalid 'stop': array too long. Expected at most {_MAX_STOPS} items.")


def _tool_use(call: Call) -> None:
    call.tools = tools_of(call.body)
    choice = call.body.get("tool_choice", "auto")
    if isinstance(choice, dict):
        name = choice.get("function", choice).get("name") if isinstance(choice.get("function", {}), dict) else None
        if not isinstance(name, str):
            raise missing("tool_choice.function.name")
        if name not in {tool for tool, _ in call.tools}:
            raise wrong_value("tool_choice", f"Tool choice '{name}' not found in 'tools' parameter.")
        call.tool_choice = "=" + name
    elif choice is not None:
        call.tool_choice = one_of("tool_choice", choice, ("none", "auto", "required"))
    if call.tool_choice == "required" and not call.body.get("tools"):
        raise wrong_value("tool_choice", "Invalid value for 'tool_choice': only allowed when 'tools' are specified.")


def _chat(call: Call) -> None:
    body = call.body
    messages = body.get("messages")
    if messages is None:
        raise missing("messages")
    if not isinstance(messages, list):
        raise wrong_type("messages", "an array of objects", messages)
    if not messages:
        text = "Invalid 'messages': empty array. Expected an array with minimum length 1, but got an empty array."
        raise wrong_value("messages", text, "empty_array")
    call.prompt_tokens = MESSAGE_TOKENS + sum(message_tokens(place, one) for place, one in enumerate(messages))
    _streaming(call)
    _choices(call)
    _tool_use(call)
    boolean(body, "logprobs")
    integer(body, "top_logprobs", 0, 20)
    newer, older = (integer(body, name, 1) for name in ("max_completion_tokens", "max_tokens"))
    call.max_tokens = newer or older
    response_format = body.get("response_format")
    if response_format is not None:
        if not isinstance(response_format, dict):
            raise wrong_type("response_format", "an object", response_format)
        one_of("response_format.type", response_format.get("type"), ("text", "json_object", "json_schema"))


def _texts(param: str, value: object) -> tuple[list[str], int]:
    """Return the texts of a prompt or input (string, strings, token array, token arrays) and their tokens together."""
    if isinstance(value, str):
        return [value], count_tokens(value)
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return list(value), sum(map(count_tokens, value))
        arrays = [value] if all(type(item) is int for item in value) else value
        if all(isinstance(array, list) and array and all(type(item) is int for item in array) for array in arrays):
            return [" ".join(map(str, array)) for array in arrays], sum(map(len, arrays))
    if value == []:
        raise wrong_value(param, f"Invalid '{param}': empty array.", "empty_array")
    raise wrong_type(param, "a string, an array of strings or an array of integers", value)


def _completion(call: Call) -> None:
    if call.body.get("prompt") is None:
        raise missing("prompt")
    call.inputs, call.prompt_tokens = _texts("prompt", call.body["prompt"])
    _streaming(call)
    _choices(call)
    integer(call.body, "logprobs", 0, 5)
    call.max_tokens = integer(call.body, "max_tokens", 1) or _COMPLETION_TOKENS


def _response(call: Call) -> None:
    given = call.body.get("input")
    if given is None:
        raise missing("input")
    if isinstance(given, str):
        call.prompt_tokens = MESSAGE_TOKENS + count_tokens(given)
    elif isinstance(given, list) and given:
        call.prompt_tokens = MESSAGE_TOKENS + sum(item_tokens(place, item) for place, item in enumerate(given))
    else:
        raise wrong_type("input", "a string or an array of objects", given)
    if isinstance(call.body.get("instructions"), str):
        call.prompt_tokens += count_tokens(call.body["instructions"])
    call.stream = boolean(call.body, "stream")
    call.max_tokens = integer(call.body, "max_output_tokens", 1)
    _tool_use(call)


def _embedding(call: Call) -> None:
    if call.body.get("input") is None:
        raise missing("input")
    call.inputs, call.prompt_tokens = _texts("input", call.body["input"])
    if len(call.inputs) > _MAX_INPUTS:
        raise wrong_value("input", f"Invalid 'input': array too long. Expected at most {_MAX_INPUTS} items.")
    if "" in call.inputs:
        raise wrong_value("input", "Invalid 'input': input cannot be an empty string.")
    integer(call.body, "dimensions", 1, 8192)
    one_of("encoding_format", call.body.get("encoding_format", "float"), ("float", "base64"))


def _moderation(call: Call) -> None:
    given = call.body.get("input")
    if given is None:
        raise missing("input")
    if isinstance(given, list) and given and all(isinstance(part, dict) for part in given):
        call.inputs = [msgspec.json.encode(given, order="deterministic").decode()]  # parts of one input
        call.prompt_tokens = content_tokens("input", given)
    else:
        call.inputs = text_list("input", given)
        call.prompt_tokens = sum(map(count_tokens, call.inputs))


def _image(call: Call) -> None:
    body = call.body
    prompt = body.get("prompt")
    if prompt is None:
        raise missing("prompt")
    if not isinstance(prompt, str):
        raise wrong_type("prompt", "a string", prompt)
    call.prompt_tokens = count_tokens(prompt)
    if call.endpoint is Endpoint.EDITS:
        if body.get("images") is None:
            raise missing("images")
        call.prompt_tokens += images_tokens("images", body["images"])
    call.n = integer(body, "n", 1, _MAX_IMAGES) or 1
    size = body.get("size", "auto")
    if not isinstance(size, str) or not _IMAGE_SIZE.fullmatch(size):
        raise wrong_value("size", f"Invalid value for 'size': expected WIDTHxHEIGHT or 'auto', but got {size!r}.")
    if boolean(body, "stream"):
        raise wrong_value("stream", "The simulated server does not stream images.")


_CHECKS: Mapping[Endpoint, Callable[[Call], None]] = {
    Endpoint.CHAT: _chat,
    Endpoint.COMPLETIONS: _completion,
    Endpoint.RESPONSES: _response,
    Endpoint.EMBEDDINGS: _embedding,
    Endpoint.MODERATIONS: _moderation,
    Endpoint.IMAGES: _image,
    Endpoint.EDITS: _image,
}
"""What each endpoint's body may hold; it fills in the call."""
_FLAGS = ("continue_final_message", "add_generation_prompt")


def split_continuation(body: Mapping[str, Any], dialect: Dialect) -> tuple[Mapping[str, Any], str]:
    """
    Return the request without the beginning of its answer, and that beginning; empty when it has none.

    A request with `continue_final_message` has the beginning of the answer as its last message.  It asks about the same
    as the request without that message, so it has the same answer, of which only the rest is sent.  vLLM and SGLang do
    so; OpenAI and Azure refuse arguments that they do not know, the others ignore them.

    Args:
        body: The decoded request.
        dialect: What the server makes of the keys.

    Raises:
        SimError: The server does not know them, or they contradict each other.

    Source: https://github.com/vllm-project/vllm/blob/main/vllm/entrypoints/openai/protocol.py (which refuses both keys
    together),
    https://github.com/sgl-project/sglang/blob/main/python/sglang/srt/entrypoints/openai/serving_chat.py.
    """
    if dialect.final_message == "ignored" or not any(flag in body for flag in _FLAGS):
        return body, ""
    if dialect.final_message == "refused":
        name = next(flag for flag in _FLAGS if flag in body)
        raise SimError(Kind.INVALID_REQUEST, f"Unrecognized request argument supplied: {name}")
    if body.get("continue_final_message") is not True:
        return body, ""
    if body.get("add_generation_prompt") is True:
        text = "Cannot set both `continue_final_message` and `add_generation_prompt` to True."
        raise SimError(Kind.INVALID_REQUEST, text)
    messages = body.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict) or last.get("role") != "assistant" or not isinstance(last.get("content"), str):
        return body, ""
    kept = {key: value for key, value in body.items() if key not in _FLAGS}
    return {**kept, "messages": (messages or [])[:-1]}, last["content"]
