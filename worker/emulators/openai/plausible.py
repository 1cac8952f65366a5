"""
Values that fit a JSON schema: arguments of simulated tool calls and answers in `json_schema` format.

Covers what people write into tool definitions (types, enum, const, bounds, nested objects and arrays, `$ref` into
`$defs`, the first of `anyOf`/`oneOf`, common formats).  It does not solve schemas: patterns, `not` and conditional
parts are ignored, so a value is plausible, not proven.
"""

from collections.abc import Mapping
from typing import Any

from worker.emulators.openai.dice import Dice
from worker.emulators.openai.vocabulary import WORDS

_MAX_DEPTH = 8
"""Recursive schemas end here with null."""

_FORMATS = {
    "date": "2026-03-14",
    "date-time": "2026-03-14T09:26:53Z",
    "time": "09:26:53",
    "email": "ada@example.com",
    "uri": "https://example.com/",
    "uuid": "6f1c2f6a-5d0b-4c5e-9f38-2f6f0f3f9b11",
    "ipv4": "192.0.2.1",
    "hostname": "host.example.com",
}


def plausible(schema: Any, dice: Dice) -> Any:
    """
    Return a value that fits the schema; the same schema and dice give the same value.

    Args:
        schema: A JSON schema; anything that is not an object is treated as one without constraints.
        dice: Where the choices come from.
    """
    return _value(schema, schema, dice, "$", 0)


def _resolve(schema: Any, root: Any) -> Mapping[str, Any]:
    if isinstance(schema, Mapping) and isinstance(schema.get("$ref"), str):
        target: Any = root
        for key in schema["$ref"].lstrip("#/").split("/"):
            target = target.get(key) if isinstance(target, Mapping) else None
        return target if isinstance(target, Mapping) else {}
    return schema if isinstance(schema, Mapping) else {}


def _value(schema: Any, root: Any, dice: Dice, where: str, depth: int) -> Any:  # noqa: C901, PLR0911 - one case per type
    schema = _resolve(schema, root)
    if depth > _MAX_DEPTH:
        return None
    if "const" in schema:
        return schema["const"]
    if isinstance(schema.get("enum"), list) and schema["enum"]:
        return schema["enum"][dice.between(where, 0, len(schema["enum"]) - 1)]
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(key), list) and schema[key]:
            return _value(schema[key][0], root, dice, where, depth + 1)
    kinds = schema.get("type", "object" if "properties" in schema else "string")
    kind = next((one for one in kinds if one != "null"), "null") if isinstance(kinds, list) else kinds
    match kind:
        case "object":
            properties = schema.get("properties")
            items = properties.items() if isinstance(properties, Mapping) else ()
            return {name: _value(inner, root, dice, f"{where}.{name}", depth + 1) for name, inner in items}
        case "array":
            size = max(1, _bound(schema, "minItems", 0))
            inner = schema.get("items")
            return [_value(inner, root, dice, f"{where}[{place}]", depth + 1) for place in range(min(size, 64))]
        case "integer" | "number":
            low = _bound(schema, "minimum", _bound(schema, "exclusiveMinimum", -1) + 1)
            high = _bound(schema, "maximum", _bound(schema, "exclusiveMaximum", low + 100))
            number = dice.between(where, low, max(low, high - 1 if "exclusiveMaximum" in schema else high))
            return number if kind == "integer" else float(number)
        case "boolean":
            return dice.uniform(where) > 0.5  # noqa: PLR2004 - a coin
        case "null":
            return None
    return _text(schema, dice, where)


def _bound(schema: Mapping[str, Any], name: str, default: int) -> int:
    value = schema.get(name, default)
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else default


def _text(schema: Mapping[str, Any], dice: Dice, where: str) -> str:
    if schema.get("format") in _FORMATS:
        return _FORMATS[schema["format"]]
    text = WORDS[dice.data(where, 1)[0]]
    low = min(_bound(schema, "minLength", 0), 100_000)
    text = text.ljust(low, "x")
    return text[: _bound(schema, "maxLength", len(text))]
