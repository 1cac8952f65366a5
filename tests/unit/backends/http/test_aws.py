"""AWS credentials: where they come from, when they are renewed, and what is signed with them."""

import asyncio
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from botocore.credentials import ReadOnlyCredentials

from tests.support.aws_tokens import (
    ROLE,
    TokenService,
    token_service,
    use_container_role,
    use_keys,
    use_no_aws,
    use_web_identity,
)
from tests.support.fakes import FakeClock
from tests.support.raw_http import until
from tests.support.sigv4_suite import CASES, KEY_ID, MOMENT, REGION, SECRET, SERVICE, TOKEN, UNIX, Case
from worker.backends.http.aws import AGAIN_S, LOOK_S, AwsIdentity, sign
from worker.emulators.openai.sigv4 import Key, verify
from worker.errors import BackendError, SettingsError


@pytest.fixture
def tokens() -> Iterator[TokenService]:
    """STS, and a container's endpoint."""
    with token_service() as service:
        yield service


@pytest.fixture
def clock() -> FakeClock:
    """Monotonic seconds that pass when told."""
    return FakeClock()


async def failure(identity: AwsIdentity) -> BackendError:
    with pytest.raises(BackendError) as caught:
        await identity.keys()
    return caught.value


# Signatures


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_request_of_awss_suite_has_the_published_signature(case: Case) -> None:
    """What goes into the header is what AWS says of the same request."""
    headers = {"host": "example.amazonaws.com", **case.headers}
    url = f"https://example.amazonaws.com{case.target}"
    keys = ReadOnlyCredentials(KEY_ID, SECRET, None)
    signed = sign(keys, SERVICE, REGION, MOMENT, method=case.method, url=url, headers=headers, body=case.body)
    assert signed["authorization"].endswith(f"Signature={case.signature}")


@pytest.mark.parametrize("token", ["", TOKEN])
def test_every_header_of_an_invocation_is_signed(token: str) -> None:
    """A checker that shares no code accepts it, and refuses it once a header, a byte or the path is another one."""
    headers = {"host": "h:1", "content-type": "application/json", "x-amzn-sagemaker-custom-attributes": "a  b"}
    keys = ReadOnlyCredentials(KEY_ID, SECRET, token or None)
    target, body = "/endpoints/ep/invocations", "é".encode()
    url = f"http://h:1{target}"
    signed = sign(keys, "sagemaker", REGION, MOMENT, method="POST", url=url, headers=headers, body=body)
    key = Key(KEY_ID, SECRET, token)

    def check(changes: dict[str, str], target: str = target, body: bytes = body) -> None:
        verify("POST", target, {**signed, **changes}, body, key=key, service="sagemaker", now_unix=UNIX)

    check({})
    for name, value in signed.items():
        with pytest.raises(Exception, match=r"\w"):
            check({name: value + "x"})
    with pytest.raises(Exception, match="does not match"):
        check({}, target="/endpoints/other/invocations")
    with pytest.raises(Exception, match="does not match"):
        check({}, body=b"e")


# Where credentials come from


async def test_keys_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those never end, and are looked for once."""
    use_keys(monkeypatch, tmp_path, "AKIA1", "s")
    identity = AwsIdentity("r")
    assert identity.region == "us-east-1"
    keys = await identity.keys()
    assert (keys.access_key, keys.secret_key, keys.token) == ("AKIA1", "s", None)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA2")
    assert await identity.keys() is keys
    assert not identity.have_changed()


async def test_a_web_identity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokens: TokenService) -> None:
    """The pod's token becomes the role's credentials; many attempts at once ask for them once."""
    use_web_identity(monkeypatch, tmp_path, tokens)
    identity = AwsIdentity("r", region="eu-west-1")
    found = await asyncio.gather(*(identity.keys() for _ in range(50)))
    assert {keys.token for keys in found} == {"token-1"}
    (asked,) = tokens.asked
    assert asked["Action"] == "AssumeRoleWithWebIdentity"
    assert (asked["RoleArn"], asked["WebIdentityToken"]) == (ROLE, "a.jwt.of-the-pod")
    assert identity.region == "eu-west-1"
    await identity.aclose()


async def test_a_containers_role(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokens: TokenService) -> None:
    """The endpoint of the container is asked with its token."""
    use_container_role(monkeypatch, tmp_path, tokens)
    assert (await AwsIdentity("r").keys()).access_key == tokens.key_id(1)
    assert tokens.asked == [{"authorization": "of-the-container"}]


async def test_a_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of AWS's files, region and all."""
    use_no_aws(monkeypatch, tmp_path)
    monkeypatch.delenv("AWS_REGION")
    config = tmp_path / "config"
    config.write_text("[profile p]\nregion = eu-north-1\naws_access_key_id = AKIAP\naws_secret_access_key = s\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    identity = AwsIdentity("r", profile="p")
    assert identity.region == "eu-north-1"
    assert (await identity.keys()).access_key == "AKIAP"


def test_no_region_and_no_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Found at the start, with what to do about it."""
    use_no_aws(monkeypatch, tmp_path)
    with pytest.raises(SettingsError, match=r"sagemaker\.profile: .*nope"):
        AwsIdentity("r", profile="nope", region="us-east-1")
    monkeypatch.delenv("AWS_REGION")
    with pytest.raises(SettingsError, match=r"sagemaker\.region: is required"):
        AwsIdentity("r")


# Renewal


async def test_credentials_are_renewed_while_attempts_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokens: TokenService, clock: FakeClock
) -> None:
    """Ten minutes before their end nobody waits: the old ones are used until the new ones are there."""
    use_web_identity(monkeypatch, tmp_path, tokens)
    tokens.lasts_s = 600
    identity = AwsIdentity("r", clock=clock.now)
    assert (await identity.keys()).token == "token-1"
    tokens.open.clear()
    clock.advance(LOOK_S)
    for _ in range(100):
        assert (await identity.keys()).token == "token-1"
    tokens.lasts_s = 3600
    tokens.open.set()
    await identity.aclose()
    assert (await identity.keys()).token == "token-2"
    assert len(tokens.asked) == 2


async def test_a_failed_renewal_is_repeated_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokens: TokenService, clock: FakeClock, logs: list[Any]
) -> None:
    """Good credentials are used on, and the token service is not asked by every attempt."""
    use_web_identity(monkeypatch, tmp_path, tokens)
    tokens.lasts_s = 600
    identity = AwsIdentity("r", clock=clock.now)
    await identity.keys()
    tokens.error = (403, "AccessDenied")
    for _ in range(3):
        clock.advance(AGAIN_S)
        asked = len(tokens.asked)
        for _ in range(5):
            assert (await identity.keys()).token == "token-1"
            await identity.aclose()
        assert len(tokens.asked) == asked + 1


async def test_credentials_at_their_end_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokens: TokenService, clock: FakeClock
) -> None:
    """Within five minutes of it; a request that is refused would be wasted."""
    use_web_identity(monkeypatch, tmp_path, tokens)
    tokens.lasts_s = 200
    identity = AwsIdentity("r", clock=clock.now)
    await identity.keys()
    tokens.lasts_s = 3600
    assert (await identity.keys()).token == "token-2"
    assert len(tokens.asked) == 2


async def test_the_event_loop_runs_on_while_credentials_are_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokens: TokenService
) -> None:
    """A token service that hangs holds up those who wait for it and nobody else; a waiter that goes leaves the rest."""
    use_web_identity(monkeypatch, tmp_path, tokens)
    tokens.open.clear()
    identity = AwsIdentity("r")
    first, second = asyncio.create_task(identity.keys()), asyncio.create_task(identity.keys())
    await until(lambda: tokens.asked)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert first.cancelled()
    assert not second.done()
    tokens.open.set()
    assert (await second).token == "token-1"
    assert len(tokens.asked) == 1


# What goes wrong


async def test_no_credentials_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, logs: list[Any]) -> None:
    """The worker's fault, not the message's: its class is held."""
    use_no_aws(monkeypatch, tmp_path)
    error = await failure(AwsIdentity("r"))
    assert error.fault == "credentials"
    assert [(line["event"], line["log_level"]) for line in logs] == [("credentials_unavailable", "warning")]


@pytest.mark.parametrize(
    ("status", "fault"), [(403, "credentials"), (400, "credentials"), (500, "connect"), (503, "connect")]
)
async def test_a_token_service_that_refuses(
    status: int, fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokens: TokenService
) -> None:
    """A refusal is about who the worker is, a failure about the service."""
    use_web_identity(monkeypatch, tmp_path, tokens)
    tokens.error = (status, "AccessDenied" if status < 500 else "InternalFailure")
    identity = AwsIdentity("r")
    assert (await failure(identity)).fault == fault
    tokens.error = None
    assert (await identity.keys()).access_key


async def test_a_token_service_that_is_away(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokens: TokenService
) -> None:
    """Nothing listens there."""
    use_web_identity(monkeypatch, tmp_path, tokens)
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", "http://127.0.0.1:9")
    assert (await failure(AwsIdentity("r"))).fault == "connect"


async def test_a_token_file_that_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokens: TokenService) -> None:
    """An `OSError` of the chain is a fault like any other."""
    use_web_identity(monkeypatch, tmp_path, tokens)
    (tmp_path / "token").unlink()
    assert (await failure(AwsIdentity("r"))).fault == "credentials"


async def test_other_credentials_are_looked_for_while_these_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clock: FakeClock
) -> None:
    """A key that an operator replaces is noticed without a restart, and no look is made for any other failure."""
    use_keys(monkeypatch, tmp_path, "AKIA1", "s")
    identity = AwsIdentity("r", clock=clock.now)
    await identity.keys()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA2")
    clock.advance(LOOK_S)
    assert not identity.have_changed()
    await identity.aclose()
    assert not identity.have_changed()
    identity.note_refused()
    assert not identity.have_changed()
    await identity.aclose()
    assert identity.have_changed()
    assert (await identity.keys()).access_key == "AKIA2"
    assert not identity.have_changed()


# The clock


@pytest.mark.parametrize("skew_s", [-3600, -600, 600, 86_400])
def test_a_wrong_clock_is_corrected_once(
    skew_s: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, logs: list[Any]
) -> None:
    """By the time of the answer that refuses the signature; the same answer again changes nothing."""
    use_keys(monkeypatch, tmp_path, "AKIA1", "s")
    identity = AwsIdentity("r", wall_clock=lambda: float(UNIX))
    keys = ReadOnlyCredentials("AKIA1", "s", None)
    date = formatdate(UNIX + skew_s, usegmt=True)
    assert identity.correct_clock("InvalidSignatureException", date)
    assert not identity.correct_clock("InvalidSignatureException", date)
    signed = identity.sign(keys, "POST", "https://h/", {"host": "h"}, b"")
    key = Key("AKIA1", "s")
    verify("POST", "/", signed, b"", key=key, service="sagemaker", now_unix=UNIX + skew_s)
    assert [line["skew_s"] for line in logs if line["event"] == "clock_corrected"] == [skew_s]


@pytest.mark.parametrize(
    ("name", "date"),
    [
        ("InvalidSignatureException", formatdate(UNIX + 100, usegmt=True)),
        ("AccessDeniedException", formatdate(UNIX + 9999, usegmt=True)),
        ("InvalidSignatureException", None),
        ("InvalidSignatureException", "yesterday"),
    ],
)
def test_another_refusal_is_not_about_the_clock(
    name: str, date: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A wrong secret has the same error, at the same time."""
    use_keys(monkeypatch, tmp_path, "AKIA1", "s")
    assert not AwsIdentity("r", wall_clock=lambda: float(UNIX)).correct_clock(name, date)
