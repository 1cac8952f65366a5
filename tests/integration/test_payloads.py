"""Bodies in buckets: a server that speaks S3, and one that fails in every way a service can."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

import pytest

from tests.support.object_storage import ObjectStorage, object_storage
from worker.errors import PayloadError
from worker.payloads.stores import PayloadStores
from worker.settings.schema import PayloadSettings

pytestmark = pytest.mark.slow

BODY = b'{"model":"m","input":"' + b"x" * 20_000_000 + b'"}'


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStorage]:
    with object_storage() as running:
        running.put("bucket")
        yield running


async def content(payloads: PayloadStores, uri: str) -> bytes:
    """The bytes of an object; they come in pieces."""
    async with payloads.open(uri) as payload:
        chunks = [chunk async for chunk in payload.chunks]
    assert sum(len(chunk) for chunk in chunks) == payload.size
    assert payload.size < 1 << 20 or len(chunks) > 1
    return b"".join(chunks)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
async def test_twenty_megabytes_in_and_out(server: ObjectStorage, scheme: str) -> None:
    """Byte for byte, streamed; an answer that is written again replaces the first one."""
    payloads = PayloadStores(
        PayloadSettings(
            request_prefixes=[f"{scheme}://bucket"],
            reply_prefix=f"{scheme}://bucket/answers",
            s3_options=server.s3_options,
            gs_options=server.gs_options,
        ),
        subscription="s",
    )
    await payloads.write("1", b'{"old":1}')
    stored = await payloads.write("1", BODY)
    assert stored.uri == f"{scheme}://bucket/answers/s/1.json"
    assert stored.sha256 == hashlib.sha256(BODY).hexdigest()
    assert await content(payloads, stored.uri) == BODY


@pytest.mark.parametrize("key", ["requests/2026-11-29/1.json", "a~b@c=d,e:f_g-.json", "deep/" * 20 + "x"])
async def test_an_object_that_another_client_wrote(server: ObjectStorage, key: str) -> None:
    """Whatever characters a key may have, each means itself."""
    server.put(f"bucket/{key}", b'{"a":1}')
    settings = PayloadSettings(request_prefixes=["s3://bucket"], s3_options=server.s3_options)
    assert await content(PayloadStores(settings, subscription="s"), f"s3://bucket/{key}") == b'{"a":1}'


@pytest.mark.parametrize("scheme", ["s3", "gs"])
async def test_what_is_not_there(server: ObjectStorage, scheme: str) -> None:
    """An object is the requester's affair, a bucket the operator's."""
    settings = PayloadSettings(
        request_prefixes=[f"{scheme}://bucket", f"{scheme}://nobucket"],
        reply_prefix=f"{scheme}://nobucket",
        s3_options=server.s3_options,
        gs_options=server.gs_options,
    )
    payloads = PayloadStores(settings, subscription="s")
    for uri, fault in (("bucket/absent", "payload_not_found"), ("nobucket/absent", "payload_unavailable")):
        with pytest.raises(PayloadError) as caught:
            await content(payloads, f"{scheme}://{uri}")
        assert caught.value.fault == fault
    with pytest.raises(PayloadError, match="payload_unavailable"):
        await payloads.write("1", b"{}")


@contextmanager
def failing_server() -> Iterator[tuple[str, list[str]]]:
    """A service whose last segment of a path says what it answers; its URL, and the paths that it was asked for."""
    asked, released = list[str](), Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.append(self.path)
            how = self.path.partition("?")[0].replace("%2F", "/").rpartition("/")[2]
            if how == "hang":
                released.wait(30)
                self.close_connection = True
                return
            status = int(how) if how.isdigit() else 200
            self.send_response(status)
            if status == 302:
                self.send_header("Location", f"http://127.0.0.1:{self.server.server_address[1]}/bucket/stolen")
            self.send_header("Connection", "close")
            self.send_header("Last-Modified", "Sun, 29 Nov 2026 09:00:00 GMT")
            self.send_header("ETag", '"e"')
            self.send_header("Content-Length", "1000" if how == "cut" else "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            """Standard error is for the tests."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            released.set()
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def failing() -> Iterator[tuple[str, list[str]]]:
    with failing_server() as running:
        yield running


def failing_stores(url: str, scheme: str, **more: Any) -> PayloadStores:
    options = {
        "gs_options": {"base_url": url, "bearer_token": "t"},
        "s3_options": {"endpoint": url, "access_key_id": "a", "secret_access_key": "b", "region": "r"},
        "az_options": {"endpoint": url, "account_name": "a", "access_key": "a2V5"},
    }
    prefix = f"{scheme}://bucket/a"
    return PayloadStores(
        PayloadSettings(request_prefixes=[prefix], reply_prefix=prefix, **options, **more), subscription="s"
    )


FAULTS = {
    "400": "payload_unavailable",
    "401": "payload_unavailable",
    "403": "payload_refused",
    "404": "payload_not_found",
    "429": "payload_unavailable",
    "500": "payload_unavailable",
    "503": "payload_unavailable",
    "cut": "payload_unavailable",
    "hang": "payload_unavailable",
}


@pytest.mark.parametrize("scheme", ["gs", "s3", "az"])
async def test_every_failure_of_a_service_has_its_fault(failing: tuple[str, list[str]], scheme: str) -> None:
    """After one request each: no retry of the library's, no endless wait."""
    url, asked = failing
    payloads = failing_stores(url, scheme, timeout_s=1.0)
    assert await content(payloads, f"{scheme}://bucket/a/good") == b"{}"
    for how, fault in FAULTS.items():
        asked.clear()
        with pytest.raises(PayloadError) as caught:
            await content(payloads, f"{scheme}://bucket/a/{how}")
        assert (how, caught.value.fault) == (how, fault)
        assert len(asked) == 1, how
        assert "\n" not in caught.value.detail


@pytest.mark.parametrize("scheme", ["gs", "s3", "az"])
async def test_a_request_reaches_the_service_under_its_own_prefix_only(
    failing: tuple[str, list[str]], scheme: str
) -> None:
    """Host and bucket are the settings'; the key is what stands behind them."""
    url, asked = failing
    asked.clear()
    await content(failing_stores(url, scheme), f"{scheme}://bucket/a/x=1/good@b:80")
    (path,) = asked
    assert path.replace("%2F", "/").replace("%3D", "=").replace("%40", "@").replace("%3A", ":") == (
        "/bucket/a/x=1/good@b:80"
    )
