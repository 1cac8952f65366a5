"""
Changing keys of a request's body without touching the rest of it.

The body belongs to the requester: numbers of any size, the order of keys and every escape reach the backend as they
stood in the message.  So nothing here decodes a value that is not changed.  New keys are put in front of the others,
and then every byte of the body stays where it was; where a key has to be replaced or removed, the top level is joined
anew from the raw values.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

Fields = Mapping[str, msgspec.Raw]
"""The top level of a JSON object: the exact bytes of each value."""

_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.encode
_NOTHING = (b"null", b"false", b"[]", b"{}", b'""', b"0")


def read_fields(body: bytes) -> Fields | None:
    """Return the top level of a body, `None` for what is no JSON object: the backend will say so."""
    try:
        return _decode_fields(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def raw(fields: Fields, key: str) -> bytes:
    """Return the exact bytes of a value; empty when there is none."""
    value = fields.get(key)
    return b"" if value is None else bytes(value)


def is_set(fields: Fields, key: str) -> bool:
    """Whether a key asks for something: it is there, and not null, false, zero or empty."""
    value = fields.get(key)
    return value is not None and bytes(value) not in _NOTHING


def value_of(fields: Fields, key: str) -> Any:
    """Return a decoded value; `None` when there is none, or none that can be decoded."""
    value = fields.get(key)
    if value is None:
        return None
    try:
        return msgspec.json.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def with_changes(body: bytes, fields: Fields, changes: Mapping[str, bytes | None]) -> bytes:
    """
    Return the body with some keys set or removed.

    Args:
        body: A JSON object.
        fields: Its top level, from `read_fields`.
        changes: New values as JSON by key; `None` removes the key.
    """
    changes = {key: value for key, value in changes.items() if value is not None or key in fields}
    if not changes:
        return body
    if not any(key in fields for key in changes):
        added = b",".join(_encode(key) + b":" + value for key, value in changes.items() if value is not None)
        start = body.index(b"{") + 1
        return body[:start] + added + (b"," if fields else b"") + body[start:]
    values: dict[str, msgspec.Raw | bytes | None] = {**fields, **changes}
    return b"{" + b",".join(_encode(key) + b":" + bytes(v) for key, v in values.items() if v is not None) + b"}"
