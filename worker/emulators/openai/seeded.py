"""
What is invented from a seed: numbers, words, and values that fit a JSON schema.

The same seed and the same request give the same answer in any process, in whatever order requests arrive.  A shared
random generator cannot promise that, so there is none: a `Draws` is a key, and each draw hashes the key with a label.
Nothing here is fit for secrets.

The vocabulary has 256 words, each one token, so that one pseudo-random byte is one token.  A sixteenth of the words is
not ASCII, on purpose: an answer of usual length then contains characters of two, three and four UTF-8 bytes, so that a
rehearsal cuts streams inside of characters.
"""

import re
from collections.abc import Mapping
from hashlib import blake2b, shake_128
from typing import Any

_TWO_TO_52 = float(1 << 52)
"""52 bits and a half fit a double exactly, so that a draw can be neither 0 nor 1."""

_KEY_BYTES = 16
"""128 bits: two requests of one run share a key with a negligible probability."""


class Draws:
    """Deterministic draws for one purpose, for example "the answer to this body" or "the n-th sight of this body"."""

    __slots__ = ("_key",)

    def __init__(self, seed: int, *parts: bytes | str | int) -> None:
        """
        Mix a key from the seed and from what distinguishes this purpose.

        Args:
            seed: The server's seed, any integer.
            parts: What the draws depend on, in order; the same parts give the same draws.
        """
        mixed = blake2b(str(seed).encode(), digest_size=_KEY_BYTES)
        for part in parts:
            data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
            mixed.update(len(data).to_bytes(8, "big"))
            mixed.update(data)
        self._key = mixed.digest()

    def uniform(self, label: str) -> float:
        """Return a number strictly between 0 and 1; the same label always gives the same number."""
        digest = blake2b(label.encode(), key=self._key, digest_size=8).digest()
        return ((int.from_bytes(digest, "big") >> 12) + 0.5) / _TWO_TO_52

    def between(self, label: str, low: int, high: int) -> int:
        """Return an integer from `low` to `high`, both included."""
        return low + int(self.uniform(label) * (high - low + 1))

    def data(self, label: str, size_bytes: int) -> bytes:
        """Return `size_bytes` pseudo-random bytes; a longer draw begins with the shorter one."""
        return shake_128(self._key + label.encode()).digest(size_bytes)

    def hex(self, label: str, digits: int = 24) -> str:
        """Return `digits` hexadecimal digits, as identifiers need them."""
        return self.data(label, (digits + 1) // 2).hex()[:digits]


WORDS: tuple[str, ...] = tuple(
    """
    a about above across after again air all along also always an and animal any are art as ask at away back
    base be because been before begin behind below best between big bird blue boat body book both box bridge
    bright bring build but by call came can carry change child circle city clear close cloud coast cold colour
    come common copper could country course cover dark day deep did different do door down draw dream dry each
    early earth east easy edge end enough even evening every eye face fact fall family far farm fast few field
    find fire first fish five flow follow food for forest form found four free friend from full garden gave give
    glass go gold good grass great green ground group grow had half hand hard has have head hear heat help here
    high hill hold home horse hour house how idea if in inside iron is island it just keep kind know lake land
    language large last later learn leave left letter level light like line list little long look made make map
    mark metal might mile milk moon more morning most mountain move much music must name near never new next
    night north not note now number ocean of off old on once one open or order other our out over own page paper
    part path piece place plan plant play point power press rain read red rest river road rock naïve café Größe
    señor żółw Прага река 日本 東京 漢字 한국 θάλασσα façade 🙂 🚀 𝄞
    """.split()  # noqa: SIM905 - a list of 256 literals would fill the screen
)
_SPACED = tuple(" " + word for word in WORDS)
_CAPITAL = tuple(" " + word[0].upper() + word[1:] for word in WORDS)
SENTENCE_WORDS = 9
"""A full stop after this many words: prose has 15 to 20, but short answers should show one too."""

TOKEN = re.compile(r"\s*\w+|\s*[^\w\s]|\s+")
"""How text that was not made of `WORDS` is cut into tokens: a word or a mark with the space before it."""


def tokens_from(data: bytes) -> list[str]:
    """Return one token per byte; joined they read as sentences: capitals, full stops, single spaces."""
    tokens = [_SPACED[byte] for byte in data]
    for place in range(0, len(data), SENTENCE_WORDS):
        tokens[place] = _CAPITAL[data[place]] if place else _CAPITAL[data[place]].lstrip()
    for place in range(SENTENCE_WORDS - 1, len(data), SENTENCE_WORDS):
        tokens[place] += "."
    if len(data) % SENTENCE_WORDS:
        tokens[-1] += "."
    return tokens


def split_tokens(text: str) -> list[str]:
    """Return the tokens of any text; joined they are the text again, an empty text has none."""
    return TOKEN.findall(text)


def count_tokens(text: str) -> int:
    """Return about how many tokens a text has: a quarter of its UTF-8 bytes, at least 1 unless it is empty."""
    return (len(text.encode("utf-8", "surrogatepass")) + 3) // 4


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


def schema_value(schema: Any, draws: Draws) -> Any:
    """
    Return a value that fits the schema; the same schema and draws give the same value.

    Covers what tool definitions contain (types, enum, const, bounds, nested objects and arrays, `$ref` into `$defs`,
    the first of `anyOf`/`oneOf`, common formats).  Patterns, `not` and conditional parts are ignored, so a value need
    not satisfy every schema.

    Args:
        schema: A JSON schema; anything that is not an object is treated as one without constraints.
        draws: Where the choices come from.
    """
    return _value(schema, schema, draws, "$", 0)


def _resolve(schema: Any, root: Any) -> Mapping[str, Any]:
    if isinstance(schema, Mapping) and isinstance(schema.get("$ref"), str):
        target: Any = root
        for key in schema["$ref"].lstrip("#/").split("/"):
            target = target.get(key) if isinstance(target, Mapping) else None
        return target if isinstance(target, Mapping) else {}
    return schema if isinstance(schema, Mapping) else {}


def _value(schema: Any, root: Any, draws: Draws, where: str, depth: int) -> Any:  # noqa: C901, PLR0911 - one case per type
    schema = _resolve(schema, root)
    if depth > _MAX_DEPTH:
        return None
    if "const" in schema:
        return schema["const"]
    if isinstance(schema.get("enum"), list) and schema["enum"]:
        return schema["enum"][draws.between(where, 0, len(schema["enum"]) - 1)]
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(key), list) and schema[key]:
            return _value(schema[key][0], root, draws, where, depth + 1)
    kinds = schema.get("type", "object" if "properties" in schema else "string")
    kind = next((one for one in kinds if one != "null"), "null") if isinstance(kinds, list) else kinds
    match kind:
        case "object":
            properties = schema.get("properties")
            items = properties.items() if isinstance(properties, Mapping) else ()
            return {name: _value(inner, root, draws, f"{where}.{name}", depth + 1) for name, inner in items}
        case "array":
            size = max(1, _bound(schema, "minItems", 0))
            inner = schema.get("items")
            return [_value(inner, root, draws, f"{where}[{place}]", depth + 1) for place in range(min(size, 64))]
        case "integer" | "number":
            low = _bound(schema, "minimum", _bound(schema, "exclusiveMinimum", -1) + 1)
            high = _bound(schema, "maximum", _bound(schema, "exclusiveMaximum", low + 100))
            number = draws.between(where, low, max(low, high - 1 if "exclusiveMaximum" in schema else high))
            return number if kind == "integer" else float(number)
        case "boolean":
            return draws.uniform(where) > 0.5  # noqa: PLR2004 - a coin
        case "null":
            return None
    return _text(schema, draws, where)


def _bound(schema: Mapping[str, Any], name: str, default: int) -> int:
    value = schema.get(name, default)
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else default


def _text(schema: Mapping[str, Any], draws: Draws, where: str) -> str:
    if schema.get("format") in _FORMATS:
        return _FORMATS[schema["format"]]
    text = WORDS[draws.data(where, 1)[0]]
    low = min(_bound(schema, "minLength", 0), 100_000)
    text = text.ljust(low, "x")
    return text[: _bound(schema, "maxLength", len(text))]
