"""
What the fields of a request may hold: single values, contents of messages, tools; anything else is OpenAI's 400.

The errors have OpenAI's `param` and `code`.  A bool is never a number here, although Python says so, and an integral
float (`2.0`) is an integer, as in JSON.
"""

import binascii
import re
from collections.abc import Mapping, Sequence
from typing import Any

from worker.emulators.openai.dialects import Kind, SimError
from worker.emulators.openai.seeded import count_tokens


def kind_of(value: object) -> str:
    """Return the name of a JSON value's type with its article, as the error texts use it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names = ((str, "a string"), (int, "an integer"), (float, "a decimal"), (list, "an array"), (dict, "an object"))
    return next((name for kind, name in names if isinstance(value, kind)), "something else")


def missing(param: str) -> SimError:
    """Return the error for a parameter that is not there."""
    return SimError(
        Kind.INVALID_REQUEST,
        f"Missing required parameter: '{param}'.",
        param=param,
        code="missing_required_parameter",
    )


def wrong_type(param: str, expected: str, value: object) -> SimError:
    """Return the error for a value of another type than `expected` ("a string")."""
    text = f"Invalid type for '{param}': expected {expected}, but got {kind_of(value)} instead."
    return SimError(Kind.INVALID_REQUEST, text, param=param, code="invalid_type")


def wrong_value(param: str, text: str, code: str = "invalid_value") -> SimError:
    """Return the error for a value that has the right type and is not possible."""
    return SimError(Kind.INVALID_REQUEST, text, param=param, code=code)


def number(body: Mapping[str, Any], name: str, low: float, high: float | None) -> float | None:
    """Return a number within the range, None when it is absent or null."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong_type(name, "a decimal", value)
    _range(name, value, low, high, "decimal")
    return value


def integer(body: Mapping[str, Any], name: str, low: int, high: int | None = None) -> int | None:
    """Return an integer within the range, None when it is absent or null."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong_type(name, "an integer", value)
    _range(name, value, low, high, "integer")
    return value


def _range(name: str, value: float, low: float, high: float | None, word: str) -> None:
    if value < low:
        text = f"Invalid '{name}': {word} below minimum value. Expected a value >= {low:g}, but got {value} instead."
        raise wrong_value(name, text, f"{word}_below_min_value")
    if high is not None and value > high:
        text = f"Invalid '{name}': {word} above maximum value. Expected a value <= {high:g}, but got {value} instead."
        raise wrong_value(name, text, f"{word}_above_max_value")


def boolean(body: Mapping[str, Any], name: str) -> bool:
    """Return a boolean, False when it is absent or null."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise wrong_type(name, "a boolean", value)
    return bool(value)


def one_of(param: str, value: object, allowed: Sequence[str]) -> str:
    """Return a string that is one of those allowed."""
    if not isinstance(value, str):
        raise wrong_type(param, "a string", value)
    if value not in allowed:
        listed = ", ".join(f"'{name}'" for name in allowed)
        raise wrong_value(param, f"Invalid value: '{value}'. Supported values are: {listed}.")
    return value


def text_list(param: str, value: object) -> list[str]:
    """Return a string, or an array of strings, as a list."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise wrong_type(param, "a string or an array of strings", value)
    return list(value)


CHAT_ROLES = ("system", "assistant", "user", "function", "tool", "developer")
RESPONSE_ROLES = ("assistant", "system", "developer", "user")
CHAT_PARTS = ("text", "image_url", "input_audio", "file", "refusal", "video_url")
RESPONSE_PARTS = ("input_text", "input_image", "input_file", "output_text", "refusal")
RESPONSE_ITEMS = ("message", "function_call", "function_call_output", "reasoning", "item_reference")

MESSAGE_TOKENS = 3
"""Overhead of each message in OpenAI's chat format, and once more for the answer's beginning."""
IMAGE_TOKENS = {"low": 85}
DEFAULT_IMAGE_TOKENS = 765
"""What OpenAI's vision guide gives for a mid-sized image; usage looks plausible, no tokenizer is simulated."""
MEDIA_TOKENS = 300

_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+;base64,")


def _image(param: str, url: object, detail: object) -> int:
    if not isinstance(url, str):
        raise wrong_type(param, "a string", url)
    if match := _DATA_URL.match(url):
        try:
            binascii.a2b_base64(url[match.end() :].encode("ascii"), strict_mode=True)
        except (binascii.Error, UnicodeEncodeError):
            text = "Invalid base64 image_url. Expected a base64-encoded image."
            raise wrong_value(param, text, "invalid_base64") from None
    elif not url.startswith(("http://", "https://")):
        text = "Invalid image_url: expected a URL with http(s) or a base64-encoded data URL with an image MIME type."
        raise wrong_value(param, text, "invalid_image_url")
    return IMAGE_TOKENS.get(str(detail), DEFAULT_IMAGE_TOKENS)


def _part(param: str, part: object, allowed: tuple[str, ...]) -> int:
    """Check one content part and return its tokens."""
    if not isinstance(part, dict):
        raise wrong_type(param, "an object", part)
    if "type" not in part:
        raise missing(f"{param}.type")
    match one_of(f"{param}.type", part["type"], allowed):
        case "text" | "input_text" | "output_text" | "refusal" as kind:
            name = "refusal" if kind == "refusal" else "text"
            if not isinstance(part.get(name), str):
                raise wrong_type(f"{param}.{name}", "a string", part.get(name))
            return count_tokens(part[name])
        case "image_url":
            image = part.get("image_url")
            if not isinstance(image, dict):
                raise wrong_type(f"{param}.image_url", "an object", image)
            return _image(f"{param}.image_url.url", image.get("url"), image.get("detail"))
        case "input_image" if "file_id" not in part:
            return _image(f"{param}.image_url", part.get("image_url"), part.get("detail"))
    return MEDIA_TOKENS


def _content(param: str, content: object, allowed: tuple[str, ...]) -> int:
    if isinstance(content, str):
        return count_tokens(content)
    if not isinstance(content, list):
        raise wrong_type(param, "a string or an array of objects", content)
    return sum(_part(f"{param}[{place}]", part, allowed) for place, part in enumerate(content))


def content_tokens(param: str, parts: Sequence[object]) -> int:
    """Check the parts of a moderation's input, texts and images, and return their tokens; raises SimError."""
    return _content(param, parts, ("text", "image_url"))


def images_tokens(param: str, images: object) -> int:
    """
    Check the images of an edit, each `{"image_url": URL}` or `{"file_id": ID}`, and return their tokens.

    Raises:
        SimError: not a list of such objects, or empty; a bad image.
    """
    if not isinstance(images, list):
        raise wrong_type(param, "an array of objects", images)
    if not images:
        raise wrong_value(param, f"Invalid '{param}': empty array.", "empty_array")
    tokens = 0
    for place, image in enumerate(images):
        if not isinstance(image, dict):
            raise wrong_type(f"{param}[{place}]", "an object", image)
        is_file = isinstance(image.get("file_id"), str)
        tokens += (
            DEFAULT_IMAGE_TOKENS if is_file else _image(f"{param}[{place}].image_url", image.get("image_url"), None)
        )
    return tokens


def _tool_calls(param: str, calls: object) -> int:
    if not isinstance(calls, list):
        raise wrong_type(param, "an array of objects", calls)
    tokens = 0
    for place, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise wrong_type(f"{param}[{place}].function", "an object with a name", function)
        tokens += count_tokens(function["name"] + str(function.get("arguments", "")))
    return tokens


def message_tokens(place: int, message: object) -> int:
    """
    Check one chat message and return its tokens.

    Raises:
        SimError: unknown role, no content where one is needed, a part of an unknown type, a bad image.
    """
    param = f"messages[{place}]"
    if not isinstance(message, dict):
        raise wrong_type(param, "an object", message)
    if "role" not in message:
        raise missing(f"{param}.role")
    role = one_of(f"{param}.role", message["role"], CHAT_ROLES)
    tokens = MESSAGE_TOKENS
    if message.get("tool_calls") is not None:
        tokens += _tool_calls(f"{param}.tool_calls", message["tool_calls"])
    elif message.get("content") is None and not (role == "assistant" and message.keys() & {"refusal", "function_call"}):
        raise (
            missing(f"{param}.content")
            if "content" not in message
            else wrong_value(f"{param}.content", f"Invalid value for 'content': expected a string, got null. ({param})")
        )
    if message.get("content") is not None:
        tokens += _content(f"{param}.content", message["content"], CHAT_PARTS)
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        raise missing(f"{param}.tool_call_id")
    return tokens


def item_tokens(place: int, item: object) -> int:
    """Check one item of a Responses `input` array and return its tokens; raises SimError."""
    param = f"input[{place}]"
    if not isinstance(item, dict):
        raise wrong_type(param, "an object", item)
    kind = one_of(f"{param}.type", item.get("type", "message"), RESPONSE_ITEMS)
    if kind != "message":
        return MESSAGE_TOKENS + count_tokens("".join(str(v) for v in item.values() if isinstance(v, str)))
    if "role" not in item:
        raise missing(f"{param}.role")
    one_of(f"{param}.role", item["role"], RESPONSE_ROLES)
    if "content" not in item:
        raise missing(f"{param}.content")
    return MESSAGE_TOKENS + _content(f"{param}.content", item["content"], RESPONSE_PARTS)


def tools_of(body: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """
    Return name and parameter schema of each function tool; hosted tools of the Responses API are left out.

    Raises:
        SimError: not a list of tools, or a function without a name.
    """
    tools = body.get("tools")
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise wrong_type("tools", "an array of objects", tools)
    found: list[tuple[str, Mapping[str, Any]]] = []
    for place, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise wrong_type(f"tools[{place}]", "an object", tool)
        if "type" not in tool:
            raise missing(f"tools[{place}].type")
        if tool["type"] != "function":
            continue
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise missing(f"tools[{place}].function.name")
        schema = function.get("parameters")
        found.append((function["name"], schema if isinstance(schema, dict) else {}))
    return found
