"""
The session below the transport: aiohttp's client with everything off that is not ours to do.

No redirects, no cookies, no proxies or passwords of the environment, no retries (aiohttp repeats no POST), no limit of
connections: the window above is the limit.
"""

import aiohttp

from worker.backends.http.watched_response import WatchedResponse

KEEPALIVE_S = 4.0
"""How long an idle connection is kept: below uvicorn's 5 s (vLLM, SGLang), so that a request is not sent into a
connection the server is just closing (https://www.uvicorn.org/settings/#timeouts)."""


def open_session() -> aiohttp.ClientSession:
    """Return a session; on the event loop."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S, ttl_dns_cache=10),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),
        response_class=WatchedResponse,
        max_line_size=64 * 1024,
        max_field_size=64 * 1024,
    )
