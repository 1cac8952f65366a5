"""
The session of a route: aiohttp's client with everything off that is not ours to do.

No redirects, no cookies, no proxies or passwords of the environment, no retries (aiohttp repeats no POST), no limit of
connections: the window above is the limit.  What is the same for every request is settled here once, which is a third
of the CPU that a request would cost otherwise.
"""

from collections.abc import Callable, Mapping

import aiohttp

from worker.backends.watched_response import WatchedResponse

KEEPALIVE_S = 4.0
"""How long an idle connection is kept: below uvicorn's 5 s (vLLM, SGLang), so that a request is not sent into a
connection the server is just closing (https://www.uvicorn.org/settings/#timeouts)."""

OpenSession = Callable[[Mapping[str, str], float], aiohttp.ClientSession]
"""Takes the headers of every request and the limit of connecting, seconds."""


def open_session(headers: Mapping[str, str], connect_s: float) -> aiohttp.ClientSession:
    """
    Return a session; on the event loop.

    Args:
        headers: Of every request; one request's own headers come before them.
        connect_s: Limit of making a connection, seconds; no other limit is the session's.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S, ttl_dns_cache=10),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=None, connect=connect_s, sock_connect=connect_s),
        response_class=WatchedResponse,
        max_line_size=64 * 1024,
        max_field_size=64 * 1024,
    )
