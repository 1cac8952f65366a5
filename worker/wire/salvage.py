"""
What can be read of a message that is no request.

A requester whose message is refused needs its metadata to know which one it was, and the usual mistakes (`NaN` from a
language's own JSON writer, a raw line break, a cut at the end, a byte that is not UTF-8) leave the metadata readable.
So the top level is walked leniently, as far as it can be followed.  Nothing here decides whether a message is good.
"""

import json
import re
from collections.abc import Iterator

MAX_LENIENT_BYTES = 1_000_000
"""Longest message looked at leniently: the walk builds Python objects, tens of bytes for each byte at worst, and that
is more than a requester's mistake should cost the others.  House decision."""

_SCAN = json.JSONDecoder(strict=False, parse_int=str, parse_float=str).raw_decode  # no numbers: digits may be many
_GAP = re.compile(r"[ \t\r\n]*")


def walk_top_level(data: bytes) -> Iterator[tuple[str, bytes]]:
    """
    Yield key and raw value of a JSON object's top level, in order, until it can be followed no further.

    Raises nothing, whatever the bytes; what is over `MAX_LENIENT_BYTES` yields nothing.  A value is cut out as it
    stands and may itself not be valid JSON.
    """
    if len(data) > MAX_LENIENT_BYTES:
        return
    text = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    position, expected = 0, "{"
    try:
        while text[position := _gap(text, position)] == expected:
            key, position = _SCAN(text, _gap(text, position + 1))
            position = _gap(text, position)
            if not isinstance(key, str) or text[position] != ":":
                return
            start = _gap(text, position + 1)
            _, position = _SCAN(text, start)
            yield key, text[start:position].encode("utf-8", "surrogateescape")
            expected = ","
    except (ValueError, IndexError, RecursionError):  # the cut, or nested too deeply
        return


def _gap(text: str, position: int) -> int:
    match = _GAP.match(text, position)
    assert match is not None  # it matches nothing as well
    return match.end()
