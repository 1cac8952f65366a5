"""
Texts with placeholders that each request fills: `{message_id}`, `{model}`, `{metadata.KEY}` and some more.

A key of the metadata may name what is inside an object, with a dot for each level.  A text of the metadata stands there
as it is, any other value as the JSON that the requester wrote; what is absent or null is empty.  `{{` and `}}` are
braces.  Nothing else is understood: a template comes from an operator, what fills it from a requester.
"""

import re
from collections.abc import Callable, Mapping

import msgspec

_PART = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_BRACES = {"{{": "{", "}}": "}"}
_SIMPLE = ("message_id", "attempt_id", "traceparent", "model")
_METADATA = "metadata."
_KEYS = re.compile(r"[^.{}]+(?:\.[^.{}]+)*")

_decode_keys = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_text = msgspec.json.Decoder(str).decode


class Values(msgspec.Struct, frozen=True, kw_only=True):
    """What fills the placeholders of one request."""

    message_id: str = ""
    attempt_id: str = ""
    traceparent: str = ""
    """Of the attempt's span; empty without tracing."""
    model: str = ""
    metadata: bytes = b"{}"
    """A JSON object."""


class Template:
    """
    A text with placeholders.

    Args:
        text: As the operator wrote it.

    Raises:
        ValueError: It has a brace without its other half, or a placeholder that does not exist.
    """

    def __init__(self, text: str) -> None:
        self._parts: list[str | Callable[[Values], str]] = []
        at = 0
        for match in _PART.finditer(text):
            self._parts.append(text[at : match.start()])
            at = match.end()
            brace = _BRACES.get(match[0])
            self._parts.append(brace if brace is not None else _filler(match[1]))
        self._parts.append(text[at:])

    def render(self, values: Values) -> str:
        """Return the text for one request; never raises for what a request says."""
        return "".join([part if isinstance(part, str) else part(values) for part in self._parts])


def _filler(name: str | None) -> Callable[[Values], str]:
    """Return what finds the value of a placeholder; `None` stands for a brace that is alone."""
    if name is None:
        raise ValueError("has a brace without its other half; write {{ or }} for the character itself")
    if name in _SIMPLE:
        return lambda values: str(getattr(values, name))
    keys = name.removeprefix(_METADATA)
    if not name.startswith(_METADATA) or _KEYS.fullmatch(keys) is None:
        known = ", ".join(f"{{{each}}}" for each in (*_SIMPLE, "metadata.KEY"))
        raise ValueError(f"has the unknown placeholder {{{name}}}; there are {known}")
    path = tuple(keys.split("."))
    return lambda values: _find(values.metadata, path)


def _find(document: bytes, path: tuple[str, ...]) -> str:
    """Return the value at a path as text; empty where there is none."""
    value = document
    for key in path:
        if not value.startswith(b"{"):
            return ""
        fields: Mapping[str, msgspec.Raw] = _decode_keys(value)
        value = bytes(fields.get(key, b"null"))
    if value == b"null":
        return ""
    return _decode_text(value) if value.startswith(b'"') else value.decode()
