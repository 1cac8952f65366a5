"""Paths and headers by their shape."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import MessageError
from worker.wire.http import MAX_PATH_CHARS, is_header, normalise_path


@pytest.mark.parametrize(
    ("given_path", "path"),
    [
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("v1/embeddings", "/v1/embeddings"),
        ("/v1/x?a=..&b=/../c", "/v1/x?a=..&b=/../c"),
        ("/v1/a..b/...", "/v1/a..b/..."),
        ("/v1/%7Euser/a%2Fb", "/v1/%7Euser/a%2Fb"),
        ("/" + "a" * (MAX_PATH_CHARS - 1), "/" + "a" * (MAX_PATH_CHARS - 1)),
    ],
)
def test_good_paths_get_one_leading_slash(given_path: str, path: str) -> None:
    """A path comes out as it went in, with the slash it may lack."""
    assert normalise_path(given_path) == path


BAD = [
    *("", "/", "?", "?a=1", "/?a=1"),
    *("http://evil/v1", "HTTPS://evil", "/http://evil", "//evil/v1", "///evil", "file:///etc/passwd", "a+b.c-d://x"),
    *("..", "/..", "/v1/..", "/v1/../admin", "../v1", "/v1/%2e%2e/admin", "/v1/%2E./x", "/v1/.%2e", "/..?x"),
    *("/v1/..%2fadmin", "/v1%2f..%2fadmin", "/v1/%2e%2e%5cadmin", "/v1/..;a=b/admin"),
    *("/v1\\..\\admin", "/v1/x y", "/v1/x\r\nHost: evil", "/v1/x\x00", "/v1/\x7f", "/v1/x#frag", "/v1/é", "/v1/\ud800"),
    *("/v1/x%0d%0aHost:%20evil", "/v1/x%00", "/v1/%7F", "\t/v1", " /v1", "/v1 ", "/" + "a" * MAX_PATH_CHARS),
]


@pytest.mark.parametrize("path", BAD)
def test_bad_paths_are_refused(path: str) -> None:
    """No scheme, no host, no way up, no control characters, in any spelling."""
    with pytest.raises(MessageError, match="path") as caught:
        normalise_path(path)
    assert caught.value.param == "path"


@given(st.text(max_size=40))
def test_whatever_passes_is_harmless(text: str) -> None:
    """What passes begins with one slash and holds only visible ASCII."""
    try:
        path = normalise_path(text)
    except MessageError:
        return
    assert path[0] == "/"
    assert path[1:2] != "/"
    assert all("!" <= char <= "~" for char in path)
    assert normalise_path(path) == path


@pytest.mark.parametrize(
    ("name", "value", "verdict"),
    [
        ("x-tenant", "a b\t~", True),
        ("X_1.!#$%&'*+^`|~", "", True),
        ("", "a", False),
        ("x y", "a", False),
        ("x:", "a", False),
        ("é", "a", False),
        ("x\n", "a", False),
        ("x", "a\r\nb", False),
        ("x", "a\n", False),
        ("x", "\x00", False),
        ("x", "\x7f", False),
        ("x", "é", False),
    ],
)
def test_headers_are_tokens_and_plain_text(name: str, value: str, verdict: bool) -> None:
    """A header that could break out of its line is none."""
    assert is_header(name, value) is verdict
