"""
Small checks of JSON values that raise the 400 OpenAI would answer, with its `param` and `code`.

A bool is never a number here, although Python thinks so, and an integral float (`2.0`) is an integer, as JSON has it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from worker.emulators.openai.error_shapes import Kind, SimError


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
