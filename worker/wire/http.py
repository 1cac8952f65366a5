"""
What every room has to know of HTTP: which paths and headers can be sent, what a success is, where request ids stand.

A path comes from a requester and is put behind the operator's base URL, so it must not be able to name another host or
to climb out of what the operator allowed.  Which paths and headers are allowed is a setting; this module judges their
shape alone, so that the comparison with the allow-list is about what the backend will see.
"""

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from worker.errors import MessageError

MAX_PATH_CHARS = 2048
"""House decision: longer than any path of the API, shorter than any server's limit of a request line (8 KiB)."""

REQUEST_ID_HEADERS = ("x-request-id", "x-amzn-requestid", "apim-request-id", "x-litellm-call-id", "request-id")
"""Where servers and gateways tell the id under which their operators find a request: OpenAI and vLLM, SageMaker, Azure,
LiteLLM, Anthropic.  The first that is there counts."""

_SLASH = r"(?:/|\\|%2f|%5c)"
_SEGMENT_UP = re.compile(rf"(?:^|{_SLASH})(?:\.|%2e){{2}}(?:{_SLASH}|;|$)", re.IGNORECASE)
"""`..` as a segment, its dots and slashes plain or percent-encoded (servers decode before they resolve), or followed by
a parameter, which some servers strip first (https://datatracker.ietf.org/doc/html/rfc3986#section-3.3)."""
_SCHEME = re.compile(r"^/*[A-Za-z][A-Za-z0-9+.-]*://")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e]*")
"""Field names are tokens; values without line breaks, and ASCII because nothing else survives every proxy
(https://datatracker.ietf.org/doc/html/rfc9110#section-5)."""
_CONTROL = re.compile(r"[\x00-\x20\x7f\\#]|%(?:[01][0-9a-f]|7f)", re.IGNORECASE)


def normalise_path(path: str) -> str:
    """
    Return the path with exactly one leading slash; a query stays as it is.

    Raises:
        MessageError: Empty, too long, with a scheme, a host, a `..` segment, a fragment, white space or control
            characters; permanent.
    """
    if _SCHEME.match(path) or path.startswith("//"):
        raise MessageError("path must not name a scheme or a host", param="path")
    if len(path) > MAX_PATH_CHARS:
        raise MessageError(f"path is longer than {MAX_PATH_CHARS} characters", param="path")
    if _CONTROL.search(path) or not path.isascii():
        raise MessageError(
            "path must be plain ASCII without white space, control characters, backslash or fragment", param="path"
        )
    before_query = path.partition("?")[0]
    if before_query in {"", "/"}:
        raise MessageError("path is empty", param="path")
    if _SEGMENT_UP.search(before_query):
        raise MessageError("path must not contain '..' segments", param="path")
    return path if path.startswith("/") else "/" + path


def address_of(base_url: str, path: str) -> str:
    """Return where a path is asked: the base URL and the path, with a doubled `/v1` written once."""
    is_doubled = path.startswith("/v1/") and urlsplit(base_url).path.endswith("/v1")
    return base_url + (path.removeprefix("/v1") if is_doubled else path)


def is_header(name: str, value: str) -> bool:
    """Whether name and value may stand in an HTTP request: a token, and ASCII without line breaks."""
    return _HEADER_NAME.fullmatch(name) is not None and _HEADER_VALUE.fullmatch(value) is not None


def is_usable_key(key: str) -> bool:
    """Whether a key can be sent: visible ASCII, at least one character."""
    return bool(key) and all("!" <= char <= "~" for char in key)


def is_success(status: int | None) -> bool:
    """Whether a response has a status of success (2xx); `None`, no response at all, has not."""
    return status is not None and 200 <= status <= 299  # noqa: PLR2004 - https://www.rfc-editor.org/rfc/rfc9110#section-15.3


def request_id_of(headers: Mapping[str, str]) -> str | None:
    """
    Return the id that the backend gave the request, `None` when it told none.

    Args:
        headers: Response headers, names in lower case.
    """
    return next((headers[name] for name in REQUEST_ID_HEADERS if headers.get(name)), None)
