"""TLS and proxies: which server is talked to, and what it is told of the worker."""

import asyncio
import base64
import ssl
from pathlib import Path
from typing import Any

import pytest

from tests.support.certificates import Authority
from tests.support.raw_http import CHUNKED, Attempt, Connection, Open, always, answer, invoke, pause, raw_server, until
from worker.backends.http.pool import REST_S
from worker.backends.http.tls import Tls, check_tls_files
from worker.errors import SettingsError
from worker.policy.model import Fault, Phase
from worker.settings.load import load_settings
from worker.settings.schema import TlsSettings

SLOW = {"connect_s": 2.0}
"""A handshake takes longer than `SHORT` allows on a busy machine."""


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def trusting(authority: Authority, **more: Any) -> dict[str, Any]:
    return {"tls": {"ca_file": str(authority.file), **more}}


# TLS


async def test_a_server_with_a_certificate_of_the_authority_is_asked(authority: Authority, open_backend: Open) -> None:
    """Bodies of every size, both ways, on one connection, whatever tickets the server sends between."""
    big = b'{"a": "%s"}' % (b"x" * 3_000_000)

    async def echo(connection: Connection) -> None:
        while True:
            _, body = await connection.read_request()
            await connection.send(answer(body))

    async with raw_server(echo, authority.server("127.0.0.1")) as server:
        backend = open_backend(server.url, **trusting(authority))
        for body in (b"{}", big, b"{}"):
            assert (await invoke(backend, body=body)).body == body
            await pause(2 * REST_S)
        assert server.connections == 1


@pytest.mark.parametrize(
    ("names", "is_known", "words"),
    [
        (["127.0.0.1"], False, "certificate verify failed"),
        (["127.0.0.2", "other.example"], True, "IP address mismatch"),
    ],
    ids=["another authority", "another host"],
)
async def test_another_server_is_not_asked(
    names: list[str], is_known: bool, words: str, authority: Authority, tmp_path: Path
) -> None:
    """The words of TLS say what is wrong."""
    known = authority if is_known else Authority(tmp_path, "another")
    async with raw_server(always(answer(b"{}")), authority.server(*names)) as server:
        attempt = Attempt(server.url, SLOW, **trusting(known))
        error = await attempt.fail()
        assert attempt.outcome(error) == (Fault.CONNECT, Phase.CONNECT, None)
        assert words in error.detail
        assert server.requests == []


async def test_the_server_is_told_its_name(authority: Authority, open_backend: Open) -> None:
    """SNI: several servers share an address."""
    told: list[str | None] = []
    context = authority.server("localhost")
    context.sni_callback = lambda _, name, __: told.append(name)
    async with raw_server(always(answer(b"{}")), context) as server:
        await invoke(open_backend(server.url.replace("127.0.0.1", "localhost"), **trusting(authority)))
    assert told == ["localhost"]


async def test_the_worker_shows_its_certificate(authority: Authority, open_backend: Open) -> None:
    """Also one that was replaced while it runs; one that cannot be read changes nothing."""
    context = authority.server("127.0.0.1")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(authority.file)
    shown: list[Any] = []

    async def once(connection: Connection) -> None:
        shown.append(dict(each[0] for each in connection.writer.get_extra_info("peercert")["subject"])["commonName"])
        await connection.read_request()
        await connection.send(answer(b"{}", "Connection: close"))

    file = authority.issue("first", file="worker.pem")
    async with raw_server(once, context) as server:
        backend = open_backend(server.url, **trusting(authority, cert_file=str(file)))
        await invoke(backend)
        authority.issue("second", file="new.pem").rename(file)
        await invoke(backend)
        file.write_bytes(b"half a fi")
        await invoke(backend)
        file.unlink()
        await invoke(backend)
    assert shown == ["first", "second", "second", "second"]


async def test_a_server_that_wants_a_certificate_and_gets_none_says_so(authority: Authority) -> None:
    """Behind the handshake of TLS 1.3, so the request may have been sent."""
    context = authority.server("127.0.0.1")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(authority.file)
    async with raw_server(always(answer(b"{}")), context) as server:
        attempt = Attempt(server.url, SLOW, **trusting(authority))
        error = await attempt.fail()
        assert error.fault is Fault.CONNECTION_LOST
        assert server.requests == []


@pytest.mark.parametrize("stray", [answer(b'{"a": "stray"}'), b"x"])
async def test_bytes_on_a_quiet_connection_close_it(stray: bytes, authority: Authority, open_backend: Open) -> None:
    """As without TLS."""

    async def talkative(connection: Connection) -> None:
        while True:
            _, body = await connection.read_request()
            await connection.send(answer(body))
            await pause(0.001)
            await connection.send(stray)

    async with raw_server(talkative, authority.server("127.0.0.1")) as server:
        backend = open_backend(server.url, **trusting(authority))
        for number in range(5):
            body = b'{"n": %d}' % number
            assert (await invoke(backend, body=body)).body == body


@pytest.mark.parametrize("data", [answer(b"{", length=9), CHUNKED + b"2\r\n{}\r\n"])
async def test_an_answer_that_is_cut_is_no_answer(data: bytes, authority: Authority) -> None:
    """Whether TLS was ended or not."""

    async def script(connection: Connection) -> None:
        await connection.read_request()
        await connection.send(data)

    async with raw_server(script, authority.server("127.0.0.1")) as server:
        attempt = Attempt(server.url, SLOW, **trusting(authority))
        assert (await attempt.fail()).fault is Fault.CONNECTION_LOST


async def test_a_request_that_is_not_taken_is_being_sent(authority: Authority) -> None:
    """The phase tells whether a GPU may have worked."""

    async def never_reads(connection: Connection) -> None:
        connection.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.get_running_loop().create_future()

    async with raw_server(never_reads, authority.server("127.0.0.1")) as server:
        attempt = Attempt(server.url, {**SLOW, "first_byte_s": 0.5}, **trusting(authority))
        error = await attempt.fail(b"x" * 20_000_000)
        assert attempt.outcome(error) == (Fault.FIRST_BYTE_TIMEOUT, Phase.SEND, None)


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"ca_file": "absent"}, "tls.ca_file: {}/absent: No such file or directory"),
        ({"ca_file": "junk"}, "tls.ca_file: {}/junk: "),
        ({"cert_file": "absent"}, "tls.cert_file: {}/absent: No such file or directory"),
        ({"cert_file": "authority.pem"}, "tls.cert_file: {}/authority.pem: "),
    ],
)
def test_files_that_cannot_be_used_are_named(
    files: dict[str, str], fault: str, authority: Authority, tmp_path: Path
) -> None:
    """Before anything starts."""
    (tmp_path / "junk").write_text("no certificate")
    with pytest.raises(SettingsError) as caught:
        Tls(TlsSettings(**{name: str(tmp_path / file) for name, file in files.items()}))
    assert caught.value.faults[0].startswith(fault.format(tmp_path))


def test_a_key_with_a_password_asks_nobody(authority: Authority, tmp_path: Path) -> None:
    """A worker has no terminal."""
    locked = tmp_path / "locked.pem"
    locked.write_text(LOCKED_KEY)
    with pytest.raises(SettingsError, match=r"tls\.cert_file"):
        Tls(TlsSettings(cert_file=str(authority.issue("w", file="w.pem")), key_file=str(locked)))


LOCKED_KEY = """-----BEGIN EC PRIVATE KEY-----
Proc-Type: 4,ENCRYPTED
DEK-Info: AES-128-CBC,0123456789ABCDEF0123456789ABCDEF

AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA
-----END EC PRIVATE KEY-----
"""


def test_config_check_reads_what_is_there(authority: Authority, tmp_path: Path) -> None:
    """A file that is not on this machine may be where the worker runs."""
    (tmp_path / "junk").write_text("no certificate")
    flags = {"pubsub.request_subscription": "s", "pubsub.response_topic": "t", "backend.base_url": "https://h"}
    check_tls_files(load_settings(flags={**flags, "backend.tls.ca_file": str(tmp_path / "absent")}, environ={}))
    with pytest.raises(SettingsError, match=r"backend\.tls\.ca_file"):
        check_tls_files(load_settings(flags={**flags, "backend.tls.ca_file": str(tmp_path / "junk")}, environ={}))
    gate = {"type": "vllm", "url": "https://m/metrics", "tls.ca_file": str(tmp_path / "junk")}
    flags |= {f"backend.metric_gate.{key}": value for key, value in gate.items()}
    with pytest.raises(SettingsError, match=r"backend\.metric_gate\.tls\.ca_file"):
        check_tls_files(load_settings(flags=flags, environ={}))


# Proxies


async def tunnel(connection: Connection, port: int, reply: bytes) -> None:
    """Serve CONNECT: copy bytes to a port on loopback, both ways."""
    head = await connection.reader.readuntil(b"\r\n\r\n")
    connection._server.requests.append((head, b""))
    await connection.send(reply)
    if not reply.startswith(b"HTTP/1.1 200"):
        return
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            target.write(data)
        target.close()

    try:
        await asyncio.gather(copy(connection.reader, writer), copy(reader, connection.writer))
    finally:
        writer.close()


async def test_a_proxy_opens_a_tunnel_for_tls(authority: Authority, open_backend: Open) -> None:
    """TLS is with the server, not with the proxy, which alone is told the password."""
    async with raw_server(always(answer(b"{}")), authority.server("127.0.0.1")) as server:
        port = int(server.url.rpartition(":")[2])
        established = b"HTTP/1.1 200 Connection established\r\nX: y\r\n\r\n"
        async with raw_server(lambda connection: tunnel(connection, port, established)) as proxy:
            url = proxy.url.replace("//", "//me:p%40ss@")
            backend = open_backend(server.url, proxy=url, **trusting(authority))
            for _ in range(2):
                assert (await invoke(backend)).body == b"{}"
        ((head, _),) = proxy.requests
        credentials = base64.b64encode(b"me:p@ss").decode()
        assert head.decode().split("\r\n") == [
            f"CONNECT 127.0.0.1:{port} HTTP/1.1",
            f"Host: 127.0.0.1:{port}",
            f"Proxy-Authorization: Basic {credentials}",
            "",
            "",
        ]
        assert all(b"proxy-authorization" not in head.lower() for head, _ in server.requests)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "407 Proxy Authentication Required"),
        (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 2\r\n\r\nno", "502 Bad Gateway"),
        (b"SSH-2.0\r\n\r\n", "SSH-2.0"),
        (b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", "no tunnel"),
        (b"HTTP/1.1 200 OK\r\n", "no tunnel"),
        (b"x" * 20_000, "no tunnel"),
        (b"", "no tunnel"),
    ],
    ids=["no password", "no server", "no proxy", "more than an answer", "half an answer", "no end", "nothing"],
)
async def test_a_proxy_that_opens_no_tunnel_was_not_asked_for_more(reply: bytes, words: str) -> None:
    """The request was certainly not sent; what the proxy said is in the words."""

    async def script(connection: Connection) -> None:
        await connection.reader.readuntil(b"\r\n\r\n")
        await connection.send(reply)

    async with raw_server(script) as proxy:
        attempt = Attempt("https://127.0.0.1:1", SLOW, proxy=proxy.url)
        error = await attempt.fail()
        assert attempt.outcome(error) == (Fault.CONNECT, Phase.CONNECT, None)
        assert words in error.detail


async def test_a_proxy_that_says_nothing_is_given_up(authority: Authority) -> None:
    """Within the limit of connecting."""

    async def script(connection: Connection) -> None:
        await connection.wait_closed_by_peer()

    async with raw_server(script) as proxy:
        attempt = Attempt("https://127.0.0.1:1", {"connect_s": 0.1}, proxy=proxy.url)
        assert (await attempt.fail()).fault is Fault.CONNECT_TIMEOUT
        await until(lambda: proxy.closed_by_peer)


async def test_a_proxy_forwards_what_is_not_encrypted(open_backend: Open) -> None:
    """The request names the server; connections to the proxy are kept like others."""
    async with raw_server(always(answer(b"{}"))) as proxy:
        backend = open_backend("http://h.example:8000/v1", proxy=proxy.url.replace("//", "//me:secret@"))
        for _ in range(2):
            await invoke(backend, "/v1/x?a=1")
    assert proxy.connections == 1
    line, *headers = proxy.requests[0][0].decode().split("\r\n")
    assert line == "POST http://h.example:8000/v1/x?a=1 HTTP/1.1"
    assert "host: h.example:8000" in headers
    assert f"Proxy-Authorization: Basic {base64.b64encode(b'me:secret').decode()}" in headers


async def test_what_a_proxy_was_told_is_not_passed_on(open_backend: Open) -> None:
    """Proxies repeat headers, too."""
    secret = base64.b64encode(b"me:secret").decode()
    async with raw_server(
        always(answer(b'{"error": "bad header Basic %s"}' % secret.encode(), status="400 Bad"))
    ) as proxy:
        result = await invoke(open_backend("http://h.example", proxy=proxy.url.replace("//", "//me:secret@")))
    assert result.body == b'{"error": "bad header [redacted]"}'


async def test_a_proxy_that_is_away_is_named_without_its_password() -> None:
    """Where nothing listens."""
    attempt = Attempt("https://h.example", SLOW, proxy="http://me:secret@127.0.0.1:1")
    error = await attempt.fail()
    assert error.fault is Fault.CONNECT
    assert "127.0.0.1:1" in error.detail
    assert "secret" not in error.detail
