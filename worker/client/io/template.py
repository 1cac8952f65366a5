"""
From a row of a table to a request line.  Pure, no I/O.

A template is a JSON object in whose strings `{column}` stands for the value of a column.  A string that is nothing else
becomes the value with its type: a number, a list, null.  `{column:json}` reads a text as JSON, for tables such as CSV
that hold texts alone.  `{{` and `}}` are braces.

The object is a request message, an OpenAI batch line, or the body alone of a chat or a completion, whose path follows
from its keys.  Metadata that a template does not name are `{"row": N}`, so that an answer says which row it belongs to.
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import msgspec

from worker.client.errors import InputError
from worker.errors import did_you_mean
from worker.wire.endpoints import ENDPOINTS
from worker.wire.message import is_batch_line

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*?)(:json)?\}|[{}]")
_encode = msgspec.json.Encoder(enc_hook=str).encode
_decode = msgspec.json.decode

Row = Mapping[str, Any]
Part = Callable[[Row], Any]


class Template:
    """
    What every row of a table becomes.

    Args:
        text: The JSON object.

    Raises:
        InputError: It is none, has a brace that stands alone, or names no path where one is needed; permanent.
    """

    def __init__(self, text: str) -> None:
        try:
            template = _decode(text)
        except (msgspec.DecodeError, RecursionError) as error:
            raise InputError(f"the template is not JSON: {error}") from None
        if not isinstance(template, dict):
            raise InputError("the template must be a JSON object")
        self.columns: dict[str, None] = {}
        """Names of the columns that it uses, in their order."""
        template = _line_of(template)
        self._has_metadata = "metadata" in template or is_batch_line(template)
        self._render = self._compiled(template)

    def require(self, name: str, columns: Collection[str]) -> None:
        """
        Look whether a table has the columns.

        Args:
            name: Of the table, for the message.
            columns: That it has.

        Raises:
            InputError: It lacks one; permanent.
        """
        for column in self.columns:
            if column not in columns:
                has = ", ".join(columns)
                near = did_you_mean(column, columns)
                raise InputError(
                    f"{name}: has no column {column!r}, which the template asks for{near}; it has {has or 'none'} "
                    "(a brace that is meant as such is written {{ or }})"
                )

    def render(self, row: Row, number: int) -> bytes:
        """
        Return the request line of a row.

        Args:
            row: Has all of `columns`.
            number: Of the row, from 1.

        Raises:
            InputError: A value that is to be JSON is none; the message names the column.
        """
        line = self._render(row)
        return _encode(line if self._has_metadata else {**line, "metadata": {"row": number}})

    def _compiled(self, value: Any) -> Part:
        """Return a function that makes a value of the template for a row."""
        match value:
            case dict():
                items = {key: self._compiled(inner) for key, inner in value.items()}
                return lambda row: {key: part(row) for key, part in items.items()}
            case list():
                parts = [self._compiled(inner) for inner in value]
                return lambda row: [part(row) for part in parts]
            case str():
                return self._compiled_text(value)
        return lambda _: value

    def _compiled_text(self, text: str) -> Part:
        pieces: list[str | Part] = []
        position = 0
        for token in _TOKEN.finditer(text):
            pieces.append(text[position : token.start()])
            position = token.end()
            if token[0] in {"{{", "}}"}:
                pieces.append(token[0][0])
            elif token[1]:
                self.columns[token[1]] = None
                pieces.append(_json_of(token[1]) if token[2] else _value_of(token[1]))
            else:
                raise InputError(f"the template has {token[0]} in {text!r}; a brace alone is written {{{{ or }}}}")
        pieces = [piece for piece in [*pieces, text[position:]] if piece != ""]
        if len(pieces) == 1 and callable(pieces[0]):
            return pieces[0]
        if all(isinstance(piece, str) for piece in pieces):
            fixed = "".join(str(piece) for piece in pieces)
            return lambda _: fixed
        return lambda row: "".join(piece if isinstance(piece, str) else _text_of(piece(row)) for piece in pieces)


def _line_of(template: dict[str, Any]) -> dict[str, Any]:
    """Return the template of a whole line; one of a body alone gets the path that its keys tell."""
    if "body" in template:
        if "path" not in template and not is_batch_line(template):
            raise InputError('the template has a body but no path; "path": "/v1/chat/completions" would be one')
        return template
    for key in template:
        names = [each.name for each in ENDPOINTS if each.input == key]
        if len(names) == 1:
            return {"path": f"/v1/{names[0]}", "body": template}
    raise InputError(
        "the template is neither a request nor a body whose path can be told; "
        'expected {"path": "/v1/chat/completions", "body": {...}} or {"model": ..., "messages": [...]}'
    )


def _value_of(column: str) -> Part:
    return lambda row: row[column]


def _json_of(column: str) -> Part:
    def part(row: Row) -> Any:
        value = row[column]
        if not isinstance(value, str):
            return value
        try:
            return _decode(value) if value.strip() else None
        except (msgspec.DecodeError, RecursionError) as error:
            raise InputError(f"column {column!r} is not JSON: {error}") from None

    return part


def _text_of(value: Any) -> str:
    """Return a value inside a text: nothing for null, JSON for what is no text."""
    if value is None:
        return ""
    return value if isinstance(value, str) else _encode(value).decode().strip('"')
