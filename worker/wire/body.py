"""
JSON objects whose bytes are not ours: reading a little of one, testing that it is one, and changing single keys.

The body of a request belongs to the requester: numbers of any size, the order of keys and every escape reach the
backend as they stood in the message.  So no value is decoded that is not looked at.  New keys are put in front of the
others, and then every byte of the body stays where it was; where a key has to be replaced or removed, the top level is
joined anew from the raw values.

The body of an answer belongs to the backend and is embedded byte for byte, so it has to be exactly what RFC 8259 calls
JSON.  msgspec checks nearly all of that in one pass: the UTF-8 of what it skips is checked apart, and a lone half of a
surrogate pair as an escape, which section 8.2 allows and msgspec refuses, takes a slow second look.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

NOT_GIVEN = (b"", b"null")
"""A key that is not there, and one that is null."""

KEYS = (
    "add_generation_prompt",
    "audio",
    "background",
    "best_of",
    "choices",
    "continue_final_message",
    "data",
    "ebnf",
    "echo",
    "functions",
    "grammar",
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "include_usage",
    "input",
    "json_schema",
    "kv_transfer_params",
    "logprobs",
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "min_tokens",
    "model",
    "n",
    "output",
    "prompt",
    "prompt_logprobs",
    "regex",
    "response_format",
    "return_token_ids",
    "stop",
    "stop_token_ids",
    "stream",
    "stream_options",
    "structural_tag",
    "structured_outputs",
    "suffix",
    "tool_choice",
    "tools",
    "top_logprobs",
    "type",
    "use_beam_search",
)
"""The keys of a body that the worker looks at.  No object is built of any other: how many there are and what they hold
is the requester's to choose."""

_MAX_KEYS = 200_000
"""Colons behind a quotation mark in a body whose top level is joined anew; of one with more, no key is replaced."""
_MAX_SLOW_VALUES = 200_000
"""In an object with half of a surrogate pair, which only the standard library reads, by building all of it."""
_NOTHING = (b"null", b"false", b"[]", b"{}", b'""', b"0")
_EMPTY = re.compile(rb"\s*\}")
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_Struct = TypeVar("_Struct")


class _Anything(msgspec.Struct):
    """Any object at all."""


_anything = msgspec.json.Decoder(_Anything)
_Known = msgspec.defstruct("_Known", [(key, msgspec.Raw | msgspec.UnsetType, msgspec.UNSET) for key in KEYS])
_decode_known = msgspec.json.Decoder(_Known).decode
_NO_OBJECT: Any = _Known()
"""Has no key."""
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.encode


class RequestBody:
    """
    The body of a request and a view of `KEYS` in its top level, which is read once, when it is first looked at.

    What is no JSON object has none of them and is never changed: the backend will say what is wrong with it.

    Attributes:
        data: The exact bytes.
    """

    __slots__ = ("_known", "data")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._known: Any = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RequestBody) and other.data == self.data

    def __hash__(self) -> int:
        return hash(self.data)

    def __repr__(self) -> str:
        return f"RequestBody({len(self.data)} bytes)"  # a requester's words stay out of logs

    @property
    def is_object(self) -> bool:
        """Whether it is a JSON object."""
        return self._read() is not _NO_OBJECT

    @property
    def asks_for_stream(self) -> bool:
        """Whether it says `"stream": true`."""
        return self.raw("stream") == b"true"

    def raw(self, key: str) -> bytes:
        """Return the exact bytes of the value of one of `KEYS`, the last one of several; empty when there is none."""
        value = getattr(self._known or self._read(), key)
        return b"" if value is msgspec.UNSET else bytes(value)

    def _read(self) -> Any:
        if self._known is None:
            try:
                self._known = _decode_known(self.data)
            except _ERRORS:
                self._known = _NO_OBJECT
        return self._known

    def is_set(self, key: str) -> bool:
        """Whether a key asks for something: it is there, and not null, false, zero or empty."""
        value = self.raw(key)
        return bool(value) and value not in _NOTHING

    def with_changes(self, changes: Mapping[str, bytes | None]) -> bytes:
        """
        Return the bytes of an object with some keys set or removed.

        Args:
            changes: New values as JSON by key, one of `KEYS`; `None` removes the key.
        """
        if not changes or not self.is_object:
            return self.data
        present = {key for key in changes if self.raw(key)}
        changes = {key: value for key, value in changes.items() if value is not None or key in present}
        if not changes:
            return self.data
        if present.isdisjoint(changes):
            return _with_front(self.data, {key: value for key, value in changes.items() if value is not None})
        if self.data.count(b'":') > _MAX_KEYS:
            return self.data
        return _join({**_decode_fields(self.data), **changes})


class BodyRules:
    """
    The changes of bodies that an operator declared, of single keys at the top level.

    Args:
        defaults: Values that are set where the body does not have the key; one that is null is there.
        overrides: Values that are set whatever the body says.
    """

    __slots__ = ("_defaults", "_overrides")

    def __init__(self, defaults: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
        self._defaults = {key: _encode(value) for key, value in defaults.items()}
        self._overrides = {key: _encode(value) for key, value in overrides.items()}

    def __bool__(self) -> bool:
        return bool(self._defaults or self._overrides)

    def apply(self, body: RequestBody) -> RequestBody:
        """
        Return the body with the changes; the same one where it needs none.

        What is not changed stays as it was, byte for byte; only a key that is replaced drops the white space between
        the others.

        Raises:
            ValueError: No key of it can be changed: half of a surrogate pair, or too many keys.
        """
        data = body.data
        try:
            fields: dict[str, Any] = _decode_fields(data)
        except _ERRORS:
            raise ValueError("holds half of a surrogate pair, or is no JSON object") from None
        added = {key: value for key, value in (self._defaults | self._overrides).items() if key not in fields}
        replaced = {
            key: value for key, value in self._overrides.items() if key in fields and bytes(fields[key]) != value
        }
        if replaced:
            if data.count(b'":') > _MAX_KEYS:
                raise ValueError("has too many keys")
            return RequestBody(_join({**added, **fields, **replaced}))
        return RequestBody(_with_front(data, added)) if added else body


def _with_front(data: bytes, added: Mapping[str, bytes]) -> bytes:
    """Return an object with further keys in front."""
    start = data.index(b"{") + 1
    front = b",".join(_encode(key) + b":" + value for key, value in added.items())
    rest = data[start:]
    return data[:start] + front + (b"" if _EMPTY.match(rest) else b",") + rest


def _join(values: Mapping[str, "msgspec.Raw | bytes | None"]) -> bytes:
    """Return an object of raw values; a key whose value is `None` is left out."""
    return b"{" + b",".join(_encode(key) + b":" + bytes(v) for key, v in values.items() if v is not None) + b"}"


def is_json_object(data: bytes) -> bool:
    """Whether the bytes are one JSON object in UTF-8 that can be embedded in a message as they are."""
    return decode_object(_anything, data) is not None


def decode_object(decoder: msgspec.json.Decoder[_Struct], data: bytes) -> _Struct | None:
    """
    Return the struct of a JSON object; `None` for what is no JSON, or not of the expected skeleton.

    Args:
        decoder: Of a struct with the fields that are needed; the others are skipped.
        data: Raw bytes, any.
    """
    try:
        if not data.isascii():
            data.decode("utf-8")  # msgspec does not look into the strings it skips
        return decoder.decode(data)
    except (UnicodeDecodeError, msgspec.ValidationError):
        return None
    except (msgspec.DecodeError, RecursionError):
        is_readable = _SURROGATE_ESCAPE.search(data) is not None and count_values(data) <= _MAX_SLOW_VALUES
        return _decode_slowly(decoder, data) if is_readable else None


def count_values(data: bytes) -> int:
    """Return how many values JSON may hold at most, by its raw bytes."""
    return data.count(b",") + data.count(b"{") + data.count(b"[")


def _decode_slowly(decoder: msgspec.json.Decoder[_Struct], data: bytes) -> _Struct | None:
    try:
        document = json.loads(data, parse_constant=_refuse_constant)
        converted: _Struct = msgspec.convert(document, decoder.type, strict=True)  # `decoder.type` is typed Any
    except (ValueError, RecursionError):  # includes json.JSONDecodeError and msgspec.ValidationError
        return None
    return converted


def _refuse_constant(name: str) -> object:
    msg = f"{name} is not JSON"
    raise ValueError(msg)
