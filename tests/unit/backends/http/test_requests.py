"""What is written of a request: prepared in advance, and the same as if it were not."""

import httpx
import pytest
from hypothesis import assume, given, reject
from hypothesis import strategies as st

from worker.backends.openai import HttpBackend, escaped, lines
from worker.errors import MessageError
from worker.settings.schema import RouteSettings
from worker.wire.http import normalise_path

SETTINGS = {"name": "r", "base_url": "http://h:8000/v1", "api_key": "sk-1", "headers": {"X-Team": "a"}}


def head_of(own: dict[str, str], method: str = "POST", body: bytes = b"{}") -> list[str]:
    backend = HttpBackend(RouteSettings.model_validate(SETTINGS))
    line, *headers = backend._request(method, "/v1/x", own, body).head.decode().removesuffix("\r\n\r\n").split("\r\n")
    return [line, *sorted(headers)]


def test_one_requests_own_headers_come_before_those_of_all() -> None:
    """And say nothing to the next request."""
    backend = HttpBackend(RouteSettings.model_validate(SETTINGS))
    with_own = backend._request("POST", "/v1/x", {"x-team": "b", "x-request-id": "1"}, b"").head
    assert (with_own.count(b"x-team: "), b"x-team: b\r\n" in with_own, b"x-request-id: 1\r\n" in with_own) == (
        1,
        True,
        True,
    )
    without = backend._request("POST", "/v1/x", {}, b"").head
    assert (without.count(b"x-team: "), b"x-team: a\r\n" in without, b"x-request-id" in without) == (1, True, False)


def test_a_get_has_no_length() -> None:
    """It has no body."""
    assert head_of({})[0] == "POST /v1/x HTTP/1.1"
    assert "content-length: 2" in head_of({})
    assert not [line for line in head_of({}, "GET") if line.startswith("content-length")]


@pytest.mark.parametrize("value", ["a\r\nx: y", "a\nb", "a\rb", "\n"])
def test_a_header_is_one_line(value: str) -> None:
    """Settings and messages are checked before; nothing that slips through may become a second request."""
    with pytest.raises(ValueError, match="line break"):
        lines({"x": value})


VISIBLE = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="\\#"), min_size=1)


@given(VISIBLE)
def test_a_path_is_escaped_as_httpx_does_it(text: str) -> None:
    """What is no part of a URL is escaped, what is escaped stays; only dots are left to the server."""
    path = "/v1/" + text
    try:
        normalise_path(path)
    except MessageError:
        reject()
    assume(not {".", ".."} & set(path.partition("?")[0].split("/")))
    assert escaped(path) == httpx.URL("http://h" + path).raw_path
