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

Fields = Mapping[str, msgspec.Raw]
"""The top level of a JSON object: the exact bytes of each value."""

_NO_FIELDS: Fields = {}
"""Of what is no object; told apart from an empty object by its identity."""
_NOTHING = (b"null", b"false", b"[]", b"{}", b'""', b"0")
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_Struct = TypeVar("_Struct")


class _Anything(msgspec.Struct):
    """Any object at all."""


_anything = msgspec.json.Decoder(_Anything)
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.encode


class RequestBody:
    """
    The body of a request and a view of its top level, which is read once, when it is first looked at.

    What is no JSON object has no fields and is never changed: the backend will say what is wrong with it.

    Attributes:
        data: The exact bytes.
    """

    __slots__ = ("_fields", "data")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._fields: Fields | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RequestBody) and other.data == self.data

    def __hash__(self) -> int:
        return hash(self.data)

    def __repr__(self) -> str:
        return f"RequestBody({len(self.data)} bytes)"  # a requester's words stay out of logs

    @property
    def fields(self) -> Fields:
        """The top level; of a key that stands twice, the last value."""
        if self._fields is None:
            try:
                self._fields = _decode_fields(self.data)
            except _ERRORS:
                self._fields = _NO_FIELDS
        return self._fields

    @property
    def is_object(self) -> bool:
        """Whether it is a JSON object."""
        return self.fields is not _NO_FIELDS

    @property
    def asks_for_stream(self) -> bool:
        """Whether it says `"stream": true`."""
        return self.raw("stream") == b"true"

    def raw(self, key: str) -> bytes:
        """Return the exact bytes of a value; empty when there is none."""
        value = self.fields.get(key)
        return b"" if value is None else bytes(value)

    def is_set(self, key: str) -> bool:
        """Whether a key asks for something: it is there, and not null, false, zero or empty."""
        value = self.fields.get(key)
        return value is not None and bytes(value) not in _NOTHING

    def value(self, key: str) -> Any:
        """Return a decoded value; `None` when there is none, or none that can be decoded."""
        value = self.fields.get(key)
        if value is None:
            return None
        try:
            return msgspec.json.decode(value)
        except _ERRORS:
            return None

    def with_changes(self, changes: Mapping[str, bytes | None]) -> bytes:
        """
        Return the bytes of an object with some keys set or removed.

        Args:
            changes: New values as JSON by key; `None` removes the key.
        """
        fields = self.fields
        changes = {key: value for key, value in changes.items() if value is not None or key in fields}
        if not changes:
            return self.data
        if not any(key in fields for key in changes):
            added = b",".join(_encode(key) + b":" + value for key, value in changes.items() if value is not None)
            start = self.data.index(b"{") + 1
            return self.data[:start] + added + (b"," if fields else b"") + self.data[start:]
        values: dict[str, msgspec.Raw | bytes | None] = {**fields, **changes}
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
        return _decode_slowly(decoder, data) if _SURROGATE_ESCAPE.search(data) else None


def _decode_slowly(decoder: msgspec.json.Decoder[_Struct], data: bytes) -> _Struct | None:
    try:
        document = json.loads(data, parse_constant=_refuse_constant)
        return msgspec.convert(document, decoder.type, strict=True)
    except (ValueError, RecursionError):  # includes json.JSONDecodeError and msgspec.ValidationError
        return None


def _refuse_constant(name: str) -> object:
    msg = f"{name} is not JSON"
    raise ValueError(msg)
