"""
Finds the first data frame of a server-sent-events text that came as an error body.

Some proxies answer a request for a stream with an error status *and* a body in the form of an event stream.  This file
reads just enough of the format to get at the JSON inside; whole streams are the business of the backends' parser.
It works on bytes, because line separators of Unicode (U+2028, U+0085) are not line ends here.

Source: WHATWG HTML, server-sent events, "Interpreting an event stream".
"""

import re
from collections.abc import Mapping

_LINE_END = re.compile(rb"\r\n|\n|\r")
_STARTS = (b"data:", b"event:")


def looks_like_events(headers: Mapping[str, str], body: bytes) -> bool:
    """
    Say whether a body is an event stream, by its content type or by its first bytes.

    Args:
        headers: Names in lower case.
        body: The body; a byte order mark and leading blank lines are tolerated.
    """
    if headers.get("content-type", "").lower().startswith("text/event-stream"):
        return True
    return body.lstrip(b"\xef\xbb\xbf\r\n ").startswith(_STARTS)


def first_data(body: bytes) -> bytes | None:
    """
    Return the data of the first event that is not `[DONE]`, or `None` when there is none.

    Several `data:` lines of one event are joined with a line feed; an event that the text ends in is taken too,
    since servers forget the last blank line.
    """
    lines: list[bytes] = []
    for line in [*_LINE_END.split(body.removeprefix(b"\xef\xbb\xbf")), b""]:
        if line.startswith(b"data:"):
            lines.append(line[5:].removeprefix(b" "))
        elif not line and lines:
            data = b"\n".join(lines)
            if data.strip() != b"[DONE]":
                return data
            lines = []
    return None
