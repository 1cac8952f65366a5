"""
Requests of AWS's own test suite for Signature Version 4, and the signatures that it publishes for them.

Source: https://docs.aws.amazon.com/general/latest/gr/signature-v4-test-suite.html, as botocore runs it
(https://github.com/boto/botocore, `tests/unit/auth/aws4_testsuite`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

KEY_ID, SECRET = "AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
REGION, SERVICE, MOMENT, UNIX = "us-east-1", "service", "20150830T123600Z", 1440938160
TOKEN = (
    "AQoDYXdzEPT//////////wEXAMPLEtc764bNrC9SAPBSM22wDOk4x4HIZ8j4FZTwdQWLWsKWHGBuFqwAeMicRXmxfpSPfIeoIYRqTflfKD8YUuwth"
    "AxqqXS5Rl9fi5nxqUtNBrUs6BhFf1CQMv7g0Ua7dkqtUUcKV2SWOz7ZSJRxUFFfK5VXgIbVuBjDFC8D0Xr9bnZyhQ=="
)


@dataclass(frozen=True)
class Case:
    """One request of the suite."""

    name: str
    signature: str
    method: str = "POST"
    target: str = "/"
    headers: Mapping[str, str] = field(default_factory=dict)
    """Beside `Host` and `X-Amz-Date`."""
    body: bytes = b""


_FORM = "application/x-www-form-urlencoded"
CASES = (
    Case("get-vanilla", "5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31", method="GET"),
    Case("post-vanilla", "5da7c1a2acd57cee7505fc6676e4e544621c30862966e37dddb68e92efbe5d6b"),
    Case(
        "get-vanilla-query-order-key-case",
        "b97d918cfa904a5beff61c982a1b6f458b799221646efd99d3219ec94cdf2500",
        method="GET",
        target="/?Param2=value2&Param1=value1",
    ),
    Case(
        "get-vanilla-empty-query-key",
        "a67d582fa61cc504c4bae71f336f98b97f1ea3c7a6bfe1b6e45aec72011b9aeb",
        method="GET",
        target="/?Param1=value1",
    ),
    Case(
        "post-vanilla-query",
        "28038455d6de14eafc1f9222cf5aa6f1a96197d7deb8263271d420d138af7f11",
        target="/?Param1=value1",
    ),
    Case(
        "post-header-key-sort",
        "c5410059b04c1ee005303aed430f6e6645f61f4dc9e1461ec8f8916fdf18852c",
        headers={"my-header1": "value1"},
    ),
    Case(
        "post-x-www-form-urlencoded",
        "ff11897932ad3f4e8b18135d722051e5ac45fc38421b1da7b9d196a0fe09473a",
        headers={"content-type": _FORM},
        body=b"Param1=value1",
    ),
    Case(
        "post-x-www-form-urlencoded-parameters",
        "1a72ec8f64bd914b0e42e42607c7fbce7fb2c7465f63e3092b3b0d39fa77a6fe",
        headers={"content-type": f"{_FORM}; charset=utf8"},
        body=b"Param1=value1",
    ),
)
