"""
An `httpx.Request` whose headers are made only if somebody looks at them.

A route's requests differ in two or three headers.  httpx takes every one apart to keep it as bytes, and the transport
would put them together again; that is 0.01 ms of CPU a request, a tenth of an attempt.  The transport of this package
takes the headers as they are instead; for anything else, another transport or a test, this is a request like any other.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import httpx
from multidict import CIMultiDict


class PreparedRequest(httpx.Request):
    """
    One request of a route.

    Args:
        method: In upper case.
        url: Not copied.
        fixed: The headers of every request, shared by them; names in lower case.
        own: The headers of this one; they come before those of the same name.  Likewise.
        stream: The body.
        extensions: As of `httpx.Request`.
    """

    def __init__(
        self,
        method: str,
        url: httpx.URL,
        *,
        fixed: Mapping[str, str],
        own: Mapping[str, str],
        stream: httpx.AsyncByteStream,
        extensions: Mapping[str, Any],
    ) -> None:
        # Everything that httpx's constructor sets for a request with a `stream`, but for the headers.
        self.method = method
        self.url = url
        self.stream = stream
        self.extensions = dict(extensions)
        self._fixed = fixed
        self._own = own

    @cached_property
    def headers(self) -> httpx.Headers:  # type: ignore[override]  # a cached property can be set as well
        """All headers; made when asked for, and from then on what is in force."""
        return httpx.Headers(self.plain_headers())

    def plain_headers(self) -> dict[str, str]:
        """Return the headers as they were given."""
        return {**self._fixed, **self._own}


def headers_of(request: httpx.Request) -> Mapping[str, str]:
    """Return a request's headers for aiohttp, by the short way if nobody has looked at them."""
    if isinstance(request, PreparedRequest) and "headers" not in request.__dict__:
        return request.plain_headers()
    return CIMultiDict([(name.decode(), value.decode()) for name, value in request.headers.raw])
