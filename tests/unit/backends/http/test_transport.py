"""A prepared request is the same as httpx's own, whether its headers were asked for or not."""

from collections.abc import Mapping

import httpx
import pytest

from worker.backends.http.transport import PreparedRequest, headers_of

URL = httpx.URL("http://h:8000/v1/x?a=1")
FIXED = {"host": "h:8000", "accept": "application/json", "x-team": "a"}
OWN = {"x-request-id": "1", "x-team": "b", "content-length": "2"}
EXTENSIONS = {"timeout": {"connect": 3.0}}


def a_request(own: Mapping[str, str] = OWN) -> PreparedRequest:
    return PreparedRequest("POST", URL, fixed=FIXED, own=own, stream=httpx.ByteStream(b"{}"), extensions=EXTENSIONS)


def test_it_is_the_request_that_httpx_would_make():
    """Every attribute of it, those included that a later httpx may add."""
    ours = a_request()
    theirs = httpx.Request("POST", URL, headers={**FIXED, **OWN}, stream=httpx.ByteStream(b"{}"), extensions=EXTENSIONS)
    assert ours.headers == theirs.headers
    assert set(vars(theirs)) <= set(vars(ours))
    for name in vars(theirs).keys() - {"stream", "headers"}:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (ours.read(), ours.content) == (b"{}", b"{}")


def test_one_requests_own_headers_come_before_those_of_all():
    """And say nothing to the next request."""
    assert headers_of(a_request()) == {**FIXED, **OWN}
    assert headers_of(a_request({})) == FIXED
    assert a_request().headers["x-team"] == "b"
    assert a_request({}).headers["x-team"] == "a"


def test_what_was_changed_in_the_headers_is_sent():
    """The headers may be changed or replaced; those of this request alone."""
    request = a_request()
    request.headers["x-team"] = "c"
    request.headers["x-new"] = "d"
    assert headers_of(request) == {**FIXED, **OWN, "x-team": "c", "x-new": "d"}
    request.headers = httpx.Headers({"x-only": "e"})
    assert headers_of(request) == {"x-only": "e"}
    assert headers_of(a_request()) == {**FIXED, **OWN}


def test_extensions_are_a_requests_own():
    """As httpx copies them: what is added to one request's is not in the next."""
    request = a_request()
    request.extensions["x"] = 1
    assert a_request().extensions == EXTENSIONS


@pytest.mark.parametrize("looked_at", [False, True])
def test_names_do_not_care_about_case(looked_at: bool):
    """Of a plain request neither, and repeated names stay repeated."""
    request = httpx.Request("GET", URL, headers=[("X-A", "1"), ("x-a", "2")])
    assert headers_of(request).getall("x-A") == ["1", "2"]  # type: ignore[attr-defined]
    prepared = a_request()
    if looked_at:
        assert prepared.headers["X-TEAM"] == "b"
    assert headers_of(prepared)["x-team"] == "b"
