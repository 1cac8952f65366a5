"""
Reading one event's JSON: decoding, what is an error, what status it names, what counts as usage.

Pure functions on values; what is done about them is in `accumulate_events`.
"""

import json
from typing import Any, NoReturn

import msgspec

_ERROR_STATUSES = range(400, 600)
_TGI_CONSTANT_STATUS = 422
_MAX_DEPTH = 100  # of nesting; house decision, far below where the encoder would give up (about 1,000)
_FEW_BRACKETS = 100

_decode = msgspec.json.Decoder().decode


def decode_event(data: bytes) -> tuple[dict[str, Any], bool]:
    """
    Return an event's object, and whether it holds halves of surrogate pairs.

    Servers that count UTF-16 units may cut an emoji into two chunks, each with one escaped half of the pair: legal JSON
    that only the standard library reads.  The halves meet again when the strings are joined, see `repair_surrogates`.
    A list of one object is that object (Gemini's compatibility layer).

    Raises:
        ValueError: Not JSON, not an object, or nested more than 100 deep.
    """
    has_halves = False
    try:
        chunk = _decode(data)
    except RecursionError:
        raise ValueError("an event is nested too deeply") from None
    except (msgspec.MsgspecError, UnicodeDecodeError):
        if b"\\ud" not in data.lower():
            raise ValueError("an event is not JSON") from None
        chunk = _decode_halves(data)
        has_halves = True
    if isinstance(chunk, list) and len(chunk) == 1:
        chunk = chunk[0]
    if not isinstance(chunk, dict):
        raise ValueError("an event is not a JSON object")  # noqa: TRY004 - the event's value is wrong, not ours
    if data.count(b"{") + data.count(b"[") > _FEW_BRACKETS and _is_deeper_than(chunk, _MAX_DEPTH):
        raise ValueError("an event is nested too deeply")
    return chunk, has_halves


def is_error(chunk: dict[str, Any]) -> bool:
    """
    Whether a decoded event reports a failure.

    Source: `{"error": {...}}` of vLLM, SGLang, LiteLLM, TGI and OpenRouter (there, beside `choices`); the flat one with
    `"object": "error"` of older vLLM and SGLang (https://github.com/block/goose/pull/8031); the flat one with
    `"type": "error"` of https://platform.openai.com/docs/api-reference/responses-streaming/error.
    """
    return bool(chunk.get("error")) or chunk.get("object") == "error" or chunk.get("type") == "error"


def status_hint(body: dict[str, Any]) -> int | None:
    """
    Return the HTTP status an error body names, or `None`.

    TGI's `http_status_code` is the constant 422 for every error inside a stream, whatever happened, and says nothing.
    """
    nested = body.get("error")
    source = nested if isinstance(nested, dict) else body
    for key in ("code", "status", "status_code", "http_status_code"):
        value = source.get(key)
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) == len("429"):
            value = int(value)
        if type(value) is not int or value not in _ERROR_STATUSES:
            continue
        if key == "http_status_code" and value == _TGI_CONSTANT_STATUS:
            continue
        return value
    return None


def repair_surrogates(value: Any) -> Any:
    """Return the value with the halves of surrogate pairs joined in every string, and replaced where one is missing."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, dict):
        return {repair_surrogates(key): repair_surrogates(item) for key, item in value.items()}
    if isinstance(value, list):
        return [repair_surrogates(item) for item in value]
    return value


def has_counts(usage: dict[str, Any]) -> bool:
    """
    Whether a `usage` object counts anything: no request has zero tokens.

    Source: Ollama's completions put zeros into every chunk and the real counts into the last
    (https://github.com/ollama/ollama/blob/main/middleware/openai.go).
    """
    return any(type(count) is int and count > 0 for count in usage.values())


def _decode_halves(data: bytes) -> Any:
    try:
        return json.loads(data.decode(), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("an event is nested too deeply") from None
    except ValueError:
        raise ValueError("an event is not JSON") from None


def _is_deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        containers = [item for item in level if isinstance(item, (dict, list))]
        level = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return False
    return any(isinstance(item, (dict, list)) for item in level)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
