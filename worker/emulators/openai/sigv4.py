"""
Checks AWS signatures (Signature Version 4) from the specification alone; no AWS library has a part in it.

Pure: the time is an argument.

Source: https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html.
"""

import calendar
import hashlib
import hmac
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote

MAX_SKEW_S = 300
_ALGORITHM = "AWS4-HMAC-SHA256"
_AUTHORIZATION = re.compile(
    rf"{_ALGORITHM} Credential=([^/\s,]+)/(\d{{8}})/([^/\s,]+)/([^/\s,]+)/aws4_request,\s*"
    r"SignedHeaders=([a-z0-9;_-]+),\s*Signature=([0-9a-f]{64})"
)
_TIME = "%Y%m%dT%H%M%SZ"


class SignatureError(Exception):
    """A request that AWS would refuse; every one is a 403."""

    def __init__(self, name: str, message: str) -> None:
        """Take the name of the error and its text."""
        super().__init__(message)
        self.name = name
        self.message = message


@dataclass(frozen=True, slots=True)
class Key:
    """Credentials that are accepted."""

    key_id: str
    secret: str
    token: str = ""
    """Of temporary credentials; empty for lasting ones."""


def verify(
    method: str, target: str, headers: Mapping[str, str], body: bytes, *, key: Key, service: str, now_unix: float
) -> None:
    """
    Return when a request is signed as it must be.

    Args:
        method: As in the request line.
        target: Path and query as in the request line.
        headers: Names in lower case.
        body: As it came.
        key: What it must be signed with.
        service: What it must be signed for.
        now_unix: The server's time.

    Raises:
        SignatureError: It is not.
    """
    match = _AUTHORIZATION.fullmatch(headers.get("authorization", ""))
    if match is None:
        raise SignatureError("MissingAuthenticationTokenException", "Missing Authentication Token")
    key_id, day, region, named_service, names, signature = match.groups()
    if key_id != key.key_id or headers.get("x-amz-security-token", "") != key.token:
        raise SignatureError("UnrecognizedClientException", "The security token included in the request is invalid.")
    if named_service != service:
        text = f"Credential should be scoped to correct service: '{service}'."
        raise SignatureError("InvalidSignatureException", text)
    moment = _check_time(headers.get("x-amz-date", ""), day, now_unix)
    signed = names.split(";")
    required = {"host", *(name for name in headers if name.startswith("x-amz"))}
    if missing := sorted(required - set(signed)):
        raise SignatureError("InvalidSignatureException", f"'{missing[0]}' must be a 'SignedHeader'.")
    canonical = canonical_request(method, target, {name: headers.get(name, "") for name in signed}, body)
    scope = f"{day}/{region}/{service}/aws4_request"
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    expected = hmac_hex(key.secret, day, region, service, f"{_ALGORITHM}\n{moment}\n{scope}\n{digest}")
    if not hmac.compare_digest(expected, signature):
        text = "The request signature we calculated does not match the signature you provided."
        raise SignatureError("InvalidSignatureException", text)


def _check_time(moment: str, day: str, now_unix: float) -> str:
    try:
        signed_at = calendar.timegm(time.strptime(moment, _TIME))
    except ValueError:
        raise SignatureError("IncompleteSignature", "The request has no usable X-Amz-Date.") from None
    if not moment.startswith(day):
        raise SignatureError("InvalidSignatureException", "Date in Credential scope does not match X-Amz-Date.")
    now = time.strftime(_TIME, time.gmtime(now_unix))
    if signed_at < now_unix - MAX_SKEW_S:
        raise SignatureError("InvalidSignatureException", f"Signature expired: {moment} is now earlier than {now}")
    if signed_at > now_unix + MAX_SKEW_S:
        raise SignatureError(
            "InvalidSignatureException", f"Signature not yet current: {moment} is still later than {now}"
        )
    return moment


def canonical_request(method: str, target: str, headers: Mapping[str, str], body: bytes) -> str:
    """Return the text of a request that is signed; `headers` are those that are signed, in order."""
    path, _, query = target.partition("?")
    pairs = sorted(
        (quote(name, safe="~"), quote(value, safe="~")) for name, value in parse_qsl(query, keep_blank_values=True)
    )
    lines = [f"{name}:{' '.join(value.split())}" for name, value in sorted(headers.items())]
    return "\n".join(
        (
            method,
            quote(path or "/", safe="/~"),
            "&".join(f"{name}={value}" for name, value in pairs),
            *lines,
            "",
            ";".join(sorted(headers)),
            hashlib.sha256(body).hexdigest(),
        )
    )


def hmac_hex(secret: str, day: str, region: str, service: str, text: str) -> str:
    """Return the signature of a text."""
    key = f"AWS4{secret}".encode()
    for part in (day, region, service, "aws4_request"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
