"""The services that give AWS credentials, on loopback: STS for web identities, and the endpoint of a container's role."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import pytest

REGION = "us-east-1"
ROLE = "arn:aws:iam::123456789012:role/worker"
_ANSWER = """<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>{key}</AccessKeyId><SecretAccessKey>{secret}</SecretAccessKey>
<SessionToken>{token}</SessionToken><Expiration>{ends}</Expiration></Credentials></AssumeRoleWithWebIdentityResult>
</AssumeRoleWithWebIdentityResponse>"""
_ERROR = """<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type>
<Code>{code}</Code><Message>no</Message></Error></ErrorResponse>"""


class TokenService:
    """What the server is told to do, and what it was asked."""

    def __init__(self) -> None:
        self.lasts_s = 3600.0
        self.error: tuple[int, str] | None = None
        self.key: tuple[str, str, str] | None = None
        """Credentials to give; `None` for another key each time."""
        self.asked: list[dict[str, str]] = []
        self.open = threading.Event()
        self.open.set()
        self.url = ""

    def give(self) -> tuple[str, str, str, str]:
        """Return key id, secret, token and the moment at which they end."""
        number = len(self.asked)
        key = self.key or (f"ASIA{number:016}", f"secret-{number}", f"token-{number}")
        return *key, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + self.lasts_s))

    def key_id(self, number: int) -> str:
        """Return the key id of the answer to a request, counted from 1."""
        return f"ASIA{number:016}"


@contextmanager
def token_service() -> Iterator[TokenService]:
    """Run the server until the end of the block."""
    service = TokenService()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            service.asked.append({name: values[0] for name, values in asked.items()})
            service.open.wait(20)
            key, secret, token, ends = service.give()
            if service.error is not None:
                status, code = service.error
                self.send(status, _ERROR.format(code=code))
            else:
                self.send(200, _ANSWER.format(key=key, secret=secret, token=token, ends=ends))

        def do_GET(self) -> None:
            service.asked.append({"authorization": self.headers.get("Authorization", "")})
            key, secret, token, ends = service.give()
            found = {"AccessKeyId": key, "SecretAccessKey": secret, "Token": token, "Expiration": ends}
            self.send(200, json.dumps(found), "application/json")

        def send(self, status: int, text: str, kind: str = "text/xml") -> None:
            data = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    service.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield service
    finally:
        service.open.set()
        server.shutdown()
        server.server_close()
        thread.join()


def use_no_aws(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Nothing of this machine gives credentials: no files, no metadata server."""
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "no-credentials"))
    monkeypatch.setenv("AWS_REGION", REGION)


def use_web_identity(monkeypatch: pytest.MonkeyPatch, folder: Path, service: TokenService) -> None:
    """As in a pod on GKE or EKS with a projected token."""
    use_no_aws(monkeypatch, folder)
    token = folder / "token"
    token.write_text("a.jwt.of-the-pod")
    monkeypatch.setenv("AWS_ROLE_ARN", ROLE)
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token))
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", service.url)


def use_container_role(monkeypatch: pytest.MonkeyPatch, folder: Path, service: TokenService) -> None:
    """As in a task of ECS, or a pod of EKS with Pod Identity."""
    use_no_aws(monkeypatch, folder)
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{service.url}/role")
    monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN", "of-the-container")


def use_keys(monkeypatch: pytest.MonkeyPatch, folder: Path, key_id: str, secret: str) -> None:
    """As on a developer's machine."""
    use_no_aws(monkeypatch, folder)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
