"""
The filter language of subscriptions: text in, predicate over a message's attributes out.

`parse` is called when a subscription is created or changed; the predicate it returns is called for every message.
This module knows neither messages nor subscriptions.  The documented grammar::

    expression = term, { "AND", term } | term, { "OR", term }      never both without parentheses
    term       = [ "NOT" | "-" ], ( comparison | "(", expression, ")" )
    comparison = "attributes", ":", key                            the message has the key
               | "attributes", ".", key, "=",  string              the message has the key with this value
               | "attributes", ".", key, "!=", string              every other message, also those without the key
               | "hasPrefix", "(", "attributes", ".", key, ",", string, ")"
    key        = letters, digits, "-", "_" | string
    string     = '"', { character | escape }, '"'

Keywords are upper case; keys and values are compared case-sensitively.  A form that is not documented is refused, so
that a filter accepted here is accepted by the service.

Source: https://cloud.google.com/pubsub/docs/subscription-message-filter
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from worker.emulators.pubsub.errors import InvalidArgumentError

MAX_FILTER_BYTES = 256
"""Source: https://cloud.google.com/pubsub/docs/subscription-message-filter#limitations_for_filter_expressions"""

Predicate = Callable[[Mapping[str, str]], bool]
"""Whether a message with these attributes is delivered."""

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<string>"(?:[^"\\]|\\.)*")
      | (?P<word>[A-Za-z0-9_](?:[A-Za-z0-9_-]*))
      | (?P<sign>!=|[=:.,()-])
    )""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|([0-7]{3})|(.))", re.DOTALL)
_SIMPLE_ESCAPES = {
    "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v",
    "\\": "\\", '"': '"', "'": "'", "?": "?", "`": "`",
}  # fmt: skip
"""The string escapes of https://github.com/google/cel-spec/blob/master/doc/langdef.md; the page on filters names only
their kinds (Unicode, hexadecimal, octal)."""

_KEYWORDS = frozenset({"AND", "OR", "NOT"})


class _Token(NamedTuple):
    """One token of the text: `kind` is `string`, `word`, `sign` or `end`; `at` counts characters from 0."""

    kind: str
    text: str
    at: int

    def matches(self, kind: str, *texts: str) -> bool:
        """Tell whether the token is of this kind and has one of these texts."""
        return self.kind == kind and self.text in texts


def parse(text: str) -> Predicate:
    """
    Return the predicate that a filter text describes.

    Args:
        text: The expression; not empty, at most 256 bytes of UTF-8.

    Raises:
        InvalidArgumentError: Too long, or a syntax error, whose position the text names.  Permanent.
    """
    size = len(text.encode())
    if size > MAX_FILTER_BYTES:
        raise InvalidArgumentError(f"Invalid filter: {size} bytes, but the maximum is {MAX_FILTER_BYTES}.")
    parser = _Parser(_tokens(text))
    predicate = parser.expression()
    parser.expect_end()
    return predicate


def _tokens(text: str) -> list[_Token]:
    """Split the text into tokens; the last one is of kind `end`."""
    tokens = []
    at = 0
    end = len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            raise _syntax_error("unexpected character", at)
        kind = match.lastgroup
        tokens.append(_Token(kind, match[kind], match.start(kind)))
        at = match.end()
    tokens.append(_Token("end", "", end))
    return tokens


class _Parser:
    """Recursive descent, one method for each rule of the grammar above; depth is bounded by the 256 bytes."""

    def __init__(self, tokens: list[_Token]) -> None:
        self._tokens = tokens
        self._next = 0

    def expression(self) -> Predicate:
        terms = [self._term()]
        joined_by = ""
        while self._peek().matches("word", "AND", "OR"):
            operator = self._take()
            if joined_by and operator.text != joined_by:
                raise _syntax_error("AND and OR need parentheses when mixed", operator.at)
            joined_by = operator.text
            terms.append(self._term())
        if len(terms) == 1:
            return terms[0]
        return _all_of(terms) if joined_by == "AND" else _any_of(terms)

    def expect_end(self) -> None:
        if self._peek().kind != "end":
            raise _syntax_error(f"expected AND, OR or the end, found {self._peek().text!r}", self._peek().at)

    def _term(self) -> Predicate:
        token = self._peek()
        if token.matches("sign", "-") or token.matches("word", "NOT"):
            self._take()
            return _negation(self._operand())
        return self._operand()

    def _operand(self) -> Predicate:
        token = self._take()
        if token.matches("sign", "("):
            inner = self.expression()
            self._sign(")")
            return inner
        if token.matches("word", "attributes"):
            return self._comparison()
        if token.matches("word", "hasPrefix"):
            return self._prefix()
        raise _syntax_error(f"expected attributes, hasPrefix or (, found {token.text!r}", token.at)

    def _comparison(self) -> Predicate:
        sign = self._take()
        if sign.matches("sign", ":"):
            return _has(self._key())
        if not sign.matches("sign", "."):
            raise _syntax_error("expected . or : after attributes", sign.at)
        key = self._key()
        operator = self._take()
        if not operator.matches("sign", "=", "!="):
            raise _syntax_error("expected = or !=", operator.at)
        equals = _equals(key, self._string())
        return equals if operator.text == "=" else _negation(equals)

    def _prefix(self) -> Predicate:
        self._sign("(")
        name = self._take()
        if not name.matches("word", "attributes"):
            raise _syntax_error("expected attributes", name.at)
        self._sign(".")
        key = self._key()
        self._sign(",")
        prefix = self._string()
        self._sign(")")
        return _has_prefix(key, prefix)

    def _key(self) -> str:
        token = self._take()
        if token.kind == "string":
            return _unquote(token)
        if token.kind == "word" and token.text not in _KEYWORDS:
            return token.text
        raise _syntax_error(f"expected an attribute key, found {token.text!r}", token.at)

    def _string(self) -> str:
        token = self._take()
        if token.kind != "string":
            raise _syntax_error(f"expected a quoted value, found {token.text!r}", token.at)
        return _unquote(token)

    def _sign(self, text: str) -> None:
        token = self._take()
        if not token.matches("sign", text):
            raise _syntax_error(f"expected {text}, found {token.text!r}", token.at)

    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _take(self) -> _Token:
        token = self._tokens[self._next]
        if token.kind != "end":
            self._next += 1
        return token


def _unquote(token: _Token) -> str:
    """Return a quoted string without quotes and escapes; octal and hexadecimal escapes are code points."""

    def resolve(match: re.Match[str]) -> str:
        digits = match[1] or match[2] or match[3]
        try:
            if digits is not None:
                return chr(int(digits, 16))
            if match[4] is not None:
                return chr(int(match[4], 8))
            return _SIMPLE_ESCAPES[match[5]]
        except (ValueError, OverflowError, KeyError):
            raise _syntax_error(f"unknown escape {match[0]}", token.at) from None

    return _ESCAPE.sub(resolve, token.text[1:-1])


def _syntax_error(reason: str, at: int) -> InvalidArgumentError:
    return InvalidArgumentError(f"Invalid filter: {reason} at character {at + 1}.")


def _has(key: str) -> Predicate:
    return lambda attributes: key in attributes


def _equals(key: str, value: str) -> Predicate:
    return lambda attributes: attributes.get(key) == value


def _has_prefix(key: str, prefix: str) -> Predicate:
    return lambda attributes: key in attributes and attributes[key].startswith(prefix)


def _negation(term: Predicate) -> Predicate:
    return lambda attributes: not term(attributes)


def _all_of(terms: list[Predicate]) -> Predicate:
    return lambda attributes: all(term(attributes) for term in terms)


def _any_of(terms: list[Predicate]) -> Predicate:
    return lambda attributes: any(term(attributes) for term in terms)
