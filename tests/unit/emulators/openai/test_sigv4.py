"""The simulated service checks signatures as AWS does: by AWS's own test suite, and by everything that is not right."""

import pytest

from tests.support.sigv4_suite import CASES, KEY_ID, MOMENT, REGION, SECRET, SERVICE, TOKEN, UNIX, Case
from worker.emulators.openai.sigv4 import MAX_SKEW_S, Key, SignatureError, verify

KEY = Key(KEY_ID, SECRET)
VANILLA = next(case for case in CASES if case.name == "post-vanilla")


def headers_of(case: Case, *, scope: str = f"20150830/{REGION}/{SERVICE}", **changes: str) -> dict[str, str]:
    """The headers of a request of the suite, with its published signature."""
    headers = {"host": "example.amazonaws.com", "x-amz-date": MOMENT, **case.headers}
    names = ";".join(sorted(headers))
    headers["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={KEY_ID}/{scope}/aws4_request, SignedHeaders={names}, Signature={case.signature}"
    )
    return {**headers, **{name.replace("_", "-"): value for name, value in changes.items()}}


def check(
    case: Case, headers: dict[str, str], *, key: Key = KEY, now_unix: float = UNIX, body: bytes | None = None
) -> None:
    body = case.body if body is None else body
    verify(case.method, case.target, headers, body, key=key, service=SERVICE, now_unix=now_unix)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_published_signatures_are_accepted(case: Case) -> None:
    """Of every request of the suite, and not with another body."""
    check(case, headers_of(case))
    with pytest.raises(SignatureError, match="does not match"):
        check(case, headers_of(case), body=case.body + b"x")


@pytest.mark.parametrize("late_s", [-MAX_SKEW_S - 1, MAX_SKEW_S + 1])
def test_a_signature_is_good_for_five_minutes(late_s: int) -> None:
    """Before and after its time."""
    check(VANILLA, headers_of(VANILLA), now_unix=UNIX + (late_s - 1 if late_s > 0 else late_s + 1))
    with pytest.raises(SignatureError, match=r"Signature (expired|not yet current): 20150830T123600Z is"):
        check(VANILLA, headers_of(VANILLA), now_unix=UNIX + late_s)


@pytest.mark.parametrize(
    ("headers", "key", "name"),
    [
        ({}, KEY, "MissingAuthenticationTokenException"),
        ({"authorization": "Bearer x"}, KEY, "MissingAuthenticationTokenException"),
        (headers_of(VANILLA), Key("AKIDOTHER", SECRET), "UnrecognizedClientException"),
        (headers_of(VANILLA), Key(KEY_ID, SECRET, TOKEN), "UnrecognizedClientException"),
        (headers_of(VANILLA), Key(KEY_ID, "other"), "InvalidSignatureException"),
        (headers_of(VANILLA, scope=f"20150830/{REGION}/s3"), KEY, "InvalidSignatureException"),
        (headers_of(VANILLA, scope=f"20150831/{REGION}/{SERVICE}"), KEY, "InvalidSignatureException"),
        (headers_of(VANILLA, x_amz_date="now"), KEY, "IncompleteSignature"),
        (headers_of(VANILLA, x_amzn_extra="1"), KEY, "InvalidSignatureException"),
        (headers_of(VANILLA, host="other"), KEY, "InvalidSignatureException"),
    ],
)
def test_what_is_refused(headers: dict[str, str], key: Key, name: str) -> None:
    """Under the name that AWS gives it."""
    with pytest.raises(SignatureError) as caught:
        check(VANILLA, headers, key=key)
    assert caught.value.name == name


def test_spaces_within_a_value_count_once() -> None:
    """As the specification trims them on both sides."""
    case = Case("spaces", VANILLA.signature, headers={"x-amz-a": "a  b"})
    from worker.emulators.openai.sigv4 import canonical_request

    assert "x-amz-a:a b\n" in canonical_request("GET", "/", dict(case.headers), b"")
